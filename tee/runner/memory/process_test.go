package memory

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The tests below need a process of their own: TestMain is that process when
// this variable says which.
const childVariable = "EDGEKEEP_MEMORY_CHILD"

// notHere is a child's exit code for "this machine cannot show that".
const notHere = 77

func TestMain(m *testing.M) {
	role, arg, _ := strings.Cut(os.Getenv(childVariable), " ")
	children := map[string]func(string) error{"hold": hold, "memlock": memlock, "sandbox": sandboxed, "no-userfaultfd": withoutUserfaultfd}
	if role == "" {
		os.Exit(m.Run())
	}
	switch err := children[role](arg); {
	case errors.Is(err, errors.ErrUnsupported):
		fmt.Fprintln(os.Stderr, err)
		os.Exit(notHere)
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func child(t *testing.T, role string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self)
	c.Env = append(os.Environ(), childVariable+"="+role)
	return c
}

func runChild(t *testing.T, role string) {
	out, err := child(t, role).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == notHere || errors.Is(err, unix.ENOEXEC) {
		t.Skipf("%v: %s", err, out) // ENOEXEC: under an emulator that is not registered
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

var held = []byte("a reading that stays in the guest")

// hold puts the bytes into memory of the kind arg, says where, and waits.
func hold(arg string) error {
	m, err := New(mib)
	if err != nil {
		return err
	}
	for _, p := range []protection{secret, locked, plain} {
		if p.String() == arg {
			m.try = []protection{p}
		}
	}
	b := m.Reallocate(mib)
	if b == nil {
		return errors.New("no memory")
	}
	for i := range held {
		b[5000+i] = held[i] ^ 0x55
	}
	for i := range held {
		b[5000+i] ^= 0x55 // whole nowhere but here
	}
	fmt.Println(uintptr(unsafe.Pointer(&b[5000])))
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// TestReadFromOutside reads a guest's memory from another process, with the
// rights of the same user and, where the test is root, of root. The kinds that
// do not stop it are the control: they show that the attempt would succeed.
func TestReadFromOutside(t *testing.T) {
	forEachProtection(t, func(t *testing.T, p protection) {
		c := child(t, "hold "+p.String())
		stdin, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); errors.Is(err, unix.ENOEXEC) {
			t.Skip(err)
		} else if err != nil {
			t.Fatal(err)
		}
		defer c.Wait()
		defer stdin.Close()
		line, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		address, err := strconv.ParseUint(strings.TrimSpace(line), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		for how, read := range map[string]func(int, uint64, []byte) error{"process_vm_readv": vmRead, "/proc/PID/mem": memRead} {
			got := make([]byte, len(held))
			err := read(c.Process.Pid, address, got)
			seen := bytes.Equal(got, held)
			switch {
			case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOSYS):
				t.Skipf("%s: this user may not even try: %v", how, err)
			case p == secret && (seen || !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.EIO)):
				t.Errorf("%s of secret memory: %q, %v", how, got, err)
			case p != secret && !seen:
				t.Errorf("%s of %v memory, the control: %v", how, p, err)
			}
		}
	})
}

func vmRead(pid int, address uint64, b []byte) error {
	local := unix.Iovec{Base: &b[0]}
	local.SetLen(len(b))
	_, err := unix.ProcessVMReadv(pid, []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
	return err
}

func memRead(pid int, address uint64, b []byte) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.ReadAt(b, int64(address))
	return err
}

func TestMemlock(t *testing.T) { runChild(t, "memlock") }

// memlock runs with 4 MiB of RLIMIT_MEMLOCK and without CAP_IPC_LOCK.
func memlock(string) error {
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 4 * mib, Max: 4 * mib}); err != nil {
		return err
	}
	if os.Getuid() == 0 {
		if err := syscall.Setuid(65534); err != nil {
			return err
		}
	}
	shown := false
	for _, p := range []protection{secret, locked} {
		err := memlockKind(p)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("%v: %w", p, err)
		}
		shown = shown || err == nil
	}
	if !shown {
		return errors.ErrUnsupported
	}
	m, err := New(64 * mib)
	if err != nil {
		return err
	}
	if m.Reallocate(8*mib) == nil || m.Protection() != "plain" {
		return fmt.Errorf("8 MiB of 4: %d bytes of %s", len(m.Bytes()), m.Protection())
	}
	m.Free()
	return nil
}

func memlockKind(p protection) error {
	m, err := New(64 * mib)
	if err != nil {
		return err
	}
	defer m.Free()
	m.try = []protection{p, plain}
	if m.Reallocate(mib) == nil {
		return errors.New("no memory at all")
	}
	if m.Protection() == "plain" {
		return fmt.Errorf("%w: no %v memory", errors.ErrUnsupported, p)
	}
	m.Bytes()[0] = 1
	if m.Reallocate(5*mib) != nil || m.Protection() != p.String() || m.Bytes()[0] != 1 {
		return fmt.Errorf("5 MiB of 4: %d bytes of %s", len(m.Bytes()), m.Protection())
	}
	for size := uint64(mib); size <= 4*mib; size += 64 << 10 {
		if m.Reallocate(size) == nil {
			return fmt.Errorf("%d of 4 MiB are refused", size)
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	if !strings.Contains(string(status), "VmLck:\t    4096 kB") {
		return fmt.Errorf("the kernel does not count 4 MiB as locked:\n%s", status)
	}
	if _, err := m.track(nil); err == nil {
		return errors.New("digests came from beyond what can be locked")
	}
	if m.Reallocate(4*mib+64<<10) != nil {
		return errors.New("grew beyond what can be locked")
	}
	return nil
}

func TestAfterTheSandbox(t *testing.T) { runChild(t, "sandbox") }

// sandboxed can open nothing between Track and Free.
func sandboxed(string) error {
	var memories [2]*Memory
	var trackers [2]*Tracker
	for i := range memories {
		m, err := New(16 * mib)
		if err != nil {
			return err
		}
		tr, err := m.Track()
		if i == 1 {
			tr, err = m.track(nil)
		}
		if err != nil {
			return err
		}
		memories[i], trackers[i] = m, tr
	}
	if err := deny(unix.SYS_OPENAT, unix.SYS_USERFAULTFD, unix.SYS_SOCKET, unix.SYS_EXECVE, unix.SYS_PRCTL); err != nil {
		return err
	}
	if _, err := os.Open("/proc/self/pagemap"); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("there is no sandbox: %v", err)
	}
	for i, m := range memories {
		if err := work(m, trackers[i]); err != nil {
			return fmt.Errorf("%s, %s: %w", m.Protection(), trackers[i].Kind(), err)
		}
	}
	return nil
}

// work is a guest's life.
func work(m *Memory, tr *Tracker) error {
	defer m.Free()
	if m.Reallocate(64<<10) == nil {
		return errors.New("no memory")
	}
	for i := range 30 {
		m.Bytes()[len(m.Bytes())-1] = 1
		if got, err := dirty(tr); err != nil || len(got) != 1 {
			return fmt.Errorf("look %d: %v, %w", i, got, err)
		}
		if m.Reallocate(uint64(len(m.Bytes())+64<<10)) == nil {
			return errors.New("cannot grow")
		}
	}
	return nil
}

func TestWithoutUserfaultfd(t *testing.T) { runChild(t, "no-userfaultfd") }

// withoutUserfaultfd is the fallback as a container meets it.
func withoutUserfaultfd(string) error {
	if err := deny(unix.SYS_USERFAULTFD); err != nil {
		return err
	}
	m, err := New(mib)
	if err != nil {
		return err
	}
	tr, err := m.Track()
	if err != nil {
		return err
	}
	if tr.Kind() != "compare" {
		return fmt.Errorf("got %s", tr.Kind())
	}
	m.Reallocate(mib)[0] = 1
	if got, err := dirty(tr); err != nil || len(got) != 1 {
		return fmt.Errorf("got %v, %v", got, err)
	}
	return nil
}

// deny makes system calls fail with EPERM, in all threads.
func deny(calls ...uint32) error {
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // the number
	for _, nr := range calls {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	runtime.LockOSThread() // TSYNC copies no_new_privs, too, to the other threads
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("%w: no_new_privs: %w", errors.ErrUnsupported, err)
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("%w: seccomp: %w", errors.ErrUnsupported, errno)
	}
	return nil
}

package process

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// parentEnv makes this test binary play a parent that is killed.
const parentEnv = "EDGEKEEP_TEST_PROCESS_PARENT"

func TestMain(m *testing.M) {
	if log := os.Getenv(parentEnv); log != "" {
		playParent(log)
	}
	os.Exit(m.Run())
}

// playParent starts a child, prints its process id and waits to be killed.
func playParent(log string) {
	p, err := Start(log, "/bin/sleep", "1000")
	if err != nil {
		os.Exit(1)
	}
	os.Stdout.WriteString(strconv.Itoa(p.PID()) + "\n")
	<-p.Done()
	os.Exit(1)
}

func start(t *testing.T, script string) *Process {
	t.Helper()
	p, err := Start(filepath.Join(t.TempDir(), "log"), "/bin/sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func TestEnd(t *testing.T) {
	p := start(t, "echo one; echo two >&2; exit 3")
	var exit *exec.ExitError
	if err := p.Err(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("ended with %v, want exit status 3", err)
	}
	if got := p.LogTail(); got != "one\ntwo" {
		t.Errorf("log %q, want both outputs", got)
	}
	if err := p.Stop(); err != nil {
		t.Errorf("stopping a finished child: %v", err)
	}
	if err := p.Kill(); err != nil {
		t.Errorf("killing a finished child: %v", err)
	}
}

func TestStopIsSIGTERM(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "ready")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, `trap 'echo bye; kill $!; exit 0' TERM; sleep 1000 & : > `+fifo+`; wait`)
	if _, err := os.ReadFile(fifo); err != nil { // returns once the trap is set
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := p.Err(); err != nil {
		t.Errorf("ended with %v, want a clean exit", err)
	}
	if p.LogTail() != "bye" {
		t.Errorf("log %q, want the word of the signal handler", p.LogTail())
	}
}

func TestKillIsSIGKILL(t *testing.T) {
	p := start(t, "trap '' TERM; exec sleep 1000")
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if !errors.As(p.Err(), &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("ended with %v, want SIGKILL", p.Err())
	}
}

// TestSurvivesThreads is the trap of the parent-death signal: threads of the
// parent come and go, the child has to stay.
func TestSurvivesThreads(t *testing.T) {
	p := start(t, "exec sleep 1000")
	var group sync.WaitGroup
	for range 50 {
		group.Go(runtime.LockOSThread) // a goroutine that ends locked ends its thread
	}
	group.Wait()
	runtime.GC()
	if err := syscall.Kill(p.PID(), 0); err != nil {
		t.Fatalf("the child is gone: %v", err)
	}
	select {
	case <-p.Done():
		t.Fatalf("the child ended: %v", p.Err())
	default:
	}
}

func TestDiesWithParent(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := exec.Command(self)
	parent.Env = append(os.Environ(), parentEnv+"="+filepath.Join(t.TempDir(), "log"))
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // "signal: killed" is what we want
	for deadline := time.Now().Add(5 * time.Second); alive(child); {
		if time.Now().After(deadline) {
			_ = syscall.Kill(child, syscall.SIGKILL)
			t.Fatal("the child outlived its parent")
		}
		runtime.Gosched()
	}
}

// alive tells whether the process runs; a zombie that nobody reaps does not.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

func TestStartFails(t *testing.T) {
	if _, err := Start(filepath.Join(t.TempDir(), "log"), "/does/not/exist"); err == nil {
		t.Error("a program that does not exist was started")
	}
	if _, err := Start("/does/not/exist/log", "/bin/true"); err == nil {
		t.Error("started without its log")
	}
}

func TestLogTailIsShort(t *testing.T) {
	p := start(t, "head -c 100000 /dev/zero | tr '\\0' x; echo end")
	if err := p.Err(); err != nil {
		t.Fatal(err)
	}
	if got := p.LogTail(); len(got) > tailSize || !strings.HasSuffix(got, "xend") {
		t.Errorf("%d bytes ending in %q", len(got), got[max(0, len(got)-10):])
	}
}

func TestFind(t *testing.T) {
	if path, err := Find("sh", "dash"); err != nil || !filepath.IsAbs(path) {
		t.Errorf("sh: %q, %v", path, err)
	}
	_, err := Find("no-such-program", "one", "two")
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "apt-get install one two") {
		t.Errorf("the error does not say what to do: %v", err)
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	release, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(dir); err == nil {
		t.Fatal("locked twice")
	}
	release()
	release, err = Lock(dir)
	if err != nil {
		t.Fatalf("after the release: %v", err)
	}
	release()
	if _, err := Lock(filepath.Join(dir, "missing")); err == nil {
		t.Error("locked a directory that does not exist")
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"edgekeep/internal/sandbox"
)

// supervise runs a worker on a connection until one of them ends, and sees to it
// that the worker does.
func supervise(ctx context.Context, conn *net.UnixConn, interpreter bool, stderr io.Writer) error {
	defer conn.Close()
	f, err := conn.File()
	if err != nil {
		return fmt.Errorf("the connection to the keep: %w", err)
	}
	defer f.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("the connection to the keep: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("starting a worker: %w", err)
	}
	// What this process was started with, the worker does not get.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("starting a worker: %w", err)
	}
	args := []string{"--worker"}
	if interpreter {
		args = append(args, "--interpreter")
	}
	cmd := exec.Command(self, args...)
	cmd.Stderr, cmd.ExtraFiles, cmd.Env = stderr, []*os.File{f}, []string{}
	runtime.LockOSThread() // the signal comes when the thread that started it ends
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting a worker: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			return err
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
			if !hungUp(raw) {
				continue
			}
		}
		_ = cmd.Process.Kill()
		err := <-ended
		return errors.Join(ctx.Err(), errHungUp, err)
	}
}

// maxData bounds the worker's own memory, in bytes.
const maxData = 1536 << 20

var errHungUp = errors.New("the keep hung up")

// hungUp reports whether the other side of a connection has closed it.
func hungUp(conn syscall.RawConn) (yes bool) {
	err := conn.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		yes = err == nil && n > 0 && fds[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return yes || err != nil
}

// confine takes from the worker everything but the connection and its memory.
func confine() error {
	// What the worker allocates itself: guest memory does not count. Compiling a
	// module that was made for it would take all there is.
	limit := unix.Rlimit{Cur: maxData, Max: maxData}
	if err := unix.Setrlimit(unix.RLIMIT_DATA, &limit); err != nil {
		return fmt.Errorf("limiting memory: %w", err)
	}
	_, err := sandbox.Apply(sandbox.Policy{Alone: true})
	return err
}

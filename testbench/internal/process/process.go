// Package process runs the foreign programs of the test bench: a software TPM,
// a broker.
//
// A child started here
//
//   - dies with its parent, even when the parent is killed with SIGKILL. Linux
//     sends the parent-death signal when the *thread* that forked ends, and Go
//     ends threads at will; so one goroutine, locked to its thread, starts the
//     child and stays in wait(2) until the child is gone;
//   - has a process group of its own: an interrupt typed at the terminal
//     reaches the parent, which then stops its children in the right order;
//   - writes what it prints to a log file, whose end becomes part of the error
//     when it fails to start.
//
// Signals go to the child by its process handle, never by a name.
package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const (
	stopTimeout = 10 * time.Second // from SIGTERM until SIGKILL
	tailSize    = 2048             // bytes of the log quoted in an error
)

// Process is a running or finished child.
type Process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when the child is gone and reaped
	err  error         // how it ended; set before done is closed
}

// Find returns the absolute path of a program. Debian keeps daemons in
// directories that are not on every user's PATH; they are looked at too. The
// error for a missing program tells which Debian packages have it.
func Find(program string, packages ...string) (string, error) {
	if path, err := exec.LookPath(program); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed: on Debian run apt-get install %s: %w",
		program, strings.Join(packages, " "), exec.ErrNotFound)
}

// Start runs the program with the arguments. What it prints replaces the
// contents of logFile.
func Start(logFile, program string, args ...string) (*Process, error) {
	return StartAs(-1, logFile, program, args...)
}

// StartAs is Start as another user (and group of the same number); -1 is ours.
func StartAs(uid int, logFile, program string, args ...string) (*Process, error) {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", program, err)
	}
	defer out.Close()
	p := &Process{cmd: exec.Command(program, args...), log: logFile, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if uid >= 0 && uid != os.Getuid() {
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
	}
	started := make(chan error)
	go p.run(started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	return p, nil
}

// run starts the child and waits for it on one thread.
func (p *Process) run(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := p.cmd.Start()
	started <- err
	if err != nil {
		return
	}
	p.err = p.cmd.Wait()
	close(p.done)
}

// Done is closed when the child is gone.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err tells how the child ended: nil for exit status 0. Valid after Done.
func (p *Process) Err() error {
	<-p.done
	return p.err
}

// PID is the child's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the child with SIGKILL and waits until it is gone. It is no error
// when the child is gone already.
func (p *Process) Kill() error {
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// Stop asks the child to end with SIGTERM and waits until it is gone. A child
// that is still there after ten seconds is killed, which is an error. It is no
// error when the child is gone already.
func (p *Process) Stop() error {
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
	}
	if err := p.Kill(); err != nil {
		return err
	}
	return fmt.Errorf("stop %s: still running %v after SIGTERM, killed", p.cmd.Path, stopTimeout)
}

func (p *Process) signal(s syscall.Signal) error {
	err := p.cmd.Process.Signal(s)
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %v to %s: %w", s, p.cmd.Path, err)
	}
	return nil
}

// LogTail returns the last lines that the child printed, to be quoted in an
// error.
func (p *Process) LogTail() string {
	f, err := os.Open(p.log)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > tailSize {
		_, _ = f.Seek(-tailSize, io.SeekEnd) // a failure quotes the beginning instead
	}
	tail, _ := io.ReadAll(io.LimitReader(f, tailSize))
	return strings.TrimSpace(string(tail))
}

// Lock makes the caller the only user of the directory among all processes,
// until release is called or the process ends.
func Lock(dir string) (release func(), err error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock file: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: somebody else runs in this directory: %w", path, err)
	}
	return func() { f.Close() }, nil
}

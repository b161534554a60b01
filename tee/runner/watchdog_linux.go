package runner

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// watchdog kills this process when it has used more CPU time than it was given. The
// kernel does it: a guest in a tight loop may have stopped everything in here.
type watchdog struct{ timer int32 }

// sigevent is struct sigevent of the kernel (SIGEV_SIGNAL), 64 bytes or, where a
// pointer is short, a little more than it reads.
type sigevent struct {
	value  uintptr
	signo  int32
	notify int32
	_      [52]byte
}

func newWatchdog() (*watchdog, error) {
	w := &watchdog{}
	e := sigevent{signo: int32(unix.SIGKILL)}
	if _, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_PROCESS_CPUTIME_ID, uintptr(unsafe.Pointer(&e)), uintptr(unsafe.Pointer(&w.timer))); errno != 0 {
		return nil, fmt.Errorf("a timer that ends a guest which takes too long: %w", errno)
	}
	return w, nil
}

// arm gives the process this much CPU time from now on.
func (w *watchdog) arm(cpu time.Duration) error {
	spec := struct{ interval, value unix.Timespec }{value: unix.NsecToTimespec(int64(cpu))}
	if _, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(w.timer), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("the timer that ends a guest which takes too long: %w", errno)
	}
	return nil
}

func (w *watchdog) disarm() { _ = w.arm(0) }

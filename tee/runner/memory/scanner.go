package memory

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/userfaultfd.h and linux/fs.h, for the architectures that encode
// ioctl numbers in the common way; elsewhere the probe fails.
const (
	uffdUserModeOnly = 1 // needs no privilege: faults of the kernel are not ours to handle

	uffdAPI         = 0xc018aa3f
	uffdRegister    = 0xc020aa00
	uffdProtect     = 0xc018aa06
	uffdVersion     = 0xaa
	uffdUnpopulated = 1 << 13 // UFFD_FEATURE_WP_UNPOPULATED: pages never touched too
	uffdAsync       = 1 << 15 // UFFD_FEATURE_WP_ASYNC: the kernel lifts protection, no handler
	uffdRegisterWP  = 1 << 1
	uffdProtectWP   = 1 << 0

	pagemapScan = 0xc0606610
	scanProtect = 1 << 0 // PM_SCAN_WP_MATCHING
	scanCheck   = 1 << 1 // PM_SCAN_CHECK_WPASYNC: fail on memory that is not registered
	pageWritten = 1 << 1
	pagePresent = 1 << 3
	pageSwapped = 1 << 4
)

type (
	uffdioAPI      struct{ api, features, ioctls uint64 }
	uffdioRegister struct{ start, length, mode, ioctls uint64 }
	uffdioProtect  struct{ start, length, mode uint64 }
	pageRegion     struct{ start, end, categories uint64 }
	scanArg        struct {
		size, flags                   uint64
		start, end, walkEnd           uint64
		vec, vecLen, maxPages         uint64
		inverted, mask, anyOf, report uint64
	}
)

// scanner asks the kernel which pages were written.
type scanner struct {
	uffd    int
	pagemap int
	found   [256]pageRegion // in the scanner, so on the heap: the kernel gets its address as a number
	probed  byte            // what probe read, or the compiler would not read it
}

// openScanner opens all that a scanner ever needs.
func openScanner() (*scanner, error) {
	uffd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|uffdUserModeOnly, 0, 0)
	if errno != 0 {
		return nil, fmt.Errorf("userfaultfd: %w", errno)
	}
	s := &scanner{uffd: int(uffd), pagemap: -1}
	api := uffdioAPI{api: uffdVersion, features: uffdAsync | uffdUnpopulated}
	err := ioctl(s.uffd, uffdAPI, unsafe.Pointer(&api))
	if err == nil {
		s.pagemap, err = unix.Open("/proc/self/pagemap", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("asking the kernel for written pages: %w", err)
	}
	return s, nil
}

func (s *scanner) close() {
	unix.Close(s.uffd)
	if s.pagemap >= 0 {
		unix.Close(s.pagemap)
	}
}

// register makes b's pages ones that arm and written work on.
func (s *scanner) register(b []byte) error {
	arg := uffdioRegister{start: address(b), length: uint64(len(b)), mode: uffdRegisterWP}
	if err := ioctl(s.uffd, uffdRegister, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("registering %d bytes for write tracking: %w", len(b), err)
	}
	return nil
}

// arm makes all pages of b unwritten ones, also those not present: else the
// first read of such a page would count as a write.
func (s *scanner) arm(b []byte) error {
	arg := uffdioProtect{start: address(b), length: uint64(len(b)), mode: uffdProtectWP}
	if err := ioctl(s.uffd, uffdProtect, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("write-protecting %d bytes: %w", len(b), err)
	}
	return nil
}

// written calls f with ranges of bytes whose pages were written, and arms them.
func (s *scanner) written(b []byte, f func(start, end int)) error {
	return s.scan(b, scanArg{
		flags: scanProtect | scanCheck,
		mask:  pageWritten, anyOf: pagePresent | pageSwapped,
	}, f)
}

// present calls f with ranges of bytes whose pages hold anything.
func (s *scanner) present(b []byte, f func(start, end int)) error {
	return s.scan(b, scanArg{flags: scanCheck, anyOf: pagePresent | pageSwapped}, f)
}

// scan runs one query over the pages of b, in as many calls as the answer takes.
func (s *scanner) scan(b []byte, arg scanArg, f func(start, end int)) error {
	base := address(b)
	arg.size = uint64(unsafe.Sizeof(arg))
	arg.start, arg.end = base, base+uint64(pages(len(b))*os.Getpagesize())
	arg.vec, arg.vecLen = uint64(uintptr(unsafe.Pointer(&s.found[0]))), uint64(len(s.found))
	arg.report = arg.mask | arg.anyOf
	for arg.start < arg.end {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.pagemap), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		if errno != 0 {
			return fmt.Errorf("scanning %d bytes: %w", arg.end-arg.start, errno)
		}
		for _, r := range s.found[:n] {
			f(int(r.start-base), int(r.end-base))
		}
		if arg.walkEnd <= arg.start {
			return errors.New("scanning: the kernel made no progress")
		}
		arg.start = arg.walkEnd
	}
	runtime.KeepAlive(s)
	return nil
}

// probe finds out on a fresh page whether reads and writes are told apart.
func (s *scanner) probe(page []byte) error {
	if err := s.register(page); err != nil {
		return err
	}
	if err := s.arm(page); err != nil {
		return err
	}
	for _, step := range []struct {
		do   func()
		want int
	}{
		{func() { s.probed += page[0] }, 0},
		{func() { page[0]++ }, len(page)},
		{func() { s.probed += page[0] }, 0},
	} {
		step.do()
		got := 0
		if err := s.written(page, func(start, end int) { got += end - start }); err != nil {
			return err
		}
		if got != step.want {
			return fmt.Errorf("probing write tracking: %d bytes reported instead of %d", got, step.want)
		}
	}
	return nil
}

func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

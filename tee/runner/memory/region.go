package memory

import (
	"bytes"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// protection is one of the kinds that the package comment lists.
type protection int

const (
	plain protection = iota
	locked
	secret
)

func (p protection) String() string {
	return [...]string{plain: "plain", locked: "locked", secret: "memfd-secret"}[p]
}

// sysMemfdSecret is the same on every architecture that has the call; others
// (32-bit Arm, for which x/sys has no wrapper) answer ENOSYS.
const sysMemfdSecret = 447

// region is reserved address space, of which a prefix is committed, all of it
// with the same protection.
type region struct {
	space     []byte // whole pages; touch only what is committed
	committed int    // bytes, whole pages
	kind      protection
}

// reserve takes address space for n bytes, rounded up to whole pages.
func reserve(n int) (region, error) {
	space, err := unix.Mmap(-1, 0, pages(n)*os.Getpagesize(), unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return region{}, fmt.Errorf("reserving %d bytes of address space: %w", n, err)
	}
	return region{space: space}, nil
}

// pages is how many pages n bytes take.
func pages(n int) int { return (n + os.Getpagesize() - 1) / os.Getpagesize() }

// commit makes the region usable up to n bytes, rounded up to whole pages.
// What was committed stays as it is, also when this fails; p is then, and
// always after the first, the kind that the region has.
func (r *region) commit(n int, p protection) error {
	end := pages(n) * os.Getpagesize()
	if end <= r.committed {
		return nil
	}
	old := r.committed
	if err := protect(r.space[old:end], p); err != nil {
		r.rollback(old)
		return fmt.Errorf("committing %d bytes of %v memory: %w", end-old, p, err)
	}
	r.committed, r.kind = end, p
	return nil
}

// protect turns reserved address space into memory of the kind p.
func protect(b []byte, p protection) error {
	if p == secret {
		if err := mapSecret(b); err != nil {
			return err
		}
		return unix.Madvise(b, unix.MADV_DONTFORK) // it is never dumped anyway
	}
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_DONTFORK} {
		if err := unix.Madvise(b, advice); err != nil && p == locked {
			return err
		}
	}
	// One write must not dirty 2 MiB. A kernel without huge pages says EINVAL.
	_ = unix.Madvise(b, unix.MADV_NOHUGEPAGE)
	if p == locked {
		return lock(b)
	}
	return nil
}

// mapSecret maps secret memory in place of b and leaves no descriptor.
func mapSecret(b []byte) error {
	fd, _, errno := unix.Syscall(sysMemfdSecret, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return fmt.Errorf("memfd_secret: %w", errno)
	}
	defer unix.Close(int(fd))
	if err := unix.Ftruncate(int(fd), int64(len(b))); err != nil {
		return fmt.Errorf("sizing secret memory: %w", err)
	}
	_, err := unix.MmapPtr(int(fd), 0, unsafe.Pointer(&b[0]), uintptr(len(b)),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED)
	return err
}

// lock keeps the pages of b in memory from their first use on: mlock would
// make all of them present at once.
func lock(b []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MLOCK2, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MLOCK_ONFAULT)
	if errno != 0 {
		return fmt.Errorf("mlock2: %w", errno)
	}
	return nil
}

// rollback returns everything behind the first n bytes to reserved address
// space. It cannot fail but for our own bug: the mapping is ours.
func (r *region) rollback(n int) {
	b := r.space[n:]
	if _, err := unix.MmapPtr(-1, 0, unsafe.Pointer(&b[0]), uintptr(len(b)), unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE|unix.MAP_FIXED); err != nil {
		panic(fmt.Sprintf("guest memory: taking back %d bytes: %v", len(b), err))
	}
	r.committed = n
	if n == 0 {
		r.kind = plain
	}
}

// release gives everything back, overwritten: secret memory by the kernel. The
// region is empty afterwards, its kind stays.
func (r *region) release() {
	if r.space == nil {
		return
	}
	if r.kind != secret {
		wipe(r.space[:r.committed])
	}
	if err := unix.Munmap(r.space); err != nil {
		panic(fmt.Sprintf("guest memory: unmapping %d bytes: %v", len(r.space), err))
	}
	*r = region{kind: r.kind}
}

// wipe zeroes b, whole pages, without making pages present that never were.
func wipe(b []byte) {
	page := os.Getpagesize()
	zero := make([]byte, page)
	for ; len(b) > 0; b = b[page:] {
		if !bytes.Equal(b[:page], zero) {
			clear(b[:page])
		}
	}
}

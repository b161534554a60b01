// Package memory gives one WebAssembly guest its linear memory: out of reach
// of every other process where the kernel allows it, and with a record of
// which pages changed, so that a move copies only those.
//
// # Protection
//
// Address space for the limit is reserved once and never moves; growing commits
// more of it. All of a guest's memory has one kind of protection, the first of
// these that its initial size can have:
//
//   - "memfd-secret": pages outside the kernel's direct map. Other processes
//     cannot read them, not even root through /proc/PID/mem or
//     process_vm_readv; they are never swapped, and not in core dumps. The
//     descriptor is closed as soon as its pages are mapped, so pidfd_getfd has
//     nothing to take. It does not stop root from injecting code.
//   - "locked": anonymous pages under mlock2(MLOCK_ONFAULT), MADV_DONTDUMP and
//     MADV_DONTFORK: not swapped, not in core dumps, but readable by root.
//   - "plain": anonymous pages, and nothing promised.
//
// Both of the first two count against RLIMIT_MEMLOCK (unless the process has
// CAP_IPC_LOCK), by committed size. [Memory.Protection] tells what was got and
// is what the evidence claims. Growth never weakens it: what cannot be had in
// the same kind is refused, and the guest sees memory.grow return -1.
//
// # Tracking
//
// A [Tracker] finds the pages (of os.Getpagesize bytes) written since it last
// looked, in one of two ways:
//
//   - "pagemap-scan": the kernel write-protects the pages through userfaultfd
//     in asynchronous mode and the PAGEMAP_SCAN ioctl collects and re-arms
//     them; a look costs microseconds, and the first write to a page after it
//     about one microsecond. Linux 6.7 or later, and an architecture with
//     userfaultfd write protection (amd64, arm64 from 6.10); secret memory
//     included.
//   - "compare": SHA-256 of every page against the last one. Works everywhere
//     and costs a pass over the memory, which makes every committed page of
//     the guest's size present. Digests give away what they are digests
//     of if that is easy to guess: they live in memory of the same protection,
//     which takes another 1/128 of the size on 4 KiB pages.
//
// Soft-dirty bits are not used: clearing them is for the whole process, and
// kernels are often built without them.
//
// # Under a sandbox
//
// [Memory.Track] opens /proc/self/pagemap and a userfaultfd, and nothing else
// here opens a file: call it before Landlock and seccomp, and before
// PR_SET_DUMPABLE is cleared (which gives /proc/self to root). [New] needs no
// file. After that these system calls are made, and they fail towards the
// caller: memfd_secret, ftruncate, mmap, close, mprotect, madvise, mlock2 (to
// grow); ioctl with UFFDIO_REGISTER 0xc020aa00, UFFDIO_WRITEPROTECT 0xc018aa06
// and PAGEMAP_SCAN 0xc0606610 (to track); munmap and close (to free).
package memory

import (
	"fmt"
	"math"
	"os"

	"github.com/tetratelabs/wazero/experimental"
)

// Memory is the linear memory of one guest, an experimental.MemoryAllocator
// and the experimental.LinearMemory that it allocates. It is for one goroutine
// at a time, as a guest is.
type Memory struct {
	guest   region
	size    int          // what the guest has, in bytes; the region has as much or more
	try     []protection // in this order, for the initial size
	tracker *Tracker
	given   bool // to a guest, by Allocate
}

// New reserves address space for a guest of at most limit bytes, which it
// rounds up to whole pages. Nothing counts against RLIMIT_MEMLOCK yet.
//
// The limit is the last line: also give it to wazero with
// RuntimeConfig.WithMemoryLimitPages, which refuses a module that declares
// more with an error; wazero has no way to take one from an allocator and
// panics.
func New(limit uint64) (*Memory, error) {
	page := uint64(os.Getpagesize())
	if limit == 0 || limit > math.MaxInt-page+1 {
		return nil, fmt.Errorf("guest memory: a limit of %d bytes is out of range: use 1 to %d", limit, math.MaxInt-page+1)
	}
	guest, err := reserve(int(limit))
	if err != nil {
		return nil, fmt.Errorf("guest memory: %w: lower the limit or raise RLIMIT_AS", err)
	}
	return &Memory{guest: guest, try: []protection{secret, locked, plain}}, nil
}

// Allocate implements experimental.MemoryAllocator. A Memory is for one guest:
// a second call panics.
func (m *Memory) Allocate(_, _ uint64) experimental.LinearMemory {
	if m.given {
		panic("guest memory: one Memory given to two guests")
	}
	m.given = true
	return m
}

// Reallocate implements experimental.LinearMemory: it grows the memory to size
// bytes at the same address. It returns nil, and changes nothing, when size is
// beyond the limit, less than the guest has, or not to be had with the
// protection of the rest.
func (m *Memory) Reallocate(size uint64) []byte {
	if size > uint64(len(m.guest.space)) || size < uint64(m.size) {
		return nil
	}
	if err := m.grow(int(size)); err != nil {
		return nil
	}
	m.size = int(size)
	return m.Bytes()
}

// grow commits at least size bytes. Each growth of secret memory is a mapping
// of its own and a process may have only some 65,000: so it takes a quarter
// more than there is, if that is to be had, and the number stays small.
func (m *Memory) grow(size int) error {
	have := m.guest.committed
	if size <= have {
		return nil
	}
	if have == 0 {
		return m.begin(size)
	}
	ample := min(have+max(have/4, 1<<20), len(m.guest.space))
	if ample > size && m.commit(ample, m.guest.kind) == nil {
		return nil
	}
	return m.commit(size, m.guest.kind)
}

// begin commits the initial size with the best protection that it can have.
func (m *Memory) begin(size int) (err error) {
	for _, p := range m.try {
		if err = m.commit(size, p); err == nil {
			return nil
		}
	}
	return err
}

// commit extends the guest's region to n bytes, and the tracker with it.
func (m *Memory) commit(n int, p protection) error {
	old := m.guest.committed
	if err := m.guest.commit(n, p); err != nil {
		return err
	}
	if m.tracker == nil {
		return nil
	}
	if err := m.tracker.cover(old); err != nil {
		m.guest.rollback(old)
		return err
	}
	return nil
}

// Protection says how the memory is protected: "memfd-secret", "locked" or
// "plain", which it also is before there is any. See the package comment.
func (m *Memory) Protection() string { return m.guest.kind.String() }

// Bytes is the guest's memory, in place: the address stays the same, the
// length is right until the guest grows, and after Free a touch is a fault.
func (m *Memory) Bytes() []byte { return m.guest.space[:m.size:m.size] }

// Free overwrites the memory (secret memory the kernel overwrites) and gives
// it and everything that its tracker holds back. wazero calls it when the
// module is closed; a second call does nothing.
func (m *Memory) Free() {
	m.untrack()
	m.guest.release()
	m.size = 0
}

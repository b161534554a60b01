package memory

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// available are the protections that a page of memory can have here.
func available(t testing.TB) (kinds []protection) {
	for _, p := range []protection{secret, locked, plain} {
		r, err := reserve(1)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.commit(1, p); err != nil {
			t.Logf("no %v memory here: %v", p, err)
		} else {
			kinds = append(kinds, p)
		}
		r.release()
	}
	return kinds
}

// with makes a Memory of one protection only.
func with(t testing.TB, p protection, limit uint64) *Memory {
	m, err := New(limit)
	if err != nil {
		t.Fatal(err)
	}
	m.try = []protection{p}
	t.Cleanup(m.Free)
	return m
}

func forEachProtection(t *testing.T, f func(t *testing.T, p protection)) {
	for _, p := range available(t) {
		t.Run(p.String(), func(t *testing.T) { f(t, p) })
	}
}

func TestGrowStaysInPlaceAndKeepsBytes(t *testing.T) {
	forEachProtection(t, func(t *testing.T, p protection) {
		m := with(t, p, 8*mib)
		first := m.Reallocate(64 << 10)
		if len(first) != 64<<10 || cap(first) != len(first) {
			t.Fatalf("got %d bytes, capacity %d", len(first), cap(first))
		}
		first[0], first[len(first)-1] = 1, 2
		for size := uint64(128 << 10); size <= 8*mib; size += 64 << 10 {
			b := m.Reallocate(size)
			if uint64(len(b)) != size || &b[0] != &first[0] {
				t.Fatalf("growing to %d moved the memory or got %d bytes", size, len(b))
			}
			if b[size-1] != 0 {
				t.Fatalf("grown memory at %d is not zero", size-1)
			}
			b[size-1] = 3
		}
		if b := m.Bytes(); b[0] != 1 || b[64<<10-1] != 2 || b[len(b)-1] != 3 {
			t.Fatal("growing changed the bytes")
		}
		if m.Protection() != p.String() {
			t.Fatalf("got %s", m.Protection())
		}
	})
}

func TestGrowthTakesFewMappings(t *testing.T) {
	m := with(t, plain, 1<<30)
	commits, last := 0, 0
	for size := uint64(64 << 10); size <= 1<<30; size += 64 << 10 {
		if m.Reallocate(size) == nil {
			t.Fatalf("growing to %d failed", size)
		}
		if m.guest.committed != last {
			commits, last = commits+1, m.guest.committed
		}
	}
	if commits > 60 {
		t.Fatalf("%d mappings for 16,384 steps", commits)
	}
}

func TestLimits(t *testing.T) {
	for _, limit := range []uint64{0, math.MaxInt, math.MaxUint64} {
		if _, err := New(limit); err == nil {
			t.Errorf("a limit of %d was accepted", limit)
		}
	}
	m := with(t, plain, 2*mib)
	for _, size := range []uint64{2*mib + 1, math.MaxInt, math.MaxUint64} {
		if m.Reallocate(size) != nil {
			t.Errorf("got %d bytes with a limit of 2 MiB", size)
		}
	}
	if len(m.Reallocate(2*mib)) != 2*mib {
		t.Error("the limit itself is refused")
	}
	if m.Reallocate(mib) != nil || len(m.Bytes()) != 2*mib {
		t.Error("the memory shrank")
	}
}

func TestProtectionBeforeAllocation(t *testing.T) {
	m := with(t, secret, mib)
	if m.Protection() != "plain" || len(m.Bytes()) != 0 {
		t.Fatalf("claims %q for %d bytes", m.Protection(), len(m.Bytes()))
	}
}

func TestOneGuestPerMemory(t *testing.T) {
	m := with(t, plain, mib)
	m.Allocate(0, mib)
	defer func() {
		if recover() == nil {
			t.Fatal("a second guest got the same memory")
		}
	}()
	m.Allocate(0, mib)
}

func TestGrowthKeepsTheKind(t *testing.T) {
	m := with(t, locked, 2*mib)
	if err := m.guest.commit(1, plain); err != nil {
		t.Fatal(err)
	}
	// The region got its kind; the list for the initial size no longer counts.
	if m.Reallocate(2*mib) == nil || m.Protection() != "plain" {
		t.Fatalf("grew into %s", m.Protection())
	}
}

// TestKernelFlags asks the kernel what it thinks of the mapping.
func TestKernelFlags(t *testing.T) {
	forEachProtection(t, func(t *testing.T, p protection) {
		m := with(t, p, 4*mib)
		if m.Reallocate(64<<10) == nil || m.Reallocate(3*mib) == nil {
			t.Fatal("no memory")
		}
		for _, offset := range []int{0, 3*mib - 1} {
			flags := vmFlags(t, &m.Bytes()[offset])
			for flag, meaning := range map[string]string{"lo": "locked", "dd": "not dumped", "dc": "not inherited"} {
				if !strings.Contains(flags, " "+flag+" ") && p != plain {
					t.Errorf("offset %d is not %s: flags%s", offset, meaning, flags)
				}
			}
			if _, err := os.Stat("/sys/kernel/mm/transparent_hugepage"); err == nil && p == locked && !strings.Contains(flags, " nh ") {
				t.Errorf("offset %d can be huge pages: flags%s", offset, flags)
			}
			if p == plain && strings.Contains(flags, " lo ") {
				t.Errorf("offset %d is locked: flags%s", offset, flags)
			}
		}
	})
}

// vmFlags is the VmFlags line of the mapping that holds p.
func vmFlags(t *testing.T, p *byte) string {
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Skip(err)
	}
	address, inside := uint64(uintptr(unsafe.Pointer(p))), false
	for line := range strings.Lines(string(smaps)) {
		var start, end uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &start, &end); n == 2 {
			inside = start <= address && address < end
		}
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && inside {
			return strings.TrimRight(flags, " \n") + " "
		}
	}
	t.Skip("the kernel does not tell the flags of mappings")
	return ""
}

func TestFreeGivesEverythingBack(t *testing.T) {
	forEachTracker(t, func(t *testing.T, p protection, scan bool) {
		files := openFiles(t)
		m := with(t, p, 4*mib)
		tr := mustTrack(t, m, scan)
		m.Reallocate(64 << 10)
		m.Reallocate(3 * mib)
		if got := openFiles(t); strings.Contains(got, "secretmem") {
			t.Fatalf("a descriptor of secret memory is open:\n%s", got)
		}
		m.Free()
		m.Free()
		if len(m.Bytes()) != 0 || m.Reallocate(mib) != nil || m.guest.space != nil || tr.digests.space != nil {
			t.Error("freed memory is still there")
		}
		if got := openFiles(t); got != files {
			t.Errorf("open files before:\n%safter:\n%s", files, got)
		}
		if m.Protection() != p.String() {
			t.Errorf("freed memory was %v, now claims %s", p, m.Protection())
		}
	})
}

func openFiles(t *testing.T) string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	var s strings.Builder
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			fmt.Fprintln(&s, e.Name(), to)
		}
	}
	return s.String()
}

// TestFreeOverwrites looks through a second mapping, put in by the test.
func TestFreeOverwrites(t *testing.T) {
	fd, err := unix.MemfdCreate("seen", unix.MFD_CLOEXEC)
	if err != nil {
		t.Skip(err)
	}
	defer unix.Close(fd)
	m := with(t, plain, mib)
	b := m.Reallocate(mib)
	if err := unix.Ftruncate(fd, mib); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.MmapPtr(fd, 0, unsafe.Pointer(&b[0]), mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	seen := make([]byte, mib)
	b[0], b[40000], b[mib-1] = 1, 2, 3
	if _, err := unix.Pread(fd, seen, 0); err != nil || seen[40000] != 2 {
		t.Fatalf("the second mapping shows %d, %v", seen[40000], err)
	}
	m.Free()
	if _, err := unix.Pread(fd, seen, 0); err != nil || !bytes.Equal(seen, make([]byte, mib)) {
		t.Fatalf("bytes are left: %v", err)
	}
}

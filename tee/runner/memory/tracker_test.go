package memory

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// run is what Dirty yields.
type run struct{ offset, length int }

// mustTrack tracks with the kernel's help or by comparing, and skips where the
// kernel does not claim to have such help.
func mustTrack(t testing.TB, m *Memory, scan bool) *Tracker {
	if !scan {
		tr, err := m.track(nil)
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	s, err := openScanner()
	if err != nil {
		t.Skip(err)
	}
	tr, err := m.track(s)
	if err != nil || tr.Kind() != "pagemap-scan" {
		t.Fatalf("the kernel has it, but: %v, %v", m.probe(s), err)
	}
	return tr
}

func forEachTracker(t *testing.T, f func(t *testing.T, p protection, scan bool)) {
	forEachProtection(t, func(t *testing.T, p protection) {
		for _, scan := range []bool{true, false} {
			t.Run(map[bool]string{true: "pagemap-scan", false: "compare"}[scan], func(t *testing.T) { f(t, p, scan) })
		}
	})
}

func dirty(tr *Tracker) (got []run, err error) {
	err = tr.Dirty(func(offset, length int) { got = append(got, run{offset, length}) })
	return got, err
}

// wantRuns turns pages into the runs that they make in size bytes.
func wantRuns(size int, is func(page int) bool) (want []run) {
	ps := os.Getpagesize()
	for i := range pages(size) {
		length := min(ps, size-i*ps)
		if !is(i) {
			continue
		}
		if n := len(want) - 1; n >= 0 && want[n].offset+want[n].length == i*ps {
			want[n].length += length
		} else {
			want = append(want, run{i * ps, length})
		}
	}
	return want
}

// model is what the naive tracker knows: a copy, and what was written since.
type model struct {
	m       *Memory
	scan    bool
	tracked *Tracker
	begun   bool
	copied  []byte
	written map[int]bool
}

func (md *model) want() []run {
	ps, b := os.Getpagesize(), md.m.Bytes()
	old := append(bytes.Clone(md.copied), make([]byte, len(b)-len(md.copied))...)
	return wantRuns(len(b), func(i int) bool {
		if md.scan && md.begun {
			return md.written[i]
		}
		from, to := i*ps, min((i+1)*ps, len(b))
		return !bytes.Equal(b[from:to], old[from:to])
	})
}

func (md *model) look(t *rapid.T) {
	want := md.want()
	got, err := dirty(md.tracked)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got runs %v, want %v of %d bytes", got, want, len(md.m.Bytes()))
	}
	if len(md.m.Bytes()) > 0 {
		md.begun, md.copied = true, bytes.Clone(md.m.Bytes())
	}
	clear(md.written)
}

// TestDirtyIsWhatANaiveTrackerFinds does anything in any order, tracking from
// any moment on. "pagemap-scan" must find the pages written, no more and no
// less; "compare" those that differ.
func TestDirtyIsWhatANaiveTrackerFinds(t *testing.T) {
	forEachTracker(t, func(t *testing.T, p protection, scan bool) {
		mustTrack(t, with(t, p, 1), scan) // or skip
		rapid.Check(t, func(rt *rapid.T) {
			limit := uint64(3*mib + rapid.IntRange(0, 5000).Draw(rt, "limit"))
			md := &model{m: with(t, p, limit), scan: scan, written: map[int]bool{}}
			defer md.m.Free()
			var sink byte
			rt.Repeat(map[string]func(*rapid.T){
				"": func(rt *rapid.T) {
					if md.tracked == nil && rapid.IntRange(0, 3).Draw(rt, "track") == 0 {
						md.tracked = mustTrack(t, md.m, scan)
					}
				},
				"grow": func(rt *rapid.T) {
					size := uint64(len(md.m.Bytes()) + rapid.IntRange(0, 200_000).Draw(rt, "by"))
					if got := md.m.Reallocate(size); (got == nil) != (size > uint64(len(md.m.guest.space))) {
						rt.Fatalf("growing to %d of %d: %d bytes", size, limit, len(got))
					}
				},
				"write": func(rt *rapid.T) {
					if b := md.m.Bytes(); len(b) > 0 {
						i := rapid.IntRange(0, len(b)-1).Draw(rt, "at")
						b[i] = byte(rapid.IntRange(0, 2).Draw(rt, "value")) // often the same, or back to zero
						md.written[i/os.Getpagesize()] = true
					}
				},
				"read": func(rt *rapid.T) {
					if b := md.m.Bytes(); len(b) > 0 {
						sink += b[rapid.IntRange(0, len(b)-1).Draw(rt, "at")]
					}
				},
				"look": func(rt *rapid.T) {
					if md.tracked != nil {
						md.look(rt)
					}
				},
			})
		})
	})
}

func TestManyRuns(t *testing.T) {
	forEachTracker(t, func(t *testing.T, p protection, scan bool) {
		ps := os.Getpagesize()
		m := with(t, p, uint64(2000*ps))
		tr := mustTrack(t, m, scan)
		b := m.Reallocate(uint64(2000 * ps))
		for round := range 3 {
			for i := round; i < 2000; i += 2 {
				b[i*ps+round]++
			}
			got, err := dirty(tr)
			want := wantRuns(len(b), func(i int) bool { return i >= round && i%2 == round%2 })
			if err != nil || !slices.Equal(got, want) {
				t.Fatalf("round %d: %d runs, want %d: %v", round, len(got), len(want), err)
			}
		}
		if got, err := dirty(tr); err != nil || got != nil {
			t.Fatalf("nothing was written, but got %v, %v", got, err)
		}
	})
}

// TestKernelWrites has the kernel write, as a guest's file reads do.
func TestKernelWrites(t *testing.T) {
	forEachTracker(t, func(t *testing.T, p protection, scan bool) {
		ps := os.Getpagesize()
		m := with(t, p, mib)
		tr := mustTrack(t, m, scan)
		b := m.Reallocate(mib)
		if got, err := dirty(tr); err != nil || got != nil {
			t.Fatalf("fresh memory: %v, %v", got, err)
		}
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		if _, err := unix.Write(pipe[1], []byte("reading")); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(pipe[0], b[5*ps-3:5*ps+4]); n != 7 || err != nil {
			t.Fatal(n, err)
		}
		if got, err := dirty(tr); err != nil || !slices.Equal(got, []run{{4 * ps, 2 * ps}}) {
			t.Fatalf("got %v, %v", got, err)
		}
	})
}

func TestKinds(t *testing.T) {
	m := with(t, plain, mib)
	if k := mustTrack(t, m, false).Kind(); k != "compare" {
		t.Errorf("got %s", k)
	}
	forEachProtection(t, func(t *testing.T, p protection) {
		m := with(t, p, mib)
		if k := mustTrack(t, m, true).Kind(); k != "pagemap-scan" {
			t.Errorf("got %s", k)
		}
		tr, err := m.Track()
		if err != nil || tr.Kind() != "pagemap-scan" {
			t.Fatalf("not tracked so by itself: %v", err)
		}
	})
}

func TestTrackAgain(t *testing.T) {
	forEachTracker(t, func(t *testing.T, p protection, scan bool) {
		m := with(t, p, mib)
		old := mustTrack(t, m, scan)
		m.Reallocate(mib)[70000] = 1
		if got, err := dirty(old); err != nil || len(got) != 1 {
			t.Fatal(got, err)
		}
		tr := mustTrack(t, m, scan)
		if _, err := dirty(old); err == nil {
			t.Error("a tracker that ended still answers")
		}
		if got, err := dirty(tr); err != nil || len(got) != 1 {
			t.Errorf("the new tracker's first look: %v, %v", got, err)
		}
		m.Free()
		if _, err := dirty(tr); err == nil {
			t.Error("the tracker of freed memory still answers")
		}
	})
}

// TestProbe: a kernel whose answers are of no use is noticed by Track, before
// the sandbox, and not in a move.
func TestProbe(t *testing.T) {
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	for _, spoilt := range []func(*scanner) int{
		func(s *scanner) int { return s.pagemap },
		func(s *scanner) int { return s.uffd },
	} {
		s, err := openScanner()
		if err != nil {
			t.Skip(err)
		}
		if err := unix.Dup3(null, spoilt(s), unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		m := with(t, plain, mib)
		tr, err := m.track(s)
		if err != nil || tr.Kind() != "compare" {
			t.Fatalf("the probe passed: %v", err)
		}
		m.Reallocate(mib)[0] = 1
		if got, err := dirty(tr); err != nil || len(got) != 1 {
			t.Errorf("got %v, %v", got, err)
		}
	}
}

// TestScannerFails: a look that could miss changes is an error, never "none".
func TestScannerFails(t *testing.T) {
	m := with(t, plain, mib)
	tr := mustTrack(t, m, true)
	m.Reallocate(mib)
	if _, err := dirty(tr); err != nil {
		t.Fatal(err)
	}
	m.guest.rollback(64 << 10) // replaced behind the tracker's back
	if err := protect(m.guest.space[64<<10:], plain); err != nil {
		t.Fatal(err)
	}
	m.Bytes()[mib-1] = 1
	if got, err := dirty(tr); err == nil {
		t.Fatalf("got %v for memory that is not watched", got)
	}
	m.guest.committed = mib
}

// TestGrowthThatCannotBeTracked is refused, and what there was goes on.
func TestGrowthThatCannotBeTracked(t *testing.T) {
	m := with(t, plain, 4*mib)
	tr := mustTrack(t, m, true)
	b := m.Reallocate(64 << 10)
	b[0] = 1
	uffd := tr.scanner.uffd
	tr.scanner.uffd = -1
	if m.Reallocate(2*mib) != nil {
		t.Error("memory that is not tracked was given out")
	}
	tr.scanner.uffd = uffd
	if got, err := dirty(tr); err != nil || len(got) != 1 || len(m.Bytes()) != 64<<10 {
		t.Errorf("got %v, %v of %d bytes", got, err, len(m.Bytes()))
	}
	if b := m.Reallocate(2 * mib); b == nil || b[0] != 1 {
		t.Error("growing does not work again")
	}
}

// TestDigestsAreProtected: digests of a guest's pages are no less secret than
// the pages.
func TestDigestsAreProtected(t *testing.T) {
	forEachProtection(t, func(t *testing.T, p protection) {
		m := with(t, p, 64*mib)
		tr := mustTrack(t, m, false)
		m.Reallocate(mib)
		m.Reallocate(3 * mib)
		if tr.digests.kind != p || tr.digests.committed < pages(3*mib)*32 {
			t.Errorf("%d bytes of %v digests", tr.digests.committed, tr.digests.kind)
		}
	})
}

func ExampleTracker_Dirty() {
	m, err := New(1 << 20)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer m.Free()
	t, err := m.Track()
	if err != nil {
		fmt.Println(err)
		return
	}
	guest := m.Allocate(0, 1<<20).Reallocate(1 << 20) // wazero does this
	show := func(offset, length int) {
		fmt.Println(offset/os.Getpagesize(), length/os.Getpagesize())
	}
	_ = t.Dirty(show) // nothing: all is zero
	guest[3*os.Getpagesize()] = 1
	guest[4*os.Getpagesize()] = 1
	_ = t.Dirty(show)
	_ = t.Dirty(show) // nothing new
	// Output: 3 2
}

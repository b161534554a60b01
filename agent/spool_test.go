package agent

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/internal/durable"
	"edgekeep/tee"
)

func decode(t testing.TB, b []byte) (c tee.Chunk) {
	t.Helper()
	if err := cose.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func wantPlaces(t testing.TB, name string, s *spool, want ...[2]uint64) {
	t.Helper()
	if got := places(t, s); !slices.Equal(got, want) {
		t.Errorf("%s: %v, want %v", name, got, want)
	}
}

func wantTail(t testing.TB, name string, s *spool, counter byte, seq uint64, watermark string) {
	t.Helper()
	cp, w := s.tail()
	if !bytes.Equal(cp, chunk(counter, seq).Checkpoint) || string(w) != watermark {
		t.Errorf("%s: checkpoint %q, watermark %q; want those of %d/%d and %q", name, cp, w, counter, seq, watermark)
	}
}

// A keep that was not told offers chunks again; each is in the spool once.
func TestAppendOnce(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := must(a.spool("a"))(t)
	appendTo(t, s, chunks(1, 0, 2)...)
	appendTo(t, s, chunks(1, 0, 2)...)
	appendTo(t, s, chunks(1, 1, 4)...)
	appendTo(t, s)
	want := [][2]uint64{{1, 0}, {1, 1}, {1, 2}, {1, 3}, {1, 4}}
	wantPlaces(t, "in one epoch", s, want...)
	// The stream keys are changed, and the agent dies before it can confirm.
	offered := append(chunks(1, 3, 5), chunks(2, 0, 1)...)
	appendTo(t, s, offered...)
	want = append(want, [2]uint64{1, 5}, [2]uint64{2, 0}, [2]uint64{2, 1})
	wantPlaces(t, "over two epochs", s, want...)
	a.reopen(t)
	s = must(a.spool("a"))(t)
	appendTo(t, s, offered...)
	wantPlaces(t, "again", s, want...)
	wantTail(t, "again", s, 2, 1, "")
	appendTo(t, s, append(offered, chunk(2, 2))...)
	wantPlaces(t, "and one more", s, append(want, [2]uint64{2, 2})...)
	wantTail(t, "and one more", s, 2, 2, "")
	// The ticket is of one start of the keep: it is not stored.
	if c := decode(t, must(s.log.Read(1, 1, 1<<20))(t)[0].Data); c.Ticket != 0 || !bytes.Equal(c.Data, chunk(1, 0).Data) {
		t.Errorf("%+v", c)
	}
}

func TestTrim(t *testing.T) {
	fill := append(append(chunks(1, 0, 2), chunks(3, 0, 1)...), chunk(4, 0))
	other := func(w tee.Watermark, edit func(*tee.Watermark)) tee.Watermark {
		edit(&w)
		return w
	}
	for name, c := range map[string]struct {
		w    tee.Watermark
		left int
		fork bool
	}{
		"the first":                    {mark(1, 0), 5, false},
		"in the middle":                {mark(1, 1), 4, false},
		"the end of an epoch":          {mark(1, 2), 3, false},
		"past the end of it":           {mark(1, 9), 3, false},
		"the next epoch":               {mark(3, 0), 2, false},
		"an epoch that is not here":    {mark(2, 0), 3, false},
		"all":                          {mark(4, 0), 0, false},
		"later than all":               {mark(5, 0), 0, false},
		"before all":                   {mark(0, 99), 6, false},
		"another head":                 {other(mark(3, 0), func(w *tee.Watermark) { w.Head = head(9, 9) }), 6, true},
		"another head at the first":    {other(mark(1, 0), func(w *tee.Watermark) { w.Head = nil }), 6, true},
		"another epoch of its counter": {other(mark(3, 1), func(w *tee.Watermark) { w.Epoch = epoch(3, 1) }), 3, false},
		"a short epoch":                {other(mark(5, 1), func(w *tee.Watermark) { w.Epoch = w.Epoch[:15] }), 6, false},
		"no epoch":                     {other(mark(5, 1), func(w *tee.Watermark) { w.Epoch = nil }), 6, false},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, 1<<20)
			s := must(a.spool("a"))(t)
			appendTo(t, s, fill...)
			left, err := s.trim(c.w, []byte("w"))
			if left != c.left || (err != nil) != c.fork || errors.Is(err, errSpool) {
				t.Errorf("%d left, %v", left, err)
			}
			var want [][2]uint64
			for _, f := range fill[len(fill)-c.left:] {
				want = append(want, [2]uint64{uint64(f.Epoch[7]), f.Seq})
			}
			watermark := "w"
			if c.left == len(fill) {
				watermark = ""
			}
			check := func(name string, s *spool) {
				t.Helper()
				wantPlaces(t, name, s, want...)
				wantTail(t, name, s, 4, 0, watermark)
				p, ok := s.oldest()
				if n, _ := s.depth(); n != c.left || ok != (c.left > 0) || ok && (p.seq != want[0][1] || s.first() != p.index) || !ok && s.first() != s.log.Next() {
					t.Errorf("%s: depth %d, oldest %+v, first %d", name, n, p, s.first())
				}
			}
			check("trimmed", s)
			if left, err := s.trim(c.w, []byte("w")); left != c.left || (err != nil) != c.fork {
				t.Errorf("trimmed again: %d left, %v", left, err)
			}
			a.reopen(t)
			s = must(a.spool("a"))(t)
			check("after a restart", s)
			appendTo(t, s, chunk(4, 0), chunk(4, 1)) // the one at the end is known, even if it was trimmed
			wantPlaces(t, "went on", s, append(want, [2]uint64{4, 1})...)
		})
	}
}

// What a power cut left of the last write is cut off: nobody was told of it. The
// keep offers it again.
func TestTornTail(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := must(a.spool("a"))(t)
	appendTo(t, s, chunks(1, 0, 3)...)
	if _, err := s.trim(mark(1, 0), []byte("w")); err != nil {
		t.Fatal(err)
	}
	appendTo(t, s, chunks(1, 4, 4)...)
	if err := s.log.Close(); err != nil {
		t.Fatal(err)
	}
	delete(a.spools, "a")
	segments := must(filepath.Glob(filepath.Join(s.dir, "*")))(t)
	var last string
	var size int64
	for _, name := range segments {
		if fi := must(os.Stat(name))(t); fi.Size() > size {
			last, size = name, fi.Size()
		}
	}
	if err := os.Truncate(last, size-20); err != nil {
		t.Fatal(err)
	}
	s = must(a.spool("a"))(t)
	wantPlaces(t, "cut", s, [2]uint64{1, 1}, [2]uint64{1, 2}, [2]uint64{1, 3})
	wantTail(t, "cut", s, 1, 3, "w")
	appendTo(t, s, chunks(1, 3, 5)...)
	wantPlaces(t, "offered again", s, [2]uint64{1, 1}, [2]uint64{1, 2}, [2]uint64{1, 3}, [2]uint64{1, 4}, [2]uint64{1, 5})
}

func TestDamagedSpool(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := must(a.spool("a"))(t)
	appendTo(t, s, chunks(1, 0, 0)...)
	if _, err := s.trim(mark(1, 0), []byte("w")); err != nil {
		t.Fatal(err)
	}
	if err := s.log.Close(); err != nil {
		t.Fatal(err)
	}
	delete(a.spools, "a")
	if err := os.WriteFile(s.tailsPath(), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.spool("a"); err == nil || !strings.Contains(err.Error(), "a.tails") {
		t.Errorf("damaged tails: %v", err)
	}
	if err := os.Remove(s.tailsPath()); err != nil {
		t.Fatal(err)
	}
	s = must(a.spool("a"))(t)
	if _, err := s.log.Append(t.Context(), []byte("no chunk")); err != nil {
		t.Fatal(err)
	}
	if err := s.log.Close(); err != nil {
		t.Fatal(err)
	}
	delete(a.spools, "a")
	if _, err := a.spool("a"); err == nil || !strings.Contains(err.Error(), "entry 2") {
		t.Errorf("a foreign entry: %v", err)
	}
}

func TestStreamNames(t *testing.T) {
	a := newAgent(t, 1<<20)
	for _, name := range []string{"", ".", "..", "a/b", "../a", "/", "a/", "./a"} {
		if _, err := a.spool(name); err == nil {
			t.Errorf("a spool for %q", name)
		}
	}
	if entries := must(os.ReadDir(a.path("spool")))(t); len(entries) != 0 {
		t.Errorf("%v", entries)
	}
	if s, again := must(a.spool("a"))(t), must(a.spool("a"))(t); s != again {
		t.Error("two spools of one stream")
	}
}

// bulky fills a spool of 1 MiB in a few chunks.
func bulky(counter byte, seq uint64) tee.Chunk {
	c := chunk(counter, seq)
	c.Data = make([]byte, 120<<10)
	return c
}

// A full spool waits, drops nothing, and goes on when the cloud has taken
// something; other streams' chunks of the same batch are durable meanwhile.
func TestFullSpoolWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAgent(t, 1<<20)
		s := must(a.spool("a"))(t)
		b := must(a.spool("b"))(t)
		seq := uint64(0)
		for ; ; seq++ {
			if err := s.append(t.Context(), []tee.Chunk{bulky(1, seq)}); errors.Is(err, durable.ErrFull) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if seq < 4 {
			t.Fatalf("full after %d chunks", seq)
		}
		other := chunk(1, 0)
		other.Stream = "b"
		done := make(chan error, 1)
		begin := time.Now()
		go func() { done <- a.append(t.Context(), []tee.Chunk{bulky(1, seq), other, bulky(1, seq+1)}) }()
		time.Sleep(time.Minute)
		if len(done) != 0 {
			t.Fatalf("it does not wait: %v", <-done)
		}
		if n, _ := s.depth(); n != int(seq) {
			t.Errorf("%d chunks", n)
		}
		if n, _ := b.depth(); n != 1 {
			t.Errorf("the other stream has %d chunks", n)
		}
		if _, err := s.trim(mark(1, seq-1), []byte("w")); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil || time.Since(begin) > 2*time.Minute {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		wantPlaces(t, "went on", s, [2]uint64{1, seq}, [2]uint64{1, seq + 1})
	})
}

// The largest batch that a keep hands over fits into the smallest spool allowed,
// again and again.
func TestLargestBatch(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := must(a.spool("a"))(t)
	for round := range uint64(10) {
		var batch []tee.Chunk
		for i := range uint64(5) { // 600 KiB: see maxTaken in package keep
			batch = append(batch, bulky(1, 5*round+i))
		}
		if err := s.append(t.Context(), batch); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if _, err := s.trim(mark(1, 5*round+4), []byte("w")); err != nil {
			t.Fatal(err)
		}
	}
}

package runner

import (
	"crypto/rand"
	"fmt"
	"slices"
	"testing"

	"edgekeep/sealing"
	"edgekeep/workload"
)

func recOf(seq uint64, from, n int) record {
	r := record{cursor: workload.Cursor{Gateway: "g", Stream: "s", Epoch: make([]byte, 16), Seq: seq, Head: make([]byte, 32)}}
	for i := range n {
		r.readings = append(r.readings, sealing.Reading{Name: fmt.Sprint(from + i), Value: int64(from + i)})
	}
	return r
}

// A record that was half consumed is not consumed again when a shorter one comes.
func TestHalfConsumedRecord(t *testing.T) {
	s := &session{records: make(chan record, 16), cursors: []workload.Cursor{{Gateway: "g", Stream: "s"}}}
	s.manifest.Input.Batch = 30
	s.records <- recOf(0, 0, 100)
	s.records <- recOf(1, 100, 10)
	seen := map[string]int{}
	for range 10 {
		s.gather()
		if len(s.queue) == 0 {
			break
		}
		rs, after := s.take()
		for _, r := range rs {
			seen[r.Name]++
		}
		s.cursors = after // as batch() does
	}
	dup := 0
	for _, n := range seen {
		if n > 1 {
			dup++
		}
	}
	if dup > 0 {
		t.Errorf("%d of %d readings were given to the guest more than once", dup, len(seen))
	}
}

// An instance that goes on in the middle of a record reads on.
func TestGoOnInARecord(t *testing.T) {
	s := &session{records: make(chan record, 16), cursors: []workload.Cursor{{Gateway: "g", Stream: "s", Skip: 80}}}
	s.manifest.Input.Batch = 30
	s.records <- recOf(0, 0, 100)
	s.records <- recOf(1, 100, 10)
	s.records <- recOf(2, 110, 10)
	got := 0
	for range 20 {
		s.gather()
		if len(s.queue) == 0 {
			continue
		}
		rs, after := s.take()
		got += len(rs)
		s.cursors = after
	}
	if got != 40 {
		t.Errorf("%d readings of 40; waiting=%d with an empty queue (%d), %d records wait for ever", got, s.waiting, len(s.queue), len(s.records))
	}
}

// An agent cannot show an old full delta behind the newest commit.
func TestOldDeltaBehindTheLog(t *testing.T) {
	keyID, key := make([]byte, 8), make([]byte, 32)
	seal := func(s *workload.StateSealer, line uint64, full bool) (parts [][]byte) {
		if err := s.Seal(workload.Delta{Full: full, Line: line}, nil, func(p []byte) error { parts = append(parts, p); return nil }); err != nil {
			t.Fatal(err)
		}
		return
	}
	sl, err := workload.NewStateSealer("i", keyID, key, nil, 0, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	old := seal(sl, 1, true)
	var log [][]byte
	log = append(log, old...)
	log = append(log, seal(sl, 2, false)...)
	log = append(log, seal(sl, 3, true)...)
	newest := sl.Head()
	shown := append(append([][]byte{}, log...), old...) // the lie
	g := &Guest{}
	l := &logReader{guest: g, instance: "i", newest: newest, keys: []workload.StateKey{{ID: keyID, Key: key}}}
	if err := l.begin(); err != nil {
		t.Fatal(err)
	}
	for i, p := range shown {
		if err := l.add(uint64(i+1), p); err != nil {
			t.Logf("refused: %v", err)
			return
		}
	}
	if l.delta.Line != 3 && l.seen { // load() goes on
		t.Errorf("goes on at line %d, though the keep knows of a commit at line 3", l.delta.Line)
	}
}

// A delta whose end was never written, the first of a log or a later one, is no
// part of the state, and not in the way of the full one that follows.
func TestTornDelta(t *testing.T) {
	keyID, key := make([]byte, 8), make([]byte, 32)
	pages := func(yield func(workload.Page) bool) {
		for i := range uint64(4) {
			if !yield(workload.Page{Space: workload.SpaceFiles, Inode: 2, Index: i, Data: make([]byte, workload.FilePage)}) {
				return
			}
		}
	}
	seal := func(prev []byte, next, line uint64, full bool) (parts [][]byte, head []byte) {
		s, err := workload.NewStateSealer("i", keyID, key, prev, next, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Seal(workload.Delta{Full: full, Line: line}, pages, func(p []byte) error { parts = append(parts, p); return nil }); err != nil {
			t.Fatal(err)
		}
		return parts, s.Head()
	}
	first, head := seal(nil, 0, 1, true)
	torn, _ := seal(head, 1, 2, false)
	after, _ := seal(head, 1, 3, true)
	for name, x := range map[string]struct {
		log  [][]byte
		line uint64
		torn bool
	}{
		"the first":        {append(first[:2:2], first...), 1, false},
		"a later one":      {slices.Concat(first, torn[:2], after), 3, false},
		"the end is torn":  {slices.Concat(first, torn[:2]), 1, true},
		"nothing but torn": {torn[:0:0], 0, false},
	} {
		l := &logReader{guest: &Guest{}, instance: "i", keys: []workload.StateKey{{ID: keyID, Key: key}}}
		if err := l.begin(); err != nil {
			t.Fatal(err)
		}
		for i, p := range x.log {
			if err := l.add(uint64(i+1), p); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		line := uint64(0)
		if l.delta != nil {
			line = l.delta.Line
		}
		if line != x.line || l.torn != x.torn {
			t.Errorf("%s: line %d, torn %v", name, line, l.torn)
		}
	}
}

package memory

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
)

// Tracker finds the pages of a Memory that changed. A Memory has one.
type Tracker struct {
	memory  *Memory
	scanner *scanner // nil: by comparing
	begun   bool     // Dirty was called
	digests region   // comparing only: per page 32 bytes, all zero for a page of zeros
}

// Track starts to track the memory, before or after the guest got it. Call it
// before the sandbox closes (see the package comment). A second call ends the
// first Tracker. The error is for what no kind of tracking gets around: no
// memory for the digests.
func (m *Memory) Track() (*Tracker, error) {
	s, err := openScanner()
	if err != nil {
		s = nil // Kind says so
	}
	return m.track(s)
}

// probe tries s on a page of each protection that the memory may get or, when
// it has one, on that: what Kind says must hold after the sandbox closed.
func (m *Memory) probe(s *scanner) error {
	kinds := m.try
	if m.guest.committed > 0 {
		kinds = []protection{m.guest.kind}
	}
	for _, p := range kinds {
		r, err := reserve(1)
		if err != nil {
			return err
		}
		if r.commit(1, p) == nil { // else no guest memory will be of this kind
			err = s.probe(r.space)
		}
		r.release()
		if err != nil {
			return err
		}
	}
	return nil
}

// track starts to track with s or, if that is nil or does not work, by
// comparing.
func (m *Memory) track(s *scanner) (*Tracker, error) {
	m.untrack()
	if s != nil && m.probe(s) != nil {
		s.close()
		s = nil
	}
	t := &Tracker{memory: m, scanner: s}
	m.tracker = t
	var err error
	if s == nil {
		t.digests, err = reserve(pages(len(m.guest.space)) * sha256.Size)
	}
	if err == nil {
		err = t.cover(0)
	}
	if err != nil {
		m.untrack()
		return nil, fmt.Errorf("tracking guest memory: %w", err)
	}
	return t, nil
}

// untrack ends the tracker, if there is one.
func (m *Memory) untrack() {
	t := m.tracker
	if t == nil {
		return
	}
	if t.scanner != nil {
		t.scanner.close()
	}
	t.digests.release()
	t.memory, m.tracker = nil, nil
}

// cover tracks what the guest's region has from the offset old on.
func (t *Tracker) cover(old int) error {
	g := &t.memory.guest
	if g.committed == 0 {
		return nil
	}
	if t.scanner == nil {
		return t.digests.commit(pages(g.committed)*sha256.Size, g.kind)
	}
	added := g.space[old:g.committed]
	if err := t.scanner.register(added); err != nil || !t.begun {
		return err
	}
	return t.scanner.arm(added)
}

// Kind says how pages are found: "pagemap-scan" or "compare".
func (t *Tracker) Kind() string {
	if t.scanner == nil {
		return "compare"
	}
	return "pagemap-scan"
}

// Dirty yields what changed since the last call, as offsets and lengths in
// bytes into [Memory.Bytes]: page aligned, ascending, never adjacent. The first
// call yields every page that is not all zero. It must not run while the guest
// does, and yield must not write to the memory.
//
// "compare" yields the pages that differ, "pagemap-scan" those that were
// written, even with what they held before. After an error changes may have
// been missed: start again with Track.
func (t *Tracker) Dirty(yield func(offset, length int)) error {
	if t.memory == nil {
		return errors.New("finding changed pages: the memory was freed or is tracked anew")
	}
	b := t.memory.Bytes()
	if len(b) == 0 {
		return nil
	}
	r := &runs{yield: yield, size: len(b)}
	var err error
	switch {
	case t.scanner == nil:
		t.compare(b, r)
	case !t.begun:
		err = t.first(b, r)
	default:
		err = t.scanner.written(b, r.add)
	}
	if err != nil {
		return fmt.Errorf("finding changed pages: %w", err)
	}
	t.begun = true
	r.flush()
	return nil
}

// first arms everything and looks for pages that are not zero among those that
// are present: reading the others would make them so.
func (t *Tracker) first(b []byte, r *runs) error {
	g := &t.memory.guest
	if err := t.scanner.arm(g.space[:g.committed]); err != nil {
		return err
	}
	page := os.Getpagesize()
	zero := make([]byte, page)
	return t.scanner.present(b, func(start, end int) {
		for ; start < end; start += page {
			if p := g.space[start : start+page]; !bytes.Equal(p, zero) {
				r.add(start, start+page)
			}
		}
	})
}

// compare finds pages whose digest is not the one noted, and notes it.
func (t *Tracker) compare(b []byte, r *runs) {
	page := os.Getpagesize()
	zero := make([]byte, page)
	for i := range pages(len(b)) {
		p := t.memory.guest.space[i*page : (i+1)*page]
		var now [sha256.Size]byte
		if !bytes.Equal(p, zero) {
			now = sha256.Sum256(p)
		}
		noted := t.digests.space[i*len(now) : (i+1)*len(now)]
		if !bytes.Equal(noted, now[:]) {
			copy(noted, now[:])
			r.add(i*page, (i+1)*page)
		}
	}
}

// runs joins ascending ranges that touch, and ends them where the memory does.
type runs struct {
	yield      func(offset, length int)
	size       int // of the memory
	start, end int // the run so far
}

func (r *runs) add(start, end int) {
	if start != r.end {
		r.flush()
		r.start = start
	}
	r.end = end
}

func (r *runs) flush() {
	if end := min(r.end, r.size); end > r.start {
		r.yield(r.start, end-r.start)
	}
	r.start = r.end
}

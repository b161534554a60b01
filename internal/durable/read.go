package durable

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
)

// Read returns consecutive durable entries, beginning with the oldest kept one
// whose index is at least from; none if there is none. It stops before
// maxEntries or the data of maxBytes would be exceeded, but returns at least
// one entry if there is one. Checksums are verified again: ErrCorrupt names the
// place, after the entries before it were returned by earlier calls.
func (l *Log) Read(from uint64, maxEntries, maxBytes int) ([]Entry, error) {
	p := page{maxEntries: maxEntries, maxBytes: maxBytes}
	for !p.full {
		v, err := l.view(from)
		if err != nil {
			return nil, err
		}
		if v.from >= v.next || len(p.entries) > 0 && v.from != from {
			break // at the end, or Trim was faster: one call returns no gap
		}
		err = p.readSegment(v)
		if errors.Is(err, os.ErrNotExist) && l.First() >= v.next {
			continue // trimmed between view and open
		}
		if err != nil && len(p.entries) == 0 {
			return nil, err
		}
		if err != nil {
			break
		}
		from = v.next
	}
	return p.entries, nil //nolint:nilerr // what was read before an error is good: the next call meets it first
}

// view is the part of one segment that holds an index, and a place at or
// before it to begin with.
type view struct {
	path   string
	marker marker
	start  place
	from   uint64
	next   uint64 // equal to from if there is nothing to read
	size   int64
}

func (l *Log) view(from uint64) (view, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return view{}, l.usable()
	}
	from = max(from, l.trimmed+1)
	if from >= l.next {
		return view{}, nil
	}
	seg := l.segs[sort.Search(len(l.segs), func(i int) bool { return l.segs[i].first > from })-1]
	at := sort.Search(len(seg.sparse), func(i int) bool { return seg.sparse[i].index > from }) - 1
	return view{seg.path, seg.marker, seg.sparse[at], from, seg.next, seg.size}, nil
}

// page collects entries up to its limits.
type page struct {
	maxEntries, maxBytes int
	entries              []Entry
	bytes                int
	full                 bool
}

func (p *page) add(e Entry) {
	n := len(e.Data)
	if len(p.entries) > 0 && (len(p.entries) >= p.maxEntries || n > p.maxBytes-p.bytes) {
		p.full = true
		return
	}
	p.entries = append(p.entries, e)
	p.bytes += n
	p.full = len(p.entries) >= p.maxEntries || p.bytes >= p.maxBytes
}

func (p *page) readSegment(v view) error {
	f, err := os.Open(v.path)
	if err != nil {
		return fmt.Errorf("durable: read entry %d: %w", v.from, err)
	}
	defer f.Close()
	s := newScanner(f, v.start, v.size, v.marker)
	var skipped []byte
	for !p.full {
		index, keep := s.next, s.next >= v.from
		data, err := s.entry(skipped)
		var bad *damage
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.As(err, &bad):
			return corrupt(v.path, bad.off, bad.reason)
		case err != nil:
			return fmt.Errorf("durable: read entry %d: %w", index, err)
		case keep:
			p.add(Entry{index, data})
			skipped = nil
		default:
			skipped = data
		}
	}
	return nil
}

// Wait returns nil once there is a durable entry, not yet trimmed, with an
// index above after. Otherwise it ends with the error of ctx, with os.ErrClosed
// after Close, or with the failure that stopped the log.
func (l *Log) Wait(ctx context.Context, after uint64) error {
	for {
		l.mu.Lock()
		there := l.next-1 > max(after, l.trimmed)
		err, grown := l.usable(), l.grown
		if l.closed {
			there = false
		}
		l.mu.Unlock()
		if there {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// First returns the index of the oldest entry that is kept, which is Next if
// there is none.
func (l *Log) First() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.trimmed + 1
}

// Next returns the index after the last durable entry.
func (l *Log) Next() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next
}

// Bytes returns the length of all segments together, which MaxBytes bounds.
func (l *Log) Bytes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

// Recovered returns how many bytes of a torn tail Open cut off.
func (l *Log) Recovered() (bytes int64) { return l.recovered }

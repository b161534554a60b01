package runner

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"slices"

	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/workload"
)

// logReader reads an instance's log into a guest's state.
type logReader struct {
	guest    *Guest
	instance string
	keys     []workload.StateKey
	newest   []byte
	opener   *workload.StateOpener
	restorer *Restorer

	delta   *workload.Delta // newest complete one; nil if there is none
	results []packed
	cuts    []cut
	base    int64
	grown   int64
	size    int64 // of the parts since the last complete delta
	began   uint64
	head    []byte // of the newest complete delta
	seen    bool   // the newest head that the keep knows of
	torn    bool   // parts of a delta without its end came last
	ends    uint64 // index after the newest complete delta
}

// packed is a pack of results.
type packed struct {
	pack        []byte
	last, count uint64
}

func (s *session) newLogReader(keys []tee.StateKey) (*logReader, error) {
	l := &logReader{guest: s.guest, instance: s.assign.Instance, newest: s.assign.Newest}
	for _, k := range keys {
		l.keys = append(l.keys, workload.StateKey{ID: k.ID, Key: k.Key})
	}
	return l, l.begin()
}

// begin forgets what was read.
func (l *logReader) begin() (err error) {
	if l.restorer, err = l.guest.Restorer(); err != nil {
		return err
	}
	l.delta, l.results, l.cuts, l.base, l.grown, l.size = nil, nil, nil, 0, 0, 0
	l.opener, err = workload.NewStateOpener(l.instance, l.keys, l.restorer)
	return err
}

// readLog reads the log up to its newest complete delta. What comes of one without
// an end is in the guest by the time that this is found out: then it reads again.
func (s *session) readLog(ctx context.Context, keys []tee.StateKey) (*logReader, error) {
	l, err := s.readUntil(ctx, keys, math.MaxUint64)
	if err != nil || !l.torn || l.delta == nil {
		return l, err
	}
	if l, err = s.readUntil(ctx, keys, l.ends); err == nil {
		l.torn = true
	}
	return l, err
}

// readUntil reads the log's entries before end.
func (s *session) readUntil(ctx context.Context, keys []tee.StateKey, end uint64) (*logReader, error) {
	l, err := s.newLogReader(keys)
	if err != nil {
		return nil, err
	}
	for from := uint64(0); ; {
		r, err := job[tee.LogEntries](ctx, s, tee.JobRead, tee.ReadLog{Instance: s.assign.Instance, From: from})
		if err != nil {
			return nil, err
		}
		s.next = r.Next
		for i, part := range r.Entries {
			if r.First+uint64(i) >= end {
				return l, nil
			}
			if err := l.add(r.First+uint64(i), part); err != nil {
				return nil, err
			}
		}
		from = r.First + uint64(len(r.Entries))
		if len(r.Entries) == 0 || from >= r.Next {
			return l, nil
		}
	}
}

// add takes the log's next part. A full delta after one that lacks its end begins
// the log anew: a runner that was killed wrote it.
func (l *logReader) add(index uint64, part []byte) error {
	if l.size == 0 {
		l.began = index
	}
	begun := l.delta != nil || l.size > 0
	l.torn = true
	d, err := l.opener.Open(part)
	if _, chain := workload.ChainHead(l.head, part); err != nil && begun && chain == nil { // it follows the newest complete delta: nothing was put back
		why, results := err, l.results // those count: they were committed
		if err := l.begin(); err != nil {
			return err
		}
		l.began, l.results = index, results
		if d, err = l.opener.Open(part); err != nil {
			return fmt.Errorf("the instance's log, entry %d: %w", index, why)
		}
	}
	if err != nil {
		return fmt.Errorf("the instance's log, entry %d: %w", index, err)
	}
	l.size += int64(len(part))
	if d == nil {
		return nil
	}
	l.ends = index + 1
	return l.complete(d)
}

func (l *logReader) complete(d *workload.Delta) error {
	l.torn = false
	l.head = l.opener.Head()
	l.seen = l.seen || bytes.Equal(l.opener.Head(), l.newest)
	line := d.Line
	var packs []packed
	for _, p := range slices.Backward(d.Results) {
		readings, err := sealing.ParsePack(p)
		if err != nil {
			return fmt.Errorf("results in the log: %w", err)
		}
		packs = append(packs, packed{p, line, uint64(len(readings))})
		line -= uint64(len(readings))
	}
	slices.Reverse(packs)
	l.results = append(l.results, packs...)
	if d.Full {
		l.cuts = append(l.cuts, cut{l.began, line})
		l.base, l.grown = l.size, 0
	} else {
		l.grown += l.size
	}
	l.size, l.delta = 0, d
	return nil
}

// cursors are where the inputs are, in the order of the assignment.
func (l *logReader) cursors(inputs []tee.Input) []workload.Cursor {
	out := make([]workload.Cursor, len(inputs))
	for i, in := range inputs {
		out[i] = workload.Cursor{Gateway: in.Gateway, Stream: in.Stream}
		for _, c := range l.delta.Cursors {
			if c.Gateway == in.Gateway && c.Stream == in.Stream {
				out[i] = c
			}
		}
	}
	return out
}

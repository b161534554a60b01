package runner

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/workload"
)

// turn does the next thing that is to be done.
func (s *session) turn(ctx context.Context) error {
	if time.Since(s.reported) > reportEvery {
		s.sendReport()
	}
	select { // what goes before batches
	case m := <-s.control:
		return s.controlled(ctx, m)
	case q := <-s.infers:
		return s.infer(ctx, q)
	default:
	}
	s.gather()
	if s.out != nil && s.out.ready() {
		return s.nearlyGone(ctx)
	}
	if s.batchDue() {
		if err := s.batch(ctx); err != nil {
			return err
		}
		if !s.commitDue() {
			return nil
		}
	}
	if s.dirty && (s.commitDue() || s.idle()) {
		return s.save(ctx, false)
	}
	return s.wait(ctx)
}

// gather takes in records that are there, up to a batch and some more.
func (s *session) gather() {
	for s.waiting < 2*int(s.manifest.Input.Batch) {
		select {
		case r := <-s.records:
			s.enqueue(r)
		default:
			return
		}
	}
}

func (s *session) enqueue(r record) {
	if len(s.queue) == 0 {
		s.since = time.Now()
	}
	s.queue = append(s.queue, r)
	s.count(s.cursors)
}

func (s *session) batchDue() bool {
	if len(s.queue) == 0 {
		return false
	}
	return s.waiting >= int(s.manifest.Input.Batch) || s.waiting == 0 || time.Since(s.since) >= time.Duration(s.manifest.Input.Wait)*time.Millisecond
}

func (s *session) commitDue() bool {
	age := time.Since(s.committed)
	if s.out != nil && s.out.under() > 0 { // a commit is sent as well: fewer of them catch up
		return age >= 2*time.Second
	}
	return age >= time.Duration(s.manifest.Commit)*time.Millisecond || s.size+s.pack.Size() > maxResults
}

// idle reports whether nothing waits that could go into the same commit.
func (s *session) idle() bool {
	return !s.batchDue() && len(s.infers) == 0 && len(s.records) == 0 && (s.out == nil || s.out.under() == 0)
}

// wait waits until there may be something to do.
func (s *session) wait(ctx context.Context) error {
	limit := reportEvery
	if len(s.queue) > 0 {
		limit = min(limit, time.Until(s.since.Add(time.Duration(s.manifest.Input.Wait)*time.Millisecond)))
	}
	if s.dirty {
		limit = min(limit, time.Duration(s.manifest.Commit)*time.Millisecond-time.Since(s.committed))
	}
	if s.out != nil {
		limit = min(limit, s.out.wait())
	}
	t := time.NewTimer(max(limit, 0))
	defer t.Stop()
	records := s.records
	if s.waiting >= 2*int(s.manifest.Input.Batch) {
		records = nil
	}
	select {
	case r := <-records:
		s.enqueue(r)
	case m := <-s.control:
		return s.controlled(ctx, m)
	case q := <-s.infers:
		return s.infer(ctx, q)
	case n := <-s.acks:
		if s.out != nil {
			return s.out.acked(s, n)
		}
	case <-s.told:
	case <-t.C:
		if s.out != nil {
			return s.out.resend(s)
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// batch runs one batch of what waits.
func (s *session) batch(ctx context.Context) error {
	readings, after := s.take()
	if len(readings) > 0 {
		in, err := encodeBatch(s.manifest.Input.Format, readings)
		if err != nil {
			return err
		}
		out, err := s.call(ctx, in)
		if err == nil {
			err = s.keepResults(out)
		}
		if err != nil { // the state as of the last commit is what counts: begin again there
			return fmt.Errorf("a batch of %d readings: %w", len(readings), err)
		}
		s.report.Batches++
	}
	s.cursors, s.dirty = after, true
	return nil
}

// take takes the readings of a batch out of the queue, and says where the inputs
// are after it.
func (s *session) take() (readings []sealing.Reading, after []workload.Cursor) {
	after = append(after, s.cursors...)
	room := int(s.manifest.Input.Batch)
	for len(s.queue) > 0 && room > 0 {
		r := s.queue[0]
		at := &after[r.input]
		if r.gap {
			at.Skip, s.queue[0].gap = 0, false
		}
		rest := r.readings[min(at.Skip, uint64(len(r.readings))):]
		if len(rest) > room {
			rest = rest[:room]
			at.Skip += uint64(room)
		} else {
			*at, s.queue = r.cursor, s.queue[1:]
		}
		readings, room = append(readings, rest...), room-len(rest)
	}
	s.count(after)
	s.since = time.Now()
	return readings, after
}

// count counts the readings in the queue that were not consumed: of an input's
// first record, Skip were.
func (s *session) count(cursors []workload.Cursor) {
	s.waiting = 0
	seen := map[int]bool{}
	for _, r := range s.queue {
		n := len(r.readings)
		if !seen[r.input] {
			n -= int(min(cursors[r.input].Skip, uint64(n)))
			seen[r.input] = true
		}
		s.waiting += n
	}
}

// call runs the guest for one batch, under its budget.
func (s *session) call(ctx context.Context, in []byte) ([]byte, error) {
	s.dirty = true
	out, err := s.guest.Batch(ctx, in)
	s.logLines(s.guest.Log())
	return out, err
}

func (s *session) keepResults(out []byte) error {
	readings, err := decodeResults(s.manifest.Output, out, time.Now())
	if err != nil {
		return err
	}
	for _, r := range readings {
		s.pack.Add(r)
		s.line++
		s.results++
		if s.pack.Size() >= maxPack || s.pack.Readings() >= maxPackReadings {
			s.closePack()
		}
	}
	return nil
}

func (s *session) closePack() {
	if s.pack.Readings() > 0 {
		b := s.pack.Marshal()
		s.packs, s.size = append(s.packs, b), s.size+len(b)
		s.pack = sealing.Pack{}
	}
}

// infer runs a request. One that fails leaves no trace: the guest goes back to the
// last commit.
func (s *session) infer(ctx context.Context, q tee.Infer) error {
	if s.dirty { // what ran before must not be undone with it
		if err := s.save(ctx, false); err != nil {
			return err
		}
	}
	out, err := s.call(ctx, q.Input)
	if err != nil {
		s.report.Failures++
		s.report.Reason = err.Error()
		_ = s.d.Send(tee.KindInferred, tee.Inferred{ID: q.ID, Error: err.Error()})
		s.dirty = false
		if s.out != nil {
			return fmt.Errorf("a request failed during a move: %w", err)
		}
		return s.reload(ctx)
	}
	s.reply = &tee.Inferred{ID: q.ID, Output: out}
	return s.save(ctx, false)
}

// save commits.
func (s *session) save(ctx context.Context, full bool) error {
	full = full || s.grown > max(minFull, 2*s.base)
	s.closePack()
	d, pages, err := s.guest.Capture(full)
	if err != nil {
		return fmt.Errorf("capturing state: %w", err)
	}
	d.Cursors, d.Line, d.Results = s.cursors, s.line, s.packs
	if s.out != nil { // goes out while the disk here works: the target opens it only after the keep has heard of its end
		if err := s.out.mirror(s, d, pages); err != nil {
			return err
		}
	}
	began := s.next
	if err := s.append(ctx, d, pages); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	if full {
		s.cuts = append(s.cuts, cut{began, s.line - uint64(s.results)})
	}
	s.dirty, s.committed = false, time.Now()
	s.report.Newest = s.sealer.Head()
	s.sendReport()
	if err := s.release(); err != nil {
		return err
	}
	return s.checkpoint(ctx)
}

// release lets out what a commit has made final.
func (s *session) release() error {
	first := s.line - uint64(s.results) + 1
	for _, p := range s.packs {
		n, err := s.handOver(first, p)
		if err != nil {
			return err
		}
		first += n
	}
	reply := s.reply
	s.packs, s.results, s.size, s.reply = nil, 0, 0, nil
	if reply == nil {
		return nil
	}
	return s.d.Send(tee.KindInferred, *reply)
}

func (s *session) handOver(first uint64, pack []byte) (uint64, error) {
	readings, err := sealing.ParsePack(pack)
	if err != nil {
		return 0, fmt.Errorf("results: %w", err)
	}
	return uint64(len(readings)), s.d.Send(tee.KindOutput, tee.Output{First: first, Readings: pack})
}

// append seals a delta and appends it to the log; it returns when that is durable.
func (s *session) append(ctx context.Context, d workload.Delta, pages workload.Pages) error {
	var parts [][]byte
	size, total := 0, int64(0)
	flush := func() error {
		if len(parts) == 0 {
			return nil
		}
		end, err := job[tee.LogEnd](ctx, s, tee.JobAppend, tee.AppendLog{Instance: s.assign.Instance, Entries: parts, Trim: s.trim()})
		s.next = end.Next
		parts, size = nil, 0
		return err
	}
	if err := s.sealer.Seal(d, pages, func(part []byte) error {
		if size+len(part) > maxEntries {
			if err := flush(); err != nil {
				return err
			}
		}
		parts, size, total = append(parts, part), size+len(part), total+int64(len(part))
		return nil
	}); err != nil {
		return err
	}
	if err := flush(); err != nil {
		return err
	}
	if d.Full {
		s.base, s.grown = total, 0
	} else {
		s.grown += total
	}
	return nil
}

// trim is the index before which the log is of no more use.
func (s *session) trim() uint64 {
	durable, at := s.durable(), uint64(0)
	for len(s.cuts) > 0 && s.cuts[0].line <= durable {
		at, s.cuts = s.cuts[0].index, s.cuts[1:]
	}
	return at
}

// load begins from the instance's log, or afresh if there is none.
func (s *session) load(ctx context.Context) error {
	l, err := s.readLog(ctx, s.assign.Keys)
	if err != nil {
		return err
	}
	if l.delta == nil {
		if len(s.assign.Newest) > 0 || s.assign.Arrived {
			return errors.New("the instance's log is gone: it is not begun again from nothing")
		}
		if len(s.assign.Recover) > 0 {
			return s.recover(ctx)
		}
		return s.fresh(ctx)
	}
	if len(s.assign.Newest) > 0 && !l.seen {
		return errors.New("the instance's log ends before the newest commit: it was put back to an older state")
	}
	return s.goOn(ctx, l)
}

// goOn runs on from state that was read.
func (s *session) goOn(ctx context.Context, l *logReader) error {
	if err := s.guest.Resume(ctx, l.restorer); err != nil {
		return err
	}
	s.cursors, s.line = l.cursors(s.assign.Inputs), l.delta.Line
	s.report.Newest = l.opener.Head()
	if err := s.newSealer(l.opener.Head(), l.opener.Next()); err != nil {
		return err
	}
	for _, p := range l.results { // the keep leaves out those it has
		if p.last <= s.durable() {
			continue
		}
		if _, err := s.handOver(p.last-p.count+1, p.pack); err != nil {
			return err
		}
	}
	s.cuts, s.base, s.grown = l.cuts, l.base, l.grown
	if l.torn { // a delta without its end is in the way of the next one
		s.base, s.grown = 0, minFull+1
		return s.save(ctx, true)
	}
	return nil
}

func (s *session) newSealer(head []byte, next uint64) error {
	key := s.assign.Keys[len(s.assign.Keys)-1]
	var err error
	s.sealer, err = workload.NewStateSealer(s.assign.Instance, key.ID, key.Key, head, next, rand.Reader)
	return err
}

// fresh begins an instance.
func (s *session) fresh(ctx context.Context) error {
	if err := s.guest.Start(ctx); err != nil {
		return err
	}
	s.logLines(s.guest.Log())
	for _, in := range s.assign.Inputs {
		s.cursors = append(s.cursors, workload.Cursor{Gateway: in.Gateway, Stream: in.Stream, Epoch: in.Epoch, Seq: in.Seq, Head: in.Head})
	}
	s.line = s.assign.Line // of an earlier instance of this name, perhaps
	if err := s.newSealer(nil, 0); err != nil {
		return err
	}
	return s.save(ctx, true)
}

// reload puts the guest back to the last commit.
func (s *session) reload(ctx context.Context) error {
	l, err := s.readLog(ctx, s.assign.Keys)
	if err != nil {
		return err
	}
	if l.delta == nil || string(l.opener.Head()) != string(s.sealer.Head()) {
		return errors.New("the instance's log is not what was written to it")
	}
	return s.guest.Resume(ctx, l.restorer)
}

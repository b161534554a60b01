package runner

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/workload"
)

// outgoing is a move away: parts that the target has yet to acknowledge.
type outgoing struct {
	send   tee.Send
	sealer *workload.StateSealer
	queue  [][]byte // parts from number base on
	base   uint64
	sent   uint64 // parts sent, since the last acknowledgement that moved
	moved  time.Time
	window uint64        // parts that may be under way
	again  time.Duration // without an acknowledgement, until they are sent again
	size   int           // bytes in the queue
	rounds int           // commits when the source was about to stop
	final  bool
}

const (
	resendAfter = 500 * time.Millisecond
	nearly      = 256 << 10 // bytes under way at which the source stops
	maxQueued   = 1 << 30
	maxRounds   = 3
)

// under is how many bytes are not acknowledged.
func (o *outgoing) under() int { return o.size }

// controlled takes what the keep wants of a move.
func (s *session) controlled(ctx context.Context, m any) error {
	switch m := m.(type) {
	case tee.Send:
		return s.beginMove(ctx, m)
	case tee.Resume:
		s.out = nil
	}
	return nil
}

// beginMove seals all of the state for the target, as of a commit.
func (s *session) beginMove(ctx context.Context, m tee.Send) error {
	if s.dirty {
		if err := s.save(ctx, false); err != nil {
			return err
		}
	}
	sealer, err := workload.NewStateSealer(s.assign.Instance, m.Session.ID, m.Session.Key, nil, 0, rand.Reader)
	if err != nil {
		return err
	}
	s.out = &outgoing{send: m, sealer: sealer, window: sendWindow, again: resendAfter, moved: time.Now()}
	d, pages, err := s.guest.Capture(true)
	if err != nil {
		return fmt.Errorf("capturing state: %w", err)
	}
	d.Cursors, d.Line = s.cursors, s.line
	return s.out.mirror(s, d, pages)
}

// mirror seals a delta for the target and sends what the window allows.
func (o *outgoing) mirror(s *session, d workload.Delta, pages workload.Pages) error {
	d.Results = nil // they are durable here before the instance leaves
	if err := o.sealer.Seal(d, pages, func(part []byte) error {
		o.queue, o.size = append(o.queue, part), o.size+len(part)
		return nil
	}); err != nil {
		return err
	}
	if o.size > maxQueued {
		return errors.New("a move cannot keep up: the workload changes more than the connection carries")
	}
	return o.pump(s)
}

// pump sends what the window allows.
func (o *outgoing) pump(s *session) error {
	for ; o.sent < uint64(len(o.queue)) && o.sent < o.window; o.sent++ {
		f := tee.Frame{N: o.base + o.sent, Data: o.queue[o.sent]}
		if err := s.post(tee.JobFrame, f); err != nil {
			return err
		}
	}
	return nil
}

// post has something done whose answer nobody waits for.
func (s *session) post(kind string, body any) error {
	return s.d.Send(tee.KindJob, tee.Job{Kind: kind, Body: cose.MustMarshal(body)})
}

// acked forgets what the target has.
func (o *outgoing) acked(s *session, n uint64) error {
	if n <= o.base || n > o.base+uint64(len(o.queue)) {
		return nil
	}
	k := n - o.base
	for _, part := range o.queue[:k] {
		o.size -= len(part)
	}
	o.queue, o.base = append([][]byte(nil), o.queue[k:]...), n
	o.sent -= min(k, o.sent)
	o.moved = time.Now()
	o.window, o.again = min(o.window+k, sendWindow), resendAfter
	return o.pump(s)
}

// resend begins again behind what was acknowledged, when that stands still.
func (o *outgoing) resend(s *session) error {
	if len(o.queue) == 0 || time.Since(o.moved) < o.again {
		return nil
	}
	o.sent, o.moved = 0, time.Now()
	o.window, o.again = max(o.window/4, 4), min(2*o.again, 8*time.Second) // what is lost is lost for want of room, as a rule
	return o.pump(s)
}

func (o *outgoing) wait() time.Duration {
	if len(o.queue) == 0 {
		return time.Second
	}
	return max(0, o.again-time.Since(o.moved))
}

// ready reports whether so little is left that the source may stop for it.
func (o *outgoing) ready() bool { return !o.final && o.size <= nearly }

// nearlyGone is the end of a move away: what has run since the last commit goes out
// while batches still run, so that little is left for the last delta. Batches that
// change more than the connection carries cannot put it off for ever.
func (s *session) nearlyGone(ctx context.Context) error {
	if s.dirty && s.out.rounds < maxRounds {
		s.out.rounds++
		return s.save(ctx, false)
	}
	return s.depart(ctx)
}

// depart is the last commit: its state goes out under the snapshot key. Nothing
// runs from here on, unless the move does not come about.
func (s *session) depart(ctx context.Context) error {
	o := s.out
	head, next := o.sealer.Head(), o.sealer.Next()
	var err error
	if o.sealer, err = workload.NewStateSealer(s.assign.Instance, o.send.Final.ID, o.send.Final.Key, head, next, rand.Reader); err != nil {
		return err
	}
	o.final = true
	if err := s.save(ctx, false); err != nil {
		return err
	}
	told := false
	for {
		if !told && len(o.queue) == 0 { // the keep waits until the cloud has the results, and seals them at once
			told = true
			if err := s.d.Send(tee.KindFinal, tee.Final{Head: o.sealer.Head(), Line: s.line}); err != nil {
				return err
			}
		}
		t := time.NewTimer(o.wait())
		select {
		case m := <-s.control:
			if err := s.controlled(ctx, m); err != nil || s.out != o {
				t.Stop()
				return err
			}
		case n := <-s.acks:
			err = o.acked(s, n)
		case <-s.told:
		case <-t.C:
			err = o.resend(s)
		case <-ctx.Done():
			err = ctx.Err()
		}
		t.Stop()
		if err != nil {
			return err
		}
	}
}

// takeIn is the target's side: what comes is durable before it is acknowledged,
// and opened as far as the keys go.
func (s *session) takeIn(ctx context.Context) error {
	l, err := s.newLogReader(s.assign.Keys)
	if err != nil {
		return err
	}
	in := &incoming{s: s, l: l, session: s.assign.Keys[0].ID}
	if err := in.resume(ctx); err != nil {
		return err
	}
	for {
		if err := in.ack(); err != nil {
			return err
		}
		select {
		case f := <-s.frames:
			err = in.frame(ctx, f)
		case m := <-s.control:
			if a, ok := m.(tee.Activate); ok {
				return in.activate(ctx, a)
			}
		case <-time.After(reportEvery):
		case <-ctx.Done():
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
	}
}

// incoming is an instance on its way here.
type incoming struct {
	s       *session
	l       *logReader
	session []byte // id of the key that opens all but the last delta
	count   uint64 // parts that are durable
	head    []byte
	sealed  [][]byte // parts of the last delta
	firstAt uint64   // index of the first of them
	whole   bool     // all of it is here
	told    bool
}

// resume takes what an earlier runner made durable.
func (in *incoming) resume(ctx context.Context) error {
	for from := uint64(0); ; {
		r, err := job[tee.LogEntries](ctx, in.s, tee.JobRead, tee.ReadLog{Instance: in.s.assign.Instance, From: from})
		if err != nil {
			return err
		}
		in.s.next = r.Next
		for i, part := range r.Entries {
			if err := in.take(r.First+uint64(i), part); err != nil {
				return err
			}
		}
		from = r.First + uint64(len(r.Entries))
		if len(r.Entries) == 0 || from >= r.Next {
			return nil
		}
	}
}

// frame makes the next parts durable, with those that wait behind it.
func (in *incoming) frame(ctx context.Context, f tee.Frame) error {
	var parts [][]byte
	size := 0
	for more := true; more; {
		if f.N == in.count+uint64(len(parts)) && !in.whole {
			parts, size = append(parts, f.Data), size+len(f.Data)
		}
		if more = size < maxEntries; !more {
			break
		}
		select {
		case f = <-in.s.frames:
		default:
			more = false
		}
	}
	if len(parts) == 0 {
		return nil // it came before, or too early
	}
	for i, part := range parts { // before it is durable: what was altered on the way would be in the way for good
		err := in.take(in.s.next+uint64(i), part)
		if errors.Is(err, errAltered) {
			parts = parts[:i]
			break // it comes again
		}
		if err != nil {
			return err
		}
	}
	if len(parts) == 0 {
		return nil
	}
	end, err := job[tee.LogEnd](ctx, in.s, tee.JobAppend, tee.AppendLog{Instance: in.s.assign.Instance, Entries: parts})
	in.s.next = end.Next
	return err
}

// errAltered is a part that is not as the source sealed it, or not the next one.
var errAltered = errors.New("what came of the instance was altered")

func (in *incoming) take(index uint64, part []byte) error {
	head, err := workload.ChainHead(in.head, part)
	if err != nil {
		return fmt.Errorf("%w: %w", errAltered, err)
	}
	key, last, err := workload.PeekPart(part)
	if err != nil {
		return fmt.Errorf("%w: %w", errAltered, err)
	}
	opens := bytes.Equal(key, in.session) && len(in.sealed) == 0
	if opens {
		if err := in.l.opener.Check(part); err != nil {
			return fmt.Errorf("%w: %w", errAltered, err)
		}
	}
	in.head = head
	in.count++
	if opens {
		return in.l.add(index, part)
	}
	if len(in.sealed) == 0 {
		in.firstAt = index
	}
	in.sealed, in.whole = append(in.sealed, part), last
	return nil
}

// ack says how far the source has come here, and to the keep when all is here.
func (in *incoming) ack() error {
	if err := in.s.post(tee.JobAck, tee.FrameAck{N: in.count}); err != nil {
		return err
	}
	if !in.whole || in.told {
		return nil
	}
	in.told = true
	return in.s.d.Send(tee.KindReceived, tee.Received{Head: in.head})
}

// activate opens the last delta and goes on from there.
func (in *incoming) activate(ctx context.Context, a tee.Activate) error {
	if !in.whole || !bytes.Equal(in.head, a.Head) {
		return errors.New("the instance was released before all of it was here")
	}
	for _, k := range a.Keys {
		in.l.opener.AddKey(workload.StateKey{ID: k.ID, Key: k.Key})
	}
	for i, part := range in.sealed {
		if err := in.l.add(in.firstAt+uint64(i), part); err != nil {
			return err
		}
	}
	if err := in.l.opener.End(); err != nil {
		return err
	}
	in.s.assign.Epoch, in.s.assign.Keys = a.Epoch, a.Keys
	in.s.outputAck(tee.OutputAck{Line: a.Line}) // what came before is the source's
	return in.s.goOn(ctx, in.l)
}

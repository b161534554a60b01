package fleet

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"edgekeep/cloud"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

const (
	maxWait    = 20 * time.Second
	maxAnswer  = sealing.MaxChunk // bytes of chunks in an answer: one chunk may be all of it
	maxPlaces  = 4096
	lookEvery  = time.Second // in case that nobody told of a chunk
	afterward  = 50 * time.Millisecond
	firstSleep = time.Millisecond
)

// places remembers where in REC chunks are that were answered last, so that who
// reads on needs no search.
type places struct {
	mu sync.Mutex // protects at
	at map[place]uint64
}

type place struct {
	subject string
	epoch   sealing.Epoch
	seq     uint64
}

func (p *places) get(at place) (uint64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	seq, ok := p.at[at]
	return seq, ok
}

func (p *places) put(at place, seq uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at == nil || len(p.at) >= maxPlaces {
		p.at = map[place]uint64{}
	}
	p.at[at] = seq
}

// records returns stored chunks of a stream after a position, in order. They are
// sealed: any gateway of the tenant may have them.
func (f *Fleet) records(ctx context.Context, tenant string, r message.AskedRecords) (message.Records, error) {
	if !attest.ValidName(r.Gateway) || !attest.ValidName(r.Stream) || len(r.Epoch) != 0 && len(r.Epoch) != len(sealing.Epoch{}) {
		return message.Records{}, errors.New("which records? gateway, stream, and an epoch or none are needed")
	}
	subject := "rec." + cloud.Key(tenant, r.Gateway) + "." + r.Stream
	var told *nats.Subscription
	deadline := time.Now().Add(min(max(time.Duration(r.Wait), 0)*time.Millisecond, maxWait))
	if r.Wait > 0 { // before looking, so that nothing comes in between
		var err error
		if told, err = f.Bus.NC.SubscribeSync(subject); err != nil {
			return message.Records{}, fmt.Errorf("waiting for records: %w", err)
		}
		defer func() { _ = told.Unsubscribe() }()
	}
	from, err := f.place(ctx, subject, r)
	if err != nil {
		return message.Records{}, err
	}
	for {
		out, err := f.recordsFrom(ctx, subject, from)
		if err != nil || len(out.Chunks) > 0 || !time.Now().Before(deadline) {
			return out, err
		}
		if out, err = f.awaitRecords(ctx, told, subject, from, deadline); err != nil || len(out.Chunks) > 0 {
			return out, err
		}
	}
}

// place is the sequence number in REC from which on records are new to who asks.
func (f *Fleet) place(ctx context.Context, subject string, r message.AskedRecords) (uint64, error) {
	if len(r.Epoch) == 0 {
		return 1, nil
	}
	known := sealing.Checkpoint{Epoch: sealing.Epoch(r.Epoch), Seq: r.Seq}
	if seq, ok := f.places.get(place{subject, known.Epoch, known.Seq}); ok {
		return seq + 1, nil
	}
	below, above, err := f.search(ctx, subject, func(c sealing.Checkpoint) bool { return compare(c, known) <= 0 })
	switch {
	case err != nil:
		return 0, err
	case above != nil:
		return above.seq, nil
	case below != nil:
		return below.seq + 1, nil
	}
	return 1, nil
}

func (f *Fleet) recordsFrom(ctx context.Context, subject string, from uint64) (message.Records, error) {
	var out message.Records
	size, newest := 0, jetstream.RawStreamMsg{}
	for {
		m, err := f.Bus.Rec.GetMsg(ctx, from, jetstream.WithGetMsgSubject(subject))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			return message.Records{}, fmt.Errorf("reading the store: %w", err)
		}
		if size += len(m.Data) + 8; size > maxAnswer && len(out.Chunks) > 0 {
			break
		}
		out.Chunks, newest, from = append(out.Chunks, m.Data), *m, m.Sequence+1
	}
	if len(out.Chunks) > 0 {
		if _, pos, err := sealing.ParseChunk(newest.Data); err == nil {
			f.places.put(place{subject, pos.Checkpoint.Epoch, pos.Checkpoint.Seq}, newest.Sequence)
		}
	}
	return out, nil
}

// awaitRecords waits until a chunk is published, and then until it is stored,
// which is a little later or, if it was refused, never.
func (f *Fleet) awaitRecords(ctx context.Context, told *nats.Subscription, subject string, from uint64, deadline time.Time) (message.Records, error) {
	until := time.Now().Add(lookEvery)
	if until.After(deadline) {
		until = deadline
	}
	wait, cancel := context.WithDeadline(ctx, until)
	m, _ := told.NextMsgWithContext(wait) // if nobody tells, the caller looks anyway
	cancel()
	if m == nil || ctx.Err() != nil {
		return message.Records{}, ctx.Err()
	}
	for sleep := firstSleep; sleep <= afterward; sleep *= 2 {
		out, err := f.recordsFrom(ctx, subject, from)
		if err != nil || len(out.Chunks) > 0 {
			return out, err
		}
		select {
		case <-time.After(sleep):
		case <-ctx.Done():
			return out, ctx.Err()
		}
	}
	return message.Records{}, nil
}

// storedLine is the last line of an instance's results that are stored of a
// gateway under an epoch, 0 if there is none. It looks at the newest chunks only:
// those of keys and restarts, which hold no results, are few.
func (f *Fleet) storedLine(ctx context.Context, tenant, gateway, instance string, epoch uint64) (uint64, error) {
	if gateway == "" {
		return 0, nil
	}
	subject := "rec." + cloud.Key(tenant, gateway) + "." + instance
	session := workload.Session(instance, epoch)
	m, err := f.Bus.Rec.GetLastMsgForSubject(ctx, subject)
	for range 64 {
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return 0, nil
		}
		if err != nil {
			return 0, fmt.Errorf("looking for an instance's results: %w", err)
		}
		_, pos, err := sealing.ParseChunk(m.Data)
		if err != nil {
			return 0, fmt.Errorf("looking for an instance's results: %w", err)
		}
		if c := pos.Checkpoint.Cursor; c != nil && c.Session == session {
			return c.Line, nil
		}
		below, _, err := f.search(ctx, subject, func(c sealing.Checkpoint) bool { return compare(c, pos.Checkpoint) < 0 })
		if err != nil || below == nil {
			return 0, err
		}
		m = &jetstream.RawStreamMsg{Sequence: below.seq, Data: below.data}
	}
	return 0, nil
}

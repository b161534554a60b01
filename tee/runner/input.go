package runner

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// input reads one of an instance's streams in order, each record once: what the
// keep feeds as it becomes durable, and from the cloud what was before that, or
// what another gateway sends there.
type input struct {
	s    *session
	of   int // index among the inputs
	in   tee.Input
	at   workload.Cursor // newest record handed on
	feed chan []byte     // chunks of a local stream; nil: some found no room
	keys map[string]openKey
}

type openKey struct {
	aead  cipher.AEAD
	epoch *ecdsa.PublicKey
}

// record is one record's readings, and where that leaves the input.
type record struct {
	input    int
	cursor   workload.Cursor
	readings []sealing.Reading
	gap      bool // it does not follow the one before: what was consumed of that says nothing of this
}

const (
	feedQueue  = 256
	remoteWait = 15 * time.Second
	retryAfter = 300 * time.Millisecond
	askFirst   = time.Second
	askLast    = 30 * time.Second
)

// run hands records on until ctx ends.
func (in *input) run(ctx context.Context, out chan<- record) error {
	behind, failed := true, false
	again := askFirst  // the feed's silence after which the cloud is asked once more; 0: not any more
	var pending []byte // a fed chunk that does not follow yet
	for ctx.Err() == nil {
		if behind || !in.in.Local {
			more, err := in.fetch(ctx, out)
			if err != nil && errors.Is(err, errInput) {
				return err
			}
			if err == nil && more {
				again = askFirst
				continue
			}
			failed = err != nil
			if err != nil && !in.in.Local {
				pause(ctx, retryAfter)
			}
			behind = false
		}
		if !in.in.Local {
			continue
		}
		if pending == nil {
			silent := make(<-chan time.Time)
			if again > 0 { // what was fed before this process began may be on its way to the cloud
				silent = time.After(again)
			}
			select {
			case pending = <-in.feed:
				if pending == nil {
					behind, again = true, askFirst
					continue
				}
			case <-silent:
				behind = true
				if again *= 2; again > askLast && failed {
					again = askLast
				} else if again > askLast {
					again = 0
				}
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		placed, err := in.take(ctx, pending, false, out)
		if errors.Is(err, errInput) {
			return err
		}
		if placed {
			pending = nil
			continue
		}
		behind, again = true, askFirst // the cloud has what is missing, or will soon
		pause(ctx, retryAfter)
	}
	return ctx.Err()
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// errInput is an input that cannot be read on: the process ends, and tries again.
var errInput = errors.New("reading an input")

// fetch asks the cloud for what comes next.
func (in *input) fetch(ctx context.Context, out chan<- record) (more bool, err error) {
	wait := time.Duration(0)
	if !in.in.Local {
		wait = remoteWait
	}
	r, err := job[message.Records](ctx, in.s, tee.JobRecords, message.AskedRecords{
		Gateway: in.in.Gateway, Stream: in.in.Stream, Epoch: in.at.Epoch, Seq: in.at.Seq, Wait: wait.Milliseconds(),
	})
	if err != nil {
		return false, err
	}
	for _, c := range r.Chunks {
		if _, err := in.take(ctx, c, true, out); err != nil {
			return false, err
		}
	}
	return len(r.Chunks) > 0, nil
}

// take hands on what is new in a chunk, if it follows what was handed on before.
// What the cloud has stored follows by its own judgement: what it says is missing
// is lost, and the log says so.
func (in *input) take(ctx context.Context, data []byte, stored bool, out chan<- record) (placed bool, err error) {
	chunk, pos, err := sealing.ParseChunk(data)
	if err != nil {
		return false, fmt.Errorf("%w %s/%s: %w", errInput, in.in.Gateway, in.in.Stream, err)
	}
	switch in.place(pos) {
	case isOld:
		return true, nil
	case isGap:
		if !stored {
			return false, nil
		}
		in.s.note(fmt.Sprintf("input %s/%s: records are missing before epoch %s record %d", in.in.Gateway, in.in.Stream, pos.First.Epoch, pos.First.Seq))
	}
	k, err := in.key(ctx, pos.Checkpoint)
	if err != nil {
		return false, err
	}
	if err := sealing.VerifyChunk(chunk, k.epoch); err != nil {
		return false, fmt.Errorf("%w %s/%s: %w", errInput, in.in.Gateway, in.in.Stream, err)
	}
	for _, r := range chunk.Records {
		h, readings, err := sealing.OpenRecord(k.aead, r)
		if err != nil {
			return false, fmt.Errorf("%w %s/%s: %w", errInput, in.in.Gateway, in.in.Stream, err)
		}
		if len(in.at.Head) > 0 && bytes.Equal(in.at.Epoch, h.Epoch[:]) && h.Seq <= in.at.Seq {
			continue
		}
		gap := len(in.at.Epoch) > 0 && bytes.Equal(in.at.Epoch, h.Epoch[:]) && h.Seq != in.at.Seq+1
		in.at = workload.Cursor{Gateway: in.in.Gateway, Stream: in.in.Stream, Epoch: bytes.Clone(h.Epoch[:]), Seq: h.Seq, Head: sealing.Hash(r)}
		select {
		case out <- record{input: in.of, cursor: in.at, readings: readings, gap: gap}:
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	return true, nil
}

const (
	isNext = iota
	isOld
	isGap
)

// place says how a chunk lies to what was handed on.
func (in *input) place(pos sealing.Position) int {
	first, last, at := pos.First, pos.Checkpoint.Seq, in.at
	none := len(at.Head) == 0
	switch {
	case len(at.Epoch) == 0:
		return isNext
	case bytes.Equal(at.Epoch, first.Epoch[:]) && none:
		if first.Seq == 0 {
			return isNext
		}
	case bytes.Equal(at.Epoch, first.Epoch[:]):
		switch {
		case last <= at.Seq:
			return isOld
		case first.Seq <= at.Seq || first.Seq == at.Seq+1 && bytes.Equal(first.Prev, at.Head):
			return isNext
		}
	case bytes.Compare(first.Epoch[:8], at.Epoch[:8]) < 0:
		return isOld
	case first.Seq == 0 && first.Before != nil && bytes.Equal(first.Before.Epoch[:], at.Epoch) && first.Before.Count == at.Seq+1 && bytes.Equal(first.Before.Head, at.Head):
		return isNext
	}
	return isGap
}

// key gets the key of a chunk's epoch from the keep.
func (in *input) key(ctx context.Context, cp sealing.Checkpoint) (openKey, error) {
	if k, ok := in.keys[string(cp.Epoch[:])]; ok {
		return k, nil
	}
	got, err := job[tee.GotKey](ctx, in.s, tee.JobKey, tee.WantKey{Gateway: in.in.Gateway, Stream: in.in.Stream, Epoch: cp.Epoch[:]})
	if err != nil {
		return openKey{}, err
	}
	var k openKey
	if k.aead, err = sealing.NewAEAD(got.Key); err != nil {
		return k, err
	}
	clear(got.Key)
	if k.epoch, err = cose.UnmarshalKey(got.EpochKey); err != nil {
		return k, err
	}
	in.keys = map[string]openKey{string(cp.Epoch[:]): k} // the others will not come again
	return k, nil
}

package runner

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// maxCheckpoint bounds a checkpoint: it is one blob.
const maxCheckpoint = message.MaxBlocks * message.BlockSize

// checkpoint seals all of the state for the cloud when it is time. It is called
// right after a commit; the upload goes on while batches run, one at a time.
func (s *session) checkpoint(ctx context.Context) error {
	every := time.Duration(s.manifest.Checkpoint) * time.Second
	if every == 0 || s.out != nil || time.Since(s.uploaded) < every || !s.uploading.TryLock() {
		return nil
	}
	s.uploaded = time.Now()
	key, err := job[tee.CheckpointKey](ctx, s, tee.JobCheckpoint, nil)
	if err != nil {
		s.uploading.Unlock()
		s.note("no checkpoint: " + err.Error())
		return nil //nolint:nilerr // the workload goes on without
	}
	sealer, err := workload.NewStateSealer(s.assign.Instance, key.Key.ID, key.Key.Key, nil, 0, rand.Reader)
	if err != nil {
		return err
	}
	d, pages, err := s.guest.Capture(true)
	if err != nil {
		return fmt.Errorf("capturing state: %w", err)
	}
	d.Cursors, d.Line = s.cursors, s.line
	var blob []byte
	err = sealer.Seal(d, pages, func(part []byte) error {
		if len(blob)+len(part) > maxCheckpoint-4 {
			return errTooLarge
		}
		blob = workload.AppendPart(blob, part)
		return nil
	})
	if err != nil {
		s.uploading.Unlock()
		s.note("no checkpoint: " + err.Error())
		if errors.Is(err, errTooLarge) {
			return nil
		}
		return err
	}
	snap := tee.Snapshot{Head: sealer.Head(), Line: s.line, KeyID: key.Key.ID, Sealed: key.Sealed}
	s.group.Go(func() error {
		defer s.uploading.Unlock()
		if err := s.upload(ctx, blob, snap); err != nil && ctx.Err() == nil {
			s.note("no checkpoint: " + err.Error())
		}
		return nil
	})
	return nil
}

var errTooLarge = fmt.Errorf("the state has more than the %d MiB that fit", maxCheckpoint>>20)

func (s *session) upload(ctx context.Context, blob []byte, snap tee.Snapshot) error {
	if _, err := job[any](ctx, s, tee.JobPut, tee.PutPart{Instance: s.assign.Instance}); err != nil {
		return err
	}
	for len(blob) > 0 {
		n := min(len(blob), maxEntries)
		p := tee.PutPart{Instance: s.assign.Instance, Data: blob[:n], Last: n == len(blob)}
		blob = blob[n:]
		if !p.Last {
			if _, err := job[any](ctx, s, tee.JobPut, p); err != nil {
				return err
			}
			continue
		}
		done, err := job[tee.PutDone](ctx, s, tee.JobPut, p)
		if err != nil {
			return err
		}
		snap.Blob = done.ID
	}
	_, err := job[any](ctx, s, tee.JobSnapshot, snap)
	return err
}

// recover goes on from the checkpoint that the data owner's word names.
func (s *session) recover(ctx context.Context) error {
	from, err := job[tee.Recovered](ctx, s, tee.JobRecover, nil)
	if err != nil {
		return err
	}
	var blob []byte
	for size := int64(1); int64(len(blob)) < size; {
		p, err := job[tee.BlobPart](ctx, s, tee.JobBlob, tee.ReadBlob{ID: from.Blob, Offset: int64(len(blob))})
		if err != nil {
			return err
		}
		if len(p.Data) == 0 || p.Size > maxCheckpoint {
			return errors.New("the checkpoint is empty or too large")
		}
		blob, size = append(blob, p.Data...), p.Size
	}
	l, err := s.newLogReader([]tee.StateKey{from.Key})
	if err != nil {
		return err
	}
	for i := uint64(0); len(blob) > 0; i++ {
		var part []byte
		if part, blob, err = workload.CutPart(blob); err != nil {
			return err
		}
		if err := l.add(i, part); err != nil {
			return err
		}
	}
	if err := l.opener.End(); err != nil {
		return err
	}
	if !bytes.Equal(l.opener.Head(), s.assign.Recover) {
		return errors.New("the checkpoint is not the one that the data owner named")
	}
	if err := s.guest.Resume(ctx, l.restorer); err != nil {
		return err
	}
	s.cursors, s.line = l.cursors(s.assign.Inputs), l.delta.Line
	if err := s.newSealer(nil, 0); err != nil {
		return err
	}
	return s.save(ctx, true)
}

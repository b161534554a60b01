package keep

import (
	"bytes"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// checkpointKey makes the key of a checkpoint, which the data owner can open too.
func (w *workloads) checkpointKey(r *runner, name string, id uint64) {
	key := newStateKey()
	w.k.mu.Lock()
	to, subject := w.k.roots.Data, w.k.subject()
	w.k.mu.Unlock()
	sealed, err := workload.SealTo(workload.PurposeSnapshot, workload.SnapshotContext(subject, name, key.ID), cose.MustMarshal(key), to)
	w.answer(r, id, tee.CheckpointKey{Key: key, Sealed: sealed}, err)
}

// snapshot signs what a checkpoint in the cloud is.
func (w *workloads) snapshot(r *runner, name string, spec instance, id uint64, b tee.Snapshot) {
	w.k.mu.Lock()
	now, err := w.k.cloudTime()
	s := workload.Snapshot{
		Subject: w.k.subject(), Instance: name, Epoch: spec.Epoch, Blob: b.Blob, Head: b.Head, Line: b.Line, Time: now.Unix(), KeyID: b.KeyID, Sealed: b.Sealed,
	}
	w.k.mu.Unlock()
	var msg []byte
	if err == nil {
		msg, err = s.Sign(w.k.epochKey)
	}
	if err != nil {
		w.answer(r, id, nil, err)
		return
	}
	w.do(name, tee.JobAsk, tee.Question{Kind: message.AskSnapshot, Body: cose.MustMarshal(message.Signed{Message: msg})}, func(d tee.JobDone) {
		if d.Error != "" {
			err = errors.New(d.Error)
		}
		w.answer(r, id, struct{}{}, err)
	})
}

// recovers reports whether an instance goes on from this blob.
func (w *workloads) recovers(name string, blob []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.run[name]
	return st != nil && len(st.recover) > 0 && bytes.Equal(st.recover, blob)
}

// recover gets the key of the checkpoint that the data owner's word names.
func (w *workloads) recover(r *runner, name string, spec instance, id uint64) {
	w.k.mu.Lock()
	_, err := w.k.ownVerdict()
	verdict := w.k.verdictMsg
	w.k.mu.Unlock()
	if err == nil && len(spec.Recover) == 0 {
		err = fmt.Errorf("%w: the instance goes on from no checkpoint", errRunner)
	}
	if err != nil {
		w.answer(r, id, nil, err)
		return
	}
	q := tee.Question{Kind: message.AskRecovery, Body: cose.MustMarshal(message.AskedRecovery{Instance: name, Verdict: verdict})}
	w.do(name, tee.JobAsk, q, func(d tee.JobDone) {
		got, err := w.k.openRecovery(name, spec, d)
		if err == nil {
			w.mu.Lock()
			if st := w.run[name]; st != nil {
				st.recover = got.Blob
			}
			w.mu.Unlock()
		}
		w.answer(r, id, got, err)
	})
}

func (k *Keep) openRecovery(name string, spec instance, d tee.JobDone) (tee.Recovered, error) {
	if d.Error != "" {
		return tee.Recovered{}, errors.New(d.Error)
	}
	var s message.Signed
	if err := cose.Unmarshal(d.Body, &s); err != nil {
		return tee.Recovered{}, fmt.Errorf("recovery: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	rec, err := workload.VerifyRecovery(k.roots.Broker, s.Message)
	if err != nil {
		return tee.Recovered{}, err
	}
	if rec.Instance != name || rec.To != k.subject() || !bytes.Equal(rec.Head, spec.Recover) {
		return tee.Recovered{}, errors.New("recovery: it is of another checkpoint")
	}
	secret, err := k.openSealed(workload.PurposeRecovery, workload.RecoveryContext(name, rec.Blob, rec.Head), rec.Sealed)
	if err != nil {
		return tee.Recovered{}, err
	}
	out := tee.Recovered{Blob: rec.Blob}
	return out, cose.Unmarshal(secret, &out.Key)
}

package keep

import (
	"bytes"
	"crypto/hpke"
	"errors"
	"fmt"
	"slices"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/workload"
)

// clear asks the ledger whether whoever offers an instance holds it, as it is
// offered; then it has the agent forget the log of an earlier instance of this name. The
// target accepts when that is done: a log is empty when its state first knows of
// the instance, whatever crashes then.
func (k *Keep) clear(name string, mv *move) {
	k.askEntry(name, func(e workload.Entry) {
		if k.moves[name] != mv || mv.empty {
			return
		}
		if e.Holder != mv.peer || e.Epoch != mv.offer.Epoch || !bytes.Equal(e.Bundle, workload.ID(mv.offer.Manifest)) || !bytes.Equal(e.Inputs, workload.InputsHash(mv.offer.Inputs)) {
			k.refuse(name, mv.peer, mv.attempt, errors.New("the ledger says otherwise of what is offered"))
			delete(k.moves, name)
			return
		}
		k.workloads.do(name, tee.JobDrop, tee.DropLog{Instance: name}, func(d tee.JobDone) {
			k.mu.Lock()
			defer k.mu.Unlock()
			if d.Error == "" && k.moves[name] == mv && !mv.empty {
				mv.empty = true
				k.resend(name)
			}
		})
	})
}

// offered is the target's first look: may the instance come here?
func (k *Keep) offered(c workload.Control) error {
	i, known := k.st.Instances[c.Instance]
	if known && i.Move != nil && bytes.Equal(i.Move.Attempt, c.Attempt) {
		return nil // further on already
	}
	if known && i.Phase == phaseHolding && i.Move.Peer == c.From {
		k.resend(c.Instance) // its refusal ends the earlier move; one that it does not refuse may still be released
		return nil
	}
	m, err := workload.VerifyManifest(k.roots.Operator, c.Manifest)
	if err == nil {
		err = k.mayRun(c.Instance, len(c.Manifest), m, c.Inputs)
	}
	if err == nil && known && i.Phase == phaseReleased && c.Epoch <= i.Epoch {
		err = fmt.Errorf("instance %s has moved on since epoch %d", c.Instance, c.Epoch)
	}
	if err == nil && k.verdictMsg == nil {
		err = errors.New("this keep has no verdict yet")
	}
	if err == nil && known && i.Phase == phaseHolding {
		err = fmt.Errorf("instance %s is moving here from %s", c.Instance, i.Move.Peer)
	}
	if err == nil && !k.workloads.idle() {
		err = errors.New("no runner is idle")
	}
	if err == nil && k.moves[c.Instance] == nil && len(k.moves) >= maxInstances {
		err = errors.New("too many instances are being moved")
	}
	if err == nil && k.moves[c.Instance] != nil && k.moves[c.Instance].source {
		err = errors.New("it is being moved from here")
	}
	if err != nil {
		k.refuse(c.Instance, c.From, c.Attempt, err)
		return err
	}
	if mv := k.moves[c.Instance]; mv == nil || !bytes.Equal(mv.attempt, c.Attempt) {
		k.moves[c.Instance] = &move{attempt: c.Attempt, peer: c.From, offer: c, nonce: random(workload.AttemptSize), began: time.Now()}
	}
	k.resend(c.Instance)
	return nil
}

// begun makes the target's state know of the move.
func (k *Keep) begun(c workload.Control) (tee.Outcome, error) {
	if i, ok := k.st.Instances[c.Instance]; ok && i.Move != nil && bytes.Equal(i.Move.Attempt, c.Attempt) {
		return tee.Outcome{}, nil
	}
	mv := k.moves[c.Instance]
	if mv == nil || mv.source || !mv.empty || !bytes.Equal(mv.attempt, c.Attempt) || mv.peer != c.From {
		err := errors.New("no such move is under way") // this keep was started again, perhaps
		k.refuse(c.Instance, c.From, c.Attempt, err)
		return tee.Outcome{}, err
	}
	keys, err := k.openSealed(workload.PurposeMove, moveContext(c.Attempt, c.KeyID, mv.nonce), c.Sealed)
	if err != nil {
		return tee.Outcome{}, err
	}
	var secret workload.Keys
	if err := cose.Unmarshal(keys, &secret); err != nil || len(secret.Bundle) != workload.KeySize || len(secret.Session) != workload.KeySize {
		return tee.Outcome{}, errors.New("the keys of the move are malformed")
	}
	next := k.withInstance(c.Instance, &instance{
		Phase: phaseHolding, Manifest: mv.offer.Manifest, BundleKey: secret.Bundle, Epoch: mv.offer.Epoch, Inputs: mv.offer.Inputs, Moves: mv.offer.Moves,
		Keys: []tee.StateKey{{ID: c.KeyID, Key: secret.Session}}, Move: &passage{Attempt: c.Attempt, Peer: c.From, Nonce: mv.nonce},
	})
	return k.step(next, func() (tee.Outcome, error) {
		delete(k.moves, c.Instance)
		k.workloads.forget(c.Instance)
		k.adoptInstances()
		k.resend(c.Instance)
		return tee.Outcome{}, nil
	})
}

func (k *Keep) openSealed(purpose string, context, sealed []byte) ([]byte, error) {
	var key hpke.PrivateKey
	key, err := k.receiveKey(k.st)
	if err != nil {
		return nil, err
	}
	return workload.OpenFrom(purpose, context, sealed, key)
}

// released makes the instance live here.
func (k *Keep) released(c workload.Control) (tee.Outcome, error) {
	i, ok := k.st.Instances[c.Instance]
	if !ok || i.Move == nil || !bytes.Equal(i.Move.Attempt, c.Attempt) || i.Move.Peer != c.From || i.Phase != phaseHolding {
		// It was used, perhaps long ago, or what it opens is not here any more.
		k.control(workload.KindDone, c.Instance, c.From, workload.Control{Attempt: c.Attempt})
		return tee.Outcome{}, nil
	}
	e, err := workload.VerifyEntry(k.roots.Fleet, c.Entry)
	if err != nil {
		return tee.Outcome{}, err
	}
	head := k.workloads.receivedHead(c.Instance)
	if e.Instance != c.Instance || e.Tenant != k.st.Tenant || !bytes.Equal(e.Inputs, workload.InputsHash(i.Inputs)) || e.Epoch != i.Epoch+1 || e.Holder != k.st.Gateway || !bytes.Equal(e.Attempt, c.Attempt) || !bytes.Equal(e.Head, c.Head) {
		return tee.Outcome{}, errors.New("the ledger's entry is not of this move")
	}
	if !bytes.Equal(head, e.Head) {
		return tee.Outcome{}, errors.New("what came is not what the ledger says: waiting for the rest")
	}
	secret, err := k.openSealed(workload.PurposeRelease, releaseContext(&passage{Attempt: c.Attempt, Head: c.Head, Nonce: i.Move.Nonce}), c.Sealed)
	if err != nil {
		return tee.Outcome{}, err
	}
	var final tee.StateKey
	if err := cose.Unmarshal(secret, &final); err != nil {
		return tee.Outcome{}, fmt.Errorf("the snapshot key: %w", err)
	}
	i.Phase, i.Epoch, i.Line, i.Moves = phaseLive, e.Epoch, e.Line, i.Moves+1
	i.Keys = append(slices.Clone(i.Keys), final, newStateKey())
	i.Move = &passage{Attempt: c.Attempt, Peer: c.From, Head: e.Head, Line: e.Line}
	return k.step(k.withInstance(c.Instance, &i), func() (tee.Outcome, error) {
		k.workloads.committed(c.Instance, e.Head)
		k.adoptInstances()
		k.workloads.tell(c.Instance, tee.KindActivate, tee.Activate{Epoch: i.Epoch, Keys: i.Keys, Head: e.Head, Line: e.Line})
		k.log.Info("moved here", "instance", c.Instance, "from", c.From, "epoch", i.Epoch)
		k.control(workload.KindDone, c.Instance, c.From, workload.Control{Attempt: c.Attempt})
		return tee.Outcome{}, nil
	})
}

// refused ends a move that the other side will not have. What the source says
// after it froze, it says after the ledger gave it the next epoch.
func (k *Keep) refused(c workload.Control) (tee.Outcome, error) {
	if mv := k.moves[c.Instance]; mv != nil && bytes.Equal(mv.attempt, c.Attempt) && mv.peer == c.From {
		k.giveUp(c.Instance, fmt.Errorf("%s refuses: %s", c.From, printable(c.Reason)))
		return tee.Outcome{}, nil
	}
	i, ok := k.st.Instances[c.Instance]
	if !ok || i.Phase != phaseHolding || !bytes.Equal(i.Move.Attempt, c.Attempt) || i.Move.Peer != c.From {
		return tee.Outcome{}, nil
	}
	return k.step(k.withInstance(c.Instance, nil), func() (tee.Outcome, error) {
		k.log.Warn("a move to here was given up", "instance", c.Instance, "from", c.From, "reason", printable(c.Reason))
		k.adoptInstances()
		k.workloads.do(c.Instance, tee.JobDrop, tee.DropLog{Instance: c.Instance}, nil)
		return tee.Outcome{}, nil
	})
}

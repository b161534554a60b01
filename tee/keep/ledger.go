package keep

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// claim asks the ledger. Its answer counts only for this very claim.
func (k *Keep) claim(name string, e workload.Entry, i instance) {
	e.Instance, e.Epoch, e.Tenant, e.Inputs = name, i.Epoch+1, k.st.Tenant, workload.InputsHash(i.Inputs)
	msg, err := workload.Claim{Instance: name, From: i.Epoch, Entry: e}.Sign(k.epochKey)
	if err != nil {
		k.log.Error("a claim could not be signed", "err", err)
		return
	}
	q := tee.Question{Kind: message.AskLedger, Body: cose.MustMarshal(message.Signed{Message: msg})}
	k.workloads.do("", tee.JobAsk, q, func(d tee.JobDone) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.heardLedger(name, i.Epoch, msg, d)
	})
}

// heard is the ledger's newest answer to a claim of ours, until a step uses it. One
// to a claim from another epoch than the instance's says nothing: it came late.
type heard struct {
	from    uint64 // the epoch that the claim was to replace
	entry   workload.Entry
	msg     []byte
	refused string
}

func (k *Keep) heardLedger(name string, from uint64, claim []byte, d tee.JobDone) {
	if k.st.Instances[name].Epoch != from {
		return
	}
	reason, refused := strings.CutPrefix(d.Error, tee.CloudRefuses)
	if d.Error != "" && !refused {
		return // not heard: asked again
	}
	if refused {
		// The cloud's word that this claim is not allowed is not signed, and need not
		// be: all that follows from it is another claim.
		k.log.Warn("the ledger did not take a claim", "instance", name, "reason", printable(reason))
		k.ledger[name] = heard{from: from, refused: reason}
	} else {
		var s message.Signed
		if err := cose.Unmarshal(d.Body, &s); err != nil {
			return
		}
		e, err := workload.VerifyEntry(k.roots.Fleet, s.Message)
		if err != nil || e.Instance != name || e.Tenant != k.st.Tenant || !e.Answers(claim) {
			k.log.Warn("an answer that is not the ledger's", "instance", name, "err", err)
			return
		}
		k.ledger[name] = heard{from: from, entry: e, msg: s.Message}
	}
	k.workloads.advanceSoon()
}

// advanceStep takes the next step that waits, if any.
func (k *Keep) advanceStep(tee.Advance) (tee.Outcome, error) {
	if k.phase != tee.PhaseEnrolled {
		return tee.Outcome{}, fmt.Errorf("the keep is %s", k.phase)
	}
	if k.pending != nil {
		return tee.Outcome{}, nil // asked for again by the tick
	}
	for _, name := range slices.Sorted(maps.Keys(k.st.Instances)) {
		i := k.st.Instances[name]
		next, act, err := k.nextStep(name, i)
		if err != nil {
			k.log.Error("a move cannot go on", "instance", name, "reason", err)
			continue
		}
		if act == nil {
			continue
		}
		return k.step(next, func() (tee.Outcome, error) {
			k.adoptInstances()
			act()
			k.workloads.advanceSoon()
			return tee.Outcome{}, nil
		})
	}
	return tee.Outcome{}, nil
}

// nextStep is the step that an instance can take now; act is nil if there is none.
func (k *Keep) nextStep(name string, i instance) (next state, act func(), err error) {
	answer, answered := k.ledger[name]
	answered = answered && answer.from == i.Epoch
	switch i.Phase {
	case phaseLive:
		if answered && answer.refused == "" && answer.entry.Epoch > i.Epoch {
			delete(k.ledger, name)
			return k.fenced(name, answer.entry)
		}
		mv := k.moves[name]
		final := k.workloads.final(name)
		if mv == nil || !mv.source || final == nil || mv.received == nil {
			return state{}, nil, nil
		}
		if !bytes.Equal(final.Head, mv.received) {
			k.giveUp(name, errors.New("the target received something else than was sent"))
			return state{}, nil, nil
		}
		if final.Line > i.arrived() && !k.sealer.storedLine(name, final.Line) { // results in a spool would be lost with its disk
			return state{}, nil, nil
		}
		i.Phase = phaseFrozen
		i.Move = &passage{Attempt: mv.attempt, Peer: mv.peer, Receive: mv.receive, Final: mv.final, Head: final.Head, Line: final.Line, Nonce: mv.nonce}
		return k.withInstance(name, &i), func() {
			delete(k.moves, name)
			k.resend(name)
		}, nil
	case phaseFrozen:
		if !answered {
			return state{}, nil, nil
		}
		delete(k.ledger, name)
		if answer.refused == "" {
			delete(k.refusals, name)
		}
		return k.afterClaim(name, i, answer)
	case phaseHolding:
		if answered && answer.refused == "" && answer.entry.Epoch > i.Epoch {
			delete(k.ledger, name)
			return k.fenced(name, answer.entry)
		}
		if head := k.workloads.receivedHead(name); head != nil && !bytes.Equal(head, k.said[name]) {
			k.said[name] = head
			k.resend(name)
		}
	case phaseStopped:
		if !answered || answer.refused != "" {
			return state{}, nil, nil
		}
		delete(k.ledger, name)
		return k.withInstance(name, nil), func() {}, nil
	}
	return state{}, nil, nil
}

// askEntry asks what the ledger says of an instance, over a fresh nonce. use is
// called under the keep's lock, if there is an answer.
func (k *Keep) askEntry(name string, use func(workload.Entry)) {
	nonce := random(message.NonceSize)
	q := tee.Question{Kind: message.AskEntry, Body: cose.MustMarshal(message.AskedEntry{Instance: name, Nonce: nonce})}
	k.workloads.do("", tee.JobAsk, q, func(d tee.JobDone) {
		var s message.Signed
		if d.Error != "" || cose.Unmarshal(d.Body, &s) != nil {
			return
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		e, err := workload.VerifyEntry(k.roots.Fleet, s.Message)
		if err != nil || e.Instance != name || e.Tenant != k.st.Tenant || !e.Answers(nonce) {
			k.log.Warn("an answer that is not the ledger's", "instance", name, "err", err)
			return
		}
		use(e)
	})
}

// stillHeld asks whether what is here of an instance is of any use: the data owner
// may have let it go on elsewhere while this box was away, or the move that brings
// it here came to nothing.
func (k *Keep) stillHeld(name string) {
	k.askEntry(name, func(e workload.Entry) {
		i, ok := k.st.Instances[name]
		ours := ok && i.Phase == phaseHolding && e.Epoch == i.Epoch+1 && bytes.Equal(e.Attempt, i.Move.Attempt)
		if ok && (i.Phase == phaseLive || i.Phase == phaseHolding) && e.Epoch > i.Epoch && !ours {
			k.ledger[name] = heard{from: i.Epoch, entry: e}
			k.workloads.advanceSoon()
		}
	})
}

// fenced is the step that drops an instance which another holds by now.
func (k *Keep) fenced(name string, e workload.Entry) (next state, act func(), err error) {
	return k.withInstance(name, nil), func() {
		delete(k.moves, name)
		k.log.Error("the ledger gave the instance to another: what was here is dropped", "instance", name, "holder", e.Holder, "epoch", e.Epoch)
		k.workloads.do(name, tee.JobDrop, tee.DropLog{Instance: name}, nil)
	}, nil
}

// arrived is the number of the last result of the places before this one.
func (i instance) arrived() uint64 { return i.Line }

// afterClaim goes on from the ledger's answer to a frozen instance's claim.
func (k *Keep) afterClaim(name string, i instance, a heard) (next state, act func(), err error) {
	e := a.entry
	switch {
	case a.refused != "": // perhaps not yet: our verdict may be on its way
		if k.refusals[name]++; k.refusals[name] < maxRefusals {
			return state{}, nil, nil
		}
		// The target may not have it: claim the next epoch for ourselves.
		k.claim(name, workload.Entry{Holder: k.st.Gateway, Bundle: workload.ID(i.Manifest), Attempt: selfAttempt(i.Move.Attempt), Line: i.Move.Line}, i)
		return state{}, nil, nil
	case e.Epoch == i.Epoch+1 && e.Holder == i.Move.Peer && bytes.Equal(e.Attempt, i.Move.Attempt) && bytes.Equal(e.Head, i.Move.Head):
		to, err := cose.UnmarshalHPKEKey(i.Move.Receive)
		if err != nil {
			return state{}, nil, err
		}
		sealed, err := workload.SealTo(workload.PurposeRelease, releaseContext(i.Move), cose.MustMarshal(i.Move.Final), to)
		if err != nil {
			return state{}, nil, err
		}
		gone := instance{Phase: phaseReleased, Manifest: i.Manifest, Epoch: i.Epoch, Moves: i.Moves, Move: &passage{
			Attempt: i.Move.Attempt, Peer: i.Move.Peer, Head: i.Move.Head, Line: i.Move.Line, Sealed: sealed, Entry: a.msg,
		}}
		return k.withInstance(name, &gone), func() {
			k.log.Info("moved away", "instance", name, "to", e.Holder, "epoch", e.Epoch)
			k.resend(name)
			k.workloads.do(name, tee.JobDrop, tee.DropLog{Instance: name}, nil)
		}, nil
	case e.Epoch == i.Epoch+1 && e.Holder == k.st.Gateway && bytes.Equal(e.Attempt, selfAttempt(i.Move.Attempt)):
		k.refuse(name, i.Move.Peer, i.Move.Attempt, errors.New("the ledger did not take the move"))
		i.Phase, i.Epoch, i.Line, i.Move = phaseLive, e.Epoch, e.Line, nil
		return k.withInstance(name, &i), func() {
			k.log.Warn("a move did not come about; the instance goes on here", "instance", name, "epoch", e.Epoch)
		}, nil
	}
	if e.Epoch <= i.Epoch { // an entry of an earlier epoch proves nothing: this one was granted after it
		k.log.Error("the ledger has lost an entry that it gave", "instance", name, "epoch", e.Epoch, "here", i.Epoch)
		return state{}, nil, nil
	}
	// Someone else holds the instance by the owner's word. What is here is of no use
	// any more, and must not run.
	return k.fenced(name, e)
}

func selfAttempt(attempt []byte) []byte {
	out := bytes.Clone(attempt)
	for i := range out {
		out[i] ^= 0xff
	}
	return out
}

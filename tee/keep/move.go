package keep

import (
	"bytes"
	"crypto/hpke"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// How a move goes (docs/move.pml is its model):
//
//	source                                target
//	offer (verdict, manifest)          →
//	                                   ←  accept (verdict)
//	begin (bundle and session key)     →
//	                                      commits "holding"
//	                                   ←  ready
//	frames: state, while batches run   →  durable, opened as they come
//	stops; frames: the last delta,
//	under the snapshot key             →  durable, sealed
//	                                   ←  received (head)
//	commits "frozen", and only then asks the ledger:
//	compare-and-set (epoch → epoch+1, target, head)
//	on the ledger's signed answer to this claim: commits "released": its means to
//	run are destroyed, the snapshot key is in the state only as sealed to the target
//	release (snapshot key, entry)      →
//	                                      commits "live" at epoch+1; runs
//	                                   ←  done
//	forgets
//
// Before "frozen" a failure costs nothing: the source goes on. From then on it
// goes forward, whatever crashes; if the ledger will not have the target, the
// source claims the next epoch for itself. It never goes by what the ledger said
// to an earlier question. Everything is repeated until it is answered, and
// everything may come again.

const (
	movePatience = 60 * time.Second // before the freeze
	repeatAfter  = time.Second
	askAfter     = time.Minute // whether a live instance is still ours
	maxRefusals  = 5           // of a claim, until the source takes the instance back
)

// move is a move that the state does not know of yet: it is given up when
// anything goes wrong.
type move struct {
	attempt  []byte
	peer     string
	source   bool
	stage    int // of the source: the kind of message that it waits for
	receive  []byte
	session  tee.StateKey
	final    tee.StateKey
	began    time.Time
	sent     time.Time
	offer    workload.Control // target
	nonce    []byte           // the target's
	received []byte           // head that the target has, in its own word
	runner   *runner          // source: who sends
	empty    bool             // target: nothing of an earlier instance of this name is left
}

// startMove checks an operator's command to move an instance.
func (k *Keep) startMove(c message.Command, res *message.Result) (effect func(), err error) {
	name, to := c.Args["instance"], c.Args["to"]
	i, ok := k.st.Instances[name]
	switch {
	case !ok || i.Phase != phaseLive:
		return nil, fmt.Errorf("no instance %.32q runs here", name)
	case to == k.st.Gateway:
		return nil, fmt.Errorf("instance %s is on %s already", name, to)
	case k.moves[name] != nil:
		return nil, fmt.Errorf("instance %s is being moved already", name)
	case !attest.ValidName(to):
		return nil, fmt.Errorf("not a gateway's name: %.64q", to)
	}
	m, err := workload.PeekManifest(i.Manifest)
	if err != nil {
		return nil, err
	}
	if !m.Allows(to) {
		return nil, fmt.Errorf("the manifest does not allow %s", to)
	}
	if i.Moves >= m.Moves {
		return nil, fmt.Errorf("instance %s has moved %d times, as often as its manifest allows", name, i.Moves)
	}
	mv := &move{attempt: random(workload.AttemptSize), peer: to, source: true, stage: workload.KindAccept, began: time.Now()}
	res.Output = map[string]string{"attempt": fmt.Sprintf("%x", mv.attempt)}
	return func() {
		delete(k.gaveUp, name)
		k.moves[name] = mv
		k.resend(name)
	}, nil
}

// control fills in, signs and sends a message of a move.
func (k *Keep) control(kind int, name, to string, c workload.Control) {
	c.Kind, c.Instance, c.From, c.To, c.Verdict = kind, name, k.st.Gateway, to, k.verdictMsg
	msg, err := c.Sign(k.epochKey)
	if err != nil {
		k.log.Error("a message of a move could not be signed", "err", err)
		return
	}
	k.workloads.do("", tee.JobPeer, message.Routed{Peer: to, Data: msg}, nil)
}

func (k *Keep) refuse(name, to string, attempt []byte, reason error) {
	k.control(workload.KindRefuse, name, to, workload.Control{Attempt: attempt, Reason: cut(reason.Error(), 512)})
}

// resendAll repeats what waits for an answer, and gives up moves that took too
// long.
func (k *Keep) resendAll() {
	for _, name := range slices.Sorted(maps.Keys(k.moves)) {
		mv := k.moves[name]
		if time.Since(mv.began) > movePatience && time.Since(k.workloads.progressed(name)) > movePatience {
			k.giveUp(name, fmt.Errorf("%s did not answer in %s", mv.peer, movePatience))
		} else if mv.source && mv.stage == workload.KindReceived && !k.workloads.has(name, mv.runner) {
			k.giveUp(name, errors.New("the runner that sent the state ended"))
		} else if time.Since(mv.sent) >= repeatAfter {
			k.resend(name)
		}
	}
	for name, i := range k.st.Instances {
		if (i.Phase == phaseLive || i.Phase == phaseHolding) && time.Since(k.checked[name]) >= askAfter {
			k.checked[name] = time.Now()
			k.stillHeld(name)
		}
		if k.moves[name] == nil && i.Phase != phaseLive && time.Since(k.repeated[name]) >= repeatAfter {
			k.resend(name)
			k.workloads.advanceSoon()
		}
	}
}

// resend sends what an instance's move waits for an answer to.
func (k *Keep) resend(name string) {
	i := k.st.Instances[name]
	if k.verdictMsg == nil {
		return // nobody would believe us yet
	}
	if mv := k.moves[name]; mv != nil {
		mv.sent = time.Now()
		if mv.source {
			k.resendSource(name, i, mv)
		} else if mv.empty {
			k.control(workload.KindAccept, name, mv.peer, workload.Control{Attempt: mv.attempt, Nonce: mv.nonce})
		} else {
			k.clear(name, mv)
		}
		return
	}
	k.repeated[name] = time.Now()
	switch i.Phase {
	case phaseFrozen:
		k.claim(name, workload.Entry{
			Holder: i.Move.Peer, Bundle: workload.ID(i.Manifest), Attempt: i.Move.Attempt, Head: i.Move.Head, Line: i.Move.Line, Receive: receiveID(i.Move.Receive),
		}, i)
	case phaseReleased:
		k.control(workload.KindRelease, name, i.Move.Peer, workload.Control{Attempt: i.Move.Attempt, Sealed: i.Move.Sealed, Head: i.Move.Head, Entry: i.Move.Entry})
	case phaseHolding:
		if head := k.workloads.receivedHead(name); head != nil {
			k.control(workload.KindReceived, name, i.Move.Peer, workload.Control{Attempt: i.Move.Attempt, Head: head})
		} else {
			k.control(workload.KindReady, name, i.Move.Peer, workload.Control{Attempt: i.Move.Attempt})
		}
	case phaseStopped:
		k.claim(name, workload.Entry{Bundle: workload.ID(i.Manifest), Line: max(i.Line, k.sealer.line(name))}, i)
	}
}

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

func receiveID(key []byte) []byte {
	pub, err := cose.UnmarshalHPKEKey(key)
	if err != nil {
		return nil
	}
	return cose.HPKEKeyID(pub)
}

func (k *Keep) resendSource(name string, i instance, mv *move) {
	switch mv.stage {
	case workload.KindAccept:
		k.control(workload.KindOffer, name, mv.peer, workload.Control{
			Attempt: mv.attempt, Manifest: i.Manifest, Inputs: i.Inputs, Epoch: i.Epoch, Moves: i.Moves,
		})
	case workload.KindReady:
		to, err := cose.UnmarshalHPKEKey(mv.receive)
		var sealed []byte
		if err == nil {
			keys := cose.MustMarshal(workload.Keys{Bundle: i.BundleKey, Session: mv.session.Key})
			sealed, err = workload.SealTo(workload.PurposeMove, moveContext(mv.attempt, mv.session.ID, mv.nonce), keys, to)
		}
		if err != nil {
			k.giveUp(name, err)
			return
		}
		k.control(workload.KindBegin, name, mv.peer, workload.Control{Attempt: mv.attempt, Sealed: sealed, KeyID: mv.session.ID})
	}
}

func moveContext(attempt, id, nonce []byte) []byte {
	return cose.MustMarshal([][]byte{attempt, id, nonce})
}

// giveUp ends a move that the state does not know of: nothing has happened.
func (k *Keep) giveUp(name string, reason error) {
	mv := k.moves[name]
	if mv == nil || k.freezing(name) {
		return
	}
	delete(k.moves, name)
	k.log.Warn("a move was given up", "instance", name, "peer", mv.peer, "reason", reason)
	if mv.source {
		k.gaveUp[name] = fmt.Sprintf("move to %s given up: %s", mv.peer, cut(reason.Error(), 200))
	}
	if mv.source {
		k.workloads.setRoute(name, route{})
		k.refuse(name, mv.peer, mv.attempt, reason)
		k.workloads.tell(name, tee.KindResume, tee.Resume{Epoch: k.st.Instances[name].Epoch})
	}
}

// freezing reports whether the step that freezes an instance waits for its Commit:
// the move cannot be given up any more.
func (k *Keep) freezing(name string) bool {
	return k.pending != nil && k.pending.next.Instances[name].Phase == phaseFrozen && k.st.Instances[name].Phase == phaseLive
}

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
			k.workloads.tell(name, tee.KindResume, tee.Resume{Epoch: e.Epoch})
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

func releaseContext(p *passage) []byte {
	return cose.MustMarshal([][]byte{p.Attempt, p.Head, p.Nonce})
}

// peer takes a message from another keep, or from the cloud's services.
func (k *Keep) peer(r tee.Peer) (tee.Outcome, error) {
	if k.phase != tee.PhaseEnrolled {
		return tee.Outcome{}, fmt.Errorf("the keep is %s", k.phase)
	}
	e, err := workload.Unwrap(r.Data)
	if err != nil {
		return tee.Outcome{}, err
	}
	if e.Kind == workload.KindRequest {
		return tee.Outcome{}, k.request(e)
	}
	c, v, err := k.verifyControl(e)
	if err != nil {
		return tee.Outcome{}, err
	}
	switch e.Kind {
	case workload.KindOffer:
		return tee.Outcome{}, k.offered(c)
	case workload.KindAccept:
		return tee.Outcome{}, k.accepted(c, v)
	case workload.KindBegin:
		return k.begun(c)
	case workload.KindReady:
		return tee.Outcome{}, k.ready(c)
	case workload.KindReceived:
		return tee.Outcome{}, k.received(c)
	case workload.KindRelease:
		return k.released(c)
	case workload.KindDone:
		return k.done(c)
	case workload.KindRefuse:
		return k.refused(c)
	}
	return tee.Outcome{}, fmt.Errorf("a routed message of unknown kind %d", e.Kind)
}

// verifyControl checks that a message is of a keep of this tenant that has a good
// verdict, and for this one.
func (k *Keep) verifyControl(e workload.Envelope) (workload.Control, attest.Verdict, error) {
	msg, err := workload.Body[[]byte](e)
	if err != nil {
		return workload.Control{}, attest.Verdict{}, err
	}
	c, err := workload.PeekControl(e.Kind, msg)
	if err != nil {
		return c, attest.Verdict{}, err
	}
	v, err := attest.VerifyVerdict(k.roots.Verifier, c.Verdict)
	if err != nil {
		return c, v, err
	}
	now, err := k.cloudTime()
	if err != nil {
		return c, v, err
	}
	if err := v.Usable(k.st.Tenant+"/"+c.From, k.st.Tenant, now); err != nil {
		return c, v, err
	}
	pub, err := cose.UnmarshalKey(v.Cnf.Key)
	if err != nil {
		return c, v, err
	}
	if c, err = workload.VerifyControl(pub, e.Kind, msg); err != nil {
		return c, v, err
	}
	if c.To != k.st.Gateway || c.From == k.st.Gateway {
		return c, v, fmt.Errorf("the message is for %s", c.To)
	}
	return c, v, nil
}

// ofMove returns the move that a message to the source is about.
func (k *Keep) ofMove(c workload.Control, stage int) (*move, error) {
	mv := k.moves[c.Instance]
	if mv == nil || !bytes.Equal(mv.attempt, c.Attempt) || mv.peer != c.From || !mv.source {
		i, ok := k.st.Instances[c.Instance]
		if ok && i.Move != nil && bytes.Equal(i.Move.Attempt, c.Attempt) {
			return nil, nil // further on already
		}
		err := errors.New("no such move is under way")
		if c.Kind != workload.KindAccept { // it waits with what it has of the instance: let it forget
			k.refuse(c.Instance, c.From, c.Attempt, err)
		}
		return nil, err
	}
	if mv.stage != stage {
		return nil, nil // it came again
	}
	return mv, nil
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

// accepted is the source's look at the target.
func (k *Keep) accepted(c workload.Control, v attest.Verdict) error {
	mv, err := k.ofMove(c, workload.KindAccept)
	if err != nil || mv == nil {
		return err
	}
	m, err := workload.PeekManifest(k.st.Instances[c.Instance].Manifest)
	if err == nil {
		err = m.Assured(v.Assurance)
	}
	if err == nil {
		_, err = cose.UnmarshalHPKEKey(v.Keys[attest.PurposeReceive])
	}
	if err != nil {
		k.giveUp(c.Instance, err)
		return err
	}
	mv.receive, mv.nonce, mv.stage = v.Keys[attest.PurposeReceive], c.Nonce, workload.KindReady
	mv.session, mv.final = newStateKey(), newStateKey()
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

// ready lets the source's runner send.
func (k *Keep) ready(c workload.Control) error {
	mv, err := k.ofMove(c, workload.KindReady)
	if err != nil || mv == nil {
		return err
	}
	mv.stage, mv.began = workload.KindReceived, time.Now()
	k.workloads.setRoute(c.Instance, route{mv.peer, mv.attempt})
	mv.runner = k.workloads.tell(c.Instance, tee.KindSend, tee.Send{Attempt: mv.attempt, Session: mv.session, Final: mv.final})
	return nil
}

func (k *Keep) received(c workload.Control) error {
	mv, err := k.ofMove(c, workload.KindReceived)
	if err != nil || mv == nil {
		return err
	}
	mv.received = c.Head
	k.workloads.advanceSoon()
	return nil
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

// done lets the source forget.
func (k *Keep) done(c workload.Control) (tee.Outcome, error) {
	i, ok := k.st.Instances[c.Instance]
	if !ok || i.Phase != phaseReleased || !bytes.Equal(i.Move.Attempt, c.Attempt) || i.Move.Peer != c.From {
		return tee.Outcome{}, nil // long ago
	}
	return k.step(k.withInstance(c.Instance, nil), func() (tee.Outcome, error) {
		k.adoptInstances()
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

// The runners' part of a move.

// relay passes a frame, or word of how many came, on to the other runner.
func (w *workloads) relay(name string, kind int, n uint64, data []byte) error {
	w.mu.Lock()
	to := w.routes[name]
	w.mu.Unlock()
	if to.peer == "" {
		return nil // the move is over
	}
	msg := workload.Wrap(kind, workload.Frame{Attempt: to.attempt, N: n, Data: data})
	j := &job{InstanceJob: tee.InstanceJob{Instance: name, Job: tee.Job{Kind: tee.JobPeer, Body: cose.MustMarshal(message.Routed{Peer: to.peer, Data: msg})}}}
	if w.enqueue(j) != nil {
		w.k.log.Debug("a frame found no room: it is sent again", "instance", name)
	}
	return nil
}

// frame hands a frame from another gateway to the runner it is for, without the
// keep's lock. What finds no room is sent again.
func (w *workloads) frame(e workload.Envelope) error {
	f, err := workload.Body[workload.Frame](e)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, to := range w.routes {
		st := w.run[name]
		if !bytes.Equal(to.attempt, f.Attempt) || st == nil || st.runner == nil || st.runner.size+len(f.Data) > maxOut {
			continue
		}
		if e.Kind == workload.KindFrame {
			w.send(st.runner, tee.KindFrame, tee.Frame{N: f.N, Data: f.Data}, len(f.Data)+64)
		} else {
			if f.N > st.reached {
				st.reached, st.progress = f.N, time.Now()
			}
			w.send(st.runner, tee.KindFrameAck, tee.FrameAck{N: f.N}, 64)
		}
		return nil
	}
	return errors.New("a frame of no move that is under way")
}

// route is where an instance's frames go.
type route struct {
	peer    string
	attempt []byte
}

// setRoute starts, or without a peer ends, the passing on of frames of an instance
// that moves away.
func (w *workloads) setRoute(name string, to route) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.routes, name)
	if st := w.run[name]; st != nil && to.peer != "" {
		st.final, st.reached = nil, 0
		w.routes[name] = to
	}
}

// tell sends an instance's runner a message, and returns the runner; nil if there
// is none.
func (w *workloads) tell(name string, kind int, body any) *runner {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.run[name]
	if st == nil || st.runner == nil {
		return nil
	}
	w.send(st.runner, kind, body, 4096)
	return st.runner
}

// has reports whether an instance still has this runner.
func (w *workloads) has(name string, r *runner) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.run[name]
	return r != nil && st != nil && st.runner == r
}

// committed notes the newest state of an instance that moved here, before its
// runner says so: nothing older is to be gone on from.
func (w *workloads) committed(name string, head []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		st.newest = head
	}
}

// progressed is when the other side of a move last took something.
func (w *workloads) progressed(name string) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		return st.progress
	}
	return time.Time{}
}

func (w *workloads) final(name string) *tee.Final {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		return st.final
	}
	return nil
}

func (w *workloads) receivedHead(name string) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		return st.received
	}
	return nil
}

// forget drops what is known of an earlier instance of this name, and its runner.
func (w *workloads) forget(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		w.release(st)
		delete(w.run, name)
	}
}

func (w *workloads) advanceSoon() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wantAdvance()
}

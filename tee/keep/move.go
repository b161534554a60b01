package keep

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
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
		k.workloads.tell(name, tee.KindResume, tee.Resume{})
	}
}

// freezing reports whether the step that freezes an instance waits for its Commit:
// the move cannot be given up any more.
func (k *Keep) freezing(name string) bool {
	return k.pending != nil && k.pending.next.Instances[name].Phase == phaseFrozen && k.st.Instances[name].Phase == phaseLive
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

package keep

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// Phases of an instance at this keep. Every change of phase is an irreversible
// step.
const (
	phaseLive     = 1 + iota // it runs here
	phaseFrozen              // it moves away; the ledger is being asked, and nobody runs it
	phaseReleased            // it has moved away; what is left is the message that lets the target open it
	phaseHolding             // it moves here; its state comes in, and cannot be opened yet
	phaseStopped             // stopped; the ledger has yet to be told
)

const (
	maxInstances = 16
	maxManifest  = 16 << 10 // bytes, signed: all of them fit into one state
	logSuffix    = "-log"
)

// instance is what the state holds of a workload instance.
type instance struct {
	Phase     int               `cbor:"1,keyasint"`
	Manifest  []byte            `cbor:"2,keyasint"`
	BundleKey []byte            `cbor:"3,keyasint,omitempty"`
	Epoch     uint64            `cbor:"4,keyasint"`
	Keys      []tee.StateKey    `cbor:"5,keyasint,omitempty"`
	Inputs    []workload.Source `cbor:"6,keyasint,omitempty"`
	Moves     uint64            `cbor:"7,keyasint"`
	Move      *passage          `cbor:"8,keyasint,omitempty"`
	// Starts are where streams of this gateway stood when the instance was deployed.
	Starts map[string]sealing.Before `cbor:"9,keyasint,omitempty"`
	// Recover is the head of the checkpoint that it goes on from, by the data owner's
	// word.
	Recover []byte `cbor:"10,keyasint,omitempty"`
	Line    uint64 `cbor:"11,keyasint,omitempty"` // the last result of the epochs before
}

// passage is a move that the state knows of. In phaseLive it is the one that
// brought the instance here: the source may ask again whether it arrived.
type passage struct {
	Attempt []byte       `cbor:"1,keyasint"`
	Peer    string       `cbor:"2,keyasint"`           // the other gateway
	Receive []byte       `cbor:"3,keyasint,omitempty"` // its receiving key (source)
	Final   tee.StateKey `cbor:"4,keyasint"`           // the snapshot key (source, until released)
	Head    []byte       `cbor:"5,keyasint,omitempty"` // hash of all that was sent
	Line    uint64       `cbor:"6,keyasint"`
	Sealed  []byte       `cbor:"7,keyasint,omitempty"` // the snapshot key, sealed to the target
	Entry   []byte       `cbor:"8,keyasint,omitempty"` // the ledger's answer
	Nonce   []byte       `cbor:"9,keyasint,omitempty"` // the target's
}

func (i instance) runs() bool { return i.Phase == phaseLive || i.Phase == phaseHolding }

func (i instance) reads(gateway, stream string) bool {
	return slices.Contains(i.Inputs, workload.Source{Gateway: gateway, Stream: stream})
}

func (k *Keep) gatewayName() string {
	name, _ := k.gateway.Load().(string)
	return name
}

// withInstance returns the state with one instance changed, or without it.
func (k *Keep) withInstance(name string, i *instance) state {
	next := k.st
	next.Instances = maps.Clone(next.Instances)
	if next.Instances == nil {
		next.Instances = map[string]instance{}
	}
	delete(next.Instances, name)
	if i != nil {
		next.Instances[name] = *i
		for _, s := range []string{name, name + logSuffix} {
			if !slices.Contains(next.Streams, s) {
				next.Streams = append(slices.Clone(next.Streams), s)
			}
		}
	}
	return next
}

// adoptInstances makes runners follow the committed state.
func (k *Keep) adoptInstances() {
	k.adoptStreams()
	k.workloads.set(k.st.Instances)
}

// adoptStreams makes the streams of the instances: an epoch begins with them.
func (k *Keep) adoptStreams() {
	if k.st.Tenant != "" {
		k.gateway.Store(k.st.Gateway)
	}
	for name := range k.st.Instances {
		k.sealer.addStream(name, func(c sealing.Cursor) { k.workloads.acked(name, c) })
		k.sealer.addStream(name+logSuffix, func(sealing.Cursor) {})
	}
}

func newStateKey() tee.StateKey { return tee.StateKey{ID: random(8), Key: random(workload.KeySize)} }

// deploy checks an instance that an operator wants to run here. Nothing is
// decrypted before it is clear that it may.
func (k *Keep) deploy(c message.Command, item message.Item, next *state) (effect func(), err error) {
	var d workload.Deploy
	if err := cose.Unmarshal(c.Body, &d); err != nil {
		return nil, fmt.Errorf("deploy: %w", err)
	}
	if d.Instance != c.Args["instance"] || !workload.ValidInstance(d.Instance) {
		return nil, errors.New("deploy: the instance's name is missing or not allowed")
	}
	m, err := workload.VerifyManifest(k.roots.Operator, d.Manifest)
	if err != nil {
		return nil, err
	}
	if err := k.mayRun(d.Instance, len(d.Manifest), m, d.Inputs); err != nil {
		return nil, err
	}
	if len(d.Inputs) != len(m.Input.Streams) {
		return nil, errors.New("deploy: the inputs are not the manifest's streams")
	}
	e, err := workload.VerifyEntry(k.roots.Fleet, item.Entry)
	if err != nil {
		return nil, err
	}
	if e.Instance != d.Instance || e.Tenant != k.st.Tenant || !bytes.Equal(e.Inputs, workload.InputsHash(d.Inputs)) || e.Holder != k.st.Gateway || !bytes.Equal(e.Bundle, workload.ID(d.Manifest)) || !e.Answers(item.Command) {
		return nil, errors.New("deploy: the ledger's entry is not of this deployment: someone else may run it")
	}
	key, err := k.receiveKey(k.st)
	if err != nil {
		return nil, err
	}
	bundleKey, err := workload.OpenFrom(workload.PurposeBundle, workload.DeployContext(k.subject(), d.Instance, d.Manifest), d.Key, key)
	if err != nil {
		return nil, err
	}
	if len(bundleKey) != workload.KeySize {
		return nil, errors.New("deploy: the bundle key has the wrong size")
	}
	starts := map[string]sealing.Before{}
	for _, in := range d.Inputs {
		if in.Gateway == k.st.Gateway {
			starts[in.Stream] = k.sealer.position(in.Stream)
		}
	}
	*next = k.withInstance(d.Instance, &instance{
		Phase: phaseLive, Manifest: d.Manifest, BundleKey: bundleKey, Epoch: e.Epoch, Keys: []tee.StateKey{newStateKey()}, Inputs: d.Inputs, Starts: starts, Line: e.Line, Recover: recoverFrom(e),
	})
	return func() {
		delete(k.moves, d.Instance) // offered before it was deployed here
		k.workloads.forget(d.Instance)
		k.workloads.do(d.Instance, tee.JobDrop, tee.DropLog{Instance: d.Instance}, nil) // of an earlier one of that name
		k.adoptInstances()
	}, nil
}

// recoverFrom is the head of the checkpoint that the data owner's word names.
func recoverFrom(e workload.Entry) []byte {
	if e.Owner {
		return e.Head
	}
	return nil
}

// mayRun says why an instance may not run here, or nil.
func (k *Keep) mayRun(name string, manifestSize int, m workload.Manifest, inputs []workload.Source) error {
	old, known := k.st.Instances[name]
	switch {
	case manifestSize > maxManifest:
		return fmt.Errorf("the manifest has %d bytes, at most %d are kept", manifestSize, maxManifest)
	case k.cfg.RunnerUID == NoRunners:
		return errors.New("this gateway runs no workloads: its keep has no [runners] configured")
	case known && old.Phase != phaseReleased && old.Phase != phaseHolding:
		return fmt.Errorf("instance %s is here already", name)
	case !known && len(k.st.Instances) >= maxInstances:
		return fmt.Errorf("%d instances are here already", maxInstances)
	case k.isSource(name) || k.isSource(name+logSuffix):
		return fmt.Errorf("a source of this gateway is named %s: the instance needs another name", name)
	case !m.Allows(k.st.Gateway):
		return fmt.Errorf("the manifest does not allow %s", k.st.Gateway)
	}
	for _, in := range inputs {
		if in.Gateway == k.st.Gateway && !k.isSource(in.Stream) {
			return fmt.Errorf("this gateway has no source %q", in.Stream)
		}
	}
	v, err := k.ownVerdict()
	if err != nil {
		return err
	}
	return m.Assured(v.Assurance)
}

func (k *Keep) isSource(name string) bool {
	return slices.ContainsFunc(k.cfg.Sources, func(s SourceConfig) bool { return s.Name == name })
}

// ownVerdict is the newest verdict about this keep, if it is good now.
func (k *Keep) ownVerdict() (attest.Verdict, error) {
	now, err := k.cloudTime()
	if err != nil {
		return attest.Verdict{}, err
	}
	if err := k.verdict.Usable(k.subject(), k.st.Tenant, now); err != nil {
		return attest.Verdict{}, fmt.Errorf("this keep has no good verdict: %w", err)
	}
	return k.verdict, nil
}

// cloudTime is the fleet's clock: its word over our nonce, and the time since.
func (k *Keep) cloudTime() (time.Time, error) {
	if k.toldAt.IsZero() {
		return time.Time{}, errors.New("the cloud has not told the time yet")
	}
	return time.Unix(k.told, 0).Add(time.Since(k.toldAt)), nil
}

// learn takes what every delivery tells: the time, and perhaps a verdict about
// this keep.
func (k *Keep) learn(item message.Item) {
	k.told, k.toldAt = item.Time, time.Now()
	if item.Verdict == nil {
		return
	}
	v, err := attest.VerifyVerdict(k.roots.Verifier, item.Verdict)
	if err == nil && bytes.Equal(v.Cnf.Key, cose.MarshalKey(&k.epochKey.PublicKey)) {
		k.verdict, k.verdictMsg = v, item.Verdict
	}
}

// stop makes an instance end here: its keys are gone with the step.
func (k *Keep) stop(c message.Command, next *state) (effect func(), err error) {
	name := c.Args["instance"]
	i, ok := k.st.Instances[name]
	switch {
	case !ok:
		return nil, fmt.Errorf("no instance %.32q is here", name)
	case i.Phase == phaseHolding:
		// The source may have asked the ledger already: dropped here, it would be lost.
		return nil, fmt.Errorf("instance %s is moving here from %s, which alone can call that off", name, i.Move.Peer)
	case i.Phase != phaseLive:
		return nil, fmt.Errorf("instance %s moves away and cannot be stopped now", name)
	default:
		*next = k.withInstance(name, &instance{Phase: phaseStopped, Manifest: i.Manifest, Epoch: i.Epoch, Line: i.Line, Inputs: i.Inputs})
	}
	return func() {
		delete(k.moves, name)
		k.adoptInstances()
		k.workloads.do(name, tee.JobDrop, tee.DropLog{Instance: name}, nil)
		k.resend(name)
	}, nil
}

// wantKey gets a runner the key of a stream that it reads: from memory when it is
// of this epoch, else from the key broker, to whom this keep's verdict speaks.
func (w *workloads) wantKey(r *runner, name string, spec instance, id uint64, want tee.WantKey) error {
	if !spec.reads(want.Gateway, want.Stream) || len(want.Epoch) != len(sealing.Epoch{}) {
		return fmt.Errorf("%w: the key of a stream that is not its own", errRunner)
	}
	if want.Gateway == w.k.gatewayName() {
		if key, ok := w.k.sealer.streamKey(want.Stream, want.Epoch); ok {
			w.answer(r, id, tee.GotKey{Key: key, EpochKey: cose.MarshalKey(&w.k.epochKey.PublicKey)}, nil)
			return nil
		}
	}
	w.mu.Lock()
	r.keys++
	n := r.keys
	w.mu.Unlock()
	if n > maxKeys {
		return fmt.Errorf("%w: it waits for %d keys", errRunner, n)
	}
	answer := func(v any, err error) {
		w.answer(r, id, v, err)
		w.mu.Lock()
		r.keys--
		w.mu.Unlock()
	}
	go func() { // takes the keep's lock, which may be held for as long as the TPM takes
		ask, err := w.k.askKey(want)
		if err == nil {
			err = w.enqueue(&job{InstanceJob: tee.InstanceJob{Instance: name, Job: tee.Job{Kind: tee.JobAsk, Body: cose.MustMarshal(ask)}}, done: func(d tee.JobDone) {
				if d.Error != "" {
					answer(nil, errors.New(d.Error))
					return
				}
				answer(w.k.openKey(want, d.Body))
			}})
		}
		if err != nil {
			answer(nil, err)
		}
	}()
	return nil
}

// answer answers a runner's job.
func (w *workloads) answer(r *runner, id uint64, v any, err error) {
	d := tee.JobDone{ID: id, Body: cose.Raw{0xf6}}
	if err != nil {
		d.Error = cut(err.Error(), 1024)
	} else {
		d.Body = cose.MustMarshal(v)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.send(r, tee.KindJobDone, d, len(d.Body)+64)
}

func (k *Keep) askKey(want tee.WantKey) (tee.Question, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, err := k.ownVerdict(); err != nil {
		return tee.Question{}, err
	}
	return tee.Question{Kind: message.AskKey, Body: cose.MustMarshal(message.AskedKey{
		Gateway: want.Gateway, Stream: want.Stream, Epoch: want.Epoch, Verdict: k.verdictMsg,
	})}, nil
}

// openKey opens what the key broker released, and checks who vouches for the
// producer.
func (k *Keep) openKey(want tee.WantKey, body []byte) (tee.GotKey, error) {
	var rel message.Release
	if err := cose.Unmarshal(body, &rel); err != nil {
		return tee.GotKey{}, fmt.Errorf("key release: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	key, err := k.receiveKey(k.st)
	if err != nil {
		return tee.GotKey{}, err
	}
	h, secret, err := sealing.OpenStreamKey(k.roots.Broker, sealing.TypRelease, rel.Message, key)
	if err != nil {
		return tee.GotKey{}, err
	}
	subject := k.st.Tenant + "/" + want.Gateway
	if h.Subject != subject || h.Stream != want.Stream || !bytes.Equal(h.Epoch[:], want.Epoch) {
		return tee.GotKey{}, errors.New("the key broker released the key of another stream")
	}
	v, err := attest.VerifyVerdict(k.roots.Verifier, rel.Verdict)
	if err != nil {
		return tee.GotKey{}, err
	}
	pub, err := cose.UnmarshalKey(rel.EpochKey)
	if err != nil {
		return tee.GotKey{}, err
	}
	if _, err = v.DataKey(cose.Thumbprint(pub)); err != nil {
		return tee.GotKey{}, err
	}
	if v.Subject != subject || !v.Affirming() {
		return tee.GotKey{}, fmt.Errorf("no affirming verdict on %s vouches for the key that signs %s", subject, want.Stream)
	}
	return tee.GotKey{Key: secret, EpochKey: rel.EpochKey}, nil
}

// workloadClaims are what the evidence says of workloads.
func (k *Keep) workloadClaims() []attest.Workload {
	var out []attest.Workload
	k.workloads.mu.Lock()
	defer k.workloads.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(k.st.Instances)) {
		i := k.st.Instances[name]
		m, err := workload.PeekManifest(i.Manifest)
		if err != nil {
			continue
		}
		c := attest.Workload{
			Instance: name, Bundle: workload.ID(i.Manifest), Module: m.Module, Epoch: i.Epoch, Phase: phaseNames[i.Phase],
		}
		for _, f := range m.Models {
			c.Models = append(c.Models, f.Hash)
		}
		if st := k.workloads.run[name]; st != nil {
			c.Running, c.Protection, c.Rewritten = st.report.Running, st.report.Protection, st.report.Module
			c.Failures, c.Reason = st.failures+st.report.Failures, cmp.Or(st.report.Reason, k.gaveUp[name])
			c.Rewriter, c.Compiler = cut(st.hello.Rewriter, 32), st.hello.Compiler
		}
		out = append(out, c)
	}
	return out
}

var phaseNames = map[int]string{
	phaseLive: "live", phaseFrozen: "frozen", phaseReleased: "moved away", phaseHolding: "moving here", phaseStopped: "stopped",
}

// Repeat repeats until ctx ends what has not been answered: other gateways and the
// ledger may be away for long.
func (k *Keep) Repeat(ctx context.Context) {
	t := time.NewTicker(500 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		k.mu.Lock()
		if k.phase == tee.PhaseEnrolled {
			k.resendAll()
		}
		k.mu.Unlock()
	}
}

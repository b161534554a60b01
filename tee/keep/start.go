package keep

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/mlkem"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/tpm"
)

// defaultInterval is how often a keep asks to be asked, in seconds.
const defaultInterval = 30

func (k *Keep) start(r tee.Start) (tee.Outcome, error) {
	if k.phase != tee.PhaseWaiting {
		return k.restart(r)
	}
	// An agent may have died between an earlier Start and its Commit.
	k.pending = nil
	if k.ident.ak != nil {
		k.ident.ak.Close()
		k.ident = identity{}
	}
	if len(r.State) == 0 {
		return k.startNew()
	}
	env, err := parseEnvelope(r.State)
	if err != nil {
		return tee.Outcome{}, err
	}
	if k.cfg.Reset {
		k.log.Warn("giving up the old identity, as configured")
		return k.startNew()
	}
	// A state whose NV was never defined is of a keep that was killed while it was
	// new: nothing was promised under it.
	if !k.dev.HasNV() {
		return k.startNew()
	}
	return k.startWith(env, r)
}

// restart answers a Start of an agent that was restarted while the keep ran on.
func (k *Keep) restart(r tee.Start) (tee.Outcome, error) {
	k.workloads.reset()
	sum := sha256.Sum256(r.State)
	t := k.pending
	if t != nil && bytes.Equal(sum[:], t.hash) {
		return k.commit(tee.Commit{State: sum[:]})
	}
	fresh := t != nil && t.first != nil // no state of this keep was ever durable
	if k.phase != tee.PhaseLocked && !fresh && !bytes.Equal(r.State, cose.MustMarshal(k.ident.env)) {
		return tee.Outcome{}, errors.New("the state is not the one this keep runs with: restart edgekeep-keep, and give it the newest state")
	}
	if t == nil && k.phase == tee.PhaseNew && len(k.st.Key) == 0 {
		return k.openEpoch(k.st) // the TPM failed after the first Commit
	}
	if t == nil {
		return tee.Outcome{Pull: true}, nil
	}
	return tee.Outcome{Commit: t.blob, Fresh: fresh}, nil // perhaps never durable, and certainly not done: offer it again
}

// startNew makes a new identity: storage root, AK, keys. It becomes real with
// its first Commit.
func (k *Keep) startNew() (tee.Outcome, error) {
	if k.dev.HasNV() && !k.cfg.Reset {
		return tee.Outcome{}, errors.New("the TPM knows a keep, but its state is missing: restore the agent's state file; " +
			"if it is lost, start edgekeep-keep once with --reset-identity and have the gateway approved again")
	}
	id := identity{root: random(32)}
	var err error
	if id.env.Root, err = k.dev.Seal(id.root, k.cfg.PCRs); err != nil {
		return tee.Outcome{}, fmt.Errorf("storage root: %w", err)
	}
	akAuth := tpm.AuthValue([32]byte(random(32)))
	if id.env.AKAuth, err = k.dev.Seal(akAuth, nil); err != nil {
		return tee.Outcome{}, fmt.Errorf("attestation key: %w", err)
	}
	if id.env.AK, err = k.dev.NewAK(akAuth); err != nil {
		return tee.Outcome{}, err
	}
	if id.ak, err = k.dev.LoadAK(id.env.AK, akAuth); err != nil {
		return tee.Outcome{}, err
	}
	k.ident = id
	st, err := k.newState()
	if err != nil {
		return tee.Outcome{}, err
	}
	k.phase, k.reason = tee.PhaseNew, "its first state is not durable yet"
	out, err := k.step(st, func() (tee.Outcome, error) { return k.openEpoch(k.st) })
	out.Fresh = true
	return out, err
}

func (k *Keep) newState() (state, error) {
	st := state{Interval: defaultInterval, Certified: map[string]tpm.Signed{}, Ends: map[string]end{}}
	pq, err := mlkem.GenerateKey768()
	if err != nil {
		return st, fmt.Errorf("receiving key: %w", err)
	}
	st.Seed = pq.Bytes()
	if st.TLS, err = k.certifiedKey(&st, attest.PurposeTLS, tpm.Signing); err != nil {
		return st, err
	}
	if st.Receive, err = k.certifiedKey(&st, attest.PurposeReceive, tpm.Agreement); err != nil {
		return st, err
	}
	return st, k.deriveKeys(&st)
}

func (k *Keep) certifiedKey(st *state, purpose string, use tpm.Use) (tpm.Blob, error) {
	auth := k.ident.auth(purpose)
	blob, err := k.dev.NewKey(use, k.cfg.PCRs, auth)
	if err != nil {
		return blob, fmt.Errorf("%s key: %w", purpose, err)
	}
	key, err := k.dev.Key(blob, k.cfg.PCRs, auth)
	if err != nil {
		return blob, fmt.Errorf("%s key: %w", purpose, err)
	}
	st.Certified[purpose], err = k.ident.ak.Certify(key, attest.KeyQualifier(purpose))
	if err != nil {
		return blob, fmt.Errorf("%s key: %w", purpose, err)
	}
	return blob, nil
}

// startWith opens the state of an earlier keep and begins a new epoch.
func (k *Keep) startWith(env envelope, r tee.Start) (tee.Outcome, error) {
	id := identity{env: env}
	akAuth, err := k.dev.Unseal(env.AKAuth, nil)
	if err != nil {
		return tee.Outcome{}, fmt.Errorf("attestation key: %w", err)
	}
	if id.ak, err = k.dev.LoadAK(env.AK, akAuth); err != nil {
		return tee.Outcome{}, err
	}
	k.ident = id
	id.root, err = k.dev.Unseal(env.Root, k.cfg.PCRs)
	if errors.Is(err, tpm.ErrPolicy) {
		k.phase = tee.PhaseLocked
		k.reason = fmt.Sprintf("PCRs %v are not what they were when this keep was set up: something else was booted. "+
			"It can attest, so the verdict tells which PCR differs; nothing opens until the machine is back as it was", k.cfg.PCRs)
		k.log.Error("locked", "reason", k.reason)
		return tee.Outcome{}, nil
	}
	if err == nil {
		err = k.openState(&id)
	}
	if err != nil {
		id.ak.Close()
		k.ident = identity{}
		return tee.Outcome{}, err
	}
	st := k.st
	k.adopt(&st, r)
	return k.openEpoch(st)
}

func (k *Keep) openState(id *identity) error {
	var err error
	if id.nv, err = k.dev.OpenNV(k.cfg.PCRs, id.auth("nv")); err != nil {
		return err
	}
	g, err := id.nv.Read(id.env.Slot)
	if err != nil {
		return err
	}
	st, err := id.open(g)
	if err != nil {
		return err
	}
	k.ident = *id
	if err := k.deriveKeys(&st); err != nil {
		return err
	}
	if st.Tenant != "" {
		roots, err := attest.ParseRoots(st.Roots)
		if err != nil {
			return err
		}
		if !bytes.Equal(roots.Digest, k.cfg.RootsDigest) {
			return errors.New("the configured trust roots are not those this gateway enrolled under: put the old digest back, or reset the identity and enrol again")
		}
		k.roots = roots
	}
	k.st = st
	if st.Tenant != "" {
		k.adoptStreams()
	}
	return nil
}

// adopt takes over from the spool where streams ended. A checkpoint counts only
// if a key this state knows has signed it; an agent that shows an old one, or
// none, makes a gap that the cloud sees.
func (k *Keep) adopt(st *state, r tee.Start) {
	known := map[string]*ecdsa.PublicKey{}
	for _, raw := range append([]cose.Raw{st.Key}, st.Prior...) {
		if pub, err := cose.UnmarshalKey(raw); err == nil {
			known[string(cose.Thumbprint(pub))] = pub
		}
	}
	st.Ends = maps.Clone(st.Ends)
	keyInUse := false
	for _, msg := range r.Checkpoints {
		e, signer, err := k.readEnd(msg, known)
		if err != nil {
			k.log.Warn("a checkpoint from the spool was not taken over", "reason", err)
			continue
		}
		if !slices.Contains(st.Streams, e.stream) {
			continue // no stream of the epoch before: nothing of it is under way
		}
		if e.covers(st.Ends[e.stream]) {
			st.Ends[e.stream] = e.end
		}
		if current, err := cose.UnmarshalKey(st.Key); err == nil && bytes.Equal(signer, cose.Thumbprint(current)) {
			keyInUse = true
		}
	}
	if keyInUse {
		st.Prior = append(slices.Clone(st.Prior), st.Key)
	}
	if n := len(st.Prior); n > maxPrior {
		k.log.Error("too many epochs with data under way: the oldest data will not be accepted", "epochs", n)
		st.Prior = st.Prior[n-maxPrior:]
	}
	k.tails = maps.Clone(st.Ends)
	for _, w := range r.Watermarks {
		if _, err := k.noteWatermark(w); err != nil {
			k.log.Warn("a watermark from the spool was not taken over", "reason", err)
		}
	}
	if len(k.tails) == 0 {
		st.Prior = nil
	}
}

const maxPrior = 256

type namedEnd struct {
	end
	stream string
}

func (k *Keep) readEnd(msg []byte, known map[string]*ecdsa.PublicKey) (namedEnd, []byte, error) {
	_, signer, err := sealing.PeekCheckpoint(msg)
	if err != nil {
		return namedEnd{}, nil, err
	}
	pub, ok := known[string(signer)]
	if !ok {
		return namedEnd{}, nil, errors.New("it is signed by no key of this keep whose data is under way")
	}
	cp, err := sealing.VerifyCheckpoint(pub, sealing.TypCheckpoint, msg)
	if err != nil {
		return namedEnd{}, nil, err
	}
	if cp.Subject != k.subject() {
		return namedEnd{}, nil, fmt.Errorf("it is of %s", cp.Subject)
	}
	e := end{Before: sealing.Before{Epoch: cp.Epoch, Count: cp.Seq + 1, Head: cp.Head}}
	if cp.Cursor != nil {
		e.Cursor = *cp.Cursor
	}
	return namedEnd{end: e, stream: cp.Stream}, signer, nil
}

// openEpoch begins an epoch with this start's key, as an irreversible step.
func (k *Keep) openEpoch(st state) (tee.Outcome, error) {
	epoch, err := k.nextEpoch()
	if err != nil {
		return tee.Outcome{}, err
	}
	previous, known := st.Epoch, st.Streams
	st.Epoch, st.Key, st.Streams = epoch, cose.MarshalKey(&k.epochKey.PublicKey), k.sealer.streams()
	return k.step(st, func() (tee.Outcome, error) {
		k.phase, k.reason = tee.PhaseNew, "not enrolled: an operator has to approve it"
		if k.st.Tenant != "" {
			k.phase, k.reason = tee.PhaseEnrolled, ""
			k.adoptInstances() // not before: runners get keys
			k.sealer.begin(beginning{subject: k.subject(), data: k.roots.Data, epoch: epoch, previous: previous, known: known, ends: k.st.Ends})
		}
		k.log.Info("epoch opened", "epoch", epoch.String(), "phase", k.phase)
		return tee.Outcome{Pull: true}, nil
	})
}

func (k *Keep) nextEpoch() (sealing.Epoch, error) {
	n, err := k.ident.nv.Increment()
	if err != nil {
		return sealing.Epoch{}, err
	}
	return sealing.NewEpoch(n, [8]byte(random(8))), nil
}

func (k *Keep) checkWatermark(r tee.CheckWatermark) (tee.Watermark, error) {
	w, err := k.noteWatermark(r.Message)
	if err != nil {
		return tee.Watermark{}, err
	}
	if len(k.tails) == 0 {
		k.st.Prior = nil // all earlier data has arrived; written with the next step
	}
	return tee.Watermark{Stream: w.Stream, Epoch: w.Epoch[:], Seq: w.Seq, Head: w.Head}, nil
}

// noteWatermark verifies a watermark and forgets the tail that it covers.
func (k *Keep) noteWatermark(msg []byte) (sealing.Checkpoint, error) {
	if k.roots.Fleet == nil {
		return sealing.Checkpoint{}, errors.New("not enrolled: the fleet's key is not known")
	}
	w, err := sealing.VerifyCheckpoint(k.roots.Fleet, sealing.TypWatermark, msg)
	if err != nil {
		return w, err
	}
	if w.Subject != k.subject() {
		return w, fmt.Errorf("the watermark is of %.64q", w.Subject)
	}
	if now := k.st.Epoch; w.Epoch.Counter() > now.Counter() || w.Epoch.Counter() == now.Counter() && w.Epoch != now {
		return w, fmt.Errorf("the watermark is of epoch %s, which this keep never opened", w.Epoch)
	}
	k.sealer.watermark(w)
	if len(k.moves) > 0 {
		k.workloads.advanceSoon()
	}
	at := end{Before: sealing.Before{Epoch: w.Epoch, Count: w.Seq + 1}}
	if tail, ok := k.tails[w.Stream]; ok && at.covers(tail) {
		delete(k.tails, w.Stream)
	}
	return w, nil
}

package keep

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/mlkem"
	"crypto/sha256"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/tee/tpm"
)

// stateVersion is raised when a state is written that an older keep must not
// read.
const stateVersion = 1

// envelope is the state as the agent stores it. All but Box is in the clear, and
// authenticated by Box: what a keep needs before it can open its state, or when
// it cannot.
type envelope struct {
	Version int      `cbor:"1,keyasint"`
	Root    tpm.Blob `cbor:"2,keyasint"` // storage root, 32 bytes sealed to PCRs
	AKAuth  tpm.Blob `cbor:"3,keyasint"` // auth value of the AK, sealed without PCRs
	AK      tpm.Blob `cbor:"4,keyasint"`
	Slot    int      `cbor:"5,keyasint"` // NV slot of G
	Nonce   []byte   `cbor:"6,keyasint"`
	Box     []byte   `cbor:"7,keyasint"` // A256GCM of state under HKDF(root, G); AAD: the envelope without Box
}

// state is what a keep remembers.
type state struct {
	Tenant    string                `cbor:"1,keyasint"`
	Gateway   string                `cbor:"2,keyasint"`
	Roots     []byte                `cbor:"3,keyasint"`
	TLS       tpm.Blob              `cbor:"4,keyasint"`
	Receive   tpm.Blob              `cbor:"5,keyasint"`
	Seed      []byte                `cbor:"6,keyasint"` // of the ML-KEM half of the receiving key
	Certified map[string]tpm.Signed `cbor:"7,keyasint"`
	Command   uint64                `cbor:"8,keyasint"` // newest accepted
	Result    *message.Result       `cbor:"9,keyasint,omitempty"`
	Interval  int64                 `cbor:"10,keyasint"` // seconds between pulls
	Key       cose.Raw              `cbor:"11,keyasint,omitempty"`
	Epoch     sealing.Epoch         `cbor:"12,keyasint"`
	Prior     []cose.Raw            `cbor:"13,keyasint,omitempty"` // keys of earlier epochs with data under way
	Ends      map[string]end        `cbor:"14,keyasint"`
	Streams   []string              `cbor:"15,keyasint,omitempty"` // of the epoch this state began; those not here are new

	Instances map[string]instance `cbor:"16,keyasint,omitempty"`

	keys map[string]cose.Raw // COSE_Keys of TLS and Receive, derived
}

// end is where a stream ended.
type end struct {
	_      struct{} `cbor:",toarray"`
	Before sealing.Before
	Cursor sealing.Cursor // zero if the lines are not numbered
}

func (e end) covers(f end) bool {
	a, b := e.Before, f.Before
	if a.Epoch != b.Epoch {
		return a.Epoch.Counter() > b.Epoch.Counter()
	}
	return a.Count >= b.Count
}

// identity is what the envelope holds in the clear, opened.
type identity struct {
	env  envelope // Slot, Nonce and Box are of the newest committed state
	ak   *tpm.AK
	root []byte // nil while locked
	nv   *tpm.NV
}

// derive makes 32 bytes from the storage root.
func derive(root, salt []byte, label string) [32]byte {
	out, err := hkdf.Key(sha256.New, root, salt, "edgekeep keep "+label, 32)
	if err != nil {
		panic(err) // 32 bytes are always to be had
	}
	return [32]byte(out)
}

func (i identity) auth(label string) []byte {
	return tpm.AuthValue(derive(i.root, nil, "auth "+label))
}

func (i identity) seal(st state, g []byte, slot int) ([]byte, error) {
	env := i.env
	env.Version, env.Slot, env.Nonce, env.Box = stateVersion, slot, random(12), nil
	aead, err := stateAEAD(i.root, g)
	if err != nil {
		return nil, err
	}
	plain, err := cose.Marshal(st)
	if err != nil {
		return nil, fmt.Errorf("encoding the state: %w", err)
	}
	env.Box = aead.Seal(nil, env.Nonce, plain, cose.MustMarshal(env))
	return cose.MustMarshal(env), nil
}

func (i identity) open(g []byte) (state, error) {
	var st state
	aead, err := stateAEAD(i.root, g)
	if err != nil {
		return st, err
	}
	env := i.env
	env.Box = nil
	plain, err := aead.Open(nil, i.env.Nonce, i.env.Box, cose.MustMarshal(env))
	if err != nil {
		return st, errors.New("the state is not the newest one of this keep (a copy from before its last irreversible step?) or was changed: " +
			"restore the newest state file, or start the keep once with --reset-identity and enrol again")
	}
	if err := cose.Unmarshal(plain, &st); err != nil {
		return st, fmt.Errorf("the state: %w", err)
	}
	return st, nil
}

func stateAEAD(root, g []byte) (cipher.AEAD, error) {
	key := derive(root, g, "state")
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func parseEnvelope(b []byte) (envelope, error) {
	var env envelope
	if err := cose.Unmarshal(b, &env); err != nil {
		return env, fmt.Errorf("the state file is damaged: %w", err)
	}
	if env.Version != stateVersion {
		return env, fmt.Errorf("the state was written by a keep of another generation (%d, this one reads %d): install a matching version", env.Version, stateVersion)
	}
	if len(env.Nonce) != 12 || env.Slot < 0 || env.Slot > 1 {
		return env, errors.New("the state file is damaged")
	}
	return env, nil
}

// transition is a step from one state to the next that waits for its Commit.
type transition struct {
	next  state
	slot  int
	hash  []byte
	blob  []byte
	env   envelope
	first []byte // G of a keep without NV indices yet
	act   func() (tee.Outcome, error)
}

// step prepares an irreversible step.
func (k *Keep) step(next state, act func() (tee.Outcome, error)) (tee.Outcome, error) {
	if k.pending != nil {
		return tee.Outcome{}, errors.New("another irreversible step waits for its Commit")
	}
	t := &transition{next: next, slot: 1 - k.ident.env.Slot, act: act}
	g := random(32)
	if k.ident.nv == nil {
		t.slot, t.first = 0, g
	} else if err := k.ident.nv.Write(t.slot, g); err != nil {
		return tee.Outcome{}, err
	}
	blob, err := k.ident.seal(next, g, t.slot)
	if err != nil {
		return tee.Outcome{}, err
	}
	if t.env, err = parseEnvelope(blob); err != nil {
		return tee.Outcome{}, err
	}
	sum := sha256.Sum256(blob)
	t.hash = sum[:]
	t.blob, k.pending = blob, t
	return tee.Outcome{Commit: blob}, nil
}

func (k *Keep) commit(r tee.Commit) (tee.Outcome, error) {
	t := k.pending
	if t == nil || !bytes.Equal(t.hash, r.State) {
		return tee.Outcome{}, errors.New("no step waits for this state")
	}
	if t.first != nil {
		nv, err := k.dev.DefineNV(k.cfg.PCRs, k.ident.auth("nv"), t.first)
		if err != nil {
			return tee.Outcome{}, err
		}
		k.ident.nv = nv
	} else if err := k.ident.nv.Write(1-t.slot, random(32)); err != nil { // the old G is destroyed here
		return tee.Outcome{}, err
	}
	k.ident.env, k.st, k.pending = t.env, t.next, nil
	return t.act()
}

// deriveKeys computes the public keys of the state's TPM keys.
func (k *Keep) deriveKeys(st *state) error {
	tls, err := tpm.PublicKey(st.TLS.Public)
	if err != nil {
		return err
	}
	receive, err := k.receiveKey(*st)
	if err != nil {
		return err
	}
	st.keys = map[string]cose.Raw{
		attest.PurposeTLS:     cose.MarshalKey(tls),
		attest.PurposeReceive: cose.MarshalHPKEKey(receive.PublicKey()),
	}
	return nil
}

// receiveKey is the hybrid HPKE key: ML-KEM-768 from the sealed seed, P-256 in
// the TPM.
func (k *Keep) receiveKey(st state) (hpke.PrivateKey, error) {
	pq, err := mlkem.NewDecapsulationKey768(st.Seed)
	if err != nil {
		return nil, fmt.Errorf("receiving key: %w", err)
	}
	ec, err := k.dev.Key(st.Receive, k.cfg.PCRs, k.ident.auth("receive"))
	if err != nil {
		return nil, fmt.Errorf("receiving key: %w", err)
	}
	return hpke.NewHybridPrivateKey(pq, ec)
}

package workload

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
)

// Deploy is the body of the operator's command workload-deploy.
type Deploy struct {
	Instance string   `cbor:"1,keyasint"`
	Manifest []byte   `cbor:"2,keyasint"` // signed
	Key      []byte   `cbor:"3,keyasint"` // the bundle key: SealTo(PurposeBundle, DeployContext)
	Inputs   []Source `cbor:"4,keyasint"` // one for each stream in the manifest
}

// Source is a stream that an instance reads, wherever it runs.
type Source struct {
	_       struct{} `cbor:",toarray"`
	Gateway string
	Stream  string
}

// DeployContext binds a bundle key to gateway, instance and bundle.
func DeployContext(subject, instance string, manifest []byte) []byte {
	return cose.MustMarshal([]any{subject, instance, ID(manifest)})
}

// Claim is a holder's compare-and-set on the ledger: replace the entry of this
// instance that has epoch From and is held by the signer.
type Claim struct {
	Instance string `cbor:"1,keyasint"`
	From     uint64 `cbor:"2,keyasint"` // epoch of the entry to be replaced; 0: there is none
	Entry    Entry  `cbor:"3,keyasint"` // the new entry, of epoch From+1; its Nonce is empty
}

// Sign signs a claim with the epoch key.
func (c Claim) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypClaim, cose.MustMarshal(c))
}

// VerifyClaim verifies and decodes a claim.
func VerifyClaim(pub *ecdsa.PublicKey, msg []byte) (Claim, error) {
	c, err := verify[Claim](pub, TypClaim, msg)
	if err == nil {
		err = c.validate()
	}
	if err != nil {
		return c, fmt.Errorf("claim: %w", err)
	}
	return c, nil
}

// PeekClaim decodes a claim without verifying it: to look up who signed it.
func PeekClaim(msg []byte) (Claim, []byte, error) {
	h, payload, err := cose.Peek1(msg)
	var c Claim
	if err == nil {
		err = cose.Unmarshal(payload, &c)
	}
	if err == nil {
		err = c.validate()
	}
	if err != nil {
		return c, nil, fmt.Errorf("claim: %w", err)
	}
	return c, h.KID, nil
}

func (c Claim) validate() error {
	if c.Entry.Instance != c.Instance || c.Entry.Epoch != c.From+1 || len(c.Entry.Nonce) != 0 {
		return errors.New("the new entry does not follow the one it replaces")
	}
	return c.Entry.validate()
}

// Entry is the ledger's entry of an instance: who may run it.
type Entry struct {
	Instance string `cbor:"1,keyasint"`
	Epoch    uint64 `cbor:"2,keyasint"` // goes up by one with every new entry
	Holder   string `cbor:"3,keyasint"` // gateway that may run it; empty: nobody, it was stopped
	Bundle   []byte `cbor:"4,keyasint"` // bundle id
	// Attempt is the move that made this entry, 16 random bytes; empty if none did.
	Attempt []byte `cbor:"5,keyasint,omitempty"`
	// Head is the snapshot's hash: what the holder starts from.
	Head []byte `cbor:"6,keyasint,omitempty"`
	// Line is the number of the last result of the epochs before: later ones with
	// an older epoch are fenced.
	Line uint64 `cbor:"7,keyasint"`
	// Receive is the id of the target's receiving key.
	Receive []byte `cbor:"8,keyasint,omitempty"`
	// Owner is true if an owner's word made this entry, not the holder before: the
	// instance was lost, and goes on from a checkpoint.
	Owner bool `cbor:"9,keyasint,omitempty"`
	// Nonce is the SHA-256 of the claim that this answers; empty inside a claim.
	Nonce []byte `cbor:"10,keyasint,omitempty"`
	// Tenant and Inputs (InputsHash) are as the operator deployed them.
	Tenant string `cbor:"11,keyasint"`
	Inputs []byte `cbor:"12,keyasint"`
}

// InputsHash is what an entry says of the streams that an instance reads.
func InputsHash(inputs []Source) []byte {
	sum := sha256.Sum256(cose.MustMarshal(append([]Source{}, inputs...)))
	return sum[:]
}

func (e Entry) validate() error {
	if !ValidInstance(e.Instance) || e.Epoch == 0 || len(e.Holder) > 31 || len(e.Bundle) != sha256.Size ||
		len(e.Attempt) != 0 && len(e.Attempt) != AttemptSize || len(e.Head) != 0 && len(e.Head) != sha256.Size ||
		!nodeName.MatchString(e.Tenant) || len(e.Inputs) != sha256.Size || len(e.Receive) > 64 || len(e.Nonce) != 0 && len(e.Nonce) != sha256.Size {
		return errors.New("a field is missing or of the wrong size")
	}
	return nil
}

// Sign signs an entry with the fleet's key, as the answer to a claim.
func (e Entry) Sign(key crypto.Signer, claim []byte) ([]byte, error) {
	sum := sha256.Sum256(claim)
	e.Nonce = sum[:]
	return cose.Sign1(key, TypEntry, cose.MustMarshal(e))
}

// VerifyEntry verifies and decodes an entry.
func VerifyEntry(pub *ecdsa.PublicKey, msg []byte) (Entry, error) {
	e, err := verify[Entry](pub, TypEntry, msg)
	if err == nil {
		err = e.validate()
	}
	if err != nil {
		return e, fmt.Errorf("ledger entry: %w", err)
	}
	return e, nil
}

// Answers reports whether an entry is the answer to this claim.
func (e Entry) Answers(claim []byte) bool {
	sum := sha256.Sum256(claim)
	return string(e.Nonce) == string(sum[:])
}

// AttemptSize is the size of a move's id, in bytes.
const AttemptSize = 16

// Kinds of messages between keeps and to them: the first element of what is
// routed, CBOR [kind, body].
const (
	KindOffer    = 1 // Control
	KindAccept   = 2
	KindBegin    = 3
	KindReady    = 4
	KindReceived = 5
	KindRelease  = 6
	KindDone     = 7
	KindRefuse   = 8
	KindFrame    = 16 // Frame: sealed state, from runner to runner
	KindFrameAck = 17 // Frame without data: how far they came
	KindRequest  = 32 // Asked: an inference request, from the cloud's services
)

// Envelope is what is routed.
type Envelope struct {
	_    struct{} `cbor:",toarray"`
	Kind int
	Body cose.Raw
}

// Control is a message of a move, signed by the sender's epoch key.
type Control struct {
	Kind     int    `cbor:"1,keyasint"` // the envelope's
	Attempt  []byte `cbor:"2,keyasint"`
	Instance string `cbor:"3,keyasint"`
	From     string `cbor:"4,keyasint"` // gateway
	To       string `cbor:"5,keyasint"`
	// Verdict is the sender's newest: it vouches for the key that signed.
	Verdict []byte `cbor:"6,keyasint,omitempty"`
	// Manifest, Inputs, Epoch, Moves describe the instance (offer).
	Manifest []byte   `cbor:"7,keyasint,omitempty"`
	Inputs   []Source `cbor:"8,keyasint,omitempty"`
	Epoch    uint64   `cbor:"9,keyasint,omitempty"`
	Moves    uint64   `cbor:"10,keyasint,omitempty"` // so far
	// Sealed is a secret: Keys in begin (PurposeMove), the snapshot key in release
	// (PurposeRelease).
	Sealed []byte `cbor:"11,keyasint,omitempty"`
	// Head is the hash of all that was sent (received, release).
	Head []byte `cbor:"12,keyasint,omitempty"`
	// Entry is the ledger's answer (release).
	Entry []byte `cbor:"13,keyasint,omitempty"`
	// Reason says why (refuse), for a person.
	Reason string `cbor:"14,keyasint,omitempty"`
	// KeyID is the id of the session key (begin).
	KeyID []byte `cbor:"15,keyasint,omitempty"`
	// Nonce is the target's, 16 random bytes that begin and release are bound to, so
	// that neither of another time is good for this one (accept).
	Nonce []byte `cbor:"16,keyasint,omitempty"`
}

// Keys are the secrets of begin.
type Keys struct {
	Bundle  []byte `cbor:"1,keyasint"`
	Session []byte `cbor:"2,keyasint"` // seals all state but the last
}

// Sign signs a message with the epoch key and wraps it.
func (c Control) Sign(key crypto.Signer) ([]byte, error) {
	msg, err := cose.Sign1(key, TypMove, cose.MustMarshal(c))
	if err != nil {
		return nil, err
	}
	return Wrap(c.Kind, msg), nil
}

// VerifyControl verifies a message that came in an envelope of this kind.
func VerifyControl(pub *ecdsa.PublicKey, kind int, msg []byte) (Control, error) {
	c, err := verify[Control](pub, TypMove, msg)
	if err == nil {
		err = c.validate(kind)
	}
	if err != nil {
		return c, fmt.Errorf("move: %w", err)
	}
	return c, nil
}

// PeekControl decodes a message without verifying it: to see whose it claims to
// be.
func PeekControl(kind int, msg []byte) (Control, error) {
	_, payload, err := cose.Peek1(msg)
	var c Control
	if err == nil {
		err = cose.Unmarshal(payload, &c)
	}
	if err == nil {
		err = c.validate(kind)
	}
	if err != nil {
		return c, fmt.Errorf("move: %w", err)
	}
	return c, nil
}

func (c Control) validate(kind int) error {
	if c.Kind != kind || len(c.Attempt) != AttemptSize || !ValidInstance(c.Instance) || !nodeName.MatchString(c.From) || !nodeName.MatchString(c.To) ||
		len(c.Head) != 0 && len(c.Head) != sha256.Size || len(c.Inputs) > maxStreams || len(c.Reason) > 512 ||
		(kind == KindAccept) != (len(c.Nonce) == AttemptSize) {
		return errors.New("a field is missing or of the wrong size")
	}
	return nil
}

// Frame is a part of an instance's sealed state on its way to another runner.
type Frame struct {
	_       struct{} `cbor:",toarray"`
	Attempt []byte
	N       uint64 // from 0; in an acknowledgement: how many came in order
	Data    []byte
}

// Wrap makes an envelope.
func Wrap(kind int, body any) []byte {
	return cose.MustMarshal(Envelope{Kind: kind, Body: cose.MustMarshal(body)})
}

// Unwrap opens an envelope.
func Unwrap(msg []byte) (Envelope, error) {
	var e Envelope
	if err := cose.Unmarshal(msg, &e); err != nil {
		return e, fmt.Errorf("routed message: %w", err)
	}
	return e, nil
}

// Body decodes an envelope's body.
func Body[B any](e Envelope) (B, error) {
	var b B
	if err := cose.Unmarshal(e.Body, &b); err != nil {
		return b, fmt.Errorf("routed message of kind %d: %w", e.Kind, err)
	}
	return b, nil
}

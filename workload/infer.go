package workload

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
)

// Request is an inference request as its sender sealed it to a keep's receiving
// key: a COSE_Encrypt (SealTo, PurposeRequest) whose context is CBOR [subject,
// instance, nonce], where nonce is that of the challenge which the keep answered
// with the evidence of the verdict that named the key. A keep takes a request
// once, and only under a nonce that it answered since it started, so that an old
// request is no request.
type Request struct {
	Input []byte   `cbor:"1,keyasint"` // a batch, in the workload's input format
	Reply cose.Raw `cbor:"2,keyasint"` // HPKE key for the result, COSE_Key; fresh for each request, or the one in Grant
	ID    []byte   `cbor:"3,keyasint"` // 16 random bytes
	// Grant is the data owner's word that Reply may read, for an instance that reads
	// streams: its results may say what was in them.
	Grant []byte `cbor:"4,keyasint,omitempty"`
}

// Asked is a request on its way to a keep.
type Asked struct {
	ID       []byte `cbor:"1,keyasint"` // of whoever waits for the answer; says nothing
	Instance string `cbor:"2,keyasint"`
	Nonce    []byte `cbor:"3,keyasint"`
	Sealed   []byte `cbor:"4,keyasint"`
}

// Response is a keep's answer: a COSE_Sign1 by the epoch key (TypResponse).
type Response struct {
	Subject  string `cbor:"1,keyasint"`
	Instance string `cbor:"2,keyasint"`
	Request  []byte `cbor:"3,keyasint"`           // SHA-256 of the sealed request
	Sealed   []byte `cbor:"4,keyasint,omitempty"` // the result: SealTo(PurposeResult, Request) to the request's key
	Error    string `cbor:"5,keyasint,omitempty"` // why there is none
	Epoch    uint64 `cbor:"6,keyasint,omitempty"` // of the instance
	Module   []byte `cbor:"7,keyasint,omitempty"` // bundle id
}

// NewerVerdict ends the error of a keep that has not taken a request because of the
// verdict that it goes by: the same input, sealed by a newer one, may be taken.
const NewerVerdict = ": get a newer verdict"

// MaxInput bounds a request's input, in bytes: the message has to fit a payload.
const MaxInput = 64 << 10

// RequestContext binds a request to gateway, instance and verdict.
func RequestContext(subject, instance string, nonce []byte) []byte {
	return cose.MustMarshal([]any{subject, instance, nonce})
}

// Seal seals a request.
func (r Request) Seal(subject, instance string, nonce []byte, to hpke.PublicKey) ([]byte, error) {
	if len(r.Input) > MaxInput {
		return nil, fmt.Errorf("the input has %d bytes, at most %d fit", len(r.Input), MaxInput)
	}
	return SealTo(PurposeRequest, RequestContext(subject, instance, nonce), cose.MustMarshal(r), to)
}

// OpenRequest opens a request with the receiving key.
func OpenRequest(subject, instance string, nonce, sealed []byte, key hpke.PrivateKey) (Request, hpke.PublicKey, error) {
	var r Request
	plain, err := OpenFrom(PurposeRequest, RequestContext(subject, instance, nonce), sealed, key)
	if err != nil {
		return r, nil, err
	}
	if err := cose.Unmarshal(plain, &r); err != nil {
		return r, nil, fmt.Errorf("request: %w", err)
	}
	if len(r.ID) != 16 || len(r.Input) > MaxInput {
		return r, nil, errors.New("request: a field is missing or of the wrong size")
	}
	to, err := cose.UnmarshalHPKEKey(r.Reply)
	if err != nil {
		return r, nil, fmt.Errorf("request: the key for the result: %w", err)
	}
	return r, to, nil
}

// RequestHash is what a response names.
func RequestHash(sealed []byte) []byte {
	sum := sha256.Sum256(sealed)
	return sum[:]
}

// Sign signs a response with the epoch key.
func (r Response) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypResponse, cose.MustMarshal(r))
}

// OpenResponse verifies a response to a request and opens the result.
func OpenResponse(pub *ecdsa.PublicKey, subject, instance string, sealed, msg []byte, key hpke.PrivateKey) ([]byte, Response, error) {
	r, err := verify[Response](pub, TypResponse, msg)
	if err != nil {
		return nil, r, fmt.Errorf("response: %w", err)
	}
	hash := RequestHash(sealed)
	if r.Subject != subject || r.Instance != instance || string(r.Request) != string(hash) {
		return nil, r, errors.New("response: it answers another request")
	}
	if r.Error != "" {
		return nil, r, fmt.Errorf("the keep of %s refuses: %s", subject, r.Error)
	}
	out, err := OpenFrom(PurposeResult, hash, r.Sealed, key)
	return out, r, err
}

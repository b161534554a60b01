package cose

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"

	gocose "github.com/veraison/go-cose"
)

// Header is what a COSE_Sign1 says of itself: the type of its payload and the
// thumbprint (32 bytes) of the key that it claims to be signed with.
type Header struct {
	Typ string
	KID []byte
}

// sign1Header is the whole protected header of a COSE_Sign1.
type sign1Header struct {
	Alg int64  `cbor:"1,keyasint"`
	KID []byte `cbor:"4,keyasint"`
	Typ string `cbor:"16,keyasint"`
}

// Sign1 signs payload as typ ("type/subtype", visible ASCII, at most 128 bytes) and
// returns the tagged COSE_Sign1 (RFC 9052 §4.2), payload attached. key holds a P-256
// key, in software or in hardware: its Sign gets the SHA-256 digest and
// crypto.SHA256, and answers with an ASN.1 DER signature.
func Sign1(key crypto.Signer, typ string, payload []byte) ([]byte, error) {
	if err := checkTyp(typ); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("sign %s: the key is a %T, use a P-256 key", typ, key.Public())
	}
	kid, err := thumbprint(pub)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", typ, err)
	}
	headers := gocose.Headers{Protected: gocose.ProtectedHeader{
		gocose.HeaderLabelAlgorithm: gocose.AlgorithmES256,
		gocose.HeaderLabelKeyID:     kid,
		gocose.HeaderLabelType:      typ,
	}}
	if payload == nil {
		payload = []byte{} // nil would mean detached
	}
	msg, err := gocose.Sign1(rand.Reader, signer{key}, headers, payload, nil)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", typ, err)
	}
	if len(msg) > maxSize {
		return nil, fmt.Errorf("sign %s: the message has %d bytes, at most %d are allowed", typ, len(msg), maxSize)
	}
	return msg, nil
}

// Verify1 returns the payload of msg, a COSE_Sign1 that Sign1 could have written with
// the private half of pub and with typ. The payload aliases msg. The error wraps
// ErrMalformed only when msg is no such message by its form.
func Verify1(pub *ecdsa.PublicKey, typ string, msg []byte) (payload []byte, err error) {
	header, payload, err := Peek1(msg)
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", typ, err)
	}
	if header.Typ != typ {
		return nil, fmt.Errorf("verify %s: the message is a %s", typ, header.Typ)
	}
	kid, err := thumbprint(pub)
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", typ, err)
	}
	if !bytes.Equal(header.KID, kid) {
		return nil, fmt.Errorf("verify %s: the message names key %x, not %x", typ, header.KID, kid)
	}
	if err := verifyES256(pub, msg); err != nil {
		return nil, fmt.Errorf("verify %s: %w", typ, err)
	}
	return payload, nil
}

// Peek1 reads msg, a COSE_Sign1 in the form that Sign1 writes, and verifies nothing:
// it serves to choose the key for Verify1, or to say what a file is. What it returns
// aliases msg. The error wraps ErrMalformed.
func Peek1(msg []byte) (Header, []byte, error) {
	r := readMessage(msg, "a tagged COSE_Sign1 (d284)", 0xd2, 0x84)
	protected := r.bytes()
	r.literal("an empty unprotected header (a0)", 0xa0)
	payload, signature := r.bytes(), r.bytes()
	if err := r.end(); err != nil {
		return Header{}, nil, fmt.Errorf("read COSE_Sign1: %w", err)
	}
	var h sign1Header
	if err := Unmarshal(protected, &h); err != nil {
		return Header{}, nil, fmt.Errorf("read COSE_Sign1: protected header: %w", err)
	}
	if h.Alg != algES256 || len(h.KID) != kidSize || len(signature) != sigSize {
		return Header{}, nil, fmt.Errorf("read COSE_Sign1: %w", malformed(
			"alg %d, kid of %d bytes and signature of %d, expected %d, %d and %d",
			h.Alg, len(h.KID), len(signature), algES256, kidSize, sigSize))
	}
	if err := checkTyp(h.Typ); err != nil {
		return Header{}, nil, fmt.Errorf("read COSE_Sign1: %w", malformed("%v", err))
	}
	return Header{Typ: h.Typ, KID: h.KID}, payload, nil
}

// verifyES256 checks the signature of a tagged COSE_Sign1, whatever its header says
// besides alg.
func verifyES256(pub *ecdsa.PublicKey, msg []byte) error {
	verifier, err := gocose.NewVerifier(gocose.AlgorithmES256, pub)
	if err != nil {
		return err
	}
	var m gocose.Sign1Message
	if err := m.UnmarshalCBOR(msg); err != nil {
		return malformed("%v", err)
	}
	if err := m.Verify(nil, verifier); err != nil {
		return errors.New("the signature is not by this key over this message")
	}
	return nil
}

// checkTyp refuses a typ that is not of the form "type/subtype", or that could do harm
// where it is printed.
func checkTyp(typ string) error {
	visible := func(c rune) bool { return c > ' ' && c < 0x7f }
	before, after, ok := strings.Cut(typ, "/")
	if !ok || before == "" || after == "" || strings.Contains(after, "/") || len(typ) > 128 ||
		strings.ContainsFunc(typ, func(c rune) bool { return !visible(c) }) {
		return fmt.Errorf("typ %.128q is not type/subtype in at most 128 visible ASCII characters", typ)
	}
	return nil
}

// signer makes COSE signatures with a crypto.Signer. (The library's own adapter tells
// the key no hash function, which hardware keys need to choose their scheme.)
type signer struct {
	key crypto.Signer
}

func (signer) Algorithm() gocose.Algorithm { return gocose.AlgorithmES256 }

func (s signer) Sign(random io.Reader, content []byte) ([]byte, error) {
	digest := sha256.Sum256(content)
	der, err := s.key.Sign(random, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return fixedWidth(der)
}

// fixedWidth turns an ASN.1 DER signature into r || s, 32 bytes each (RFC 9053 §2.1).
func fixedWidth(der []byte) ([]byte, error) {
	var sig struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(der, &sig)
	if err != nil {
		return nil, fmt.Errorf("the key answered with no DER signature: %w", err)
	}
	if len(rest) != 0 || sig.R.Sign() <= 0 || sig.S.Sign() <= 0 || sig.R.BitLen() > 256 || sig.S.BitLen() > 256 {
		return nil, errors.New("the key answered with no P-256 signature")
	}
	fixed := make([]byte, sigSize)
	sig.R.FillBytes(fixed[:sigSize/2])
	sig.S.FillBytes(fixed[sigSize/2:])
	return fixed, nil
}

package cose

import (
	"crypto/cipher"
	"errors"
	"fmt"
)

// Encrypt0 is a COSE_Encrypt0 that has been read but not opened: nothing in it is
// authenticated yet. Both fields alias the message.
type Encrypt0 struct {
	Protected  []byte // the encoded map: strict CBOR that starts with alg A256GCM
	Ciphertext []byte // with the 16 bytes of the tag last
}

// SealEncrypt0 seals plaintext with aead, which is AES-256-GCM, and returns the tagged
// COSE_Encrypt0 (RFC 9052 §5.2). protected marshals to the protected header: a map of
// at most 23 pairs, 1: 3 (alg: A256GCM) and labels above it. nonce, 12 bytes, is never
// used twice with the same key; that the header states or implies it (label 5) is up to
// the caller, as is what externalAAD binds. The message is written into one buffer.
func SealEncrypt0(aead cipher.AEAD, nonce []byte, protected any, plaintext, externalAAD []byte) ([]byte, error) {
	header, err := marshalContentHeader(protected)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	if err := checkAEAD(aead, nonce); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	size := 2 + maxHead + len(header) + 1 + maxHead + len(plaintext) + tagSize
	msg := make([]byte, 0, size)
	msg = append(msg, 0xd0, 0x83)
	msg = append(appendBytes(msg, header), 0xa0)
	msg = appendSealed(msg, aead, nonce, "Encrypt0", header, plaintext, externalAAD)
	if len(msg) > maxSize {
		return nil, fmt.Errorf("seal: the message has %d bytes, at most %d are allowed", len(msg), maxSize)
	}
	return msg, nil
}

// ParseEncrypt0 reads msg, a COSE_Encrypt0 in the form that SealEncrypt0 writes, and
// opens nothing. The error wraps ErrMalformed. The caller unmarshals Protected strictly
// into its own struct, so that no label (not even crit) goes unnoticed.
func ParseEncrypt0(msg []byte) (Encrypt0, error) {
	r := readMessage(msg, "a tagged COSE_Encrypt0 (d083)", 0xd0, 0x83)
	m := Encrypt0{Protected: r.bytes()}
	r.literal("an empty unprotected header (a0)", 0xa0)
	m.Ciphertext = r.bytes()
	if err := r.end(); err != nil {
		return Encrypt0{}, fmt.Errorf("read COSE_Encrypt0: %w", err)
	}
	if err := checkContent(m.Protected, m.Ciphertext); err != nil {
		return Encrypt0{}, fmt.Errorf("read COSE_Encrypt0: %w", err)
	}
	return m, nil
}

// Open returns the plaintext, newly allocated, after checking that m was sealed with
// this key, nonce (12 bytes) and externalAAD.
func (m Encrypt0) Open(aead cipher.AEAD, nonce, externalAAD []byte) ([]byte, error) {
	if err := checkAEAD(aead, nonce); err != nil {
		return nil, fmt.Errorf("open COSE_Encrypt0: %w", err)
	}
	plaintext, err := openSealed(aead, nonce, "Encrypt0", m.Protected, m.Ciphertext, externalAAD)
	if err != nil {
		return nil, fmt.Errorf("open COSE_Encrypt0: %w", err)
	}
	return plaintext, nil
}

// appendSealed appends the byte string of the ciphertext of plaintext, whose additional
// data is Enc_structure (RFC 9052 §5.3) with the context "Encrypt0" or "Encrypt".
func appendSealed(msg []byte, aead cipher.AEAD, nonce []byte, context string, protected, plaintext, externalAAD []byte) []byte {
	msg = appendHead(msg, majorBytes, len(plaintext)+aead.Overhead())
	return aead.Seal(msg, nonce, plaintext, structure(context, protected, externalAAD))
}

// openSealed is the inverse of appendSealed.
func openSealed(aead cipher.AEAD, nonce []byte, context string, protected, ciphertext, externalAAD []byte) ([]byte, error) {
	plaintext, err := aead.Open(nil, nonce, ciphertext, structure(context, protected, externalAAD))
	if err != nil {
		return nil, errors.New("it was not sealed with this key, nonce and external data, or was changed")
	}
	return plaintext, nil
}

// checkAEAD refuses what cannot be AES-256-GCM, before it panics on a nonce.
func checkAEAD(aead cipher.AEAD, nonce []byte) error {
	if aead.NonceSize() != ivSize || aead.Overhead() != tagSize || len(nonce) != ivSize {
		return fmt.Errorf("aead with nonce of %d bytes and tag of %d, and a nonce of %d: use AES-256-GCM, %d and %d",
			aead.NonceSize(), aead.Overhead(), len(nonce), ivSize, tagSize)
	}
	return nil
}

// marshalContentHeader encodes the protected header of content.
func marshalContentHeader(protected any) ([]byte, error) {
	header, err := Marshal(protected)
	if err != nil {
		return nil, fmt.Errorf("protected header: %w", err)
	}
	if err := checkContentHeader(header); err != nil {
		return nil, fmt.Errorf("protected header: %w", err)
	}
	return header, nil
}

// checkContent refuses a protected header and a ciphertext that A256GCM cannot have.
func checkContent(protected, ciphertext []byte) error {
	if err := check(protected); err != nil {
		return fmt.Errorf("protected header: %w", err)
	}
	if err := checkContentHeader(protected); err != nil {
		return fmt.Errorf("protected header: %w", err)
	}
	if len(ciphertext) < tagSize {
		return malformed("ciphertext of %d bytes is shorter than its tag of %d", len(ciphertext), tagSize)
	}
	return nil
}

// checkContentHeader refuses an item that is not a map of at most 23 pairs, the first
// of which is 1: 3 (alg: A256GCM). Label 0 is reserved, so alg always comes first.
func checkContentHeader(header []byte) error {
	if len(header) < 3 || header[0]>>5 != majorMap || header[0]&0x1f >= 24 || header[1] != 1 || header[2] != algA256GCM {
		return malformed("not a map of at most 23 pairs that starts with 1: %d (alg: A256GCM)", algA256GCM)
	}
	return nil
}

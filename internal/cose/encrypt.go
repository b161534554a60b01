package cose

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hpke"
	"crypto/rand"
	"fmt"
	"slices"
)

const maxRecipients = 16

// Encrypt is a COSE_Encrypt that has been read but not opened: nothing in it is
// authenticated yet. What it holds may alias the message.
type Encrypt struct {
	Protected []byte   // the encoded map: strict CBOR that starts with alg A256GCM
	KIDs      [][]byte // HPKEKeyID of each recipient, 32 bytes, all different

	iv, ciphertext []byte
	recipients     []recipient // in the order of KIDs
}

// SealEncrypt seals plaintext with a fresh key for each of 1 to 16 different recipients
// and returns the tagged COSE_Encrypt (RFC 9052 §5.1). protected marshals to the
// protected header: a map of at most 23 pairs, 1: 3 (alg: A256GCM) and labels above it.
// Anyone can seal: sign the message for whoever must know by whom.
func SealEncrypt(protected any, plaintext, externalAAD []byte, to ...hpke.PublicKey) ([]byte, error) {
	header, err := marshalContentHeader(protected)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	cek, iv := make([]byte, cekSize), make([]byte, ivSize)
	defer clear(cek)
	rand.Read(cek)
	rand.Read(iv)
	recipients, err := sealRecipients(cek, to)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	aead, err := newGCM(cek)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	size := 3 + maxHead + len(header) + 3 + ivSize + maxHead + len(plaintext) + tagSize + len(recipients)
	msg := make([]byte, 0, size)
	msg = append(msg, 0xd8, 0x60, 0x84)
	msg = append(appendBytes(msg, header), 0xa1, 0x05)
	msg = appendBytes(msg, iv)
	msg = appendSealed(msg, aead, iv, "Encrypt", header, plaintext, externalAAD)
	msg = append(msg, recipients...)
	if len(msg) > maxSize {
		return nil, fmt.Errorf("seal: the message has %d bytes, at most %d are allowed", len(msg), maxSize)
	}
	return msg, nil
}

// sealRecipients encodes the array of recipients, each with the content key.
func sealRecipients(cek []byte, to []hpke.PublicKey) ([]byte, error) {
	if len(to) < 1 || len(to) > maxRecipients {
		return nil, fmt.Errorf("%d recipients, name 1 to %d", len(to), maxRecipients)
	}
	var kids [][]byte
	b := appendHead(nil, majorArray, len(to))
	for i, pub := range to {
		kid, err := hpkeKeyID(pub)
		if err != nil {
			return nil, fmt.Errorf("recipient %d: %w", i, err)
		}
		if contains(kids, kid) {
			return nil, fmt.Errorf("recipient %d: key %x is named twice", i, kid)
		}
		kids = append(kids, kid)
		if b, err = appendRecipient(b, pub, kid, cek, algA256GCM); err != nil {
			return nil, fmt.Errorf("recipient %d: %w", i, err)
		}
	}
	return b, nil
}

// ParseEncrypt reads msg, a COSE_Encrypt in the form that SealEncrypt writes, and opens
// nothing. The error wraps ErrMalformed. The caller unmarshals Protected strictly into
// its own struct, so that no label (not even crit) goes unnoticed.
func ParseEncrypt(msg []byte) (Encrypt, error) {
	m, err := readEncrypt(msg)
	if err != nil {
		return Encrypt{}, fmt.Errorf("read COSE_Encrypt: %w", err)
	}
	if err := checkContent(m.Protected, m.ciphertext); err != nil {
		return Encrypt{}, fmt.Errorf("read COSE_Encrypt: %w", err)
	}
	if len(m.iv) != ivSize {
		return Encrypt{}, fmt.Errorf("read COSE_Encrypt: %w", malformed("iv of %d bytes, expected %d", len(m.iv), ivSize))
	}
	for i, rec := range m.recipients {
		if err := rec.check(); err != nil {
			return Encrypt{}, fmt.Errorf("read COSE_Encrypt: recipient %d: %w", i, err)
		}
		if contains(m.KIDs[:i], rec.kid) {
			return Encrypt{}, fmt.Errorf("read COSE_Encrypt: recipient %d: %w", i, malformed("key %x is named twice", rec.kid))
		}
	}
	return m, nil
}

// readEncrypt reads the shape of a COSE_Encrypt with HPKE recipients, of any content
// algorithm.
func readEncrypt(msg []byte) (Encrypt, error) {
	r := readMessage(msg, "a tagged COSE_Encrypt (d86084)", 0xd8, 0x60, 0x84)
	var m Encrypt
	m.Protected, m.iv, m.ciphertext = r.content()
	start := r.at
	major, n := r.head()
	if r.err == nil && (major != majorArray || n < 1 || n > maxRecipients) {
		r.fail(start, "expected an array of 1 to 16 recipients")
	}
	for ; n > 0 && r.err == nil; n-- {
		rec := r.recipient()
		m.recipients = append(m.recipients, rec)
		m.KIDs = append(m.KIDs, rec.kid)
	}
	return m, r.end()
}

// content reads a protected header, the unprotected header {5: iv} and a ciphertext.
func (r *reader) content() (protected, iv, ciphertext []byte) {
	protected = r.bytes()
	r.literal("an unprotected header that is an iv (a105)", 0xa1, 0x05)
	iv = r.bytes()
	return protected, iv, r.bytes()
}

// Open returns the plaintext, newly allocated, for the recipient whose key, in software
// or in hardware, this is, after checking externalAAD. It fails when no recipient of m
// has this key.
func (m Encrypt) Open(key hpke.PrivateKey, externalAAD []byte) ([]byte, error) {
	kid, err := hpkeKeyID(key.PublicKey())
	if err != nil {
		return nil, fmt.Errorf("open COSE_Encrypt: %w", err)
	}
	i := slices.IndexFunc(m.recipients, func(rec recipient) bool { return bytes.Equal(rec.kid, kid) })
	if i < 0 {
		return nil, fmt.Errorf("open COSE_Encrypt: key %x is not among its %d recipients", kid, len(m.recipients))
	}
	cek, err := m.recipients[i].openKey(key, algA256GCM)
	if err != nil {
		return nil, fmt.Errorf("open COSE_Encrypt: %w", err)
	}
	defer clear(cek)
	aead, err := newGCM(cek)
	if err != nil {
		return nil, fmt.Errorf("open COSE_Encrypt: %w", err)
	}
	plaintext, err := openSealed(aead, m.iv, "Encrypt", m.Protected, m.ciphertext, externalAAD)
	if err != nil {
		return nil, fmt.Errorf("open COSE_Encrypt: %w", err)
	}
	return plaintext, nil
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func contains(kids [][]byte, kid []byte) bool {
	return slices.ContainsFunc(kids, func(k []byte) bool { return bytes.Equal(k, kid) })
}

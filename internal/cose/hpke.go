package cose

import (
	"crypto/ecdh"
	"crypto/hpke"
	"errors"
	"fmt"
)

// suite is an HPKE cipher suite and the COSE algorithm that stands for it.
type suite struct {
	alg    int64
	kem    hpke.KEM
	kdf    hpke.KDF
	aead   hpke.AEAD
	ekSize int // of an encapsulated key
}

var (
	suiteP256   = suite{AlgHPKE0, hpke.DHKEM(ecdh.P256()), hpke.HKDFSHA256(), hpke.AES128GCM(), 65}
	suiteHybrid = suite{AlgHPKEHybrid, hpke.MLKEM768P256(), hpke.HKDFSHA256(), hpke.AES256GCM(), 1088 + 65}
)

// suiteOf is the suite in which a key of this KEM is used.
func suiteOf(kem hpke.KEM) (suite, error) {
	for _, s := range []suite{suiteP256, suiteHybrid} {
		if s.kem.ID() == kem.ID() {
			return s, nil
		}
	}
	return suite{}, fmt.Errorf("hpke key of kem %#04x, use DHKEM(P-256) or MLKEM768-P256", kem.ID())
}

// recipient is a COSE_recipient of COSE-HPKE Key Encryption (draft-ietf-cose-hpke).
// Byte slices alias the message, except kid.
type recipient struct {
	protected []byte // the encoded map of alg and kid
	alg       int64
	kid       []byte
	ek        []byte // HPKE encapsulated key
	sealed    []byte // HPKE ciphertext of the content key
}

// recipientHeader is the whole protected header of a recipient.
type recipientHeader struct {
	Alg int64  `cbor:"1,keyasint"`
	KID []byte `cbor:"4,keyasint"`
}

// recipientStructure is what HPKE binds as info.
type recipientStructure struct {
	_         struct{} `cbor:",toarray"`
	Context   string
	Alg       int64 // for which the content key is
	Protected []byte
	Extra     []byte
}

func recipientInfo(contentAlg int64, protected []byte) []byte {
	return MustMarshal(recipientStructure{Context: "HPKE Recipient", Alg: contentAlg, Protected: protected})
}

// appendRecipient appends a recipient to whom cek, a key for contentAlg, is sealed.
func appendRecipient(b []byte, pub hpke.PublicKey, kid, cek []byte, contentAlg int64) ([]byte, error) {
	s, err := suiteOf(pub.KEM())
	if err != nil {
		return nil, err
	}
	protected := MustMarshal(recipientHeader{Alg: s.alg, KID: kid})
	ek, sender, err := hpke.NewSender(pub, s.kdf, s.aead, recipientInfo(contentAlg, protected))
	if err != nil {
		return nil, err
	}
	sealed, err := sender.Seal(nil, cek)
	if err != nil {
		return nil, err
	}
	b = appendBytes(append(b, 0x83), protected)
	b = appendBytes(append(b, 0xa1, 0x23), ek)
	return appendBytes(b, sealed), nil
}

// recipient reads a recipient of any HPKE algorithm.
func (r *reader) recipient() recipient {
	start := r.at
	r.literal("a recipient of three parts (83)", 0x83)
	rec := recipient{protected: r.bytes()}
	r.literal("an unprotected header that is an ek (a123)", 0xa1, 0x23)
	rec.ek, rec.sealed = r.bytes(), r.bytes()
	var h recipientHeader
	if r.err == nil {
		if err := Unmarshal(rec.protected, &h); err != nil {
			r.err = fmt.Errorf("byte %d: recipient's protected header: %w", start, err)
		}
	}
	rec.alg, rec.kid = h.Alg, h.KID
	return rec
}

// check refuses a recipient that is not one of our two algorithms.
func (rec recipient) check() error {
	for _, s := range []suite{suiteP256, suiteHybrid} {
		if rec.alg == s.alg && len(rec.kid) == kidSize && len(rec.ek) == s.ekSize && len(rec.sealed) == cekSize+tagSize {
			return nil
		}
	}
	return malformed("alg %d, kid of %d bytes, ek of %d and ciphertext of %d do not go together",
		rec.alg, len(rec.kid), len(rec.ek), len(rec.sealed))
}

// openKey opens the content key, which is for contentAlg.
func (rec recipient) openKey(key hpke.PrivateKey, contentAlg int64) ([]byte, error) {
	s, err := suiteOf(key.KEM())
	if err != nil {
		return nil, err
	}
	if rec.alg != s.alg {
		return nil, fmt.Errorf("the recipient's algorithm is %d, its key's %d", rec.alg, s.alg)
	}
	opener, err := hpke.NewRecipient(rec.ek, key, s.kdf, s.aead, recipientInfo(contentAlg, rec.protected))
	if err != nil {
		return nil, fmt.Errorf("decapsulate the content key: %w", err)
	}
	cek, err := opener.Open(nil, rec.sealed)
	if err != nil {
		return nil, errors.New("the content key was not sealed to this key, or was changed")
	}
	return cek, nil
}

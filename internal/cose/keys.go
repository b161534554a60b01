package cose

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/sha256"
	"errors"
	"fmt"
)

// COSE key types and curve (RFC 9053 §7; AKP: draft-ietf-cose-dilithium).
const (
	ktyEC2  = 2
	ktyAKP  = 7
	crvP256 = 1
)

// ec2Key is a COSE_Key of type EC2; akpKey one of type AKP, an algorithm key pair.
type (
	ec2Key struct {
		Kty int64  `cbor:"1,keyasint"`
		Alg int64  `cbor:"3,keyasint,omitempty"`
		Crv int64  `cbor:"-1,keyasint"`
		X   []byte `cbor:"-2,keyasint"`
		Y   []byte `cbor:"-3,keyasint"`
	}
	akpKey struct {
		Kty int64  `cbor:"1,keyasint"`
		Alg int64  `cbor:"3,keyasint"`
		Pub []byte `cbor:"-1,keyasint"`
	}
)

// MarshalKey encodes an ECDSA P-256 key as COSE_Key (RFC 9053 §7.1.1), 75 bytes. It
// panics when pub is no valid P-256 key: take a key from outside through UnmarshalKey,
// or check its curve first.
func MarshalKey(pub *ecdsa.PublicKey) []byte {
	return must(marshalKey(pub))
}

// UnmarshalKey decodes what MarshalKey writes. The point is on the curve. The error
// wraps ErrMalformed.
func UnmarshalKey(b []byte) (*ecdsa.PublicKey, error) {
	point, err := unmarshalEC2(b, 0)
	if err != nil {
		return nil, fmt.Errorf("read COSE_Key: %w", err)
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, fmt.Errorf("read COSE_Key: %w", malformed("%v", err))
	}
	return pub, nil
}

// Thumbprint is the SHA-256 COSE key thumbprint of pub (RFC 9679), 32 bytes. It panics
// when pub is no valid P-256 key, as MarshalKey does.
func Thumbprint(pub *ecdsa.PublicKey) []byte {
	return must(thumbprint(pub))
}

func marshalKey(pub *ecdsa.PublicKey) ([]byte, error) {
	if pub == nil || pub.Curve != elliptic.P256() {
		return nil, errors.New("the key is not on curve P-256, use one that is")
	}
	point, err := pub.Bytes()
	if err != nil {
		return nil, fmt.Errorf("the key is not valid: %w", err)
	}
	return marshalEC2(point, 0), nil
}

func thumbprint(pub *ecdsa.PublicKey) ([]byte, error) {
	key, err := marshalKey(pub)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(key)
	return sum[:], nil
}

// MarshalHPKEKey encodes an HPKE key of DHKEM(P-256) or MLKEM768-P256 as COSE_Key, EC2
// with alg AlgHPKE0 or AKP with alg AlgHPKEHybrid. It panics for any other KEM.
func MarshalHPKEKey(pub hpke.PublicKey) []byte {
	return must(marshalHPKEKey(pub))
}

// UnmarshalHPKEKey decodes what MarshalHPKEKey writes, and checks the key's points and
// coefficients. The error wraps ErrMalformed.
func UnmarshalHPKEKey(b []byte) (hpke.PublicKey, error) {
	kem, raw, err := hpkeKeyBytes(b)
	if err != nil {
		return nil, fmt.Errorf("read COSE_Key: %w", err)
	}
	pub, err := kem.NewPublicKey(raw)
	if err != nil {
		return nil, fmt.Errorf("read COSE_Key: %w", malformed("%v", err))
	}
	return pub, nil
}

// HPKEKeyID names an HPKE key of DHKEM(P-256) or MLKEM768-P256: its SHA-256 COSE key
// thumbprint (RFC 9679), 32 bytes. It panics for any other KEM.
func HPKEKeyID(pub hpke.PublicKey) []byte {
	return must(hpkeKeyID(pub))
}

func marshalHPKEKey(pub hpke.PublicKey) ([]byte, error) {
	s, err := suiteOf(pub.KEM())
	if err != nil {
		return nil, err
	}
	if s.alg == AlgHPKE0 {
		return marshalEC2(pub.Bytes(), s.alg), nil
	}
	return MustMarshal(akpKey{Kty: ktyAKP, Alg: s.alg, Pub: pub.Bytes()}), nil
}

// hpkeKeyID hashes the key without alg if it is EC2, where alg is not part of the
// thumbprint, and with it if it is AKP, where it is.
func hpkeKeyID(pub hpke.PublicKey) ([]byte, error) {
	key, err := marshalHPKEKey(pub)
	if err != nil {
		return nil, err
	}
	if pub.KEM().ID() == suiteP256.kem.ID() {
		key = marshalEC2(pub.Bytes(), 0)
	}
	sum := sha256.Sum256(key)
	return sum[:], nil
}

// hpkeKeyBytes takes the KEM and the serialised public key out of a COSE_Key.
func hpkeKeyBytes(b []byte) (hpke.KEM, []byte, error) {
	if !bytes.HasPrefix(b, []byte{0xa3, 0x01, ktyAKP}) {
		point, err := unmarshalEC2(b, AlgHPKE0)
		return suiteP256.kem, point, err
	}
	var k akpKey
	if err := Unmarshal(b, &k); err != nil {
		return nil, nil, err
	}
	if k.Alg != AlgHPKEHybrid {
		return nil, nil, malformed("alg %d, expected %d", k.Alg, AlgHPKEHybrid)
	}
	return suiteHybrid.kem, k.Pub, nil
}

// marshalEC2 encodes an uncompressed P-256 point (04 || x || y); alg 0 is none.
func marshalEC2(point []byte, alg int64) []byte {
	return MustMarshal(ec2Key{Kty: ktyEC2, Alg: alg, Crv: crvP256, X: point[1:33], Y: point[33:65]})
}

// unmarshalEC2 is the inverse of marshalEC2. Whether the point is on the curve is still
// to be checked.
func unmarshalEC2(b []byte, alg int64) ([]byte, error) {
	var k ec2Key
	if err := Unmarshal(b, &k); err != nil {
		return nil, err
	}
	if k.Kty != ktyEC2 || k.Alg != alg || k.Crv != crvP256 || len(k.X) != 32 || len(k.Y) != 32 {
		return nil, malformed("kty %d, alg %d, crv %d, x of %d bytes and y of %d, expected %d, %d, %d, 32 and 32",
			k.Kty, k.Alg, k.Crv, len(k.X), len(k.Y), ktyEC2, alg, crvP256)
	}
	return append(append([]byte{4}, k.X...), k.Y...), nil
}

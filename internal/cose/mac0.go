package cose

import (
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
)

// mac0Header is the whole protected header of a COSE_Mac0.
type mac0Header struct {
	Alg int64  `cbor:"1,keyasint"`
	Typ string `cbor:"16,keyasint"`
}

// Mac0 authenticates payload as typ ("type/subtype", visible ASCII, at most 128 bytes)
// with HMAC 256/256 under key, 32 bytes (RFC 9053 §3.1), and returns the tagged
// COSE_Mac0 (RFC 9052 §6.2).
func Mac0(key []byte, typ string, payload []byte) ([]byte, error) {
	if err := checkTyp(typ); err != nil {
		return nil, fmt.Errorf("authenticate: %w", err)
	}
	if len(key) != hmacSize {
		return nil, fmt.Errorf("authenticate %s: the key has %d bytes, use %d", typ, len(key), hmacSize)
	}
	protected := MustMarshal(mac0Header{Alg: algHMAC256, Typ: typ})
	msg := make([]byte, 0, 3+3*maxHead+len(protected)+len(payload)+hmacSize)
	msg = append(msg, 0xd1, 0x84)
	msg = append(appendBytes(msg, protected), 0xa0)
	msg = appendBytes(msg, payload)
	msg = appendBytes(msg, mac0Tag(key, protected, payload))
	if len(msg) > maxSize {
		return nil, fmt.Errorf("authenticate %s: the message has %d bytes, at most %d are allowed", typ, len(msg), maxSize)
	}
	return msg, nil
}

// VerifyMac0 returns the payload of msg, which Mac0 wrote with the same key and typ.
// The payload aliases msg. The error wraps ErrMalformed only when msg is no such
// message by its form.
func VerifyMac0(key []byte, typ string, msg []byte) ([]byte, error) {
	if len(key) != hmacSize {
		return nil, fmt.Errorf("verify %s: the key has %d bytes, use %d", typ, len(key), hmacSize)
	}
	m, err := parseMac0(typ, msg)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(m.tag, mac0Tag(key, m.protected, m.payload)) {
		return nil, fmt.Errorf("verify %s: the tag is not by this key over this message", typ)
	}
	return m.payload, nil
}

// PeekMac0 returns the payload of msg without verifying it: for one who does not have
// the key and only passes the message on.
func PeekMac0(typ string, msg []byte) ([]byte, error) {
	m, err := parseMac0(typ, msg)
	return m.payload, err
}

type mac0 struct{ protected, payload, tag []byte }

func parseMac0(typ string, msg []byte) (mac0, error) {
	r := readMessage(msg, "a tagged COSE_Mac0 (d184)", 0xd1, 0x84)
	protected := r.bytes()
	r.literal("an empty unprotected header (a0)", 0xa0)
	m := mac0{protected: protected, payload: r.bytes(), tag: r.bytes()}
	if err := r.end(); err != nil {
		return mac0{}, fmt.Errorf("verify %s: read COSE_Mac0: %w", typ, err)
	}
	var h mac0Header
	if err := Unmarshal(protected, &h); err != nil {
		return mac0{}, fmt.Errorf("verify %s: read COSE_Mac0: protected header: %w", typ, err)
	}
	if h.Alg != algHMAC256 || len(m.tag) != hmacSize {
		return mac0{}, fmt.Errorf("verify %s: read COSE_Mac0: %w", typ, malformed(
			"alg %d and tag of %d bytes, expected %d and %d", h.Alg, len(m.tag), algHMAC256, hmacSize))
	}
	if err := checkTyp(h.Typ); err != nil {
		return mac0{}, fmt.Errorf("verify %s: read COSE_Mac0: %w", typ, malformed("%v", err))
	}
	if h.Typ != typ {
		return mac0{}, fmt.Errorf("verify %s: the message is a %s", typ, h.Typ)
	}
	return m, nil
}

// mac0Tag is the HMAC over MAC_structure (RFC 9052 §6.3).
func mac0Tag(key, protected, payload []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(structure("MAC0", protected, nil, payload))
	return h.Sum(nil)
}

package cose

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/mlkem"
	"errors"
	"strings"
	"testing"
)

func TestEncryptGolden(t *testing.T) {
	msg := golden(t, "encrypt.golden")
	keys := []hpke.PrivateKey{testHPKEKey(t, suiteP256, 0xa0), testHPKEKey(t, suiteHybrid, 0xc0)}
	m, err := ParseEncrypt(msg)
	if err != nil {
		t.Fatal(err)
	}
	var header contentHeader
	if err := Unmarshal(m.Protected, &header); err != nil || header.Seq != 7 {
		t.Errorf("protected header %+v, %v", header, err)
	}
	for i, key := range keys {
		if !bytes.Equal(m.KIDs[i], HPKEKeyID(key.PublicKey())) {
			t.Errorf("recipient %d: kid %x", i, m.KIDs[i])
		}
		plaintext, err := m.Open(key, []byte("aad"))
		if err != nil || string(plaintext) != "plaintext" {
			t.Errorf("recipient %d: %q, %v", i, plaintext, err)
		}
	}
	everyCut(t, msg, func(msg []byte) error {
		_, err := ParseEncrypt(msg)
		return err
	})
}

func TestEncryptFlips(t *testing.T) {
	for _, s := range []suite{suiteP256, suiteHybrid} {
		key := testHPKEKey(t, s, 1)
		msg, err := SealEncrypt(contentHeader{Alg: 3}, []byte("plaintext"), []byte("aad"), key.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		everyFlip(t, msg, func(msg []byte) bool {
			m, err := ParseEncrypt(msg)
			if err != nil {
				return false
			}
			_, err = m.Open(key, []byte("aad"))
			return err == nil
		})
	}
}

// exchanger and decapsulator are keys in hardware: nothing but the operation.
type exchanger struct{ key *ecdh.PrivateKey }

func (e exchanger) PublicKey() *ecdh.PublicKey               { return e.key.PublicKey() }
func (e exchanger) Curve() ecdh.Curve                        { return e.key.Curve() }
func (e exchanger) ECDH(pub *ecdh.PublicKey) ([]byte, error) { return e.key.ECDH(pub) }

type decapsulator struct{ key *mlkem.DecapsulationKey768 }

func (d decapsulator) Encapsulator() crypto.Encapsulator     { return d.key.EncapsulationKey() }
func (d decapsulator) Decapsulate(ct []byte) ([]byte, error) { return d.key.Decapsulate(ct) }

func TestEncryptHardwareKeys(t *testing.T) {
	point, err := ecdh.P256().NewPrivateKey(count(1, 32))
	if err != nil {
		t.Fatal(err)
	}
	lattice, err := mlkem.NewDecapsulationKey768(count(1, 64))
	if err != nil {
		t.Fatal(err)
	}
	p256, err := hpke.NewDHKEMPrivateKey(exchanger{point})
	if err != nil {
		t.Fatal(err)
	}
	hybrid, err := hpke.NewHybridPrivateKey(decapsulator{lattice}, exchanger{point})
	if err != nil {
		t.Fatal(err)
	}
	msg, err := SealEncrypt(contentHeader{Alg: 3}, []byte("plaintext"), nil, p256.PublicKey(), hybrid.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseEncrypt(msg)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []hpke.PrivateKey{p256, hybrid} {
		if got, err := m.Open(key, nil); err != nil || string(got) != "plaintext" {
			t.Errorf("kem %#x: %q, %v", key.KEM().ID(), got, err)
		}
	}
}

func TestEncryptRecipients(t *testing.T) {
	var keys []hpke.PrivateKey
	var pubs []hpke.PublicKey
	for i := range maxRecipients + 1 {
		key := testHPKEKey(t, suiteP256, byte(i))
		keys, pubs = append(keys, key), append(pubs, key.PublicKey())
	}
	header := contentHeader{Alg: 3}
	msg, err := SealEncrypt(header, []byte("plaintext"), nil, pubs[:maxRecipients]...)
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseEncrypt(msg)
	if err != nil {
		t.Fatal(err)
	}
	for i, key := range keys[:maxRecipients] {
		if got, err := m.Open(key, nil); err != nil || string(got) != "plaintext" {
			t.Errorf("recipient %d: %q, %v", i, got, err)
		}
	}
	if _, err := m.Open(keys[maxRecipients], nil); err == nil || !strings.Contains(err.Error(), "not among its 16 recipients") {
		t.Errorf("a key that is no recipient's: %v", err)
	}
	if _, err := m.Open(keys[0], []byte("aad")); err == nil {
		t.Error("opened with other external data")
	}
	x25519, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Open(x25519, nil); err == nil {
		t.Error("opened with an X25519 key")
	}
	for name, seal := range map[string]func() ([]byte, error){
		"nobody":    func() ([]byte, error) { return SealEncrypt(header, nil, nil) },
		"17":        func() ([]byte, error) { return SealEncrypt(header, nil, nil, pubs...) },
		"one twice": func() ([]byte, error) { return SealEncrypt(header, nil, nil, pubs[0], pubs[1], pubs[0]) },
		"X25519":    func() ([]byte, error) { return SealEncrypt(header, nil, nil, x25519.PublicKey()) },
		"A128GCM":   func() ([]byte, error) { return SealEncrypt(contentHeader{Alg: 1}, nil, nil, pubs[0]) },
		"too large": func() ([]byte, error) { return SealEncrypt(header, make([]byte, maxSize), nil, pubs[0]) },
	} {
		if msg, err := seal(); err == nil {
			t.Errorf("%s: sealed %x", name, msg[:20])
		}
	}
}

// TestEncryptIsFresh seals the same twice: no key, IV or encapsulation comes again.
func TestEncryptIsFresh(t *testing.T) {
	pub := testHPKEKey(t, suiteP256, 1).PublicKey()
	var read [2]Encrypt
	for i := range read {
		m, err := ParseEncrypt(must(SealEncrypt(contentHeader{Alg: 3}, []byte("plaintext"), nil, pub)))
		if err != nil {
			t.Fatal(err)
		}
		read[i] = m
	}
	a, b := read[0], read[1]
	if bytes.Equal(a.iv, b.iv) || bytes.Equal(a.ciphertext, b.ciphertext) || bytes.Equal(a.recipients[0].ek, b.recipients[0].ek) {
		t.Error("the same twice")
	}
}

// TestEncryptSwappedRecipient gives a message the entry of another one, whose content
// key the recipient can open, but which is not for this content.
func TestEncryptSwappedRecipient(t *testing.T) {
	key := testHPKEKey(t, suiteP256, 1)
	var read [2]Encrypt
	for i := range read {
		m, err := ParseEncrypt(must(SealEncrypt(contentHeader{Alg: 3}, []byte("plaintext"), nil, key.PublicKey())))
		if err != nil {
			t.Fatal(err)
		}
		read[i] = m
	}
	read[0].recipients = read[1].recipients
	if _, err := read[0].Open(key, nil); err == nil {
		t.Error("opened with the content key of another message")
	}
}

// TestEncryptAlgOfAnotherKey names a hybrid key as recipient of HPKE-0.
func TestEncryptAlgOfAnotherKey(t *testing.T) {
	key := testHPKEKey(t, suiteHybrid, 1)
	m, err := ParseEncrypt(must(SealEncrypt(contentHeader{Alg: 3}, nil, nil, testHPKEKey(t, suiteP256, 1).PublicKey())))
	if err != nil {
		t.Fatal(err)
	}
	m.recipients[0].kid = HPKEKeyID(key.PublicKey())
	if _, err := m.Open(key, nil); err == nil || !strings.Contains(err.Error(), "the recipient's algorithm is 35") {
		t.Errorf("%v, want the algorithm refused", err)
	}
}

func TestParseEncryptRefuses(t *testing.T) {
	kid := count(0, kidSize)
	recipient := func(protected map[any]any, ek, sealed int) []byte {
		b := appendBytes([]byte{0x83}, MustMarshal(protected))
		b = appendBytes(append(b, 0xa1, 0x23), make([]byte, ek))
		return appendBytes(b, make([]byte, sealed))
	}
	ok := recipient(map[any]any{1: AlgHPKE0, 4: kid}, 65, 48)
	build := func(iv, n int, recipients ...[]byte) []byte {
		b := append(appendBytes([]byte{0xd8, 0x60, 0x84}, []byte{0xa1, 1, 3}), 0xa1, 5)
		b = appendBytes(appendBytes(b, make([]byte, iv)), make([]byte, 16))
		return append(appendHead(b, majorArray, n), bytes.Join(recipients, nil)...)
	}
	if _, err := ParseEncrypt(build(12, 1, ok)); err != nil {
		t.Fatal(err)
	}
	for name, msg := range map[string][]byte{
		"iv of 16":              build(16, 1, ok),
		"no iv":                 build(0, 1, ok),
		"no recipient":          build(12, 0),
		"a recipient too few":   build(12, 2, ok),
		"a recipient too many":  build(12, 1, ok, ok),
		"one key twice":         build(12, 2, ok, ok),
		"17 recipients":         build(12, 17, bytes.Repeat(ok, 17)),
		"2^32 recipients":       append(build(12, 0)[:len(build(12, 0))-1], 0x9b, 0, 0, 0, 1, 0, 0, 0, 0),
		"map of recipients":     append(build(12, 0)[:len(build(12, 0))-1], 0xa1),
		"HPKE-1":                build(12, 1, recipient(map[any]any{1: 37, 4: kid}, 65, 48)),
		"direct":                build(12, 1, recipient(map[any]any{1: -6, 4: kid}, 0, 0)),
		"no kid":                build(12, 1, recipient(map[any]any{1: AlgHPKE0}, 65, 48)),
		"short kid":             build(12, 1, recipient(map[any]any{1: AlgHPKE0, 4: kid[1:]}, 65, 48)),
		"a label more":          build(12, 1, recipient(map[any]any{1: AlgHPKE0, 4: kid, -5: kid}, 65, 48)),
		"short ek":              build(12, 1, recipient(map[any]any{1: AlgHPKE0, 4: kid}, 64, 48)),
		"ek of the other":       build(12, 1, recipient(map[any]any{1: AlgHPKEHybrid, 4: kid}, 65, 48)),
		"a content key of 16":   build(12, 1, recipient(map[any]any{1: AlgHPKE0, 4: kid}, 65, 32)),
		"recipients recipients": build(12, 1, append([]byte{0x84}, append(bytes.Clone(ok[1:]), 0x80)...)),
		"COSE_Encrypt0":         append([]byte{0xd0, 0x84}, build(12, 1, ok)[3:]...),
		"too large":             build(12, 1, append(bytes.Clone(ok), make([]byte, maxSize)...)),
	} {
		if _, err := ParseEncrypt(msg); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

package cose

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hpke"
	"errors"
	"testing"
)

type hpkeVectors struct {
	Encrypt0 struct {
		Alg        int64
		SKR        hexBytes `json:"skR_hex"`
		Protected  hexBytes `json:"protected_hex"`
		EK         hexBytes `json:"ek_hex"`
		Ciphertext hexBytes `json:"ciphertext_hex"`
		AAD        string   `json:"external_aad"`
		Plaintext  string
	} `json:"encrypt0_integrated"`
	Encrypt struct {
		Alg        int64
		ContentAlg int64    `json:"content_alg"`
		SKR        hexBytes `json:"skR_hex"`
		Message    hexBytes `json:"message_hex"`
		AAD        string   `json:"external_aad"`
		Plaintext  string
		CEK        hexBytes `json:"cek_hex"`
	} `json:"encrypt_key_encryption"`
}

// TestHPKEEncrypt0Vector opens the integrated-encryption example. We write no such
// messages; the suite and Enc_structure are those of ours.
func TestHPKEEncrypt0Vector(t *testing.T) {
	var all hpkeVectors
	vector(t, "cose-hpke.json", &all)
	v := all.Encrypt0
	if v.Alg != suiteP256.alg {
		t.Fatalf("alg %d", v.Alg)
	}
	key, err := suiteP256.kem.NewPrivateKey(v.SKR)
	if err != nil {
		t.Fatal(err)
	}
	opens := func(protected, ek, ciphertext []byte) bool {
		recipient, err := hpke.NewRecipient(ek, key, suiteP256.kdf, suiteP256.aead, nil)
		if err != nil {
			return false
		}
		plaintext, err := recipient.Open(structure("Encrypt0", protected, []byte(v.AAD)), ciphertext)
		return err == nil && string(plaintext) == v.Plaintext
	}
	everyFlip(t, v.Protected, func(b []byte) bool { return opens(b, v.EK, v.Ciphertext) })
	everyFlip(t, v.EK, func(b []byte) bool { return opens(v.Protected, b, v.Ciphertext) })
	everyFlip(t, v.Ciphertext, func(b []byte) bool { return opens(v.Protected, v.EK, b) })
}

// TestHPKEEncryptVector opens the key-encryption example with what opens our messages.
// It is not one of ours because it has A128GCM, an IV of 16 bytes and a kid that is no
// thumbprint.
func TestHPKEEncryptVector(t *testing.T) {
	var all hpkeVectors
	vector(t, "cose-hpke.json", &all)
	v := all.Encrypt
	if _, err := ParseEncrypt(v.Message); !errors.Is(err, ErrMalformed) {
		t.Errorf("ParseEncrypt: %v, want ErrMalformed", err)
	}
	key, err := suiteP256.kem.NewPrivateKey(v.SKR)
	if err != nil {
		t.Fatal(err)
	}
	open := func(msg []byte) (cek, plaintext []byte, err error) {
		m, err := readEncrypt(msg)
		if err != nil {
			return nil, nil, err
		}
		if len(m.recipients) != 1 || m.recipients[0].alg != v.Alg || string(m.KIDs[0]) != "alice" || len(m.iv) != 16 {
			return nil, nil, errors.New("another recipient or iv")
		}
		if cek, err = m.recipients[0].openKey(key, v.ContentAlg); err != nil {
			return nil, nil, err
		}
		block, err := aes.NewCipher(cek)
		if err != nil {
			return nil, nil, err
		}
		aead, err := cipher.NewGCMWithNonceSize(block, len(m.iv))
		if err != nil {
			return nil, nil, err
		}
		plaintext, err = openSealed(aead, m.iv, "Encrypt", m.Protected, m.ciphertext, []byte(v.AAD))
		return cek, plaintext, err
	}
	cek, plaintext, err := open(v.Message)
	if err != nil || !bytes.Equal(cek, v.CEK) || string(plaintext) != v.Plaintext {
		t.Errorf("content key %x, plaintext %q, %v", cek, plaintext, err)
	}
	everyFlip(t, v.Message, func(msg []byte) bool {
		_, _, err := open(msg)
		return err == nil
	})
}

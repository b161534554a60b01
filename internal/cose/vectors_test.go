package cose

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	gocose "github.com/veraison/go-cose"
)

// hexBytes are bytes as the published vectors spell them.
type hexBytes []byte

func (b *hexBytes) UnmarshalText(text []byte) (err error) {
	*b, err = hex.DecodeString(string(text))
	return err
}

type vectorKey struct{ Crv, X, Y, D, K string }

func (k vectorKey) private(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	d, err := base64.RawURLEncoding.DecodeString(k.D)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), d)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

type signVector struct {
	Fail  bool
	Input struct {
		Sign0 struct{ Key vectorKey }
		Sign  struct{ Signers []struct{ Key vectorKey } }
	}
	Intermediates struct {
		ToBeSign hexBytes `json:"ToBeSign_hex"`
		Signers  []struct {
			ToBeSign hexBytes `json:"ToBeSign_hex"`
		}
	}
	Output struct{ CBOR hexBytes }
}

// signVectors tells of each published example why it is not a message of ours, whether
// it is one that verifyES256, which looks at less of the header, takes, and whether its
// signature is one by ES256 over its ToBeSigned.
var signVectors = map[string]struct {
	outOfProfile string
	verifies     bool
	es256        bool
}{
	"sign1-tests/sign-pass-01.json":    {"alg is unprotected, there is no typ", false, true},
	"sign1-tests/sign-pass-02.json":    {"there is external data, the kid is unprotected, there is no typ", false, true},
	"sign1-tests/sign-pass-03.json":    {"there is no tag", false, true},
	"sign1-tests/sign-fail-01.json":    {"tag 998", false, false},
	"sign1-tests/sign-fail-02.json":    {"the kid is unprotected, there is no typ; the payload was changed", false, false},
	"sign1-tests/sign-fail-03.json":    {"alg -999", false, false},
	"sign1-tests/sign-fail-04.json":    {"alg unknown", false, false},
	"sign1-tests/sign-fail-06.json":    {"a protected label was added", false, false},
	"sign1-tests/sign-fail-07.json":    {"a protected label was removed", false, false},
	"ecdsa-examples/ecdsa-sig-01.json": {"there is a content type, the kid is unprotected, there is no typ", true, true},
	"ecdsa-examples/ecdsa-sig-02.json": {"P-384 with ES384", false, false},
	"ecdsa-examples/ecdsa-sig-03.json": {"P-521 with ES512", false, false},
	"ecdsa-examples/ecdsa-sig-04.json": {"P-256 with ES512", false, false},
	"ecdsa-examples/ecdsa-01.json":     {"COSE_Sign, with many signers", false, true},
	"ecdsa-examples/ecdsa-02.json":     {"COSE_Sign; P-384 with ES384", false, false},
	"ecdsa-examples/ecdsa-03.json":     {"COSE_Sign; P-521 with ES512", false, false},
	"ecdsa-examples/ecdsa-04.json":     {"COSE_Sign; P-256 with ES512", false, false},
}

func TestSignVectors(t *testing.T) {
	wantAll(t, signVectors, "sign1-tests", "ecdsa-examples")
	for name, want := range signVectors {
		t.Run(name, func(t *testing.T) {
			var v signVector
			vector(t, name, &v)
			msg, toBeSigned, key := v.Output.CBOR, v.Intermediates.ToBeSign, v.Input.Sign0.Key
			if len(v.Input.Sign.Signers) > 0 {
				toBeSigned, key = v.Intermediates.Signers[0].ToBeSign, v.Input.Sign.Signers[0].Key
			}
			if _, _, err := Peek1(msg); !errors.Is(err, ErrMalformed) {
				t.Errorf("Peek1: %v, want ErrMalformed: %s", err, want.outOfProfile)
			}
			if key.Crv != "P-256" {
				return // no key of ours
			}
			priv := key.private(t)
			if _, err := Verify1(&priv.PublicKey, testTyp, msg); !errors.Is(err, ErrMalformed) {
				t.Errorf("Verify1: %v, want ErrMalformed: %s", err, want.outOfProfile)
			}
			if err := verifyES256(&priv.PublicKey, msg); (err == nil) != want.verifies || v.Fail && err == nil {
				t.Errorf("verifyES256: %v, want ok %v", err, want.verifies)
			}
			verifier, err := gocose.NewVerifier(gocose.AlgorithmES256, &priv.PublicKey)
			if err != nil {
				t.Fatal(err)
			}
			if want.es256 {
				if err := verifier.Verify(toBeSigned, msg[len(msg)-sigSize:]); err != nil {
					t.Errorf("the published signature: %v", err)
				}
			}
			ours, err := signer{detSigner{priv}}.Sign(nil, toBeSigned)
			if err != nil {
				t.Fatal(err)
			}
			if err := verifier.Verify(toBeSigned, ours); err != nil {
				t.Errorf("our signature: %v", err)
			}
		})
	}
}

type gcmVector struct {
	Fail  bool
	Input struct {
		Plaintext string
		Enveloped *struct {
			Unsent struct {
				IV hexBytes `json:"IV_hex"`
			}
		}
	}
	Intermediates struct {
		AAD hexBytes `json:"AAD_hex"`
		CEK hexBytes `json:"CEK_hex"`
	}
	Output struct{ CBOR hexBytes }
}

// gcmVectors tells of each published example why it is not a message of ours.
var gcmVectors = map[string]string{
	"aes-gcm-examples/aes-gcm-01.json":     "A128GCM, a direct recipient",
	"aes-gcm-examples/aes-gcm-02.json":     "A192GCM, a direct recipient",
	"aes-gcm-examples/aes-gcm-03.json":     "a direct recipient",
	"aes-gcm-examples/aes-gcm-04.json":     "A128GCM, a direct recipient; the tag was changed",
	"aes-gcm-examples/aes-gcm-05.json":     "A128GCM, a direct recipient, a partial IV",
	"aes-gcm-examples/aes-gcm-enc-01.json": "A128GCM, an unprotected IV",
	"aes-gcm-examples/aes-gcm-enc-02.json": "A192GCM, an unprotected IV",
	"aes-gcm-examples/aes-gcm-enc-03.json": "an unprotected IV",
	"aes-gcm-examples/aes-gcm-enc-04.json": "A128GCM, an unprotected IV; the tag was changed",
}

func TestGCMVectors(t *testing.T) {
	wantAll(t, gcmVectors, "aes-gcm-examples")
	for name, outOfProfile := range gcmVectors {
		t.Run(name, func(t *testing.T) {
			var v gcmVector
			vector(t, name, &v)
			msg := []byte(v.Output.CBOR)
			if _, err := ParseEncrypt0(msg); !errors.Is(err, ErrMalformed) {
				t.Errorf("ParseEncrypt0: %v, want ErrMalformed: %s", err, outOfProfile)
			}
			if _, err := ParseEncrypt(msg); !errors.Is(err, ErrMalformed) {
				t.Errorf("ParseEncrypt: %v, want ErrMalformed: %s", err, outOfProfile)
			}
			context := "Encrypt0"
			if v.Input.Enveloped != nil {
				context = "Encrypt"
			}
			protected, iv, ciphertext := vectorContent(t, msg)
			if iv == nil {
				iv = v.Input.Enveloped.Unsent.IV
			}
			if got := structure(context, protected, nil); !bytes.Equal(got, v.Intermediates.AAD) {
				t.Errorf("Enc_structure %x, want %x", got, v.Intermediates.AAD)
			}
			aead := testGCM(t, v.Intermediates.CEK)
			plaintext, err := openSealed(aead, iv, context, protected, ciphertext, nil)
			if v.Fail {
				if err == nil {
					t.Error("opened")
				}
				return
			}
			if err != nil || string(plaintext) != v.Input.Plaintext {
				t.Errorf("opened %q, %v", plaintext, err)
			}
			again := appendSealed(nil, aead, iv, context, protected, plaintext, nil)
			if !bytes.Equal(again, appendBytes(nil, ciphertext)) {
				t.Errorf("sealed %x, want %x", again, ciphertext)
			}
		})
	}
}

// vectorContent takes protected header, IV (nil if there is none) and ciphertext out of
// a published message: with our own reader, and, to know that the reader is right, with
// the library.
func vectorContent(t *testing.T, msg []byte) (protected, iv, ciphertext []byte) {
	t.Helper()
	var tag cbor.RawTag
	var parts []Raw
	var unprotected map[int][]byte
	for _, err := range []error{
		Unmarshal(msg, &tag), Unmarshal(tag.Content, &parts),
		Unmarshal(parts[0], &protected), Unmarshal(parts[1], &unprotected), Unmarshal(parts[2], &ciphertext),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if unprotected[5] == nil {
		return protected, nil, ciphertext
	}
	r := &reader{data: tag.Content[1:]}
	p, i, c := r.content()
	if r.err != nil || !bytes.Equal(p, protected) || !bytes.Equal(i, unprotected[5]) || !bytes.Equal(c, ciphertext) {
		t.Errorf("our reader reads %x, %x, %x, %v", p, i, c, r.err)
	}
	return protected, unprotected[5], ciphertext
}

// wantAll fails when a table does not name every vector of these folders.
func wantAll[T any](t *testing.T, table map[string]T, folders ...string) {
	t.Helper()
	found := 0
	for _, folder := range folders {
		entries, err := os.ReadDir(filepath.Join(vectorDir(t), folder))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), ".json") {
				continue
			}
			found++
			if _, ok := table[folder+"/"+e.Name()]; !ok {
				t.Errorf("%s/%s is not in the table", folder, e.Name())
			}
		}
	}
	if found != len(table) {
		t.Errorf("found %d vectors, the table has %d", found, len(table))
	}
}

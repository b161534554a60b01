package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/mlkem"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"pgregory.net/rapid"
)

var (
	_ crypto.Signer     = (*Key)(nil)
	_ ecdh.KeyExchanger = (*Key)(nil)
)

func TestSign(t *testing.T) {
	d := open(t)
	key, blob := newKey(t, d, Signing)
	digest := sha256.Sum256([]byte("text"))
	sig := must(key.Sign(rand.Reader, digest[:], crypto.SHA256))(t)
	pub := key.Public().(*ecdsa.PublicKey)
	if !ecdsa.VerifyASN1(pub, digest[:], sig) {
		t.Error("the signature does not verify")
	}
	if !pub.Equal(must(PublicKey(blob.Public))(t)) {
		t.Error("the blob is of another key")
	}
	for name, f := range map[string]func() ([]byte, error){
		"another hash":   func() ([]byte, error) { return key.Sign(nil, digest[:], crypto.SHA384) },
		"a short digest": func() ([]byte, error) { return key.Sign(nil, digest[:31], crypto.SHA256) },
		"no hash":        func() ([]byte, error) { return key.Sign(nil, digest[:], nil) },
		"an agreement":   func() ([]byte, error) { return key.ECDH(must(ecdh.P256().GenerateKey(rand.Reader))(t).PublicKey()) },
	} {
		if _, err := f(); err == nil {
			t.Errorf("%s by a signing key", name)
		}
	}
	wrong := must(d.Key(blob, measured, auth(3)))(t)
	if _, err := wrong.Sign(nil, digest[:], crypto.SHA256); err == nil || errors.Is(err, ErrPolicy) {
		t.Errorf("another auth value: %v", err)
	}
	fewer := must(d.Key(blob, measured[:1], auth(2)))(t)
	if _, err := fewer.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, ErrPolicy) {
		t.Errorf("fewer PCRs: %v", err)
	}
	extend(t, d, measured[1], "something else boots")
	if _, err := key.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, ErrPolicy) {
		t.Errorf("in another state: %v", err)
	}
}

func TestECDH(t *testing.T) {
	d := open(t)
	key, _ := newKey(t, d, Agreement)
	point := must(key.PublicKey().Curve().NewPublicKey(key.PublicKey().Bytes()))(t)
	var zeros int
	for i := 0; zeros < 2 || i < 4; i++ { // one secret in 256 starts with a zero byte
		peer := must(ecdh.P256().GenerateKey(rand.Reader))(t)
		want := must(peer.ECDH(point))(t)
		if want[0] != 0 && i >= 4 {
			continue
		}
		if want[0] == 0 {
			zeros++
		}
		if got := must(key.ECDH(peer.PublicKey()))(t); !bytes.Equal(got, want) {
			t.Errorf("got %x, in software %x", got, want)
		}
	}
	if _, err := key.ECDH(must(ecdh.X25519().GenerateKey(rand.Reader))(t).PublicKey()); err == nil {
		t.Error("an agreement on another curve")
	}
	if _, err := key.Sign(nil, qualifying, crypto.SHA256); err == nil {
		t.Error("a signature by an agreement key")
	}
	extend(t, d, measured[0], "something else boots")
	if _, err := key.ECDH(point); !errors.Is(err, ErrPolicy) {
		t.Errorf("in another state: %v", err)
	}
}

func TestHybridHPKE(t *testing.T) {
	d := open(t)
	half, _ := newKey(t, d, Agreement)
	pq := must(mlkem.NewDecapsulationKey768(bytes.Repeat([]byte{5}, 64)))(t)
	key := must(hpke.NewHybridPrivateKey(pq, half))(t)
	if id := key.KEM().ID(); id != 0x0050 {
		t.Errorf("KEM %#x", id)
	}
	pub := must(hpke.MLKEM768P256().NewPublicKey(key.PublicKey().Bytes()))(t)
	sealed := must(hpke.Seal(pub, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("info"), []byte("secret")))(t)
	open := func(key hpke.PrivateKey) ([]byte, error) {
		return hpke.Open(key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("info"), sealed)
	}
	if got := must(open(key))(t); string(got) != "secret" {
		t.Errorf("opened %q", got)
	}
	other, _ := newKey(t, d, Agreement)
	if _, err := open(must(hpke.NewHybridPrivateKey(pq, other))(t)); err == nil {
		t.Error("opened with another half")
	}
}

func TestNewKeyRefuses(t *testing.T) {
	d := open(t)
	for name, pcrs := range map[string][]int{"none": nil, "unmeasured": unmeasured, "16": {0, 16}, "23": {0, 23}, "24": {0, 24}, "negative": {-1}} {
		if _, err := d.NewKey(Signing, pcrs, auth(2)); err == nil {
			t.Errorf("a key for PCRs %s", name)
		}
		if _, err := d.Seal([]byte("x"), pcrs); err == nil && len(pcrs) > 0 {
			t.Errorf("sealed to PCRs %s", name)
		}
		if _, err := d.DefineNV(pcrs, auth(4), qualifying); err == nil {
			t.Errorf("NV for PCRs %s", name)
		}
	}
}

func TestCheckPCRs(t *testing.T) {
	zero, ones, value := make([]byte, 32), bytes.Repeat([]byte{0xff}, 32), bytes.Repeat([]byte{1}, 32)
	for _, tt := range []struct {
		values map[int][]byte
		ok     bool
	}{
		{nil, false},
		{map[int][]byte{0: zero, 1: zero}, false},
		{map[int][]byte{0: zero, 17: ones}, false},
		{map[int][]byte{0: value, 16: value}, false},
		{map[int][]byte{0: value, 23: value}, false},
		{map[int][]byte{0: value, 24: value}, false},
		{map[int][]byte{-1: value}, false},
		{map[int][]byte{0: zero, 7: value}, true},
		{map[int][]byte{0: value}, true},
	} {
		if err := CheckPCRs(tt.values); (err == nil) != tt.ok {
			t.Errorf("%v: %v", tt.values, err)
		}
	}
}

func TestAuthValue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		material := [32]byte(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "material"))
		got := AuthValue(material)
		if len(got) != 32 || slices.Contains(got, 0) {
			t.Fatalf("%x", got)
		}
		for i, b := range material {
			if b != 0 && got[i] != b {
				t.Fatalf("byte %d of %x became %x", i, material, got)
			}
		}
	})
}

// The policy of the example of TPM 2.0 Part 1 §19.7 is extended from zeros; a digest that
// is of no values, or in another order, would show in the objects of the other tests.
func TestPolicyDigest(t *testing.T) {
	a, b := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	digests := [][]byte{
		PolicyDigest(map[int][]byte{0: a}, false),
		PolicyDigest(map[int][]byte{0: a}, true),
		PolicyDigest(map[int][]byte{1: a}, true),
		PolicyDigest(map[int][]byte{0: b}, true),
		PolicyDigest(map[int][]byte{0: a, 1: b}, true),
		PolicyDigest(map[int][]byte{0: b, 1: a}, true),
		PolicyDigest(nil, true),
		PolicyDigest(nil, false),
	}
	for i, d := range digests {
		for j := range i {
			if bytes.Equal(d, digests[j]) {
				t.Errorf("%d and %d are the same", i, j)
			}
		}
	}
	if !bytes.Equal(digests[7], make([]byte, 32)) {
		t.Error("the empty policy is not zeros")
	}
}

func TestPublicKeyOfAnotherKind(t *testing.T) {
	for _, b := range [][]byte{nil, {1}, make([]byte, 100)} {
		if _, err := PublicKey(b); err == nil {
			t.Errorf("%x is a key", b)
		}
		if _, err := Name(b); err == nil {
			t.Errorf("%x has a name", b)
		}
	}
	p384 := keyTemplate(Signing, nil)
	parms := must(p384.Parameters.ECCDetail())(t)
	parms.CurveID = tpm2.TPMECCNistP384
	if _, err := PublicKey(tpm2.Marshal(p384)); err == nil {
		t.Error("a P-384 key")
	}
}

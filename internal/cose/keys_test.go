package cose

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"encoding/hex"
	"errors"
	"testing"
)

func TestKeyGolden(t *testing.T) {
	pub := &testKey(t, 1).PublicKey
	want := golden(t, "key.golden")
	if got := MarshalKey(pub); !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
	got, err := UnmarshalKey(want)
	if err != nil || !got.Equal(pub) {
		t.Errorf("UnmarshalKey: %v, %v", got, err)
	}
	everyCut(t, want, func(b []byte) error {
		_, err := UnmarshalKey(b)
		return err
	})
	everyFlip(t, want, func(b []byte) bool {
		got, err := UnmarshalKey(b)
		return err == nil && got.Equal(pub) // a flip may reach another point
	})
}

// TestThumbprint is the example of RFC 9679 §6.
func TestThumbprint(t *testing.T) {
	key := unhex(t, "a4 0102 2001"+
		"215820 65eda5a12577c2bae829437fe338701a10aaa375e1bb5b5de108de439c08551d"+
		"225820 1e52ed75701163f7f9e40ddf9f341b3dc9ba860af7e0ca7ca7e9eecd0084d19c")
	pub, err := UnmarshalKey(key)
	if err != nil {
		t.Fatal(err)
	}
	const want = "496bd8afadf307e5b08c64b0421bf9dc01528a344a43bda88fadd1669da253ec"
	if got := hex.EncodeToString(Thumbprint(pub)); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	point, err := pub.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	same, err := hpke.NewDHKEMPublicKey(point)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(HPKEKeyID(same)); got != want {
		t.Errorf("as an HPKE key: got %s, want %s, which is without alg", got, want)
	}
}

func TestHPKEKeyGolden(t *testing.T) {
	for name, pub := range map[string]hpke.PublicKey{
		"hpkekey.golden":   testHPKEKey(t, suiteP256, 0xa0).PublicKey(),
		"hybridkey.golden": testHPKEKey(t, suiteHybrid, 0xc0).PublicKey(),
	} {
		want := golden(t, name)
		if got := MarshalHPKEKey(pub); !bytes.Equal(got, want) {
			t.Errorf("%s: got %x, want %x", name, got, want)
		}
		got, err := UnmarshalHPKEKey(want)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got.KEM().ID() != pub.KEM().ID() || !bytes.Equal(got.Bytes(), pub.Bytes()) || !bytes.Equal(HPKEKeyID(got), HPKEKeyID(pub)) {
			t.Errorf("%s: read another key", name)
		}
		everyCut(t, want, func(b []byte) error {
			_, err := UnmarshalHPKEKey(b)
			return err
		})
	}
}

func TestKeyRefuses(t *testing.T) {
	key := golden(t, "key.golden")
	x, y := key[8:40], key[43:75]
	p256, hybrid := golden(t, "hpkekey.golden"), golden(t, "hybridkey.golden")
	badCoefficient := bytes.Clone(hybrid)
	copy(badCoefficient[13:], []byte{0xff, 0xff, 0xff})
	badPoint := bytes.Clone(hybrid)
	badPoint[len(badPoint)-1] ^= 1
	for name, b := range map[string][]byte{
		"not on the curve":        MustMarshal(map[any]any{1: 2, -1: 1, -2: x, -3: x}),
		"zero":                    MustMarshal(map[any]any{1: 2, -1: 1, -2: make([]byte, 32), -3: make([]byte, 32)}),
		"above the field":         MustMarshal(map[any]any{1: 2, -1: 1, -2: bytes.Repeat([]byte{0xff}, 32), -3: y}),
		"compressed":              MustMarshal(map[any]any{1: 2, -1: 1, -2: x, -3: true}),
		"no y":                    MustMarshal(map[any]any{1: 2, -1: 1, -2: x}),
		"short x":                 MustMarshal(map[any]any{1: 2, -1: 1, -2: x[1:], -3: y}),
		"long x":                  MustMarshal(map[any]any{1: 2, -1: 1, -2: append([]byte{0}, x...), -3: y}),
		"P-384":                   MustMarshal(map[any]any{1: 2, -1: 2, -2: x, -3: y}),
		"OKP":                     MustMarshal(map[any]any{1: 1, -1: 1, -2: x, -3: y}),
		"with a kid":              MustMarshal(map[any]any{1: 2, 2: []byte("k"), -1: 1, -2: x, -3: y}),
		"with alg ES256":          MustMarshal(map[any]any{1: 2, 3: -7, -1: 1, -2: x, -3: y}),
		"with the private part":   MustMarshal(map[any]any{1: 2, -1: 1, -2: x, -3: y, -4: x}),
		"hybrid of another alg":   MustMarshal(map[any]any{1: 7, 3: -65617, -1: hybrid[13:]}),
		"hybrid of HPKE-0":        MustMarshal(map[any]any{1: 7, 3: AlgHPKE0, -1: hybrid[13:]}),
		"hybrid, short":           MustMarshal(map[any]any{1: 7, 3: AlgHPKEHybrid, -1: hybrid[14:]}),
		"hybrid, bad coefficient": badCoefficient,
		"hybrid, bad point":       badPoint,
		"hybrid with a seed":      MustMarshal(map[any]any{1: 7, 3: AlgHPKEHybrid, -1: hybrid[13:], -2: x}),
		"HPKE, not on the curve":  MustMarshal(map[any]any{1: 2, 3: AlgHPKE0, -1: 1, -2: x, -3: x}),
		"nothing":                 nil,
	} {
		if _, err := UnmarshalKey(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: UnmarshalKey: %v, want ErrMalformed", name, err)
		}
		if _, err := UnmarshalHPKEKey(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: UnmarshalHPKEKey: %v, want ErrMalformed", name, err)
		}
	}
	// A key for one use is not a key for the other.
	if _, err := UnmarshalKey(p256); !errors.Is(err, ErrMalformed) {
		t.Errorf("HPKE key for ECDSA: %v, want ErrMalformed", err)
	}
	if _, err := UnmarshalHPKEKey(golden(t, "key.golden")); !errors.Is(err, ErrMalformed) {
		t.Errorf("ECDSA key for HPKE: %v, want ErrMalformed", err)
	}
}

func TestKeyPanics(t *testing.T) {
	x25519, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"nil key":         func() { MarshalKey(nil) },
		"P-384 key":       func() { Thumbprint(&ecdsa.PublicKey{Curve: elliptic.P384()}) },
		"HPKE X25519":     func() { MarshalHPKEKey(x25519.PublicKey()) },
		"HPKE X25519, id": func() { HPKEKeyID(x25519.PublicKey()) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: did not panic", name)
				}
			}()
			f()
		}()
	}
}

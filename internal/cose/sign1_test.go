package cose

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"strings"
	"testing"
)

func TestSign1Golden(t *testing.T) {
	want, key := golden(t, "sign1.golden"), testKey(t, 1)
	got, err := Sign1(detSigner{key}, testTyp, []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
	header, payload, err := Peek1(want)
	if err != nil || header.Typ != testTyp || !bytes.Equal(header.KID, Thumbprint(&key.PublicKey)) || string(payload) != "payload" {
		t.Errorf("Peek1: %+v, %q, %v", header, payload, err)
	}
	everyFlip(t, want, func(msg []byte) bool {
		_, err := Verify1(&key.PublicKey, testTyp, msg)
		return err == nil
	})
	everyCut(t, want, func(msg []byte) error {
		_, _, err := Peek1(msg)
		return err
	})
}

func TestSign1RoundTrip(t *testing.T) {
	key := testKey(t, 1)
	for _, size := range []int{0, 1, 23, 24, 255, 256, 65535, 65536, maxSize - 300} {
		payload := make([]byte, size)
		msg, err := Sign1(key, testTyp, payload)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Verify1(&key.PublicKey, testTyp, msg)
		if err != nil || !bytes.Equal(got, payload) {
			t.Errorf("%d bytes: read %d, %v", size, len(got), err)
		}
	}
	if msg, err := Sign1(key, testTyp, nil); err != nil || !bytes.Contains(msg, []byte{0xa0, 0x40, 0x58, 0x40}) {
		t.Errorf("nil payload: %x, %v; want an empty attached payload", msg, err)
	}
	if _, err := Sign1(key, testTyp, make([]byte, maxSize)); err == nil {
		t.Error("signed more than Verify1 reads")
	}
}

func TestVerify1Refuses(t *testing.T) {
	key, other := testKey(t, 1), testKey(t, 2)
	msg, err := Sign1(key, testTyp, []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := bytes.Clone(msg) // names the other key, is signed by key
	copy(forged[bytes.Index(forged, Thumbprint(&key.PublicKey)):], Thumbprint(&other.PublicKey))
	for name, tt := range map[string]struct {
		pub  *ecdsa.PublicKey
		typ  string
		msg  []byte
		want string
	}{
		"other typ":      {&key.PublicKey, "application/other", msg, "the message is a " + testTyp},
		"no typ":         {&key.PublicKey, "", msg, "the message is a " + testTyp},
		"other key":      {&other.PublicKey, testTyp, msg, "names key"},
		"other key, kid": {&other.PublicKey, testTyp, forged, "signature is not by this key"},
		"P-384 key":      {&p384.PublicKey, testTyp, msg, "not on curve P-256"},
		"no key":         {nil, testTyp, msg, "not on curve P-256"},
	} {
		_, err := Verify1(tt.pub, tt.typ, tt.msg)
		if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ...%s...", name, err, tt.want)
		}
	}
}

// TestPeek1Refuses signs headers that are not ours with the right key: form is checked
// whether or not the signature holds.
func TestPeek1Refuses(t *testing.T) {
	kid := make([]byte, kidSize)
	header := func(pairs map[any]any) []byte { return MustMarshal(pairs) }
	build := func(protected, unprotected, payload []byte, sigSize int) []byte {
		msg := append(appendBytes([]byte{0xd2, 0x84}, protected), unprotected...)
		return appendBytes(append(msg, payload...), make([]byte, sigSize))
	}
	ok := header(map[any]any{1: -7, 4: kid, 16: testTyp})
	if _, _, err := Peek1(build(ok, []byte{0xa0}, []byte{0x40}, 64)); err != nil {
		t.Fatal(err)
	}
	for name, msg := range map[string][]byte{
		"alg ES384":           build(header(map[any]any{1: -35, 4: kid, 16: testTyp}), []byte{0xa0}, []byte{0x40}, 64),
		"alg ESP256":          build(header(map[any]any{1: -9, 4: kid, 16: testTyp}), []byte{0xa0}, []byte{0x40}, 64),
		"alg as text":         build(header(map[any]any{1: "ES256", 4: kid, 16: testTyp}), []byte{0xa0}, []byte{0x40}, 64),
		"no kid":              build(header(map[any]any{1: -7, 16: testTyp}), []byte{0xa0}, []byte{0x40}, 64),
		"short kid":           build(header(map[any]any{1: -7, 4: kid[1:], 16: testTyp}), []byte{0xa0}, []byte{0x40}, 64),
		"no typ":              build(header(map[any]any{1: -7, 4: kid}), []byte{0xa0}, []byte{0x40}, 64),
		"typ as number":       build(header(map[any]any{1: -7, 4: kid, 16: 60}), []byte{0xa0}, []byte{0x40}, 64),
		"typ with a newline":  build(header(map[any]any{1: -7, 4: kid, 16: "a/b\nc"}), []byte{0xa0}, []byte{0x40}, 64),
		"crit":                build(header(map[any]any{1: -7, 2: []int{4}, 4: kid, 16: testTyp}), []byte{0xa0}, []byte{0x40}, 64),
		"a label more":        build(header(map[any]any{1: -7, 4: kid, 16: testTyp, -70000: 1}), []byte{0xa0}, []byte{0x40}, 64),
		"empty header":        build(nil, []byte{0xa0}, []byte{0x40}, 64),
		"unprotected kid":     build(ok, append([]byte{0xa1, 4, 0x58, 32}, kid...), []byte{0x40}, 64),
		"detached payload":    build(ok, []byte{0xa0}, []byte{0xf6}, 64),
		"payload as text":     build(ok, []byte{0xa0}, []byte{0x60}, 64),
		"payload length long": build(ok, []byte{0xa0}, []byte{0x58, 0}, 64),
		"signature of 63":     build(ok, []byte{0xa0}, []byte{0x40}, 63),
		"signature of 65":     build(ok, []byte{0xa0}, []byte{0x40}, 65),
		"no tag":              build(ok, []byte{0xa0}, []byte{0x40}, 64)[1:],
		"tag in long form":    append([]byte{0xd8, 0x12}, build(ok, []byte{0xa0}, []byte{0x40}, 64)[1:]...),
		"tag twice":           append([]byte{0xd2}, build(ok, []byte{0xa0}, []byte{0x40}, 64)...),
		"CWT tag 61":          append([]byte{0xd8, 61}, build(ok, []byte{0xa0}, []byte{0x40}, 64)...),
		"COSE_Mac0":           append([]byte{0xd1}, build(ok, []byte{0xa0}, []byte{0x40}, 64)[1:]...),
		"too large":           build(ok, []byte{0xa0}, appendBytes(nil, make([]byte, maxSize)), 64),
	} {
		if _, _, err := Peek1(msg); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

func TestTyp(t *testing.T) {
	key := testKey(t, 1)
	for _, typ := range []string{"", "a", "a/", "/a", "a/b/c", "a/b c", " a/b", "a/b\x00", "a/b\x7f", "a/ü", "a/\xff", "a/" + strings.Repeat("b", 127)} {
		if _, err := Sign1(key, typ, nil); err == nil {
			t.Errorf("Sign1 takes typ %q", typ)
		}
		if _, err := Mac0(make([]byte, 32), typ, nil); err == nil {
			t.Errorf("Mac0 takes typ %q", typ)
		}
	}
	longest := "a/" + strings.Repeat("b", 126)
	msg, err := Sign1(key, longest, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Verify1(&key.PublicKey, longest, msg); err != nil {
		t.Error(err)
	}
}

// answers is a hardware key that answers as it is told.
type answers struct {
	pub crypto.PublicKey
	der []byte
	err error
}

func (a answers) Public() crypto.PublicKey { return a.pub }

func (a answers) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return a.der, a.err }

func TestSign1Keys(t *testing.T) {
	p256 := &testKey(t, 1).PublicKey
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der := func(r, s int64) []byte {
		return must(asn1.Marshal(struct{ R, S *big.Int }{big.NewInt(r), big.NewInt(s)}))
	}
	huge := must(asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).Lsh(big.NewInt(1), 256), big.NewInt(1)}))
	for name, key := range map[string]crypto.Signer{
		"P-384":          p384,
		"Ed25519":        ed25519.NewKeyFromSeed(make([]byte, 32)),
		"no public key":  answers{der: der(1, 1)},
		"refuses":        answers{pub: p256, err: errors.New("locked")},
		"no DER":         answers{pub: p256, der: make([]byte, 64)},
		"nothing":        answers{pub: p256},
		"bytes after":    answers{pub: p256, der: append(der(1, 1), 0)},
		"zero":           answers{pub: p256, der: der(0, 1)},
		"negative":       answers{pub: p256, der: der(1, -1)},
		"more than P256": answers{pub: p256, der: huge},
	} {
		if msg, err := Sign1(key, testTyp, nil); err == nil {
			t.Errorf("%s: signed %x", name, msg)
		}
	}
	// Short numbers are padded on the left.
	msg, err := Sign1(answers{pub: p256, der: der(1, 0x0203)}, testTyp, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := append(append(make([]byte, 31), 1), append(make([]byte, 30), 2, 3)...)
	if got := msg[len(msg)-64:]; !bytes.Equal(got, want) {
		t.Errorf("signature %x, want %x", got, want)
	}
}

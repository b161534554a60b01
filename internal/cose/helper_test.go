package cose

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const testTyp = "application/vnd.edgekeep.test+cbor"

// detSigner signs as RFC 6979 says, so that golden bytes stay the same, and behaves as
// a hardware key: all that is known of it is crypto.Signer.
type detSigner struct{ key *ecdsa.PrivateKey }

func (s detSigner) Public() crypto.PublicKey { return s.key.Public() }

func (s detSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts != crypto.SHA256 || len(digest) != 32 {
		return nil, errors.New("expected a SHA-256 digest and its hash function")
	}
	return s.key.Sign(nil, digest, opts)
}

// count is n bytes first, first+1, ...
func count(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func testKey(t testing.TB, first byte) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), count(first, 32))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func testHPKEKey(t testing.TB, s suite, first byte) hpke.PrivateKey {
	t.Helper()
	key, err := s.kem.DeriveKeyPair(count(first, 32))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// golden reads testdata/name: bytes in hex, and after each # what they are.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		digits, _, _ := strings.Cut(lines.Text(), "#")
		all = append(all, unhex(t, strings.TrimSpace(digits))...)
	}
	return all
}

// vector decodes the published test vector cose/name into v.
func vector(t testing.TB, name string, v any) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(vectorDir(t), name))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func vectorDir(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	candidates := []string{os.Getenv("EDGEKEEP_VECTORS")}
	for ; candidates[0] == "" && dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		candidates = append(candidates, filepath.Join(dir, "..", "shared", "vectors"))
	}
	for _, c := range candidates {
		if _, err := os.Stat(filepath.Join(c, "cose")); c != "" && err == nil {
			return filepath.Join(c, "cose")
		}
	}
	t.Skip("the published vectors are not here: set EDGEKEEP_VECTORS to their folder")
	return ""
}

// everyFlip calls accepts with msg after flipping each of its bits, and fails when one
// is accepted. Longer messages get one bit flipped in each byte.
func everyFlip(t *testing.T, msg []byte, accepts func(msg []byte) bool) {
	t.Helper()
	if !accepts(msg) {
		t.Fatal("the message itself is refused")
	}
	for i := range msg {
		for bit := range 8 {
			if len(msg) > 600 && bit != i%8 {
				continue
			}
			changed := bytes.Clone(msg)
			changed[i] ^= 1 << bit
			if accepts(changed) {
				t.Errorf("accepted with bit %d of byte %d flipped", bit, i)
			}
		}
	}
}

// everyCut fails when a part of msg, or msg with a byte more, is not malformed.
func everyCut(t *testing.T, msg []byte, decode func(msg []byte) error) {
	t.Helper()
	for n := range msg {
		if err := decode(msg[:n]); !errors.Is(err, ErrMalformed) {
			t.Fatalf("first %d of %d bytes: %v, want ErrMalformed", n, len(msg), err)
		}
	}
	if err := decode(append(bytes.Clone(msg), 0)); !errors.Is(err, ErrMalformed) {
		t.Errorf("a byte more: %v, want ErrMalformed", err)
	}
}

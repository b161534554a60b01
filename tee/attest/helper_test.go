package attest

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// detSigner signs as RFC 6979 says, so that golden bytes stay the same.
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

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func testKey(t testing.TB, first byte) *ecdsa.PrivateKey {
	t.Helper()
	return must(ecdsa.ParseRawPrivateKey(elliptic.P256(), count(first, 32)))(t)
}

// golden reads testdata/name: bytes in hex, and after each # what they are.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	text := must(os.ReadFile(filepath.Join("testdata", name)))(t)
	var all []byte
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		digits, _, _ := strings.Cut(lines.Text(), "#")
		all = append(all, must(hex.DecodeString(strings.ReplaceAll(digits, " ", "")))(t)...)
	}
	return all
}

func wantReason(t *testing.T, name string, err error, reason string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s: %v; want %q", name, err, reason)
	}
}

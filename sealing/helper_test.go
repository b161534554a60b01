package sealing

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
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

func testHPKEKey(t testing.TB, kem hpke.KEM, first byte) hpke.PrivateKey {
	t.Helper()
	return must(kem.DeriveKeyPair(count(first, 32)))(t)
}

func p256() hpke.KEM { return hpke.DHKEM(ecdh.P256()) }

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

// What the golden messages are about.
const (
	testSubject = "acme/gw7"
	testStream  = "press-3"
	epochSigner = 1  // first byte of the epoch key
	fleetSigner = 33 // of the fleet's key
)

var testEpoch = NewEpoch(5, [8]byte(count(0xe0, 8)))

func testAEAD(t testing.TB) cipher.AEAD {
	t.Helper()
	return must(NewAEAD(count(0x40, 32)))(t)
}

func testReadings() []Reading {
	const at = 1750000000123456789
	return []Reading{
		{Name: "press/line.3/temperature", Unit: "Cel", Time: at, Value: 71.5},
		{Name: "press/line.3/strokes", Time: at, Value: int64(1200)},
		{Name: "press/line.3/state", Time: at + 1, Value: "run"},
		{Name: "press/line.3/door", Time: at + 1, Value: false},
	}
}

func pack(t testing.TB, readings ...Reading) []byte {
	t.Helper()
	var p Pack
	for _, r := range readings {
		p.Add(r)
	}
	return p.Marshal()
}

// chain seals n records of the test's stream, from seq 0 on.
func chain(t testing.TB, n int) [][]byte {
	t.Helper()
	var records [][]byte
	prev := make([]byte, 32)
	for seq := range n {
		r := must(SealRecord(testAEAD(t), testStream, testEpoch, uint64(seq), prev, nil, pack(t, testReadings()...), false))(t)
		records, prev = append(records, r), Hash(r)
	}
	return records
}

// checkpointOf is the checkpoint that covers the last of the records, the seq-th.
func checkpointOf(records [][]byte, seq uint64) Checkpoint {
	return Checkpoint{Subject: testSubject, Stream: testStream, Epoch: testEpoch, Seq: seq, Head: Hash(records[len(records)-1])}
}

func sign(t testing.TB, c Checkpoint, typ string) []byte {
	t.Helper()
	return must(c.Sign(detSigner{testKey(t, epochSigner)}, typ))(t)
}

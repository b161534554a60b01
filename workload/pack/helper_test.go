package pack

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// detSigner signs as RFC 6979 says, so that the same manifest has the same bytes.
type detSigner struct{ key *ecdsa.PrivateKey }

func (s detSigner) Public() crypto.PublicKey { return s.key.Public() }

func (s detSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.key.Sign(nil, digest, opts)
}

func operator(t testing.TB, first byte) detSigner {
	t.Helper()
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{first}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return detSigner{key}
}

func section(id byte, content ...byte) []byte {
	return append(binary.AppendUvarint([]byte{id}, uint64(len(content))), content...)
}

func export(name string, kind, index byte) string {
	return string(rune(len(name))) + name + string([]byte{kind, index})
}

// reactor is a small module: edgekeep_alloc returns 1024, edgekeep_batch 0. It has
// one page of memory, and two mutable globals that it does not export. more are
// sections between the exports and the code.
func reactor(more ...[]byte) []byte {
	return module([]string{export("edgekeep_alloc", 0, 0), export("edgekeep_batch", 0, 1)}, more...)
}

// command is a module that exports _start.
func command() []byte { return module([]string{export("_start", 0, 2)}) }

func module(exports []string, more ...[]byte) []byte {
	exports = append(exports, export("memory", 2, 0))
	return bytes.Join([][]byte{
		[]byte("\x00asm\x01\x00\x00\x00"),
		section(1, []byte("\x03\x60\x01\x7f\x01\x7f\x60\x02\x7f\x7f\x01\x7e\x60\x00\x00")...), // (i32)->(i32), (i32,i32)->(i64), ()->()
		section(3, 3, 0, 1, 2),
		section(5, 1, 0, 1),
		section(6, []byte("\x02\x7f\x01\x41\x2a\x0b\x7e\x01\x42\x0a\x0b")...), // mutable i32 42, mutable i64 10
		section(7, []byte(string(rune(len(exports)))+strings.Join(exports, ""))...),
		bytes.Join(more, nil),
		section(10, []byte("\x03\x05\x00\x41\x80\x08\x0b\x04\x00\x42\x00\x0b\x02\x00\x0b")...),
	}, nil)
}

// good is a manifest with every key.
const good = `name = "scores"
version = "1.2.3"
shape = "reactor"
module = "scores.wasm"
args = ["a.json", "-x"]
commit = "100ms"
checkpoint = "10m"

[input]
format = "json"
streams = ["machine", "line-2"]
batch = 250
wait = "2s"

[output]
format = "senml"

[limits]
memory = "16MiB"
cpu = "1500ms"
disk = "0KiB"
output = "256KiB"

[require]
assurance = "tpm"

[place]
nodes = ["gw1", "gw2"]
moves = 7

[[models]]
name = "a.json"
file = "sub/model.json"
`

// least has only what has no default.
const least = `name = "scores"
version = "1"
shape = "reactor"
module = "scores.wasm"
[input]
format = "raw"
[output]
format = "raw"
[limits]
memory = "64KiB"
cpu = "1s"
output = "1B"
[require]
assurance = "tpm"
[place]
nodes = ["*"]
`

// directory writes a workload's files.
func directory(t testing.TB, manifest string, module []byte) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{DefaultManifest: []byte(manifest), "scores.wasm": module, "sub/model.json": []byte(`{"weights":[1,2]}`)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func packed(t testing.TB, key byte) Bundle {
	t.Helper()
	s, err := Read(directory(t, good, reactor()), "")
	if err != nil {
		t.Fatal(err)
	}
	b, _, err := s.Pack(bytes.Repeat([]byte{key}, 32), operator(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

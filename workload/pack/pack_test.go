package pack

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"edgekeep/internal/cose"
)

// The example of the package comment.
func TestExample(t *testing.T) {
	want, _ := hex.DecodeString("8301416d426363")
	b := Bundle{Manifest: []byte("m"), Content: []byte("cc")}
	if got := b.Marshal(); !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	got, err := Parse(want)
	if err != nil || string(got.Manifest) != "m" || string(got.Content) != "cc" {
		t.Errorf("%v, %v", got, err)
	}
}

// A small bundle is what our strict decoder takes for it, whatever its sizes.
func TestMarshalIsCBOR(t *testing.T) {
	for _, n := range []int{1, 23, 24, 255, 256, 65535} {
		b := Bundle{Manifest: bytes.Repeat([]byte{1}, min(n, MaxManifest)), Content: bytes.Repeat([]byte{2}, 10*n)}
		var v struct {
			_                 struct{} `cbor:",toarray"`
			Version           int
			Manifest, Content []byte
		}
		if err := cose.Unmarshal(b.Marshal(), &v); err != nil || v.Version != 1 || !bytes.Equal(v.Manifest, b.Manifest) || !bytes.Equal(v.Content, b.Content) {
			t.Errorf("%d: version %d, %v", n, v.Version, err)
		}
		if got, err := Parse(b.Marshal()); err != nil || !bytes.Equal(got.Manifest, b.Manifest) || !bytes.Equal(got.Content, b.Content) {
			t.Errorf("%d: %v", n, err)
		}
	}
}

func TestLargest(t *testing.T) {
	b := Bundle{Manifest: make([]byte, MaxManifest), Content: make([]byte, maxContent)}
	raw := b.Marshal()
	if got, err := Parse(raw); err != nil || len(got.Content) != maxContent || len(raw) > MaxFile {
		t.Errorf("%d bytes: %v", len(raw), err)
	}
}

func TestParseRefuses(t *testing.T) {
	for name, tt := range map[string]struct{ hex, want string }{
		"nothing":            {"", "no bundle"},
		"text":               {hex.EncodeToString([]byte("PK\x03\x04")), "no bundle"},
		"another array":      {"8401416d42636300", "no bundle"},
		"padded array":       {"980301416d426363", "no bundle"},
		"endless array":      {"9f01416d426363ff", "no bundle"},
		"no version":         {"83", "no bundle"},
		"version a text":     {"836131416d426363", "no bundle"},
		"next version":       {"8302416d426363", "format 2"},
		"next, of any shape": {"8302a0", "format 2"},
		"padded version":     {"831801416d426363", "no bundle"},
		"no manifest":        {"8301", "manifest is not where"},
		"manifest a text":    {"8301616d426363", "manifest is not where"},
		"manifest empty":     {"830140426363", "manifest has 0 bytes"},
		"manifest padded":    {"830158016d426363", "manifest is not where"},
		"manifest endless":   {"83015f416dff426363", "manifest is not where"},
		"manifest too large": {"830159f0016d", "manifest has 61441 bytes, it must have 1 to 61440"},
		"manifest cut off":   {"8301426d", "manifest was cut off"},
		"manifest's head":    {"830159", "manifest is not where"},
		"no content":         {"8301416d", "content is not where"},
		"content empty":      {"8301416d40", "content has 0 bytes"},
		"content padded":     {"8301416d5a000000026363", "content is not where"},
		"content cut off":    {"8301416d4263", "content was cut off"},
		"content too large":  {"8301416d5bffffffffffffffff63", "content has 18446744073709551615 bytes"},
		"something after":    {"8301416d42636300", "after its end"},
	} {
		raw, err := hex.DecodeString(tt.hex)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(raw); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", name, err, tt.want)
		}
	}
}

func TestOpen(t *testing.T) {
	b, key := packed(t, 7), bytes.Repeat([]byte{7}, 32)
	m, err := b.Open(&operator(t, 1).key.PublicKey, key)
	if err != nil || m.Name != "scores" || len(m.Models) != 1 {
		t.Fatalf("%+v, %v", m, err)
	}
	change := func(at int) Bundle {
		c := bytes.Clone(b.Content)
		c[at] ^= 1
		return Bundle{b.Manifest, c}
	}
	for name, tt := range map[string]struct {
		b    Bundle
		by   byte
		key  []byte
		want string
	}{
		"another operator": {b, 2, key, "another kit's operator"},
		"another key":      {b, 1, bytes.Repeat([]byte{8}, 32), "is the key that of this bundle"},
		"no key":           {b, 1, nil, "32 bytes"},
		"content changed":  {change(100), 1, key, "not the one in its manifest"},
		"content cut":      {Bundle{b.Manifest, b.Content[:len(b.Content)-1]}, 1, key, "not the one in its manifest"},
		"another's":        {Bundle{b.Manifest, packed(t, 9).Content}, 1, key, "not the one in its manifest"},
		"manifest cut":     {Bundle{b.Manifest[:len(b.Manifest)-1], b.Content}, 1, key, "manifest"},
	} {
		if _, err := tt.b.Open(&operator(t, tt.by).key.PublicKey, tt.key); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", name, err, tt.want)
		}
	}
}

// What is in a bundle is encrypted.
func TestContentIsSealed(t *testing.T) {
	raw := packed(t, 7).Marshal()
	for _, secret := range []string{"weights", "edgekeep_batch", "\x00asm"} {
		if bytes.Contains(raw, []byte(secret)) {
			t.Errorf("%q is to be read in the bundle", secret)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{})
	f.Add(Bundle{Manifest: []byte("m"), Content: []byte("cc")}.Marshal())
	f.Add(packed(f, 7).Marshal())
	f.Add([]byte("\x83\x01\x5f"))
	f.Add([]byte("\x83\x01\x41m\x5b\xff\xff\xff\xff\xff\xff\xff\xff"))
	key, by := bytes.Repeat([]byte{7}, 32), operator(f, 1)
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := Parse(raw)
		if err != nil {
			return
		}
		if again := b.Marshal(); !bytes.Equal(again, raw) {
			t.Errorf("two spellings: %x and %x", raw, again)
		}
		if m, err := b.Open(&by.key.PublicKey, key); err == nil && m.Name != "scores" {
			t.Error("nobody signed this")
		}
	})
}

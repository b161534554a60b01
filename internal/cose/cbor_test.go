package cose

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

type item struct {
	A uint64   `cbor:"1,keyasint"`
	B []byte   `cbor:"2,keyasint"`
	S string   `cbor:"3,keyasint,omitempty"`
	F *float64 `cbor:"4,keyasint,omitempty"`
	L []uint64 `cbor:"5,keyasint,omitempty"`
	R Raw      `cbor:"6,keyasint,omitempty"`
	N string   `cbor:"name,omitempty"`
}

func TestUnmarshal(t *testing.T) {
	tests := []struct {
		name, in string
		ok       bool
	}{
		{"all in one spelling", "a6 0101 024101 036161 04f93c00 058101 06f6", true},
		{"as small as it gets", "a2 0100 0240", true},
		{"text key", "a3 0100 0240 646e616d65 6161", true},
		{"empty input", "", false},
		{"not a map", "0100", false},
		{"cut short", "a2 0101 0242 01", false},
		{"bytes after the end", "a2 0101 024101 00", false},
		{"missing field", "a1 0101", false},
		{"unknown field", "a3 0101 024101 0700", false},
		{"unknown text field", "a3 0101 024101 6178 00", false},
		{"field name in another case", "a3 0100 0240 644e616d65 6161", false},
		{"duplicate key", "a3 0101 0101 024101", false},
		{"misordered keys", "a2 024101 0101", false},
		{"integer too long", "a2 011801 024101", false},
		{"length too long", "a2 0101 02580101", false},
		{"key too long", "a2 180101 024101", false},
		{"indefinite map", "bf 0101 024101 ff", false},
		{"indefinite bytes", "a2 0101 025f4101ff", false},
		{"null for bytes", "a2 0101 02f6", false},
		{"undefined for bytes", "a2 0101 02f7", false},
		{"null for an integer", "a2 01f6 024101", false},
		{"null for the map", "f6", false},
		{"array for bytes", "a2 0101 028101", false},
		{"text for bytes", "a2 0101 026161", false},
		{"bytes for text", "a3 0101 024101 034161", false},
		{"text not utf-8", "a3 0101 024101 0361ff", false},
		{"empty omitempty field", "a3 0101 024101 0360", false},
		{"integer for a float", "a3 0101 024101 0401", false},
		{"float for an integer", "a2 01f93c00 024101", false},
		{"long float", "a3 0101 024101 04fa3f800000", false},
		{"negative for unsigned", "a2 0120 024101", false},
		{"tag around an integer", "a2 01c101 024101", false},
		{"tag around the map", "d9d9f7 a2 0101 024101", false},
		{"bignum for an integer", "a2 01c24101 024101", false},
		{"raw: misordered keys", "a3 0101 024101 06a202000100", false},
		{"raw: duplicate keys", "a3 0101 024101 06a201000100", false},
		{"raw: long integer", "a3 0101 024101 061801", false},
		{"raw: not utf-8", "a3 0101 024101 0661ff", false},
		{"raw: indefinite", "a3 0101 024101 069fff", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := unhex(t, tt.in)
			var v item
			err := Unmarshal(in, &v)
			if tt.ok != (err == nil) || (err != nil && !errors.Is(err, ErrMalformed)) {
				t.Fatalf("Unmarshal: %v, want ok %v", err, tt.ok)
			}
			if tt.ok && !bytes.Equal(MustMarshal(v), in) {
				t.Errorf("Marshal gives %x", MustMarshal(v))
			}
		})
	}
}

// TestCanonical is for items kept as Raw, where no decode into Go values helps.
func TestCanonical(t *testing.T) {
	tests := []struct {
		in string
		ok bool
	}{
		{"00", true},
		{"17", true},
		{"1818", true},
		{"18ff", true},
		{"190100", true},
		{"1a00010000", true},
		{"1b0000000100000000", true},
		{"20", true},
		{"3bffffffffffffffff", true},
		{"1817", false},
		{"1900ff", false},
		{"1a0000ffff", false},
		{"1b00000000ffffffff", false},
		{"3817", false},
		{"40", true},
		{"4100", true},
		{"580100", false},
		{"59000100", false},
		{"5f40ff", false},
		{"5f", false},
		{"60", true},
		{"62c3a4", true},
		{"61c3", false},
		{"63eda080", false}, // a surrogate
		{"80", true},
		{"820102", true},
		{"980101", false},
		{"9f01ff", false},
		{"81", false},
		{"a0", true},
		{"a201000200", true},
		{"a10100", true},
		{"a2010020f6", true},
		{"a220000100", false},     // -1 sorts after 1
		{"a2616100186400", false}, // "a" sorts after 100
		{"a2186400616100", true},
		{"a262616100616200", false}, // longer text first
		{"a261620062616100", true},
		{"a1", false},
		{"a101", false},
		{"b8010100", false},
		{"f4", true},
		{"f5", true},
		{"f6", true},
		{"f7", true},
		{"e0", true},
		{"f820", true},
		{"f8ff", true},
		{"f81f", false},
		{"f817", false},
		{"f8", false},
		{"fc", false},
		{"ff", false},
		{"f90000", true},
		{"f98000", true},
		{"f97c00", true},
		{"f90001", true},
		{"f97e00", true},
		{"f97e01", false},
		{"f9fe00", false},
		{"f97c01", false},
		{"fa7fc00000", false},
		{"fb7ff8000000000000", false},
		{"fa47c35000", true},
		{"fa00000001", true},
		{"fa3f800000", false},
		{"fa33800000", false},
		{"fa33000000", true},
		{"fb3ff199999999999a", true},
		{"fb3ff0000000000000", false},
		{"fb7ff0000000000000", false},
		{"fb0000000000000001", true},
		{"c11a514b67b0", true},
		{"c11800", false},
		{"d80100", false},
		{"d81800", true},
		{"d9d9f700", false}, // the library drops the tag "this is cbor"
		{"c249010000000000000000", true},
		{"c349010000000000000000", true},
		{"c2480100000000000000", false},
		{"c24a00010000000000000000", false},
		{"c240", false},
		{"c200", false},
		{"1c", false},
		{"5d", false},
	}
	for _, tt := range tests {
		var raw Raw
		err := Unmarshal(unhex(t, tt.in), &raw)
		if tt.ok != (err == nil) || (err != nil && !errors.Is(err, ErrMalformed)) {
			t.Errorf("%s: %v, want ok %v", tt.in, err, tt.ok)
		}
	}
}

// TestShortestFloat compares with the encoder: a float is in its shortest form exactly
// when its value is encoded to these bytes.
func TestShortestFloat(t *testing.T) {
	checkFloat := func(raw []byte, v any) {
		again, err := encMode.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := shortestFloat(raw), bytes.Equal(again[1:], raw); got != want {
			t.Errorf("%x: shortest %v, want %v", raw, got, want)
		}
	}
	for h := range 1 << 16 {
		raw := binary.BigEndian.AppendUint16(nil, uint16(h))
		var f float64
		if err := decMode.Unmarshal(append([]byte{0xf9}, raw...), &f); err != nil {
			t.Fatal(err)
		}
		checkFloat(raw, f)
		single := math.Float32bits(float32(f))
		for _, bit := range []uint32{0, 1, 1 << 12, 1 << 13, 1 << 22} {
			checkFloat(binary.BigEndian.AppendUint32(nil, single^bit), math.Float32frombits(single^bit))
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		s, d := r.Uint32(), r.Uint64()
		checkFloat(binary.BigEndian.AppendUint32(nil, s), math.Float32frombits(s))
		checkFloat(binary.BigEndian.AppendUint64(nil, d), math.Float64frombits(d))
		short := math.Float64bits(float64(math.Float32frombits(s)))
		checkFloat(binary.BigEndian.AppendUint64(nil, short), math.Float64frombits(short))
	}
}

func TestLimits(t *testing.T) {
	nested := func(n int) []byte { return append(bytes.Repeat([]byte{0x81}, n), 0) }
	array := func(n int) []byte { return append(appendHead(nil, majorArray, n), make([]byte, n)...) }
	pairs := func(n int) []byte {
		b := appendHead(nil, majorMap, n)
		for i := range n {
			b = append(appendHead(b, majorUint, i), 0)
		}
		return b
	}
	sized := func(n int) []byte { return appendBytes(nil, make([]byte, n-5)) }
	tests := []struct {
		name   string
		make   func(n int) []byte
		within int
	}{
		{"levels", nested, 16}, {"array", array, 16384}, {"pairs", pairs, 4096}, {"bytes", sized, 1 << 20},
	}
	for _, tt := range tests {
		var raw Raw
		if err := Unmarshal(tt.make(tt.within), &raw); err != nil {
			t.Errorf("%s: %d: %v", tt.name, tt.within, err)
		}
		if err := Unmarshal(tt.make(tt.within+1), &raw); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %d: %v, want ErrMalformed", tt.name, tt.within+1, err)
		}
		if _, err := Marshal(Raw(tt.make(tt.within + 1))); err == nil {
			t.Errorf("%s: %d is written", tt.name, tt.within+1)
		}
	}
	// A length that the input does not have costs nothing.
	for _, in := range []string{"5b7fffffffffffffff", "9b7fffffffffffffff", "bb7fffffffffffffff", "5bffffffffffffffff", "9a00004000"} {
		var raw Raw
		if err := Unmarshal(unhex(t, in), &raw); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", in, err)
		}
	}
}

func TestMarshal(t *testing.T) {
	got := MustMarshal(map[any]any{"b": 1.5, "aa": []byte(nil), 10: true, -1: []any{nil, uint64(1) << 40}})
	if want := unhex(t, "a4 0af5 20 82f61b0000010000000000 6162f93e00 626161 40"); !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
	for name, v := range map[string]any{
		"text not utf-8":      "\xff",
		"raw in long form":    []Raw{{0x18, 0x01}},
		"raw cut short":       []Raw{{0x18}},
		"raw with two items":  []Raw{{0x01, 0x01}},
		"a channel":           make(chan int),
		"text too long":       strings.Repeat("a", maxSize),
		"a tag nested deeply": cbor.RawTag{Number: 1, Content: append(bytes.Repeat([]byte{0x81}, 16), 0)},
	} {
		if b, err := Marshal(v); err == nil {
			t.Errorf("%s: written as %x", name, b[:min(len(b), 20)])
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("MustMarshal did not panic")
		}
	}()
	MustMarshal("\xff")
}

func TestUnmarshalAny(t *testing.T) {
	for _, in := range []string{"00", "3bffffffffffffffff", "c249010000000000000000", "a2010261618202f6", "fb3ff199999999999a", "d8184100"} {
		var v any
		if err := Unmarshal(unhex(t, in), &v); err != nil {
			t.Errorf("%s: %v", in, err)
		}
	}
	// What only means the same is refused.
	var v any
	if err := Unmarshal(unhex(t, "c24101"), &v); !errors.Is(err, ErrMalformed) {
		t.Errorf("small bignum: %v, want ErrMalformed", err)
	}
}

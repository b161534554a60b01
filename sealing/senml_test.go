package sealing

import (
	"bytes"
	"encoding/hex"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"
)

func reading() *rapid.Generator[Reading] {
	return rapid.Custom(func(t *rapid.T) Reading {
		value := rapid.OneOf(
			rapid.Int64().AsAny(),
			rapid.Uint64Range(math.MaxInt64+1, math.MaxUint64).AsAny(),
			rapid.Float64().AsAny(),
			rapid.SampledFrom([]any{math.MaxFloat64, -math.SmallestNonzeroFloat64, math.Copysign(0, -1), 1.0, 1e300, int64(math.MinInt64), int64(0), ""}),
			rapid.String().AsAny(),
			rapid.Bool().AsAny(),
		).Filter(func(v any) bool {
			f, ok := v.(float64)
			return !ok || !math.IsNaN(f) && !math.IsInf(f, 0)
		})
		return Reading{
			Name:  rapid.OneOf(rapid.SampledFrom([]string{"a/b", "a/c", "b", "a/", "/", "a/b/c"}), rapid.String()).Draw(t, "name"),
			Unit:  rapid.SampledFrom([]string{"", "Cel", "%RH"}).Draw(t, "unit"),
			Time:  rapid.OneOf(rapid.SampledFrom([]int64{0, 1, -1, math.MinInt64, math.MaxInt64}), rapid.Int64()).Draw(t, "time"),
			Value: value.Draw(t, "value"),
		}
	})
}

// Whatever is packed comes out again, in its order, of its type, to the last bit.
func TestPackRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := rapid.SliceOfN(reading(), 0, 20).Draw(t, "readings")
		var p Pack
		for _, r := range in {
			p.Add(r)
		}
		b := p.Marshal()
		if p.Readings() != len(in) || len(b) > p.Size()+9 {
			t.Fatalf("%d readings in %d bytes, estimated %d in %d", len(in), len(b), p.Readings(), p.Size())
		}
		out, err := ParsePack(b)
		if err != nil {
			t.Fatal(err)
		}
		if len(out) != len(in) {
			t.Fatalf("%d readings became %d", len(in), len(out))
		}
		for i := range in {
			want, got := in[i], out[i]
			if f, ok := want.Value.(float64); ok {
				g, ok := got.Value.(float64)
				if !ok || math.Float64bits(f) != math.Float64bits(g) {
					t.Fatalf("%v became %v", want, got)
				}
				got.Value = want.Value
			}
			if !reflect.DeepEqual(want, got) {
				t.Fatalf("%#v became %#v", want, got)
			}
		}
	})
}

// The same through a record, compressed or not.
func TestRecordRoundTrip(t *testing.T) {
	aead := testAEAD(t)
	rapid.Check(t, func(t *rapid.T) {
		var p Pack
		for _, r := range rapid.SliceOfN(reading(), 1, 20).Draw(t, "readings") {
			p.Add(r)
		}
		content := p.Marshal()
		want, err := ParsePack(content)
		if err != nil {
			t.Fatal(err)
		}
		compressed := rapid.Bool().Draw(t, "compressed")
		if compressed {
			content = Compress(content)
		}
		r, err := SealRecord(aead, testStream, testEpoch, 0, make([]byte, 32), nil, content, compressed)
		if err != nil {
			t.Fatal(err)
		}
		if _, got, err := OpenRecord(aead, r); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%v became %v, %v", want, got, err)
		}
	})
}

// CBOR does not tell int64 from uint64: a number that fits int64 is one.
func TestIntegers(t *testing.T) {
	for in, want := range map[any]any{
		int64(5): int64(5), uint64(5): int64(5), int64(-5): int64(-5), uint64(math.MaxInt64): int64(math.MaxInt64),
		uint64(math.MaxInt64 + 1): uint64(math.MaxInt64 + 1), uint64(math.MaxUint64): uint64(math.MaxUint64), 5.0: 5.0,
	} {
		out := must(ParsePack(pack(t, Reading{Name: "a", Value: in})))(t)
		if out[0].Value != want {
			t.Errorf("%T %v became %T %v", in, in, out[0].Value, out[0].Value)
		}
	}
}

func TestParsePackRefuses(t *testing.T) {
	const base = "22c48228 00" // base time 0 in ns, after whatever comes before
	for name, tt := range map[string]struct{ hex, reason string }{
		"not an array":       {"a0", "SenML: "},
		"no base time":       {"81 a2 0061 61 0201", "base time missing"},
		"base name, no time": {"82 a3 006161 0201 " + base + " a3 006161 0201 216162", "base time missing"},
		"a string as time":   {"81 a3 006161 0201 22c0 74 323032352d30312d30315430303a30303a30305a", "not a decimal fraction"},
		"milliseconds":       {"81 a3 006161 0201 22c4 82 22 00", "not in nanoseconds"},
		"three parts":        {"81 a3 006161 0201 22c4 83 28 00 00", "not a decimal fraction"},
		"time above int64":   {"81 a3 006161 0201 22c4 82 28 1b8000000000000000", "out of range"},
		"a bignum as time":   {"81 a3 006161 0201 22c4 82 28 c249010000000000000000", "out of range"},
		"no value":           {"81 a2 006161 " + base, "exactly one value"},
		"two values":         {"81 a4 006161 0201 04f5 " + base, "exactly one value"},
		"three values":       {"81 a5 006161 0201 0360 04f5 " + base, "exactly one value"},
		"a null":             {"81 a3 006161 02f6 " + base, "SenML: "},
		"an array":           {"81 a3 006161 0280 " + base, "a value of type"},
		"a boolean as value": {"81 a3 006161 02f5 " + base, "a value of type bool"},
		"a bignum":           {"81 a3 006161 02c249010000000000000000 " + base, "a value of type"},
		"NaN":                {"81 a3 006161 02f97e00 " + base, "must be finite"},
		"infinity":           {"81 a3 006161 02f97c00 " + base, "must be finite"},
		"an unknown label":   {"81 a4 006161 0201 0500 " + base, "SenML: "},
		"a byte more":        {"8000", "SenML: "},
	} {
		b := must(hex.DecodeString(strings.ReplaceAll(tt.hex, " ", "")))(t)
		_, err := ParsePack(b)
		wantReason(t, name, err, tt.reason)
	}
}

// The base is shared by what follows with the same one, and by nothing else.
func TestPackShares(t *testing.T) {
	one := pack(t, Reading{Name: "line/a", Time: 1, Value: int64(1)})
	two := pack(t, Reading{Name: "line/a", Time: 1, Value: int64(1)}, Reading{Name: "line/b", Time: 1, Value: int64(1)})
	if len(two)-len(one) > 7 {
		t.Errorf("the second reading costs %d bytes", len(two)-len(one))
	}
}

// A small ciphertext must not become much memory. Only who holds the stream key can make
// one, but a consumer opens what a broken gateway sealed.
func TestZstdBomb(t *testing.T) {
	bomb := Compress(make([]byte, 64<<20))
	var frames []byte
	for range 100 {
		frames = append(frames, Compress(make([]byte, 512<<10))...)
	}
	var stream bytes.Buffer // says nowhere how long it is
	w := must(zstd.NewWriter(&stream, zstd.WithWindowSize(64<<10), zstd.WithSingleSegment(false)))(t)
	for range 64 {
		must(w.Write(make([]byte, 1<<20)))(t)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"one frame": bomb, "many frames": frames, "of unknown size": stream.Bytes(), "one too long": Compress(make([]byte, MaxContent+1))} {
		if len(content) > MaxChunk {
			t.Fatalf("%s: %d bytes are no bomb", name, len(content))
		}
		r := must(SealRecord(testAEAD(t), testStream, testEpoch, 0, make([]byte, 32), nil, content, true))(t)
		_, _, err := OpenRecord(testAEAD(t), r)
		wantReason(t, name, err, "decompressing")
	}
	for _, size := range []int{0, 1, 1000, 300 << 10, MaxContent} {
		if got, err := decompress(Compress(make([]byte, size))); err != nil || len(got) != size {
			t.Errorf("%d bytes became %d, %v", size, len(got), err)
		}
	}
	if _, err := decompress([]byte("no zstd")); err == nil {
		t.Error("decompressed what is no zstd")
	}
	r := must(SealRecord(testAEAD(t), testStream, testEpoch, 0, make([]byte, 32), nil, pack(t, testReadings()...), true))(t)
	_, _, err := OpenRecord(testAEAD(t), r)
	wantReason(t, "not compressed", err, "decompressing")
}

// nameParts are what a name is made from; two names are equal only if their parts are.
type nameParts struct {
	Measurement string
	Tags        [][2]string
	Field       string
}

func parts() *rapid.Generator[nameParts] {
	word := rapid.OneOf(rapid.StringOfN(rapid.SampledFrom([]rune("ax:/.-_ 02é\x00")), 0, 4, -1), rapid.String())
	return rapid.Custom(func(t *rapid.T) nameParts {
		p := nameParts{Measurement: word.Draw(t, "measurement"), Field: word.Draw(t, "field")}
		for range rapid.IntRange(0, 2).Draw(t, "tags") {
			p.Tags = append(p.Tags, [2]string{word.Draw(t, "key"), word.Draw(t, "value")})
		}
		return p
	})
}

func (p nameParts) String() string { return Name(p.Measurement, p.Tags, p.Field) }

func TestNameInjective(t *testing.T) {
	seen := map[string]nameParts{}
	rapid.Check(t, func(t *rapid.T) {
		p := parts().Draw(t, "parts")
		name := p.String()
		if first, ok := seen[name]; ok && !reflect.DeepEqual(first, p) {
			t.Fatalf("%#v and %#v are both %q", first, p, name)
		}
		seen[name] = p
		if !alphanumeric(name) {
			t.Fatalf("%q does not start with a letter or digit", name)
		}
		for _, c := range []byte(name) { // RFC 8428 §4.5.1
			if !alphanumeric(string(rune(c))) && !strings.ContainsRune("-:._/", rune(c)) {
				t.Fatalf("%q has a %q", name, c)
			}
		}
		if got := unescapeName(name); !reflect.DeepEqual(got, p) {
			t.Fatalf("%q is read as %#v, not %#v", name, got, p)
		}
	})
}

// unescapeName is the inverse of Name, which exists because Name is injective.
func unescapeName(name string) nameParts {
	var p nameParts
	segments := strings.Split(name, "/")
	first := segments[0]
	if rest, ok := strings.CutPrefix(first, "x:"); ok && (rest == "" || strings.ContainsRune(":-_", rune(rest[0]))) {
		first = rest
	}
	p.Measurement, p.Field = unescape(first), unescape(segments[len(segments)-1])
	for _, s := range segments[1 : len(segments)-1] {
		key, value, _ := strings.Cut(s, ".")
		p.Tags = append(p.Tags, [2]string{unescape(key), unescape(value)})
	}
	return p
}

func unescape(s string) string {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] == ':' {
			b, _ := hex.DecodeString(s[i+1 : i+3])
			out, i = append(out, b...), i+2
			continue
		}
		out = append(out, s[i])
	}
	return string(out)
}

func TestName(t *testing.T) {
	for want, p := range map[string]nameParts{
		"cpu/usage":               {"cpu", nil, "usage"},
		"cpu/host.gw-7/usage":     {"cpu", [][2]string{{"host", "gw-7"}}, "usage"},
		"x:_cpu/a:2fb.c:2ed/e:20": {"_cpu", [][2]string{{"a/b", "c.d"}}, "e "},
		"x::c3:a9/v":              {"é", nil, "v"},
		"x/v":                     {"x", nil, "v"},
		"x:/v":                    {"", nil, "v"},
	} {
		if got := p.String(); got != want {
			t.Errorf("%#v is %q, want %q", p, got, want)
		}
	}
}

package sealing

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"strings"
	"sync"

	"github.com/fxamacker/cbor/v2"
	"github.com/klauspost/compress/zstd"

	"edgekeep/internal/cose"
)

// Reading is one value of one quantity.
type Reading struct {
	Name  string // SenML name: see Name
	Unit  string // SenML unit (RFC 8428 §12.1); may be empty
	Time  int64  // ns since the Unix epoch
	Value any    // int64, uint64, float64, string or bool; read back, a uint64 is above MaxInt64
}

// senml is one SenML record (RFC 8428 §4, labels of §6).
type senml struct {
	BaseName string   `cbor:"-2,keyasint,omitempty"`
	BaseTime cbor.Tag `cbor:"-3,keyasint,omitzero"`
	Name     string   `cbor:"0,keyasint,omitempty"`
	Unit     string   `cbor:"1,keyasint,omitempty"`
	Value    any      `cbor:"2,keyasint,omitempty"`
	String   *string  `cbor:"3,keyasint,omitempty"`
	Bool     *bool    `cbor:"4,keyasint,omitempty"`
}

// decimalFraction is RFC 8949 §3.4.4: [exponent, mantissa], a time in seconds as
// an exact count of nanoseconds. RFC 8428 §6 allows it for numbers.
const decimalFraction = 4

// Pack encodes readings as a SenML pack. Readings that follow each other with
// the same time and the same name up to the last "/" share base name and time.
type Pack struct {
	records  []senml
	base     string
	time     int64
	size     int
	readings int
}

// Add appends a reading.
func (p *Pack) Add(r Reading) {
	base, name := splitName(r.Name)
	var s senml
	if p.readings == 0 || base != p.base || r.Time != p.time {
		s.BaseName, s.BaseTime = base, cbor.Tag{Number: decimalFraction, Content: []int64{-9, r.Time}}
		p.base, p.time = base, r.Time
		p.size += len(base) + 24
	}
	s.Name, s.Unit = name, r.Unit
	switch v := r.Value.(type) {
	case string:
		s.String = &v
		p.size += len(v) + 4
	case bool:
		s.Bool = &v
		p.size++
	default:
		s.Value = v
		p.size += 9
	}
	p.size += len(name) + len(r.Unit) + 6
	p.records = append(p.records, s)
	p.readings++
}

// Readings is the number of readings in the pack, Size an upper estimate of its
// encoded size in bytes.
func (p *Pack) Readings() int { return p.readings }

// Size estimates the encoded size from above.
func (p *Pack) Size() int { return p.size }

// Marshal encodes the pack.
func (p *Pack) Marshal() ([]byte, error) { return cose.Marshal(p.records) }

func splitName(name string) (base, rest string) {
	i := strings.LastIndexByte(name, '/')
	return name[:i+1], name[i+1:]
}

// ParsePack decodes a SenML pack as Pack encodes it.
func ParsePack(b []byte) ([]Reading, error) {
	var records []senml
	if err := cose.Unmarshal(b, &records); err != nil {
		return nil, fmt.Errorf("SenML: %w", err)
	}
	out := make([]Reading, 0, len(records))
	var base string
	var now int64
	for i, s := range records {
		if s.BaseTime.Number != 0 || s.BaseTime.Content != nil {
			t, err := nanoseconds(s.BaseTime)
			if err != nil {
				return nil, fmt.Errorf("SenML record %d: %w", i, err)
			}
			base, now = s.BaseName, t
		} else if i == 0 || s.BaseName != "" {
			return nil, fmt.Errorf("SenML record %d: base time missing", i)
		}
		r := Reading{Name: base + s.Name, Unit: s.Unit, Time: now}
		if err := r.setValue(s); err != nil {
			return nil, fmt.Errorf("SenML record %d: %w", i, err)
		}
		out = append(out, r)
	}
	return out, nil
}

func (r *Reading) setValue(s senml) error {
	n := 0
	if s.Value != nil {
		n++
		switch v := s.Value.(type) {
		case int64:
			r.Value = v
		case uint64:
			r.Value = v
			if v <= math.MaxInt64 { // CBOR does not tell the two apart
				r.Value = int64(v)
			}
		case float64:
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return errors.New("a value must be finite")
			}
			r.Value = v
		default:
			return fmt.Errorf("a value of type %T", v)
		}
	}
	if s.String != nil {
		n++
		r.Value = *s.String
	}
	if s.Bool != nil {
		n++
		r.Value = *s.Bool
	}
	if n != 1 {
		return errors.New("it needs exactly one value")
	}
	return nil
}

func nanoseconds(t cbor.Tag) (int64, error) {
	parts, ok := t.Content.([]any)
	if t.Number != decimalFraction || !ok || len(parts) != 2 {
		return 0, errors.New("base time is not a decimal fraction")
	}
	exp, err := integer(parts[0])
	if err != nil || exp != -9 {
		return 0, errors.New("base time is not in nanoseconds")
	}
	return integer(parts[1])
}

func integer(v any) (int64, error) {
	switch n := v.(type) {
	case int64:
		return n, nil
	case uint64:
		if n <= math.MaxInt64 {
			return int64(n), nil
		}
	case big.Int:
	}
	return 0, errors.New("an integer is out of range")
}

// Name makes a SenML name (RFC 8428 §4.5.1) from a measurement, its tags and a
// field: "measurement/key.value/…/field". Letters, digits, "-" and "_" stand for
// themselves; every other byte is ":" and two hexadecimal digits. The first
// character of a name must be a letter or digit, so another one is escaped with
// a leading "x:" form.
func Name(measurement string, tags [][2]string, field string) string {
	var b strings.Builder
	if !alphanumeric(measurement) {
		b.WriteString("x:")
	}
	escape(&b, measurement)
	for _, t := range tags {
		b.WriteByte('/')
		escape(&b, t[0])
		b.WriteByte('.')
		escape(&b, t[1])
	}
	b.WriteByte('/')
	escape(&b, field)
	return b.String()
}

func alphanumeric(s string) bool {
	return s != "" && (s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z' || s[0] >= '0' && s[0] <= '9')
}

func escape(b *strings.Builder, s string) {
	const hex = "0123456789abcdef"
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
			b.WriteByte(c)
			continue
		}
		b.WriteByte(':')
		b.WriteByte(hex[c>>4])
		b.WriteByte(hex[c&15])
	}
}

var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true))
	if err != nil {
		panic(err) // constant options
	}
	return e
})

var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(MaxContent), zstd.WithDecoderConcurrency(1))
	if err != nil {
		panic(err) // constant options
	}
	return d
})

// Compress compresses a record's content with zstd (RFC 8878).
func Compress(content []byte) []byte {
	return encoder().EncodeAll(content, make([]byte, 0, len(content)/2))
}

func decompress(content []byte) ([]byte, error) {
	out, err := decoder().DecodeAll(content, nil)
	if err != nil {
		return nil, fmt.Errorf("decompressing: %w", err)
	}
	return out, nil
}

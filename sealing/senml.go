package sealing

import (
	"encoding/binary"
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
//
// It writes CBOR itself, one reading at a time: packing is most of the work of
// sealing, and reflection made it ten times as slow. ParsePack, which is strict
// about the one deterministic spelling, is what its tests hold it against.
type Pack struct {
	records  []byte
	base     string
	time     int64
	readings int
}

// Add appends a reading. Name, unit and string values must be UTF-8 and a float
// finite, as package sensors sees to; a value of another type than a Reading's
// is a bug of the caller's.
func (p *Pack) Add(r Reading) {
	base, name := splitName(r.Name)
	rebase := p.readings == 0 || base != p.base || r.Time != p.time
	fields := uint64(1)
	for _, more := range []bool{name != "", r.Unit != "", rebase && base != "", rebase} {
		if more {
			fields++
		}
	}
	b := cose.AppendHead(p.records, cborMap, fields) // keys in their deterministic order: 0 1 2 3 4 -2 -3
	if name != "" {
		b = appendText(append(b, 0x00), name)
	}
	if r.Unit != "" {
		b = appendText(append(b, 0x01), r.Unit)
	}
	b = appendValue(b, r.Value)
	if rebase {
		if base != "" {
			b = appendText(append(b, 0x21), base)
		}
		b = append(b, 0x22, 0xc0|decimalFraction, 0x82, 0x28) // -3: 4([-9, time])
		b = appendInt(b, r.Time)
		p.base, p.time = base, r.Time
	}
	p.records = b
	p.readings++
}

// Readings is the number of readings in the pack.
func (p *Pack) Readings() int { return p.readings }

// Size is the size of the encoded pack in bytes, but for at most 9 more.
func (p *Pack) Size() int { return len(p.records) }

// Marshal encodes the pack.
func (p *Pack) Marshal() []byte {
	out := cose.AppendHead(make([]byte, 0, len(p.records)+9), cborArray, uint64(p.readings))
	return append(out, p.records...)
}

// CBOR major types (RFC 8949 §3.1), shifted into the initial byte.
const (
	cborUint  = 0 << 5
	cborNint  = 1 << 5
	cborText  = 3 << 5
	cborArray = 4 << 5
	cborMap   = 5 << 5
)

func appendText(b []byte, s string) []byte {
	return append(cose.AppendHead(b, cborText, uint64(len(s))), s...)
}

func appendInt(b []byte, n int64) []byte {
	if n < 0 {
		return cose.AppendHead(b, cborNint, uint64(-1-n))
	}
	return cose.AppendHead(b, cborUint, uint64(n))
}

// appendValue appends the key of a value and the value.
func appendValue(b []byte, v any) []byte {
	switch v := v.(type) {
	case string:
		return appendText(append(b, 0x03), v)
	case bool:
		if v {
			return append(b, 0x04, 0xf5)
		}
		return append(b, 0x04, 0xf4)
	case int64:
		return appendInt(append(b, 0x02), v)
	case uint64:
		return cose.AppendHead(append(b, 0x02), cborUint, v)
	case float64:
		return appendFloat(append(b, 0x02), v)
	}
	panic(fmt.Sprintf("sealing: a reading's value is a %T", v)) // the caller's bug
}

// appendFloat appends the shortest float that has this value (RFC 8949 §4.2.1).
func appendFloat(b []byte, f float64) []byte {
	single := float32(f)
	if float64(single) != f {
		return binary.BigEndian.AppendUint64(append(b, 0xfb), math.Float64bits(f))
	}
	if half, ok := toHalf(single); ok {
		return binary.BigEndian.AppendUint16(append(b, 0xf9), half)
	}
	return binary.BigEndian.AppendUint32(append(b, 0xfa), math.Float32bits(single))
}

// toHalf converts to IEEE 754 binary16 if nothing is lost.
func toHalf(f float32) (uint16, bool) {
	bits := math.Float32bits(f)
	sign, exp, frac := uint16(bits>>16)&0x8000, int(bits>>23&0xff)-127, bits&0x7fffff
	switch {
	case bits&0x7fffffff == 0:
		return sign, true
	case exp >= -14 && exp <= 15: // normal
		return sign | uint16(exp+15)<<10 | uint16(frac>>13), frac&0x1fff == 0
	case exp >= -24 && exp < -14: // subnormal
		frac |= 1 << 23
		shift := uint(-exp - 14 + 13)
		return sign | uint16(frac>>shift), frac&(1<<shift-1) == 0
	}
	return 0, false
}

func splitName(name string) (base, rest string) {
	i := strings.LastIndexByte(name, '/')
	return name[:i+1], name[i+1:]
}

// maxNames bounds the names of a pack, in bytes, when they are spelled out.
const maxNames = 16 << 20

// ParsePack decodes a SenML pack as Pack encodes it.
func ParsePack(b []byte) ([]Reading, error) {
	var records []senml
	if err := cose.Unmarshal(b, &records); err != nil {
		return nil, fmt.Errorf("SenML: %w", err)
	}
	out := make([]Reading, 0, len(records))
	var base string
	var now int64
	names := 0
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
		if names += len(base) + len(s.Name); names > maxNames { // base names are written once and read many times
			return nil, fmt.Errorf("SenML record %d: more than %d bytes of names", i, maxNames)
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

package sensors

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/influxdata/line-protocol/v2/lineprotocol"
)

// MaxLine is the longest line, in bytes without its "\n".
const MaxLine = 8192

const (
	maxTags   = 64
	maxFields = 256
)

// Tag is one name-value pair that says what a point belongs to. Neither is
// empty.
type Tag struct{ Key, Value string }

// Field is one reading. Value is an int64, uint64, float64 (finite), string or
// bool.
type Field struct {
	Name  string
	Value any
}

// Point is one line: the readings that one source took at one time.
type Point struct {
	Measurement string
	Tags        []Tag   // at most 64, no key twice, in the order of the line
	Fields      []Field // 1 to 256, no name twice, in the order of the line
	Time        int64   // ns since the Unix epoch, when HasTime
	HasTime     bool
}

// ErrLine is why a line was refused. It never quotes the line, so it may be
// logged.
type ErrLine struct {
	Pos    int // byte offset in the line
	Reason string
}

func (e *ErrLine) Error() string {
	return fmt.Sprintf("line refused at byte %d: %s", e.Pos, e.Reason)
}

// AppendLine appends p as one line without "\n". It refuses exactly the points
// that ParseLine would not give back equal (and a point without HasTime whose
// Time is set is given back without): then it returns dst as it was.
func (p Point) AppendLine(dst []byte) []byte {
	if !p.valid() {
		return dst
	}
	var e lineprotocol.Encoder
	e.SetLax(true) // valid has checked more, and keeps the order of tags
	e.SetBuffer(dst)
	e.StartLine(p.Measurement)
	for _, t := range p.Tags {
		e.AddTag(t.Key, t.Value)
	}
	for _, f := range p.Fields {
		e.AddField(f.Name, lineprotocol.MustNewValue(f.Value))
	}
	var at time.Time // zero: no timestamp
	if p.HasTime {
		at = time.Unix(0, p.Time)
	}
	e.EndLine(at)
	out := e.Bytes()
	out = out[:len(out)-1] // EndLine's newline
	if len(out)-len(dst) > MaxLine {
		return dst
	}
	return out
}

func (p Point) valid() bool {
	if !validName(p.Measurement) || p.Measurement[0] == '#' ||
		len(p.Tags) > maxTags || len(p.Fields) == 0 || len(p.Fields) > maxFields {
		return false
	}
	for i, t := range p.Tags {
		if !validName(t.Key) || !validName(t.Value) || hasTag(p.Tags[:i], t.Key) {
			return false
		}
	}
	for i, f := range p.Fields {
		if !validName(f.Name) || !validValue(f.Value) || hasField(p.Fields[:i], f.Name) {
			return false
		}
	}
	return true
}

func validName(s string) bool {
	return s != "" && validText(s) && !strings.HasSuffix(s, `\`)
}

func validText(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

func validValue(v any) bool {
	switch v := v.(type) {
	case int64, uint64, bool:
		return true
	case float64:
		return !math.IsNaN(v) && !math.IsInf(v, 0)
	case string:
		return validText(v)
	}
	return false
}

func hasTag(tags []Tag, key string) bool {
	return slices.ContainsFunc(tags, func(t Tag) bool { return t.Key == key })
}

func hasField(fields []Field, name string) bool {
	return slices.ContainsFunc(fields, func(f Field) bool { return f.Name == name })
}

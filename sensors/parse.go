package sensors

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/influxdata/line-protocol/v2/lineprotocol"
)

// ParseLine decodes one reading, given without its "\n". The whole line is
// decoded before anything is returned; nothing of it is kept. Every error is an
// *ErrLine.
func ParseLine(line []byte) (Point, error) {
	if err := checkRaw(line); err != nil {
		return Point{}, err
	}
	l := lineParser{line: line, dec: lineprotocol.NewDecoderWithBytes(line)}
	l.dec.Next()
	for _, section := range []func() error{l.measurement, l.tags, l.fields, l.time} {
		if err := section(); err != nil {
			return Point{}, err
		}
	}
	return l.point, nil
}

// checkRaw is what stands in front of the line-protocol decoder: with no control
// character in it, the bytes are one line, and not a comment.
func checkRaw(line []byte) error {
	if len(line) > MaxLine {
		return &ErrLine{MaxLine, fmt.Sprintf("longer than %d bytes", MaxLine)}
	}
	if len(line) == 0 || line[0] == '#' || line[0] == ' ' {
		return &ErrLine{0, "no measurement"}
	}
	for i := 0; i < len(line); {
		r, n := utf8.DecodeRune(line[i:])
		if r == utf8.RuneError && n == 1 {
			return &ErrLine{i, "bad utf-8"}
		}
		if unicode.IsControl(r) {
			return &ErrLine{i, "control character"}
		}
		i += n
	}
	return nil
}

// lineParser drives the decoder and follows it with pos, because only syntax
// errors come from it with a position.
type lineParser struct {
	line  []byte
	dec   *lineprotocol.Decoder
	pos   int
	point Point
}

// The characters that have an escape, and therefore two bytes, in a name.
const (
	measurementEscapes = ", "
	nameEscapes        = ",= "
)

func (l *lineParser) measurement() error {
	name, err := l.dec.Measurement()
	if err != nil {
		return syntaxError(err, l.pos, "malformed measurement")
	}
	l.point.Measurement = l.take(name, measurementEscapes)
	return nil
}

func (l *lineParser) tags() error {
	for {
		key, value, err := l.dec.NextTag()
		if err != nil {
			return syntaxError(err, l.pos, "malformed tag")
		}
		if key == nil {
			return nil
		}
		start := l.pos + 1 // behind the comma
		if len(l.point.Tags) == maxTags {
			return &ErrLine{start, fmt.Sprintf("more than %d tags", maxTags)}
		}
		l.pos = start
		tag := Tag{Key: l.take(key, nameEscapes)}
		if hasTag(l.point.Tags, tag.Key) {
			return &ErrLine{start, "duplicate tag"}
		}
		l.pos++ // the equals sign
		tag.Value = l.take(value, nameEscapes)
		l.point.Tags = append(l.point.Tags, tag)
	}
}

func (l *lineParser) fields() error {
	l.skipSpaces()
	for {
		key, kind, text, err := l.dec.NextFieldBytes()
		if err != nil {
			return syntaxError(err, l.pos, "malformed field")
		}
		if key == nil {
			return nil
		}
		if err := l.field(key, kind, text); err != nil {
			return err
		}
		l.pos++ // the comma or the space behind
	}
}

func (l *lineParser) field(key []byte, kind lineprotocol.ValueKind, text []byte) error {
	start := l.pos
	if len(l.point.Fields) == maxFields {
		return &ErrLine{start, fmt.Sprintf("more than %d fields", maxFields)}
	}
	f := Field{Name: l.take(key, nameEscapes)}
	if hasField(l.point.Fields, f.Name) {
		return &ErrLine{start, "duplicate field"}
	}
	l.pos++ // the equals sign
	var err error
	if f.Value, err = parseValue(kind, text); err != nil {
		return &ErrLine{l.pos, err.Error()}
	}
	l.pos = endOfValue(l.line, l.pos)
	l.point.Fields = append(l.point.Fields, f)
	return nil
}

// parseValue refuses what the decoder's own conversion would take beyond
// decimal numbers, hexadecimal floats and digit separators: both leave something
// between the digits at the two ends.
func parseValue(kind lineprotocol.ValueKind, text []byte) (any, error) {
	if kind == lineprotocol.String {
		if bytes.ContainsAny(text, "\n\r\t") { // the escapes \n, \r, \t
			return nil, errors.New("control character in a string")
		}
		return string(text), nil
	}
	if kind == lineprotocol.Float && len(bytes.Trim(text, "0123456789+-.eE")) > 0 {
		return nil, errors.New("malformed number")
	}
	v, err := lineprotocol.NewValueFromBytes(kind, text)
	if errors.Is(err, lineprotocol.ErrValueOutOfRange) {
		return nil, errors.New("number out of range")
	}
	if err != nil {
		return nil, errors.New("malformed value")
	}
	return v.Interface(), nil
}

// endOfValue gives the offset behind the field value that starts at pos.
func endOfValue(line []byte, pos int) int {
	if line[pos] != '"' {
		if n := bytes.IndexAny(line[pos:], ", "); n >= 0 {
			return pos + n
		}
		return len(line)
	}
	for pos++; pos < len(line) && line[pos] != '"'; pos++ {
		if line[pos] == '\\' {
			pos++
		}
	}
	return pos + 1
}

func (l *lineParser) time() error {
	text, err := l.dec.TimeBytes()
	if err != nil {
		return syntaxError(err, l.pos, "malformed time")
	}
	if text == nil {
		return nil
	}
	l.skipSpaces()
	l.point.HasTime = true
	if l.point.Time, err = strconv.ParseInt(string(text), 10, 64); err != nil {
		return &ErrLine{l.pos, "malformed time: want nanoseconds since 1970 in 64 bits"}
	}
	return nil
}

func (l *lineParser) skipSpaces() {
	for l.pos < len(l.line) && l.line[l.pos] == ' ' {
		l.pos++
	}
}

// take copies an unescaped name and moves pos behind it in the line.
func (l *lineParser) take(name []byte, escapes string) string {
	l.pos += len(name)
	for _, c := range name {
		if strings.IndexByte(escapes, c) >= 0 {
			l.pos++
		}
	}
	return string(name)
}

// syntaxError keeps the decoder's position and drops its text, which quotes the
// line.
func syntaxError(err error, pos int, reason string) error {
	var de *lineprotocol.DecodeError
	if errors.As(err, &de) {
		pos = de.Column - 1
	}
	return &ErrLine{pos, reason}
}

package sensors

import (
	"math"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxControl is the longest control line, in bytes without its "\n".
const MaxControl = 512

// Control is a control line; see the package comment.
type Control struct {
	Kind    string // "hello", "seq", "ack" or "err"; "" is a comment
	Session string // of hello and ack
	Seq     uint64 // of seq, ack and err
	Reason  string // of err
}

// ParseControl decodes a line that starts with "#", given without its "\n". A
// comment is the zero Control. Every error is an *ErrLine.
func ParseControl(line []byte) (Control, error) {
	if len(line) == 0 || line[0] != '#' {
		return Control{}, &ErrLine{0, `no control line: it does not start with "#"`}
	}
	word, rest, _ := strings.Cut(string(line[:min(len(line), MaxControl+1)]), " ")
	var c Control
	switch word {
	case "#hello":
		version, session, _ := strings.Cut(rest, " ")
		if version != "1" {
			return Control{}, &ErrLine{len("#hello "), "unknown version: this side speaks version 1"}
		}
		c = Control{Kind: "hello", Session: session}
	case "#seq":
		c = Control{Kind: "seq", Seq: parseSeq(rest)}
	case "#ack":
		session, seq, _ := strings.Cut(rest, " ")
		c = Control{Kind: "ack", Session: session, Seq: parseSeq(seq)}
	case "#err":
		seq, reason, _ := strings.Cut(rest, " ")
		c = Control{Kind: "err", Seq: parseSeq(seq), Reason: reason}
	default:
		return Control{}, nil
	}
	if !c.valid() || c.String() != string(line) {
		return Control{}, &ErrLine{len(word), "malformed " + word}
	}
	return c, nil
}

// String is the line without its "\n". A Reason is cut to the length that fits,
// and what may not stand in a line is replaced in it; the rest is taken as is.
func (c Control) String() string {
	seq := strconv.FormatUint(c.Seq, 10)
	switch c.Kind {
	case "hello":
		return "#hello 1 " + c.Session
	case "seq":
		return "#seq " + seq
	case "ack":
		return "#ack " + c.Session + " " + seq
	case "err":
		line := "#err " + seq + " " + printable(c.Reason)
		for len(line) > MaxControl {
			_, n := utf8.DecodeLastRuneInString(line)
			line = line[:len(line)-n]
		}
		return line
	}
	return "#"
}

func (c Control) valid() bool {
	switch c.Kind {
	case "hello":
		return ValidSession(c.Session)
	case "ack":
		return ValidSession(c.Session) && c.Seq <= math.MaxInt64
	case "err":
		return c.Seq >= 1 && c.Seq <= math.MaxInt64 && c.Reason != ""
	}
	return c.Seq >= 1 && c.Seq <= math.MaxInt64
}

// parseSeq gives 0 for what is no number; the comparison with the line as it
// would be written tells that from a real 0.
func parseSeq(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return 0
	}
	return n
}

// ValidSession reports whether s may name a session: see the package comment.
func ValidSession(s string) bool {
	ok := func(r rune) bool {
		return r == '-' || '0' <= r && r <= '9' || 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z'
	}
	return s != "" && len(s) <= 32 && !strings.ContainsFunc(s, func(r rune) bool { return !ok(r) })
}

func printable(reason string) string {
	if reason == "" {
		return "refused"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(reason, "\uFFFD"))
}

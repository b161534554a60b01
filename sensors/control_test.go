package sensors

import (
	"errors"
	"math"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestControl(t *testing.T) {
	for line, want := range map[string]Control{
		"#hello 1 a":                          {Kind: "hello", Session: "a"},
		"#hello 1 " + strings.Repeat("Z", 32): {Kind: "hello", Session: strings.Repeat("Z", 32)},
		"#seq 1":                              {Kind: "seq", Seq: 1},
		"#seq 9223372036854775807":            {Kind: "seq", Seq: math.MaxInt64},
		"#ack a-9 0":                          {Kind: "ack", Session: "a-9"},
		"#ack a-9 12":                         {Kind: "ack", Session: "a-9", Seq: 12},
		"#err 7 no: such  thing ":             {Kind: "err", Seq: 7, Reason: "no: such  thing "},
		"#":                                   {},
		"# hello 1 a":                         {},
		"#comment":                            {},
		"#hellos":                             {},
		"#" + strings.Repeat("x", 600):        {},
	} {
		got, err := ParseControl([]byte(line))
		if err != nil || got != want {
			t.Errorf("ParseControl(%q) = %+v, %v; want %+v", line, got, err, want)
		}
		if want.Kind != "" && want.String() != line {
			t.Errorf("%+v.String() = %q, want %q", want, want.String(), line)
		}
	}
	for _, line := range []string{
		"", "hello", "m f=1", "#hello", "#hello 1", "#hello 1 ", "#hello 2 a", "#hello 01 a", "#hello 1 a b",
		"#hello 1 a_b", "#hello 1 \u00fc", "#hello 1 a\r", "#hello  1 a", "#hello 1 " + strings.Repeat("Z", 33),
		"#seq", "#seq ", "#seq 0", "#seq 01", "#seq +1", "#seq -1", "#seq 1 ", "#seq 1_0", "#seq 0x1",
		"#seq 9223372036854775808", "#seq x", "#ack a", "#ack a ", "#ack a x", "#ack a 00", "#ack  1", "#ack a 1 2",
		"#err", "#err 1", "#err 1 ", "#err 0 x", "#err x y", "#err 1 a\tb", "#err 1 \xff", "#err 1 " + strings.Repeat("x", 600),
	} {
		got, err := ParseControl([]byte(line))
		if refused := (*ErrLine)(nil); !errors.As(err, &refused) || got != (Control{}) {
			t.Errorf("ParseControl(%q) = %+v, %v; want an *ErrLine", line, got, err)
		}
	}
}

func TestReasonFitsOneLine(t *testing.T) {
	for _, reason := range []string{"", "a\nb\x00", "\xff\xfe", strings.Repeat("é", 400), "x" + strings.Repeat("日", 400)} {
		line := Control{Kind: "err", Seq: 3, Reason: reason}.String()
		c, err := ParseControl([]byte(line))
		if err != nil || c.Seq != 3 || c.Reason == "" || len(line) > MaxControl || !utf8.ValidString(line) {
			t.Errorf("reason %q became %q: %v", reason, line, err)
		}
	}
}

func FuzzParseControl(f *testing.F) {
	for _, s := range []string{"#hello 1 a", "#seq 1", "#ack a 0", "#err 1 because", "# x", "#seq 01"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		c, err := ParseControl(line)
		if err == nil && c.Kind != "" && c.String() != string(line) {
			t.Fatalf("%q is another spelling of %q", line, c)
		}
	})
}

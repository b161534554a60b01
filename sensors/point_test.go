package sensors

import (
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParseLine(t *testing.T) {
	tests := []struct {
		line string
		want Point
	}{
		{"m f=1", Point{Measurement: "m", Fields: []Field{{"f", 1.0}}}},
		{"m f=1 ", Point{Measurement: "m", Fields: []Field{{"f", 1.0}}}},
		{"m  f=1  7  ", Point{Measurement: "m", Fields: []Field{{"f", 1.0}}, Time: 7, HasTime: true}},
		{`cli\ ma\,te,ro\=om=ha\ ll,a=b i=-5i,u=18446744073709551615u,s="a \"b\" \\ c, = d",b=F,e=1e3 -9223372036854775808`, Point{
			Measurement: "cli ma,te",
			Tags:        []Tag{{"ro=om", "ha ll"}, {"a", "b"}},
			Fields: []Field{
				{"i", int64(-5)}, {"u", uint64(math.MaxUint64)}, {"s", `a "b" \ c, = d`}, {"b", false}, {"e", 1000.0},
			},
			Time: math.MinInt64, HasTime: true,
		}},
		{`m,k=v k=".",empty="" 0`, Point{
			Measurement: "m", Tags: []Tag{{"k", "v"}}, Fields: []Field{{"k", "."}, {"empty", ""}}, HasTime: true,
		}},
		{`m=,ü=日 f=.5`, Point{Measurement: "m=", Tags: []Tag{{"ü", "日"}}, Fields: []Field{{"f", 0.5}}}},
	}
	for _, tt := range tests {
		got, err := ParseLine([]byte(tt.line))
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("ParseLine(%s)\n got %#v, %v\nwant %#v", tt.line, got, err, tt.want)
		}
	}
}

func TestParseLineRefuses(t *testing.T) {
	many := func(n int, one string) string { // aa, ab, ac, ...
		var names []string
		for i := range n {
			names = append(names, strings.ReplaceAll(one, "K", string([]rune{'a' + rune(i/26), 'a' + rune(i%26)})))
		}
		return strings.Join(names, ",")
	}
	tests := []struct {
		class, line string
		pos         int
	}{
		{"empty", "", 0},
		{"comment", "# m f=1", 0},
		{"space in front", " m f=1", 0},
		{"no measurement", ",a=b f=1", 0},
		{"no field", "m", 1},
		{"no field after tags", "m,a=b", 5},
		{"no field value", "m f=", 4},
		{"no field name", "m =1", 2},
		{"no tag value", "m,a= f=1", 4},
		{"no tag name", "m,=b f=1", 2},
		{"dangling comma", "m f=1,", 6},
		{"two words after the time", "m f=1 5 6", 8},
		{"unclosed string", `m f="a`, 4},
		{"something after a string", `m f="a"b`, 7},
		{"bare word", "m f=word", 4},
		{"bad bool", "m f=trve", 4},
		{"newline", "m f=1\nm f=2", 5},
		{"carriage return", "m f=1\r", 5},
		{"NUL in a name", "m\x00 f=1", 1},
		{"NUL in a string", "m f=\"a\x00\"", 6},
		{"tab in a tag", "m,a=b\tc f=1", 5},
		{"DEL", "m\x7f f=1", 1},
		{"C1 control", "m f=\"a\u0085\"", 6},
		{"newline behind an escape", `m a=1,f="a\nb"`, 8},
		{"tab behind an escape", `m f="a\tb"`, 4},
		{"bad utf-8 in a string", "m f=\"\xff\"", 5},
		{"cut utf-8 in a tag", "m,a=\xe6\x97 f=1", 4},
		{"NaN", "m f=NaN", 4},
		{"Inf", "m f=Inf", 4},
		{"-Inf", "m f=-Inf", 4},
		{"float out of range", "m f=1e999", 4},
		{"int out of range", "m f=9223372036854775808i", 4},
		{"uint out of range", "m f=18446744073709551616u", 4},
		{"negative uint", "m f=-1u", 4},
		{"digit separator", "m f=1_000", 4},
		{"digit separator in an int", "m f=1_000i", 4},
		{"hexadecimal float", "m f=0x1p4", 4},
		{"hexadecimal int", "m f=0x10i", 4},
		{"two signs", "m f=--1", 4},
		{"duplicate tag", `m,a\ b=1,c=2,a\ b=3 f=1`, 13},
		{"duplicate field", `m,f=\,x f=1,s="\",\\",f=2`, 22},
		{"time out of range", "m f=1   9223372036854775808", 8},
		{"malformed time", "m f=1 5-5", 6},
		{"fractional time", "m f=1 5.5", 6},
		{"65 tags", "m," + many(65, "K=v") + " f=1", 2 + 64*5},
		{"257 fields", "m " + many(257, "K=1"), 2 + 256*5},
		{"too long", "m f=\"" + strings.Repeat("x", MaxLine-5) + `"`, MaxLine},
	}
	for _, tt := range tests {
		p, err := ParseLine([]byte(tt.line))
		var refused *ErrLine
		if !errors.As(err, &refused) {
			t.Errorf("%s: ParseLine(%.60q) = %v, %v; want an *ErrLine", tt.class, tt.line, p, err)
			continue
		}
		if refused.Pos != tt.pos {
			t.Errorf("%s: %q refused at %d (%v), want %d", tt.class, tt.line, refused.Pos, err, tt.pos)
		}
		if !reflect.DeepEqual(p, Point{}) {
			t.Errorf("%s: part of a refused line came out: %v", tt.class, p)
		}
	}
	for class, line := range map[string]string{
		"64 tags":    "m," + many(64, "K=v") + " f=1",
		"256 fields": "m " + many(256, "K=1"),
		"longest":    "m f=\"" + strings.Repeat("x", MaxLine-6) + `"`,
	} {
		if _, err := ParseLine([]byte(line)); err != nil {
			t.Errorf("%s: %v", class, err)
		}
	}
}

// An error may end in a log of someone who may not see readings.
func TestErrLineQuotesNothing(t *testing.T) {
	for _, line := range []string{`m s="secret`, "m,secret", "m f=1 secret", "m f=secret", `m,secret=a,secret=b f=1`, "m f=1,secret", "m f=1 5 secret"} {
		_, err := ParseLine([]byte(line))
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("ParseLine(%q): %v", line, err)
		}
	}
}

func TestAppendLineRefuses(t *testing.T) {
	f := []Field{{"f", 1.0}}
	for class, p := range map[string]Point{
		"no measurement":          {Fields: f},
		"comment":                 {Measurement: "#m", Fields: f},
		"no fields":               {Measurement: "m"},
		"newline":                 {Measurement: "m\nx f=1", Fields: f},
		"newline in a string":     {Measurement: "m", Fields: []Field{{"f", "a\nb"}}},
		"backslash at the end":    {Measurement: "m", Tags: []Tag{{"a", `b\`}}, Fields: f},
		"bad utf-8":               {Measurement: "m", Tags: []Tag{{"a", "\xff"}}, Fields: f},
		"empty tag":               {Measurement: "m", Tags: []Tag{{"a", ""}}, Fields: f},
		"duplicate tag":           {Measurement: "m", Tags: []Tag{{"a", "1"}, {"a", "2"}}, Fields: f},
		"duplicate field":         {Measurement: "m", Fields: []Field{{"f", 1.0}, {"f", 2.0}}},
		"NaN":                     {Measurement: "m", Fields: []Field{{"f", math.NaN()}}},
		"Inf":                     {Measurement: "m", Fields: []Field{{"f", math.Inf(-1)}}},
		"a type that has no line": {Measurement: "m", Fields: []Field{{"f", 1}}},
		"nil":                     {Measurement: "m", Fields: []Field{{"f", nil}}},
		"too long":                {Measurement: strings.Repeat("m", MaxLine), Fields: f},
	} {
		if got := string(p.AppendLine([]byte("before"))); got != "before" {
			t.Errorf("%s: got %.80q", class, got)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPoint(t)
		line := p.AppendLine([]byte("before"))
		if string(line) == "before" {
			t.Fatalf("no line for %#v", p)
		}
		got, err := ParseLine(line[len("before"):])
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Fatalf("%s\n got %#v, %v\nwant %#v", line, got, err, p)
		}
	})
}

func drawPoint(t *rapid.T) Point {
	text := rapid.StringOf(rapid.OneOf(rapid.RuneFrom([]rune(`ab\,= "#ü日nrt`)), rapid.Rune())).Filter(validText)
	name := text.Filter(validName)
	measurement := name.Filter(func(s string) bool { return s[0] != '#' })
	value := rapid.OneOf(
		rapid.Int64().AsAny(), rapid.Uint64().AsAny(), rapid.Float64().AsAny(), text.AsAny(), rapid.Bool().AsAny(),
	).Filter(validValue)
	tags := rapid.SliceOfNDistinct(
		rapid.Custom(func(t *rapid.T) Tag { return Tag{name.Draw(t, "key"), name.Draw(t, "value")} }),
		0, 8, func(t Tag) string { return t.Key })
	fields := rapid.SliceOfNDistinct(
		rapid.Custom(func(t *rapid.T) Field { return Field{name.Draw(t, "name"), value.Draw(t, "value")} }),
		1, 8, func(f Field) string { return f.Name })
	p := Point{Measurement: measurement.Draw(t, "measurement"), Fields: fields.Draw(t, "fields")}
	if drawn := tags.Draw(t, "tags"); len(drawn) > 0 {
		p.Tags = drawn
	}
	if p.HasTime = rapid.Bool().Draw(t, "has time"); p.HasTime {
		p.Time = rapid.Int64().Draw(t, "time")
	}
	return p
}

func FuzzParseLine(f *testing.F) {
	for _, s := range []string{
		"m f=1", `m\ ,a\==b\, s="\"\\",i=1i,u=1u,b=t -5`, "# x", `m f="a\nb"`, `a\b,c\d=\e \f="\g"`, "m f=1e20,g=.5e-3 1",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		before := string(line)
		p, err := ParseLine(line)
		if string(line) != before {
			t.Fatal("the input was changed")
		}
		if err != nil {
			var refused *ErrLine
			if !errors.As(err, &refused) || refused.Pos < 0 || refused.Pos > len(line) {
				t.Fatalf("%q: %v", line, err)
			}
			return
		}
		if !p.valid() {
			t.Fatalf("%q gave %#v, which the encoder refuses", line, p)
		}
		again := p.AppendLine(nil)
		if again == nil {
			return // a shorter spelling of a line that is too long in ours
		}
		q, err := ParseLine(again)
		if err != nil || !reflect.DeepEqual(p, q) {
			t.Fatalf("%q\n gave %#v\nagain %#v, %v", line, p, q, err)
		}
	})
}

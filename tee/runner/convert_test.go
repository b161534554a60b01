package runner

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/sealing"
	"edgekeep/workload"
)

var testNow = time.Unix(1_700_000_000, 123_456_789)

func TestEncodeBatch(t *testing.T) {
	readings := []sealing.Reading{
		{Name: "m/t", Unit: "Cel", Time: 1_700_000_000_000_000_000, Value: int64(-5)},
		{Name: "m/t", Time: 1_700_000_000_250_000_000, Value: uint64(math.MaxUint64)},
		{Name: "m/f", Unit: `"%,`, Time: 1, Value: 0.1},
		{Name: "m/s", Time: -1_500_000_000, Value: "a \"b\",\n"},
		{Name: "m/b", Time: 0, Value: true},
	}
	for format, want := range map[string]string{
		workload.JSON: `{"n":"m/t","t":1700000000,"u":"Cel","v":-5}` + "\n" +
			`{"n":"m/t","t":1700000000.25,"v":18446744073709551615}` + "\n" +
			`{"n":"m/f","t":0.000000001,"u":"\"%,","v":0.1}` + "\n" +
			`{"n":"m/s","t":-1.5,"vs":"a \"b\",\n"}` + "\n" +
			`{"n":"m/b","t":0,"vb":true}` + "\n",
		workload.CSV: "name,time,value,unit\nm/t,1700000000,-5,Cel\nm/t,1700000000.25,18446744073709551615,\n" +
			"m/f,0.000000001,0.1,\"\"\"%,\"\nm/s,-1.5,\"a \"\"b\"\",\n\",\nm/b,0,true,\n",
	} {
		got, err := encodeBatch(format, readings)
		if err != nil || string(got) != want {
			t.Errorf("%s:\n%s%v, want\n%s", format, got, err, want)
		}
	}
	if _, err := encodeBatch(workload.Raw, readings); err == nil {
		t.Error("encoded readings as raw")
	}
}

// TestConvertRoundTrip: what a guest passes through comes back the same, but for an
// integral float, which JSON and CSV do not tell from an integer.
func TestConvertRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		format := rapid.SampledFrom([]string{workload.JSON, workload.CSV, workload.SenML}).Draw(t, "format")
		text := rapid.StringOf(rapid.RuneFrom([]rune("aé\"\\,;<>&{}0 \t\u2028")))
		if format == workload.CSV { // where everything is text
			text = rapid.StringMatching(`[a-z]{6,9}[ ,"\n]*x`)
		}
		value := rapid.OneOf(
			rapid.Map(rapid.Int64(), func(v int64) any { return v }),
			rapid.Map(rapid.Uint64Min(math.MaxInt64+1), func(v uint64) any { return v }),
			rapid.Map(rapid.Float64Range(-1e300, 1e300).Filter(func(f float64) bool { return f != math.Trunc(f) }), func(v float64) any { return v }),
			rapid.Map(rapid.Bool(), func(v bool) any { return v }),
			rapid.Map(text, func(v string) any { return v }),
		)
		want := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) sealing.Reading {
			return sealing.Reading{
				Name: rapid.StringMatching(`[a-zA-Z0-9][a-zA-Z0-9./:_-]{0,20}`).Draw(t, "name"), Unit: rapid.StringMatching(`[a-zA-Z/%"]{0,5}`).Draw(t, "unit"),
				Time: rapid.Int64Range(-8e18, 8e18).Draw(t, "time"), Value: value.Draw(t, "value"),
			}
		}), 1, 20).Draw(t, "readings")
		b, err := encodeBatch(format, want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeResults(format, b, testNow)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%s\n%+v, %v, want\n%+v", b, got, err, want)
		}
	})
}

func TestDecodeResults(t *testing.T) {
	now := testNow.UnixNano()
	for _, c := range []struct {
		format, in string
		want       []sealing.Reading
	}{
		{workload.JSON, "", nil},
		{workload.CSV, "", nil},
		{workload.SenML, "", nil},
		{workload.JSON, "\n \n", nil},
		{workload.JSON, `{"n":"a","v":1}`, []sealing.Reading{{Name: "a", Time: now, Value: int64(1)}}},
		{workload.JSON, ` {"vs":"","n":"a","t":1.5e9} ` + "\r\n", []sealing.Reading{{Name: "a", Time: 1_500_000_000_000_000_000, Value: ""}}},
		{workload.JSON, `{"n":"a","v":1e2,"t":-0.000000001}`, []sealing.Reading{{Name: "a", Time: -1, Value: 100.0}}},
		{workload.JSON, `{"n":"a","v":9007199254740993,"t":0}`, []sealing.Reading{{Name: "a", Value: int64(9007199254740993)}}},
		{workload.CSV, csvHeader, nil},
		{workload.CSV, csvHeader + "a,,1,\nb,2,x y,V\nc,3,true,\nd,4,007,\ne,5,,\nf,6,0x1p4,\n", []sealing.Reading{
			{Name: "a", Time: now, Value: int64(1)},
			{Name: "b", Unit: "V", Time: 2e9, Value: "x y"},
			{Name: "c", Time: 3e9, Value: true},
			{Name: "d", Time: 4e9, Value: "007"},
			{Name: "e", Time: 5e9, Value: ""},
			{Name: "f", Time: 6e9, Value: "0x1p4"},
		}},
	} {
		got, err := decodeResults(c.format, []byte(c.in), testNow)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %q: %+v, %v", c.format, c.in, got, err)
		}
	}
}

func TestDecodeResultsRefuses(t *testing.T) {
	good := `{"n":"a","v":1}` + "\n"
	for format, list := range map[string][]string{
		workload.JSON: {
			`x`, `[]`, `null`, `1`, `"a"`, `{}`, `{"n":"a"}`, `{"v":1}`, `{"n":"","v":1}`, `{"n":"a","v":1,"v":2}`, `{"n":"a","v":1,"vb":true}`,
			`{"n":"a","n":"b","v":1}`, `{"n":"a","v":1,"x":2}`, `{"n":"a","v":1,"V":2}`, `{"n":"a","v":"1"}`, `{"n":"a","v":null}`, `{"n":"a","v":{}}`,
			`{"n":"a","v":[1]}`, `{"n":1,"v":1}`, `{"n":"a","vs":1}`, `{"n":"a","vb":1}`, `{"n":"a","vd":"AA"}`, `{"n":"a","v":NaN}`, `{"n":"a","v":1e999}`,
			`{"n":"a","v":Infinity}`, `{"n":"a","v":1,"t":"1"}`, `{"n":"a","v":1,"t":1e11}`, `{"n":"a","v":1,"t":1e999}`, `{"n":"a","v":1} x`,
			`{"n":"a","v":1}{"n":"a","v":1}`, `{"n":"a","v":1`, `{"n":"a","v":1,}`, `{"n":"a" "v":1}`, `{"n":"a","v":01}`, "{\"n\":\"\xff\",\"v\":1}",
			`{"n":"` + strings.Repeat("a", maxName+1) + `","v":1}`, `{"n":"a","u":"` + strings.Repeat("a", 65) + `","v":1}`,
			`{"n":"a","vs":"` + strings.Repeat("a", maxText) + `"}`,
			strings.Repeat(good, maxReadings), strings.Repeat("\n", maxReadings) + good,
		},
		workload.CSV: {
			"a,1,1,\n", "name,time,value\n", csvHeader + "a,1,1\n", csvHeader + "a,1,1,,\n", csvHeader + "a,x,1,\n", csvHeader + "a,inf,1,\n", csvHeader + "a,0x1p3,1,\n",
			csvHeader + "a,1,NaN,\n", csvHeader + "a,1,inf,\n", csvHeader + "a,1,-Infinity,\n", csvHeader + "a,1,1e999,\n", csvHeader + ",1,1,\n",
			csvHeader + "a,1,\"x,\n", csvHeader + "a,1,x\"y,\n", csvHeader + "\xff,1,1,\n", csvHeader + "a,1,\xff,\n", csvHeader + "a,1," + strings.Repeat("x", maxText) + ",\n",
			csvHeader + strings.Repeat("a,1,1,\n", maxReadings+1),
		},
		workload.SenML: {"x", "\x80x", "\x81\xa0"},
		workload.Raw:   {"x"},
	} {
		for _, in := range list {
			if format == workload.JSON {
				in = good + in
			}
			if got, err := decodeResults(format, []byte(in), testNow); err == nil {
				t.Errorf("%s %.80q: %d readings", format, in, len(got))
			}
		}
	}
}

func FuzzDecodeResults(f *testing.F) {
	for _, in := range []string{`{"n":"a","t":1.5,"u":"K","v":1e2}`, `{"n":"a","vs":"\u00e9"}` + "\n" + `{"n":"b","vb":false}`, csvHeader + "a,1.5,1,\n\"b\",,\"x\"\"\",V\n", "\x81\xa3\x00aa\x02\x01\x22\xc4\x82\x28\x01"} {
		for i := range 3 {
			f.Add(i, []byte(in))
		}
	}
	f.Fuzz(func(t *testing.T, i int, in []byte) {
		format := []string{workload.JSON, workload.CSV, workload.SenML}[uint(i)%3]
		got, err := decodeResults(format, in, testNow)
		if err != nil {
			return
		}
		again, err := encodeBatch(workload.SenML, got) // what becomes of all results
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := sealing.ParsePack(again); len(again) < 1<<20 && (err != nil || fmt.Sprint(twice) != fmt.Sprint(got) && len(got) > 0) {
			t.Errorf("%q became %+v, then %+v, %v", in, got, twice, err)
		}
	})
}

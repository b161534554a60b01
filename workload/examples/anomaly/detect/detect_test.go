package detect

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
)

var small = &Model{Centre: 10, Spread: 2, Level: 3600, Baseline: 36000, Alarm: 0.5, Maxima: []float64{1, 2, 4}}

func TestScore(t *testing.T) {
	for deviation, want := range map[float64]float64{0: 0, 0.9: 0, 1: 0, 1.5: 0.25, 2: 0.5, 3: 0.75, 4: 1, 9: 1} {
		if got := small.score(deviation); got != want {
			t.Errorf("score(%v) = %v, want %v", deviation, got, want)
		}
	}
	for _, score := range []float64{0.25, 0.5, 0.75, 1} {
		if got := small.score(small.deviation(score)); math.Abs(got-score) > 1e-12 {
			t.Errorf("score(deviation(%v)) = %v", score, got)
		}
	}
	flat := &Model{Centre: 1, Spread: 1, Level: 1, Baseline: 2, Alarm: 1, Maxima: []float64{1, 1, 1, 2, 2}}
	for d := 0.0; d < 3; d += 0.125 {
		if got := flat.score(d); math.IsNaN(got) || got < 0 || got > 1 {
			t.Errorf("score(%v) = %v", d, got)
		}
	}
}

// TestSeries follows a step by hand: after time x at a new value a mean has gone
// 1-exp(-x/constant) of the way.
func TestSeries(t *testing.T) {
	s := NewSeries(small)
	for i := range 10 {
		if score, on, changed := s.Next(float64(1000+i*300), 10); score != 0 || on || changed {
			t.Fatalf("steady: %v %t %t", score, on, changed)
		}
	}
	var wentOn, wentOff float64
	for x := 300.0; x <= 40*3600; x += 300 {
		d := s.Deviation(3700+x, 16) // three spreads: not clipped
		if want := 3 * (math.Exp(-x/36000) - math.Exp(-x/3600)); math.Abs(d-want) > 1e-9 {
			t.Fatalf("%v s after the step: deviation %v, want %v", x, d, want)
		}
	}
	s = NewSeries(small)
	for x := 300.0; x <= 40*3600; x += 300 {
		if _, on, changed := s.Next(x, 16); changed && on {
			wentOn = x
		} else if changed {
			wentOff = x
		}
	}
	at := func(x float64) float64 { return 3 * (math.Exp(-x/36000) - math.Exp(-x/3600)) }
	if !(at(wentOn) >= 2 && at(wentOn-300) < 2) || !(at(wentOff) <= 1 && at(wentOff-300) > 1) {
		t.Errorf("on at %v, where the deviation is %v, off at %v (%v)", wentOn, at(wentOn), wentOff, at(wentOff))
	}
}

func TestTimes(t *testing.T) {
	s := NewSeries(small)
	d := s.Deviation(1e6, 12)
	for _, back := range []float64{1e6, 1e6 - 300, 1} {
		if got := s.Deviation(back, 100); got != d {
			t.Errorf("a reading of time %v moved the deviation from %v to %v", back, d, got)
		}
	}
	long, hour := NewSeries(small), NewSeries(small)
	long.Deviation(1000, 10)
	hour.Deviation(1000, 10)
	if a, b := long.Deviation(1e9, 12), hour.Deviation(4600, 12); a != b {
		t.Errorf("after a long silence %v, after an hour %v", a, b)
	}
	clipped, three := NewSeries(small), NewSeries(small)
	clipped.Deviation(300, 1e100)
	three.Deviation(300, 16)
	if clipped.baseline != three.baseline {
		t.Errorf("an outlier moved the baseline to %v, three spreads move it to %v", clipped.baseline, three.baseline)
	}
}

func TestBatch(t *testing.T) {
	d := NewDetector(small)
	line := func(name string, time int, v float64) string {
		return fmt.Sprintf("{\"n\":%q,\"t\":%d,\"v\":%v,\"u\":\"Cel\"}\n", name, time, v)
	}
	out, err := d.Batch([]byte(line("a", 300, 10) + `{"n":"a","t":301,"vs":"x"}` + "\n" + `{"n":"a","t":302,"vb":true}` + "\n" + line("b", 300, 1e9)))
	want := `{"n":"a/anomaly","t":300,"v":0}` + "\n" + `{"n":"b/anomaly","t":300,"v":1}` + "\n" + `{"n":"b/anomaly/alarm","t":300,"vb":true}` + "\n"
	if err != nil || string(out) != want {
		t.Errorf("got %s, %v", out, err)
	}
	if out, err := d.Batch(nil); err != nil || len(out) != 0 {
		t.Errorf("empty batch: %q, %v", out, err)
	}
	var many strings.Builder
	for i := range MaxSeries - 1 {
		many.WriteString(line(fmt.Sprint("s", i), 300, 10))
	}
	before := *d.series["a"]
	for _, bad := range []string{
		"{", "[]", `"x"`, "{}", `{"n":"a","t":1}`, `{"n":"a","v":1}`, `{"t":1,"v":1}`, `{"n":"","t":1,"v":1}`, `{"n":"a","t":0,"v":1}`, `{"n":"a","t":-1,"v":1}`,
		`{"n":"a","t":1,"v":1,"vb":true}`, `{"n":"a","t":1,"v":1,"x":1}`, `{"n":"a","t":1,"v":1e101}`, `{"n":"a","t":1,"v":-1e101}`, `{"n":"a","t":1e101,"v":1}`,
		`{"n":"a","t":1,"v":1e999}`, `{"n":"a","t":1,"v":"1"}`, `{"n":"` + strings.Repeat("a", 257) + `","t":1,"v":1}`, many.String(),
	} {
		if _, err := d.Batch([]byte(line("a", 900, 99) + bad)); err == nil || !strings.Contains(err.Error(), "of the batch") {
			t.Errorf("%.60s: %v", bad, err)
		}
	}
	if *d.series["a"] != before || len(d.series) != 2 {
		t.Error("a batch that failed counted")
	}
}

func TestModelInTheTree(t *testing.T) {
	raw, err := os.ReadFile("../model.json")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseModel(raw); err != nil {
		t.Error(err)
	}
}

func TestParseModelRefuses(t *testing.T) {
	for name, change := range map[string]func(*Model){
		"spread": func(m *Model) { m.Spread = 0 }, "level": func(m *Model) { m.Level = -1 }, "baseline": func(m *Model) { m.Baseline = m.Level },
		"alarm 0": func(m *Model) { m.Alarm = 0 }, "alarm": func(m *Model) { m.Alarm = 1.1 }, "none": func(m *Model) { m.Maxima = nil },
		"one": func(m *Model) { m.Maxima = m.Maxima[:1] }, "order": func(m *Model) { slices.Reverse(m.Maxima) },
		"zero": func(m *Model) { m.Maxima[0] = 0 }, "many": func(m *Model) { m.Maxima = slices.Repeat([]float64{1}, MaxMaxima+1) },
	} {
		m := *small
		m.Maxima = slices.Clone(m.Maxima)
		change(&m)
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseModel(raw); err == nil {
			t.Errorf("%s was accepted: %s", name, raw)
		}
	}
	for _, raw := range []string{"", "{}", "null", "[]", `{"center":1}`} {
		if _, err := ParseModel([]byte(raw)); err == nil {
			t.Errorf("%q was accepted", raw)
		}
	}
	raw, err := json.Marshal(small)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseModel(append(raw, " {}"...)); err == nil {
		t.Error("a second object was accepted")
	}
}

func FuzzParseModel(f *testing.F) {
	raw, err := json.Marshal(small)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"centre":1e300,"spread":1e-300,"level":1,"baseline":2,"alarm":1,"maxima":[1,1]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := ParseModel(raw)
		if err != nil {
			return
		}
		s := NewSeries(m)
		for i, v := range []float64{m.Centre, 0, -largest, largest} {
			if score, _, _ := s.Next(float64(i+1)*300, v); !(score >= 0 && score <= 1) {
				t.Errorf("score %v", score)
			}
		}
	})
}

func FuzzBatch(f *testing.F) {
	f.Add([]byte(`{"n":"a","t":1,"v":2,"u":"K"}` + "\n" + `{"n":"a","t":2,"vb":true}`))
	f.Add([]byte(`{"n":"a","t":1e99,"v":-1e100} {"n":"a","t":1e-300,"v":1}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		d := NewDetector(small)
		out, err := d.Batch(in)
		if err != nil {
			return
		}
		dec := json.NewDecoder(strings.NewReader(string(out)))
		for dec.More() {
			var r reading
			if err := dec.Decode(&r); err != nil || r.Time == nil {
				t.Fatalf("%v in %q", err, out)
			}
			if r.Value != nil && !(*r.Value >= 0 && *r.Value <= 1) {
				t.Errorf("score %v", *r.Value)
			}
		}
	})
}

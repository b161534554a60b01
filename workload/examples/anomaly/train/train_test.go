package main

import (
	"bytes"
	"errors"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/workload/examples/anomaly/detect"
)

func nabData(t *testing.T) *dataset {
	t.Helper()
	d, err := load(nabDir(t))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func nabDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("EDGEKEEP_VECTORS"); dir != "" {
		return filepath.Join(dir, "nab")
	}
	dir, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		nab := filepath.Join(dir, "../shared/vectors/nab")
		if _, err := os.Stat(nab); err == nil {
			return nab
		}
	}
	t.Skip("no vectors: set EDGEKEEP_VECTORS")
	return ""
}

func modelInTheTree(t *testing.T) *detect.Model {
	t.Helper()
	raw, err := os.ReadFile("../model.json")
	if err != nil {
		t.Fatal(err)
	}
	m, err := detect.ParseModel(raw)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestModelIsReproduced: training again gives the model in the tree, up to the
// last of its six digits (another CPU may round differently on the way).
func TestModelIsReproduced(t *testing.T) {
	out := filepath.Join(t.TempDir(), "model.json")
	if err := run([]string{"-data", nabDir(t), "-out", out}, nil); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	got, err := detect.ParseModel(raw)
	if err != nil {
		t.Fatal(err)
	}
	want := modelInTheTree(t)
	numbers := func(m *detect.Model) []float64 {
		return append([]float64{m.Centre, m.Spread, m.Level, m.Baseline, m.Alarm}, m.Maxima...)
	}
	g, w := numbers(got), numbers(want)
	if len(g) != len(w) {
		t.Fatalf("%d numbers, want %d", len(g), len(w))
	}
	for i := range w {
		if math.Abs(g[i]-w[i]) > 2e-5*math.Abs(w[i]) {
			t.Errorf("number %d is %v, in the tree %v", i, g[i], w[i])
		}
	}
}

// TestTrainingSawNoAnomaly: what the model is made of ends before the first
// labelled window, and nothing after it matters.
func TestTrainingSawNoAnomaly(t *testing.T) {
	d := nabData(t)
	if d.windows[0].first <= week {
		t.Errorf("the first window begins at reading %d, training ends at %d", d.windows[0].first, week)
	}
	o := chosen
	o.weeks = 20
	a, err := train(d.values, o)
	if err != nil {
		t.Fatal(err)
	}
	b, err := train(append(d.values[:week:week], 1e6), o)
	if err != nil {
		t.Fatal(err)
	}
	if a.Centre != b.Centre || a.Maxima[200] != b.Maxima[200] {
		t.Error("readings after the training week changed the model")
	}
	if _, err := train(d.values[:week-1], o); err == nil {
		t.Error("trained on less than a week")
	}
}

// TestScoreIsWhatTheReadmeSays, to the letter.
func TestScoreIsWhatTheReadmeSays(t *testing.T) {
	d := nabData(t)
	r := d.score(d.alarms(modelInTheTree(t)))
	t.Log(r)
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), r.String()) {
		t.Errorf("the README does not say: %v", r)
	}
	if r.windows != 4 || r.detected < 4 || r.outside > 2 || r.nab < 95 {
		t.Errorf("worse than promised: %v", r)
	}
}

// TestThresholdHolds: on normal weeks that training did not see, about as many
// have no alarm as the threshold promises. The weeks come from a process that the
// model is not told, an autoregression of order one.
func TestThresholdHolds(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	x := 0.0
	next := func() float64 { x = 0.95*x + random.NormFloat64(); return 50 + x }
	values := make([]float64, week)
	for i := range values {
		values[i] = next()
	}
	o := options{order: 12, weeks: 1000, alarm: 0.9, level: 12 * 3600, baseline: 7 * 24 * 3600}
	m, err := train(values, o)
	if err != nil {
		t.Fatal(err)
	}
	series, loud := detect.NewSeries(m), 0
	const trials = 1000
	for w := range trials {
		reached := false
		for i := range week {
			score, _, _ := series.Next(float64(w*week+i+1)*interval, next())
			reached = reached || score >= o.alarm
		}
		if reached {
			loud++
		}
	}
	if share := float64(loud) / trials; share < 0.03 || share > 0.25 {
		t.Errorf("the alarm's score was reached in %.3f of the weeks, want about 0.1", share)
	}
}

func TestAutoregression(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	values := make([]float64, 100_000)
	for i := 2; i < len(values); i++ {
		values[i] = 1.2*values[i-1] - 0.5*values[i-2] + random.NormFloat64()
	}
	a := autoregression(values, 0, 4)
	for i, want := range []float64{1.2, -0.5, 0, 0} {
		if math.Abs(a[i]-want) > 0.02 {
			t.Errorf("coefficient %d is %v, want %v", i+1, a[i], want)
		}
	}
	squares := 0.0
	for _, r := range residuals(values, 0, a) {
		squares += r * r / float64(len(values))
	}
	if math.Abs(squares-1) > 0.02 {
		t.Errorf("variance of the residuals %v, want 1", squares)
	}
}

// scored has 12,000 readings and two windows of 101.
func scored() *dataset {
	d := &dataset{windows: []window{{5000, 5100}, {6000, 6100}}, values: make([]float64, 12000)}
	for i := range d.values {
		d.times = append(d.times, time.Unix(int64(i)*interval, 0))
	}
	return d
}

// TestNAB: worked examples. sigma is the formula of the paper, 2/(1+e^(5y))-1.
func TestNAB(t *testing.T) {
	for name, c := range map[string]struct {
		alarms []int
		want   float64
	}{
		"null":                      {nil, 0},
		"perfect":                   {[]int{5000, 6000}, 100},
		"probation":                 {[]int{5000, 6000, 100, 749}, 100},
		"later alarms do not count": {[]int{5000, 5001, 5100, 6000, 6050}, 100},
		"one window":                {[]int{6000}, 50},
		"before any window":         {[]int{750, 5000, 6000}, 100 - 100*0.11/4},
		"long after":                {[]int{5000, 6000, 9000}, 100 - 100*0.11/4},
		"half a width after":        {[]int{5000, 5150, 6000}, 100 + 100*0.11*(2/(1+math.Exp(2.5))-1)/4},
		"middle": {[]int{5050, 6000}, 25 * (2 + 1 +
			(2/(1+math.Exp(-5*51.0/101))-1)/(2/(1+math.Exp(-5))-1))},
	} {
		if got := scored().nab(c.alarms); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestResult(t *testing.T) {
	r := scored().score([]int{10, 3000, 5010, 5050, 6020, 7000, 8000})
	if r.windows != 2 || r.detected != 2 || r.alarms != 6 || r.outside != 3 || r.precision != 0.5 || r.delay != 15*interval*time.Second {
		t.Errorf("got %+v", r)
	}
	if want := 3.0 / ((12000 - 2016 - 202) / 2016.0); math.Abs(r.perWeek-want) > 1e-9 {
		t.Errorf("%v a week, want %v", r.perWeek, want)
	}
	if r := scored().score(nil); r.precision != 0 || r.detected != 0 || r.delay != 0 {
		t.Errorf("no alarms: %+v", r)
	}
}

func TestLoadRefuses(t *testing.T) {
	var out bytes.Buffer
	if err := run([]string{"-data", t.TempDir()}, &out); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	const series = "timestamp,value\n2020-01-01 00:00:00,1\n2020-01-01 00:05:00,2\n"
	window := func(a, b string) string {
		return `{"realKnownCause/` + seriesName + `.csv":[["2020-01-01 ` + a + `.000000","2020-01-01 ` + b + `.000000"]]}`
	}
	for name, c := range map[string]struct{ series, windows, want string }{
		"time":     {"timestamp,value\nyesterday,1\n", "{}", "series"},
		"value":    {"timestamp,value\n2020-01-01 00:00:00,x\n", "{}", "series"},
		"columns":  {"timestamp\n2020-01-01 00:00:00\n", "{}", "series"},
		"labels":   {series, "[", "labels"},
		"none":     {series, "{}", "labels"},
		"short":    {series, window("", ""), "labels"},
		"unknown":  {series, window("00:00:00", "00:10:00"), "labels"},
		"backward": {series, window("00:05:00", "00:00:00"), "labels"},
		"too few":  {series, window("00:00:00", "00:05:00"), "needed"},
	} {
		dir := t.TempDir()
		for file, text := range map[string]string{seriesName + ".csv": c.series, "combined_windows.json": c.windows} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := run([]string{"-data", dir}, &out); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

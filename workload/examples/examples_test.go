package examples

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"math"
	"math/big"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"edgekeep/workload/examples/anomaly/detect"
)

// batches cuts lines into batches of 1 to 500, the same ones every time.
func batches(lines []string) []string {
	random := rand.New(rand.NewPCG(3, 4))
	var out []string
	for len(lines) > 0 {
		n := min(len(lines), 1+random.IntN(500))
		out = append(out, strings.Join(lines[:n], ""))
		lines = lines[n:]
	}
	return out
}

func jsonLines(series string, points []point) []string {
	var out []string
	for _, p := range points {
		out = append(out, fmt.Sprintf("{\"n\":%q,\"t\":%d,\"v\":%v}\n", series, p.t, p.v))
	}
	return out
}

func TestThreshold(t *testing.T) {
	g := newGuest(t, "threshold")
	points := machine(t)[:6000]
	var got strings.Builder
	for _, b := range batches(jsonLines("machine/temperature", points)) {
		out, status := g.run(t, b, g.manifest.Args...)
		if status != 0 {
			t.Fatalf("status %d: %s", status, g.stderr.String())
		}
		got.WriteString(out)
	}
	var want strings.Builder
	on := false
	for _, p := range points {
		if is := p.v > 90 || on && p.v > 88; is != on {
			on = is
			fmt.Fprintf(&want, "{\"n\":\"alarm/machine/temperature\",\"t\":%d,\"vb\":%t}\n", p.t, on)
		}
	}
	if got.String() != want.String() || want.Len() == 0 {
		t.Errorf("got\n%s\nwant\n%s", got.String(), want.String())
	}
}

func TestThresholdBothSides(t *testing.T) {
	g := newGuest(t, "threshold")
	batch := func(name string, values ...string) string {
		var b strings.Builder
		for i, v := range values {
			fmt.Fprintf(&b, "{\"u\":\"\\u00b0C \\\"x\\\"\", \"v\":%s,\"t\":%d.250, \"n\":%q}\n", v, i, name)
		}
		return b.String()
	}
	for _, step := range []struct{ batch, want string }{
		{"", ""},
		{batch("a", "-1e0", "0", "1"), "alarm/a 0.250 true"},
		{batch("b", "11") + batch("a", "0.5"), "alarm/b 0.250 true"},
		{batch("a", "2", "8", "10.5"), "alarm/a 0.250 false alarm/a 2.250 true"},
		{`{"n":"b","t":1,"vs":"off \\"}` + "\n" + `{"n":"b","t":2,"vb":false}` + "\n" + batch("b", "8"), "alarm/b 0.250 false"},
	} {
		out, status := g.run(t, step.batch, "--above", "10", "--below", "0", "--hysteresis", "2")
		var got []string
		for line := range strings.Lines(out) {
			var r struct {
				N string
				T json.Number
				B bool `json:"vb"`
			}
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprintf("%s %s %t", r.N, r.T, r.B))
		}
		if status != 0 || strings.Join(got, " ") != step.want {
			t.Errorf("%s\ngot %q, status %d, want %q\n%s", step.batch, got, status, step.want, g.stderr.String())
		}
	}
	if raw, err := os.ReadFile(filepath.Join(g.files, "state")); err != nil || string(raw) != "a\n" {
		t.Errorf("state is %q, %v", raw, err)
	}
}

func TestThresholdRefuses(t *testing.T) {
	g := newGuest(t, "threshold")
	good := `{"n":"a","t":1,"v":95}`
	for _, line := range []string{
		``, `{}`, `[]`, `null`, good + good, good + "x", good[:len(good)-1], `{"n":"a","t":1}`, `{"n":"a","v":1}`, `{"t":1,"v":1}`,
		`{"n":"a","t":1,"v":1,"v":2}`, `{"n":"a","t":1,"v":1,"vb":true}`, `{"n":"a","t":1,"v":1,"w":2}`, `{"n":"a","t":1,"v":1,}`,
		`{"n":"","t":1,"v":1}`, `{"n":"a b","t":1,"v":1}`, `{"n":"/a","t":1,"v":1}`, `{"n":"\u0061","t":1,"v":1}`, `{"n":"é","t":1,"v":1}`,
		`{"n":"` + strings.Repeat("a", 257) + `","t":1,"v":1}`, `{"n":"a","t":1,"v":1,"u":"` + strings.Repeat("x", 2048) + `"}`,
		`{"n":"a","t":1,"v":01}`, `{"n":"a","t":1,"v":1.}`, `{"n":"a","t":1,"v":.5}`, `{"n":"a","t":1,"v":+1}`, `{"n":"a","t":1,"v":NaN}`,
		`{"n":"a","t":1,"v":1e999}`, `{"n":"a","t":1,"v":0x10}`, `{"n":"a","t":1,"v":` + strings.Repeat("1", 41) + `}`, `{"n":"a","t":"1","v":1}`,
		`{"n":"a","t":1,"v":null}`, `{"n":"a","t":1,"vb":1}`, `{"n":"a","t":1,"vs":"\x"}`, `{"n":"a","t":1,"vs":"\u12"}`, "{\"n\":\"a\x00\",\"t\":1,\"v\":1}",
		`{"n":"a","t":1,"vs":"`, `{"n":"a","t":1,"vs":"\`, `{"nnnnnnnnn":1}`, `{"n":"a","t":,"v":1}`, `{"n":"a","t":1e,"v":1}`, "\xff",
	} {
		out, status := g.run(t, good+"\n"+line+"\n"+good+"\n", "--above", "90")
		if status != 2 || !strings.Contains(g.stderr.String(), "line 2 of the batch") {
			t.Errorf("%s: status %d, stdout %q, stderr %q", line, status, out, g.stderr.String())
		}
	}
	for _, args := range [][]string{{}, {"--above"}, {"--above", "x"}, {"--above", "inf"}, {"--over", "1"}, {"--above", "1", "--below", "0", "--hysteresis", "1"}, {"--above", "1", "--hysteresis", "-1"}} {
		if _, status := g.run(t, good, args...); status != 2 {
			t.Errorf("arguments %q: status %d", args, status)
		}
	}
	if left, err := os.ReadDir(g.files); err != nil || len(left) != 0 {
		t.Errorf("batches that failed left %v, %v", left, err)
	}
	for _, state := range []string{"a", "a\na\n", "\n", "\x00\n", "a b\n", strings.Repeat("a", 300) + "\n"} {
		if err := os.WriteFile(filepath.Join(g.files, "state"), []byte(state), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, status := g.run(t, good, "--above", "90"); status != 2 || !strings.Contains(g.stderr.String(), "state") {
			t.Errorf("state %q: status %d, stderr %q", state, status, g.stderr.String())
		}
	}
}

func TestThresholdIsBounded(t *testing.T) {
	g := newGuest(t, "threshold")
	var b strings.Builder
	for i := range 257 {
		fmt.Fprintf(&b, "{\"n\":\"s%d\",\"t\":1,\"v\":95}\n", i)
	}
	if _, status := g.run(t, b.String(), "--above", "90"); status != 2 || !strings.Contains(g.stderr.String(), "256 alarms are on") {
		t.Errorf("status %d, stderr %q", status, g.stderr.String())
	}
}

// exact computes the statistics of a window with 300 bits.
func exact(window []float64) (mean, sd float64) {
	number := func(v float64) *big.Float { return new(big.Float).SetPrec(300).SetFloat64(v) }
	sum, n := number(0), number(float64(len(window)))
	for _, v := range window {
		sum.Add(sum, number(v))
	}
	m := sum.Quo(sum, n)
	squares := number(0)
	for _, v := range window {
		d := number(v)
		d.Sub(d, m)
		squares.Add(squares, d.Mul(d, d))
	}
	mean, _ = m.Float64()
	if len(window) > 1 {
		sd, _ = squares.Quo(squares, number(float64(len(window)-1))).Float64()
	}
	return mean, math.Sqrt(sd)
}

func TestRolling(t *testing.T) {
	points := machine(t)[:5000]
	// A huge offset and a spike of 1e15 are what running sums do not survive.
	var hard []point
	for i, p := range points {
		hard = append(hard, point{p.t, p.v + 1e9})
		if i == 1000 {
			hard[i].v = 1e15
		}
	}
	for name, series := range map[string][]point{"machine": points, "hard": hard} {
		t.Run(name, func(t *testing.T) { checkRolling(t, series) })
	}
}

func checkRolling(t *testing.T, points []point) {
	g := reactor(t, "rolling")
	var rows []string
	for _, p := range points {
		rows = append(rows, fmt.Sprintf("m/t,%d.5,%v,Cel\n", p.t, p.v))
	}
	const header = "name,time,value,unit\n"
	var got []string
	for _, b := range batches(rows) {
		out, ok := g.call(t, header+b)
		if !ok {
			t.Fatal(g.stderr.String())
		}
		if rest, found := strings.CutPrefix(out, header); found {
			got = append(got, strings.Split(strings.TrimSuffix(rest, "\n"), "\n")...)
		} else if out != "" {
			t.Fatalf("output without a header: %q", out)
		}
	}
	if len(got) != len(points)/12*4 {
		t.Fatalf("%d rows, want %d", len(got), len(points)/12*4)
	}
	for i := 11; i < len(points); i += 12 {
		var window []float64
		low, high := math.Inf(1), math.Inf(-1)
		for _, p := range points[max(0, i-287) : i+1] {
			window = append(window, p.v)
			low, high = min(low, p.v), max(high, p.v)
		}
		mean, sd := exact(window)
		for j, want := range []struct {
			what string
			v    float64
		}{{"mean", mean}, {"min", low}, {"max", high}, {"sd", sd}} {
			f := strings.Split(got[i/12*4+j], ",")
			v, err := strconv.ParseFloat(f[2], 64)
			if err != nil || f[0] != "m/t/"+want.what || f[1] != fmt.Sprintf("%d.5", points[i].t) || f[3] != "Cel" || math.Abs(v-want.v) > 1e-12*math.Abs(want.v) {
				t.Fatalf("reading %d: got %q, want %s %v", i, f, want.what, want.v)
			}
		}
	}
}

func TestRollingRefuses(t *testing.T) {
	const header = "name,time,value,unit\n"
	g := reactor(t, "rolling", "--window", "3", "--every", "2")
	if out, ok := g.call(t, header+"a,1,1,\n"); !ok || out != "" {
		t.Fatalf("got %q, %t", out, ok)
	}
	for _, batch := range []string{
		"a,2,2,\n", "name,time,value\n", header + "a,2,5\n", header + "a,2,5,,\n", header + ",2,5,\n", header + "a b,2,5,\n", header + "a,x,5,\n", header + "a,2,,\n",
		header + "a,2,nan,\n", header + "a,2,inf,\n", header + "a,2,+1,\n", header + "a,2,1e151,\n", header + "a,2,1e999,\n", header + "a,2,5,\"x\"\n",
		header + "a,2,5,\xff\n", header + "a,2,5,\n\n", header + "a,2,true,\n", header + strings.Repeat("a", 257) + ",2,5,\n", header + "a,2,5,\na,3,x,\n",
		header + func() (rows string) {
			for i := range 64 {
				rows += fmt.Sprintf("s%d,1,1,\n", i)
			}
			return
		}(),
	} {
		if out, ok := g.call(t, batch); ok || !strings.HasPrefix(g.stderr.String(), "rolling: ") {
			t.Errorf("%q: got %q, stderr %q", batch, out, g.stderr.String())
		}
	}
	// Nothing of those counted.
	out, ok := g.call(t, header+"a,4,2,K\na,5,3,K\na,6,7,K\n")
	want := header + "a/mean,4,1.5,K\na/min,4,1.0,K\na/max,4,2.0,K\na/sd,4,0.7071067811865476,K\n" +
		"a/mean,6,4.0,K\na/min,6,2.0,K\na/max,6,7.0,K\na/sd,6,2.6457513110645907,K\n"
	if !ok || out != want {
		t.Errorf("got %q, want %q", out, want)
	}
	if out, ok := g.call(t, ""); !ok || out != "" {
		t.Errorf("empty batch: got %q, %t", out, ok)
	}
	if ptr := g.export(t, "edgekeep_alloc", 1<<20+1); ptr != 0 {
		t.Errorf("room for more than a batch: %#x", ptr)
	}
	if got := int64(g.export(t, "edgekeep_batch", 8, 10)); got != -1 {
		t.Errorf("a batch elsewhere: %d", got)
	}
}

func TestReactorsRefuseArguments(t *testing.T) {
	for name, bad := range map[string][][]string{
		"rolling": {{"--window"}, {"--window", "0"}, {"--window", "4097"}, {"--every", "x"}, {"--size", "1"}},
		"anomaly": {{"none.json"}, {"a", "b"}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, args := range bad {
				g := newGuest(t, name)
				if _, err := g.instantiate(t, nil, args); err == nil || !strings.HasPrefix(g.stderr.String(), name+": ") {
					t.Errorf("arguments %q: %v, stderr %q", args, err, g.stderr.String())
				}
			}
		})
	}
}

// TestAnomaly: the guest computes what the package does natively, over the whole
// series. That the package computes the right thing is tested there.
func TestAnomaly(t *testing.T) {
	g := reactor(t, "anomaly")
	raw, err := os.ReadFile(filepath.Join(g.dir, "model.json"))
	if err != nil {
		t.Fatal(err)
	}
	model, err := detect.ParseModel(raw)
	if err != nil {
		t.Fatal(err)
	}
	points := machine(t)
	var got []string
	for i, b := range batches(jsonLines("machine/temperature", points)) {
		if i == 3 { // a batch that fails changes nothing
			if _, ok := g.call(t, b+"{"); ok || !strings.Contains(g.stderr.String(), "of the batch") {
				t.Fatalf("stderr %q", g.stderr.String())
			}
		}
		out, ok := g.call(t, b)
		if !ok {
			t.Fatal(g.stderr.String())
		}
		got = append(got, strings.SplitAfter(out, "\n")...)
	}
	at, alarms := 0, 0
	next := func() (name string, time float64, value any) {
		for got[at] == "" {
			at++
		}
		var r struct {
			N  string
			T  float64
			V  *float64
			Vb *bool
		}
		if err := json.Unmarshal([]byte(got[at]), &r); err != nil {
			t.Fatal(err)
		}
		at++
		if r.Vb != nil {
			return r.N, r.T, *r.Vb
		}
		return r.N, r.T, *r.V
	}
	series := detect.NewSeries(model)
	for _, p := range points {
		score, on, changed := series.Next(float64(p.t), p.v)
		name, time, v := next()
		if f, ok := v.(float64); !ok || name != "machine/temperature/anomaly" || time != float64(p.t) || math.Abs(f-score) > 1e-6 {
			t.Fatalf("got %s %v %v, want %v %v", name, time, v, p.t, score)
		}
		if changed {
			alarms++
			if name, time, v = next(); name != "machine/temperature/anomaly/alarm" || time != float64(p.t) || v != on {
				t.Fatalf("got %s %v %v, want %v %v", name, time, v, p.t, on)
			}
		}
	}
	if left := strings.Join(got[at:], ""); left != "" || alarms == 0 {
		t.Errorf("%d changes of the alarm, then %q", alarms, left)
	}
}

func TestManifests(t *testing.T) {
	for name, want := range map[string]string{"threshold": "filter json", "rolling": "reactor csv", "anomaly": "reactor json"} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, name)
			m := g.manifest
			if got := m.Shape + " " + m.Input.Format; m.Name != name || m.Module != name+".wasm" || got != want || m.Output.Format != m.Input.Format {
				t.Errorf("manifest %+v", m)
			}
			files, err := os.ReadDir(g.dir)
			if err != nil || len(files) != 2+len(m.Models) {
				t.Errorf("built %v, %v", files, err)
			}
		})
	}
}

// TestReproducible: a copy of the tree elsewhere builds the same bytes.
func TestReproducible(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "another place")
	here := os.DirFS(".")
	if err := os.CopyFS(filepath.Join(elsewhere, "workload/examples"), here); err != nil {
		t.Fatal(err)
	}
	root := os.DirFS("../..")
	for _, name := range []string{"go.mod", "go.sum"} {
		raw, err := fs.ReadFile(root, name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(elsewhere, name), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"threshold", "rolling", "anomaly"} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, name)
			out := filepath.Join(t.TempDir(), "out put")
			cmd := exec.CommandContext(t.Context(), "sh", filepath.Join(elsewhere, "workload/examples/build.sh"), out, name)
			if msg, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, msg)
			}
			first, err := os.ReadFile(filepath.Join(g.dir, g.manifest.Module))
			if err != nil {
				t.Fatal(err)
			}
			second, err := os.ReadFile(filepath.Join(out, name, g.manifest.Module))
			if err != nil || !bytes.Equal(first, second) {
				t.Errorf("%v, %d and %d bytes, not the same", err, len(first), len(second))
			}
			for _, trace := range []string{elsewhere, built.dir, "/root/", "/home/", "workload/examples/build"} {
				if bytes.Contains(second, []byte(trace)) {
					t.Errorf("the module contains %q", trace)
				}
			}
		})
	}
}

func TestBuildRefuses(t *testing.T) {
	if err := Build(t.Context(), t.TempDir(), "none"); err == nil || !strings.Contains(err.Error(), "no example is named none") {
		t.Error(err)
	}
}

package rig

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"edgekeep/cloud/client"
	"edgekeep/sealing"
	"edgekeep/workload/examples"
	"edgekeep/workload/examples/anomaly/detect"
)

var buildCLI = sync.OnceValue(func() error {
	cmd := exec.Command("go", "build", "-o", filepath.Join(programs, "edgekeep"), "edgekeep/cmd/edgekeep")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building edgekeep: %w\n%s", err, out)
	}
	return nil
})

// cli runs the edgekeep program with a kit.
func (b *bench) cli(kit string, args ...string) (stdout, stderr string, err error) {
	b.t.Helper()
	return b.cliWith("", kit, args...)
}

// cliWith is cli with something on standard input.
func (b *bench) cliWith(stdin, kit string, args ...string) (stdout, stderr string, err error) {
	b.t.Helper()
	b.must(buildCLI())
	cmd := exec.CommandContext(b.ctx, filepath.Join(programs, "edgekeep"), append([]string{"--kit", b.KitDir(kit)}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("edgekeep %s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), errs.String(), err
}

// operate runs the edgekeep program as the operator, shows what it says and returns
// it.
func (b *bench) operate(args ...string) string {
	b.t.Helper()
	out, errs, err := b.cli("operator", args...)
	b.must(err)
	b.t.Logf("$ edgekeep %s\n%s%s", strings.Join(args, " "), out, errs)
	return out
}

// TestExamples runs the three example workloads over a machine's whole history,
// with the program that a user has, and ends the keep in the middle. Their results
// are those that the same readings give without Edgekeep.
func TestExamples(t *testing.T) {
	file := machine(t)
	dir := t.TempDir()
	if err := examples.Build(t.Context(), dir); err != nil {
		t.Skip(err)
	}
	b, g := up(t, 3*time.Minute, Options{}, "machine")
	b.must(g.StartRunners(3))
	want := map[string][]sealing.Reading{
		"threshold": thresholds(file.want), "rolling": windows(file.want), "anomaly": anomalies(t, dir, file.want),
	}
	for name := range want {
		bundle := filepath.Join(dir, name+".ekw")
		if out := b.operate("workload", "pack", filepath.Join(dir, name), "--out", bundle); !strings.Contains(out, "Packed "+name) {
			t.Errorf("workload pack: %s", out)
		}
		if out := b.operate("workload", "deploy", g.Name, bundle); !strings.Contains(out, "Deployed "+name+" on gw1") {
			t.Errorf("workload deploy: %s", out)
		}
	}
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", file.speed(20*time.Second)))
	got := map[string]*collected{}
	for name := range want {
		r, err := b.consumer.Results(name)
		b.must(err)
		got[name] = &collected{b: b, results: r}
	}
	got["anomaly"].upTo(len(want["anomaly"]) / 3)
	b.must(g.KillKeep())
	b.must(g.StartKeep(b.ctx))
	for name, c := range got {
		c.upTo(len(want[name]))
		c.equal(name, want[name])
	}
	b.finish(g, "machine")
	for name := range want { // nothing comes behind it
		c := got[name]
		c.more(0)
		c.equal(name, want[name])
		b.runs(g, name)
	}

	b.operate("workload", "ls")
	for name := range want {
		out := b.operate("workload", "inspect", name)
		if !strings.Contains(out, "that of the bundle") || !strings.Contains(out, "running") {
			t.Errorf("workload inspect %s: %s", name, out)
		}
	}
	for name := range want {
		out, errs, err := b.cli("consumer", "workload", "results", name)
		b.must(err)
		if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != len(want[name]) {
			t.Errorf("workload results %s prints %d lines, want %d", name, len(lines), len(want[name]))
		} else {
			t.Logf("$ edgekeep workload results %s\n%s\n...%s", name, strings.Join(lines[:min(4, len(lines))], "\n"), errs)
		}
		out, errs, err = b.cli("consumer", "--json", "workload", "results", name)
		b.must(err)
		first, _, _ := strings.Cut(out, "\n")
		t.Logf("--json: %s%s", first, errs)
		out, errs, err = b.cli("consumer", "workload", "logs", name)
		b.must(err)
		t.Logf("$ edgekeep workload logs %s\n%s%s", name, out, errs)
	}
	b.findings(g, nil)
	b.operate("workload", "stop", "threshold")
	b.operate("workload", "ls")
}

// collected are an instance's results.
type collected struct {
	b       *bench
	results *client.Results
	got     []client.Result
}

func (c *collected) more(wait time.Duration) (n int) {
	c.b.t.Helper()
	got, err := c.results.Next(c.b.ctx, wait)
	if err != nil {
		return 0
	}
	for _, r := range got {
		if r.Gap != "" || r.Conflict != "" || r.Line != uint64(len(c.got))+1 || r.Epoch != 1 {
			c.b.t.Errorf("result %d is %+v", len(c.got)+1, r)
		}
		c.got = append(c.got, r)
	}
	return len(got)
}

func (c *collected) upTo(n int) {
	c.b.t.Helper()
	c.b.until(fmt.Sprintf("%d results", n), func() error {
		for len(c.got) < n {
			if c.more(time.Second) == 0 {
				return fmt.Errorf("%d so far", len(c.got))
			}
		}
		return nil
	})
}

// equal compares results; a sum may be of another order in its last bits.
func (c *collected) equal(name string, want []sealing.Reading) {
	c.b.t.Helper()
	if len(c.got) != len(want) {
		c.b.t.Errorf("%s: %d results, want %d", name, len(c.got), len(want))
	}
	for i := range min(len(c.got), len(want)) {
		g, w := c.got[i].Reading, want[i]
		a, b := number(g.Value), number(w.Value)
		if g.Name != w.Name || g.Time != w.Time || g.Unit != w.Unit || !(math.Abs(a-b) <= 1e-9*max(1, math.Abs(b))) {
			c.b.t.Fatalf("%s: result %d is %+v, want %+v", name, i+1, g, w)
		}
	}
}

// number is a reading's value, a boolean as 0 or 1.
func number(v any) float64 {
	switch v {
	case true:
		return 1
	case false:
		return 0
	}
	return asFloat(v)
}

// thresholds are what threshold says above 90, with a hysteresis of 2.
func thresholds(in []sealing.Reading) (out []sealing.Reading) {
	on := false
	for _, r := range in {
		if v := number(r.Value); !on && v > 90 || on && v <= 88 {
			on = !on
			out = append(out, sealing.Reading{Name: "alarm/" + r.Name, Time: r.Time, Value: on})
		}
	}
	return out
}

// windows are what rolling says of 288 readings, after every 12.
func windows(in []sealing.Reading) (out []sealing.Reading) {
	for i := 11; i < len(in); i += 12 {
		w := in[max(0, i-287) : i+1]
		low, high, mean, squares := math.Inf(1), math.Inf(-1), 0.0, 0.0
		for _, r := range w {
			v := number(r.Value)
			low, high, mean = min(low, v), max(high, v), mean+v/float64(len(w))
		}
		for _, r := range w {
			squares += (number(r.Value) - mean) * (number(r.Value) - mean)
		}
		r := in[i]
		for _, x := range []struct {
			what  string
			value float64
		}{{"mean", mean}, {"min", low}, {"max", high}, {"sd", math.Sqrt(squares / float64(len(w)-1))}} {
			out = append(out, sealing.Reading{Name: r.Name + "/" + x.what, Time: r.Time, Value: x.value})
		}
	}
	return out
}

// anomalies are what the detector says, without WebAssembly and all at once.
func anomalies(t *testing.T, dir string, in []sealing.Reading) (out []sealing.Reading) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "anomaly/model.json"))
	if err != nil {
		t.Fatal(err)
	}
	model, err := detect.ParseModel(raw)
	if err != nil {
		t.Fatal(err)
	}
	s := detect.NewSeries(model)
	alarms := 0
	for _, r := range in {
		score, on, changed := s.Next(float64(r.Time/1e9), number(r.Value))
		out = append(out, sealing.Reading{Name: r.Name + "/anomaly", Time: r.Time, Value: math.Round(score*1e6) / 1e6})
		if changed {
			out = append(out, sealing.Reading{Name: r.Name + "/anomaly/alarm", Time: r.Time, Value: on})
			alarms++
		}
	}
	if alarms == 0 {
		t.Fatal("no alarm in the whole history: there is nothing to compare")
	}
	t.Logf("%d alarms went on or off", alarms)
	return out
}

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"edgekeep/cloud/client"
	"edgekeep/cloud/fleet"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// verdict is one with this status on evidence.
func verdict(evidence []byte, affirming bool) attest.Verdict {
	sum := sha256.Sum256(evidence)
	v := attest.Verdict{Subject: "acme/gw1", EvidenceHash: sum[:], Assurance: "tpm", IssuedAt: 1_800_000_000, Expires: 1_800_000_600}
	a := attest.Appraisal{Vector: attest.Vector{Instance: 2}, Status: attest.TierAffirming}
	if !affirming {
		a = attest.Appraisal{Vector: attest.Vector{Instance: 96}, Status: attest.TierContraindicated}
	}
	v.Submods = map[string]attest.Appraisal{attest.Submodule: a}
	return v
}

func TestEvidenceIsChecked(t *testing.T) {
	raw := golden(t, "../../tee/attest/testdata/evidence.golden")
	if s, err := checkEvidence(raw, verdict(raw, true)); err != nil || s.Verdict.Subject != "acme/gw1" {
		t.Error(err)
	}
	changed := bytes.Clone(raw)
	changed[len(changed)-1] ^= 1
	for _, tt := range []struct {
		raw  []byte
		v    attest.Verdict
		want string
	}{
		{raw, verdict(raw, false), "the verdict on acme/gw1 is contraindicated"},
		{raw, verdict(changed, true), "not on its newest evidence"},
		{changed, verdict(changed, true), "the evidence: signature"},
		{nil, verdict(nil, true), "the evidence"},
	} {
		if _, err := checkEvidence(tt.raw, tt.v); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v; want %q", err, tt.want)
		}
	}
}

func view(instance, holder string, epoch uint64) fleet.View {
	return fleet.View{Entry: workload.Entry{Instance: instance, Holder: holder, Epoch: epoch}, Name: "alarm", Version: "1.0.0", By: "operator", Since: 1_800_000_000}
}

func TestInstanceLines(t *testing.T) {
	asked := map[string]int{}
	lines := instanceLines([]fleet.View{
		view("a", "gw1", 3), view("b", "gw1", 1), view("c", "gw1", 2), view("d", "", 4), view("e", "gw2", 1), view("f", "gw1", 1),
	}, func(gateway string) (said, error) {
		asked[gateway]++
		if gateway == "gw2" {
			return said{}, errors.New("there is no evidence yet")
		}
		return said{Workloads: []attest.Workload{
			{Instance: "a", Epoch: 3, Phase: "live", Running: true, Failures: 2, Reason: "it took 600ms for a batch"},
			{Instance: "b", Epoch: 1, Phase: "live", Reason: "the module does not validate"},
			{Instance: "c", Epoch: 1, Phase: "live", Running: true}, // of an epoch before
			{Instance: "f", Epoch: 1, Phase: "frozen"},
		}}, nil
	})
	for i, want := range []string{"running", "not running", "not seen yet", "stopped", "not known", "frozen"} {
		if l := lines[i]; l.State != want || l.Running != (want == "running") {
			t.Errorf("%+v; want %q", l, want)
		}
	}
	if asked["gw1"] != 1 || asked["gw2"] != 1 || len(asked) != 2 {
		t.Errorf("asked %v", asked)
	}
	var out strings.Builder
	printInstances(&out, lines)
	for _, want := range []string{"INSTANCE", "it took 600ms for a batch", "there is no evidence yet", "nobody", "alarm 1.0.0"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	out.Reset()
	printInstances(&out, instanceLines(nil, nil))
	if !strings.Contains(out.String(), "edgekeep workload pack DIR") {
		t.Error(out.String())
	}
}

func TestInspected(t *testing.T) {
	h := func(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }
	i := inspected{
		rec: fleet.Record{
			Entry: workload.Entry{Instance: "a", Epoch: 3, Holder: "gw2", Bundle: h(1), Line: 40},
			History: []fleet.Event{
				{Epoch: 1, Holder: "gw1", By: "operator"}, {Epoch: 2, Holder: "gw1", Line: 10, By: "gw1"}, {Epoch: 3, Holder: "gw2", Line: 40, By: "gw1"},
			},
		},
		manifest: workload.Manifest{Name: "alarm", Version: "1.0.0", Module: h(2), Models: []workload.Model{{Name: "m", Hash: h(3), Size: 9}}, Nodes: []string{"*"}},
		line:     instanceLine{Instance: "a", Workload: "alarm", Version: "1.0.0", Holder: "gw2", Epoch: 3, State: "running"},
		seen:     true, verdict: verdict(nil, true),
		claims: attest.Workload{
			Instance: "a", Bundle: h(1), Module: h(2), Models: [][]byte{h(4)}, Epoch: 3, Phase: "live", Running: true,
			Rewriter: "1", Rewritten: h(5), Compiler: true, Protection: "memfd_secret",
		},
	}
	var out strings.Builder
	i.print(&out)
	for _, want := range []string{
		"epoch 1    gw1          after line 0, until line 10, later ones are fenced; by operator",
		"epoch 3    gw2          after line 40, goes on; by gw1", strings.Repeat("02", 32) + ": that of the bundle",
		strings.Repeat("04", 32) + ": NOT that of the bundle", strings.Repeat("05", 32) + ", by version 1 of the rules, compiled", "memory    memfd_secret",
		"Evidence of acme/gw1, verified", "any gateway",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	raw, err := json.Marshal(i.json())
	var v struct {
		History []struct {
			Until *uint64 `json:"lines_until"`
		}
		Evidence *struct{ Protection string }
	}
	if err := errors.Join(err, json.Unmarshal(raw, &v)); err != nil {
		t.Fatal(err)
	}
	if v.Evidence == nil || v.Evidence.Protection != "memfd_secret" || *v.History[0].Until != 10 || v.History[2].Until != nil {
		t.Errorf("%s", raw)
	}
	i.seen = false
	if raw, _ := json.Marshal(i.json()); !strings.Contains(string(raw), `"evidence":null`) {
		t.Errorf("%s", raw)
	}
}

// A move is watched as the ledger and the evidence change.
func TestMoveIsWatched(t *testing.T) {
	attempt := []byte("0123456789abcdef")
	before := fleet.Record{Entry: workload.Entry{Instance: "a", Epoch: 4, Holder: "gw1"}, History: []fleet.Event{{Epoch: 4, Holder: "gw1"}}}
	after := func(events ...fleet.Event) fleet.Record {
		r := fleet.Record{History: append([]fleet.Event{{Epoch: 4, Holder: "gw1"}}, events...)}
		last := r.History[len(r.History)-1]
		r.Entry = workload.Entry{Instance: "a", Epoch: last.Epoch, Holder: last.Holder}
		return r
	}
	moved := fleet.Event{Epoch: 5, Holder: "gw2", Attempt: attempt, By: "gw1"}
	for name, tt := range map[string]struct {
		then  fleet.Record // what the ledger has after 3 s
		epoch uint64
		want  string
	}{
		"moved":            {after(moved), 5, ""},
		"moved and on":     {after(moved, fleet.Event{Epoch: 6, Holder: "gw3"}), 5, ""},
		"after another":    {after(fleet.Event{Epoch: 5, Holder: "gw1"}, fleet.Event{Epoch: 6, Holder: "gw2", Attempt: attempt}), 6, ""},
		"nothing":          {before, 0, "is still held by gw1, and nothing is lost"},
		"taken back":       {after(fleet.Event{Epoch: 5, Holder: "gw1", Attempt: []byte("another")}), 0, "the ledger refused gw2, and a goes on on gw1 at epoch 5"},
		"stopped":          {after(fleet.Event{Epoch: 5, By: "operator"}), 0, "was stopped meanwhile"},
		"recovered":        {after(fleet.Event{Epoch: 5, Holder: "gw3", By: "owner"}), 0, "gw3 holds instance a now, at epoch 5, by owner's word"},
		"to it by another": {after(fleet.Event{Epoch: 5, Holder: "gw2", Attempt: []byte("another"), By: "gw1"}), 0, "not by this move"},
		"forgotten":        {fleet.Record{Entry: workload.Entry{Epoch: 9000}, History: []fleet.Event{{Epoch: 9000}}}, 0, "is at epoch 9000 by now"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				var errs strings.Builder
				began := time.Now()
				w := watch{a: &app{out: io.Discard, err: &errs}, before: before, attempt: attempt, to: "gw2"}
				w.cloud.inspect = func(context.Context, string) (fleet.Record, error) {
					switch {
					case time.Since(began) < time.Second:
						return before, nil
					case time.Since(began) < 3*time.Second:
						return fleet.Record{}, errors.New("the cloud is away")
					}
					return tt.then, nil
				}
				epoch, err := w.ledger(ctx)
				if epoch != tt.epoch || tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
					t.Errorf("%d, %v; want %d, %q", epoch, err, tt.epoch, tt.want)
				}
				if told := strings.Count(errs.String(), "copies its state while it runs"); (told > 0) != (name == "nothing") {
					t.Errorf("told %q", errs.String())
				}
			})
		})
	}
}

func TestRunningIsWaitedFor(t *testing.T) {
	here := func(w attest.Workload) (said, error) { return said{Workloads: []attest.Workload{w}}, nil }
	running := attest.Workload{Instance: "a", Epoch: 5, Phase: "live", Running: true, Protection: "memfd_secret"}
	for name, tt := range map[string]struct {
		then func() (said, error) // after 5 s
		want string               // "": it runs
	}{
		"running":   {func() (said, error) { return here(running) }, ""},
		"away":      {func() (said, error) { return said{}, errors.New("gw2 did not attest") }, "gw2 did not attest"},
		"not there": {func() (said, error) { return said{}, nil }, "its evidence does not have it in this epoch"},
		"before":    {func() (said, error) { w := running; w.Epoch = 4; return here(w) }, "its evidence does not have it in this epoch"},
		"another":   {func() (said, error) { w := running; w.Instance = "b"; return here(w) }, "its evidence does not have it in this epoch"},
		"taking in": {func() (said, error) { return here(attest.Workload{Instance: "a", Epoch: 5, Phase: "moving here"}) }, "moving here"},
		"failing": {func() (said, error) {
			return here(attest.Workload{Instance: "a", Epoch: 5, Phase: "live", Reason: "no memory"})
		}, "there it is not running: no memory"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				began := time.Now()
				w := watch{a: &app{out: io.Discard, err: io.Discard}, before: fleet.Record{Entry: workload.Entry{Instance: "a"}}, to: "gw2"}
				w.cloud.attest = func(_ context.Context, gateway string) (said, error) {
					if time.Since(began) < 5*time.Second || gateway != "gw2" {
						return said{}, errors.New("not yet")
					}
					return tt.then()
				}
				got, err := w.running(ctx, 5)
				if tt.want == "" && (err != nil || got.Protection != "memfd_secret") {
					t.Errorf("%+v, %v", got, err)
				}
				if tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "edgekeep workload inspect a")) {
					t.Errorf("%v; want %q", err, tt.want)
				}
			})
		})
	}
}

func TestAnswered(t *testing.T) {
	refused := message.Result{Subject: "acme/gw1", Sequence: 7, Reason: "no runner is idle"}
	for _, asJSON := range []bool{false, true} {
		var out strings.Builder
		a := &app{out: &out, json: asJSON}
		err := a.answered(refused, resultJSON(refused, "gw1"), nil)
		if err == nil || !asJSON && !strings.Contains(err.Error(), "the keep of acme/gw1 refuses: no runner is idle") ||
			strings.Contains(out.String(), `"reason":"no runner is idle"`) != asJSON {
			t.Errorf("%v\n%s", err, out.String())
		}
	}
}

func TestEach(t *testing.T) {
	pages := [][]int{{1, 2}, {3}, {}}
	var got, waits []int
	next := func(ctx context.Context, wait time.Duration) ([]int, error) {
		waits = append(waits, int(wait))
		if len(pages) == 0 {
			return nil, errors.New("asked again")
		}
		p := pages[0]
		pages = pages[1:]
		return p, nil
	}
	show := func(n int) error { got = append(got, n); return nil }
	if n, err := each(t.Context(), false, next, show); err != nil || n != 3 || len(got) != 3 || waits[0] != 0 {
		t.Errorf("%v, %v", got, err)
	}
	pages = [][]int{{}, {4}}
	if n, err := each(t.Context(), true, next, show); err == nil || n != 1 || got[3] != 4 || waits[3] == 0 {
		t.Errorf("%v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancelled := func(context.Context, time.Duration) ([]int, error) { cancel(); return nil, context.Canceled }
	if n, err := each(ctx, true, cancelled, show); err != nil || n != 0 {
		t.Error(err)
	}
}

func TestLogAndResultLines(t *testing.T) {
	reading := sealing.Reading{Name: "a/log", Time: 1_800_000_000_000_000_000, Value: "line 2 of the batch: no time"}
	for _, asJSON := range []bool{false, true} {
		var out, errs strings.Builder
		a := &app{out: &out, err: &errs, json: asJSON}
		if err := a.logRecord(client.Opened{Gateway: "gw1", Stream: "a-log", Readings: []sealing.Reading{reading}, Gap: "record 4 does not follow record 2"}); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), "line 2 of the batch: no time") || json.Valid([]byte(out.String())) != asJSON || !strings.Contains(errs.String(), "gw1/a-log: record 4") {
			t.Errorf("%s%s", out.String(), errs.String())
		}
	}
}

func TestResultLines(t *testing.T) {
	r := client.Result{
		Reading:  sealing.Reading{Name: "alarm/x", Unit: "Cel", Time: 1_800_000_000_000_000_000, Value: 95.5},
		Instance: "a", Gateway: "gw2", Epoch: 3, Line: 41, Gap: "2 lines before line 41 are missing",
	}
	var out, errs strings.Builder
	a := &app{out: &out, err: &errs}
	if err := a.result(r); err != nil || !strings.HasPrefix(out.String(), "3.41  ") || !strings.HasSuffix(out.String(), "  gw2  alarm/x  95.5 Cel\n") {
		t.Errorf("%v, %s", err, out.String())
	}
	r.Conflict = "line 41 came before with other content"
	out.Reset()
	a.json = true
	want := `{"instance":"a","epoch":3,"line":41,"gateway":"gw2","time":"2027-01-15T08:00:00Z","name":"alarm/x","value":95.5,"unit":"Cel","conflict":true}` + "\n"
	if err := a.result(r); err != nil || out.String() != want {
		t.Errorf("%v, %s", err, out.String())
	}
	if strings.Count(errs.String(), "2 lines before") != 2 || strings.Count(errs.String(), "with other content") != 1 {
		t.Error(errs.String())
	}
}

// A result goes to standard output as it is; what was verified does not.
func TestInferred(t *testing.T) {
	r := client.Inference{
		Output:   []byte{0, 1, '\n', 0xff},
		Response: workload.Response{Instance: "a", Epoch: 3, Module: []byte{0xab}, Request: []byte{0xcd}}, Verdict: verdict(nil, true),
	}
	var out, errs strings.Builder
	a := &app{out: &out, err: &errs}
	if err := a.inferred(r); err != nil || out.String() != string(r.Output) {
		t.Errorf("%v, %q", err, out.String())
	}
	for _, want := range []string{"result of a, epoch 3, bundle ab\n", "the keep of acme/gw1, on which the verdict is affirming, assurance tpm"} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("%q is not in\n%s", want, errs.String())
		}
	}
	out.Reset()
	errs.Reset()
	a.json = true
	var v struct {
		Result                   []byte // base64
		Gateway, Verdict, Bundle string
		Epoch                    uint64
	}
	if err := errors.Join(a.inferred(r), json.Unmarshal([]byte(out.String()), &v)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(v.Result, r.Output) || v.Gateway != "acme/gw1" || v.Verdict != "affirming" || v.Bundle != "ab" || v.Epoch != 3 || errs.Len() != 0 {
		t.Errorf("%+v, %s", v, errs.String())
	}
}

func TestReadInput(t *testing.T) {
	path := filepath.Join(t.TempDir(), "batch")
	for n, ok := range map[int]bool{0: true, workload.MaxInput: true, workload.MaxInput + 1: false} {
		data := bytes.Repeat([]byte{'x'}, n)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, read := range []func() ([]byte, error){
			func() ([]byte, error) { return readInput(path, nil) },
			func() ([]byte, error) { return readInput("", bytes.NewReader(data)) },
		} {
			got, err := read()
			if ok && (err != nil || len(got) != n) || !ok && (err == nil || !strings.Contains(err.Error(), "more than 64 KiB: send it in parts")) {
				t.Errorf("%d bytes: %d, %v", n, len(got), err)
			}
		}
	}
}

package model

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"edgekeep/testbench/internal/process"
)

func need(t *testing.T) {
	for _, program := range []string{"spin", "gcc"} {
		if _, err := process.Find(program, program); err != nil {
			t.Skip(err)
		}
	}
}

func TestShortForm(t *testing.T) {
	if testing.Short() {
		t.Skip("half a minute of gcc and spin")
	}
	need(t)
	var out strings.Builder
	r, err := Run(t.Context(), &out, true)
	t.Log("\n" + out.String())
	if err != nil {
		t.Fatal(err)
	}
	if r.Errors != 0 || r.MutantsCaught != r.Mutants || r.Mutants != len(mutants) || r.States < 500_000 {
		t.Fatalf("result %+v", r)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	var last Result
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || last != r {
		t.Fatalf("last line %q, %v, for %+v", lines[len(lines)-1], err, r)
	}
}

// A mutant that changes nothing is not caught, and a check that must hold does
// not pass because spin stopped early or found another error.
func TestChecksCanFail(t *testing.T) {
	need(t)
	s, err := newSpin()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	tiny := bounds{1, 1, 1}
	for _, c := range []struct {
		check check
		want  string
	}{
		{check{kind: mutant, name: "THAT_IS_NOT_THERE", bounds: tiny, breaks: stuck}, "not caught"},
		{check{kind: mutant, name: "CURSOR_APART", bounds: tiny, breaks: stuck}, "and not"},
		{check{kind: holds, bounds: tiny, with: "MUTANT_RELEASE_NOT_IN_STATE"}, "does not hold: " + stuck},
		{check{kind: reachable, name: "THERE_AND_BACK", bounds: tiny}, "not reached"},
		{check{kind: cycle, name: "THAT_IS_NOT_THERE", bounds: tiny}, "no cycle"},
	} {
		f, err := s.run(t.Context(), c.check)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.check.judge(f); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.check, err, c.want)
		}
	}
}

func TestIncompleteSearchDoesNotHold(t *testing.T) {
	for _, out := range []string{
		"pan: reached -DMEMLIM bound\nWarning: Search not completed\n... errors: 0\n   12 states, stored\n",
		"error: max search depth too small\n... errors: 0\n   12 states, stored\n",
	} {
		f, err := parseSearch(out)
		if err != nil {
			t.Fatal(err)
		}
		if err := (check{kind: holds}).judge(f); err == nil {
			t.Errorf("accepted %q", out)
		}
	}
	if f, err := parseSearch("State-vector 132 byte, errors: 0\n 1.2345e+08 states, stored\n"); err != nil || f.states != 123450000 {
		t.Errorf("large count: %d, %v", f.states, err)
	}
	if _, err := parseSearch("Segmentation fault"); err == nil {
		t.Error("accepted a report without counts")
	}
}

// Every mutant, variant and state that the model offers is checked.
func TestNothingLeftOut(t *testing.T) {
	path, err := source()
	if err != nil {
		t.Fatal(err)
	}
	model, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	checked := map[string]bool{}
	for _, c := range checks(true) {
		for _, d := range c.defines() {
			checked[strings.TrimPrefix(d, "-D")] = true
		}
	}
	code := regexp.MustCompile(`(?s)/\*.*?\*/`).ReplaceAll(model, nil)
	for _, name := range regexp.MustCompile(`\b(MUTANT|VARIANT|REACH)_[A-Z_]+\b`).FindAllString(string(code), -1) {
		if !checked[name] {
			t.Errorf("%s is not checked", name)
		}
	}
	for name := range checked {
		if !strings.Contains(string(code), strings.SplitN(name, "=", 2)[0]) {
			t.Errorf("%s is not in the model", name)
		}
	}
}

func TestCommandEndsWithContext(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err = command(ctx, t.TempDir(), sh, "-c", "sleep 60 & sleep 60")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 10*time.Second {
		t.Fatalf("%v after %v", err, time.Since(start))
	}
}

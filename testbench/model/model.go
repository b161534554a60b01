// Package model checks docs/move.pml, the Promela model of the move of a
// workload between two nodes, exhaustively with spin. It checks
//
//   - that the model holds within several bounds (inputs, freezes, restored
//     disks; crashes are not bounded), and so do the variants of the protocol
//     that the model offers;
//   - that its last phase, in which liveness is judged, has no cycle;
//   - that the model notices: each mutant leaves one rule out and must break the
//     property named here, and the states that make the rules necessary must be
//     reachable.
//
// It needs spin and gcc. The model's header says what is modelled; this package
// only knows the names of what there is to check.
package model

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// A run ends after this at the latest, however slow the machine.
const timeLimit = 15 * time.Minute

// Result is what Run found. Its JSON is Run's last line.
type Result struct {
	States        int64 `json:"states"` // of the checks that must hold, added up
	Errors        int   `json:"errors"` // checks that went wrong, mutants aside
	MutantsCaught int   `json:"mutants_caught"`
	Mutants       int   `json:"mutants"`
}

// Run checks the model, two checks at a time, and writes a line for each to w.
// The short form leaves out the larger bounds, never a mutant. The error says
// what did not hold, which mutant was not caught, or what could not be run.
func Run(ctx context.Context, w io.Writer, short bool) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, timeLimit)
	defer cancel()
	s, err := newSpin()
	if err != nil {
		return Result{}, err
	}
	defer s.close()
	todo := checks(short)
	if short {
		fmt.Fprintln(w, "short form: small bounds only; the full form adds more inputs, more moves, and both with two restores")
	}
	r := &report{w: w}
	work := make(chan check)
	var workers sync.WaitGroup
	for range 2 {
		workers.Go(func() {
			for c := range work {
				start := time.Now()
				f, err := s.run(ctx, c)
				r.add(c, f, time.Since(start), err)
			}
		})
	}
	for _, c := range todo {
		work <- c
	}
	close(work)
	workers.Wait()
	return r.finish()
}

// report collects what the checks found.
type report struct {
	mu     sync.Mutex // protects all below, and the order of lines
	w      io.Writer
	result Result
	errs   []error
}

func (r *report) add(c check, f finding, took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.kind == mutant {
		r.result.Mutants++
	}
	if err == nil {
		err = c.judge(f)
	}
	what := "holds"
	switch {
	case err != nil:
		r.errs = append(r.errs, fmt.Errorf("%s: %w", c, err))
		what = "WRONG: " + err.Error()
		if c.kind != mutant {
			r.result.Errors++
		}
	case c.kind == mutant:
		r.result.MutantsCaught++
		what = fmt.Sprintf("caught in %d steps: %s", f.steps, f.broken)
	case c.kind == reachable:
		what = fmt.Sprintf("reached in %d steps", f.steps)
	case c.kind == cycle:
		what = "found"
	default:
		r.result.States += f.states
	}
	fmt.Fprintf(r.w, "%-62s %9d states %6.1f s  %s\n", c, f.states, took.Seconds(), what)
	if err != nil {
		for _, line := range f.story {
			fmt.Fprintln(r.w, "    "+line)
		}
	}
}

func (r *report) finish() (Result, error) {
	line, err := json.Marshal(r.result)
	if err != nil {
		return r.result, fmt.Errorf("encode the result: %w", err)
	}
	fmt.Fprintf(r.w, "%s\n", line)
	return r.result, errors.Join(r.errs...)
}

// source finds docs/move.pml in this directory or one above.
func source() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find docs/move.pml: %w", err)
	}
	for {
		path := filepath.Join(dir, "docs", "move.pml")
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("find docs/move.pml: not here and not above: run this inside the source tree")
		}
		dir = up
	}
}

package model

import (
	"errors"
	"fmt"
	"strings"
)

type kind string

const (
	holds     kind = "model"     // no property may break
	variant   kind = "variant"   // the same, of another protocol
	ends      kind = "calm ends" // the phase that liveness is judged in has no cycle
	mutant    kind = "mutant"    // the named property must break
	reachable kind = "reachable" // the state must be reached
	cycle     kind = "cycle"     // ends must notice one
)

// bounds of the model: crashes have none.
type bounds struct{ inputs, freezes, restores int }

// check is one run of spin.
type check struct {
	kind   kind
	name   string // of the mutant, the variant or the state; may be empty
	bounds bounds
	breaks string // mutant: the property
	with   string // a further definition; may be empty
}

func (c check) String() string {
	return fmt.Sprintf("%-9s %-22s inputs %d, freezes %d, restores %d",
		c.kind, c.name, c.bounds.inputs, c.bounds.freezes, c.bounds.restores)
}

// defines are the definitions that select the check in the model.
func (c check) defines() []string {
	d := []string{
		fmt.Sprintf("-DINPUTS=%d", c.bounds.inputs),
		fmt.Sprintf("-DFREEZES=%d", c.bounds.freezes),
		fmt.Sprintf("-DRESTORES=%d", c.bounds.restores),
	}
	switch c.kind {
	case mutant:
		d = append(d, "-DMUTANT_"+c.name)
	case variant:
		d = append(d, "-DVARIANT_"+c.name)
	case reachable:
		d = append(d, "-DREACH_"+c.name)
	case ends:
		d = append(d, "-DCHECK_CALM_ENDS")
	case cycle:
		d = append(d, "-DCHECK_CALM_ENDS", "-DMUTANT_"+c.name)
	}
	if c.with != "" {
		d = append(d, "-D"+c.with)
	}
	return d
}

// judge says whether the finding is what the check must find.
func (c check) judge(f finding) error {
	switch c.kind {
	case holds, variant, ends:
		if f.errors != 0 {
			return fmt.Errorf("does not hold: %s", f.broken)
		}
		if !f.complete {
			return fmt.Errorf("the search was not completed after %d states: give it more memory or depth", f.states)
		}
	case mutant:
		if f.errors == 0 {
			return errors.New("not caught: the model holds without this rule")
		}
		if f.broken != c.breaks {
			return fmt.Errorf("broke %q, and not %q", f.broken, c.breaks)
		}
	case reachable:
		if f.errors == 0 || f.broken != reached {
			return errors.New("not reached: the model proves less than it seems to")
		}
	case cycle:
		if f.errors == 0 || !strings.Contains(f.broken, "cycle") {
			return errors.New("no cycle found in a model that has one")
		}
	}
	return nil
}

// The properties, as the model prints them when they break.
const (
	notHolder = "a node is live at the epoch of the ledger and not its holder"
	twoMeans  = "two nodes hold the means to run"
	older     = "the live instance is older than what was accepted"
	startsOld = "a target starts from a state older than what was accepted"
	disowned  = "an output of a disowned run was accepted"
	twice     = "an output was accepted twice"
	torn      = "an input was applied twice or skipped"
	stuck     = "faults are over and the instance does not live on"
	reached   = "reached"
)

// mutants by the number of restores that it takes to see why the rule is
// needed: for the first group, crashes and the network are enough.
var mutants = []struct {
	restores int
	name     string
	breaks   string
}{
	{0, "CURSOR_APART", torn},
	{0, "FREEZE_NOT_COMMITTED", stuck},
	{0, "ASK_BEFORE_HELD", stuck},
	{0, "TARGET_DROPS", stuck},
	{0, "CAS_WITHOUT_COMPARE", notHolder},
	{0, "STALE_READ", stuck},
	{0, "RELEASE_BEFORE_DESTROY", twoMeans},
	{0, "RELEASE_NOT_IN_STATE", stuck},
	{0, "FORGET_WITHOUT_ACK", stuck},
	{0, "ACTIVATE_NOT_COMMITTED", stuck},
	{0, "RELEASE_REPLAYED", twoMeans},
	{0, "TARGET_REPLACES", stuck},
	{0, "OUTBOX_LEFT_BEHIND", stuck},
	{0, "DEDUP_BY_EPOCH", twice},

	{1, "DESTROY_REVERSIBLE", twoMeans},
	{1, "ACTIVATE_REVERSIBLE", startsOld},
	{1, "ACCEPTED_IGNORED", startsOld},
	{1, "NO_ADOPT", stuck},
	{1, "ADOPT_ANY", older},
	{1, "OUTBOX_AT_SOURCE", stuck},
	{1, "NO_EPOCH_IN_OUTPUT", disowned},
	{1, "CONSUMER_STALE", disowned},

	{2, "ATTEMPT_IGNORED", startsOld},
}

// checks are all there are, the long ones first.
func checks(short bool) []check {
	small, large := bounds{2, 2, 1}, bounds{2, 3, 1}
	var all []check
	if short {
		large = small
		all = append(all,
			check{kind: holds, bounds: bounds{2, 2, 2}},
			check{kind: holds, bounds: bounds{3, 2, 1}})
	} else {
		all = append(all,
			check{kind: holds, bounds: bounds{2, 3, 2}},
			check{kind: holds, bounds: bounds{3, 3, 1}},
			check{kind: holds, bounds: bounds{3, 2, 2}},
			check{kind: holds, bounds: bounds{1, 4, 1}})
	}
	all = append(all, check{kind: ends, bounds: large})
	for _, name := range []string{"TAKE_BACK", "CURRENT_EPOCH_ONLY", "DRAINED", "FENCING_ALONE"} {
		all = append(all, check{kind: variant, name: name, bounds: large})
	}
	for _, m := range mutants {
		b := small
		b.restores = m.restores
		all = append(all, check{kind: mutant, name: m.name, bounds: b, breaks: m.breaks})
	}
	for _, name := range []string{"THERE_AND_BACK", "ABORT_RACE", "LATE_OUTPUT", "CLONE", "REFUSED"} {
		all = append(all, check{kind: reachable, name: name, bounds: small})
	}
	return append(all,
		check{kind: reachable, name: "TAKEN_BACK", bounds: small, with: "VARIANT_TAKE_BACK"},
		check{kind: cycle, name: "CAS_WITHOUT_COMPARE", bounds: small})
}

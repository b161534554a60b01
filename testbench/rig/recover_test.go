package rig

import (
	"errors"
	"testing"
	"time"

	"edgekeep/workload"
)

// TestRecover: a box burns down, and the instance goes on elsewhere from its
// newest checkpoint, by the data owner's word: every reading counts once. When the
// box comes back, what is on it is dropped.
func TestRecover(t *testing.T) {
	module := clang(t, "counter.c", "-mexec-model=reactor")
	b := newBench(t, 3*time.Minute, Options{})
	edge, other := b.gateway("edge", "numbers"), b.gateway("other", "unused")
	b.startCloud()
	for _, g := range []*Gateway{edge, other} {
		b.enrol(g)
		b.must(g.StartRunners(1))
		b.grantGateway(g)
	}
	m := counter("numbers")
	m.Checkpoint = 1
	w, from := b.pack(m, module), []workload.Source{{Gateway: "edge", Stream: "numbers"}}
	b.deploy(edge, "counter", w, from...)
	const n = 10_000
	path, sum := b.numbers(n)
	b.must(edge.StartDriver("numbers", "replay", path, "--speed", "1000"))
	c := b.tally("counter")
	c.upTo(3000)
	b.until("a checkpoint", func() error {
		all, err := b.op.Snapshots(b.ctx, "counter")
		if err == nil && (len(all) == 0 || all[len(all)-1].Line == 0) {
			err = errors.New("there is none")
		}
		return err
	})
	<-edge.DriverDone("numbers")
	r := b.read(edge, "numbers")
	r.all(edge)
	b.must(edge.PowerOff())
	all, err := b.op.Snapshots(b.ctx, "counter")
	b.must(err)
	newest := all[len(all)-1]
	owner, err := b.Kit("owner")
	b.must(err)
	operator, err := b.Kit("operator")
	b.must(err)
	if err := b.op.Recover(b.ctx, operator, "counter", other.Name, newest.Blob, newest.Head); err == nil {
		t.Error("the operator's key was enough to recover an instance")
	}
	b.must(b.op.Recover(b.ctx, owner, "counter", other.Name, newest.Blob, newest.Head))
	res, err := b.op.Deploy(b.ctx, other.Name, "counter", w.manifest, w.key, from)
	b.must(err)
	if !res.Done {
		t.Fatalf("not deployed: %s", res.Reason)
	}
	c.upTo(n)
	if c.count != n || c.sum != float64(sum) {
		t.Errorf("counted %.0f with the sum %.0f, it was %d and %d", c.count, c.sum, n, sum)
	}
	// It went on from the checkpoint, and did not begin again: the first line that
	// the other box sealed is the one after it.
	first := uint64(0)
	reader, err := b.consumer.Reader(other.Name, "counter")
	b.must(err)
	b.until("results of the other box", func() error {
		opened, err := reader.Next(b.ctx, time.Second)
		for _, o := range opened {
			if n := uint64(len(o.Readings)); n > 0 && first == 0 {
				first = o.Cursor.Line - n + 1
			}
		}
		if err == nil && first == 0 {
			err = errors.New("there are none")
		}
		return err
	})
	if newest.Line == 0 || first != newest.Line+1 {
		t.Errorf("the checkpoint ends with line %d, the first line after it is %d", newest.Line, first)
	}
	t.Logf("checkpoint at line %d; %d lines in all", newest.Line, c.line)

	b.must(edge.Boot(b.ctx))
	b.must(edge.Start(b.ctx))
	b.must(edge.StartRunners(1))
	b.until("the old box drops it", func() error {
		evidence, err := b.workloads(edge)
		if err == nil && len(evidence) > 0 {
			err = errors.New("it is still there")
		}
		return err
	})
}

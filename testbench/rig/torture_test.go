package rig

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// moveUntil orders a move, again and again, until the ledger has it.
func (b *bench) moveUntil(instance string, to *Gateway) error {
	var last error
	for b.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
		_, last = b.op.Move(ctx, instance, to.Name) // it may fail: somebody is killed
		for ctx.Err() == nil {
			r, err := b.op.Inspect(ctx, instance)
			if err == nil && r.Entry.Holder == to.Name {
				cancel()
				return nil
			}
			last = errors.Join(last, err)
			time.Sleep(20 * time.Millisecond)
		}
		cancel()
	}
	return fmt.Errorf("%s never came to %s: %w", instance, to.Name, last)
}

// TestMoveKills: an instance moves back and forth while the processes around it are
// killed at any moment of the move. Every reading counts once, every result comes
// once, and when all is quiet the instance lives where the ledger says.
//
// EDGEKEEP_SEED repeats a run's choices; It is one of the long tests.
func TestMoveKills(t *testing.T) {
	if !long() {
		t.Skip("TestMoveTorture kills as well, at chosen messages; this one at random: make test-long")
	}
	moves, n, limit := 50, 100_000, 30*time.Minute
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("EDGEKEEP_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("EDGEKEEP_SEED=%d", seed)
	b, edge, other := pair(t, limit)
	path, sum := b.numbers(n)
	b.must(edge.StartDriver("numbers", "replay", path, "--speed", "1000"))
	c := b.tally("counter")
	c.upTo(200)
	victims := []struct {
		name string
		kill func() error
	}{}
	for _, g := range []*Gateway{edge, other} {
		victims = append(victims, []struct {
			name string
			kill func() error
		}{
			{"keep of " + g.Name, func() error { return errors.Join(g.KillKeep(), g.StartKeep(b.ctx)) }},
			{"agent of " + g.Name, func() error { return errors.Join(g.KillAgent(), g.StartAgent(b.ctx)) }},
			{"workers of " + g.Name, g.killWorkers},
		}...)
	}
	victims = append(victims, struct {
		name string
		kill func() error
	}{"cloud", func() error { return errors.Join(b.KillCloud(), b.StartCloud(b.ctx)) }})
	at, to := edge, other
	for i := range moves {
		begun := make(chan error, 1)
		go func() { begun <- b.moveUntil("counter", to) }()
		for range 1 + random.IntN(2) {
			time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
			v := victims[random.IntN(len(victims))]
			t.Logf("move %d to %s: kill the %s", i, to.Name, v.name)
			b.must(v.kill())
		}
		b.must(<-begun)
		c.upTo(min(n, int(c.count)+200)) // it lives
		at, to = to, at
	}
	c.upTo(n)
	if c.count != float64(n) || c.sum != float64(sum) {
		t.Errorf("counted %.0f with the sum %.0f, it was %d and %d", c.count, c.sum, n, sum)
	}
	b.until("the instance is live in one place only", func() error {
		r, err := b.op.Inspect(b.ctx, "counter")
		if err != nil {
			return err
		}
		live := map[string]bool{}
		for _, g := range []*Gateway{edge, other} {
			claims, err := b.workloads(g)
			if err != nil {
				return err
			}
			for _, w := range claims {
				if w.Phase == "live" && w.Epoch == r.Entry.Epoch {
					live[g.Name] = true
				} else {
					return fmt.Errorf("%s has it %s at epoch %d, the ledger is at %d", g.Name, w.Phase, w.Epoch, r.Entry.Epoch)
				}
			}
		}
		if len(live) != 1 || !live[r.Entry.Holder] {
			return fmt.Errorf("live on %v, the ledger says %s", live, r.Entry.Holder)
		}
		return nil
	})
}

package rig

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"edgekeep/tee/attest"
	"edgekeep/workload"
)

// workers are the process ids of a gateway's workers: children of its runners, of
// whichever thread.
func (g *Gateway) workers() (out []int) {
	for _, pid := range g.RunnerPIDs() {
		var raw []byte
		tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // it may have ended
		for _, t := range tasks {
			more, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
			raw = append(append(raw, ' '), more...)
		}
		for f := range strings.FieldsSeq(string(raw)) {
			if child, err := strconv.Atoi(f); err == nil && !slices.Contains(out, child) {
				out = append(out, child)
			}
		}
	}
	return out
}

// killWorkers ends them with SIGKILL.
func (g *Gateway) killWorkers() error {
	for _, pid := range g.workers() {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// torture is a bench whose instance moves to and fro while all goes wrong.
type torture struct {
	*bench
	wire   *wire
	random *rand.Rand
	c      *tally
	live   map[uint64]string // who said to be live, by epoch
	kills  int
	n      int // readings in all
	unmet  int
}

// strike ends the victims and starts them again.
func (x *torture) strike(s *strike, source, target *Gateway, pause time.Duration) error {
	select {
	case <-s.seen:
	case <-x.ctx.Done():
		return x.ctx.Err()
	}
	wait(x.ctx, s.late)
	var errs []error
	for _, v := range s.victims {
		kill, _ := x.process(v, source, target)
		errs = append(errs, kill())
	}
	close(s.struck)
	wait(x.ctx, pause)
	for _, v := range s.victims {
		_, start := x.process(v, source, target)
		errs = append(errs, start())
	}
	return errors.Join(errs...)
}

// process returns how one is ended, and how it is started again.
func (x *torture) process(victim string, source, target *Gateway) (kill, start func() error) {
	whose, what, ok := strings.Cut(victim, "'s ")
	if !ok {
		return x.KillCloud, func() error { return x.StartCloud(x.ctx) }
	}
	g := source
	if whose == "target" {
		g = target
	}
	switch what {
	case "keep":
		return g.KillKeep, func() error { return g.StartKeep(x.ctx) }
	case "agent":
		return g.KillAgent, func() error { return g.StartAgent(x.ctx) }
	}
	return g.killWorkers, func() error { return nil } // its supervisor starts another one
}

// order has the holder move the instance, again and again until the ledger says
// that it is there.
func (x *torture) order(to *Gateway, ordered func()) {
	x.t.Helper()
	next := time.Time{}
	x.until("the instance is on "+to.Name, func() error {
		ctx, cancel := context.WithTimeout(x.ctx, 2*time.Second)
		r, err := x.op.Inspect(ctx, "counter")
		cancel()
		if err != nil || r.Entry.Holder == to.Name {
			return err
		}
		if time.Now().After(next) {
			next = time.Now().Add(2 * time.Second)
			ctx, cancel := context.WithTimeout(x.ctx, 5*time.Second)
			res, err := x.op.Move(ctx, "counter", to.Name)
			cancel()
			if err == nil && res.Done {
				ordered()
			}
		}
		return fmt.Errorf("it is on %s at epoch %d", r.Entry.Holder, r.Entry.Epoch)
	})
}

// move moves the instance, with a strike on the way.
func (x *torture) move(source, target *Gateway, s *strike) {
	x.t.Helper()
	began := time.Now()
	s.seen, s.struck = make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	pause := time.Duration(x.random.Int64N(int64(time.Second)))
	what := s.String()
	go func() { ended <- x.strike(s, source, target, pause) }()
	var once sync.Once
	ordered := func() {
		if s.step == "command" {
			once.Do(func() { close(s.seen) })
		}
	}
	if s.step != "command" {
		x.wire.arm(s)
	}
	x.order(target, ordered)
	select { // what follows the ledger's word may be on its way still
	case err := <-ended:
		x.must(err)
		x.kills += len(s.victims)
	case <-time.After(15 * time.Second):
		x.wire.arm(nil)
		x.unmet++
		what += " (never met)"
	}
	x.evidence(source, target)
	x.c.upTo(min(int(x.c.count)+1, x.n))
	x.t.Logf("%s -> %s in %.1f s, %.0f counted: %s", source.Name, target.Name, time.Since(began).Seconds(), x.c.count, what)
}

// evidence asks gateways who is live, and at what epoch.
func (x *torture) evidence(gateways ...*Gateway) {
	x.t.Helper()
	for _, g := range gateways {
		ctx, cancel := context.WithTimeout(x.ctx, 3*time.Second)
		saved, _, err := x.op.Attest(ctx, g.Name)
		cancel()
		if err != nil {
			continue // it is late: the faults are for it too
		}
		claims, err := attest.ParseClaims(saved.Evidence)
		x.must(err)
		for _, w := range claims.Workloads {
			if w.Phase == "live" {
				x.alive(w.Epoch, g.Name, "says in its evidence to be live")
			}
		}
	}
}

func (x *torture) alive(epoch uint64, gateway, how string) {
	x.t.Helper()
	if other := x.live[epoch]; other != "" && other != gateway {
		x.t.Errorf("%s %s at epoch %d, which is that of %s", gateway, how, epoch, other)
	}
	x.live[epoch] = gateway
}

// history holds the ledger and all that was sealed in the instance's name against
// each other: each epoch has one holder, and nobody else made results in it.
func (x *torture) history() {
	x.t.Helper()
	r, err := x.op.Inspect(x.ctx, "counter")
	x.must(err)
	line := uint64(0)
	holders := map[uint64]string{}
	for i, e := range r.History {
		if e.Epoch != uint64(i+1) || e.Line < line {
			x.t.Errorf("entry %d of the ledger has epoch %d and line %d, after line %d", i, e.Epoch, e.Line, line)
		}
		line, holders[e.Epoch] = e.Line, e.Holder
	}
	raw, err := x.consumer.Reader("", "counter")
	x.must(err)
	records := 0
	for empty := 0; empty < 2; {
		got, err := raw.Next(x.ctx, 300*time.Millisecond)
		x.must(err)
		if len(got) == 0 {
			empty++
		}
		for _, o := range got {
			if len(o.Readings) == 0 {
				continue // the beginning of an epoch
			}
			records++
			if o.Cursor == nil {
				x.t.Errorf("results of %s without numbers", o.Gateway)
				continue
			}
			text, ok := strings.CutPrefix(o.Cursor.Session, "counter#")
			epoch, err := strconv.ParseUint(text, 10, 64)
			if !ok || err != nil {
				x.t.Errorf("results under the session %q", o.Cursor.Session)
			}
			x.alive(epoch, o.Gateway, "made results")
		}
	}
	for epoch, gateway := range x.live {
		if holders[epoch] != gateway {
			x.t.Errorf("%s was live at epoch %d, which the ledger gave to %q", gateway, epoch, holders[epoch])
		}
	}
	if n := x.c.r.Fenced(); n > 0 {
		x.t.Errorf("%d results came too late to count: honest keeps store them before they let go", n)
	}
	x.t.Logf("%d epochs, %d records of results", len(r.History), records)
}

// plan is one strike for each move; with all, each victim at each step.
func (x *torture) plan(moves int) (out []*strike) {
	var all [][2]string
	for _, s := range steps {
		for _, v := range victims {
			all = append(all, [2]string{s, v})
		}
	}
	x.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for i := range moves {
		at := all[i%len(all)]
		s := &strike{step: at[0], nth: 1, victims: []string{at[1]}}
		if s.step == "frame" || s.step == "ack" {
			s.nth += x.random.IntN(12)
		}
		if x.random.IntN(3) == 0 {
			if v := victims[x.random.IntN(len(victims))]; v != at[1] {
				s.victims = append(s.victims, v)
			}
		}
		switch x.random.IntN(3) {
		case 0:
			s.late = time.Duration(1 + x.random.Int64N(int64(150*time.Millisecond)))
		case 1:
			s.lose = s.step != "command"
		}
		out = append(out, s)
	}
	return out
}

// seed is that of the environment, or a new one.
func seed(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("EDGEKEEP_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed: EDGEKEEP_SEED=%d", seed)
	return seed
}

// TestMoveTorture moves an instance to and fro while each of the processes that
// take part is killed at each of the steps, and while the broker loses, repeats,
// reorders, alters and replays messages. Each reading counts once, each result
// comes once, and no epoch ever has two holders.
func TestMoveTorture(t *testing.T) {
	n, moves, limit, speed := 5_000, 5, 3*time.Minute, "100"
	if long() {
		n, moves, limit, speed = 100_000, 100, time.Hour, "100" // back and forth 50 times: each victim at each step
	}
	if text := os.Getenv("EDGEKEEP_MOVES"); text != "" {
		var err error
		if moves, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	seed := seed(t)
	module := clang(t, "counter.c", "-mexec-model=reactor", "-DMB=2")
	b := newBench(t, limit, Options{})
	w := b.wire()
	edge, other := b.gateway("edge", "numbers"), b.gateway("other", "unused")
	b.startCloud()
	for _, g := range []*Gateway{edge, other} {
		b.enrol(g)
		b.must(g.StartRunners(2))
		b.grantGateway(g)
	}
	b.deploy(edge, "counter", b.pack(counter("numbers"), module), workload.Source{Gateway: edge.Name, Stream: "numbers"})
	path, sum := b.numbers(n)
	b.must(edge.StartDriver("numbers", "replay", path, "--speed", speed))
	x := &torture{
		bench: b, n: n, wire: w, random: rand.New(rand.NewPCG(seed, 0)), c: b.tally("counter"), live: map[uint64]string{},
	}
	x.c.upTo(100)
	w.err(seed)
	from, to := edge, other
	for _, s := range x.plan(moves) {
		x.move(from, to, s)
		from, to = to, from
	}
	b.must(edge.KillDriver("numbers"))
	b.must(edge.StartDriver("numbers", "replay", path, "--speed", "4000")) // what is left
	x.c.upTo(n)
	if x.c.count != float64(n) || x.c.sum != float64(sum) {
		t.Errorf("counted %.0f with the sum %.0f, it was %d and %d", x.c.count, x.c.sum, n, sum)
	}
	x.history()
	t.Logf("%d moves, %d kills, %d strikes never met; messages %v", moves, x.kills, x.unmet, w.passed)
}

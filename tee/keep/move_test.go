package keep

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// two is a pair of gateways; an instance "i" lives on the first.
func two(t *testing.T) (f *fabric, a, b *node) {
	t.Helper()
	f = newFabric(t)
	a, b = f.node(gw), f.node("gw2")
	a.staff, b.staff = 2, 2
	a.deployed("i", manifest(nil))
	f.until("it is live", func() bool { return f.settled("i") })
	return f, a, b
}

// moves sends the instance away, and waits for what becomes of it.
func (f *fabric) moves(from, to *node) {
	f.t.Helper()
	if r := from.command(message.WorkloadMove, map[string]string{"instance": "i", "to": to.name}); !r.Done {
		f.t.Fatal(r.Reason)
	}
	f.until("it has moved to "+to.name, func() bool { return f.settled("i") && f.ledger["i"].Holder == to.name })
}

func TestMove(t *testing.T) {
	f, a, b := two(t)
	before := a.state
	old := a.keep.st.Instances["i"]
	for epoch := uint64(2); epoch < 6; epoch += 2 {
		f.moves(a, b)
		if i, ok := a.keep.st.Instances["i"]; ok {
			t.Errorf("the source still has it: %s", phaseNames[i.Phase])
		}
		if i := b.keep.st.Instances["i"]; i.Epoch != epoch || i.Moves != epoch-1 || len(a.logs["i"]) != 0 {
			t.Errorf("epoch %d, %d moves, %d entries at the source", i.Epoch, i.Moves, len(a.logs["i"]))
		}
		if _, ok := openValue(old.Keys, b.logs["i"][parts-1]); ok {
			t.Error("a key of the source opens the last state")
		}
		f.moves(b, a)
	}
	newest := a.state
	a.boot()
	a.state = before
	if _, err := a.start(); err == nil {
		t.Error("a state from before the move opens")
	}
	a.state = newest
	a.restart(2)
	f.until("it lives on after a restart", func() bool { return f.settled("i") })
}

// A keep dies at each message, each job and around each commit of a move, in turn;
// each time the instance ends up at one place, with its state.
func TestMoveCrashes(t *testing.T) {
	f, a, b := two(t)
	from, to := a, b
	for _, victim := range []string{gw, "gw2"} {
		for point := 0; ; point++ {
			seen, at := 0, ""
			f.crash = func(n *node, what string) bool {
				if n.name != victim || at != "" || what == "before job "+tee.JobAppend || what == "before job "+tee.JobRead {
					return false
				}
				if seen++; seen <= point {
					return false
				}
				at = what
				return true
			}
			if r := f.try(from, to); r != "" {
				t.Fatal(r)
			}
			f.until(fmt.Sprintf("it lives after %s died (%s, %d)", victim, at, point), func() bool { return f.settled("i") })
			t.Logf("%s %d %s: now at %s", victim, point, at, f.ledger["i"].Holder)
			if f.ledger["i"].Holder != from.name {
				from, to = to, from
			}
			f.crash = func(*node, string) bool { return false }
			if at == "" {
				break
			}
		}
	}
}

// try sends a command to move, which a crash may interrupt.
func (f *fabric) try(from, to *node) string {
	f.t.Helper()
	from.sequence++
	cmd := from.cloud.command(message.Command{
		Audience: from.subject(), Sequence: from.sequence, Name: message.WorkloadMove, Args: map[string]string{"instance": "i", "to": to.name},
	})
	out, err := from.gateway.deliver(message.Item{Nonce: from.nonce(), Subject: from.subject(), Command: cmd})
	if err != nil {
		return err.Error()
	}
	if err := from.commits(out, nil); err != nil {
		from.restart(2)
	}
	return ""
}

// A network that loses, repeats and mixes up what it is given delays a move, and
// does no harm. Keeps die now and then.
func TestMoveNetwork(t *testing.T) {
	f, from, to := two(t)
	end := time.Now().Add(10 * time.Second)
	for seed := uint64(1); seed < 1000 && time.Now().Before(end); seed++ {
		f.rng = rand.New(rand.NewPCG(seed, 0))
		f.lose, f.repeat, f.shuffle = 0.2, 0.3, true
		if seed%2 == 0 { // what was sent in earlier moves comes again
			for range 20 {
				f.wire = append(f.wire, f.sent[f.rng.IntN(len(f.sent))])
			}
		}
		died := 0
		f.crash = func(*node, string) bool {
			if died < 2 && f.rng.Float64() < 0.01 {
				died++
				return true
			}
			return false
		}
		if r := f.try(from, to); r != "" {
			t.Fatal(r)
		}
		f.until(fmt.Sprintf("it lives, seed %d", seed), func() bool { return f.settled("i") })
		if f.ledger["i"].Holder != from.name {
			from, to = to, from
		}
		f.sent = f.sent[max(0, len(f.sent)-400):]
		t.Logf("seed %d: at %s in epoch %d, %d died", seed, from.name, f.ledger["i"].Epoch, died)
	}
}

// The ledger will not have the target: the source takes the instance back in the
// next epoch, and what belongs to the attempt revives nothing.
func TestLedgerRefuses(t *testing.T) {
	f, a, b := two(t)
	f.refuse = func(c workload.Claim) string {
		if c.Entry.Holder == b.name {
			return "no"
		}
		return ""
	}
	if r := f.try(a, b); r != "" {
		t.Fatal(r)
	}
	f.until("it is back", func() bool { return f.settled("i") && f.ledger["i"].Epoch == 2 })
	if f.ledger["i"].Holder != a.name || len(b.keep.st.Instances) != 0 {
		t.Error(f.describe())
	}
	f.refuse = nil
	f.wire = append(f.wire, f.sent...) // all of the attempt again
	for range 200 {
		f.round()
	}
	f.until("it stays", func() bool { return f.settled("i") })
	if f.ledger["i"].Holder != a.name || f.ledger["i"].Epoch != 2 {
		t.Error(f.describe())
	}
	f.moves(a, b)
}

package keep

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// A hostile runner could have the keep start goroutines without a bound while the
// keep's lock is held (a TPM command, or the agent's Commit).
func TestRunnerFlood(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	n.deployed("i", manifest(nil))
	_, _ = n.work(0)
	c := n.connect(false)
	n.again()
	next[tee.Assign](c, tee.KindAssign)
	before := runtime.NumGoroutine()
	n.keep.mu.Lock() // as a TPM command does
	began := time.Now()
	for i := range 20000 {
		c.job(uint64(i), tee.JobCheckpoint, nil)
	}
	got := runtime.NumGoroutine() - before
	n.keep.mu.Unlock()
	if got > 1000 {
		t.Errorf("%d goroutines wait in the keep after %s of one runner", got, time.Since(began))
	}
}

// An affirming gateway that holds nothing cannot fill the slots of another, which
// would commit an irreversible step for each.
func TestOfferOfNothing(t *testing.T) {
	f := newFabric(t)
	a, b := f.node(gw), f.node("gw2")
	_ = a
	b.staff = 2
	f.round()
	m := must(manifest(nil).Sign(f.cloud.operator))(t)
	verdict := f.cloud.verdict(a.evidence(), a.subject(), nil)
	f.drop = func(p packet) bool { return p.to == a.name }
	held := 0
	for n := range 20 {
		name := fmt.Sprintf("evil%d", n)
		f.round()
		attempt := random(16)
		send := func(kind int, c workload.Control) {
			c.Kind, c.Instance, c.Attempt, c.From, c.To, c.Verdict = kind, name, attempt, a.name, b.name, verdict
			_ = b.hand(packet{from: a.name, to: b.name, data: must(c.Sign(a.keep.epochKey))(t)})
		}
		send(workload.KindOffer, workload.Control{Manifest: m, Inputs: []workload.Source{{Gateway: b.name, Stream: "b"}}, Epoch: 1})
		for range 50 {
			f.round()
			if mv := b.keep.moves[name]; mv != nil && mv.empty {
				break
			}
		}
		mv := b.keep.moves[name]
		if mv == nil {
			break
		}
		id := random(8)
		keys := cose.MustMarshal(workload.Keys{Bundle: random(32), Session: random(32)})
		send(workload.KindBegin, workload.Control{KeyID: id, Sealed: must(workload.SealTo(workload.PurposeMove, moveContext(attempt, id, mv.nonce), keys, b.receive()))(t)})
		if b.keep.st.Instances[name].Phase == phaseHolding {
			held++
		}
		b.staff += 1
	}
	if held > 0 {
		r := b.command(message.WorkloadStop, map[string]string{"instance": "evil0"})
		t.Errorf("%d instances that the ledger does not know are held; stop: done=%v %s", held, r.Done, r.Reason)
	}
}

// A hostile source cannot change which streams the instance reads at the target.
func TestOfferOfOtherInputs(t *testing.T) {
	f, a, b := two(t)
	a.keep.mu.Lock()
	i := a.keep.st.Instances["i"]
	i.Inputs = []workload.Source{{Gateway: "gw2", Stream: "b"}} // deployed for gw1/a
	a.keep.st = a.keep.withInstance("i", &i)
	a.keep.mu.Unlock()
	_ = f.try(a, b)
	for range 100 {
		f.round()
	}
	if b.phase() != 0 {
		t.Error("the target took an instance that reads what no operator deployed")
	}
}

// An entry of another tenant, over our nonce, does not end a live instance: the
// fleet's key is the same for all tenants.
func TestEntryOfAnotherTenant(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	n.staff = 2
	n.deployed("i", manifest(nil))
	f.until("live", func() bool { return f.settled("i") })
	n.keep.mu.Lock()
	n.keep.stillHeld("i")
	n.keep.mu.Unlock()
	r := must(tee.Work{Wait: 100}.Do(n.ctx(), n))(t)
	for _, j := range r.Jobs {
		if j.Kind != tee.JobAsk {
			continue
		}
		q := must(tee.Body[tee.Question](j.Body))(t)
		if q.Kind != message.AskEntry {
			continue
		}
		asked := must(tee.Body[message.AskedEntry](q.Body))(t)
		// a gateway of tenant "evil" asks the same cloud the same question about its own instance "i"
		evil := workload.Entry{Instance: asked.Instance, Epoch: 99, Holder: "gw1", Bundle: random(32)}
		d := tee.JobDone{ID: j.ID, Body: cose.MustMarshal(message.Signed{Message: must(evil.Sign(f.cloud.fleet, asked.Nonce))(t)})}
		must(tee.Work{Done: []tee.JobDone{d}}.Do(n.ctx(), n))(t)
	}
	for range 20 {
		f.round()
		time.Sleep(5 * time.Millisecond)
	}
	if _, ok := n.keep.st.Instances["i"]; !ok {
		t.Error("the live instance and its keys are gone")
	}
}

// An agent that never commits cannot have the keep write the TPM's NV as often as it
// likes.
func TestStartWithoutCommit(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	item := n.order("i", manifest(nil), nil)
	out := must(n.gateway.deliver(item))(t)
	if len(out.Commit) == 0 {
		t.Fatal("no step")
	}
	seen := map[string]bool{string(out.Commit): true}
	for range 20 {
		o, err := tee.Start{State: n.state}.Do(n.ctx(), n)
		if err != nil {
			t.Fatal(err)
		}
		seen[string(o.Commit)] = true
	}
	if len(seen) > 2 {
		t.Errorf("%d Starts of the agent made %d different states: each wrote NV", 20, len(seen))
	}
}

package keep

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/attest"
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

// An instance that is stopped where it came to, before it said anything there, takes
// over the results of where it came from.
func TestStopAfterMove(t *testing.T) {
	f := newFabric(t)
	a, b := f.node(gw), f.node("gw2")
	a.staff, b.staff = 2, 2
	if r := a.outcome(a.order("i", manifest(nil), func(d *deployment) { d.entry.Line = 7 })); !r.Done { // there was one before
		t.Fatal(r.Reason)
	}
	f.until("it is live", func() bool { return f.settled("i") })
	f.moves(a, b)
	if r := b.command(message.WorkloadStop, map[string]string{"instance": "i"}); !r.Done {
		t.Fatal(r.Reason)
	}
	f.until("it is gone", func() bool { return b.phase() == 0 })
	if e := f.ledger["i"]; e.Epoch != 3 || e.Holder != "" || e.Line != 7 {
		t.Errorf("%+v", e)
	}
}

// crashes are where source and target may die in a move.
var crashes = map[string][]string{
	"source": {
		"before message 2", "after message 2", "before message 4", "after message 4", "before message 5", "after message 5", "before message 7", "after message 7",
		"before message 17", "before storing: live", "after storing: live", "after committing: live", "before storing: frozen", "after storing: frozen", "after committing: frozen",
		"before storing: moved away", "after storing: moved away", "after committing: moved away", "before storing: ", "after storing: ", "after committing: ",
		"before job ask", "before job advance", "before job peer", "before job drop",
	},
	"target": {
		"before message 1", "after message 1", "before message 3", "after message 3", "before message 6", "after message 6", "before message 16", "after message 16",
		"before storing: moving here", "after storing: moving here", "after committing: moving here", "before storing: live", "after storing: live", "after committing: live",
		"before job append", "before job read", "before job peer", "before job drop",
	},
}

// A keep, or only its agent, dies at each message, each kind of job and around each
// commit of a move, in turn; each time the instance ends up at one place, with its
// state.
func TestMoveCrashes(t *testing.T) {
	f, from, to := two(t)
	for _, f.agentOnly = range []bool{false, true} {
		for role, points := range crashes {
			for _, point := range points {
				victim, died := from, false
				if role == "target" {
					victim = to
				}
				f.crash = func(n *node, at string) bool {
					if n == victim && at == point && !died {
						died = true
						return true
					}
					return false
				}
				if r := f.try(from, to); r != "" {
					t.Fatal(r)
				}
				f.until(fmt.Sprintf("it lives after the %s died %s", role, point), func() bool { return f.settled("i") })
				if !died {
					t.Errorf("the %s never came to where it dies %s", role, point)
				}
				if f.ledger["i"].Holder != from.name {
					from, to = to, from
				}
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
	end := time.Now().Add(6 * time.Second)
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

func (n *node) phase() int {
	n.keep.mu.Lock()
	defer n.keep.mu.Unlock()
	return n.keep.st.Instances["i"].Phase
}

// withhold drops messages of these kinds.
func withhold(kinds ...int) func(packet) bool {
	return func(p packet) bool { return slices.Contains(kinds, p.kind()) }
}

// Messages of earlier moves that come again end no later move: not what the source
// keeps for the target, and not what the target has taken in.
func TestOldMessages(t *testing.T) {
	f, a, b := two(t)
	f.moves(a, b)
	f.moves(b, a)
	old := slices.Clone(f.sent)
	// A move that is given up before the freeze leaves messages of the same epoch.
	f.drop = withhold(workload.KindReceived)
	if r := f.try(a, b); r != "" {
		t.Fatal(r)
	}
	f.until("the target takes it in", func() bool { return b.phase() == phaseHolding })
	a.keep.mu.Lock()
	a.keep.giveUp("i", errors.New("test"))
	a.keep.mu.Unlock()
	f.until("it is given up", func() bool { return f.settled("i") })
	old = append(old, f.sent[len(old):]...)
	f.drop = withhold(workload.KindRelease)
	if r := f.try(a, b); r != "" {
		t.Fatal(r)
	}
	f.until("the release is withheld", func() bool { return a.phase() == phaseReleased && b.phase() == phaseHolding })
	for _, p := range old {
		if p.kind() != workload.KindRefuse {
			_ = f.nodes[p.to].hand(p)
			_, _ = a.work(0)
			_, _ = b.work(0)
		}
	}
	for range 50 {
		f.round()
	}
	if a.phase() != phaseReleased || b.phase() != phaseHolding {
		t.Error(f.describe())
	}
	f.drop = nil
	f.until("it arrives", func() bool { return f.settled("i") && f.ledger["i"].Holder == b.name })
}

// The ledger's answer to a claim of an earlier move says nothing about this one.
func TestLateAnswer(t *testing.T) {
	f, a, b := two(t)
	e := workload.Entry{Instance: "i", Epoch: 2, Holder: b.name, Bundle: f.ledger["i"].Bundle}
	claim := must(workload.Claim{Instance: "i", From: 1, Entry: e}.Sign(a.keep.epochKey))(t)
	answer := tee.JobDone{Body: cose.MustMarshal(message.Signed{Message: must(e.Sign(f.cloud.fleet, claim))(t)})}
	late := func() {
		a.keep.mu.Lock()
		defer a.keep.mu.Unlock()
		a.keep.heardLedger("i", 1, claim, answer)
	}
	f.moves(a, b)
	late()
	f.moves(b, a)
	late()
	f.moves(a, b)
}

// From when the freeze is on its way to the disk, nothing gives the move up.
func TestNoWayBack(t *testing.T) {
	f, a, b := two(t)
	f.drop = withhold(workload.KindReceived)
	if r := f.try(a, b); r != "" {
		t.Fatal(r)
	}
	f.until("all has come", func() bool { return a.keep.workloads.final("i") != nil && b.keep.workloads.receivedHead("i") != nil })
	said := func() *packet {
		for _, p := range slices.Backward(f.sent) {
			if p.kind() == workload.KindReceived {
				return &p
			}
		}
		return nil
	}
	f.until("it says so", func() bool { return said() != nil })
	if err := a.hand(*said()); err != nil {
		t.Fatal(err)
	}
	out := must(tee.Advance{}.Do(a.ctx(), a))(t)
	if len(out.Commit) == 0 {
		t.Fatal("it does not freeze")
	}
	attempt := a.keep.moves["i"].attempt
	a.keep.moves["i"].began = time.Time{}
	f.later() // far too late
	b.keep.mu.Lock()
	b.keep.refuse("i", a.name, attempt, errors.New("test"))
	b.keep.mu.Unlock()
	for range 10 {
		_, _ = b.work(0)
		f.deliverOne()
	}
	f.drop = nil
	if err := a.commits(out, nil); err != nil {
		t.Fatal(err)
	}
	f.until("it arrives", func() bool { return f.settled("i") })
	if f.ledger["i"].Holder != b.name {
		t.Error(f.describe())
	}
}

// Who is not a keep of this tenant with a good verdict has no say in a move.
func TestForgedControl(t *testing.T) {
	f, a, b := two(t)
	f.drop = withhold(workload.KindRelease)
	if r := f.try(a, b); r != "" {
		t.Fatal(r)
	}
	f.until("the release is withheld", func() bool { return a.phase() == phaseReleased })
	genuine := a.evidence()
	verdict := func(edit func(*attest.Verdict)) []byte { return f.cloud.verdict(genuine, a.subject(), edit) }
	i := a.keep.st.Instances["i"]
	good := workload.Control{
		Kind: workload.KindRelease, Attempt: i.Move.Attempt, Instance: "i", From: a.name, To: b.name, Verdict: verdict(nil), Sealed: i.Move.Sealed, Head: i.Move.Head, Entry: i.Move.Entry,
	}
	entry := func(key *ecdsa.PrivateKey, edit func(*workload.Entry)) []byte {
		e := f.ledger["i"]
		edit(&e)
		return must(e.Sign(key, nil))(t)
	}
	other := newCloud(t)
	for name, c := range map[string]struct {
		edit func(*workload.Control)
		key  *ecdsa.PrivateKey
		want string
	}{
		"signed by another":        {nil, newKey(t), "move"},
		"no verdict":               {func(c *workload.Control) { c.Verdict = nil }, nil, "verdict"},
		"another verifier":         {func(c *workload.Control) { c.Verdict = other.verdict(genuine, a.subject(), nil) }, nil, "verdict"},
		"a verdict on another":     {func(c *workload.Control) { c.Verdict = f.cloud.verdict(genuine, "acme/gw3", nil) }, nil, "the verdict is about"},
		"an expired verdict":       {func(c *workload.Control) { c.Verdict = verdict(func(v *attest.Verdict) { v.Expires = f.cloud.now }) }, nil, "expired"},
		"another tenant's verdict": {func(c *workload.Control) { c.Verdict = verdict(func(v *attest.Verdict) { v.Audience = "other" }) }, nil, "the verdict is for"},
		"a warning": {func(c *workload.Control) {
			c.Verdict = verdict(func(v *attest.Verdict) {
				vector := attest.Vector{Configuration: 36}
				v.Submods = map[string]attest.Appraisal{attest.Submodule: {Status: vector.Status(), Vector: vector}}
			})
		}, nil, "the verdict is warning"},
		"to another":      {func(c *workload.Control) { c.To = "gw3" }, nil, "the message is for gw3"},
		"from itself":     {func(c *workload.Control) { c.From, c.Verdict = b.name, f.cloud.verdict(genuine, b.subject(), nil) }, nil, "the message is for"},
		"no entry":        {func(c *workload.Control) { c.Entry = nil }, nil, "ledger entry"},
		"not the fleet's": {func(c *workload.Control) { c.Entry = entry(other.fleet, func(*workload.Entry) {}) }, nil, "ledger entry"},
		"entry of another": {func(c *workload.Control) {
			c.Entry = entry(f.cloud.fleet, func(e *workload.Entry) { e.Instance = "j" })
		}, nil, "not of this move"},
		"another holder": {func(c *workload.Control) {
			c.Entry = entry(f.cloud.fleet, func(e *workload.Entry) { e.Holder = "gw3" })
		}, nil, "not of this move"},
		"an older epoch": {func(c *workload.Control) { c.Entry = entry(f.cloud.fleet, func(e *workload.Entry) { e.Epoch-- }) }, nil, "not of this move"},
		"a later epoch":  {func(c *workload.Control) { c.Entry = entry(f.cloud.fleet, func(e *workload.Entry) { e.Epoch++ }) }, nil, "not of this move"},
		"another attempt's": {func(c *workload.Control) {
			c.Entry = entry(f.cloud.fleet, func(e *workload.Entry) { e.Attempt = random(16) })
		}, nil, "not of this move"},
		"another head": {func(c *workload.Control) { c.Head = random(32) }, nil, "not of this move"},
		"another head twice": {func(c *workload.Control) {
			c.Head = random(32)
			c.Entry = entry(f.cloud.fleet, func(e *workload.Entry) { e.Head = c.Head })
		}, nil, "what came is not what the ledger says"},
		"no key": {func(c *workload.Control) { c.Sealed = nil }, nil, "opening a release"},
		"a key for another": {func(c *workload.Control) {
			c.Sealed = must(workload.SealTo(workload.PurposeRelease, releaseContext(&passage{Attempt: c.Attempt, Head: c.Head, Nonce: b.keep.st.Instances["i"].Move.Nonce}), random(32), a.receive()))(t)
		}, nil, "opening a release"},
	} {
		m, key := good, a.keep.epochKey
		if c.edit != nil {
			c.edit(&m)
		}
		if c.key != nil {
			key = c.key
		}
		out, err := tee.Peer{From: a.name, Data: must(m.Sign(key))(t)}.Do(b.ctx(), b)
		wantRefusal(t, name, err, c.want)
		if len(out.Commit) > 0 || b.phase() != phaseHolding {
			t.Fatalf("%s: it was taken", name)
		}
	}
	another := good
	another.Attempt = random(16)
	if out := must(tee.Peer{From: a.name, Data: must(another.Sign(a.keep.epochKey))(t)}.Do(b.ctx(), b))(t); len(out.Commit) > 0 {
		t.Error("a release of another attempt was taken")
	}
	f.drop = nil
	f.until("it arrives", func() bool { return f.settled("i") && f.ledger["i"].Holder == b.name })
}

// A target that may not run the instance, or cannot, says so, and the source goes on.
func TestTargetRefuses(t *testing.T) {
	f, a, b := two(t)
	f.moves(a, b)
	f.moves(b, a)
	refused := func(name string) {
		t.Helper()
		if r := f.try(a, b); r != "" {
			t.Fatal(r)
		}
		from := len(f.sent)
		f.until(name, func() bool {
			f.round()
			return f.settled("i") && slices.ContainsFunc(f.sent[from:], func(p packet) bool { return p.kind() == workload.KindRefuse })
		})
		if f.ledger["i"].Holder != a.name || f.ledger["i"].Epoch != 3 || len(b.keep.st.Instances) != 0 {
			t.Errorf("%s: %s", name, f.describe())
		}
	}
	b.staff = 0
	b.restart(0)
	refused("no runner is idle")
	b.staff = 2
	f.until("there are runners", func() bool { f.round(); return b.keep.workloads.idle() })
	b.vouch(func(v *attest.Verdict) { v.Expires = f.cloud.now })
	if r := f.try(a, b); r != "" { // nobody believes its refusal: the source's patience ends
		t.Fatal(r)
	}
	for range 20 {
		f.round()
	}
	a.keep.mu.Lock()
	if mv := a.keep.moves["i"]; mv == nil || mv.stage != workload.KindAccept {
		t.Errorf("the verdict has expired: %+v", mv)
	} else {
		mv.began = time.Time{}
	}
	a.keep.mu.Unlock()
	f.until("it is given up", func() bool { f.later(); return f.settled("i") })
	b.vouch(nil)
	b.keep.cfg.RunnerUID = NoRunners
	refused("the target runs no workloads")
	b.keep.cfg.RunnerUID = uint32(os.Getuid())
	if r := a.command(message.WorkloadMove, map[string]string{"instance": "i", "to": a.name}); r.Done || r.Reason != "instance i is on gw1 already" {
		t.Errorf("%+v", r)
	}
	if r := f.try(a, b); r != "" {
		t.Fatal(r)
	}
	if r := a.command(message.WorkloadMove, map[string]string{"instance": "i", "to": b.name}); r.Done || r.Reason != "instance i is being moved already" {
		t.Errorf("a second move: %+v", r)
	}
	f.until("the first goes on", func() bool { return f.settled("i") && f.ledger["i"].Holder == b.name })
}

// The manifest says where to, how often, and under what assurance of the target.
func TestManifestForbids(t *testing.T) {
	f := newFabric(t)
	a, b := f.node(gw), f.node("gw2")
	a.staff, b.staff = 3, 3
	high := func(v *attest.Verdict) { v.Assurance = "cvm" }
	a.vouch(high)
	a.deployed("i", manifest(func(m *workload.Manifest) { m.Assurance = "cvm" }))
	a.deployed("once", manifest(func(m *workload.Manifest) { m.Moves = 0 }))
	a.deployed("here", manifest(func(m *workload.Manifest) { m.Nodes = []string{gw} }))
	f.until("they live", func() bool { return f.settled("i") && f.settled("once") && f.settled("here") })
	for name, want := range map[string]string{"once": "has moved 0 times", "here": "does not allow gw2", "none": "no instance"} {
		if r := a.command(message.WorkloadMove, map[string]string{"instance": name, "to": b.name}); r.Done || !strings.Contains(r.Reason, want) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if r := f.try(a, b); r != "" {
		t.Fatal(r)
	}
	f.until("the assurance is refused", func() bool {
		f.round()
		return f.settled("i") && slices.ContainsFunc(f.sent, func(p packet) bool { return p.kind() == workload.KindRefuse })
	})
	if f.ledger["i"].Holder != a.name || len(b.keep.st.Instances) != 0 {
		t.Error(f.describe())
	}
}

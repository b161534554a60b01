package fleet_test

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

func TestDeployMakesTheEntryFirst(t *testing.T) {
	startFleet(t)
	g, other := runner(t, "dep1"), runner(t, "dep2")
	op, name, manifest := signers["acme"]["operator"], instanceName(), bundle(t, nil)
	msg, err := order(t, "acme", op, g.deployment(1, name, manifest))
	if err != nil {
		t.Fatal(err)
	}
	want := workload.Entry{Instance: name, Epoch: 1, Holder: "dep1", Bundle: workload.ID(manifest), Tenant: "acme", Inputs: inputsOf(name)}
	if got := ledger(t, name); !reflect.DeepEqual(got.Entry, want) || !bytes.Equal(got.Manifest, manifest) || got.History[0].By != "operator" {
		t.Fatalf("the entry is %+v", got.Entry)
	}
	item := g.pull(1)
	e, err := workload.VerifyEntry(&signers["acme"]["fleet"].PublicKey, item.Entry)
	if err != nil || !bytes.Equal(item.Command, msg) || !e.Answers(msg) || e.Holder != "dep1" || e.Epoch != 1 {
		t.Fatalf("delivered with %+v: %v", e, err)
	}
	if _, err := order(t, "acme", op, other.deployment(1, name, manifest)); err == nil || !strings.Contains(err.Error(), "is run by dep1") {
		t.Errorf("deployed twice: %v", err)
	}
	if q := other.queue(); len(q.Pending) != 0 {
		t.Error("a refused command was queued")
	}
	// The keep refuses it: nobody runs it, and it may be deployed elsewhere.
	refused := g.result(msg, 1, false)
	refused.Reason = "no room"
	g.publish("result", must(refused.Sign(g.key)))
	eventually(t, "the entry is taken back", func() bool { return ledger(t, name).Entry.Holder == "" })
	if _, err := order(t, "acme", op, other.deployment(2, name, manifest)); err != nil {
		t.Fatal(err)
	}
	if got := ledger(t, name).Entry; got.Epoch != 3 || got.Holder != "dep2" {
		t.Errorf("the entry is %+v", got)
	}
	// Other commands come without one.
	if _, err := order(t, "acme", op, g.command(2, message.StatusCommand)); err != nil {
		t.Fatal(err)
	}
	if item := g.pull(2); len(item.Entry) != 0 || len(item.Command) == 0 {
		t.Error("a command that deploys nothing has an entry")
	}
}

func TestDeployRefusals(t *testing.T) {
	startFleet(t)
	g := runner(t, "deprefuse")
	op, name := signers["acme"]["operator"], instanceName()
	good := bundle(t, nil)
	body := func(change func(*workload.Deploy)) []byte {
		d := workload.Deploy{Instance: name, Manifest: good, Key: []byte("k"), Inputs: []workload.Source{{Gateway: "deprefuse", Stream: "temp"}}}
		change(&d)
		return message.Encode(d)
	}
	for _, x := range []struct {
		name string
		body []byte
		want string
	}{
		{"garbage", []byte("garbage"), "body"},
		{"another instance", body(func(d *workload.Deploy) { d.Instance = "other" }), "another instance"},
		{"another signer's manifest", body(func(d *workload.Deploy) {
			m := must(workload.PeekManifest(good))
			d.Manifest = must(m.Sign(signers["globex"]["operator"]))
		}), "manifest"},
		{"another node", body(func(d *workload.Deploy) {
			d.Manifest = bundle(t, func(m *workload.Manifest) { m.Nodes = []string{"gw9"} })
		}), "does not allow"},
		{"no inputs", body(func(d *workload.Deploy) { d.Inputs = nil }), "input streams"},
		{"an input that is a subject", body(func(d *workload.Deploy) { d.Inputs[0].Stream = ">" }), "not a stream"},
		{"content that is not stored", body(func(d *workload.Deploy) {
			d.Manifest = bundle(t, func(m *workload.Manifest) { m.Content = nonce(99) })
		}), "is not here"},
	} {
		c := g.command(1, message.WorkloadDeploy)
		c.Args, c.Body = map[string]string{"instance": name}, x.body
		if _, err := order(t, "acme", op, c); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
	if _, err := api[fleet.Signed](t, "data.ledger", fleet.Instance{Instance: name}); err == nil {
		t.Error("a refused deployment left an entry")
	}
	// A sequence that was used: the entry that was made for it is taken back.
	if _, err := order(t, "acme", op, g.command(5, message.StatusCommand)); err != nil {
		t.Fatal(err)
	}
	if _, err := order(t, "acme", op, g.deployment(5, name, good)); err == nil {
		t.Error("a used sequence was taken")
	}
	g.deploy(name, good)
	if got := ledger(t, name).Entry; got.Holder != "deprefuse" {
		t.Errorf("the entry is %+v", got)
	}
}

// The queue is one entry of a bucket: commands with bodies may not outgrow it.
func TestQueueIsBoundedInBytes(t *testing.T) {
	startFleet(t)
	g := runner(t, "bulky")
	manifest := bundle(t, nil)
	var err error
	n := uint64(0)
	for ; err == nil && n < 64; n++ {
		c := g.deployment(n+1, instanceName(), manifest)
		d := workload.Deploy{Instance: c.Args["instance"], Manifest: manifest, Key: make([]byte, 60<<10), Inputs: []workload.Source{{Gateway: "bulky", Stream: "temp"}}}
		c.Body = message.Encode(d)
		_, err = order(t, "acme", signers["acme"]["operator"], c)
	}
	if err == nil || !strings.Contains(err.Error(), "commands wait") || n < 5 {
		t.Fatalf("after %d: %v", n, err)
	}
	if item := g.pull(1); len(item.Command) == 0 || len(item.Entry) == 0 {
		t.Error("nothing is delivered")
	}
}

func TestClaims(t *testing.T) {
	f, _ := startFleet(t)
	a, b := runner(t, "claima"), runner(t, "claimb")
	weak, revoked, stranger := runner(t, "claimweak"), runner(t, "claimrev"), runner(t, "claimstr")
	receive := b.mayRun(nil)
	weak.mayRun(func(v *attest.Verdict) { v.Assurance = "none" })
	bad := attest.Vector{Instance: 2, Executables: 96}
	stranger.mayRun(func(v *attest.Verdict) {
		v.Submods[attest.Submodule] = attest.Appraisal{Status: bad.Status(), Vector: bad}
	})
	revoked.change(func(g *cloud.Gateway) { g.Revoked = true })
	manifest := bundle(t, func(m *workload.Manifest) {
		m.Moves, m.Nodes = 1, []string{"claima", "claimb", "claimweak", "claimrev", "claimstr", "claimgone"}
	})
	name := instanceName()
	a.deploy(name, manifest)
	move := workload.Entry{Instance: name, Holder: "claimb", Bundle: workload.ID(manifest), Attempt: nonce(1)[:16], Head: nonce(2), Line: 5, Receive: receive}
	with := func(change func(*workload.Entry)) workload.Entry {
		e := move
		change(&e)
		return e
	}
	to := func(holder string) workload.Entry { return with(func(e *workload.Entry) { e.Holder = holder }) }
	for _, x := range []struct {
		name  string
		claim []byte
		want  string
	}{
		{"another bundle", a.claim(1, with(func(e *workload.Entry) { e.Bundle = nonce(9) })), "bundle does not change"},
		{"by the owner's word", a.claim(1, with(func(e *workload.Entry) { e.Owner = true })), "not the data owner's"},
		{"no attempt", a.claim(1, with(func(e *workload.Entry) { e.Attempt = nil })), "an attempt and a head"},
		{"no head", a.claim(1, with(func(e *workload.Entry) { e.Head = nil })), "an attempt and a head"},
		{"another receiving key", a.claim(1, with(func(e *workload.Entry) { e.Receive = nonce(3) })), "another receiving key"},
		{"to a gateway that is not allowed", a.claim(1, to("elsewhere")), "does not allow"},
		{"to a gateway that there is not", a.claim(1, to("claimgone")), "is enrolled"},
		{"to a revoked gateway", a.claim(1, to("claimrev")), "is revoked"},
		{"to a weak gateway", a.claim(1, to("claimweak")), "asks for assurance"},
		{"to a gateway in a bad state", a.claim(1, to("claimstr")), "contraindicated"},
		{"signed by another gateway", b.claim(1, move), "does not vouch"},
		{"signed by the operator", signClaim(signers["acme"]["operator"], 1, move), "does not vouch"},
		{"garbage", []byte("garbage"), "malformed"},
	} {
		if _, reason := a.claimed(x.claim); !strings.Contains(reason, x.want) || reason == "" {
			t.Errorf("%s: %q, want %q", x.name, reason, x.want)
		}
	}
	nowhere := move
	nowhere.Instance = instanceName()
	if _, reason := a.claimed(a.claim(1, nowhere)); !strings.Contains(reason, "there is no instance") {
		t.Errorf("an instance that there is not: %q", reason)
	}
	if r := ledger(t, name); r.Entry.Epoch != 1 || len(r.History) != 1 {
		t.Fatalf("a refused claim changed the entry to %+v", r.Entry)
	}
	won := move
	won.Epoch, won.Tenant, won.Inputs = 2, "acme", inputsOf(name)
	claim := a.claim(1, move)
	for range 3 { // the first wins; the answer may be lost, and it is asked again
		if got, reason := a.claimed(claim); !reflect.DeepEqual(got, won) {
			t.Fatalf("it won %+v: %s", got, reason)
		}
	}
	// Signed anew after a restart, or another claim: the truth either way.
	for _, again := range [][]byte{a.claim(1, move), a.claim(1, with(func(e *workload.Entry) { e.Holder, e.Attempt = "claima", nonce(7)[:16] })), a.claim(7, move)} {
		if got, reason := a.claimed(again); !reflect.DeepEqual(got, won) {
			t.Errorf("it is told %+v: %s", got, reason)
		}
	}
	receiveA := a.mayRun(nil)
	back := workload.Entry{Instance: name, Holder: "claima", Bundle: won.Bundle, Attempt: nonce(4)[:16], Head: nonce(5), Line: 9, Receive: receiveA}
	if _, reason := b.claimed(b.claim(2, back)); !strings.Contains(reason, "moved 1 times") {
		t.Errorf("moved more often than the manifest says: %q", reason)
	}
	less := back
	less.Holder, less.Line = "claimb", 4
	if _, reason := b.claimed(b.claim(2, less)); !strings.Contains(reason, "line 4 is before 5") {
		t.Errorf("lines taken back: %q", reason)
	}
	// A holder whose verdict is not usable any more is told to attest.
	v := b.verdict()
	v.Expires = time.Now().Unix()
	b.setVerdict(v)
	if _, reason := b.claimed(b.claim(2, less)); !strings.Contains(reason, "expired") {
		t.Errorf("an expired verdict: %q", reason)
	}
	eventually(t, "it is asked to attest", func() bool { return b.queue().Attest })
	b.mayRun(nil)
	stop := workload.Entry{Instance: name, Bundle: won.Bundle} // nothing was written here: the lines before stay
	if got, reason := b.claimed(b.claim(2, stop)); reason != "" || got.Holder != "" || got.Line != 5 || got.Epoch != 3 {
		t.Errorf("stopped at %+v: %s", got, reason)
	}
	if _, reason := a.claimed(a.claim(3, back)); reason != "" { // nobody holds it: told so
		t.Errorf("a claim on a stopped instance: %q", reason)
	}
	if got := ledger(t, name).Entry; got.Epoch != 3 {
		t.Errorf("a stopped instance was claimed: %+v", got)
	}
	a.deploy(name, manifest)
	if r := ledger(t, name); r.Entry.Epoch != 4 || r.Entry.Line != 5 || r.Moves != 0 {
		t.Errorf("deployed again as %+v", r.Entry)
	}
	if n := f.Metrics.Of("acme"); len(n) == 0 {
		t.Error("nothing was counted")
	}
}

func TestStopLost(t *testing.T) {
	startFleet(t)
	g := runner(t, "lost")
	manifest, name := bundle(t, nil), instanceName()
	g.deploy(name, manifest)
	stop := func() error {
		_, err := api[fleet.None](t, "workload.stop", fleet.Instance{Instance: name})
		return err
	}
	if err := stop(); err == nil || !strings.Contains(err.Error(), "lost holds instance") {
		t.Fatalf("taken from a good holder: %v", err)
	}
	g.store(g.results(name, 1, 1, 4))
	g.store(g.results(name, 1, 5, 3))
	g.start() // a restart opens the stream with a record that has no result
	g.setVerdict(g.verdict())
	g.store(g.numbered(name, nil))
	g.change(func(e *cloud.Gateway) { e.Revoked = true })
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	r := ledger(t, name)
	if r.Entry.Holder != "" || r.Entry.Line != 7 || r.Entry.Epoch != 2 {
		t.Errorf("stopped at %+v", r.Entry)
	}
	for line, want := range map[uint64]bool{0: false, 1: true, 7: true, 8: false} {
		if r.Accepts("lost", 1, line) != want {
			t.Errorf("line %d: %v", line, !want)
		}
	}
	if err := stop(); err != nil { // again
		t.Error(err)
	}
	if _, err := api[fleet.None](t, "workload.stop", fleet.Instance{Instance: instanceName()}); err == nil {
		t.Error("stopped nobody")
	}
}

// results seals n results of an instance, from a line on, as one chunk.
func (g *gateway) results(instance string, epoch, first uint64, n int) []byte {
	g.t.Helper()
	return g.numbered(instance, &sealing.Cursor{Session: workload.Session(instance, epoch), Line: first + uint64(n) - 1})
}

// numbered seals a chunk with this cursor.
func (g *gateway) numbered(name string, cursor *sealing.Cursor) []byte {
	g.t.Helper()
	c, _, err := sealing.ParseChunk(g.chunk(name, 1))
	if err != nil {
		g.t.Fatal(err)
	}
	cp := g.checkpoint(name)
	cp.Cursor = cursor
	c.Checkpoint = must(cp.Sign(g.key, sealing.TypCheckpoint))
	return c.Marshal()
}

func TestRecover(t *testing.T) {
	startFleet(t)
	a, b := runner(t, "reca"), runner(t, "recb")
	receive := b.mayRun(nil)
	manifest, name := bundle(t, nil), instanceName()
	a.deploy(name, manifest)
	a.store(a.results(name, 1, 1, 6))
	checkpoint := must(workload.PeekManifest(manifest)).Content // any blob that is complete
	word := message.Recover{Tenant: "acme", Instance: name, From: 1, To: "recb", Checkpoint: checkpoint, Head: nonce(3), Issued: time.Now().Unix()}
	say := func(role string, change func(*message.Recover)) error {
		w := word
		if change != nil {
			change(&w)
		}
		_, err := api[fleet.None](t, "workload.recover", fleet.Signed{Message: must(w.Sign(signers["acme"][role]))})
		return err
	}
	for what, err := range map[string]error{
		"by the operator":     say("operator", nil),
		"another tenant":      say("owner", func(w *message.Recover) { w.Tenant = "globex" }),
		"an old word":         say("owner", func(w *message.Recover) { w.Issued -= 3700 }),
		"a later epoch":       say("owner", func(w *message.Recover) { w.From = 2 }),
		"another instance":    say("owner", func(w *message.Recover) { w.Instance = instanceName() }),
		"no such checkpoint":  say("owner", func(w *message.Recover) { w.Checkpoint = nonce(8) }),
		"to nobody":           say("owner", func(w *message.Recover) { w.To = "nobody" }),
		"to another's tenant": say("owner", func(w *message.Recover) { w.To = "acme/recb" }),
	} {
		if err == nil {
			t.Errorf("%s: recovered", what)
		}
	}
	if err := say("owner", nil); err != nil {
		t.Fatal(err)
	}
	want := workload.Entry{Instance: name, Epoch: 2, Holder: "recb", Bundle: workload.ID(manifest), Head: nonce(3), Line: 6, Receive: receive, Owner: true, Tenant: "acme", Inputs: inputsOf(name)}
	r := ledger(t, name)
	if !reflect.DeepEqual(r.Entry, want) || len(r.Recovery) == 0 {
		t.Fatalf("recovered as %+v", r.Entry)
	}
	if err := say("owner", nil); err == nil {
		t.Error("the same word in another message was taken for an entry that it is not about")
	}
	// What the lost one still does comes to nothing.
	if got, reason := a.claimed(a.claim(1, workload.Entry{Instance: name, Holder: "reca", Bundle: want.Bundle})); reason != "" || got.Holder != "recb" {
		t.Errorf("the lost holder is told %+v: %s", got, reason)
	}
	if r.Accepts("reca", 1, 7) || !r.Accepts("reca", 1, 6) || !r.Accepts("recb", 2, 7) || r.Accepts("recb", 2, 6) {
		t.Error("lines are not fenced at 6")
	}
	op := signers["acme"]["operator"]
	if _, err := order(t, "acme", op, a.deployment(9, name, manifest)); err == nil {
		t.Error("deployed where the data owner did not say")
	}
	if _, err := order(t, "acme", op, b.deployment(1, name, bundle(t, nil))); err == nil {
		t.Error("deployed another bundle")
	}
	b.deploy(name, manifest) // starts it, at the same entry
	if got := ledger(t, name).Entry; !reflect.DeepEqual(got, want) {
		t.Errorf("the entry is %+v", got)
	}
	if _, err := order(t, "acme", op, b.deployment(9, name, manifest)); err == nil {
		t.Error("deployed twice")
	}
}

func TestListInstances(t *testing.T) {
	startFleet(t)
	g := runner(t, "lister")
	manifest := bundle(t, nil)
	names := []string{instanceName(), instanceName()}
	for _, n := range names {
		g.deploy(n, manifest)
	}
	seen := map[string]fleet.View{}
	for page := (fleet.Page{}); ; {
		got := must(api[fleet.Instances](t, "workload.ls", page))
		for _, v := range got.Views {
			if v.Entry.Instance <= page.After {
				t.Fatal("out of order")
			}
			page.After = v.Entry.Instance
			seen[v.Entry.Instance] = v
		}
		if !got.More {
			break
		}
	}
	for _, n := range names {
		if v := seen[n]; v.Entry.Holder != "lister" || v.Name != "watch" || v.Version != "1" || v.By != "operator" || v.Since == 0 {
			t.Errorf("%s is listed as %+v", n, v)
		}
	}
	if got := must(cloud.Ask[fleet.Instances](deadline(t), bus.NC, "api.globex.workload.ls", fleet.Page{})); len(got.Views) != 0 {
		t.Error("another tenant sees them")
	}
	if _, err := cloud.Ask[fleet.Signed](deadline(t), bus.NC, "api.globex.data.ledger", fleet.Instance{Instance: names[0]}); err == nil {
		t.Error("another tenant reads one")
	}
}

// TestLedgerModel: whatever holders claim, in whatever order, with answers lost
// and claims repeated, on two replicas at once: every epoch has one entry, made by
// the holder of the one before, and every answer tells the entry that stood.
func TestLedgerModel(t *testing.T) {
	startFleet(t)
	startFleet(t)
	var gs []*gateway
	receive := map[string][]byte{}
	for i := range 3 {
		g := runner(t, name("model", i))
		receive[g.name] = g.mayRun(nil)
		gs = append(gs, g)
	}
	manifest := bundle(t, nil)
	rapid.Check(t, func(rt *rapid.T) {
		inst := instanceName()
		gs[0].deploy(inst, manifest)
		var sent [][2]any // gateway and claim
		before := ledger(t, inst)
		draw := func(g *gateway) []byte {
			e := workload.Entry{Instance: inst, Bundle: workload.ID(manifest), Line: before.Entry.Line + rapid.Uint64Range(0, 3).Draw(rt, "lines")}
			if to := rapid.SampledFrom(append([]*gateway{nil}, gs...)).Draw(rt, "to"); to != nil {
				e.Holder, e.Receive = to.name, receive[to.name]
				e.Attempt, e.Head = rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(rt, "attempt"), nonce(1)
			} else if rapid.IntRange(0, 9).Draw(rt, "stop") > 0 {
				e.Holder = g.name // a stop ends the run: rarely
			}
			from := before.Entry.Epoch
			if rapid.IntRange(0, 3).Draw(rt, "stale") == 0 && from > 1 {
				from--
			}
			return g.claim(from, e)
		}
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			var now []asking
			var claims [][]byte
			for range rapid.IntRange(1, 3).Draw(rt, "racing") {
				g := rapid.SampledFrom(gs).Draw(rt, "who")
				claim := []byte(nil)
				if len(sent) > 0 && rapid.IntRange(0, 3).Draw(rt, "replay") == 0 {
					old := rapid.SampledFrom(sent).Draw(rt, "old")
					g, claim = old[0].(*gateway), old[1].([]byte)
				} else {
					claim = draw(g)
				}
				sent = append(sent, [2]any{g, claim})
				now, claims = append(now, g.begin(message.AskLedger, message.Signed{Message: claim})), append(claims, claim)
			}
			var told []workload.Entry
			for i, a := range now {
				ans := a.answer()
				if ans.Error != "" {
					continue // not allowed
				}
				s := must(message.Decode[message.Signed](ans.Body))
				e := must(workload.VerifyEntry(&signers["acme"]["fleet"].PublicKey, s.Message))
				if !e.Answers(claims[i]) {
					rt.Fatal("an answer to another claim")
				}
				e.Nonce = nil
				told = append(told, e)
			}
			after := ledger(t, inst)
			checkHistory(rt, before, after)
			for _, e := range told {
				h := after.History[e.Epoch-1]
				if h.Holder != e.Holder || h.Line != e.Line || !bytes.Equal(h.Attempt, e.Attempt) {
					rt.Fatalf("told %+v, which the history does not have", e)
				}
				if e.Epoch < before.Entry.Epoch {
					rt.Fatalf("told %+v, which was replaced before", e)
				}
			}
			before = after
		}
	})
}

func checkHistory(rt *rapid.T, before, after fleet.Record) {
	if !reflect.DeepEqual(after.History[:len(before.History)], before.History) {
		rt.Fatal("the past has changed")
	}
	for i, h := range after.History {
		if h.Epoch != uint64(i+1) {
			rt.Fatalf("epoch %d is entry %d", h.Epoch, i)
		}
		if i > 0 && (h.By != after.History[i-1].Holder || h.Line < after.History[i-1].Line) {
			rt.Fatalf("%+v follows %+v", h, after.History[i-1])
		}
	}
	last := after.History[len(after.History)-1]
	if e := after.Entry; e.Epoch != last.Epoch || e.Holder != last.Holder || e.Line != last.Line {
		rt.Fatalf("the entry %+v is not the newest, %+v", e, last)
	}
}

// Two claims of one holder at once: one wins, and both are told which.
func TestRacingClaims(t *testing.T) {
	startFleet(t)
	startFleet(t)
	g := runner(t, "racer")
	manifest := bundle(t, nil)
	for i := range 20 {
		inst := instanceName()
		g.deploy(inst, manifest)
		var now []asking
		for n := range 2 {
			e := workload.Entry{Instance: inst, Holder: "racer", Bundle: workload.ID(manifest), Attempt: nonce(uint64(10*i + n))[16:], Line: uint64(n)}
			now = append(now, g.begin(message.AskLedger, message.Signed{Message: g.claim(1, e)}))
		}
		var told [2][]byte
		for n, a := range now {
			s := must(message.Decode[message.Signed](a.answer().Body))
			told[n] = must(workload.VerifyEntry(&signers["acme"]["fleet"].PublicKey, s.Message)).Attempt
		}
		if r := ledger(t, inst); !bytes.Equal(told[0], told[1]) || !bytes.Equal(told[0], r.Entry.Attempt) || r.Entry.Epoch != 2 {
			t.Fatalf("told %x and %x, the entry is %+v", told[0], told[1], r.Entry)
		}
	}
}

// TestFence holds Accepts against what it means: of all results that anybody could
// seal, for each line at most one (holder, epoch) counts.
func TestFence(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r fleet.Record
		first := rapid.Uint64Range(1, 5).Draw(t, "first")
		line := uint64(0)
		n := rapid.IntRange(1, 6).Draw(t, "epochs")
		for i := range n {
			h := fleet.Event{Epoch: first + uint64(i), Holder: rapid.SampledFrom([]string{"a", "b", "c", ""}).Draw(t, "holder"), Line: line}
			r.History = append(r.History, h)
			line += rapid.Uint64Range(0, 4).Draw(t, "lines")
		}
		last := r.History[n-1]
		r.Entry = workload.Entry{Epoch: last.Epoch, Holder: last.Holder, Line: last.Line}
		for l := range line + 3 {
			var by []string
			for _, h := range r.History {
				for _, g := range []string{"a", "b", "c"} {
					if r.Accepts(g, h.Epoch, l) {
						by = append(by, fmt.Sprint(g, h.Epoch))
						if g != h.Holder {
							t.Fatalf("%s was not the holder of epoch %d", g, h.Epoch)
						}
					}
				}
			}
			if l > r.History[0].Line && len(by) > 1 {
				t.Fatalf("line %d counts of %v", l, by)
			}
		}
		if r.Accepts("a", last.Epoch+1, line+1) || r.Accepts("a", 0, 1) {
			t.Fatal("a result of no epoch counts")
		}
		if first > 1 && r.Accepts("x", first-1, r.History[0].Line) {
			t.Fatal("a result from before the history counts: nobody remembers who held it then")
		}
	})
}

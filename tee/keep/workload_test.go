package keep

import (
	"bytes"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

const zgen = 0x154 // TPM2_ECDH_ZGen: what opening a secret takes

// An instance is deployed when operator, manifest, ledger and verdict agree, and
// refused with the reason before anything is decrypted when they do not.
func TestDeploy(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	spy := newFaulty(t, shared.Socket())
	n.cfg.TPM = spy.socket
	n.restart(0)
	other := newCloud(t)
	changes := lasting
	defer func() { lasting = changes }()
	lasting = []uint32{zgen} // what the spy looks for
	for name, c := range map[string]struct {
		manifest func(*workload.Manifest)
		edit     func(*deployment)
		want     string
		opens    bool // the secret is looked into
	}{
		"a manifest of another signer":  {nil, func(d *deployment) { d.deploy.Manifest = must(manifest(nil).Sign(other.operator))(t) }, "manifest", false},
		"no manifest":                   {nil, func(d *deployment) { d.deploy.Manifest = nil }, "manifest", false},
		"another node":                  {func(m *workload.Manifest) { m.Nodes = []string{"gw2"} }, nil, "the manifest does not allow gw1", false},
		"more assurance":                {func(m *workload.Manifest) { m.Assurance = "cvm" }, nil, `asks for assurance "cvm", the verdict says "tpm"`, false},
		"another name":                  {nil, func(d *deployment) { d.arg = "j" }, "the instance's name", false},
		"too few inputs":                {nil, func(d *deployment) { d.deploy.Inputs = nil }, "inputs are not the manifest's", false},
		"no such source":                {nil, func(d *deployment) { d.deploy.Inputs[0].Stream = "c" }, `no source "c"`, false},
		"no entry":                      {nil, func(d *deployment) { d.entry.Bundle = nil }, "ledger entry", false},
		"an entry over another command": {nil, func(d *deployment) { d.over = []byte("another") }, "not of this deployment", false},
		"another holder":                {nil, func(d *deployment) { d.entry.Holder = "gw2" }, "not of this deployment", false},
		"another bundle":                {nil, func(d *deployment) { d.entry.Bundle = random(32) }, "not of this deployment", false},
		"another instance's entry":      {nil, func(d *deployment) { d.entry.Instance = "j" }, "not of this deployment", false},
		"a key for another instance": {nil, func(d *deployment) {
			d.deploy.Key = must(workload.SealTo(workload.PurposeBundle, workload.DeployContext(n.subject(), "j", d.deploy.Manifest), random(32), n.receive()))(t)
		}, "sealed for something else", false},
		"a key for another's key": {nil, func(d *deployment) {
			d.deploy.Key = must(workload.SealTo(workload.PurposeBundle, workload.DeployContext(n.subject(), "i", d.deploy.Manifest), random(32), f.cloud.data.PublicKey()))(t)
		}, "opening a bundle", false},
		"a short key": {nil, func(d *deployment) {
			d.deploy.Key = must(workload.SealTo(workload.PurposeBundle, workload.DeployContext(n.subject(), "i", d.deploy.Manifest), random(31), n.receive()))(t)
		}, "wrong size", true},
	} {
		item := n.order("i", manifest(c.manifest), c.edit)
		spy.arm(0, cutBefore)
		r, err := func() (message.Result, error) {
			out, err := n.gateway.settle(n.gateway.deliver(item))
			if err != nil {
				return message.Result{}, err
			}
			return message.VerifyResult(&n.keep.epochKey.PublicKey, out.Publish[0].Data)
		}()
		opened := spy.disarm() != ""
		if opened != c.opens {
			t.Errorf("%s: the secret was looked into: %v", name, opened)
		}
		if opened {
			n.restart(0)
			r = n.outcome(n.order("i", manifest(c.manifest), c.edit))
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if r.Done || !strings.Contains(r.Reason, c.want) || len(n.keep.st.Instances) != 0 {
			t.Errorf("%s: %+v", name, r)
		}
		delete(f.ledger, "i")
	}
	lasting = changes

	n.keep.cfg.RunnerUID = NoRunners
	if r := n.outcome(n.order("i", manifest(nil), nil)); r.Done || !strings.Contains(r.Reason, "no [runners] configured") {
		t.Errorf("%+v", r)
	}
	n.keep.cfg.RunnerUID = n.cfg.RunnerUID
	if r := n.outcome(n.order("a", manifest(nil), nil)); r.Done || !strings.Contains(r.Reason, "a source of this gateway is named a") {
		t.Errorf("%+v", r)
	}
	verdict := n.keep.verdict
	n.keep.verdict = attest.Verdict{}
	if r := n.outcome(n.order("i", manifest(nil), nil)); r.Done || !strings.Contains(r.Reason, "no good verdict") {
		t.Errorf("%+v", r)
	}
	n.keep.verdict = verdict

	delete(f.ledger, "i")
	item := n.order("i", manifest(nil), nil)
	if r := n.outcome(item); !r.Done {
		t.Fatalf("%+v", r)
	}
	item.Nonce = n.nonce()
	n.gateway.unchanged("the same command again", func() {
		if r := n.outcome(item); !r.Done {
			t.Errorf("%+v", r)
		}
	})
	if r := n.outcome(n.order("i", manifest(nil), nil)); r.Done || !strings.Contains(r.Reason, "is here already") {
		t.Errorf("%+v", r)
	}
	for i := 1; i < maxInstances; i++ {
		n.deployed(fmt.Sprintf("i%d", i), manifest(nil))
	}
	if r := n.outcome(n.order("more", manifest(nil), nil)); r.Done || !strings.Contains(r.Reason, "16 instances are here") {
		t.Errorf("%+v", r)
	}
}

// Whoever dies around the step, an instance is deployed once or not at all.
func TestDeployCrash(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	for i, p := range points {
		name := fmt.Sprintf("i%d", i)
		item := n.order(name, manifest(nil), nil)
		out := must(n.gateway.deliver(item))(t)
		if p.stored {
			n.state = out.Commit
		}
		if p.committed {
			must(n.commit())(t)
		}
		f.agentOnly = !p.kill
		n.restart(0)
		if _, here := n.keep.st.Instances[name]; here != p.taken {
			t.Errorf("%s: deployed: %v", p.name, here)
		}
		item.Nonce = n.nonce()
		if r := n.outcome(item); !r.Done || n.keep.st.Instances[name].Phase != phaseLive {
			t.Errorf("%s: delivered again: %+v", p.name, r)
		}
	}
	if len(n.keep.st.Instances) != len(points) {
		t.Error(f.describe())
	}
}

// What breaks the contract ends the connection, and nothing of it gets on.
func TestRunnerBreaksContract(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	early := n.connect(false)
	early.job(1, tee.JobRead, tee.ReadLog{Instance: "i"})
	early.ended("a job before it has an instance")
	n.deployed("i", manifest(nil))
	_, _ = n.work(0)
	big := []sealing.Reading{{Name: "m/v", Time: 1, Value: strings.Repeat("x", maxResult)}}
	for name, send := range map[string]func(*client) error{
		"another instance's log": func(c *client) error { c.job(1, tee.JobRead, tee.ReadLog{Instance: "j"}); return nil },
		"an append to another":   func(c *client) error { c.job(1, tee.JobAppend, tee.AppendLog{Instance: "a"}); return nil },
		"another's checkpoint":   func(c *client) error { c.job(1, tee.JobPut, tee.PutPart{Instance: "j"}); return nil },
		"a blob not its own":     func(c *client) error { c.job(1, tee.JobBlob, tee.ReadBlob{ID: random(32)}); return nil },
		"a stream not its own": func(c *client) error {
			c.job(1, tee.JobRecords, message.AskedRecords{Gateway: gw, Stream: "b"})
			return nil
		},
		"a gateway not its own": func(c *client) error {
			c.job(1, tee.JobRecords, message.AskedRecords{Gateway: "gw2", Stream: "a"})
			return nil
		},
		"a key not its own": func(c *client) error {
			c.job(1, tee.JobKey, tee.WantKey{Gateway: gw, Stream: "b", Epoch: make([]byte, 16)})
			return nil
		},
		"no epoch":           func(c *client) error { c.job(1, tee.JobKey, tee.WantKey{Gateway: gw, Stream: "a"}); return nil },
		"the keep's own job": func(c *client) error { c.job(1, tee.JobDrop, tee.DropLog{Instance: "i"}); return nil },
		"a question":         func(c *client) error { c.job(1, tee.JobAsk, tee.Question{Kind: "x", Body: cose.Raw{0xf6}}); return nil },
		"a job that fits no frame": func(c *client) error {
			c.job(1, tee.JobFrame, tee.Frame{Data: make([]byte, tee.MaxFrame-64)})
			return nil
		},
		"results from 0":        func(c *client) error { return c.d.Send(tee.KindOutput, tee.Output{Readings: pack(1)}) },
		"results that are none": func(c *client) error { return c.d.Send(tee.KindOutput, tee.Output{First: 1, Readings: []byte{1}}) },
		"a result that fits no record": func(c *client) error {
			return c.d.Send(tee.KindOutput, tee.Output{First: 1, Readings: packOf(big)})
		},
		"a long head": func(c *client) error {
			return c.d.Send(tee.KindReceived, tee.Received{Head: make([]byte, tee.MaxFrame-64)})
		},
		"a short head":      func(c *client) error { return c.d.Send(tee.KindFinal, tee.Final{Head: []byte{1}}) },
		"a long state hash": func(c *client) error { return c.d.Send(tee.KindReport, tee.Report{Newest: make([]byte, 33)}) },
		"a second hello":    func(c *client) error { return c.d.Send(tee.KindHello, tee.Hello{}) },
		"the keep's word":   func(c *client) error { return c.d.Send(tee.KindActivate, tee.Activate{}) },
	} {
		c := n.connect(false)
		n.again()
		next[tee.Assign](c, tee.KindAssign)
		_ = send(c)
		c.ended(name)
		if r := must(tee.Work{}.Do(n.ctx(), n))(t); len(r.Jobs) != 0 {
			t.Errorf("%s: passed on as %+v", name, r.Jobs[0])
		}
		if n.keep.sealer.line("i") != 0 {
			t.Errorf("%s: it was sealed", name)
		}
	}
	// A runner of another user, one that says nothing useful, and one too many.
	l := must(net.Listen("unix", filepath.Join(t.TempDir(), "runner.sock")))(t)
	n.keep.cfg.RunnerUID++
	n.served.Go(func() { _ = n.keep.Runners(n.life, l) })
	conn := must(net.Dial("unix", l.Addr().String()))(t)
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a runner of another user is served")
	}
}

func pack(n int) []byte {
	out := make([]sealing.Reading, n)
	for i := range out {
		out[i] = sealing.Reading{Name: "m/v", Time: int64(i), Value: int64(i)}
	}
	return packOf(out)
}

func packOf(rs []sealing.Reading) []byte {
	var p sealing.Pack
	for _, r := range rs {
		p.Add(r)
	}
	return p.Marshal()
}

// takeAll seals what waits and makes it durable, and returns the chunks of a stream.
func (n *node) takeAll(stream string) []tee.Chunk {
	n.t.Helper()
	n.keep.sealer.flushDue(time.Now().Add(time.Hour))
	r := must(tee.Take{After: n.ticket, Confirm: n.ticket}.Do(n.ctx(), n))(n.t)
	for _, c := range r.Chunks {
		n.ticket = c.Ticket
		n.checkpoints = append(n.checkpoints, c.Checkpoint)
	}
	_ = must(tee.Take{After: n.ticket, Confirm: n.ticket}.Do(n.ctx(), n))(n.t)
	return slices.DeleteFunc(r.Chunks, func(c tee.Chunk) bool { return c.Stream != stream })
}

// Results are sealed once, with their numbers, and acknowledged when durable; a
// runner that dies is replaced, and what it hands over again is left out, also by
// the next keep.
func TestOutput(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	n.deployed("i", manifest(nil))
	c := n.connect(false)
	if a := next[tee.Assign](c, tee.KindAssign); a.Instance != "i" || a.Epoch != 1 || a.Line != 0 || a.Receive || len(a.Keys) != 1 || len(a.Inputs) != 1 || !a.Inputs[0].Local || len(a.Inputs[0].Head) != 32 {
		t.Errorf("%+v", a)
	}
	n.takeAll("i")
	sent := func(c *client, first uint64, count int, ack uint64) []tee.Chunk {
		t.Helper()
		if err := c.d.Send(tee.KindOutput, tee.Output{First: first, Readings: pack(count)}); err != nil {
			t.Fatal(err)
		}
		c.job(9, tee.JobKey, tee.WantKey{Gateway: gw, Stream: "a", Epoch: n.keep.st.Epoch[:]}) // answered after it was taken
		if d := <-c.in; d.Error != "" {
			t.Fatal(d.Error)
		}
		select {
		case m := <-c.msgs:
			if m.kind == tee.KindOutputAck && must(tee.Body[tee.OutputAck](m.body))(t).Line >= first+uint64(count)-1 && ack > 0 {
				t.Error("acknowledged before it is durable")
			}
		default:
		}
		chunks := n.takeAll("i")
		for ack > 0 && next[tee.OutputAck](c, tee.KindOutputAck).Line != ack {
		}
		return chunks
	}
	check := func(name string, chunks []tee.Chunk, session string, last uint64, count int) {
		t.Helper()
		if count == 0 {
			if len(chunks) != 0 {
				t.Errorf("%s: %d chunks", name, len(chunks))
			}
			return
		}
		if len(chunks) != 1 {
			t.Fatalf("%s: %d chunks", name, len(chunks))
		}
		cp := must(sealing.VerifyCheckpoint(&n.keep.epochKey.PublicKey, sealing.TypCheckpoint, chunks[0].Checkpoint))(t)
		key, _ := n.keep.sealer.streamKey("i", chunks[0].Epoch)
		chunk, _, err := sealing.ParseChunk(chunks[0].Data)
		if err != nil {
			t.Fatal(err)
		}
		_, readings, err := sealing.OpenRecord(must(sealing.NewAEAD(key))(t), chunk.Records[0])
		if err != nil || len(readings) != count || cp.Cursor == nil || cp.Cursor.Session != session || cp.Cursor.Line != last {
			t.Errorf("%s: %d readings, %+v, %v", name, len(readings), cp.Cursor, err)
		}
	}
	check("five", sent(c, 1, 5, 5), "i#1", 5, 5)
	check("three more, two of them again", sent(c, 4, 5, 8), "i#1", 8, 3)
	check("all of them again", sent(c, 1, 8, 0), "", 0, 0)
	check("after a gap", sent(c, 20, 2, 21), "i#1", 21, 2)
	c.d.Close()
	c.ended("closed")
	c = n.connect(false)
	select { // not at once
	case m := <-c.msgs:
		t.Errorf("a message of kind %d", m.kind)
	default:
	}
	n.again()
	if a := next[tee.Assign](c, tee.KindAssign); a.Line != 21 {
		t.Errorf("%+v", a)
	}
	check("handed over again", sent(c, 20, 3, 22), "i#1", 22, 1)
	n.restart(0)
	c = n.connect(false)
	next[tee.Assign](c, tee.KindAssign)
	n.takeAll("i")
	check("handed over again to the next keep", sent(c, 20, 4, 23), "i#1", 23, 1)

	n.takeAll("i-log")
	if err := c.d.Send(tee.KindLog, tee.Log{Lines: []string{"secret", strings.Repeat("y", 10_000)}}); err != nil {
		t.Fatal(err)
	}
	sent(c, 24, 1, 24)
	n.keep.sealer.mu.Lock()
	if st := n.keep.sealer.named("i-log").stats; st.Readings != 2 {
		t.Errorf("log: %+v", st)
	}
	n.keep.sealer.mu.Unlock()

	// An instance that is stopped ends there; the ledger hears the last line.
	if r := n.command(message.WorkloadStop, map[string]string{"instance": "i"}); !r.Done {
		t.Fatal(r.Reason)
	}
	c.ended("stopped")
	f.until("it is gone", func() bool { n.keep.mu.Lock(); defer n.keep.mu.Unlock(); return len(n.keep.st.Instances) == 0 })
	if e := f.ledger["i"]; e.Epoch != 2 || e.Holder != "" || e.Line != 24 {
		t.Errorf("%+v", e)
	}
	// Deployed again, it goes on counting there.
	n.deployed("i", manifest(nil))
	c = n.connect(false)
	if a := next[tee.Assign](c, tee.KindAssign); a.Epoch != 3 || a.Line != 24 || len(a.Newest) != 0 {
		t.Errorf("%+v", a)
	}
	// Stopped before it said anything, it has not gone back.
	if r := n.command(message.WorkloadStop, map[string]string{"instance": "i"}); !r.Done {
		t.Fatal(r.Reason)
	}
	n.restart(0)
	f.until("it is gone again", func() bool { n.keep.mu.Lock(); defer n.keep.mu.Unlock(); return len(n.keep.st.Instances) == 0 })
	if e := f.ledger["i"]; e.Epoch != 4 || e.Line != 24 {
		t.Errorf("%+v", e)
	}
}

// A runner is fed what is durable, in order; what finds no room is marked once there
// is some; and one that reads nothing delays nobody.
func TestFeed(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	n.deployed("i", manifest(nil))
	c := n.connect(false)
	next[tee.Assign](c, tee.KindAssign)
	w := n.keep.workloads
	first := n.read(1)
	select {
	case m := <-c.msgs:
		if m.kind == tee.KindFeed && bytes.Equal(must(tee.Body[tee.Feed](m.body))(t).Chunk, first.Data) {
			t.Error("fed before it is durable")
		}
	default:
	}
	n.read(2)
	third := n.read(1)
	n.takeAll("a")
	got := next[tee.Feed](c, tee.KindFeed)
	for !bytes.Equal(got.Chunk, first.Data) { // what was before it was taken
		got = next[tee.Feed](c, tee.KindFeed)
	}
	if got = next[tee.Feed](c, tee.KindFeed); got.Stream != "a" || !bytes.Equal(got.Chunk, third.Data) {
		t.Errorf("%s, %d bytes", got.Stream, len(got.Chunk))
	}
	c.d.Close()
	c.ended("closed")

	deaf := n.connect(true)
	defer deaf.d.Close()
	n.again()
	var r *runner
	f.until("it has the instance", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		r = w.run["i"].runner
		return r != nil
	})
	chunk := make([]byte, 100<<10)
	for range 10 * maxOut / len(chunk) {
		w.feed("a", chunk)
	}
	w.mu.Lock()
	if r.size > maxOut || !r.missed["a"] {
		t.Errorf("%d bytes wait; missed: %v", r.size, r.missed)
	}
	w.mu.Unlock()
	n.read(1) // goes on
	behind := 0
	for end := time.Now().Add(10 * time.Second); ; behind++ { // it begins to read
		if time.Now().After(end) {
			t.Fatal("no word of what it missed")
		}
		kind, body, err := deaf.d.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if kind == tee.KindFeed && len(must(tee.Body[tee.Feed](body))(t).Chunk) == 0 {
			break
		}
	}
	if behind < 100 {
		t.Errorf("the word came after %d chunks", behind)
	}
}

// The key of an older epoch, or of another gateway, comes from the key broker, if a
// verdict vouches for who signed.
func TestReleasedKeys(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	n.deployed("i", manifest(nil))
	c := n.connect(false)
	next[tee.Assign](c, tee.KindAssign)
	n.takeAll("a")
	_, _ = n.work(0)
	epoch, secret, signer := sealing.NewEpoch(1, [8]byte{9}), random(32), newKey(t)
	genuine := n.evidence()
	vouches := func(edit func(*attest.Verdict)) []byte {
		return f.cloud.verdict(genuine, n.subject(), func(v *attest.Verdict) {
			v.Prior = []attest.Key{cose.MarshalKey(&signer.PublicKey)}
			if edit != nil {
				edit(v)
			}
		})
	}
	release := func(edit func(*message.Release)) message.Release {
		r := message.Release{
			Message:  must(sealing.SealStreamKey(f.cloud.broker, sealing.TypRelease, n.subject(), "a", epoch, secret, n.receive()))(t),
			EpochKey: cose.MarshalKey(&signer.PublicKey), Verdict: vouches(nil),
		}
		if edit != nil {
			edit(&r)
		}
		return r
	}
	id := uint64(0)
	for name, x := range map[string]struct {
		edit func(*message.Release)
		want string
	}{
		"good": {nil, ""},
		"no broker": {func(r *message.Release) {
			r.Message = must(sealing.SealStreamKey(f.cloud.fleet, sealing.TypRelease, n.subject(), "a", epoch, secret, n.receive()))(t)
		}, "names key"},
		"not for us": {func(r *message.Release) {
			r.Message = must(sealing.SealStreamKey(f.cloud.broker, sealing.TypRelease, n.subject(), "a", epoch, secret, f.cloud.data.PublicKey()))(t)
		}, "recipient"},
		"another stream": {func(r *message.Release) {
			r.Message = must(sealing.SealStreamKey(f.cloud.broker, sealing.TypRelease, n.subject(), "b", epoch, secret, n.receive()))(t)
		}, "another stream"},
		"another epoch": {func(r *message.Release) {
			r.Message = must(sealing.SealStreamKey(f.cloud.broker, sealing.TypRelease, n.subject(), "a", sealing.NewEpoch(2, [8]byte{}), secret, n.receive()))(t)
		}, "another stream"},
		"another gateway": {func(r *message.Release) {
			r.Message = must(sealing.SealStreamKey(f.cloud.broker, sealing.TypRelease, "acme/gw2", "a", epoch, secret, n.receive()))(t)
		}, "another stream"},
		"another signer":       {func(r *message.Release) { r.EpochKey = cose.MarshalKey(&newKey(t).PublicKey) }, "does not vouch"},
		"a verdict on another": {func(r *message.Release) { r.Verdict = vouches(func(v *attest.Verdict) { v.Subject = "acme/gw2" }) }, "no affirming verdict"},
		"no verifier":          {func(r *message.Release) { r.Verdict = must(n.keep.verdict.Sign(f.cloud.fleet))(t) }, "verdict"},
		"a warning": {func(r *message.Release) {
			r.Verdict = vouches(func(v *attest.Verdict) {
				vector := attest.Vector{Configuration: 36}
				v.Submods = map[string]attest.Appraisal{attest.Submodule: {Status: vector.Status(), Vector: vector}}
			})
		}, "no affirming verdict"},
	} {
		id++
		f.release = func(message.AskedKey) message.Release { return release(x.edit) }
		c.job(id, tee.JobKey, tee.WantKey{Gateway: gw, Stream: "a", Epoch: epoch[:]})
		must(n.work(5000))(t)
		d := <-c.in
		if d.ID != id || x.want != "" && !strings.Contains(d.Error, x.want) {
			t.Errorf("%s: %+v", name, d)
		}
		if x.want == "" {
			if got := must(tee.Body[tee.GotKey](d.Body))(t); !bytes.Equal(got.Key, secret) || !bytes.Equal(got.EpochKey, cose.MarshalKey(&signer.PublicKey)) {
				t.Errorf("%+v", got)
			}
		}
	}
	// This epoch's is in memory.
	now := n.keep.st.Epoch
	c.job(99, tee.JobKey, tee.WantKey{Gateway: gw, Stream: "a", Epoch: now[:]})
	d := <-c.in
	key, _ := n.keep.sealer.streamKey("a", now[:])
	if got := must(tee.Body[tee.GotKey](d.Body))(t); !bytes.Equal(got.Key, key) || !bytes.Equal(got.EpochKey, cose.MarshalKey(&n.keep.epochKey.PublicKey)) {
		t.Errorf("%+v", got)
	}
	for i := range uint64(2 * maxKeys) { // nobody answers
		c.job(200+i, tee.JobKey, tee.WantKey{Gateway: gw, Stream: "a", Epoch: epoch[:]})
	}
	c.ended("too many keys")
}

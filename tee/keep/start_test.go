package keep

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/testbench/swtpm"
)

// From a TPM that has never seen a keep to an enrolled gateway.
func TestEnrol(t *testing.T) {
	g := newGateway(t)
	g.boot()
	if s := g.status(); s.Phase != tee.PhaseWaiting || !bytes.Equal(s.EKHash, g.keep.ekHash) {
		t.Errorf("before Start: %+v", s)
	}
	_, err := tee.Enrol{}.Do(g.ctx(), g)
	wantRefusal(t, "enrolling before Start", err, "needs Start first")
	_, err = g.deliver(message.Item{Nonce: random(32)})
	wantRefusal(t, "a delivery before Start", err, "needs Start first")

	out := must(g.start())(t)
	if len(out.Commit) == 0 || len(out.Publish) != 0 || out.Pull {
		t.Fatalf("the first Start: %+v", out)
	}
	g.state = out.Commit
	out = must(g.commit())(t)
	if len(out.Commit) == 0 || bytes.Equal(out.Commit, g.state) {
		t.Fatalf("after the first Commit: %+v", out)
	}
	out = must(g.settle(out, nil))(t)
	if s := g.status(); !out.Pull || s.Phase != tee.PhaseNew || s.Reason == "" || s.Epoch != "" || len(s.TLSKey) != 0 {
		t.Errorf("after the second Commit: %+v, %+v", out, s)
	}
	_, err = tee.Pull{}.Do(g.ctx(), g)
	wantRefusal(t, "pulling while new", err, "not enrolled")
	if g.keep.ReadyToSeal() == nil {
		t.Error("a new keep is ready to seal")
	}

	_, err = g.deliver(message.Item{Nonce: g.asks().Nonce, Reason: "wait\x1b[0m for approval"})
	wantRefusal(t, "pending", err, `the cloud says: wait\x1b[0m for approval`)

	genuine := g.enrol()
	c := genuine.Claims
	if !bytes.Equal(c.Roots, g.cloud.digest) || c.Software != "test 1" || !c.Hardening["dumps off"] || c.Command != 0 || len(c.Prior) != 0 ||
		len(c.Epoch) != 16 || !bytes.Equal(c.UEID[1:], g.keep.ekHash) || len(c.Sources) != 2 || c.Sources[0].Name != "a" {
		t.Errorf("evidence at enrolment: %+v", c)
	}
	s := g.status()
	if genuine.TLSKey == nil || genuine.Receive == nil || !bytes.Equal(s.TLSKey, cose.MarshalKey(genuine.TLSKey)) || s.Interval != defaultInterval {
		t.Errorf("%+v", s)
	}
	if err := g.keep.ReadyToSeal(); err != nil {
		t.Error(err)
	}
	again := g.attest()
	if !again.EpochKey.Equal(genuine.EpochKey) || !again.TLSKey.Equal(genuine.TLSKey) || sealing.Epoch(again.Claims.Epoch).String() != s.Epoch {
		t.Error("the evidence of an enrolled keep has other keys or another epoch")
	}
	_, err = g.settle(g.start())
	if err != nil {
		t.Errorf("the agent was restarted: %v", err)
	}
	_, err = tee.Start{State: []byte("other")}.Do(g.ctx(), g)
	wantRefusal(t, "an agent with another state", err, "not the one this keep runs with")
	if _, err := (transportKind{g, 11}).do(); err == nil || !strings.Contains(err.Error(), "unknown kind") {
		t.Errorf("an unknown kind: %v", err)
	}
}

// transportKind sends an empty request of any kind.
type transportKind struct {
	g    *gateway
	kind int
}

func (k transportKind) do() ([]byte, error) {
	m, err := tee.Pull{}.Do(k.g.ctx(), k)
	return m.Data, err
}

func (k transportKind) Call(ctx context.Context, _ []byte) ([]byte, error) {
	return k.g.Call(ctx, cose.MustMarshal([]any{k.kind, map[int]int{}}))
}

func TestRestart(t *testing.T) {
	g, first := enrolled(t)
	old := g.state
	g.up()
	second := g.attest()
	if second.EpochKey.Equal(first.EpochKey) || !second.TLSKey.Equal(first.TLSKey) ||
		!bytes.Equal(second.Receive.Bytes(), first.Receive.Bytes()) {
		t.Error("a restart must change the epoch key and no other")
	}
	before, after := sealing.Epoch(first.Claims.Epoch), sealing.Epoch(second.Claims.Epoch)
	if after.Counter() <= before.Counter() || bytes.Equal(before[8:], after[8:]) {
		t.Errorf("epoch %s after %s", after, before)
	}
	if len(second.Claims.Prior) != 0 {
		t.Error("the key of an epoch without data is listed")
	}

	// Data of the second epoch is under way when the third begins.
	last := g.read(1)
	g.up()
	third := g.attest()
	if prior := third.Claims.Prior; len(prior) != 1 || !bytes.Equal(prior[0], second.Claims.Cnf.Key) {
		t.Errorf("prior keys: %x", prior)
	}
	g.read(1)
	opening := g.opening(sealing.Epoch(third.Claims.Epoch), "a")
	want := sealing.Before{Epoch: after, Count: last.Seq + 1, Head: last.Head}
	if b := opening.First.Before; b == nil || b.Epoch != want.Epoch || b.Count != want.Count || !bytes.Equal(b.Head, want.Head) {
		t.Errorf("the epoch before: %+v, want %+v", b, want)
	}
	// Of stream b the agent showed no end.
	opening = g.opening(sealing.Epoch(third.Claims.Epoch), "b")
	if b := opening.First.Before; b == nil || b.Epoch != after || b.Known() || len(b.Head) != 0 {
		t.Errorf("the epoch before in b: %+v", b)
	}

	// An agent that shows an end of the epoch before last only.
	g.checkpoints = g.checkpoints[:1]
	g.up()
	g.read(1)
	opening = g.opening(sealing.Epoch(g.attest().Claims.Epoch), "a")
	if b := opening.First.Before; b == nil || b.Epoch != sealing.Epoch(third.Claims.Epoch) || b.Known() || !bytes.Equal(b.Head, after[:]) {
		t.Errorf("the end of an earlier epoch shown: %+v", b)
	}

	// Nobody gets back before an irreversible step.
	current := g.state
	for name, state := range map[string][]byte{
		"older": old, "cut": current[:len(current)-1], "other": append(slices.Clone(current[:len(current)-1]), current[len(current)-1]^1), "no CBOR": []byte("state"),
	} {
		g.state = state
		g.boot()
		_, err := g.start()
		if err == nil {
			t.Fatalf("%s: the state was taken", name)
		}
		if s := g.status(); s.Phase != tee.PhaseWaiting || s.Gateway != "" {
			t.Errorf("%s: %+v", name, s)
		}
		// The same keep, given the right one, starts.
		if g.state = current; name == "other" {
			must(g.settle(g.start()))(t)
			current = g.state
		}
	}
	g.state = nil
	g.boot()
	_, err := g.start()
	wantRefusal(t, "no state where there was one", err, "its state is missing: restore the agent's state file")
	g.state = current
	must(g.settle(g.start()))(t)
	g.attest()
}

func must2[A, B any](_ A, v B, err error) func(failer) B { return must(v, err) }

// A state of another box, or one whose clear parts were mixed with another's.
func TestForeignState(t *testing.T) {
	g, _ := enrolled(t)
	mine := must(parseEnvelope(g.state))(t)
	other, _ := enrolled(t) // wipes the TPM: another identity of the same TPM
	theirs := must(parseEnvelope(other.state))(t)
	for name, edit := range map[string]func(*envelope){
		"all of the other":     func(e *envelope) { *e = mine },
		"root of the other":    func(e *envelope) { e.Root = mine.Root },
		"AK of the other":      func(e *envelope) { e.AK = mine.AK },
		"AK auth of the other": func(e *envelope) { e.AKAuth = mine.AKAuth },
		"both AK parts":        func(e *envelope) { e.AK, e.AKAuth = mine.AK, mine.AKAuth },
		"other slot":           func(e *envelope) { e.Slot = 1 - e.Slot },
		"no slot":              func(e *envelope) { e.Slot = 2 },
		"other nonce":          func(e *envelope) { e.Nonce = mine.Nonce },
		"short nonce":          func(e *envelope) { e.Nonce = e.Nonce[:11] },
		"other box":            func(e *envelope) { e.Box = mine.Box },
		"another generation":   func(e *envelope) { e.Version = 2 },
	} {
		e := theirs
		edit(&e)
		other.boot()
		if _, err := (tee.Start{State: cose.MustMarshal(e)}).Do(other.ctx(), other); err == nil {
			t.Errorf("%s: taken", name)
		}
		if s := other.status(); s.Phase != tee.PhaseWaiting {
			t.Errorf("%s: %+v", name, s)
		}
	}
	other.up()
	other.attest()
}

func TestResetIdentity(t *testing.T) {
	g, first := enrolled(t)
	lost := g.state
	for name, state := range map[string][]byte{"state lost": nil, "state there": lost} {
		g.state, g.cfg.Reset = state, true
		g.up()
		g.cfg.Reset = false
		if s := g.status(); s.Phase != tee.PhaseNew || s.Gateway != "" {
			t.Fatalf("%s: %+v", name, s)
		}
		second := g.enrol()
		if second.TLSKey.Equal(first.TLSKey) || bytes.Equal(second.Receive.Bytes(), first.Receive.Bytes()) {
			t.Errorf("%s: keys of the old identity", name)
		}
		if c := sealing.Epoch(second.Claims.Epoch).Counter(); c <= sealing.Epoch(first.Claims.Epoch).Counter() {
			t.Errorf("%s: the epoch counter went back to %d", name, c)
		}
		g.up()
		g.attest()
		current := g.state
		g.state = lost
		g.boot()
		if _, err := g.start(); err == nil {
			t.Errorf("%s: the old identity is back", name)
		}
		g.state, lost, first = current, current, second
		g.up()
	}
}

// The configured roots decide: a keep of another cloud does not open here.
func TestOtherRootsDigest(t *testing.T) {
	g, _ := enrolled(t)
	g.cfg.RootsDigest = random(32)
	g.boot()
	_, err := g.start()
	wantRefusal(t, "another digest", err, "put the old digest back")
	g.cfg.RootsDigest = g.cloud.digest
	g.up()
	g.attest()
}

func TestLocked(t *testing.T) {
	needTPM(t)
	dir := must(os.MkdirTemp(base, "own"))(t)
	power := func() *swtpm.TPM {
		s := must(swtpm.Start(context.Background(), swtpm.Options{Dir: dir, CADir: filepath.Join(base, "maker")}))(t)
		t.Cleanup(func() { _ = s.Kill() })
		firmware(s)
		return s
	}
	s := power()
	g := newGateway(t)
	g.cfg.TPM = s.Socket()
	g.up()
	first := g.enrol()
	g.read(1)
	reboot := func(event string) {
		t.Helper()
		g.kill()
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
		s = power()
		if event != "" {
			if err := s.Extend(4, sha256.Sum256([]byte(event))); err != nil {
				t.Fatal(err)
			}
		}
		g.boot()
	}
	reboot("something else")
	state := g.state
	out := must(g.start())(t)
	if st := g.status(); len(out.Commit) != 0 || st.Phase != tee.PhaseLocked || !strings.Contains(st.Reason, "something else was booted") {
		t.Fatalf("%+v, %+v", out, st)
	}
	a, genuine := g.activates() // it attests
	if len(genuine.Claims.Keys) != 0 || genuine.Claims.Epoch != nil || genuine.TLSKey != nil || genuine.Claims.Submods.TPM.Certified != nil {
		t.Error("a locked keep claims keys")
	}
	// Whatever the cloud answers, it gets no further.
	item := g.admission(a, first)
	item.Verdict = g.cloud.verdict(genuine, subject, nil)
	out = must(g.deliver(item))(t)
	if len(out.Commit) != 0 || g.status().Phase != tee.PhaseLocked {
		t.Errorf("a verdict for a locked keep: %+v", out)
	}
	_, err := tee.Pull{}.Do(g.ctx(), g)
	wantRefusal(t, "pull", err, "locked")
	_, err = tee.SignTLS{Text: clientText(32)}.Do(g.ctx(), g)
	wantRefusal(t, "sign", err, "locked")
	_, err = tee.Oldest{Stream: "a", Epoch: make([]byte, 16), Head: make([]byte, 32)}.Do(g.ctx(), g)
	wantRefusal(t, "oldest", err, "locked")
	r := must(tee.Take{}.Do(g.ctx(), g))(t)
	if g.keep.ReadyToSeal() == nil || len(r.Chunks) != 0 || g.keep.sealer.subject != "" {
		t.Error("a locked keep seals")
	}
	if out := must(g.start())(t); !out.Pull || g.status().Phase != tee.PhaseLocked {
		t.Error("an agent's restart changes something")
	}
	if !bytes.Equal(g.state, state) {
		t.Error("the state changed")
	}

	reboot("") // as it was
	must(g.settle(g.start()))(t)
	if again := g.attest(); !again.TLSKey.Equal(first.TLSKey) || len(again.Claims.Prior) != 1 {
		t.Error("back as it was, the keep has lost something")
	}

	// Each of the PCRs counts.
	g.kill()
	if err := s.Extend(7, sha256.Sum256([]byte("live"))); err != nil {
		t.Fatal(err)
	}
	g.boot()
	must(g.start())(t)
	if g.status().Phase != tee.PhaseLocked {
		t.Error("PCR 7 does not count")
	}
}

// A TPM in which nothing was measured protects nothing.
func TestUnmeasured(t *testing.T) {
	g := newGateway(t)
	g.cfg.PCRs = []int{14}
	if _, err := New(g.cfg, discard); err == nil || !strings.Contains(err.Error(), "nothing was measured") {
		t.Errorf("%v", err)
	}
	g.cfg.PCRs = measured
	g.up() // the connection was given back
	g.cfg.TPM = filepath.Join(base, "none")
	g.kill()
	if _, err := New(g.cfg, discard); err == nil || !strings.Contains(err.Error(), "no TPM") {
		t.Errorf("%v", err)
	}
}

func TestValidate(t *testing.T) {
	good := Config{
		TPM: "t", PCRs: []int{0}, RootsDigest: make([]byte, 32), Flush: time.Second,
		Sources: []SourceConfig{{Name: "a", UID: 1, Freshness: 1, Rate: 1}, {Name: "b", UID: 2, Freshness: 1, Rate: 1}},
	}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, edit := range map[string]func(*Config){
		"tpm is missing":                 func(c *Config) { c.TPM = "" },
		"pcrs is missing":                func(c *Config) { c.PCRs = nil },
		"roots is missing":               func(c *Config) { c.RootsDigest = make([]byte, 31) },
		"between 1 and 64":               func(c *Config) { c.Sources = nil },
		"sources: between 1":             func(c *Config) { c.Sources = make([]SourceConfig, 65) },
		"flush must be":                  func(c *Config) { c.Flush = time.Millisecond - 1 },
		"between 1ms and 1s":             func(c *Config) { c.Flush = time.Second + 1 },
		"a name is 1 to 31":              func(c *Config) { c.Sources[0].Name = "a/b" },
		"its name or user 2":             func(c *Config) { c.Sources[1].Name = "a" },
		"its name or user 1":             func(c *Config) { c.Sources[1].UID = 1 },
		"freshness and rate":             func(c *Config) { c.Sources[1].Rate = 0 },
		"freshness and rate must be pos": func(c *Config) { c.Sources[1].Freshness = 0 },
	} {
		c := good
		c.Sources = slices.Clone(good.Sources)
		edit(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

// What the evidence says is received only by this keep, with both halves of the
// key: in the TPM and in its sealed state.
func TestReceive(t *testing.T) {
	g, genuine := enrolled(t)
	g.up() // from the state
	msg := must(cose.SealEncrypt(map[int]int{1: 3}, []byte("bundle"), []byte("aad"), genuine.Receive))(t)
	epoch, key := sealing.NewEpoch(1, [8]byte{1}), random(32)
	release := must(sealing.SealStreamKey(g.cloud.broker, sealing.TypRelease, subject, "a", epoch, key, genuine.Receive))(t)
	own := must(g.keep.receiveKey(g.keep.st))(t)
	if plain, err := must(cose.ParseEncrypt(msg))(t).Open(own, []byte("aad")); err != nil || string(plain) != "bundle" {
		t.Errorf("%q, %v", plain, err)
	}
	h, got, err := sealing.OpenStreamKey(&g.cloud.broker.PublicKey, sealing.TypRelease, release, own)
	if err != nil || !bytes.Equal(got, key) || h.Epoch != epoch || h.Subject != subject {
		t.Errorf("%+v, %v", h, err)
	}
	// The other half alone opens nothing.
	st := g.keep.st
	st.Seed = random(64)
	halved := must(g.keep.receiveKey(st))(t)
	if _, _, err := sealing.OpenStreamKey(&g.cloud.broker.PublicKey, sealing.TypRelease, release, halved); err == nil {
		t.Error("opened with another ML-KEM seed")
	}
	made := must(g.keep.newState())(t)
	made.Seed = g.keep.st.Seed
	halved = must(g.keep.receiveKey(made))(t)
	if _, _, err := sealing.OpenStreamKey(&g.cloud.broker.PublicKey, sealing.TypRelease, release, halved); err == nil {
		t.Error("opened with another key in the TPM")
	}
}

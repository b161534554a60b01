package rig

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"os"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

// command sends a command and wants it done.
func (b *bench) command(g *Gateway, name string, args map[string]string) message.Result {
	b.t.Helper()
	res, err := b.op.Command(b.ctx, g.Name, name, args, time.Now().Add(time.Minute))
	b.must(err)
	if !res.Done || res.Subject != Tenant+"/"+g.Name {
		b.t.Errorf("%s: %+v", name, res)
	}
	return res
}

// TestCommands gives a gateway orders while it works.
func TestCommands(t *testing.T) {
	file := machine(t)
	b, g := up(t, time.Minute, Options{}, "machine")
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", file.speed(8*time.Second)))
	r := b.read(g, "machine")
	r.upTo(1000)

	_, before, err := b.op.Saved(b.ctx, "gw1")
	b.must(err)
	b.command(g, message.AttestNow, nil)
	b.until("a newer verdict", func() error {
		_, v, err := b.op.Saved(b.ctx, "gw1")
		if err == nil && bytes.Equal(v.ChallengeHash, before.ChallengeHash) {
			err = context.DeadlineExceeded
		}
		return err
	})
	if res := b.command(g, message.SetInterval, map[string]string{"seconds": "5"}); res.Output["seconds"] != "5" {
		t.Errorf("set-interval: %v", res.Output)
	}
	res := b.command(g, message.StatusCommand, nil)
	if res.Output["interval"] != "5" || res.Output["epoch"] != r.epochs[0].String() || !strings.HasPrefix(res.Output["source.machine"], "fresh, ") {
		t.Errorf("status: %v", res.Output)
	}
	for range 3 {
		res := b.command(g, message.RotateStreamKeys, nil)
		for r.last.Epoch.String() != res.Output["epoch"] { // what was sealed before comes first
			r.upTo(len(r.got) + 1)
		}
	}
	for name, args := range map[string]map[string]string{
		"format-disk": nil, message.SetInterval: {"seconds": "0"}, message.StatusCommand: {"verbose": "yes"},
	} {
		if res, err := b.op.Command(b.ctx, "gw1", name, args, time.Time{}); err == nil {
			t.Errorf("%s %v: %+v", name, args, res)
		}
	}
	if res, err := b.op.Command(b.ctx, "gw1", message.StatusCommand, nil, time.Now().Add(-time.Second)); err == nil {
		t.Errorf("an expired command: %+v", res)
	}
	b.finish(g, "machine")
	r.upTo(len(file.want))
	r.all(g)
	r.equal(file.want)
	if len(r.epochs) != 4 {
		t.Errorf("three rotations make %d epochs, want 4", len(r.epochs))
	}
	b.findings(g, nil)
}

// agentless stands in for the agent: it gives the keep deliveries.
type agentless struct {
	b      *bench
	g      *Gateway
	socket *tee.Socket
	key    *ecdsa.PublicKey // the epoch key
}

// nonce is one that the keep asks with.
func (a *agentless) nonce() []byte {
	a.b.t.Helper()
	m, err := tee.Pull{}.Do(a.b.ctx, a.socket)
	a.b.must(err)
	p, err := message.Decode[message.Pull](m.Data)
	a.b.must(err)
	return p.Nonce
}

func (a *agentless) deliver(signer crypto.Signer, item message.Item) (tee.Outcome, error) {
	a.b.t.Helper()
	msg, err := item.Sign(signer)
	a.b.must(err)
	return tee.Deliver{Item: msg}.Do(a.b.ctx, a.socket)
}

// command delivers a command as the fleet would, and returns the signed result.
func (a *agentless) command(cmd []byte) message.Result {
	a.b.t.Helper()
	out, err := a.deliver(a.b.key("keys/fleet.key"), message.Item{
		Nonce: a.nonce(), Time: time.Now().Unix(), Subject: Tenant + "/gw1", Command: cmd,
	})
	a.b.must(err)
	if len(out.Commit) > 0 {
		a.b.must(os.WriteFile(a.g.Path("agent/state.cbor"), out.Commit, 0o600))
		sum := sha256.Sum256(out.Commit)
		out, err = tee.Commit{State: sum[:]}.Do(a.b.ctx, a.socket)
		a.b.must(err)
	}
	if len(out.Publish) != 1 || out.Publish[0].Kind != "result" {
		a.b.t.Fatalf("the keep answers a command with %+v", out)
	}
	res, err := message.VerifyResult(a.key, out.Publish[0].Data)
	a.b.must(err)
	sum := sha256.Sum256(cmd)
	if !bytes.Equal(res.Command, sum[:]) || res.Subject != Tenant+"/gw1" || res.Done != (res.Reason == "") {
		a.b.t.Errorf("the result is %+v", res)
	}
	return res
}

// TestForgedCommands gives the keep itself what no honest cloud would.
func TestForgedCommands(t *testing.T) {
	b, g := up(t, time.Minute, Options{}, "machine")
	b.command(g, message.SetInterval, map[string]string{"seconds": "600"}) // sequence 1
	_, v, err := b.op.Saved(b.ctx, "gw1")
	b.must(err)
	b.must(g.KillAgent())
	a := &agentless{b: b, g: g, socket: b.socket(g)}
	a.key, err = cose.UnmarshalKey(v.Cnf.Key)
	b.must(err)
	operator := b.key("operator/operator.key")
	sign := func(key crypto.Signer, c message.Command) []byte {
		t.Helper()
		msg, err := c.Sign(key)
		b.must(err)
		return msg
	}
	us := Tenant + "/gw1"
	accepted := sign(operator, message.Command{Audience: us, Sequence: 5, Name: message.SetInterval, Args: map[string]string{"seconds": "60"}})
	if res := a.command(accepted); !res.Done || res.Sequence != 5 {
		t.Fatalf("a good command: %+v", res)
	}
	if res := a.command(accepted); !res.Done || res.Output["seconds"] != "60" {
		t.Errorf("the same command delivered again: %+v", res)
	}
	epoch := b.keep(g).Epoch
	now := time.Now().Unix()
	flipped := bytes.Clone(accepted)
	flipped[len(flipped)-1] ^= 1
	for _, bad := range []struct {
		what, why string
		command   []byte
	}{
		{"of a sequence that was used", "sequence 5 was used", sign(operator, message.Command{Audience: us, Sequence: 5, Name: message.StatusCommand})},
		{"of an older sequence", "sequence 1 was used", sign(operator, message.Command{Audience: us, Sequence: 1, Name: message.RotateStreamKeys})},
		{"that expired", "expired", sign(operator, message.Command{Audience: us, Sequence: 9, Name: message.RotateStreamKeys, Expires: now - 1})},
		{"for another gateway", `for "acme/gw2"`, sign(operator, message.Command{Audience: "acme/gw2", Sequence: 9, Name: message.RotateStreamKeys})},
		{"for another tenant", `for "initech/gw1"`, sign(operator, message.Command{Audience: "initech/gw1", Sequence: 9, Name: message.RotateStreamKeys})},
		{"signed by the fleet", "key", sign(b.key("keys/fleet.key"), message.Command{Audience: us, Sequence: 9, Name: message.RotateStreamKeys})},
		{"signed by the data owner", "key", sign(b.key("owner/owner.key"), message.Command{Audience: us, Sequence: 9, Name: message.RotateStreamKeys})},
		{"with a flipped bit", "signature", flipped},
		{"that is unknown", "unknown command", sign(operator, message.Command{Audience: us, Sequence: 9, Name: "format-disk"})},
		{"that is garbage", "", []byte("garbage")},
	} {
		res := a.command(bad.command)
		if res.Done || res.Reason == "" || !strings.Contains(res.Reason, bad.why) {
			t.Errorf("a command %s: %+v, want a refusal with %q", bad.what, res, bad.why)
		}
	}
	if st := b.keep(g); st.Command != 5 || st.Epoch != epoch || st.Interval != 60 {
		t.Errorf("after refused commands the keep says %+v", st)
	}
	a.forgedDeliveries(accepted)

	// What an agent finds then is in order.
	b.must(g.StartAgent(b.ctx))
	b.send(g, 1, 10)
	r := b.read(g, "machine")
	r.upTo(10)
	r.equal(counted(1, 10))
	_, v, err = b.op.Attest(b.ctx, "gw1") // which tells the cloud of sequence 5
	if b.must(err); v.Command != 5 {
		t.Errorf("the verdict names command %d as the newest accepted", v.Command)
	}
	if res := b.command(g, message.StatusCommand, nil); res.Sequence != 6 || res.Output["interval"] != "60" {
		t.Errorf("status: %v", res.Output)
	}
}

// forgedDeliveries are refused whatever is in them.
func (a *agentless) forgedDeliveries(cmd []byte) {
	b, fleet := a.b, a.b.key("keys/fleet.key")
	good := func(nonce []byte) message.Item {
		return message.Item{Nonce: nonce, Time: time.Now().Unix(), Subject: Tenant + "/gw1", Command: cmd}
	}
	used := a.nonce()
	_, err := a.deliver(fleet, good(used))
	b.must(err)
	_, err = a.deliver(fleet, good(used))
	b.refused(err, "answers no question of this keep, or one that it answered before")
	_, err = a.deliver(fleet, good(make([]byte, message.NonceSize)))
	b.refused(err, "answers no question of this keep")
	_, err = a.deliver(fleet, good(nil))
	b.refused(err, "answers no question of this keep")
	_, err = a.deliver(b.key("operator/operator.key"), good(a.nonce()))
	b.refused(err, "key")
	item := good(a.nonce())
	item.Subject = Tenant + "/gw2"
	_, err = a.deliver(fleet, item)
	b.refused(err, "this is acme/gw1")
	_, err = tee.Deliver{Item: []byte("garbage")}.Do(b.ctx, a.socket)
	b.refused(err, "")
	_, err = tee.Commit{State: make([]byte, 32)}.Do(b.ctx, a.socket)
	b.refused(err, "no step waits")
}

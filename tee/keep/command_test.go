package keep

import (
	"bytes"
	"crypto/sha256"
	"maps"
	"strings"
	"testing"

	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

func (c *cloud) command(cmd message.Command) []byte {
	c.t.Helper()
	if cmd.Audience == "" {
		cmd.Audience = subject
	}
	return must(cmd.Sign(c.operator))(c.t)
}

// result reads the one result in an outcome.
func (g *gateway) result(out tee.Outcome, command []byte) message.Result {
	g.t.Helper()
	if len(out.Publish) == 0 || out.Publish[0].Kind != "result" {
		g.t.Fatalf("%+v", out)
	}
	r := must(message.VerifyResult(&g.keep.epochKey.PublicKey, out.Publish[0].Data))(g.t)
	if sum := sha256.Sum256(command); r.Subject != subject || !bytes.Equal(r.Command, sum[:]) {
		g.t.Errorf("%+v", r)
	}
	return r
}

func TestCommands(t *testing.T) {
	g, _ := enrolled(t)
	do := func(cmd message.Command) message.Result {
		t.Helper()
		msg := g.cloud.command(cmd)
		return g.result(must(g.send(msg))(t), msg)
	}
	interval := g.cloud.command(message.Command{Sequence: 5, Name: message.SetInterval, Args: map[string]string{"seconds": "7"}, Expires: g.cloud.now + 1})
	r := g.result(must(g.send(interval))(t), interval)
	if !r.Done || r.Sequence != 5 || r.Output["seconds"] != "7" {
		t.Errorf("%+v", r)
	}
	if s := g.status(); s.Interval != 7 || s.Command != 5 {
		t.Errorf("%+v", s)
	}
	g.unchanged("the same command again", func() {
		for range 2 {
			again := g.result(must(g.send(interval))(t), interval)
			if !again.Done || !maps.Equal(again.Output, r.Output) || again.Sequence != r.Sequence {
				t.Errorf("%+v, was %+v", again, r)
			}
		}
	})
	g.up() // also by the next keep, with its own key
	if again := g.result(must(g.send(interval))(t), interval); !again.Done || again.Output["seconds"] != "7" || g.status().Interval != 7 {
		t.Errorf("%+v", again)
	}
	if g.attest().Claims.Command != 5 {
		t.Error("the evidence does not show the command")
	}

	other := newKey(t)
	cmd := func(edit func(*message.Command)) []byte {
		c := message.Command{Sequence: 6, Name: message.SetInterval, Args: map[string]string{"seconds": "9"}}
		edit(&c)
		return g.cloud.command(c)
	}
	for name, c := range map[string]struct {
		msg  []byte
		seq  uint64
		want string
	}{
		"older":            {cmd(func(c *message.Command) { c.Sequence = 4 }), 4, "sequence 4 was used"},
		"same sequence":    {cmd(func(c *message.Command) { c.Sequence = 5 }), 5, "sequence 5 was used"},
		"sequence 0":       {cmd(func(c *message.Command) { c.Sequence = 0 }), 0, "was used"},
		"expired":          {cmd(func(c *message.Command) { c.Expires = g.cloud.now }), 6, "expired"},
		"another audience": {cmd(func(c *message.Command) { c.Audience = "acme/gw2" }), 6, "acme/gw2"},
		"unknown":          {cmd(func(c *message.Command) { c.Name, c.Args = "reboot", nil }), 6, "unknown command"},
		"no argument":      {cmd(func(c *message.Command) { c.Args = nil }), 6, "needs one argument"},
		"argument of 0":    {cmd(func(c *message.Command) { c.Args["seconds"] = "0" }), 6, "needs one argument"},
		"two arguments":    {cmd(func(c *message.Command) { c.Args["x"] = "1" }), 6, "needs one argument"},
		"needless":         {cmd(func(c *message.Command) { c.Name = message.AttestNow }), 6, "takes no arguments"},
		"signed by fleet":  {must(message.Command{Audience: subject, Sequence: 6, Name: message.AttestNow}.Sign(g.cloud.fleet))(t), 0, "Command"},
		"signed by nobody": {must(message.Command{Audience: subject, Sequence: 6, Name: message.AttestNow}.Sign(other))(t), 0, "Command"},
		"an item":          {g.cloud.sign(message.Item{}), 0, "Command"},
		"no CBOR":          {[]byte("attest-now"), 0, "Command"},
	} {
		g.unchanged(name, func() {
			r := g.result(must(g.send(c.msg))(t), c.msg)
			if r.Done || r.Sequence != c.seq || !strings.Contains(r.Reason, c.want) || r.Output != nil {
				t.Errorf("%s: %+v", name, r)
			}
		})
	}
	// None of that has used the sequence.
	if r := do(message.Command{Sequence: 6, Name: message.StatusCommand}); !r.Done || r.Output["interval"] != "7" || r.Output["source.a"] != "fresh, 0 readings, 0 rejected" {
		t.Errorf("%+v", r)
	}
	attestNow := g.cloud.command(message.Command{Sequence: 7, Name: message.AttestNow})
	out := must(g.settle(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Command: attestNow, Challenge: g.cloud.challenge(gw)})))(t)
	if g.result(out, attestNow); len(out.Publish) != 2 || g.cloud.verify(out.Publish[1].Data).Claims.Command != 7 {
		t.Errorf("attest-now: %+v", out)
	}

	// While a step waits for its Commit there is no other.
	first := g.cloud.command(message.Command{Sequence: 8, Name: message.SetInterval, Args: map[string]string{"seconds": "8"}})
	waits := must(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Command: first}))(t)
	_, err := g.send(g.cloud.command(message.Command{Sequence: 9, Name: message.StatusCommand}))
	wantRefusal(t, "a second step", err, "waits for its Commit")
	_, err = tee.Commit{State: random(32)}.Do(g.ctx(), g)
	wantRefusal(t, "a Commit of something else", err, "no step waits for this state")
	if g.status().Interval != 7 {
		t.Error("it acted before its Commit")
	}
	if r := g.result(must(g.settle(waits, nil))(t), first); !r.Done || g.status().Interval != 8 {
		t.Errorf("%+v", r)
	}
	_, err = g.commit()
	wantRefusal(t, "the Commit again", err, "no step waits for this state")
}

func TestRotateStreamKeys(t *testing.T) {
	g, genuine := enrolled(t)
	g.read(1)
	last := g.read(1)
	s := g.keep.sealer
	line(t, &ingestConn{s: s, src: s.sources[1]}, 0, "m v=2i 2") // waits to be sealed
	msg := g.cloud.command(message.Command{Sequence: 1, Name: message.RotateStreamKeys})
	old := sealing.Epoch(genuine.Claims.Epoch)
	r := g.result(must(g.send(msg))(t), msg)
	now := g.status().Epoch
	if !r.Done || r.Output["epoch"] != now || now == old.String() {
		t.Errorf("%+v, epoch %s", r, now)
	}
	g.read(1)
	var a tee.Chunk // the newest of the old epoch
	for _, c := range g.chunks {
		if c.Stream == "a" && sealing.Epoch(c.Epoch) == old {
			a = c
		}
	}
	epoch := sealing.Epoch(g.attest().Claims.Epoch)
	if a.Seq != last.Seq+1 || epoch.String() != now {
		t.Errorf("the old epoch ends with %d, %d was taken before; epoch %s", a.Seq, last.Seq, epoch)
	}
	pos := g.opening(epoch, "a")
	if b := pos.First.Before; b == nil || b.Epoch != old || b.Count != a.Seq+1 || !bytes.Equal(b.Head, a.Head) {
		t.Errorf("%+v", b)
	}
	var keys [][]byte
	for _, c := range g.chunks {
		chunk, _, err := sealing.ParseChunk(c.Data)
		if err != nil {
			t.Fatal(err)
		}
		if c.Stream != "a" || c.Seq > 0 {
			continue
		}
		_, key, err := sealing.OpenStreamKey(genuine.EpochKey, sealing.TypStreamKey, chunk.StreamKey, g.cloud.data)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	if len(keys) != 2 || bytes.Equal(keys[0], keys[1]) {
		t.Error("the stream key is the old one")
	}
	if again := g.attest(); !again.EpochKey.Equal(genuine.EpochKey) || len(again.Claims.Prior) != 0 {
		t.Error("rotation changes stream keys, not the epoch key")
	}
}

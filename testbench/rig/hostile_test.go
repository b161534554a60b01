package rig

import (
	"crypto/tls"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"edgekeep/agent"
	"edgekeep/sealing"
	"edgekeep/tee/message"
	"edgekeep/testbench/hostile"
)

// TestHostileBroker has the broker drop, repeat, reorder, alter and replay
// messages in both directions, and invent watermarks and deliveries of its own.
func TestHostileBroker(t *testing.T) {
	file := machine(t)
	b := newBench(t, 100*time.Second, Options{})
	g := b.gateway("gw1", "machine")
	cert, err := tls.LoadX509KeyPair(b.path("cloud/keys/server.pem"), b.path("cloud/keys/server.key"))
	b.must(err)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var on atomic.Bool
	faults := hostile.Faults(seed, hostile.Rates{Drop: 0.03, Flip: 0.03, Duplicate: 0.1, Reorder: 0.03, Replay: 0.1})
	liar, err := hostile.Listen(&tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}, func(m hostile.Message) []hostile.Message {
		if !on.Load() {
			return []hostile.Message{m}
		}
		return faults(m)
	})
	b.must(err)
	t.Cleanup(func() {
		if err := liar.Close(); err != nil {
			t.Error(err)
		}
	})
	b.Broker = "tls://" + liar.Addr()
	b.startCloud()
	b.enrol(g)

	// First nothing but lies arrives: what is in the spool stays there.
	before := b.status(g, "a connection, and the stream opened", func(s agent.Status) bool {
		return s.Connected && s.SpoolChunks == 0 && len(s.Watermarks) == 1
	})
	b.must(b.KillCloud())
	b.send(g, 1, 100)
	lies := b.lies(g)
	for _, m := range lies {
		liar.Inject(m)
	}
	s := b.status(g, "refused lies", func(s agent.Status) bool { return s.RefusedWatermarks > 0 })
	if s.SpoolChunks == 0 || !maps.Equal(s.Watermarks, before.Watermarks) {
		t.Errorf("an invented watermark was believed: %+v", s)
	}
	b.must(b.StartCloud(b.ctx))
	r := b.read(g, "machine")
	r.upTo(100)

	on.Store(true)
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", file.speed(5*time.Second)))
	want := append(counted(1, 100), file.want...)
	b.until("the whole replay", func() error {
		for _, m := range lies {
			liar.Inject(m)
		}
		if _, err := r.next(200 * time.Millisecond); err != nil {
			return err
		}
		if len(r.got) < len(want) {
			return fmt.Errorf("%d readings of %d", len(r.got), len(want))
		}
		return nil
	})
	b.finish(g, "machine")
	r.all(g)
	r.equal(want)
	b.findings(g, nil)
	s = b.status(g, "the count of refusals", func(agent.Status) bool { return true })
	if s.RefusedWatermarks == 0 || s.RefusedItems == 0 {
		t.Errorf("lies were not noticed: %+v", s)
	}
	t.Logf("refused: %d watermarks, %d items; sent again %d times", s.RefusedWatermarks, s.RefusedItems, s.Resends)
}

// lies are messages that only a liar sends: about all there is, by keys that do
// not count, or by the right key about somebody else.
func (b *bench) lies(g *Gateway) (out []hostile.Message) {
	b.t.Helper()
	down := "ek1/" + Tenant + "/" + g.Name + "/down/"
	epoch := sealing.NewEpoch(1<<40, [8]byte{})
	mark := sealing.Checkpoint{Subject: Tenant + "/" + g.Name, Stream: "machine", Epoch: epoch, Seq: 1 << 40, Head: make([]byte, 32)}
	other := mark
	other.Subject = Tenant + "/gw2"
	sign := func(c sealing.Checkpoint, key, typ string) []byte {
		b.t.Helper()
		msg, err := c.Sign(b.key(key), typ)
		b.must(err)
		return msg
	}
	for _, payload := range [][]byte{
		nil, []byte("garbage"),
		sign(mark, "operator/operator.key", sealing.TypWatermark),
		sign(mark, "keys/verifier.key", sealing.TypWatermark),
		sign(mark, "keys/fleet.key", sealing.TypOldest), // the right key for another thing
		sign(other, "keys/fleet.key", sealing.TypWatermark),
	} {
		out = append(out, hostile.Message{Topic: down + "ack", Payload: payload})
	}
	item, err := message.Item{Nonce: make([]byte, 32), Time: time.Now().Unix(), Subject: mark.Subject, Reason: "sleep"}.Sign(b.key("keys/fleet.key"))
	b.must(err)
	forged, err := message.Item{Nonce: make([]byte, 32), Time: time.Now().Unix(), Subject: mark.Subject}.Sign(b.key("operator/operator.key"))
	b.must(err)
	for _, payload := range [][]byte{nil, []byte("garbage"), item, forged} {
		out = append(out, hostile.Message{Topic: down + "item", Payload: payload})
	}
	return append(out, hostile.Message{Topic: down + "notify"}, hostile.Message{Topic: down + "unknown", Payload: []byte("x")},
		hostile.Message{Topic: "ek1/" + Tenant + "/" + g.Name + "/up/sealed", Payload: []byte("garbage")})
}

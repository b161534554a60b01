package fleet_test

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/tee/message"
)

func (g *gateway) sendPeer(to string, data []byte) {
	g.t.Helper()
	g.publish("peer", message.Encode(message.Routed{Peer: to, Data: data}))
}

func (g *gateway) peers() *nats.Subscription {
	g.t.Helper()
	sub := must(bus.NC.SubscribeSync("ek1." + g.tenant + "." + g.name + ".down.peer"))
	g.t.Cleanup(func() { _ = sub.Unsubscribe() })
	if err := bus.NC.Flush(); err != nil {
		g.t.Fatal(err)
	}
	return sub
}

func TestPeers(t *testing.T) {
	f, _ := startFleet(t)
	a, b := enrolled(t, "acme", "peera"), enrolled(t, "acme", "peerb")
	revoked := enrolled(t, "acme", "peerrev")
	revoked.change(func(g *cloud.Gateway) { g.Revoked = true })
	foreign := enrolled(t, "globex", "peerb")
	toB, toForeign, toRevoked := b.peers(), foreign.peers(), revoked.peers()
	const n = 200 // fewer than are dropped
	for i := range uint64(n) {
		a.sendPeer("peerb", binary.BigEndian.AppendUint64(bytes.Repeat([]byte{1}, 10<<10), i))
	}
	for i := range uint64(n) {
		m, err := toB.NextMsgWithContext(deadline(t))
		if err != nil {
			t.Fatal(err)
		}
		r := must(message.Decode[message.Routed](m.Data))
		if r.Peer != "peera" || binary.BigEndian.Uint64(r.Data[10<<10:]) != i {
			t.Fatalf("message %d is from %q", i, r.Peer)
		}
	}
	for i, send := range []func(){
		func() { a.sendPeer("peera", []byte("itself")) },
		func() { a.sendPeer("", []byte("the cloud")) },
		func() { a.sendPeer("*", []byte("all")) },
		func() { a.sendPeer("peerb.down", []byte("a subject")) },
		func() { a.sendPeer("nobody", []byte("nobody")) },
		func() { a.sendPeer("peerrev", []byte("a revoked one")) },
		func() { revoked.sendPeer("peerb", []byte("from a revoked one")) },
		func() { (&gateway{t: t, tenant: "acme", name: "ghost"}).sendPeer("peerb", []byte("from nobody")) },
		func() { a.sendPeer("peerb", make([]byte, 120<<10+1)) },
		func() { a.publish("peer", []byte("garbage")) },
	} {
		send()
		eventually(t, "it is refused", func() bool { return refusals(f, "") == uint64(i+1) })
	}
	a.sendPeer("peerb", make([]byte, 120<<10)) // the largest
	m, err := toB.NextMsgWithContext(deadline(t))
	if err != nil || len(m.Data) < 120<<10 {
		t.Fatalf("%v: one that was refused came", err)
	}
	for _, sub := range []*nats.Subscription{toB, toForeign, toRevoked} {
		if m, err := sub.NextMsg(5 * time.Millisecond); err == nil {
			t.Errorf("%d bytes came on %s", len(m.Data), m.Subject)
		}
	}
}

// A gateway that was revoked is cut off when what is remembered of it is old.
func TestPeersForgetWhoWasEnrolled(t *testing.T) {
	f, _ := startFleet(t)
	a, b := enrolled(t, "acme", "peerc"), enrolled(t, "acme", "peerd")
	sub := b.peers()
	a.sendPeer("peerd", []byte("x"))
	if _, err := sub.NextMsgWithContext(deadline(t)); err != nil {
		t.Fatal(err)
	}
	a.change(func(g *cloud.Gateway) { g.Revoked = true })
	eventually(t, "it is refused", func() bool {
		a.sendPeer("peerd", []byte("x"))
		return refusals(f, "is revoked") > 0
	})
}

// BenchmarkPeers passes messages of 100 KiB on, with a window as two keeps have
// it. One sender may send 256 MiB a second: there are several.
func BenchmarkPeers(b *testing.B) {
	startFleet(b)
	to := enrolled(b, "acme", "benchto")
	var from []*gateway
	for i := range 8 {
		from = append(from, enrolled(b, "acme", name("bench", i)))
	}
	sub := to.peers()
	msg := message.Encode(message.Routed{Peer: "benchto", Data: make([]byte, 100<<10)})
	b.SetBytes(int64(len(msg)))
	const window = 32
	b.ResetTimer()
	for i := range b.N {
		from[i%8].publish("peer", msg)
		if i >= window {
			if _, err := sub.NextMsgWithContext(deadline(b)); err != nil {
				b.Fatal(err)
			}
		}
	}
}

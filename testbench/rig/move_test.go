package rig

import (
	"fmt"
	"os"
	"testing"
	"time"

	"edgekeep/tee/message"
	"edgekeep/workload"
)

// move moves an instance and waits until the ledger has it.
func (b *bench) move(instance string, to *Gateway) {
	b.t.Helper()
	b.until("the move is taken", func() error {
		res, err := b.op.Move(b.ctx, instance, to.Name)
		if err == nil && !res.Done {
			err = fmt.Errorf("refused: %s", res.Reason)
		}
		return err
	})
	b.held(instance, to)
}

// held waits until the ledger says that a gateway has an instance.
func (b *bench) held(instance string, by *Gateway) {
	b.t.Helper()
	b.until(instance+" is on "+by.Name, func() error {
		r, err := b.op.Inspect(b.ctx, instance)
		if err == nil && r.Entry.Holder != by.Name {
			err = fmt.Errorf("it is on %s at epoch %d", r.Entry.Holder, r.Entry.Epoch)
		}
		return err
	})
}

// grantGateway is the data owner's word that a gateway may read other gateways'
// streams.
func (b *bench) grantGateway(g *Gateway) {
	b.t.Helper()
	kit, err := b.Kit("owner")
	b.must(err)
	owner, err := kit.Signer("owner.key")
	b.must(err)
	msg, err := message.Grant{Tenant: Tenant, Consumer: g.Name, Gateway: true}.Sign(owner)
	b.must(err)
	b.must(os.WriteFile(b.path("cloud/tenants", Tenant, "grants/gateway-"+g.Name+".cbor"), msg, 0o600))
}

// pair is a bench with two gateways, a counter on the first, and its numbers.
func pair(t *testing.T, limit time.Duration, args ...string) (b *bench, edge, other *Gateway) {
	t.Helper()
	module := clang(t, "counter.c", append([]string{"-mexec-model=reactor"}, args...)...)
	b = newBench(t, limit, Options{})
	edge, other = b.gateway("edge", "numbers"), b.gateway("other", "unused")
	b.startCloud()
	b.enrol(edge)
	b.enrol(other)
	for _, g := range []*Gateway{edge, other} {
		b.must(g.StartRunners(2))
		b.grantGateway(g)
	}
	b.deploy(edge, "counter", b.pack(counter("numbers"), module), workload.Source{Gateway: edge.Name, Stream: "numbers"})
	return b, edge, other
}

// TestMove: an instance moves back and forth while readings come, and counts each
// of them once.
func TestMove(t *testing.T) {
	b, edge, other := pair(t, 3*time.Minute)
	const n = 20_000
	path, sum := b.numbers(n)
	b.must(edge.StartDriver("numbers", "replay", path, "--speed", "1000"))
	c := b.tally("counter")
	c.upTo(1000)
	for range 2 {
		b.move("counter", other)
		c.upTo(int(c.count) + 500)
		b.move("counter", edge)
		c.upTo(int(c.count) + 500)
	}
	c.upTo(n)
	if c.count != n || c.sum != float64(sum) {
		t.Errorf("counted %.0f with the sum %.0f, it was %d and %d", c.count, c.sum, n, sum)
	}
}

package fleet

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

const (
	peerWorkers = 4
	peerQueue   = 256       // messages of each worker that wait: 30 MiB at most
	maxPeerData = 120 << 10 // bytes
	peerRate    = 256 << 20 // bytes a second of each sender
	peerBurst   = 32 << 20
	enrolledAge = 2 * time.Second // how long a gateway is taken for enrolled without looking again
	maxEnrolled = 65536
)

// enrolled remembers for a moment which gateways are enrolled and not revoked, and
// which are not.
type enrolled struct {
	mu   sync.Mutex // protects seen
	seen map[string]looked
}

type looked struct {
	until time.Time
	err   error
}

func (e *enrolled) check(ctx context.Context, f *Fleet, tenant, gateway string) error {
	id, now := cloud.Key(tenant, gateway), time.Now()
	e.mu.Lock()
	l, ok := e.seen[id]
	e.mu.Unlock()
	if ok && now.Before(l.until) {
		return l.err
	}
	if !attest.ValidName(gateway) {
		return fmt.Errorf("not a gateway's name: %.64q", gateway)
	}
	_, err := f.Tenants.Tenant(tenant)
	if err == nil {
		_, err = f.gateway(ctx, tenant, gateway)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.seen == nil || len(e.seen) >= maxEnrolled {
		e.seen = map[string]looked{}
	}
	e.seen[id] = looked{now.Add(enrolledAge), err}
	return err
}

// bucket is a token bucket of bytes.
type bucket struct {
	left float64
	at   time.Time
}

func (b *bucket) take(n int, now time.Time) bool {
	if b.at.IsZero() {
		b.left = peerBurst
	} else {
		b.left = min(peerBurst, b.left+now.Sub(b.at).Seconds()*peerRate)
	}
	b.at = now
	if b.left < float64(n) {
		return false
	}
	b.left -= float64(n)
	return true
}

// runPeers passes messages on between the keeps of a tenant's gateways. They are
// sealed or signed; what is dropped is sent again. The messages of one sender pass
// one worker, so that they stay in order.
func (f *Fleet) runPeers(ctx context.Context) error {
	var wg sync.WaitGroup
	work := make([]chan *nats.Msg, peerWorkers)
	for i := range work {
		work[i] = make(chan *nats.Msg, peerQueue)
		wg.Go(func() { f.peerWorker(ctx, work[i]) })
	}
	sub, err := f.Bus.NC.QueueSubscribe("ek1.*.*.up.peer", "fleet", func(m *nats.Msg) {
		h := fnv.New32a()
		h.Write([]byte(m.Subject)) // never fails
		select {
		case work[h.Sum32()%peerWorkers] <- m:
		default:
			f.Count("", "dropped", "peer: queue full")
		}
	})
	if err != nil {
		return fmt.Errorf("subscribing to messages between gateways: %w", err)
	}
	<-ctx.Done()
	_ = sub.Unsubscribe()
	wg.Wait()
	return ctx.Err()
}

func (f *Fleet) peerWorker(ctx context.Context, c <-chan *nats.Msg) {
	buckets := map[string]*bucket{} // of this worker's senders
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-c:
			if len(buckets) > maxEnrolled {
				clear(buckets)
			}
			b := buckets[m.Subject]
			if b == nil {
				b = &bucket{}
				buckets[m.Subject] = b
			}
			if !b.take(len(m.Data), time.Now()) {
				f.Count("", "dropped", "peer: too fast")
				continue
			}
			t, err := mqtt.ParseSubject(m.Subject)
			if err == nil {
				err = f.route(ctx, t, m.Data)
			}
			if err != nil && ctx.Err() == nil {
				f.Count(t.Tenant, "refused", err.Error())
				f.Log.Debug("message to a peer refused", "gateway", t.Tenant+"/"+t.Gateway, "reason", err)
			}
		}
	}
}

// route passes a message on to another gateway of the tenant, with the name of
// who it is from.
func (f *Fleet) route(ctx context.Context, t mqtt.Topic, data []byte) error {
	if t.Tenant == mqtt.Boot {
		return nil
	}
	r, err := message.Decode[message.Routed](data)
	if err != nil {
		return err
	}
	if len(r.Data) > maxPeerData {
		return fmt.Errorf("a message to a peer has at most %d bytes", maxPeerData)
	}
	if r.Peer == t.Gateway {
		return errors.New("a message to itself")
	}
	if err := f.peers.check(ctx, f, t.Tenant, t.Gateway); err != nil {
		return err
	}
	if err := f.peers.check(ctx, f, t.Tenant, r.Peer); err != nil {
		return err
	}
	down := mqtt.Topic{Tenant: t.Tenant, Gateway: r.Peer, Kind: "peer"}.Subject()
	r.Peer = t.Gateway
	return f.Bus.NC.Publish(down, message.Encode(r))
}

// Package fleet is the side of the cloud that talks to gateways: it enrols them
// on the operator's word, delivers challenges, commands and verdicts over their
// nonces, takes sealed data in and signs watermarks, answers gateways, operators
// and consumers, and keeps the ledger of who may run which instance of a workload.
// It reads no data and judges no evidence.
package fleet

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"edgekeep/cloud"
	"edgekeep/cloud/verifier"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// Fleet is one replica of the role.
type Fleet struct {
	Bus      *cloud.Bus
	Tenants  *cloud.Tenants
	Key      crypto.Signer // signs deliveries and watermarks
	EnrolKey []byte        // 32 bytes, of all replicas: secrets of credentials
	EKRoots  []*x509.Certificate
	CA       *cloud.CA // certifies gateways for TLS
	Log      *slog.Logger
	Now      func() time.Time
	Metrics  *cloud.Counts
	// BlobBytes bounds the blobs of each tenant; 0 means 16 GiB.
	BlobBytes int64
	// Disconnect ends a gateway's connection at once; nil where the broker is not
	// ours.
	Disconnect func(tenant, gateway string)

	uploads   sync.Mutex // one upload begins at a time: see beginBlob
	peers     enrolled
	places    places
	inferring limiter

	mu    sync.Mutex           // protects what follows
	asked map[string]time.Time // when an enrolled gateway was asked to attest last
}

// Count counts what was done or refused for a tenant; those that are not ours
// count together.
func (f *Fleet) Count(tenant, what, why string) {
	if _, err := f.Tenants.Tenant(tenant); err != nil {
		tenant = ""
	}
	f.Metrics.Add(tenant, what, why)
}

// Run serves until ctx ends.
func (f *Fleet) Run(ctx context.Context) error {
	f.inferring.all, f.inferring.each = inferTenant, inferGateway
	if err := f.answers(ctx); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return f.runIngest(ctx) })
	g.Go(func() error { return f.runAsks(ctx) })
	g.Go(func() error { return f.runPeers(ctx) })
	g.Go(func() error {
		return f.each(ctx, map[string]handler{
			"ek1.*.*.up.pull": f.pull, "ek1.*.*.up.result": f.result,
			"ek1.boot.*.up.enrol": f.enrol, "ek1.boot.*.up.activate": f.activate,
		})
	})
	return g.Wait()
}

type handler func(ctx context.Context, t mqtt.Topic, data []byte) error

// each runs a handler for every message on a subject, at most 32 at a time. What
// finds no place is dropped: gateways ask again.
func (f *Fleet) each(ctx context.Context, handlers map[string]handler) error {
	slots := make(chan struct{}, 32)
	for subject, h := range handlers {
		sub, err := f.Bus.NC.QueueSubscribe(subject, "fleet", func(m *nats.Msg) {
			select {
			case slots <- struct{}{}:
			default:
				f.Count("", "dropped", "too many under way")
				return
			}
			go func() {
				defer func() { <-slots }()
				f.handle(ctx, m, h)
			}()
		})
		if err != nil {
			return fmt.Errorf("subscribing to %s: %w", subject, err)
		}
		defer func() { _ = sub.Unsubscribe() }()
	}
	<-ctx.Done()
	return ctx.Err()
}

func (f *Fleet) handle(ctx context.Context, m *nats.Msg, h handler) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	t, err := mqtt.ParseSubject(m.Subject)
	if err == nil {
		err = h(ctx, t, m.Data)
	}
	if err != nil && ctx.Err() == nil {
		f.Count(t.Tenant, "refused", err.Error())
		f.Log.Warn("message refused", "topic", t.String(), "reason", err)
	}
}

// Notify hints a gateway that there is something to pull.
func (f *Fleet) Notify(tenant, gateway string) {
	_ = f.Bus.NC.Publish(mqtt.Topic{Tenant: tenant, Gateway: gateway, Kind: "notify"}.Subject(), nil) // only a hint
}

// askToAttest has an enrolled gateway challenged at its next pull, and hints it
// to pull: it signs with a key that no usable verdict vouches for, because its
// keep was restarted or its verdict is not affirming. At most once a second.
func (f *Fleet) askToAttest(ctx context.Context, t mqtt.Topic) error {
	id := cloud.Key(t.Tenant, t.Gateway)
	f.mu.Lock()
	due := time.Since(f.asked[id]) > time.Second
	if due {
		if f.asked == nil {
			f.asked = map[string]time.Time{}
		}
		f.asked[id] = time.Now()
	}
	f.mu.Unlock()
	if !due {
		return nil
	}
	if err := f.changeQueue(ctx, t.Tenant, t.Gateway, func(q *Queue) error { q.Attest = true; return nil }); err != nil {
		return err
	}
	f.Notify(t.Tenant, t.Gateway)
	return nil
}

// latest returns a gateway's newest verdict, verified.
func (f *Fleet) latest(ctx context.Context, t cloud.Tenant, gateway string) ([]byte, attest.Verdict, error) {
	b, _, ok, err := cloud.Get[verifier.Bytes](ctx, f.Bus.Latest, cloud.Key(t.Tenant, gateway))
	if err != nil {
		return nil, attest.Verdict{}, err
	}
	if !ok {
		return nil, attest.Verdict{}, errors.New("there is no verdict yet")
	}
	v, err := attest.VerifyVerdict(t.Verifier, b.Data)
	return b.Data, v, err
}

// gateway looks an enrolled gateway up.
func (f *Fleet) gateway(ctx context.Context, tenant, name string) (cloud.Gateway, error) {
	g, _, ok, err := cloud.Get[cloud.Gateway](ctx, f.Bus.Gateways, cloud.Key(tenant, name))
	if err == nil && !ok {
		err = fmt.Errorf("no gateway %s/%s is enrolled", tenant, name)
	}
	if err == nil && g.Revoked {
		err = fmt.Errorf("gateway %s/%s is revoked", tenant, name)
	}
	return g, err
}

// pull answers a gateway's question what is next: a command that waits, a
// challenge when the verdict gets old, the newest verdict, a new certificate.
func (f *Fleet) pull(ctx context.Context, t mqtt.Topic, data []byte) error {
	if t.Tenant == mqtt.Boot {
		return nil
	}
	p, err := message.Decode[message.Pull](data)
	if err != nil {
		return err
	}
	if len(p.Nonce) != message.NonceSize {
		return errors.New("a nonce has 32 bytes")
	}
	tenant, err := f.Tenants.Tenant(t.Tenant)
	if err != nil {
		return err
	}
	g, err := f.gateway(ctx, t.Tenant, t.Gateway)
	if err != nil {
		return err
	}
	item := message.Item{Nonce: p.Nonce, Time: f.Now().Unix(), Subject: t.Tenant + "/" + t.Gateway}
	verdict, v, err := f.latest(ctx, tenant, t.Gateway)
	fresh := err == nil
	if fresh {
		item.Verdict = verdict
	}
	q, err := f.queue(ctx, t.Tenant, t.Gateway)
	if err != nil {
		return err
	}
	if len(q.Pending) > 0 {
		item.Command = q.Pending[0].Message
		if item.Entry, err = f.entryFor(ctx, t.Tenant, q.Pending[0]); err != nil { // the next pull may have it
			item.Command = nil
			f.Log.Error("a deployment without a ledger entry", "gateway", item.Subject, "err", err)
		}
	}
	half := v.IssuedAt + (v.Expires-v.IssuedAt)/2
	if !fresh || q.Attest || item.Time >= half || len(q.Pending) > 0 && q.Pending[0].Attest {
		if item.Challenge, err = f.challenge(ctx, t.Tenant, t.Gateway); err != nil {
			f.Count(t.Tenant, "no challenge", err.Error())
			f.Log.Error("no challenge to be had", "gateway", item.Subject, "err", err)
		}
	}
	if fresh && v.Usable(item.Subject, t.Tenant, f.Now()) == nil {
		if item.Certificate, err = f.renew(ctx, g, v); err != nil { // the old one is good for a while
			f.Log.Error("no certificate to be had", "gateway", item.Subject, "err", err)
		}
	}
	if q.Attest && item.Challenge != nil {
		if err := f.changeQueue(ctx, t.Tenant, t.Gateway, func(q *Queue) error { q.Attest = false; return nil }); err != nil {
			return err
		}
	}
	return f.send(t.Tenant, t.Gateway, item)
}

// entryFor is the ledger's entry that a command to deploy goes with: the keep
// starts an instance at an epoch that the ledger says, or not at all.
func (f *Fleet) entryFor(ctx context.Context, tenant string, p Pending) ([]byte, error) {
	if p.Instance == "" {
		return nil, nil
	}
	r, _, err := f.record(ctx, tenant, p.Instance)
	if err != nil {
		return nil, err
	}
	return r.Entry.Sign(f.Key, p.Message)
}

func (f *Fleet) challenge(ctx context.Context, tenant, gateway string) ([]byte, error) {
	c, err := cloud.Ask[verifier.Bytes](ctx, f.Bus.NC, "svc.challenge", verifier.ChallengeRequest{Tenant: tenant, Gateway: gateway})
	return c.Data, err
}

func (f *Fleet) send(tenant, gateway string, item message.Item) error {
	msg, err := item.Sign(f.Key)
	if err != nil {
		return fmt.Errorf("signing a delivery: %w", err)
	}
	return f.Bus.NC.Publish(mqtt.Topic{Tenant: tenant, Gateway: gateway, Kind: "item"}.Subject(), msg)
}

// Package keybroker holds the data owner's key and gives stream keys on: to a
// gateway whose fresh verdict is affirming, if the stream is its own or the data
// owner has granted it reading, or to a consumer who has such a grant. It judges
// nobody: it checks verdicts and grants.
package keybroker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/hpke"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"edgekeep/cloud"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// Broker is one replica of the role.
type Broker struct {
	Bus     *cloud.Bus
	Tenants *cloud.Tenants
	Key     crypto.Signer                                // signs releases
	Data    func(tenant string) (hpke.PrivateKey, error) // the data owner's key
	Log     *slog.Logger
	Now     func() time.Time
}

// StreamKey is an entry of the bucket "keys": a stream key and the verdict that
// vouched for the epoch key that signed it when it was accepted.
type StreamKey struct {
	Message []byte `cbor:"1,keyasint"`
	Verdict []byte `cbor:"2,keyasint"`
}

// Request asks for a stream key. Exactly one of Consumer and Verdict says for
// whom: the name of a granted consumer, or a gateway's verdict.
type Request struct {
	Gateway  string `cbor:"1,keyasint"`
	Stream   string `cbor:"2,keyasint"`
	Epoch    []byte `cbor:"3,keyasint"`
	Consumer string `cbor:"4,keyasint,omitempty"`
	Verdict  []byte `cbor:"5,keyasint,omitempty"`
}

// GatewayRequest is what the fleet passes on of a gateway that asks for itself.
type GatewayRequest struct {
	Tenant  string           `cbor:"1,keyasint"`
	Gateway string           `cbor:"2,keyasint"` // that asks, by its topic
	Asked   message.AskedKey `cbor:"3,keyasint"`
}

// Run serves until ctx ends.
func (b *Broker) Run(ctx context.Context) error {
	if err := cloud.Answer(ctx, b.Bus, "api.*.data.key", "keybroker", b.answer); err != nil {
		return err
	}
	if err := cloud.Answer(ctx, b.Bus, "svc.key", "keybroker", b.answerGateway); err != nil {
		return err
	}
	if err := cloud.Answer(ctx, b.Bus, "svc.recovery", "keybroker", b.recovery); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func (b *Broker) answer(ctx context.Context, subject string, r Request) (message.Release, error) {
	return b.release(ctx, strings.Split(subject, ".")[1], r)
}

// answerGateway answers a gateway: it is given keys under its own verdict only.
func (b *Broker) answerGateway(ctx context.Context, _ string, r GatewayRequest) (message.Release, error) {
	v, err := attest.PeekVerdict(r.Asked.Verdict) // release verifies it
	if err != nil {
		return message.Release{}, fmt.Errorf("the recipient's verdict: %w", err)
	}
	if v.Subject != r.Tenant+"/"+r.Gateway {
		return message.Release{}, fmt.Errorf("the recipient's verdict is about %.64q, but %s/%s asks", v.Subject, r.Tenant, r.Gateway)
	}
	return b.release(ctx, r.Tenant, Request{Gateway: r.Asked.Gateway, Stream: r.Asked.Stream, Epoch: r.Asked.Epoch, Verdict: r.Asked.Verdict})
}

func (b *Broker) release(ctx context.Context, tenant string, r Request) (message.Release, error) {
	t, err := b.Tenants.Tenant(tenant)
	if err != nil {
		return message.Release{}, err
	}
	if !attest.ValidName(r.Gateway) || !attest.ValidName(r.Stream) || len(r.Epoch) != 16 {
		return message.Release{}, errors.New("which stream key? gateway, stream and epoch are needed")
	}
	to, who, err := b.recipient(ctx, t, r)
	if err != nil {
		b.Log.Warn("release refused", "gateway", r.Gateway, "stream", r.Stream, "reason", err)
		return message.Release{}, err
	}
	key := fmt.Sprintf("%s.%s.%x", cloud.Key(t.Tenant, r.Gateway), r.Stream, r.Epoch)
	k, _, ok, err := cloud.Get[StreamKey](ctx, b.Bus.Keys, key)
	if err != nil {
		return message.Release{}, err
	}
	if !ok {
		return message.Release{}, fmt.Errorf("no key of stream %s of %s in that epoch was accepted", r.Stream, r.Gateway)
	}
	epochKey, err := producer(t, t.Tenant+"/"+r.Gateway, k)
	if err != nil {
		return message.Release{}, err
	}
	data, err := b.Data(t.Tenant)
	if err != nil {
		return message.Release{}, err
	}
	h, secret, err := sealing.OpenStreamKey(epochKey, sealing.TypStreamKey, k.Message, data)
	if err != nil {
		return message.Release{}, err
	}
	defer clear(secret)
	if h.Subject != t.Tenant+"/"+r.Gateway || h.Stream != r.Stream || !bytes.Equal(h.Epoch[:], r.Epoch) {
		return message.Release{}, errors.New("the stored key is of another stream")
	}
	msg, err := sealing.SealStreamKey(b.Key, sealing.TypRelease, h.Subject, h.Stream, h.Epoch, secret, to)
	if err != nil {
		return message.Release{}, err
	}
	b.Log.Info("key released", "gateway", h.Subject, "stream", h.Stream, "epoch", h.Epoch.String(), "to", who)
	return message.Release{Message: msg, EpochKey: cose.MarshalKey(epochKey), Verdict: k.Verdict}, nil
}

// producer checks that an affirming verdict vouched for the key that signed a
// stream key, and returns it.
func producer(t cloud.Tenant, subject string, k StreamKey) (*ecdsa.PublicKey, error) {
	v, err := attest.VerifyVerdict(t.Verifier, k.Verdict)
	if err != nil {
		return nil, fmt.Errorf("the producer's verdict: %w", err)
	}
	if v.Subject != subject || v.Audience != t.Tenant || !v.Affirming() {
		return nil, errors.New("the producer's verdict does not vouch for this gateway's data")
	}
	h, _, err := cose.Peek1(k.Message)
	if err != nil {
		return nil, err
	}
	return v.DataKey(h.KID)
}

// recipient decides whether whoever asks may read, and returns the key to seal
// to.
func (b *Broker) recipient(ctx context.Context, t cloud.Tenant, r Request) (hpke.PublicKey, string, error) {
	switch {
	case r.Consumer != "" && len(r.Verdict) > 0:
		return nil, "", errors.New("for a consumer or for a gateway, not both")
	case r.Consumer != "":
		return b.consumer(t, r.Consumer)
	case len(r.Verdict) > 0:
		v, err := attest.VerifyVerdict(t.Verifier, r.Verdict)
		if err != nil {
			return nil, "", fmt.Errorf("the recipient's verdict: %w", err)
		}
		if err := v.Usable(v.Subject, t.Tenant, b.Now()); err != nil {
			return nil, "", fmt.Errorf("the recipient may not open this: %w", err)
		}
		tenant, name, _ := strings.Cut(v.Subject, "/")
		if tenant != t.Tenant || !attest.ValidName(name) {
			return nil, "", fmt.Errorf("the recipient's verdict is about %.64q, no gateway of %s", v.Subject, t.Tenant)
		}
		// A producer gets its own streams back without a grant: its keep had the
		// plaintext, and the verdict says that it is still one to be trusted.
		if name != r.Gateway {
			if _, err := b.grant(t, "gateway-"+name, message.Grant{Tenant: t.Tenant, Consumer: name, Gateway: true}); err != nil {
				return nil, "", err
			}
		}
		g, _, ok, err := cloud.Get[cloud.Gateway](ctx, b.Bus.Gateways, cloud.Key(t.Tenant, name))
		if err != nil {
			return nil, "", err
		}
		if !ok || g.Revoked {
			return nil, "", fmt.Errorf("the recipient %s is not enrolled, or revoked", v.Subject)
		}
		to, err := cose.UnmarshalHPKEKey(v.Keys[attest.PurposeReceive])
		if err != nil {
			return nil, "", fmt.Errorf("the recipient's verdict names no receiving key: %w", err)
		}
		return to, v.Subject, nil
	}
	return nil, "", errors.New("for whom? a consumer's name or a gateway's verdict is needed")
}

// consumer returns the key of a granted consumer.
func (b *Broker) consumer(t cloud.Tenant, name string) (hpke.PublicKey, string, error) {
	if !attest.ValidName(name) {
		return nil, "", fmt.Errorf("not a consumer's name: %.64q", name)
	}
	g, err := b.grant(t, name, message.Grant{Tenant: t.Tenant, Consumer: name})
	if err != nil {
		return nil, "", err
	}
	to, err := cose.UnmarshalHPKEKey(g.Key)
	if err != nil {
		return nil, "", fmt.Errorf("the grant of %s: %w", name, err)
	}
	return to, name, nil
}

// grant looks a grant up, grants/{file}.cbor in the tenant's directory, signed by
// the data owner: who may read changes under no other key. It must be for whom
// want says.
func (b *Broker) grant(t cloud.Tenant, file string, want message.Grant) (message.Grant, error) {
	msg, err := os.ReadFile(filepath.Join(t.Dir, "grants", file+".cbor"))
	if errors.Is(err, os.ErrNotExist) {
		return message.Grant{}, fmt.Errorf("%s has no grant of the data owner: `edgekeep data grant` makes one", want.Consumer)
	}
	if err != nil {
		return message.Grant{}, fmt.Errorf("reading the grant of %s: %w", want.Consumer, err)
	}
	g, err := message.VerifyGrant(t.Owner, msg)
	if err != nil {
		return g, fmt.Errorf("the grant of %s: %w", want.Consumer, err)
	}
	if g.Tenant != want.Tenant || g.Consumer != want.Consumer || g.Gateway != want.Gateway {
		return g, fmt.Errorf("the grant filed under %s is for another: %s/%s", file, g.Tenant, g.Consumer)
	}
	if g.Expires != 0 && b.Now().Unix() >= g.Expires {
		return g, fmt.Errorf("the grant of %s has expired", want.Consumer)
	}
	return g, nil
}

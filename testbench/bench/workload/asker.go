package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/client"
	"edgekeep/cloud/fleet"
	"edgekeep/internal/cose"
	"edgekeep/tee/attest"
	"edgekeep/testbench/rig"
	"edgekeep/workload"
)

// asker puts inference requests like package client, but goes by the verdicts that
// it got before, whatever the answer: a client that may wait for an instance to
// arrive, and shall not have the gateway attest meanwhile.
type asker struct {
	kit   *client.Kit
	nc    *nats.Conn
	key   hpke.PrivateKey
	grant []byte // for key
}

func newAsker(r *rig.Rig) (*asker, error) {
	kit, err := r.Kit("consumer")
	if err != nil {
		return nil, err
	}
	pool, err := cloud.LoadPool(filepath.Join(kit.Dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(kit.Dir, "tls.pem"), filepath.Join(kit.Dir, "tls.key"))
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, err
	}
	nc, err := nats.Connect(kit.Server, nats.CustomInboxPrefix(cloud.Inbox(leaf)),
		nats.Secure(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}))
	if err != nil {
		return nil, err
	}
	a := &asker{kit: kit, nc: nc}
	if a.key, err = kit.ConsumerKey(); err == nil {
		a.grant, err = os.ReadFile(filepath.Join(kit.Dir, "grant.cbor"))
	}
	return a, err
}

// at is a gateway that requests can be sealed to.
type at struct {
	name   string
	nonce  []byte
	to     hpke.PublicKey
	signer *ecdsa.PublicKey
}

// at has a gateway attest.
func (a *asker) at(ctx context.Context, gateway string) (at, error) {
	g := at{name: gateway}
	s, err := cloud.Ask[fleet.Saved](ctx, a.nc, "api."+a.kit.Tenant+".data.attest", fleet.Vouch{Gateway: gateway})
	if err != nil {
		return g, fmt.Errorf("having %s attest: %w", gateway, err)
	}
	v, err := attest.VerifyVerdict(a.kit.Roots.Verifier, s.Verdict)
	if err != nil {
		return g, err
	}
	g.nonce = v.Nonce
	if g.to, err = cose.UnmarshalHPKEKey(v.Keys[attest.PurposeReceive]); err != nil {
		return g, err
	}
	g.signer, err = cose.UnmarshalKey(v.Cnf.Key)
	return g, err
}

// ask puts a request. It takes an error as an answer of the keep when refused is
// true, of anything else when it is not.
func (a *asker) ask(ctx context.Context, g at, instance, input string) (refused bool, err error) {
	r := workload.Request{Input: []byte(input), Reply: cose.MarshalHPKEKey(a.key.PublicKey()), ID: make([]byte, 16), Grant: a.grant}
	rand.Read(r.ID) // never fails
	subject := a.kit.Tenant + "/" + g.name
	sealed, err := r.Seal(subject, instance, g.nonce, g.to)
	if err != nil {
		return false, err
	}
	got, err := cloud.Ask[fleet.Inferred](ctx, a.nc, "api."+a.kit.Tenant+".data.infer", fleet.Infer{
		Gateway: g.name, Asked: workload.Asked{Instance: instance, Nonce: g.nonce, Sealed: sealed},
	})
	if err != nil {
		return false, err
	}
	_, _, err = workload.OpenResponse(g.signer, subject, instance, sealed, got.Data, a.key)
	return true, err
}

const patience = time.Minute

// answered asks until there is an answer, and says how long the last question took.
func (a *asker) answered(ctx context.Context, g at, instance, input string) (time.Duration, error) {
	for first := time.Now(); ; {
		began := time.Now()
		refused, err := a.ask(ctx, g, instance, input)
		if err == nil {
			return time.Since(began), nil
		}
		if !refused || ctx.Err() != nil || time.Since(first) > patience {
			return 0, err
		}
		time.Sleep(time.Millisecond)
	}
}

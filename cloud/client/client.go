// Package client is a person's or a consumer's way to the cloud: a kit with a
// certificate and keys, requests, and opening data.
package client

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/internal/config"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// Kit is a directory with what somebody needs to talk to a cloud: kit.toml,
// ca.pem, tls.pem, tls.key, roots.cbor, and the keys of their office.
type Kit struct {
	Dir      string
	Tenant   string
	Server   string
	Consumer string // name in the data owner's grant, if this is a consumer's kit
	Roots    attest.Trusted
}

type kitFile struct {
	Tenant   string `toml:"tenant"`
	Server   string `toml:"server"`
	Consumer string `toml:"consumer"`
}

// LoadKit reads a kit.
func LoadKit(dir string) (*Kit, error) {
	var f kitFile
	if err := config.Load(filepath.Join(dir, "kit.toml"), &f); err != nil {
		return nil, fmt.Errorf("the kit: %w", err)
	}
	bundle, err := os.ReadFile(filepath.Join(dir, "roots.cbor"))
	if err != nil {
		return nil, fmt.Errorf("the kit's trust roots: %w", err)
	}
	roots, err := attest.ParseRoots(bundle)
	if err != nil {
		return nil, err
	}
	if roots.Tenant != f.Tenant {
		return nil, fmt.Errorf("the kit is of tenant %s, its trust roots of %s", f.Tenant, roots.Tenant)
	}
	return &Kit{Dir: dir, Tenant: f.Tenant, Server: f.Server, Consumer: f.Consumer, Roots: roots}, nil
}

// Signer loads one of the kit's signing keys, like "operator.key".
func (k *Kit) Signer(name string) (crypto.Signer, error) {
	s, err := cloud.LoadSigningKey(filepath.Join(k.Dir, name))
	if err != nil {
		return nil, fmt.Errorf("%w: this needs the kit that holds it", err)
	}
	return s, nil
}

// ConsumerKey loads the key that data is opened with.
func (k *Kit) ConsumerKey() (hpke.PrivateKey, error) {
	return cloud.LoadHPKEKey(filepath.Join(k.Dir, "consumer.key"))
}

// Client is a connection.
type Client struct {
	*Kit
	nc     *nats.Conn
	denied chan struct{} // the server says that this certificate may not do that

	mu       sync.Mutex // protects verdicts
	verdicts map[string]vouchedFor
}

// Connect connects to the kit's server. The connection survives a restart of the
// server; requests in between fail.
func (k *Kit) Connect() (*Client, error) {
	pool, err := cloud.LoadPool(filepath.Join(k.Dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(k.Dir, "tls.pem"), filepath.Join(k.Dir, "tls.key"))
	if err != nil {
		return nil, fmt.Errorf("the kit's certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, fmt.Errorf("the kit's certificate: %w", err)
	}
	c := &Client{Kit: k, denied: make(chan struct{}, 1)}
	c.nc, err = nats.Connect(k.Server, nats.Secure(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}),
		nats.CustomInboxPrefix(cloud.Inbox(leaf)), nats.MaxReconnects(-1), nats.ReconnectWait(250*time.Millisecond), nats.Timeout(10*time.Second),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if errors.Is(err, nats.ErrPermissionViolation) {
				select {
				case c.denied <- struct{}{}:
				default:
				}
			}
		}))
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w: is edgekeep-cloud running there?", k.Server, err)
	}
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() { c.nc.Close() }

func ask[Rep any](ctx context.Context, c *Client, what string, req any) (Rep, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var denied atomic.Bool
	go func() { // ends with ctx
		select {
		case <-c.denied:
			denied.Store(true)
			cancel()
		case <-ctx.Done():
		}
	}()
	rep, err := cloud.Ask[Rep](ctx, c.nc, "api."+c.Tenant+"."+what, req)
	if err != nil && denied.Load() {
		err = fmt.Errorf("the certificate in %s may not ask for %s: another kit is needed", c.Dir, what)
	}
	return rep, err
}

// Gateways lists gateways and TPMs that wait for approval.
func (c *Client) Gateways(ctx context.Context) (fleet.List, error) {
	return ask[fleet.List](ctx, c, "gateway.ls", fleet.None{})
}

// Gateway tells everything about one gateway.
func (c *Client) Gateway(ctx context.Context, name string) (fleet.Details, error) {
	return ask[fleet.Details](ctx, c, "gateway.show", fleet.Name{Gateway: name})
}

// Approve signs that the TPM with this EK hash may enrol, once, as a gateway.
func (c *Client) Approve(ctx context.Context, ekHash []byte, gateway string) error {
	if len(ekHash) != 32 {
		return errors.New("an EK hash is 64 hexadecimal digits: `edgekeep gateway ls` shows those that wait")
	}
	key, err := c.Signer("operator.key")
	if err != nil {
		return err
	}
	id := make([]byte, 16)
	rand.Read(id) // never fails
	msg, err := message.Admission{EKHash: ekHash, Tenant: c.Tenant, Gateway: gateway, ID: id}.Sign(key)
	if err != nil {
		return err
	}
	_, err = ask[fleet.None](ctx, c, "gateway.approve", fleet.Signed{Message: msg})
	return err
}

// Revoke ends a gateway.
func (c *Client) Revoke(ctx context.Context, name string) error {
	_, err := ask[fleet.None](ctx, c, "gateway.revoke", fleet.Name{Gateway: name})
	return err
}

// Attest asks a gateway for evidence now. The verdict is verified with the kit's
// roots.
func (c *Client) Attest(ctx context.Context, name string) (fleet.Saved, attest.Verdict, error) {
	return c.verdict(ctx, "gateway.attest", name)
}

// Saved returns the newest evidence and verdict.
func (c *Client) Saved(ctx context.Context, name string) (fleet.Saved, attest.Verdict, error) {
	return c.verdict(ctx, "evidence", name)
}

func (c *Client) verdict(ctx context.Context, what, name string) (fleet.Saved, attest.Verdict, error) {
	s, err := ask[fleet.Saved](ctx, c, what, fleet.Name{Gateway: name})
	if err != nil {
		return s, attest.Verdict{}, err
	}
	v, err := attest.VerifyVerdict(c.Roots.Verifier, s.Verdict)
	if err == nil && v.Subject != c.Tenant+"/"+name {
		err = fmt.Errorf("the cloud sent a verdict about %s", v.Subject)
	}
	return s, v, err
}

// Command signs and queues a command and waits for its result, until ctx ends.
func (c *Client) Command(ctx context.Context, gateway, name string, args map[string]string, expires time.Time) (message.Result, error) {
	cmd := message.Command{Name: name, Args: args}
	if !expires.IsZero() {
		cmd.Expires = expires.Unix()
	}
	return c.command(ctx, gateway, cmd)
}

// command fills in whom a command is for and its sequence.
func (c *Client) command(ctx context.Context, gateway string, cmd message.Command) (message.Result, error) {
	key, err := c.Signer("operator.key")
	if err != nil {
		return message.Result{}, err
	}
	next, err := ask[fleet.NextSequence](ctx, c, "command.next", fleet.Name{Gateway: gateway})
	if err != nil {
		return message.Result{}, err
	}
	cmd.Audience, cmd.Sequence = c.Tenant+"/"+gateway, next.Sequence
	msg, err := cmd.Sign(key)
	if err != nil {
		return message.Result{}, err
	}
	if _, err := ask[fleet.None](ctx, c, "command.send", fleet.Signed{Message: msg}); err != nil {
		return message.Result{}, err
	}
	sum := sha256.Sum256(msg)
	return c.result(ctx, gateway, cmd.Sequence, sum[:])
}

// result waits for the result of one command.
func (c *Client) result(ctx context.Context, gateway string, sequence uint64, hash []byte) (message.Result, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		d, err := c.Gateway(ctx, gateway)
		if err == nil {
			for _, r := range d.Results {
				if bytes.Equal(r.Result.Command, hash) {
					return c.verifyResult(d, gateway, hash, r.Message)
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return message.Result{}, fmt.Errorf("command %d waits for gateway %s, which has not answered: it will get it when it connects; `edgekeep gateway show %s` shows the result", sequence, gateway, gateway)
		}
	}
}

// verifyResult checks a result with the keys that the gateway's verdict vouches
// for, and that it answers this command to this gateway.
func (c *Client) verifyResult(d fleet.Details, gateway string, hash, msg []byte) (message.Result, error) {
	subject := c.Tenant + "/" + gateway
	v, err := attest.VerifyVerdict(c.Roots.Verifier, d.Summary.Verdict)
	if err != nil {
		return message.Result{}, err
	}
	if v.Subject != subject || !v.Affirming() {
		return message.Result{}, fmt.Errorf("no affirming verdict vouches for the keep of %s: its answer counts for nothing", subject)
	}
	keys, err := v.DataKeys()
	if err != nil {
		return message.Result{}, err
	}
	for _, k := range keys {
		if res, err := message.VerifyResult(k, msg); err == nil && res.Subject == subject && bytes.Equal(res.Command, hash) {
			return res, nil
		}
	}
	return message.Result{}, errors.New("the result is not signed by the gateway's keep")
}

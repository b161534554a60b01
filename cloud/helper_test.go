package cloud_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/node"
	"edgekeep/mqtt"
)

// One server serves all tests of this package; each test uses names of its own.
var (
	dir     string
	srv     *cloud.Server
	service *nats.Conn // what a role of the cloud has
	bus     *cloud.Bus
	ca      *cloud.CA
	refused atomic.Pointer[map[string]bool] // gateways that are revoked, by "tenant/gateway/serial"
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	var err error
	if dir, err = os.MkdirTemp("", "cloud"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if _, err := node.Init(node.InitOptions{Dir: dir, Tenant: "acme", Hosts: []string{"127.0.0.1"}, Now: time.Now()}); err != nil {
		panic(err)
	}
	ca = must(cloud.LoadCA(path("keys/ca.pem"), path("keys/ca.key")))
	srv = must(cloud.StartServer(cloud.ServerConfig{
		Dir: path("data"), Host: "127.0.0.1", ClientPort: -1, MQTTPort: -1,
		Cert: path("keys/server.pem"), Key: path("keys/server.key"), ClientCA: path("keys/ca.pem"),
	}))
	defer srv.Stop()
	refused.Store(&map[string]bool{})
	srv.SetRevoked(func(_ context.Context, tenant, gateway string, serial []byte) bool {
		return (*refused.Load())[fmt.Sprintf("%s/%s/%x", tenant, gateway, serial)]
	})
	service = must(srv.Connect())
	defer service.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	bus = must(cloud.Open(ctx, service, 1))
	return m.Run()
}

func path(name string) string { return filepath.Join(dir, name) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func deadline(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// identity is a client certificate and its key.
type identity struct {
	leaf *x509.Certificate
	key  *ecdsa.PrivateKey
}

func identify(by *cloud.CA, role, cn string) identity {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	return identity{must(by.Issue(role, cn, &key.PublicKey, time.Now(), time.Hour)), key}
}

// tls is a configuration with the identity; the zero identity shows none.
func (i identity) tls() *tls.Config {
	cfg := &tls.Config{RootCAs: must(cloud.LoadPool(path("keys/ca.pem"))), MinVersion: tls.VersionTLS13}
	if i.key != nil {
		cfg.Certificates = []tls.Certificate{{Certificate: [][]byte{i.leaf.Raw}, PrivateKey: i.key}}
	}
	return cfg
}

// dial connects as a gateway does.
func (i identity) dial(t testing.TB, clientID, user string, filters ...string) (*mqtt.Conn, <-chan mqtt.Message, error) {
	t.Helper()
	got := make(chan mqtt.Message, 64)
	c, err := mqtt.Dial(deadline(t), mqtt.Options{
		URL: "tls://" + srv.MQTTAddr(), TLS: i.tls(), ClientID: clientID, Username: user, Subscribe: filters,
		Receive: func(m mqtt.Message) { got <- m },
	})
	if err == nil {
		t.Cleanup(c.Close)
	}
	return c, got, err
}

// person connects as the CLI does.
func (i identity) person(t testing.TB) (*nats.Conn, <-chan error, error) {
	t.Helper()
	errs := make(chan error, 64)
	opts := []nats.Option{
		nats.Secure(i.tls()), nats.MaxReconnects(0), nats.Timeout(10 * time.Second),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { errs <- err }),
	}
	if i.leaf != nil {
		opts = append(opts, nats.CustomInboxPrefix(cloud.Inbox(i.leaf)))
	}
	nc, err := nats.Connect(srv.ClientURL(), opts...)
	if err == nil {
		t.Cleanup(nc.Close)
	}
	return nc, errs, err
}

func connect(t testing.TB, i identity) (*nats.Conn, <-chan error) {
	t.Helper()
	nc, errs, err := i.person(t)
	if err != nil {
		t.Fatal(err)
	}
	return nc, errs
}

// listen collects what is published on a subject.
func listen(t testing.TB, subject string) *nats.Subscription {
	t.Helper()
	sub := must(service.SubscribeSync(subject))
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	if err := service.Flush(); err != nil {
		t.Fatal(err)
	}
	return sub
}

func nextMessage(t testing.TB, sub *nats.Subscription) *nats.Msg {
	t.Helper()
	m, err := sub.NextMsgWithContext(deadline(t))
	if err != nil {
		t.Fatalf("nothing came on %s: %v", sub.Subject, err)
	}
	return m
}

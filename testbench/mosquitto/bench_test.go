package mosquitto

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"edgekeep/testbench/internal/process"
)

const patience = 5 * time.Second // until a test gives up

func TestMain(m *testing.M) {
	if os.Getenv("CI") == "" {
		if _, err := process.Find("mosquitto", "mosquitto"); err != nil {
			os.Stderr.WriteString("skipped: " + err.Error() + "\n")
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// authority is a CA with the files that a broker needs.
type authority struct {
	t       *testing.T
	key     *ecdsa.PrivateKey
	cert    *x509.Certificate
	pool    *x509.CertPool
	serial  int64
	options Options
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, pool: x509.NewCertPool()}
	a.cert, a.key = a.issue("ca")
	a.pool.AddCert(a.cert)
	dir := t.TempDir()
	a.options = Options{
		Dir:      filepath.Join(dir, "broker"),
		CAFile:   filepath.Join(dir, "ca.pem"),
		CertFile: filepath.Join(dir, "server.pem"),
		KeyFile:  filepath.Join(dir, "server.key"),
	}
	server, serverKey := a.issue("broker")
	keyDER, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, a.options.CAFile, "CERTIFICATE", a.cert.Raw)
	writePEM(t, a.options.CertFile, "CERTIFICATE", server.Raw)
	writePEM(t, a.options.KeyFile, "PRIVATE KEY", keyDER)
	return a
}

// issue makes a certificate; the first one is the CA's own.
func (a *authority) issue(cn string) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial),
		Subject:      pkix.Name{CommonName: cn},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.ExtKeyUsage = nil
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (a *authority) start() *Broker {
	a.t.Helper()
	b, err := Start(a.t.Context(), a.options)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() {
		if err := b.Kill(); err != nil {
			a.t.Error(err)
		}
	})
	return b
}

// mutual is the TLS configuration of a client with a certificate for the CN.
func (a *authority) mutual(cn string) *tls.Config {
	a.t.Helper()
	cert, key := a.issue(cn)
	return &tls.Config{
		RootCAs:      a.pool,
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}},
	}
}

// options are those of a client with a certificate.
func (a *authority) client(b *Broker, cn string) *paho.ClientOptions {
	a.t.Helper()
	return clientOptions(b.URL(), a.mutual(cn)).SetClientID("whatever")
}

// boot are the options of a client without a certificate.
func (a *authority) boot(b *Broker, user string) *paho.ClientOptions {
	return clientOptions(b.BootURL(), &tls.Config{RootCAs: a.pool}).SetUsername(user)
}

func clientOptions(url string, config *tls.Config) *paho.ClientOptions {
	return paho.NewClientOptions().AddBroker(url).SetTLSConfig(config).SetProtocolVersion(4).
		SetAutoReconnect(false).SetConnectTimeout(patience).SetWriteTimeout(patience)
}

// client is a connected client and what it has been sent.
type client struct {
	paho.Client
	t    *testing.T
	in   chan paho.Message
	lost chan error
}

func dial(t *testing.T, o *paho.ClientOptions) *client {
	t.Helper()
	c, err := tryDial(t, o)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	return c
}

func tryDial(t *testing.T, o *paho.ClientOptions) (*client, error) {
	t.Helper()
	c := &client{t: t, in: make(chan paho.Message, 1024), lost: make(chan error, 1)}
	o.SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { c.in <- m })
	o.SetConnectionLostHandler(func(_ paho.Client, err error) { c.lost <- err })
	c.Client = paho.NewClient(o)
	token := c.Connect()
	if !token.WaitTimeout(patience) {
		t.Fatal("no answer to CONNECT")
	}
	if token.Error() == nil {
		t.Cleanup(func() { c.Client.Disconnect(0) })
	}
	return c, token.Error()
}

func (c *client) subscribe(filters ...string) {
	c.t.Helper()
	for _, f := range filters {
		token := c.Client.Subscribe(f, 1, nil)
		if !token.WaitTimeout(patience) || token.Error() != nil {
			c.t.Fatalf("subscribe to %q: %v", f, token.Error())
		}
	}
}

// publish returns when the broker has acknowledged: it has then routed or denied
// the message.
func (c *client) publish(topics ...string) {
	c.t.Helper()
	for _, topic := range topics {
		token := c.Client.Publish(topic, 1, false, "to "+topic)
		if !token.WaitTimeout(patience) || token.Error() != nil {
			c.t.Fatalf("publish to %q: %v", topic, token.Error())
		}
	}
}

// until collects the topics of what arrives before the last topic does.
func (c *client) until(last string) (topics []string) {
	c.t.Helper()
	for {
		select {
		case m := <-c.in:
			if m.Topic() == last {
				return topics
			}
			topics = append(topics, m.Topic())
		case err := <-c.lost:
			c.t.Fatalf("connection lost before %q came: %v", last, err)
		case <-time.After(patience):
			c.t.Fatalf("%q did not come; before it came %q", last, topics)
		}
	}
}

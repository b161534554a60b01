// Package node puts roles of the cloud together in one process: the embedded
// server, its stores, and whichever roles a configuration names.
package node

import (
	"context"
	"crypto/hpke"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/cloud"
	"edgekeep/cloud/bridge"
	"edgekeep/cloud/fleet"
	"edgekeep/cloud/keybroker"
	"edgekeep/cloud/verifier"
)

// Config is cloud.toml. configs/cloud.toml explains every key.
type Config struct {
	Roles   []string `toml:"roles"`
	Data    string   `toml:"data"`
	Keys    string   `toml:"keys"`
	Tenants string   `toml:"tenants"`
	EKCA    string   `toml:"ek_ca"`
	Server  struct {
		Host       string `toml:"host"`
		ClientPort int    `toml:"client_port"`
		MQTTPort   int    `toml:"mqtt_port"`
		StoreBytes int64  `toml:"store_bytes"`
	} `toml:"server"`
	Bridge struct {
		URL  string `toml:"url"`
		CA   string `toml:"ca"`
		Cert string `toml:"cert"`
		Key  string `toml:"key"`
	} `toml:"bridge"`
}

// Roles there are.
var roles = []string{"verifier", "keybroker", "fleet", "bridge"}

// Validate says what is missing.
func (c Config) Validate() error {
	for _, r := range c.Roles {
		if !slices.Contains(roles, r) {
			return fmt.Errorf("unknown role %q: there are %v", r, roles)
		}
	}
	switch {
	case len(c.Roles) == 0:
		return fmt.Errorf("roles is missing: which of %v this process has", roles)
	case c.Data == "" || c.Keys == "" || c.Tenants == "":
		return errors.New("data, keys and tenants are needed: `edgekeep-cloud init` makes them")
	case c.EKCA == "" && slices.Contains(c.Roles, "fleet"):
		return errors.New("ek_ca is missing: a directory with the CA certificates of the TPM manufacturers you trust, as PEM files")
	case c.Bridge.URL == "" && slices.Contains(c.Roles, "bridge"):
		return errors.New("bridge.url is missing: the broker to join")
	}
	return nil
}

// Endpoints is where a node can be reached; it is written to endpoints.json in
// the data directory.
type Endpoints struct {
	Client string `json:"client"` // for `edgekeep`
	MQTT   string `json:"mqtt"`   // for gateways
}

// Node is a running cloud process.
type Node struct {
	cfg    Config
	log    *slog.Logger
	server *cloud.Server
	bus    *cloud.Bus
	start  []func(context.Context) error
	counts *cloud.Counts // of all roles of this process
	Endpoints
}

// Start starts the server and prepares the roles.
func Start(ctx context.Context, cfg Config, version string, log *slog.Logger) (*Node, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	key := func(name string) string { return filepath.Join(cfg.Keys, name) }
	srv, err := cloud.StartServer(cloud.ServerConfig{
		Dir: cfg.Data, Host: cfg.Server.Host, ClientPort: cfg.Server.ClientPort, MQTTPort: cfg.Server.MQTTPort,
		Cert: key("server.pem"), Key: key("server.key"), ClientCA: key("ca.pem"), StoreLimit: cfg.Server.StoreBytes,
	})
	if err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, log: log, server: srv, counts: &cloud.Counts{}, Endpoints: Endpoints{Client: srv.ClientURL()}}
	if cfg.Server.MQTTPort != 0 {
		n.MQTT = "tls://" + srv.MQTTAddr()
	}
	if err := n.prepare(ctx, key, version); err != nil {
		srv.Stop()
		return nil, err
	}
	return n, nil
}

func (n *Node) prepare(ctx context.Context, key func(string) string, version string) error {
	nc, err := n.server.Connect()
	if err != nil {
		return err
	}
	if n.bus, err = cloud.Open(ctx, nc, 1); err != nil {
		return err
	}
	tenants := &cloud.Tenants{Dir: n.cfg.Tenants}
	for _, role := range n.cfg.Roles {
		log := n.log.With("role", role)
		switch role {
		case "verifier":
			err = n.verifier(tenants, key, version, log)
		case "keybroker":
			err = n.keybroker(tenants, key, log)
		case "fleet":
			err = n.fleet(tenants, key, log)
		case "bridge":
			err = n.bridge(log)
		}
		if err != nil {
			return fmt.Errorf("role %s: %w", role, err)
		}
	}
	return nil
}

func (n *Node) verifier(tenants *cloud.Tenants, key func(string) string, version string, log *slog.Logger) error {
	signer, err := cloud.LoadSigningKey(key("verifier.key"))
	if err != nil {
		return err
	}
	secret, err := cloud.LoadSecret(key("challenge.secret"))
	if err != nil {
		return err
	}
	v := &verifier.Verifier{Bus: n.bus, Tenants: tenants, Key: signer, ChallengeKey: secret, Build: version, Log: log, Now: time.Now, Metrics: n.counts}
	n.start = append(n.start, v.Run)
	return nil
}

func (n *Node) keybroker(tenants *cloud.Tenants, key func(string) string, log *slog.Logger) error {
	signer, err := cloud.LoadSigningKey(key("broker.key"))
	if err != nil {
		return err
	}
	data := func(tenant string) (hpke.PrivateKey, error) {
		return cloud.LoadHPKEKey(filepath.Join(n.cfg.Tenants, tenant, "data.key"))
	}
	b := &keybroker.Broker{Bus: n.bus, Tenants: tenants, Key: signer, Data: data, Log: log, Now: time.Now}
	n.start = append(n.start, b.Run)
	return nil
}

func (n *Node) fleet(tenants *cloud.Tenants, key func(string) string, log *slog.Logger) error {
	signer, err := cloud.LoadSigningKey(key("fleet.key"))
	if err != nil {
		return err
	}
	secret, err := cloud.LoadSecret(key("enrol.secret"))
	if err != nil {
		return err
	}
	ca, err := cloud.LoadCA(key("ca.pem"), key("ca.key"))
	if err != nil {
		return err
	}
	cas, err := loadCAs(n.cfg.EKCA)
	if err != nil {
		return err
	}
	f := &fleet.Fleet{
		Bus: n.bus, Tenants: tenants, Key: signer, EnrolKey: secret, EKRoots: cas, CA: ca,
		Log: log, Now: time.Now, Metrics: n.counts, Disconnect: n.server.Disconnect,
	}
	n.server.SetRevoked(f.Revoked)
	n.start = append(n.start, f.Run)
	return nil
}

func (n *Node) bridge(log *slog.Logger) error {
	pool, err := cloud.LoadPool(n.cfg.Bridge.CA)
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(n.cfg.Bridge.Cert, n.cfg.Bridge.Key)
	if err != nil {
		return fmt.Errorf("the bridge's certificate: %w", err)
	}
	b := &bridge.Bridge{NC: n.bus.NC, URL: n.cfg.Bridge.URL, Log: log, TLS: &tls.Config{
		RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13,
	}}
	n.start = append(n.start, b.Run)
	return nil
}

// loadCAs reads every PEM certificate in a directory.
func loadCAs(dir string) ([]*x509.Certificate, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading the TPM manufacturers' certificates: %w", err)
	}
	var out []*x509.Certificate
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("reading the TPM manufacturers' certificates: %w", err)
		}
		for b, rest := pem.Decode(raw); b != nil; b, rest = pem.Decode(rest) {
			cert, err := x509.ParseCertificate(b.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", e.Name(), err)
			}
			out = append(out, cert)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no PEM certificate, so no TPM could ever enrol", dir)
	}
	return out, nil
}

// Run serves until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	defer n.server.Stop()
	g, ctx := errgroup.WithContext(ctx)
	for _, run := range n.start {
		g.Go(func() error { return run(ctx) })
	}
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

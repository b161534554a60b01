package node

import (
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"edgekeep/cloud"
	"edgekeep/internal/cose"
	"edgekeep/internal/durable"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// InitOptions describes a new cloud with its first tenant.
type InitOptions struct {
	Dir    string
	Tenant string
	Hosts  []string // names and addresses of the server
	Now    time.Time
}

// Init makes keys, certificates and trust roots:
//
//	keys/              of the cloud's roles and its TLS
//	tenants/TENANT/    trust roots, the data owner's key, grants; policy.toml goes here
//	operator/          the operator's kit: take it away from here
//	owner/             the data owner's kit, who alone grants reading: another person's
//	consumer/          a consumer's kit: take it away from here
//	monitor/           a certificate that sees every message (all of them sealed)
//	bridge/            the bridge's certificate, for a broker elsewhere
//
// It returns the digest of the trust roots, which every keep is configured with.
func Init(o InitOptions) (digest []byte, err error) {
	if !attest.ValidName(o.Tenant) || o.Tenant == mqtt.Boot || o.Tenant == "monitor" {
		return nil, fmt.Errorf("%q cannot be a tenant's name: 1 to 31 letters, digits and hyphens, and not %q or \"monitor\"", o.Tenant, mqtt.Boot)
	}
	if len(o.Hosts) == 0 {
		return nil, errors.New("a host name or address of the server is needed")
	}
	if _, err := os.Stat(filepath.Join(o.Dir, "keys")); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s holds keys already: they are never overwritten", o.Dir)
	}
	i := initer{InitOptions: o, tenant: filepath.Join("tenants", o.Tenant)}
	for _, d := range []string{"keys", i.tenant, i.tenant + "/grants", "operator", "owner", "consumer", "monitor", "bridge", "data"} {
		if err := os.MkdirAll(i.path(d), 0o700); err != nil {
			return nil, fmt.Errorf("making %s: %w", d, err)
		}
	}
	if err := i.cloud(); err != nil {
		return nil, err
	}
	if err := i.people(); err != nil {
		return nil, err
	}
	return i.roots()
}

type initer struct {
	InitOptions
	tenant string
	ca     *cloud.CA
	keys   map[string]*ecdsa.PrivateKey
	data   hpke.PrivateKey
}

func (i *initer) path(name string) string { return filepath.Join(i.Dir, name) }

func (i *initer) cloud() (err error) {
	if i.ca, err = cloud.NewCA(i.path("keys/ca.pem"), i.path("keys/ca.key"), "Edgekeep "+i.Tenant+" CA", i.Now); err != nil {
		return err
	}
	key, err := cloud.NewSigningKey(i.path("keys/server.key"))
	if err != nil {
		return err
	}
	cert, err := i.ca.IssueServer(i.Hosts, &key.PublicKey, i.Now)
	if err != nil {
		return err
	}
	if err := cloud.WriteCertificate(i.path("keys/server.pem"), cert); err != nil {
		return err
	}
	for _, name := range []string{"challenge", "enrol"} {
		secret := make([]byte, 32)
		rand.Read(secret) // never fails
		if err := durable.WriteFile(i.path("keys/"+name+".secret"), secret, 0o600); err != nil {
			return err
		}
	}
	i.keys = map[string]*ecdsa.PrivateKey{}
	for role, path := range map[string]string{
		"verifier": "keys/verifier.key", "fleet": "keys/fleet.key", "broker": "keys/broker.key",
		"operator": "operator/operator.key", "owner": "owner/owner.key",
	} {
		if i.keys[role], err = cloud.NewSigningKey(i.path(path)); err != nil {
			return err
		}
	}
	i.data, err = cloud.NewHPKEKey(i.path(i.tenant+"/data.key"), true)
	return err
}

// people makes the kits of the operator, a consumer, a monitor and the bridge.
func (i *initer) people() error {
	for _, p := range []struct{ dir, role, cn string }{
		{"operator", cloud.RoleOperator, i.Tenant + "/operator"},
		{"consumer", cloud.RoleConsumer, i.Tenant + "/consumer"},
		{"monitor", cloud.RoleMonitor, "monitor"},
		{"bridge", cloud.RoleBridge, "bridge"},
	} {
		key, err := cloud.NewSigningKey(i.path(p.dir + "/tls.key"))
		if err != nil {
			return err
		}
		cert, err := i.ca.Issue(p.role, p.cn, &key.PublicKey, i.Now, 2*365*24*time.Hour)
		if err != nil {
			return err
		}
		if err := cloud.WriteCertificate(i.path(p.dir+"/tls.pem"), cert); err != nil {
			return err
		}
		if err := cloud.WriteCertificate(i.path(p.dir+"/ca.pem"), i.ca.Certificate()); err != nil {
			return err
		}
		kit := fmt.Sprintf("# The kit of %s. Give its directory to edgekeep with --kit.\ntenant = %q\nserver = %q # where edgekeep-cloud listens for people\n",
			p.cn, i.Tenant, "tls://"+i.Hosts[0]+":4222")
		if p.role == cloud.RoleConsumer {
			kit += "consumer = \"consumer\" # the name in the data owner's grant\n"
		}
		if err := durable.WriteFile(i.path(p.dir+"/kit.toml"), []byte(kit), 0o600); err != nil {
			return err
		}
	}
	kit := fmt.Sprintf("# The data owner's kit: for `edgekeep data grant`.\ntenant = %q\nserver = \"\"\n", i.Tenant)
	if err := durable.WriteFile(i.path("owner/kit.toml"), []byte(kit), 0o600); err != nil {
		return err
	}
	key, err := cloud.NewHPKEKey(i.path("consumer/consumer.key"), false)
	if err != nil {
		return err
	}
	grant, err := message.Grant{Tenant: i.Tenant, Consumer: "consumer", Key: cose.MarshalHPKEKey(key.PublicKey())}.Sign(i.keys["owner"])
	if err != nil {
		return err
	}
	if err := durable.WriteFile(i.path("consumer/grant.cbor"), grant, 0o644); err != nil {
		return err
	}
	return durable.WriteFile(i.path(i.tenant+"/grants/consumer.cbor"), grant, 0o644)
}

func (i *initer) roots() ([]byte, error) {
	pub := func(role string) attest.Key { return cose.MarshalKey(&i.keys[role].PublicKey) }
	bundle := cose.MustMarshal(attest.Roots{
		Tenant: i.Tenant, Operator: pub("operator"), Verifier: pub("verifier"), Fleet: pub("fleet"),
		Broker: pub("broker"), Owner: pub("owner"), Data: cose.MarshalHPKEKey(i.data.PublicKey()),
	})
	t, err := attest.ParseRoots(bundle)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{i.tenant, "operator", "owner", "consumer"} {
		if err := durable.WriteFile(i.path(dir+"/roots.cbor"), bundle, 0o644); err != nil {
			return nil, err
		}
	}
	return t.Digest, nil
}

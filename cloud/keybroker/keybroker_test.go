package keybroker_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud"
	"edgekeep/cloud/keybroker"
	"edgekeep/cloud/node"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

var (
	dir string
	bus *cloud.Bus
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	var err error
	if dir, err = os.MkdirTemp("", "broker"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	for _, tenant := range []string{"acme", "globex"} {
		if _, err := node.Init(node.InitOptions{Dir: path(tenant), Tenant: tenant, Hosts: []string{"127.0.0.1"}, Now: time.Now()}); err != nil {
			panic(err)
		}
	}
	if err := os.Rename(path("globex/tenants/globex"), path("acme/tenants/globex")); err != nil {
		panic(err)
	}
	srv := must(cloud.StartServer(cloud.ServerConfig{
		Dir: path("data"), Host: "127.0.0.1", ClientPort: -1,
		Cert: path("acme/keys/server.pem"), Key: path("acme/keys/server.key"), ClientCA: path("acme/keys/ca.pem"),
	}))
	defer srv.Stop()
	ctx, cancel := context.WithCancel(context.Background())
	bus = must(cloud.Open(ctx, must(srv.Connect()), 1))
	b := &keybroker.Broker{
		Bus: bus, Tenants: &cloud.Tenants{Dir: path("acme/tenants")}, Key: key("acme", "keys/broker.key"),
		Data: func(tenant string) (hpke.PrivateKey, error) {
			return cloud.LoadHPKEKey(path("acme/tenants/" + tenant + "/data.key"))
		},
		Log: slog.New(slog.DiscardHandler), Now: time.Now,
	}
	had, ended := bus.NC.NumSubscriptions(), make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	for bus.NC.NumSubscriptions() < had+3 {
		time.Sleep(time.Millisecond)
	}
	code := m.Run()
	cancel()
	<-ended
	return code
}

func path(name string) string { return filepath.Join(dir, name) }

func key(tenant, name string) *ecdsa.PrivateKey {
	return must(cloud.LoadSigningKey(path(tenant + "/" + name))).(*ecdsa.PrivateKey)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

// producer is a gateway whose stream key is stored.
type producer struct {
	name    string
	key     *ecdsa.PrivateKey
	epoch   sealing.Epoch
	secret  []byte
	message []byte
}

// data is the public half of a tenant's data key.
func data(tenant string) hpke.PublicKey {
	return must(cloud.LoadHPKEKey(path("acme/tenants/" + tenant + "/data.key"))).PublicKey()
}

func newProducer(name string) *producer {
	p := &producer{name: name, key: newKey(), epoch: sealing.NewEpoch(5, [8]byte{1, 2}), secret: make([]byte, sealing.KeySize)}
	rand.Read(p.secret)
	p.message = must(sealing.SealStreamKey(p.key, sealing.TypStreamKey, "acme/"+name, "temp", p.epoch, p.secret, data("acme")))
	return p
}

// store files a stream key as the fleet does.
func (p *producer) store(t testing.TB, stream string, msg, verdict []byte) {
	t.Helper()
	if _, err := cloud.Change(deadline(t), bus.Keys, "acme."+p.name+"."+stream+"."+p.epoch.String(), func(k *keybroker.StreamKey, _ bool) error {
		*k = keybroker.StreamKey{Message: msg, Verdict: verdict}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func deadline(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// verdict is an affirming one.
func verdict(subject, tenant string, epoch *ecdsa.PrivateKey, change func(*attest.Verdict)) attest.Verdict {
	now := time.Now().Unix()
	v := attest.Vector{Instance: 2, Configuration: 2, Executables: 3, Hardware: 2, Storage: 2}
	out := attest.Verdict{
		Subject: subject, Audience: tenant, IssuedAt: now, Expires: now + 600, Nonce: make([]byte, 32), Profile: attest.VerdictProfile,
		Cnf:     attest.Confirmation{Key: cose.MarshalKey(&epoch.PublicKey)},
		Submods: map[string]attest.Appraisal{attest.Submodule: {Status: v.Status(), Vector: v}}, Assurance: "tpm",
	}
	if change != nil {
		change(&out)
	}
	return out
}

func contraindicated(v *attest.Verdict) {
	bad := attest.Vector{Instance: 2, Executables: 96}
	v.Submods[attest.Submodule] = attest.Appraisal{Status: bad.Status(), Vector: bad}
}

func signed(v attest.Verdict) []byte { return must(v.Sign(key("acme", "keys/verifier.key"))) }

func (p *producer) request() keybroker.Request {
	return keybroker.Request{Gateway: p.name, Stream: "temp", Epoch: p.epoch[:]}
}

func ask(t testing.TB, tenant string, r keybroker.Request) (message.Release, error) {
	t.Helper()
	return cloud.Ask[message.Release](deadline(t), bus.NC, "api."+tenant+".data.key", r)
}

// opens checks that a release is for key, by our broker, and holds the secret.
func (p *producer) opens(t *testing.T, rel message.Release, to hpke.PrivateKey) {
	t.Helper()
	h, secret, err := sealing.OpenStreamKey(&key("acme", "keys/broker.key").PublicKey, sealing.TypRelease, rel.Message, to)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(secret, p.secret) || h.Subject != "acme/"+p.name || h.Stream != "temp" || h.Epoch != p.epoch {
		t.Errorf("it is the key of %+v", h)
	}
	if !p.key.PublicKey.Equal(must(cose.UnmarshalKey(rel.EpochKey))) {
		t.Error("another epoch key came with it")
	}
	if v := must(attest.VerifyVerdict(&key("acme", "keys/verifier.key").PublicKey, rel.Verdict)); v.Subject != "acme/"+p.name {
		t.Errorf("the verdict is about %s", v.Subject)
	}
	if _, _, err := sealing.OpenStreamKey(&p.key.PublicKey, sealing.TypStreamKey, rel.Message, to); err == nil {
		t.Error("a release passes for a gateway's stream key")
	}
}

func TestReleaseToAConsumer(t *testing.T) {
	p := newProducer("plain")
	p.store(t, "temp", p.message, signed(verdict("acme/plain", "acme", p.key, nil)))
	r := p.request()
	r.Consumer = "consumer"
	p.opens(t, must(ask(t, "acme", r)), must(cloud.LoadHPKEKey(path("acme/consumer/consumer.key"))))
}

// The producer's verdict counted when its data was accepted; that it has expired
// since takes nothing away.
func TestReleaseOfOldData(t *testing.T) {
	p := newProducer("old")
	next := newKey()
	p.store(t, "temp", p.message, signed(verdict("acme/old", "acme", next, func(v *attest.Verdict) {
		v.Expires = time.Now().Unix() - 1000
		v.Prior = []attest.Key{cose.MarshalKey(&newKey().PublicKey), cose.MarshalKey(&p.key.PublicKey)}
	})))
	r := p.request()
	r.Consumer = "consumer"
	p.opens(t, must(ask(t, "acme", r)), must(cloud.LoadHPKEKey(path("acme/consumer/consumer.key"))))
}

func TestReleaseToAGateway(t *testing.T) {
	p := newProducer("producer")
	p.store(t, "temp", p.message, signed(verdict("acme/producer", "acme", p.key, nil)))
	grant(t, "gateway-reader", key("acme", "owner/owner.key"), message.Grant{Tenant: "acme", Consumer: "reader", Gateway: true})
	enrol(t, "reader", false)
	for _, kem := range []hpke.KEM{hpke.MLKEM768P256(), hpke.DHKEM(ecdh.P256())} {
		to := must(kem.GenerateKey())
		r := p.request()
		r.Verdict = signed(verdict("acme/reader", "acme", newKey(), func(v *attest.Verdict) {
			v.Keys = map[string]attest.Key{attest.PurposeReceive: cose.MarshalHPKEKey(to.PublicKey())}
		}))
		rel := must(ask(t, "acme", r))
		p.opens(t, rel, to)
		if _, _, err := sealing.OpenStreamKey(&key("acme", "keys/broker.key").PublicKey, sealing.TypRelease, rel.Message, must(kem.GenerateKey())); err == nil {
			t.Error("another key opens it")
		}
		enrol(t, "reader", true)
		if _, err := ask(t, "acme", r); err == nil {
			t.Error("a revoked gateway was given a key")
		}
		enrol(t, "reader", false)
	}
}

// A producer gets its own streams back without a grant; what it may not have of
// others stays so, and its verdict has to be its own, good, and about who asks.
func TestReleaseToAGatewayThatAsks(t *testing.T) {
	p, other := newProducer("selfmade"), newProducer("theirs")
	p.store(t, "temp", p.message, signed(verdict("acme/selfmade", "acme", p.key, nil)))
	other.store(t, "temp", other.message, signed(verdict("acme/theirs", "acme", other.key, nil)))
	enrol(t, "selfmade", false)
	to := must(hpke.MLKEM768P256().GenerateKey())
	vouch := func(change func(*attest.Verdict)) []byte {
		return signed(verdict("acme/selfmade", "acme", newKey(), func(v *attest.Verdict) { // after a restart
			v.Keys = map[string]attest.Key{attest.PurposeReceive: cose.MarshalHPKEKey(to.PublicKey())}
			if change != nil {
				change(v)
			}
		}))
	}
	ask := func(tenant, gateway string, of *producer, verdict []byte) (message.Release, error) {
		return cloud.Ask[message.Release](deadline(t), bus.NC, "svc.key", keybroker.GatewayRequest{
			Tenant: tenant, Gateway: gateway, Asked: message.AskedKey{Gateway: of.name, Stream: "temp", Epoch: of.epoch[:], Verdict: verdict},
		})
	}
	p.opens(t, must(ask("acme", "selfmade", p, vouch(nil))), to)
	subject := func(s string) func(*attest.Verdict) { return func(v *attest.Verdict) { v.Subject = s } }
	for _, x := range []struct {
		name, tenant, gateway string
		of                    *producer
		verdict               []byte
		want                  string
	}{
		{"another's stream", "acme", "selfmade", other, vouch(nil), "has no grant"},
		{"another's verdict", "acme", "theirs", p, vouch(nil), "but acme/theirs asks"},
		{"its own stream under another's verdict", "acme", "selfmade", p, vouch(subject("acme/theirs")), "but acme/selfmade asks"},
		{"another tenant's gateway", "globex", "selfmade", p, vouch(nil), "but globex/selfmade asks"},
		{"another tenant's verdict", "globex", "selfmade", p, vouch(subject("globex/selfmade")), "verdict"},
		{"an expired verdict", "acme", "selfmade", p, vouch(func(v *attest.Verdict) { v.Expires = time.Now().Unix() }), "expired"},
		{"a contraindicated verdict", "acme", "selfmade", p, vouch(contraindicated), "contraindicated"},
		{"no receiving key", "acme", "selfmade", p, vouch(func(v *attest.Verdict) { v.Keys = nil }), "no receiving key"},
		{"garbage", "acme", "selfmade", p, []byte("garbage"), "recipient's verdict"},
		{"nothing", "acme", "selfmade", p, nil, "recipient's verdict"},
		{"a verdict that it signed itself", "acme", "selfmade", p, must(verdict("acme/selfmade", "acme", p.key, nil).Sign(p.key)), "recipient's verdict"},
	} {
		if _, err := ask(x.tenant, x.gateway, x.of, x.verdict); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
	grant(t, "gateway-selfmade", key("acme", "owner/owner.key"), message.Grant{Tenant: "acme", Consumer: "selfmade", Gateway: true})
	other.opens(t, must(ask("acme", "selfmade", other, vouch(nil))), to)
	enrol(t, "selfmade", true)
	if _, err := ask("acme", "selfmade", p, vouch(nil)); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("a revoked producer: %v", err)
	}
}

// enrol makes a gateway of tenant acme.
func enrol(t testing.TB, name string, revoked bool) {
	t.Helper()
	if _, err := cloud.Change(deadline(t), bus.Gateways, "acme."+name, func(g *cloud.Gateway, _ bool) error {
		g.Tenant, g.Name, g.Revoked = "acme", name, revoked
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// grant files a grant of tenant acme.
func grant(t testing.TB, file string, by *ecdsa.PrivateKey, g message.Grant) {
	t.Helper()
	if err := os.WriteFile(path("acme/tenants/acme/grants/"+file+".cbor"), must(g.Sign(by)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRecipientsRefused(t *testing.T) {
	p := newProducer("refusing")
	p.store(t, "temp", p.message, signed(verdict("acme/refusing", "acme", p.key, nil)))
	consumer := cose.MarshalHPKEKey(must(hpke.MLKEM768P256().GenerateKey()).PublicKey())
	owner := key("acme", "owner/owner.key")
	grant(t, "expired", owner, message.Grant{Tenant: "acme", Consumer: "expired", Key: consumer, Expires: time.Now().Unix()})
	grant(t, "by-operator", key("acme", "operator/operator.key"), message.Grant{Tenant: "acme", Consumer: "by-operator", Key: consumer})
	grant(t, "by-verifier", key("acme", "keys/verifier.key"), message.Grant{Tenant: "acme", Consumer: "by-verifier", Key: consumer})
	grant(t, "by-other", key("globex", "owner/owner.key"), message.Grant{Tenant: "acme", Consumer: "by-other", Key: consumer})
	grant(t, "renamed", owner, message.Grant{Tenant: "acme", Consumer: "somebody", Key: consumer})
	grant(t, "foreign", owner, message.Grant{Tenant: "globex", Consumer: "foreign", Key: consumer})
	grant(t, "no-key", owner, message.Grant{Tenant: "acme", Consumer: "no-key", Key: cose.MarshalKey(&owner.PublicKey)})
	if err := os.WriteFile(path("acme/tenants/acme/grants/garbage.cbor"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	grant(t, "gateway-reader", owner, message.Grant{Tenant: "acme", Consumer: "reader", Gateway: true})
	grant(t, "gateway-expired", owner, message.Grant{Tenant: "acme", Consumer: "expired", Gateway: true, Expires: time.Now().Unix()})
	grant(t, "gateway-person", owner, message.Grant{Tenant: "acme", Consumer: "person", Key: consumer})
	grant(t, "gateway-by-operator", key("acme", "operator/operator.key"), message.Grant{Tenant: "acme", Consumer: "by-operator", Gateway: true})
	subject := func(s string) func(*attest.Verdict) { return func(v *attest.Verdict) { v.Subject = s } }
	reader := func(change func(*attest.Verdict)) attest.Verdict {
		return verdict("acme/reader", "acme", newKey(), func(v *attest.Verdict) {
			v.Keys = map[string]attest.Key{attest.PurposeReceive: consumer}
			if change != nil {
				change(v)
			}
		})
	}
	good := signed(reader(nil))
	if _, err := ask(t, "acme", with(p.request(), "", good)); err != nil {
		t.Fatalf("a good verdict is refused, so this tests nothing: %v", err)
	}
	for _, x := range []struct {
		name     string
		consumer string
		verdict  []byte
		want     string
	}{
		{"nobody", "", nil, "for whom"},
		{"both", "consumer", good, "not both"},
		{"no grant", "stranger", nil, "has no grant"},
		{"a path", "../../../operator/operator", nil, "not a consumer's name"},
		{"an expired grant", "expired", nil, "expired"},
		{"granted by the operator", "by-operator", nil, "the grant of by-operator"},
		{"granted by the verifier", "by-verifier", nil, "the grant of by-verifier"},
		{"granted by another tenant's owner", "by-other", nil, "the grant of by-other"},
		{"somebody else's grant", "renamed", nil, "for another: acme/somebody"},
		{"another tenant's grant", "foreign", nil, "for another: globex/foreign"},
		{"a gateway's grant", "gateway-reader", nil, "for another: acme/reader"},
		{"a gateway without grant", "", signed(reader(subject("acme/stranger"))), "has no grant"},
		{"a gateway whose grant has expired", "", signed(reader(subject("acme/expired"))), "has expired"},
		{"a gateway with a person's grant", "", signed(reader(subject("acme/person"))), "for another"},
		{"a gateway granted by the operator", "", signed(reader(subject("acme/by-operator"))), "the grant of by-operator"},
		{"a verdict about another tenant's gateway", "", signed(reader(subject("globex/reader"))), "globex"},
		{"a grant without HPKE key", "no-key", nil, "the grant of no-key"},
		{"no grant at all", "garbage", nil, "the grant of garbage"},
		{"an expired verdict", "", signed(reader(func(v *attest.Verdict) { v.Expires = time.Now().Unix() })), "expired"},
		{"a contraindicated verdict", "", signed(reader(contraindicated)), "contraindicated"},
		{"a verdict for another tenant", "", signed(reader(func(v *attest.Verdict) { v.Audience = "globex" })), "for globex"},
		{"a verdict by another tenant's verifier", "", must(reader(nil).Sign(key("globex", "keys/verifier.key"))), "recipient's verdict"},
		{"a verdict by the fleet", "", must(reader(nil).Sign(key("acme", "keys/fleet.key"))), "recipient's verdict"},
		{"a verdict without receiving key", "", signed(reader(func(v *attest.Verdict) { v.Keys = nil })), "no receiving key"},
		{"a TLS key to receive with", "", signed(reader(func(v *attest.Verdict) {
			v.Keys = map[string]attest.Key{attest.PurposeReceive: cose.MarshalKey(&owner.PublicKey)}
		})), "no receiving key"},
		{"garbage", "", []byte("garbage"), "recipient's verdict"},
	} {
		if _, err := ask(t, "acme", with(p.request(), x.consumer, x.verdict)); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
	if _, err := ask(t, "globex", with(p.request(), "consumer", nil)); err == nil || !strings.Contains(err.Error(), "no key of stream") {
		t.Errorf("asked as another tenant: %v", err)
	}
	if _, err := ask(t, "nobody", with(p.request(), "consumer", nil)); err == nil {
		t.Error("an unknown tenant was answered")
	}
}

func with(r keybroker.Request, consumer string, verdict []byte) keybroker.Request {
	r.Consumer, r.Verdict = consumer, verdict
	return r
}

func TestProducersRefused(t *testing.T) {
	for i, x := range []struct {
		name string
		file func(p *producer) (msg, verdict []byte)
		want string
	}{
		{"no verdict vouches for the signer", func(p *producer) ([]byte, []byte) {
			return p.message, signed(verdict("acme/"+p.name, "acme", newKey(), nil))
		}, "does not vouch for the key"},
		{"the verdict is about another gateway", func(p *producer) ([]byte, []byte) {
			return p.message, signed(verdict("acme/other", "acme", p.key, nil))
		}, "does not vouch for this gateway"},
		{"the verdict is for another tenant", func(p *producer) ([]byte, []byte) {
			return p.message, signed(verdict("acme/"+p.name, "globex", p.key, nil))
		}, "does not vouch for this gateway"},
		{"the verdict is contraindicated", func(p *producer) ([]byte, []byte) {
			return p.message, signed(verdict("acme/"+p.name, "acme", p.key, contraindicated))
		}, "does not vouch for this gateway"},
		{"the verdict is signed by the fleet", func(p *producer) ([]byte, []byte) {
			return p.message, must(verdict("acme/"+p.name, "acme", p.key, nil).Sign(key("acme", "keys/fleet.key")))
		}, "producer's verdict"},
		{"the verdict is garbage", func(p *producer) ([]byte, []byte) { return p.message, []byte("x") }, "producer's verdict"},
		{"the key is garbage", func(p *producer) ([]byte, []byte) {
			return []byte("x"), signed(verdict("acme/"+p.name, "acme", p.key, nil))
		}, "malformed"},
		{"the key is of another stream", func(p *producer) ([]byte, []byte) {
			return must(sealing.SealStreamKey(p.key, sealing.TypStreamKey, "acme/"+p.name, "other", p.epoch, p.secret, data("acme"))), signed(verdict("acme/"+p.name, "acme", p.key, nil))
		}, "of another stream"},
		{"the key is of another gateway", func(p *producer) ([]byte, []byte) {
			return must(sealing.SealStreamKey(p.key, sealing.TypStreamKey, "acme/other", "temp", p.epoch, p.secret, data("acme"))), signed(verdict("acme/"+p.name, "acme", p.key, nil))
		}, "of another stream"},
		{"the key is of another epoch", func(p *producer) ([]byte, []byte) {
			return must(sealing.SealStreamKey(p.key, sealing.TypStreamKey, "acme/"+p.name, "temp", sealing.NewEpoch(6, [8]byte{}), p.secret, data("acme"))), signed(verdict("acme/"+p.name, "acme", p.key, nil))
		}, "of another stream"},
		{"the key is a release", func(p *producer) ([]byte, []byte) {
			return must(sealing.SealStreamKey(p.key, sealing.TypRelease, "acme/"+p.name, "temp", p.epoch, p.secret, data("acme"))), signed(verdict("acme/"+p.name, "acme", p.key, nil))
		}, "stream key"},
		{"the key is sealed to another owner", func(p *producer) ([]byte, []byte) {
			return must(sealing.SealStreamKey(p.key, sealing.TypStreamKey, "acme/"+p.name, "temp", p.epoch, p.secret, data("globex"))), signed(verdict("acme/"+p.name, "acme", p.key, nil))
		}, "stream key"},
	} {
		p := newProducer("bad" + string(rune('a'+i)))
		msg, verdict := x.file(p)
		p.store(t, "temp", msg, verdict)
		if rel, err := ask(t, "acme", with(p.request(), "consumer", nil)); err == nil || !strings.Contains(err.Error(), x.want) || len(rel.Message) != 0 {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
}

func TestRequestsRefused(t *testing.T) {
	p := newProducer("requests")
	p.store(t, "temp", p.message, signed(verdict("acme/requests", "acme", p.key, nil)))
	for name, change := range map[string]func(*keybroker.Request){
		"no gateway":      func(r *keybroker.Request) { r.Gateway = "" },
		"any gateway":     func(r *keybroker.Request) { r.Gateway = "*" },
		"a subject":       func(r *keybroker.Request) { r.Gateway = "requests.temp" },
		"any stream":      func(r *keybroker.Request) { r.Stream = ">" },
		"half an epoch":   func(r *keybroker.Request) { r.Epoch = r.Epoch[:8] },
		"another epoch":   func(r *keybroker.Request) { r.Epoch = make([]byte, 16) },
		"another stream":  func(r *keybroker.Request) { r.Stream = "other" },
		"another gateway": func(r *keybroker.Request) { r.Gateway = "nobody" },
	} {
		r := with(p.request(), "consumer", nil)
		change(&r)
		if _, err := ask(t, "acme", r); err == nil {
			t.Errorf("%s: answered", name)
		}
	}
}

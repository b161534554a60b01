package fleet_test

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/cloud/node"
	"edgekeep/cloud/verifier"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
)

// One server with two tenants serves all tests; each test uses gateways of its
// own, and starts the fleet that it tests.
var (
	dir     string
	srv     *cloud.Server
	bus     *cloud.Bus
	tenants *cloud.Tenants
	signers = map[string]map[string]*ecdsa.PrivateKey{} // by tenant and role
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	var err error
	if dir, err = os.MkdirTemp("", "fleet"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	for _, tenant := range []string{"acme", "globex"} {
		home := filepath.Join(dir, tenant)
		if _, err := node.Init(node.InitOptions{Dir: home, Tenant: tenant, Hosts: []string{"127.0.0.1"}, Now: time.Now()}); err != nil {
			panic(err)
		}
		signers[tenant] = map[string]*ecdsa.PrivateKey{}
		for role, file := range map[string]string{"verifier": "keys/verifier.key", "fleet": "keys/fleet.key", "operator": "operator/operator.key", "owner": "owner/owner.key"} {
			signers[tenant][role] = must(cloud.LoadSigningKey(filepath.Join(home, file))).(*ecdsa.PrivateKey)
		}
	}
	if err := os.Rename(filepath.Join(dir, "globex/tenants/globex"), filepath.Join(dir, "acme/tenants/globex")); err != nil {
		panic(err)
	}
	tenants = &cloud.Tenants{Dir: filepath.Join(dir, "acme/tenants")}
	keys := filepath.Join(dir, "acme/keys")
	srv = must(cloud.StartServer(cloud.ServerConfig{
		Dir: filepath.Join(dir, "data"), Host: "127.0.0.1", ClientPort: -1,
		Cert: filepath.Join(keys, "server.pem"), Key: filepath.Join(keys, "server.key"), ClientCA: filepath.Join(keys, "ca.pem"),
	}))
	defer srv.Stop()
	bus = openBus()
	return m.Run()
}

func openBus() *cloud.Bus {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return must(cloud.Open(ctx, must(srv.Connect()), 1))
}

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

// subscriptions is how many a fleet makes: twenty questions, eight topics.
const subscriptions = 28

// startFleet starts a replica and returns when it listens. It ends with the
// test, or with the function returned.
func startFleet(t testing.TB) (*fleet.Fleet, func()) {
	t.Helper()
	b := openBus()
	f := &fleet.Fleet{
		Bus: b, Tenants: tenants, Key: signers["acme"]["fleet"], EnrolKey: make([]byte, 32),
		Log: slog.New(slog.DiscardHandler), Now: time.Now, Metrics: &cloud.Counts{},
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	had := b.NC.NumSubscriptions()
	go func() { ended <- f.Run(ctx) }()
	eventually(t, "the fleet listens", func() bool { return b.NC.NumSubscriptions() >= had+subscriptions })
	if err := b.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the fleet ended with %v", err)
		}
		b.NC.Close()
	}
	t.Cleanup(stop)
	return f, stop
}

// eventually polls for what has no event to wait for.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	ctx := deadline(t)
	for !f() {
		if ctx.Err() != nil {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// gateway plays a gateway: it seals as the keep does.
type gateway struct {
	t            testing.TB
	tenant, name string
	key          *ecdsa.PrivateKey // of this epoch
	epoch        sealing.Epoch
	counter      uint64
	last         map[string]sealing.Before
	streams      map[string]*stream
	acks         *nats.Subscription
}

type stream struct {
	aead cipher.AEAD
	seq  uint64
	prev []byte
}

// enrolled is a gateway with an affirming verdict.
func enrolled(t testing.TB, tenant, name string) *gateway {
	t.Helper()
	g := &gateway{t: t, tenant: tenant, name: name, last: map[string]sealing.Before{}}
	forget(t, cloud.Key(tenant, name))
	entry := cloud.Gateway{Tenant: tenant, Name: name, EKHash: make([]byte, 32), CertExpires: time.Now().AddDate(1, 0, 0).Unix()}
	if err := cloud.Put(deadline(t), bus.Gateways, cloud.Key(tenant, name), entry, 0); err != nil {
		t.Fatal(err)
	}
	g.acks = must(bus.NC.SubscribeSync("ek1." + tenant + "." + name + ".down.ack"))
	t.Cleanup(func() { _ = g.acks.Unsubscribe() })
	g.start()
	g.setVerdict(g.verdict())
	return g
}

// forget removes what an earlier run of a test has left of a gateway.
func forget(t testing.TB, key string) {
	t.Helper()
	for _, kv := range []jetstream.KeyValue{bus.Gateways, bus.Latest, bus.Commands, bus.EKs} {
		if err := kv.Purge(deadline(t), key); err != nil {
			t.Fatal(err)
		}
	}
	for prefix, s := range map[string]jetstream.Stream{
		"rec.": bus.Rec, "fork.": bus.Fork, "find.": bus.Findings,
		"$KV.hellos.": must(bus.JS.Stream(deadline(t), "KV_hellos")), "$KV.keys.": must(bus.JS.Stream(deadline(t), "KV_keys")),
	} {
		for _, subject := range []string{prefix + key, prefix + key + ".>"} {
			if err := s.Purge(deadline(t), jetstream.WithPurgeSubject(subject)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (g *gateway) subject() string { return g.tenant + "/" + g.name }

// start is a start of the keep: a new epoch and a new key.
func (g *gateway) start() {
	g.key = newKey()
	g.counter++
	g.epoch = sealing.NewEpoch(g.counter, [8]byte{byte(g.counter)})
	g.streams = map[string]*stream{}
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

// verdict is an affirming one on the gateway as it is.
func (g *gateway) verdict(prior ...*ecdsa.PrivateKey) attest.Verdict {
	now := time.Now().Unix()
	v := attest.Vector{Instance: 2, Configuration: 2, Executables: 3, Hardware: 2, Storage: 2}
	out := attest.Verdict{
		Subject: g.subject(), Audience: g.tenant, IssuedAt: now, Expires: now + 3600, Nonce: make([]byte, 32), Profile: attest.VerdictProfile,
		Cnf:        attest.Confirmation{Key: cose.MarshalKey(&g.key.PublicKey)},
		Submods:    map[string]attest.Appraisal{attest.Submodule: {Status: v.Status(), Vector: v}},
		VerifierID: attest.VerifierID{Developer: "test"}, ChallengeHash: make([]byte, 32), EvidenceHash: make([]byte, 32), Assurance: "tpm",
	}
	for _, k := range prior {
		out.Prior = append(out.Prior, cose.MarshalKey(&k.PublicKey))
	}
	return out
}

// setVerdict makes a verdict the newest, signed by the tenant's verifier.
func (g *gateway) setVerdict(v attest.Verdict) { g.setVerdictBy(v, signers[g.tenant]["verifier"]) }

func (g *gateway) setVerdictBy(v attest.Verdict, by *ecdsa.PrivateKey) {
	g.t.Helper()
	msg := must(v.Sign(by))
	if _, err := cloud.Change(deadline(g.t), bus.Latest, cloud.Key(g.tenant, g.name), func(b *verifier.Bytes, _ bool) error {
		b.Data = msg
		return nil
	}); err != nil {
		g.t.Fatal(err)
	}
}

// chunk seals n records of a stream.
func (g *gateway) chunk(name string, n int) []byte {
	g.t.Helper()
	var c sealing.Chunk
	s, ok := g.streams[name]
	if !ok {
		secret := make([]byte, sealing.KeySize)
		rand.Read(secret)
		s = &stream{aead: must(sealing.NewAEAD(secret)), prev: make([]byte, 32)}
		g.streams[name] = s
		c.StreamKey = must(sealing.SealStreamKey(g.key, sealing.TypStreamKey, g.subject(), name, g.epoch, secret, dataKey(g.t, g.tenant)))
	}
	for range n {
		var before *sealing.Before
		if b, ok := g.last[name]; ok && s.seq == 0 {
			before = &b
		}
		var p sealing.Pack
		p.Add(sealing.Reading{Name: "temperature", Time: time.Now().UnixNano(), Value: float64(s.seq)})
		r := must(sealing.SealRecord(s.aead, name, g.epoch, s.seq, s.prev, before, p.Marshal(), false))
		c.Records = append(c.Records, r)
		s.prev = sealing.Hash(r)
		s.seq++
	}
	g.last[name] = sealing.Before{Epoch: g.epoch, Count: s.seq, Head: s.prev}
	cp := g.checkpoint(name)
	cp.Cursor = &sealing.Cursor{Session: "driver", Line: s.seq}
	c.Checkpoint = must(cp.Sign(g.key, sealing.TypCheckpoint))
	return c.Marshal()
}

// checkpoint is where a stream stands.
func (g *gateway) checkpoint(name string) sealing.Checkpoint {
	s := g.streams[name]
	return sealing.Checkpoint{Subject: g.subject(), Stream: name, Epoch: g.epoch, Seq: s.seq - 1, Head: s.prev}
}

func dataKey(t testing.TB, tenant string) hpke.PublicKey {
	t.Helper()
	return must(tenants.Tenant(tenant)).Data
}

func (g *gateway) publish(kind string, data []byte) {
	g.t.Helper()
	if err := bus.NC.Publish("ek1."+g.tenant+"."+g.name+".up."+kind, data); err != nil {
		g.t.Fatal(err)
	}
}

// say sends the gateway's word that a chunk is its oldest, and waits until it is
// heard: words and chunks overtake each other.
func (g *gateway) say(oldest sealing.Checkpoint) {
	g.t.Helper()
	g.publish("hello", must(oldest.Sign(g.key, sealing.TypOldest)))
	eventually(g.t, "the word is heard", func() bool {
		got, _, _, err := cloud.Get[sealing.Checkpoint](deadline(g.t), bus.Hellos, cloud.Key(g.tenant, g.name)+"."+oldest.Stream)
		return err == nil && same(got, oldest)
	})
}

// mark waits for the next watermark.
func (g *gateway) mark() sealing.Checkpoint {
	g.t.Helper()
	m, err := g.acks.NextMsgWithContext(deadline(g.t))
	if err != nil {
		g.t.Fatalf("no watermark came: %v", err)
	}
	return must(sealing.VerifyCheckpoint(&signers["acme"]["fleet"].PublicKey, sealing.TypWatermark, m.Data))
}

// store sends a chunk that comes next, and waits for its watermark.
func (g *gateway) store(data []byte) sealing.Checkpoint {
	g.t.Helper()
	want := g.position(data).Checkpoint
	g.publish("sealed", data)
	if got := g.mark(); !same(got, want) {
		g.t.Fatalf("the watermark is at %d/%d, want %d/%d", got.Epoch.Counter(), got.Seq, want.Epoch.Counter(), want.Seq)
	}
	return want
}

func (g *gateway) position(data []byte) sealing.Position {
	g.t.Helper()
	_, pos, err := sealing.ParseChunk(data)
	if err != nil {
		g.t.Fatal(err)
	}
	return pos
}

func same(a, b sealing.Checkpoint) bool {
	return a.Subject == b.Subject && a.Stream == b.Stream && a.Epoch == b.Epoch && a.Seq == b.Seq && bytes.Equal(a.Head, b.Head)
}

// stored reads what a JetStream stream holds under a subject.
func stored(t testing.TB, s jetstream.Stream, subject string) [][]byte {
	t.Helper()
	var out [][]byte
	for seq := uint64(1); ; {
		m, err := s.GetMsg(deadline(t), seq, jetstream.WithGetMsgSubject(subject))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out, seq = append(out, m.Data), m.Sequence+1
	}
}

func (g *gateway) records(name string) [][]byte {
	return stored(g.t, bus.Rec, "rec."+cloud.Key(g.tenant, g.name)+"."+name)
}

func (g *gateway) asides(name string) [][]byte {
	return stored(g.t, bus.Fork, "fork."+cloud.Key(g.tenant, g.name)+"."+name)
}

// findings are the kinds found of the gateway, in order.
func (g *gateway) findings() string {
	g.t.Helper()
	var out []string
	for _, raw := range stored(g.t, bus.Findings, "find."+cloud.Key(g.tenant, g.name)) {
		var f cloud.Finding
		if err := cose.Unmarshal(raw, &f); err != nil {
			g.t.Fatal(err)
		}
		out = append(out, f.Kind)
	}
	return strings.Join(out, " ")
}

// want holds store and findings against what they must be.
func (g *gateway) want(name string, chunks, asides int, findings string) {
	g.t.Helper()
	if n := len(g.records(name)); n != chunks {
		g.t.Errorf("%d chunks are stored, want %d", n, chunks)
	}
	if n := len(g.asides(name)); n != asides {
		g.t.Errorf("%d chunks are kept aside, want %d", n, asides)
	}
	if f := g.findings(); f != findings {
		g.t.Errorf("found %q, want %q", f, findings)
	}
}

// refusals counts what a fleet refused for a reason.
func refusals(f *fleet.Fleet, reason string) (n uint64) {
	for k, v := range f.Metrics.Of("acme") {
		if strings.HasPrefix(k, "refused: ") && strings.Contains(k, reason) {
			n += v
		}
	}
	return n
}

func nonce(n uint64) []byte {
	return append(make([]byte, 24), binary.BigEndian.AppendUint64(nil, n)...)
}

func name(prefix string, i int) string { return fmt.Sprintf("%s%d", prefix, i) }

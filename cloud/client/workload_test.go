package client_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/client"
	"edgekeep/cloud/fleet"
	"edgekeep/cloud/keybroker"
	"edgekeep/cloud/node"
	"edgekeep/cloud/verifier"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// world is a cloud with one tenant, its people, and a gateway that is played.
type world struct {
	t                         testing.TB
	dir                       string
	bus                       *cloud.Bus
	operator, consumer, owner *client.Kit
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

func (w *world) key(name string) *ecdsa.PrivateKey {
	return must(cloud.LoadSigningKey(filepath.Join(w.dir, name))).(*ecdsa.PrivateKey)
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	path := func(name string) string { return filepath.Join(w.dir, name) }
	must(node.Init(node.InitOptions{Dir: w.dir, Tenant: "acme", Hosts: []string{"127.0.0.1"}, Now: time.Now()}))
	srv := must(cloud.StartServer(cloud.ServerConfig{
		Dir: path("data"), Host: "127.0.0.1", ClientPort: -1,
		Cert: path("keys/server.pem"), Key: path("keys/server.key"), ClientCA: path("keys/ca.pem"),
	}))
	ctx, cancel := context.WithCancel(context.Background())
	w.bus = must(cloud.Open(ctx, must(srv.Connect()), 1))
	tenants, quiet := &cloud.Tenants{Dir: path("tenants")}, slog.New(slog.DiscardHandler)
	f := &fleet.Fleet{Bus: w.bus, Tenants: tenants, Key: w.key("keys/fleet.key"), EnrolKey: make([]byte, 32), Log: quiet, Now: time.Now, Metrics: &cloud.Counts{}}
	b := &keybroker.Broker{Bus: w.bus, Tenants: tenants, Key: w.key("keys/broker.key"), Log: quiet, Now: time.Now, Data: func(string) (hpke.PrivateKey, error) {
		return cloud.LoadHPKEKey(path("tenants/acme/data.key"))
	}}
	ended := make(chan error, 2)
	go func() { ended <- f.Run(ctx) }()
	go func() { ended <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-ended
		<-ended
		srv.Stop()
	})
	for name, kit := range map[string]**client.Kit{"operator": &w.operator, "consumer": &w.consumer, "owner": &w.owner} {
		*kit = must(client.LoadKit(path(name)))
		(*kit).Server = srv.ClientURL()
	}
	return w
}

func (w *world) connect(k *client.Kit) *client.Client {
	w.t.Helper()
	c := must(k.Connect())
	w.t.Cleanup(c.Close)
	for { // until the roles answer
		if _, err := c.Inspect(deadline(w.t), "nobody"); err != nil && strings.Contains(err.Error(), "there is no instance") {
			return c
		}
	}
}

// gateway plays a gateway with its keep.
type gateway struct {
	*world
	name    string
	key     *ecdsa.PrivateKey
	receive hpke.PrivateKey
	nonce   []byte
	change  func(*attest.Verdict)
	attests atomic.Int64

	sealed uint64
	prev   []byte
}

func (w *world) gateway(name string) *gateway {
	w.t.Helper()
	g := &gateway{world: w, name: name, prev: make([]byte, 32)}
	if err := cloud.Put(deadline(w.t), w.bus.Gateways, cloud.Key("acme", name), cloud.Gateway{Tenant: "acme", Name: name, EKHash: make([]byte, 32)}, 0); err != nil {
		w.t.Fatal(err)
	}
	g.restart()
	return g
}

// restart makes new keys, as a start of the keep does.
func (g *gateway) restart() {
	g.key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	g.receive = must(hpke.MLKEM768P256().GenerateKey())
}

// serve attests whenever it is asked to, and answers commands and requests, until
// the test ends.
func (g *gateway) serve() {
	hints := must(g.bus.NC.SubscribeSync("ek1.acme." + g.name + ".down.*"))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	g.t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for {
			m, err := hints.NextMsgWithContext(ctx)
			if err != nil {
				return
			}
			switch m.Subject[strings.LastIndex(m.Subject, ".")+1:] {
			case "notify":
				g.next(ctx)
			case "peer":
				g.infer(m)
			}
		}
	}()
	if err := g.bus.NC.Flush(); err != nil {
		g.t.Fatal(err)
	}
}

// next does what the queue says.
func (g *gateway) next(ctx context.Context) {
	q, _, _, err := cloud.Get[fleet.Queue](ctx, g.bus.Commands, cloud.Key("acme", g.name))
	if err != nil {
		return
	}
	if q.Attest {
		g.attest(ctx)
	}
	for _, p := range q.Pending {
		sum := sha(p.Message)
		r := message.Result{Subject: "acme/" + g.name, Sequence: p.Sequence, Command: sum, Done: true}
		g.up("result", must(r.Sign(g.key)))
	}
}

func (g *gateway) attest(ctx context.Context) {
	g.attests.Add(1)
	g.nonce = make([]byte, 32)
	rand.Read(g.nonce)
	now := time.Now().Unix()
	vec := attest.Vector{Instance: 2, Configuration: 2, Executables: 3, Hardware: 2, Storage: 2}
	v := attest.Verdict{
		Subject: "acme/" + g.name, Audience: "acme", IssuedAt: now, NotBefore: now, Expires: now + 600, Nonce: g.nonce, Profile: attest.VerdictProfile,
		Cnf:     attest.Confirmation{Key: cose.MarshalKey(&g.key.PublicKey)},
		Keys:    map[string]attest.Key{attest.PurposeReceive: cose.MarshalHPKEKey(g.receive.PublicKey())},
		Submods: map[string]attest.Appraisal{attest.Submodule: {Status: vec.Status(), Vector: vec}}, Assurance: "tpm",
	}
	if g.change != nil {
		g.change(&v)
	}
	msg := must(v.Sign(g.world.key("keys/verifier.key")))
	_, _ = g.bus.JS.Publish(ctx, "ev.acme."+g.name, []byte("evidence"))
	_, _ = cloud.Change(ctx, g.bus.Latest, cloud.Key("acme", g.name), func(b *verifier.Bytes, _ bool) error { b.Data = msg; return nil })
	_ = g.bus.NC.Publish("verdict.acme."+g.name, msg)
}

func (g *gateway) up(kind string, data []byte) {
	_ = g.bus.NC.Publish("ek1.acme."+g.name+".up."+kind, data)
}

// infer answers a request with its input in capitals.
func (g *gateway) infer(m *nats.Msg) {
	routed, err := message.Decode[message.Routed](m.Data)
	if err != nil {
		return
	}
	a := must(workload.Body[workload.Asked](must(workload.Unwrap(routed.Data))))
	r := workload.Response{Subject: "acme/" + g.name, Instance: a.Instance, Request: workload.RequestHash(a.Sealed), Epoch: 7}
	req, to, err := workload.OpenRequest(r.Subject, a.Instance, a.Nonce, a.Sealed, g.receive)
	switch {
	case err != nil:
		r.Error = "not sealed to me"
	case !bytes.Equal(a.Nonce, g.nonce):
		r.Error = "by an old verdict"
	case a.Instance == "broken":
		r.Error = "it has failed"
	default:
		r.Sealed = must(workload.SealTo(workload.PurposeResult, r.Request, bytes.ToUpper(req.Input), to))
	}
	rep := message.Reply{ID: a.ID, Data: must(r.Sign(g.key))}
	g.up("ask", message.Encode(message.Ask{ID: make([]byte, 8), Kind: message.AskReply, Body: cose.MustMarshal(rep)}))
}

func sha(b []byte) []byte { return workload.RequestHash(b) }

// pack makes a bundle.
func (w *world) pack(content []byte, change func(*workload.Manifest)) []byte {
	m := workload.Manifest{
		Name: "watch", Version: "1", Shape: workload.Filter, Module: make([]byte, 32), ModuleSize: 10,
		Input:  workload.Input{Format: workload.JSON, Streams: []string{"temp"}, Batch: 10, Wait: 100},
		Output: workload.JSON, Limits: workload.Limits{Memory: 1 << 20, CPU: 100, Output: 1 << 10},
		Assurance: "tpm", Nodes: []string{"*"}, Moves: 2, Content: message.BlobID(must(message.BlobList(content))), ContentSize: int64(len(content)), Commit: 100,
	}
	if change != nil {
		change(&m)
	}
	return must(m.Sign(w.key("operator/operator.key")))
}

func TestWorkloads(t *testing.T) {
	w := newWorld(t)
	op := w.connect(w.operator)
	g := w.gateway("gw1")
	g.serve()
	ctx := deadline(t)
	content := make([]byte, 3*message.BlockSize+5)
	rand.Read(content)
	manifest := w.pack(content, nil)
	key := make([]byte, workload.KeySize)

	// The upload breaks off in the middle, and goes on where it was.
	part, stop := context.WithCancel(ctx)
	var told []int
	if _, err := op.PutBundle(part, content, func(done int) {
		if told = append(told, done); len(told) == 3 {
			stop()
		}
	}); err == nil {
		t.Fatal("it did not break off")
	}
	if _, err := op.Deploy(ctx, "gw1", "press", manifest, key, nil); err == nil || !strings.Contains(err.Error(), "not complete") {
		t.Fatalf("deployed what is not there: %v", err)
	}
	id, err := op.PutBundle(ctx, content, func(done int) { told = append(told, done) })
	if err != nil || !bytes.Equal(id, must(workload.PeekManifest(manifest)).Content) {
		t.Fatal(err)
	}
	const b = message.BlockSize
	if told[0] != 0 || told[3] < told[2] || told[len(told)-1] != len(content) || told[3] == 0 {
		t.Errorf("told %v of %d", told, 3*b+5)
	}
	r, err := op.Deploy(ctx, "gw1", "press", manifest, key, nil)
	if err != nil || !r.Done {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := op.DropBundle(ctx, id); err == nil {
		t.Error("dropped under an instance")
	}
	views, err := op.Workloads(ctx)
	if err != nil || len(views) != 1 || views[0].Entry.Holder != "gw1" || views[0].Name != "watch" {
		t.Fatalf("%+v, %v", views, err)
	}
	rec, err := op.Inspect(ctx, "press")
	if err != nil || rec.Entry.Epoch != 1 || !bytes.Equal(rec.Manifest, manifest) {
		t.Fatalf("%+v, %v", rec.Entry, err)
	}
	if r, err := op.Move(ctx, "press", "gw2"); err != nil || !r.Done || r.Sequence != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := op.Move(ctx, "press", "gw1"); err == nil {
		t.Error("moved to where it is")
	}
	if r, err := op.Stop(ctx, "press"); err != nil || !r.Done || r.Sequence != 3 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := op.Stop(ctx, "nobody"); err == nil {
		t.Error("stopped nobody")
	}
	// The gateway is lost: the cloud stops it.
	must(cloud.Change(ctx, w.bus.Gateways, "acme.gw1", func(g *cloud.Gateway, _ bool) error { g.Revoked = true; return nil }))
	if r, err := op.Stop(ctx, "press"); err != nil || !r.Done || r.Sequence != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := op.Stop(ctx, "press"); err == nil || !strings.Contains(err.Error(), "is stopped") {
		t.Errorf("stopped again: %v", err)
	}
	if err := op.DropBundle(ctx, id); err != nil {
		t.Error(err)
	}
	co := w.connect(w.consumer)
	if rec, err := co.Inspect(ctx, "press"); err != nil || rec.Entry.Holder != "" {
		t.Errorf("a consumer reads %+v: %v", rec.Entry, err)
	}
	if _, err := co.Workloads(ctx); err == nil || !strings.Contains(err.Error(), "may not ask") {
		t.Errorf("a consumer lists: %v", err)
	}
}

// A bundle key is sealed to nothing but what the manifest asks for.
func TestDeployHoldsTheVerdictAgainstTheManifest(t *testing.T) {
	w := newWorld(t)
	op := w.connect(w.operator)
	g := w.gateway("gw1")
	content := []byte("0123456789")
	good := w.pack(content, nil)
	must(op.PutBundle(deadline(t), content, nil))
	bad := attest.Vector{Instance: 2, Executables: 96}
	var change atomic.Pointer[func(*attest.Verdict)]
	g.change = func(v *attest.Verdict) {
		if c := change.Load(); c != nil && *c != nil {
			(*c)(v)
		}
	}
	g.serve()
	for _, x := range []struct {
		name     string
		manifest []byte
		change   func(*attest.Verdict)
		want     string
	}{
		{"more assurance", w.pack(content, func(m *workload.Manifest) { m.Assurance = "cvm" }), nil, "asks for assurance"},
		{"another node", w.pack(content, func(m *workload.Manifest) { m.Nodes = []string{"gw2"} }), nil, "does not allow gw1"},
		{"contraindicated", good, func(v *attest.Verdict) {
			v.Submods[attest.Submodule] = attest.Appraisal{Status: bad.Status(), Vector: bad}
		}, "contraindicated"},
		{"about another", good, func(v *attest.Verdict) { v.Subject = "acme/gw2" }, "about acme/gw2"},
		{"expired", good, func(v *attest.Verdict) { v.Expires = time.Now().Unix() }, "expired"},
		{"no receiving key", good, func(v *attest.Verdict) { v.Keys = nil }, "no receiving key"},
		{"another operator's manifest", must(must(workload.PeekManifest(good)).Sign(w.key("owner/owner.key"))), nil, "manifest"},
	} {
		change.Store(&x.change)
		r, err := op.Deploy(deadline(t), "gw1", "press", x.manifest, make([]byte, 32), nil)
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %+v, %v, want %q", x.name, r, err, x.want)
		}
	}
}

func TestInfer(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("gw1")
	g.serve()
	for _, kit := range []*client.Kit{w.consumer, w.operator} {
		c := w.connect(kit)
		before := g.attests.Load()
		for range 3 {
			got, err := c.Infer(deadline(t), "gw1", "press", []byte("abc"))
			if err != nil || string(got.Output) != "ABC" || got.Response.Epoch != 7 || got.Verdict.Subject != "acme/gw1" {
				t.Fatalf("%q, %v", got.Output, err)
			}
		}
		if n := g.attests.Load() - before; n > 1 {
			t.Errorf("%d verdicts were needed", n)
		}
		g.restart() // the verdict that the client has is of no use any more
		must(0, w.bus.Latest.Purge(deadline(t), "acme.gw1"))
		if got, err := c.Infer(deadline(t), "gw1", "press", []byte("abc")); err != nil || string(got.Output) != "ABC" {
			t.Errorf("after a restart: %q, %v", got.Output, err)
		}
		if _, err := c.Infer(deadline(t), "gw1", "broken", []byte("abc")); err == nil || !strings.Contains(err.Error(), "it has failed") {
			t.Errorf("a refusal: %v", err)
		}
		if _, err := c.Infer(deadline(t), "gw1", "press", make([]byte, workload.MaxInput+1)); err == nil {
			t.Error("too much was sent")
		}
	}
	g.change = func(v *attest.Verdict) { v.Subject = "acme/gw2" }
	must(0, w.bus.Latest.Purge(deadline(t), "acme.gw1"))
	if _, err := w.connect(w.consumer).Infer(deadline(t), "gw1", "press", []byte("abc")); err == nil {
		t.Error("a secret was sealed to another gateway")
	}
}

// seal stores a chunk of results as the gateway's keep would.
func (g *gateway) seal(instance string, epoch, last uint64, values ...int64) {
	g.t.Helper()
	secret, stream := make([]byte, sealing.KeySize), sealing.NewEpoch(1, [8]byte{})
	copy(secret, g.name)
	aead := must(sealing.NewAEAD(secret))
	var p sealing.Pack
	for _, v := range values {
		p.Add(sealing.Reading{Name: "n", Time: time.Now().UnixNano(), Value: v})
	}
	var c sealing.Chunk
	if g.sealed == 0 {
		data := must(cloud.LoadHPKEKey(filepath.Join(g.dir, "tenants/acme/data.key")))
		c.StreamKey = must(sealing.SealStreamKey(g.key, sealing.TypStreamKey, "acme/"+g.name, instance, stream, secret, data.PublicKey()))
	}
	r := must(sealing.SealRecord(aead, instance, stream, g.sealed, g.prev, nil, p.Marshal(), false))
	c.Records = [][]byte{r}
	cp := sealing.Checkpoint{Subject: "acme/" + g.name, Stream: instance, Epoch: stream, Seq: g.sealed, Head: sealing.Hash(r), Cursor: &sealing.Cursor{Session: workload.Session(instance, epoch), Line: last}}
	c.Checkpoint = must(cp.Sign(g.key, sealing.TypCheckpoint))
	g.prev, g.sealed = sealing.Hash(r), g.sealed+1
	acks := must(g.bus.NC.SubscribeSync("ek1.acme." + g.name + ".down.ack"))
	defer func() { _ = acks.Unsubscribe() }()
	g.up("sealed", c.Marshal())
	if _, err := acks.NextMsgWithContext(deadline(g.t)); err != nil {
		g.t.Fatal("not stored")
	}
}

// An instance is deployed, its gateway is lost, and it goes on elsewhere from a
// checkpoint: a consumer reads every line once.
func TestRecoverAndResults(t *testing.T) {
	w := newWorld(t)
	op, co := w.connect(w.operator), w.connect(w.consumer)
	a, b := w.gateway("gw1"), w.gateway("gw2")
	a.serve()
	b.serve()
	ctx := deadline(t)
	content := []byte("0123456789")
	manifest := w.pack(content, nil)
	id := must(op.PutBundle(ctx, content, nil))
	must(op.Deploy(ctx, "gw1", "press", manifest, make([]byte, 32), nil))
	a.seal("press", 1, 2, 1, 2)
	rd := must(co.Results("press"))
	var got []string
	read := func(n int) {
		t.Helper()
		for len(got) < n {
			rs, err := rd.Next(ctx, 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range rs {
				if r.Gap != "" || r.Conflict != "" {
					t.Fatalf("%+v", r)
				}
				got = append(got, r.Gateway+"="+string(rune('0'+r.Value.(int64))))
			}
		}
	}
	read(2)
	a.seal("press", 1, 3, 3)
	b.attest(ctx)
	if err := op.Recover(ctx, w.operator, "press", "gw2", id, make([]byte, 32)); err == nil {
		t.Error("the operator recovered it")
	}
	if err := op.Recover(ctx, w.owner, "press", "gw2", id, make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
	a.seal("press", 1, 5, 4, 5) // it was not lost after all
	if r, err := op.Deploy(ctx, "gw2", "press", manifest, make([]byte, 32), nil); err != nil || !r.Done {
		t.Fatal(err)
	}
	b.seal("press", 2, 5, 6, 7)
	read(5)
	if want := []string{"gw1=1", "gw1=2", "gw1=3", "gw2=6", "gw2=7"}; !reflect.DeepEqual(got, want) || rd.Fenced() != 2 {
		t.Errorf("read %v, %d fenced; want %v", got, rd.Fenced(), want)
	}
	rec := must(op.Inspect(ctx, "press"))
	if rec.Entry.Epoch != 2 || !rec.Entry.Owner || rec.Entry.Line != 3 {
		t.Errorf("the entry is %+v, %s", rec.Entry, hex.EncodeToString(rec.Recovery[:4]))
	}
	if _, err := op.Results("press"); err == nil {
		t.Error("the operator reads results")
	}
}

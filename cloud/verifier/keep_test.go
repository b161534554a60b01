package verifier_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/cloud/keybroker"
	"edgekeep/cloud/node"
	"edgekeep/cloud/verifier"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/keep"
	"edgekeep/tee/message"
	"edgekeep/testbench/swtpm"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func deadline(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// inProcess calls a keep without a socket, over the same bytes.
type inProcess struct{ tee.Handler }

func (i inProcess) Call(ctx context.Context, request []byte) ([]byte, error) {
	return tee.Serve(ctx, i.Handler, request), nil
}

// world is a cloud with one gateway, all in this process but the TPM.
type world struct {
	t     *testing.T
	dir   string
	roots []byte
	tpm   *swtpm.TPM
	srv   *cloud.Server
	bus   *cloud.Bus
	keep  *keep.Keep
	state []byte // as the agent stores it
}

var pcrs = []int{0, 7}

func newWorld(t *testing.T) *world {
	t.Helper()
	for _, program := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(program); err != nil && os.Getenv("CI") == "" {
			t.Skip("swtpm is missing (apt-get install swtpm swtpm-tools)")
		}
	}
	dir := must(os.MkdirTemp("", "vk")) // short: it holds sockets
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir}
	w.roots = must(node.Init(node.InitOptions{Dir: w.path("cloud"), Tenant: "acme", Hosts: []string{"127.0.0.1"}, Now: time.Now()}))
	var err error
	if w.tpm, err = swtpm.Start(deadline(t), swtpm.Options{Dir: w.path("tpm"), CADir: w.path("maker")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.tpm.Kill() })
	var policy strings.Builder
	policy.WriteString("lifetime = \"10m\"\n[[reference]]\nname = \"firmware\"\n[reference.pcrs]\n")
	for _, p := range pcrs {
		d := sha256.Sum256([]byte{byte(p)})
		if err := w.tpm.Extend(p, d); err != nil {
			t.Fatal(err)
		}
		v := sha256.Sum256(append(make([]byte, 32), d[:]...))
		fmt.Fprintf(&policy, "%d = %q\n", p, hex.EncodeToString(v[:]))
	}
	if err := os.WriteFile(w.path("cloud/tenants/acme/policy.toml"), []byte(policy.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	w.startCloud()
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) key(name string) *ecdsa.PrivateKey {
	return must(cloud.LoadSigningKey(w.path("cloud/" + name))).(*ecdsa.PrivateKey)
}

func (w *world) startCloud() {
	keys := w.path("cloud/keys")
	w.srv = must(cloud.StartServer(cloud.ServerConfig{
		Dir: w.path("cloud/data"), Host: "127.0.0.1", ClientPort: -1,
		Cert: keys + "/server.pem", Key: keys + "/server.key", ClientCA: keys + "/ca.pem",
	}))
	w.t.Cleanup(w.srv.Stop)
	w.bus = must(cloud.Open(deadline(w.t), must(w.srv.Connect()), 1))
	quiet := slog.New(slog.DiscardHandler)
	tenants := &cloud.Tenants{Dir: w.path("cloud/tenants")}
	ctx, cancel := context.WithCancel(context.Background())
	had := w.bus.NC.NumSubscriptions()
	v := &verifier.Verifier{Bus: w.bus, Tenants: tenants, Key: w.key("keys/verifier.key"), ChallengeKey: must(cloud.LoadSecret(keys + "/challenge.secret")), Build: "test", Log: quiet, Now: time.Now, Metrics: &cloud.Counts{}}
	b := &keybroker.Broker{Bus: w.bus, Tenants: tenants, Key: w.key("keys/broker.key"), Data: func(string) (hpke.PrivateKey, error) { return cloud.LoadHPKEKey(w.path("cloud/tenants/acme/data.key")) }, Log: quiet, Now: time.Now}
	f := &fleet.Fleet{
		Bus: w.bus, Tenants: tenants, Key: w.key("keys/fleet.key"), EnrolKey: must(cloud.LoadSecret(keys + "/enrol.secret")), EKRoots: w.makers(),
		CA: must(cloud.LoadCA(keys+"/ca.pem", keys+"/ca.key")), Log: quiet, Now: time.Now, Metrics: &cloud.Counts{},
	}
	ended := make(chan error, 3)
	for _, run := range []func(context.Context) error{v.Run, b.Run, f.Run} {
		go func() { ended <- run(ctx) }()
	}
	for w.bus.NC.NumSubscriptions() < had+3+1+15 {
		time.Sleep(time.Millisecond)
	}
	if err := w.bus.NC.Flush(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		cancel()
		for range 3 {
			if err := <-ended; !errors.Is(err, context.Canceled) {
				w.t.Errorf("a role ended with %v", err)
			}
		}
	})
}

func (w *world) makers() []*x509.Certificate {
	var out []*x509.Certificate
	for _, f := range must(filepath.Glob(w.tpm.CADir() + "/*.pem")) {
		b, _ := pem.Decode(must(os.ReadFile(f)))
		out = append(out, must(x509.ParseCertificate(b.Bytes)))
	}
	return out
}

// boot starts the keep on the state that the agent has.
func (w *world) boot() {
	w.t.Helper()
	k, err := keep.New(keep.Config{
		TPM: w.tpm.Socket(), PCRs: pcrs, RootsDigest: w.roots, Flush: 10 * time.Millisecond, Software: "test",
		Sources: []keep.SourceConfig{{Name: "temp", UID: uint32(os.Getuid()), Freshness: time.Minute, Rate: 1000}},
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	w.keep = k
	w.t.Cleanup(func() { _ = k.Close() })
	w.settle(tee.Start{State: w.state}.Do(deadline(w.t), inProcess{k}))
}

// settle does what the agent does with an outcome: it makes states durable and
// returns what is to be published.
func (w *world) settle(out tee.Outcome, err error) tee.Outcome {
	w.t.Helper()
	for err == nil && len(out.Commit) > 0 {
		w.state = out.Commit
		sum := sha256.Sum256(out.Commit)
		out, err = tee.Commit{State: sum[:]}.Do(deadline(w.t), inProcess{w.keep})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func (w *world) status() tee.StatusReply {
	return must(tee.Status{}.Do(deadline(w.t), inProcess{w.keep}))
}

// ask publishes what the keep asks and hands it the answer.
func (w *world) ask(prefix string, m tee.Message, err error) tee.Outcome {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	return w.settle(tee.Deliver{Item: w.answer(prefix, m)}.Do(deadline(w.t), inProcess{w.keep}))
}

func (w *world) answer(prefix string, m tee.Message) []byte {
	w.t.Helper()
	sub := must(w.bus.NC.SubscribeSync(prefix + ".down.item"))
	defer func() { _ = sub.Unsubscribe() }()
	if err := w.bus.NC.Publish(prefix+".up."+m.Kind, m.Data); err != nil {
		w.t.Fatal(err)
	}
	got, err := sub.NextMsgWithContext(deadline(w.t))
	if err != nil {
		w.t.Fatalf("no answer to %s", m.Kind)
	}
	return got.Data
}

func (w *world) enrol() {
	w.t.Helper()
	hash := w.status().EKHash
	prefix := "ek1.boot." + hex.EncodeToString(hash)
	t := inProcess{w.keep}
	// Not admitted: the cloud says how it would be.
	first := must(tee.Enrol{}.Do(deadline(w.t), t))
	if item := must(message.PeekItem(w.answer(prefix, first))); item.Credential != nil || !strings.Contains(item.Reason, "gateway approve "+hex.EncodeToString(hash)) {
		w.t.Fatalf("a box that nobody approved gets %+v", item)
	}
	admission := must(message.Admission{EKHash: hash, Tenant: "acme", Gateway: "gw1", ID: bytes.Repeat([]byte{1}, 16)}.Sign(w.key("operator/operator.key")))
	if _, err := cloud.Ask[fleet.None](deadline(w.t), w.bus.NC, "api.acme.gateway.approve", fleet.Signed{Message: admission}); err != nil {
		w.t.Fatal(err)
	}
	m, err := tee.Enrol{}.Do(deadline(w.t), t)
	out := w.ask(prefix, m, err)
	out = w.ask(prefix, out.Publish[0], nil)
	if len(out.Certificate) != 2 || len(out.Verdict) == 0 {
		w.t.Fatal("enrolled without certificate or verdict")
	}
	if s := w.status(); s.Phase != tee.PhaseEnrolled || s.Gateway != "gw1" {
		w.t.Fatalf("the keep is %s, %s", s.Phase, s.Gateway)
	}
}

const gw1 = "ek1.acme.gw1"

// evidence has the keep attest over a challenge of the verifier.
func (w *world) evidence() []byte {
	w.t.Helper()
	if _, err := cloud.Change(deadline(w.t), w.bus.Commands, "acme.gw1", func(q *fleet.Queue, _ bool) error { q.Attest = true; return nil }); err != nil {
		w.t.Fatal(err)
	}
	m, err := tee.Pull{}.Do(deadline(w.t), inProcess{w.keep})
	out := w.ask(gw1, m, err)
	if len(out.Publish) != 1 || out.Publish[0].Kind != "evidence" {
		w.t.Fatalf("a challenge was answered with %v", out.Publish)
	}
	return out.Publish[0].Data
}

func (w *world) appraise(change func(*verifier.AppraiseRequest)) ([]byte, error) {
	w.t.Helper()
	g, _, _, err := cloud.Get[cloud.Gateway](deadline(w.t), w.bus.Gateways, "acme.gw1")
	if err != nil {
		w.t.Fatal(err)
	}
	r := verifier.AppraiseRequest{Tenant: "acme", Gateway: "gw1", EKHash: g.EKHash, AKName: g.AKName}
	change(&r)
	b, err := cloud.Ask[verifier.Bytes](deadline(w.t), w.bus.NC, "svc.appraise", r)
	return b.Data, err
}

func (w *world) verdict(evidence []byte) attest.Verdict {
	w.t.Helper()
	msg, err := w.appraise(func(r *verifier.AppraiseRequest) { r.Evidence = evidence })
	if err != nil {
		w.t.Fatal(err)
	}
	return must(attest.VerifyVerdict(&w.key("keys/verifier.key").PublicKey, msg))
}

func TestKeepAndVerifier(t *testing.T) {
	w := newWorld(t)
	w.boot()
	w.enrol()
	t.Run("replayed evidence gets the first verdict", w.testReplay)
	t.Run("what is not genuine gets none", w.testRefusals)
	t.Run("readings arrive", w.testReadings)
	t.Run("a restart of the keep", w.testRestart)
	t.Run("another boot", w.testOtherBoot)
}

func (w *world) testReplay(t *testing.T) {
	ev := w.evidence()
	ask := func() []byte { return must(w.appraise(func(r *verifier.AppraiseRequest) { r.Evidence = ev })) }
	first := ask()
	v := must(attest.VerifyVerdict(&w.key("keys/verifier.key").PublicKey, first))
	if err := v.Usable("acme/gw1", "acme", time.Now()); err != nil {
		t.Fatalf("%v: %+v", err, v.Checks)
	}
	for range 3 {
		if !bytes.Equal(ask(), first) {
			t.Fatal("a replay of evidence got another verdict")
		}
	}
	// The same challenge answered again, by other evidence: still the first verdict.
	challenge := must(attest.ParseClaims(ev)).Challenge
	m := must(tee.Pull{}.Do(deadline(t), inProcess{w.keep}))
	nonce := must(message.Decode[message.Pull](m.Data)).Nonce
	item := must(message.Item{Nonce: nonce, Time: time.Now().Unix(), Subject: "acme/gw1", Challenge: challenge}.Sign(w.key("keys/fleet.key")))
	out := w.settle(tee.Deliver{Item: item}.Do(deadline(t), inProcess{w.keep}))
	again := out.Publish[0].Data
	if bytes.Equal(again, ev) {
		t.Fatal("the keep signed the same evidence twice: this tests nothing")
	}
	if got := must(w.appraise(func(r *verifier.AppraiseRequest) { r.Evidence = again })); !bytes.Equal(got, first) {
		t.Error("one challenge has two verdicts")
	}
	if v.Expires != must(attest.PeekChallenge(challenge)).Issued+600 {
		t.Error("the verdict's expiry does not count from the challenge")
	}
}

func (w *world) testRefusals(t *testing.T) {
	ev := w.evidence()
	foreign := attest.Challenge{Tenant: "acme", Gateway: "gw1", Nonce: make([]byte, 32), Issued: time.Now().Unix(), Expires: time.Now().Unix() + 60, PCRs: pcrs}
	old := foreign
	old.Issued, old.Expires = old.Issued-500, old.Issued-400
	secret := must(cloud.LoadSecret(w.path("cloud/keys/challenge.secret")))
	for _, x := range []struct {
		name   string
		change func(*verifier.AppraiseRequest)
		want   string
	}{
		{"one bit", func(r *verifier.AppraiseRequest) { r.Evidence[len(r.Evidence)-1] ^= 1 }, "not genuine"},
		{"garbage", func(r *verifier.AppraiseRequest) { r.Evidence = []byte("garbage") }, "not genuine"},
		{"nothing", func(r *verifier.AppraiseRequest) { r.Evidence = nil }, "not genuine"},
		{"for another gateway", func(r *verifier.AppraiseRequest) { r.Gateway = "gw2" }, "answers a challenge to acme/gw1"},
		{"for another tenant", func(r *verifier.AppraiseRequest) { r.Tenant = "globex" }, "not known"},
		{"of another AK", func(r *verifier.AppraiseRequest) { r.AKName = append([]byte{0, 11}, make([]byte, 32)...) }, "not genuine"},
		{"a challenge of somebody else", func(r *verifier.AppraiseRequest) {
			r.Evidence = w.evidenceOver(must(foreign.Marshal(make([]byte, 32))))
		}, "not genuine"},
		{"a challenge that has expired", func(r *verifier.AppraiseRequest) { r.Evidence = w.evidenceOver(must(old.Marshal(secret))) }, "not genuine"},
	} {
		_, err := w.appraise(func(r *verifier.AppraiseRequest) {
			r.Evidence = bytes.Clone(ev)
			x.change(r)
		})
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
	msg := must(w.appraise(func(r *verifier.AppraiseRequest) {
		r.Evidence, r.EKHash = w.evidence(), make([]byte, 32)
	}))
	if v := must(attest.PeekVerdict(msg)); attest.Tier(v.Appraisal().Status) != "contraindicated" {
		t.Error("evidence of another TPM than the enrolled one is acceptable")
	}
	w.verdict(w.evidence()) // the newest is a good one again
}

// evidenceOver has the keep attest over any challenge: it cannot know better.
func (w *world) evidenceOver(challenge []byte) []byte {
	w.t.Helper()
	m := must(tee.Pull{}.Do(deadline(w.t), inProcess{w.keep}))
	nonce := must(message.Decode[message.Pull](m.Data)).Nonce
	item := must(message.Item{Nonce: nonce, Time: time.Now().Unix(), Subject: "acme/gw1", Challenge: challenge}.Sign(w.key("keys/fleet.key")))
	return w.settle(tee.Deliver{Item: item}.Do(deadline(w.t), inProcess{w.keep})).Publish[0].Data
}

func (w *world) testReadings(t *testing.T) {
	socket := w.path("in.sock")
	l := must(net.Listen("unix", socket))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.keep.Ingest(ctx, l) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	conn := must(net.Dial("unix", socket))
	defer conn.Close()
	if _, err := io.WriteString(conn, "engine temperature=21.5 1700000000000000000\n"); err != nil {
		t.Fatal(err)
	}
	// The first chunk opens the epoch, the second holds the line.
	var chunks []tee.Chunk
	for len(chunks) < 2 {
		got := must(tee.Take{After: uint64(len(chunks)), Wait: 20_000}.Do(deadline(t), inProcess{w.keep}))
		chunks = append(chunks, got.Chunks...)
	}
	marks := must(w.bus.NC.SubscribeSync(gw1 + ".down.ack"))
	for _, c := range chunks {
		if err := w.bus.NC.Publish(gw1+".up.sealed", c.Data); err != nil {
			t.Fatal(err)
		}
		m, err := marks.NextMsgWithContext(deadline(t))
		if err != nil {
			t.Fatal("no watermark came")
		}
		mark := must(tee.CheckWatermark{Message: m.Data}.Do(deadline(t), inProcess{w.keep}))
		if mark.Seq != c.Seq || !bytes.Equal(mark.Head, c.Head) || mark.Stream != "temp" {
			t.Fatalf("the watermark is at %+v", mark)
		}
	}
	rel := must(cloud.Ask[message.Release](deadline(t), w.bus.NC, "api.acme.data.key", keybroker.Request{
		Gateway: "gw1", Stream: "temp", Epoch: chunks[0].Epoch, Consumer: "consumer",
	}))
	key := must(cloud.LoadHPKEKey(w.path("cloud/consumer/consumer.key")))
	_, secret, err := sealing.OpenStreamKey(&w.key("keys/broker.key").PublicKey, sealing.TypRelease, rel.Message, key)
	if err != nil {
		t.Fatal(err)
	}
	stored := must(cloud.Ask[fleet.Fetched](deadline(t), w.bus.NC, "api.acme.data.fetch", fleet.Fetch{}))
	chunk, _, err := sealing.ParseChunk(stored.Chunks[1].Data)
	if err != nil {
		t.Fatal(err)
	}
	_, readings, err := sealing.OpenRecord(must(sealing.NewAEAD(secret)), chunk.Records[0])
	if err != nil || len(readings) != 1 || readings[0].Value != 21.5 || readings[0].Time != 1700000000000000000 {
		t.Fatalf("it holds %+v: %v", readings, err)
	}
}

func (w *world) testRestart(t *testing.T) {
	late := w.evidence()
	if err := w.keep.Close(); err != nil {
		t.Fatal(err)
	}
	w.boot()
	if v := w.verdict(w.evidence()); !v.Affirming() {
		t.Fatalf("after a restart: %+v", v.Checks)
	}
	// Evidence of before the restart, delivered after it, shows an epoch that is over.
	v := w.verdict(late)
	if v.Affirming() || failed(v) != "epoch" {
		t.Errorf("old evidence is %s, failed %q", attest.Tier(v.Appraisal().Status), failed(v))
	}
	if v := w.verdict(w.evidence()); !v.Affirming() {
		t.Fatalf("and fresh evidence: %+v", v.Checks)
	}
}

func (w *world) testOtherBoot(t *testing.T) {
	if err := w.keep.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.tpm.Extend(7, sha256.Sum256([]byte("something else"))); err != nil {
		t.Fatal(err)
	}
	w.boot()
	s := w.status()
	if s.Phase != tee.PhaseLocked {
		t.Fatalf("the keep is %s", s.Phase)
	}
	prefix := "ek1.boot." + hex.EncodeToString(s.EKHash)
	m, err := tee.Enrol{}.Do(deadline(t), inProcess{w.keep})
	out := w.ask(prefix, m, err)
	out = w.ask(prefix, out.Publish[0], nil)
	v := must(attest.VerifyVerdict(&w.key("keys/verifier.key").PublicKey, out.Verdict))
	if attest.Tier(v.Appraisal().Status) != "contraindicated" || len(out.Certificate) != 0 || len(v.Keys) != 0 {
		t.Errorf("%s, with %d certificates and %d keys", attest.Tier(v.Appraisal().Status), len(out.Certificate), len(v.Keys))
	}
	if f := failed(v); f != "pcr 7 keys" {
		t.Errorf("failed: %q", f)
	}
}

// failed are the names of the checks that failed.
func failed(v attest.Verdict) string {
	var out []string
	for _, c := range v.Checks {
		if c.Result == attest.Failed {
			out = append(out, c.Name)
		}
	}
	return strings.Join(out, " ")
}

package keep

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/tee/tpm"
	"edgekeep/testbench/swtpm"
)

// One software TPM serves all tests that do not cut its power. A gateway starts
// with no NV indices of ours in it.
var (
	base        string
	shared      *swtpm.TPM
	startShared = sync.OnceFunc(func() {
		var err error
		shared, err = swtpm.Start(context.Background(), swtpm.Options{Dir: filepath.Join(base, "tpm"), CADir: filepath.Join(base, "maker")})
		if err != nil {
			panic(err)
		}
		firmware(shared)
	})
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "keep")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	base = dir
	defer func() {
		if shared != nil {
			_ = shared.Kill()
		}
	}()
	return m.Run()
}

// firmware measures what a boot measures.
func firmware(s *swtpm.TPM) {
	for _, p := range measured {
		if err := s.Extend(p, sha256.Sum256([]byte{byte(p)})); err != nil {
			panic(err)
		}
	}
}

var measured = []int{0, 4, 7, 8}

func needTPM(t testing.TB) {
	t.Helper()
	for _, program := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(program); err != nil && os.Getenv("CI") == "" {
			t.Skip("swtpm is missing (apt-get install swtpm swtpm-tools)")
		}
	}
	startShared()
}

// failer is what *testing.T and *rapid.T have in common.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func must[T any](v T, err error) func(failer) T {
	return func(t failer) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantRefusal(t testing.TB, name string, err error, reason string) {
	t.Helper()
	if refusal := (*tee.Refusal)(nil); !errors.As(err, &refusal) || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s: %v; want a refusal with %q", name, err, reason)
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
}

// cloud is the other side: the keys of one tenant's cloud, and what it says.
type cloud struct {
	t                                            testing.TB
	operator, verifier, fleet, broker, owner, ca *ecdsa.PrivateKey
	data                                         hpke.PrivateKey
	roots, digest                                []byte
	mac                                          []byte
	now                                          int64
}

var discard = slog.New(slog.DiscardHandler)

const tenant, gw, subject = "acme", "gw1", "acme/gw1"

func newCloud(t testing.TB) *cloud {
	t.Helper()
	c := &cloud{
		t: t, operator: newKey(t), verifier: newKey(t), fleet: newKey(t), broker: newKey(t), owner: newKey(t), ca: newKey(t),
		data: must(hpke.MLKEM768P256().GenerateKey())(t), mac: random(32), now: 1750000000,
	}
	key := func(k *ecdsa.PrivateKey) cose.Raw { return cose.MarshalKey(&k.PublicKey) }
	c.roots = cose.MustMarshal(attest.Roots{
		Tenant: tenant, Operator: key(c.operator), Verifier: key(c.verifier), Fleet: key(c.fleet), Broker: key(c.broker),
		Owner: key(c.owner), Data: cose.MarshalHPKEKey(c.data.PublicKey()),
	})
	sum := sha256.Sum256(c.roots)
	c.digest = sum[:]
	return c
}

func (c *cloud) challenge(gateway string) []byte {
	c.t.Helper()
	return must(attest.Challenge{
		Tenant: tenant, Gateway: gateway, Nonce: random(32), Issued: c.now - 1, Expires: c.now + 300, PCRs: measured,
	}.Marshal(c.mac))(c.t)
}

// verify is the verifier's view of evidence.
func (c *cloud) verify(evidence []byte) attest.Genuine {
	c.t.Helper()
	g, err := attest.Verify(evidence, attest.Params{ChallengeKey: c.mac, Now: time.Unix(c.now, 0)})
	if err != nil {
		c.t.Fatal(err)
	}
	return g
}

func (c *cloud) verdict(g attest.Genuine, subject string, edit func(*attest.Verdict)) []byte {
	c.t.Helper()
	v := attest.Vector{Instance: 2, Configuration: 2, Executables: 2, Hardware: 2}
	d := attest.Verdict{
		Subject: subject, Audience: tenant, IssuedAt: c.now, Expires: c.now + 600, Cnf: g.Claims.Cnf, Nonce: g.Challenge.Nonce,
		Profile: attest.VerdictProfile, Submods: map[string]attest.Appraisal{attest.Submodule: {Status: v.Status(), Vector: v}},
		Keys: g.Claims.Keys, Prior: g.Claims.Prior, Command: g.Claims.Command, Assurance: "tpm",
		ChallengeHash: random(32), EvidenceHash: random(32), Checks: []attest.Check{},
	}
	if edit != nil {
		edit(&d)
	}
	return must(d.Sign(c.verifier))(c.t)
}

func (c *cloud) certificate(pub *ecdsa.PublicKey) [][]byte {
	c.t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(c.now+600, 0)}
	return [][]byte{must(x509.CreateCertificate(rand.Reader, template, template, pub, c.ca))(c.t)}
}

func (c *cloud) sign(item message.Item) []byte {
	c.t.Helper()
	if item.Time == 0 {
		item.Time = c.now
	}
	return must(item.Sign(c.fleet))(c.t)
}

// gateway is an agent's view of a keep: it stores what it is given, and speaks
// over the bytes of the wire.
type gateway struct {
	t     testing.TB
	cloud *cloud
	cfg   Config
	keep  *Keep

	state                   []byte
	checkpoints, watermarks [][]byte
	ticket                  uint64
	chunks                  []tee.Chunk
	ak                      []byte // name
	last                    []byte // epoch key of the keep before
	sequence                uint64 // of the newest command
}

// newGateway is a gateway whose TPM has never seen a keep.
func newGateway(t testing.TB) *gateway {
	t.Helper()
	needTPM(t)
	wipe(t, shared.Socket())
	c := newCloud(t)
	g := &gateway{t: t, cloud: c, cfg: Config{
		TPM: shared.Socket(), PCRs: measured, RootsDigest: c.digest, Flush: time.Second, Software: "test 1",
		Sources:   []SourceConfig{{Name: "a", UID: 1, Freshness: time.Hour, Rate: 1000}, {Name: "b", UID: 2, Freshness: time.Hour, Rate: 1000}},
		Hardening: map[string]bool{"dumps off": true},
	}}
	t.Cleanup(g.kill)
	return g
}

// wipe removes the keep's NV indices from a TPM.
func wipe(t testing.TB, socket string) {
	t.Helper()
	dev := must(linuxudstpm.Open(socket))(t)
	defer dev.Close()
	for _, index := range []tpm2.TPMHandle{0x0180ec02, 0x0180ec01, 0x0180ec00} {
		pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(dev)
		if err != nil {
			continue
		}
		_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: index, Name: pub.NVName}}.Execute(dev)
		if err != nil {
			t.Fatal(err)
		}
	}
}

// boot runs a new keep process in place of the one before.
func (g *gateway) boot() {
	g.t.Helper()
	g.kill()
	g.keep = must(New(g.cfg, discard))(g.t)
	g.ticket = 0
}

// kill ends the keep as SIGKILL does: nothing is flushed in the TPM.
func (g *gateway) kill() {
	if g.keep != nil {
		_ = g.keep.dev.Close()
		g.keep = nil
	}
}

func (g *gateway) Call(ctx context.Context, request []byte) ([]byte, error) {
	return tee.Serve(ctx, g.keep, request), nil
}

func (g *gateway) ctx() context.Context { return g.t.Context() }

func (g *gateway) start() (tee.Outcome, error) {
	return tee.Start{State: g.state, Checkpoints: g.checkpoints, Watermarks: g.watermarks}.Do(g.ctx(), g)
}

func (g *gateway) commit() (tee.Outcome, error) {
	sum := sha256.Sum256(g.state)
	return tee.Commit{State: sum[:]}.Do(g.ctx(), g)
}

// settle stores and commits until nothing is left to be made durable.
func (g *gateway) settle(out tee.Outcome, err error) (tee.Outcome, error) {
	for err == nil && len(out.Commit) > 0 {
		g.state = out.Commit
		out, err = g.commit()
	}
	return out, err
}

// up boots a keep and starts it with the stored state.
func (g *gateway) up() {
	g.t.Helper()
	g.boot()
	must(g.settle(g.start()))(g.t)
}

func (g *gateway) status() tee.StatusReply {
	g.t.Helper()
	return must(tee.Status{}.Do(g.ctx(), g))(g.t)
}

func (g *gateway) deliver(item message.Item) (tee.Outcome, error) {
	g.t.Helper()
	return tee.Deliver{Item: g.cloud.sign(item)}.Do(g.ctx(), g)
}

// asks starts an enrolment and returns the message.
func (g *gateway) asks() message.Enrol {
	g.t.Helper()
	m := must(tee.Enrol{}.Do(g.ctx(), g))(g.t)
	if m.Kind != "enrol" {
		g.t.Errorf("kind %q", m.Kind)
	}
	return must(message.Decode[message.Enrol](m.Data))(g.t)
}

// credential is the fleet's answer to an enrol message.
func (g *gateway) credential(m message.Enrol, secret []byte) message.Item {
	g.t.Helper()
	g.ak = must(tpm.Name(m.AK))(g.t)
	blob, sealed, err := tpm.MakeCredential(m.EK, g.ak, secret)
	if err != nil {
		g.t.Fatal(err)
	}
	return message.Item{
		Nonce: m.Nonce, Subject: subject, Roots: g.cloud.roots, Challenge: g.cloud.challenge(gw),
		Credential: &message.Credential{Blob: blob, Secret: sealed},
	}
}

// activates goes through an enrolment up to the verifier's look at the evidence.
func (g *gateway) activates() (message.Activate, attest.Genuine) {
	g.t.Helper()
	m := g.asks()
	secret := random(32)
	out := must(g.deliver(g.credential(m, secret)))(g.t)
	if len(out.Publish) != 1 || out.Publish[0].Kind != "activate" || len(out.Commit) != 0 {
		g.t.Fatalf("%+v", out)
	}
	a := must(message.Decode[message.Activate](out.Publish[0].Data))(g.t)
	if !bytes.Equal(a.Proof, message.Proof(secret, a.Evidence)) || !bytes.Equal(a.Enrol, m.Nonce) || bytes.Equal(a.Nonce, m.Nonce) {
		g.t.Error("the proof does not bind secret and evidence, or the nonces are wrong")
	}
	genuine := must(attest.Verify(a.Evidence, attest.Params{ChallengeKey: g.cloud.mac, Now: time.Unix(g.cloud.now, 0), AKName: g.ak}))(g.t)
	return a, genuine
}

// admission is what an enrolment ends with.
func (g *gateway) admission(a message.Activate, genuine attest.Genuine) message.Item {
	g.t.Helper()
	return message.Item{
		Nonce: a.Nonce, Subject: subject, Roots: g.cloud.roots, Verdict: g.cloud.verdict(genuine, subject, nil),
		Certificate: g.cloud.certificate(genuine.TLSKey),
	}
}

func (g *gateway) enrol() attest.Genuine {
	g.t.Helper()
	a, genuine := g.activates()
	out := must(g.settle(g.deliver(g.admission(a, genuine))))(g.t)
	if len(out.Certificate) != 1 || len(out.Verdict) == 0 || !out.Pull {
		g.t.Fatalf("enrolled with %+v", out)
	}
	if s := g.status(); s.Phase != tee.PhaseEnrolled || s.Tenant+"/"+s.Gateway != subject {
		g.t.Fatalf("%+v", s)
	}
	return genuine
}

// enrolled is a gateway that has been enrolled.
func enrolled(t testing.TB) (*gateway, attest.Genuine) {
	t.Helper()
	g := newGateway(t)
	g.up()
	return g, g.enrol()
}

// nonce is that of a pull.
func (g *gateway) nonce() []byte {
	g.t.Helper()
	m := must(tee.Pull{}.Do(g.ctx(), g))(g.t)
	if m.Kind != "pull" {
		g.t.Errorf("kind %q", m.Kind)
	}
	return must(message.Decode[message.Pull](m.Data))(g.t).Nonce
}

// attest challenges an enrolled gateway.
func (g *gateway) attest() attest.Genuine {
	g.t.Helper()
	out := must(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Challenge: g.cloud.challenge(gw)}))(g.t)
	if len(out.Publish) != 1 || out.Publish[0].Kind != "evidence" {
		g.t.Fatalf("%+v", out)
	}
	return g.cloud.verify(out.Publish[0].Data)
}

// send delivers a command, and commits what it asks for.
func (g *gateway) send(command []byte) (tee.Outcome, error) {
	g.t.Helper()
	return g.settle(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Command: command}))
}

// slots reads the two NV slots, and the counter's last value that was used.
func (g *gateway) slots() [2][32]byte {
	g.t.Helper()
	var out [2][32]byte
	for i := range out {
		out[i] = [32]byte(must(g.keep.ident.nv.Read(i))(g.t))
	}
	return out
}

// read seals a reading in a source and has the agent take it.
func (g *gateway) read(uid uint32) tee.Chunk {
	g.t.Helper()
	s := g.keep.sealer
	line(g.t, &ingestConn{s: s, src: s.sources[uid]}, 0, "m v=1i 1")
	s.mu.Lock()
	s.flush(s.sources[uid])
	s.mu.Unlock()
	r := must(tee.Take{After: g.ticket, Confirm: g.ticket}.Do(g.ctx(), g))(g.t)
	c := r.Chunks[len(r.Chunks)-1]
	g.ticket = c.Ticket
	g.chunks = append(g.chunks, r.Chunks...)
	g.checkpoints = append(g.checkpoints, c.Checkpoint)
	return c
}

// opening is an epoch's first chunk of a stream, among those taken.
func (g *gateway) opening(epoch sealing.Epoch, stream string) sealing.Position {
	g.t.Helper()
	for _, c := range g.chunks {
		if c.Stream == stream && sealing.Epoch(c.Epoch) == epoch && c.Seq == 0 {
			return must2(sealing.ParseChunk(c.Data))(g.t)
		}
	}
	g.t.Fatalf("epoch %s of %s has no first chunk", epoch, stream)
	return sealing.Position{}
}

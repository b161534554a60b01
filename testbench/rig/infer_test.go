package rig

import (
	"bytes"
	"crypto/hpke"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/workload"
)

// answering is the manifest of a workload that answers requests. With a stream it
// counts that too, and both are readings in JSON.
func answering(stream ...string) workload.Manifest {
	m := counter(stream...)
	m.Name, m.Input.Wait, m.Limits.CPU = "answer", 50, 1000
	if len(stream) == 0 {
		m.Input.Format, m.Output = workload.Raw, workload.Raw
	}
	return m
}

// eavesdropper keeps every MQTT message.
type eavesdropper struct {
	mu   sync.Mutex
	seen bytes.Buffer
}

func (b *bench) eavesdrop() *eavesdropper {
	b.t.Helper()
	pool, err := cloud.LoadPool(b.path("cloud/monitor/ca.pem"))
	b.must(err)
	cert, err := tls.LoadX509KeyPair(b.path("cloud/monitor/tls.pem"), b.path("cloud/monitor/tls.key"))
	b.must(err)
	e := &eavesdropper{}
	conn, err := mqtt.Dial(b.ctx, mqtt.Options{
		URL: b.MQTT, ClientID: "monitor", Username: "monitor", Subscribe: []string{"ek1/#"},
		TLS: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13},
		Receive: func(m mqtt.Message) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.seen.Write(m.Payload)
		},
	})
	b.must(err)
	b.t.Cleanup(func() { conn.Close() })
	b.until("a connected eavesdropper", func() error { return conn.Flush(b.ctx, "ek1/monitor/x/up/y", []byte("control")) })
	return e
}

func (e *eavesdropper) heard(what []byte) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return bytes.Contains(e.seen.Bytes(), what)
}

// requester makes requests as client.Infer does, and shows what goes over the wire.
type requester struct {
	b  *bench
	nc *nats.Conn
	g  *Gateway
	v  attest.Verdict
}

// sealed is a request and what opens its answer.
type sealed struct {
	fleet.Infer
	key hpke.PrivateKey
}

func (b *bench) requester(g *Gateway) *requester {
	b.t.Helper()
	r := &requester{b: b, nc: b.raw("consumer"), g: g}
	r.renew()
	return r
}

func (r *requester) renew() {
	r.b.t.Helper()
	s, err := ask[fleet.Saved](r.b.ctx, r.nc, "data.attest", fleet.Vouch{Gateway: r.g.Name})
	r.b.must(err)
	r.v, err = attest.VerifyVerdict(r.b.consumer.Roots.Verifier, s.Verdict)
	r.b.must(err)
}

func (r *requester) seal(instance string, nonce, input []byte) sealed {
	r.b.t.Helper()
	to, err := cose.UnmarshalHPKEKey(r.v.Keys[attest.PurposeReceive])
	r.b.must(err)
	key, err := hpke.MLKEM768P256().GenerateKey()
	r.b.must(err)
	req := workload.Request{Input: input, Reply: cose.MarshalHPKEKey(key.PublicKey()), ID: make([]byte, 16)}
	rand.Read(req.ID)
	msg, err := req.Seal(Tenant+"/"+r.g.Name, instance, nonce, to)
	r.b.must(err)
	return sealed{fleet.Infer{Gateway: r.g.Name, Asked: workload.Asked{Instance: instance, Nonce: nonce, Sealed: msg}}, key}
}

func (r *requester) send(s sealed) []byte {
	r.b.t.Helper()
	got, err := ask[fleet.Inferred](r.b.ctx, r.nc, "data.infer", s.Infer)
	r.b.must(err)
	return got.Data
}

func (r *requester) open(s sealed, answer []byte) ([]byte, error) {
	r.b.t.Helper()
	signer, err := cose.UnmarshalKey(r.v.Cnf.Key)
	r.b.must(err)
	out, _, err := workload.OpenResponse(signer, Tenant+"/"+r.g.Name, s.Asked.Instance, s.Asked.Sealed, answer, s.key)
	return out, err
}

// refuse checks that the keep refuses a request and says why.
func (r *requester) refuse(what string, s sealed, why string) {
	r.b.t.Helper()
	out, err := r.open(s, r.send(s))
	if err == nil || !strings.Contains(err.Error(), why) {
		r.b.t.Errorf("%s: got %q, %v, want a refusal with %q", what, out, err, why)
	}
}

// TestInfer: a request reaches one keep and one instance once, nobody on the way
// reads it or its result, and nobody can put another in its place.
func TestInfer(t *testing.T) {
	module := clang(t, "answer.c", "-mexec-model=reactor")
	b, g := up(t, 90*time.Second, Options{}, "machine")
	e := b.eavesdrop()
	b.must(g.StartRunners(2))
	b.deploy(g, "backwards", b.pack(answering(), module))
	b.deploy(g, "second", b.pack(answering(), module))
	b.runs(g, "backwards")
	b.runs(g, "second")

	question := rand.Text() + rand.Text()
	mirrored := []byte(question)
	for i, j := 0, len(mirrored)-1; i < j; i, j = i+1, j-1 {
		mirrored[i], mirrored[j] = mirrored[j], mirrored[i]
	}
	got, err := b.consumer.Infer(b.ctx, g.Name, "backwards", []byte(question))
	if b.must(err); !bytes.Equal(got.Output, mirrored) || got.Response.Instance != "backwards" || !got.Verdict.Affirming() {
		t.Errorf("%q backwards is %q, by %+v", question, got.Output, got.Response)
	}
	stdout, stderr, err := b.cliWith(question, "consumer", "infer", g.Name, "backwards")
	if b.must(err); stdout != string(mirrored) || !strings.Contains(stderr, "signed by the keep of acme/gw1, on which the verdict is affirming") {
		t.Errorf("edgekeep infer: %q, %q", stdout, stderr)
	}
	t.Logf("edgekeep infer gw1 backwards:\n%s\n%s", stdout, stderr)
	empty, err := b.consumer.Infer(b.ctx, g.Name, "backwards", nil)
	if b.must(err); !strings.Contains(string(empty.Output), `"count","v":0`) {
		t.Errorf("an empty request: %q", empty.Output)
	}

	r := b.requester(g)
	asked := r.seal("backwards", r.v.Nonce, []byte(question))
	answer := r.send(asked)
	out, err := r.open(asked, answer)
	if b.must(err); !bytes.Equal(out, mirrored) {
		t.Errorf("a request by hand: %q", out)
	}
	for _, wire := range [][]byte{asked.Asked.Sealed, answer} {
		if bytes.Contains(wire, []byte(question)) || bytes.Contains(wire, mirrored) {
			t.Error("a request or its answer is in the clear")
		}
	}
	if !e.heard([]byte("control")) || !e.heard(asked.Asked.Sealed) || !e.heard(answer) {
		t.Error("the eavesdropper did not hear the request, its answer, and the control: it proves nothing")
	}
	if e.heard([]byte(question)) || e.heard(mirrored) {
		t.Error("a request or its result went over MQTT in the clear")
	}

	r.refuse("a request that was taken before", asked, "taken before")
	for name, change := range map[string]func(*sealed){
		"for another instance":           func(s *sealed) { s.Asked.Instance = "second" },
		"under a nonce that is no one's": func(s *sealed) { s.Asked.Nonce = make([]byte, len(s.Asked.Nonce)) },
		"with a flipped bit": func(s *sealed) {
			s.Asked.Sealed = bytes.Clone(s.Asked.Sealed)
			s.Asked.Sealed[len(s.Asked.Sealed)-1] ^= 1
		},
		"that is garbage":             func(s *sealed) { s.Asked.Sealed = []byte("garbage") },
		"for an instance that is not": func(s *sealed) { s.Asked.Instance = "nobody" },
	} {
		s := r.seal("backwards", r.v.Nonce, []byte(question))
		change(&s)
		r.refuse("a request "+name, s, "the keep of acme/gw1 refuses: ")
	}
	one, two := r.seal("backwards", r.v.Nonce, []byte("one")), r.seal("backwards", r.v.Nonce, []byte("two"))
	first, second := r.send(one), r.send(two)
	if out, err := r.open(one, second); err == nil || !strings.Contains(err.Error(), "another request") {
		t.Errorf("the answer to another request: %q, %v", out, err)
	}
	if out, err := r.open(one, first); err != nil || string(out) != "eno" {
		t.Errorf("the answer to this request: %q, %v", out, err)
	}
	if _, err := b.consumer.Infer(b.ctx, g.Name, "backwards", make([]byte, workload.MaxInput+1)); err == nil {
		t.Error("a request of more than fits was taken")
	}
	if _, err := b.consumer.Infer(b.ctx, g.Name, "backwards", []byte("!huge")); err == nil || !strings.Contains(err.Error(), "at most 65536 fit") {
		t.Errorf("a result of more than fits: %v", err)
	}
	largest := bytes.Repeat([]byte("0123456789abcde\n"), workload.MaxInput/16)
	if got, err := b.consumer.Infer(b.ctx, g.Name, "backwards", largest); err != nil || len(got.Output) != len(largest) {
		t.Errorf("the largest request: %d bytes, %v", len(got.Output), err)
	}

	b.crowd(g)

	// A new keep knows none of what the old one answered; a client renews by itself.
	old := r.seal("backwards", r.v.Nonce, []byte(question))
	b.must(g.KillKeep())
	b.must(g.StartKeep(b.ctx))
	b.affirmed(g)
	b.runs(g, "backwards")
	for what, s := range map[string]sealed{"taken before a restart": asked, "made before a restart": old} {
		answer := r.send(s)
		if out, err := r.open(s, answer); err == nil {
			t.Errorf("a request %s: %q", what, out)
		}
		before := r.v
		r.renew()
		if out, err := r.open(s, answer); err == nil || !strings.Contains(err.Error(), "not given since it started") {
			t.Errorf("a request %s: %q, %v", what, out, err)
		}
		r.v = before
	}
	got, err = b.consumer.Infer(b.ctx, g.Name, "backwards", []byte("again"))
	if b.must(err); string(got.Output) != "niaga" {
		t.Errorf("after a restart of the keep: %q", got.Output)
	}
}

// crowd makes 200 requests at the same time. Each gets its own answer; those that
// find no room are told so at once.
func (b *bench) crowd(g *Gateway) {
	b.t.Helper()
	var group sync.WaitGroup
	var mu sync.Mutex
	busy := 0
	for range 200 {
		group.Go(func() {
			question := []byte(rand.Text())
			for b.ctx.Err() == nil {
				got, err := b.consumer.Infer(b.ctx, g.Name, "backwards", question)
				if err == nil {
					for i, c := range got.Output {
						if question[len(question)-1-i] != c {
							b.t.Errorf("%q backwards is not %q", question, got.Output)
							return
						}
					}
					return
				}
				if !strings.Contains(err.Error(), "too many") && !strings.Contains(err.Error(), "under way") {
					b.t.Errorf("one of 200: %v", err)
					return
				}
				mu.Lock()
				busy++
				mu.Unlock()
				wait(b.ctx, 20*time.Millisecond)
			}
		})
	}
	group.Wait()
	b.t.Logf("200 requests at once: %d times there was no room", busy)
}

// counts asks a counting instance how many readings and requests it has seen.
func (b *bench) counts(g *Gateway, request string) (count, sum uint64, err error) {
	got, err := b.consumer.Infer(b.ctx, g.Name, "both", []byte(request))
	if err == nil {
		_, err = fmt.Sscanf(string(got.Output), "{\"n\":\"count\",\"v\":%d}\n{\"n\":\"sum\",\"v\":%d}", &count, &sum)
	}
	return count, sum, err
}

// TestInferAndStream: requests and batches of a stream change the same state, which
// is durable before anybody hears of it; a request that fails leaves none.
func TestInferAndStream(t *testing.T) {
	b, g := up(t, 90*time.Second, Options{}, "numbers")
	b.must(g.StartRunners(1))
	b.deploy(g, "both", b.pack(answering("numbers"), clang(t, "answer.c", "-mexec-model=reactor")))
	b.runs(g, "both")
	const n = 10_000
	path, sum := b.numbers(n)
	b.must(g.StartDriver("numbers", "replay", path, "--speed", "1500"))

	asked, added := uint64(0), uint64(0)
	last := uint64(0)
	for i := range uint64(40) {
		value := 1_000_000_000 * (i + 1) // what a request adds is told apart from the stream
		var count, total uint64
		request := fmt.Sprintf("{\"n\":\"x\",\"t\":1,\"v\":%d}\n", value)
		b.until("an answer", func() (err error) {
			count, total, err = b.counts(g, request)
			if err != nil && !strings.Contains(err.Error(), "is not running now") {
				t.Fatalf("request %d: %v", i, err)
			}
			return err
		})
		asked, added = asked+1, added+value
		if total/1_000_000_000 != added/1_000_000_000 || count <= last || count < asked {
			t.Fatalf("after %d requests: count %d, sum %d, before that the count was %d", asked, count, total, last)
		}
		last = count
		switch i {
		case 10, 20: // right after the answer: what was answered is in the state
			killed := b.worker(g, 0)
			b.must(syscall.Kill(killed, syscall.SIGKILL))
			b.until("another worker", func() error { // before the keep knows, a request would go to the dead one
				if b.worker(g, 0) == killed {
					return errors.New("the dead one is still there")
				}
				return nil
			})
		case 15, 25:
			_, _, err := b.counts(g, "!trap")
			if err == nil || !strings.Contains(err.Error(), "unreachable") {
				t.Errorf("a request that makes the guest trap: %v", err)
			}
		}
	}
	_, _, err := b.counts(g, "!loop")
	if err == nil || !strings.Contains(err.Error(), "ended before it answered") {
		t.Errorf("a request that makes the guest loop: %v", err)
	}
	b.finish(g, "numbers")
	b.until("all of both", func() error {
		count, total, err := b.counts(g, "")
		if err == nil && (count != n+asked || total != sum+added) {
			err = fmt.Errorf("count %d of %d, sum %d of %d", count, n+asked, total, sum+added)
		}
		return err
	})
	w := b.said(g)["both"]
	t.Logf("failures %d: %s", w.Failures, w.Reason)
	if w.Failures < 5 || !strings.Contains(w.Reason, "killed") {
		t.Errorf("the evidence says %d failures: %s", w.Failures, w.Reason)
	}
}

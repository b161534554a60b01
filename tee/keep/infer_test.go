package keep

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/hpke"
	"strings"
	"testing"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// call is a client's request and what it keeps to read the answer.
type call struct {
	key    hpke.PrivateKey
	sealed []byte
	data   []byte // routed
}

func (n *node) request(t *testing.T, instance string, nonce []byte, edit func(*workload.Asked)) call {
	t.Helper()
	return n.requestWith(t, instance, nonce, edit, func(key []byte) []byte {
		return must(message.Grant{Tenant: tenant, Consumer: "c", Key: key}.Sign(n.cloud.owner))(t)
	})
}

// requestWith is a request that shows another grant for its key.
func (n *node) requestWith(t *testing.T, instance string, nonce []byte, edit func(*workload.Asked), grant func(key []byte) []byte) call {
	t.Helper()
	c := call{key: must(hpke.MLKEM768P256().GenerateKey())(t)}
	key := cose.MarshalHPKEKey(c.key.PublicKey())
	r := workload.Request{Input: []byte("input"), Reply: key, ID: random(16), Grant: grant(key)}
	c.sealed = must(r.Seal(n.subject(), instance, nonce, n.receive()))(t)
	a := workload.Asked{ID: []byte("id"), Instance: instance, Nonce: nonce, Sealed: c.sealed}
	if edit != nil {
		edit(&a)
	}
	c.data = workload.Wrap(workload.KindRequest, a)
	return c
}

// answer is the keep's newest answer, as the client reads it.
func (f *fabric) answer(t *testing.T, n *node, c call, instance string, pub *ecdsa.PublicKey) ([]byte, error) {
	t.Helper()
	before := len(f.replies)
	if _, err := (tee.Peer{Data: c.data}).Do(n.ctx(), n); err != nil {
		return nil, err
	}
	f.until("an answer", func() bool { return len(f.replies) > before })
	out, _, err := workload.OpenResponse(pub, n.subject(), instance, c.sealed, f.replies[before].Data, c.key)
	return out, err
}

func TestInfer(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	n.deployed("i", manifest(nil))
	n.staff = 1
	f.until("it runs", func() bool { return f.settled("i") })
	nonce := n.evidence().Challenge.Nonce
	pub := &n.keep.epochKey.PublicKey

	c := n.request(t, "i", nonce, nil)
	if out, err := f.answer(t, n, c, "i", pub); err != nil || string(out) != "got input" {
		t.Errorf("%q, %v", out, err)
	}
	last := f.replies[len(f.replies)-1].Data
	other := must(hpke.MLKEM768P256().GenerateKey())(t)
	if _, _, err := workload.OpenResponse(pub, n.subject(), "i", c.sealed, last, other); err == nil {
		t.Error("another key opens the result")
	}
	if bytes.Contains(last, []byte("got input")) {
		t.Error("the result is in the clear")
	}
	if _, _, err := workload.OpenResponse(&newKey(t).PublicKey, n.subject(), "i", c.sealed, last, c.key); err == nil {
		t.Error("another's signature is taken")
	}
	refused := func(name string, c call, instance, want string) {
		t.Helper()
		if _, err := f.answer(t, n, c, instance, &n.keep.epochKey.PublicKey); err == nil || !strings.Contains(err.Error(), "refuses: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	refused("a replay", c, "i", "was taken before")
	for name, g := range map[string]struct {
		grant func(key []byte) []byte
		want  string
	}{
		"no grant": {func([]byte) []byte { return nil }, "shows no grant"},
		"a grant of another": {func(key []byte) []byte {
			return must(message.Grant{Tenant: tenant, Consumer: "c", Key: key}.Sign(newKey(t)))(t)
		}, "message.Grant: verify"},
		"a grant for a gateway": {func([]byte) []byte {
			return must(message.Grant{Tenant: tenant, Consumer: gw, Gateway: true}.Sign(n.cloud.owner))(t)
		}, "for another key"},
		"a grant for a key": {func([]byte) []byte {
			return must(message.Grant{Tenant: tenant, Consumer: "c", Key: cose.MarshalHPKEKey(other.PublicKey())}.Sign(n.cloud.owner))(t)
		}, "for another key"},
		"an expired grant": {func(key []byte) []byte {
			return must(message.Grant{Tenant: tenant, Consumer: "c", Key: key, Expires: 1}.Sign(n.cloud.owner))(t)
		}, "expired"},
	} {
		refused(name, n.requestWith(t, "i", nonce, nil, g.grant), "i", g.want)
	}
	refused("another instance", n.request(t, "j", nonce, nil), "j", "no instance j runs here")
	refused("a nonce never answered", n.request(t, "i", random(32), nil), "i", "has not given since it started")
	refused("another nonce than sealed", n.request(t, "i", random(32), func(a *workload.Asked) { a.Nonce = nonce }), "i", "opening a request")
	refused("a cut request", func() call {
		c := n.request(t, "i", nonce, nil)
		c.sealed = c.sealed[:len(c.sealed)-1]
		c.data = workload.Wrap(workload.KindRequest, workload.Asked{ID: []byte("id"), Instance: "i", Nonce: nonce, Sealed: c.sealed})
		return c
	}(), "i", "opening a request")
	for name, edit := range map[string]func(*workload.Asked){
		"no id":       func(a *workload.Asked) { a.ID = nil },
		"a long id":   func(a *workload.Asked) { a.ID = make([]byte, 65) },
		"no instance": func(a *workload.Asked) { a.Instance = "" },
	} {
		_, err := (tee.Peer{Data: n.request(t, "i", nonce, edit).data}).Do(n.ctx(), n)
		wantRefusal(t, name, err, "without an id or an instance")
	}
	// Challenges are forgotten, the oldest first; and by the next keep.
	for range maxAnswered {
		n.evidence()
	}
	refused("an old verdict", n.request(t, "i", nonce, nil), "i", "or long ago")
	nonce = n.evidence().Challenge.Nonce
	stale := n.request(t, "i", nonce, nil)
	n.restart(1)
	f.until("it runs again", func() bool { return f.settled("i") })
	refused("the keep before", stale, "i", "has not given since it started")
}

// A runner that dies, has too much to do, or says too much: the client hears of it.
func TestInferBounds(t *testing.T) {
	f := newFabric(t)
	n := f.node(gw)
	n.deployed("i", manifest(nil))
	nonce := n.evidence().Challenge.Nonce
	pub := &n.keep.epochKey.PublicKey
	if _, err := f.answer(t, n, n.request(t, "i", nonce, nil), "i", pub); err == nil || !strings.Contains(err.Error(), "is not running now") {
		t.Error(err)
	}
	c := n.connect(false)
	next[tee.Assign](c, tee.KindAssign)
	_ = c.d.Send(tee.KindReport, tee.Report{Running: true})
	f.until("it runs", func() bool { return f.settled("i") })
	long := n.request(t, "i", nonce, nil)
	before := len(f.replies)
	must(tee.Peer{Data: long.data}.Do(n.ctx(), n))(t)
	i := next[tee.Infer](c, tee.KindInfer)
	for range 2 { // the second answers nothing
		_ = c.d.Send(tee.KindInferred, tee.Inferred{ID: i.ID, Output: make([]byte, 1000<<10)})
	}
	f.until("an answer", func() bool { return len(f.replies) > before })
	if _, _, err := workload.OpenResponse(pub, n.subject(), "i", long.sealed, f.replies[before].Data, long.key); err == nil || !strings.Contains(err.Error(), "the result has 1024000 bytes") {
		t.Error(err)
	}
	calls := map[string]call{}
	for range maxInfer {
		x := n.request(t, "i", nonce, nil)
		calls[string(workload.RequestHash(x.sealed))] = x
		must(tee.Peer{Data: x.data}.Do(n.ctx(), n))(t)
	}
	if _, err := f.answer(t, n, n.request(t, "i", nonce, nil), "i", pub); err == nil || !strings.Contains(err.Error(), "32 requests are under way") {
		t.Error(err)
	}
	before = len(f.replies)
	c.d.Close()
	f.until("all have an answer", func() bool { return len(f.replies) >= before+maxInfer })
	for _, r := range f.replies[before:] {
		for hash, x := range calls {
			_, got, err := workload.OpenResponse(pub, n.subject(), "i", x.sealed, r.Data, x.key)
			if string(got.Request) == hash {
				if err == nil || !strings.Contains(err.Error(), "ended before it answered") {
					t.Error(err)
				}
				delete(calls, hash)
			}
		}
	}
	if len(calls) != 0 {
		t.Errorf("%d have no answer", len(calls))
	}
}

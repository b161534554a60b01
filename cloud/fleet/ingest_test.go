package fleet_test

import (
	"bytes"
	"crypto/ecdsa"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/cloud/keybroker"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
)

func TestIngestInOrder(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "order")
	var sent [][]byte
	for i := range 3 {
		sent = append(sent, g.chunk("temp", i+1))
		g.store(sent[i])
	}
	g.start() // a new epoch, which knows of the one before
	g.setVerdict(g.verdict())
	sent = append(sent, g.chunk("temp", 2))
	g.store(sent[3])
	got := g.records("temp")
	for i := range got {
		if !bytes.Equal(got[i], sent[i]) {
			t.Errorf("chunk %d is stored otherwise than it was sent", i)
		}
	}
	g.want("temp", 4, 0, "")
}

func TestIngestRepeatedAndReordered(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "repeat")
	var sent [][]byte
	for range 5 {
		sent = append(sent, g.chunk("temp", 2))
	}
	last := g.store(sent[0])
	for range 2 {
		g.publish("sealed", sent[0])
		if got := g.mark(); !same(got, last) {
			t.Fatalf("a repeated chunk was answered with %d", got.Seq)
		}
	}
	for _, i := range []int{4, 2, 3} { // too early: said where the stream stands, and no more
		g.publish("sealed", sent[i])
		if got := g.mark(); !same(got, last) {
			t.Fatalf("an early chunk was answered with %d", got.Seq)
		}
	}
	for _, c := range sent[1:] {
		last = g.store(c)
	}
	for _, c := range sent { // a whole replay: all are stored, up to the newest
		g.publish("sealed", c)
		if got := g.mark(); !same(got, last) || got.Cursor != nil {
			t.Fatalf("a replayed chunk was answered with %+v", got)
		}
	}
	g.want("temp", 5, 0, "")
}

func TestIngestGap(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "acme", "gap")
	g.store(g.chunk("temp", 1))
	lost, after := g.chunk("temp", 2), []byte(nil)
	at := g.checkpoint("temp")
	after = g.chunk("temp", 1)
	g.publish("sealed", after)
	g.mark()
	g.want("temp", 1, 0, "")
	// Words that do not count: by another key, of another type, about another chunk.
	word := g.checkpoint("temp")
	g.publish("hello", must(word.Sign(newKey(), sealing.TypOldest)))
	g.publish("hello", must(word.Sign(g.key, sealing.TypCheckpoint)))
	other := word
	other.Subject = "acme/other"
	g.publish("hello", must(other.Sign(g.key, sealing.TypOldest)))
	eventually(t, "three words are refused", func() bool { return refusals(f, "") == 3 })
	g.say(at)
	g.publish("sealed", after)
	if got := g.mark(); got.Seq != 0 {
		t.Fatalf("it went on over a gap, to %d", got.Seq)
	}
	g.say(word)
	g.store(after)
	g.want("temp", 2, 0, "gap")
	g.publish("sealed", lost) // it comes after all
	g.store(g.chunk("temp", 1))
	g.want("temp", 3, 1, "gap gap")
}

func TestIngestForks(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "fork")
	g.store(g.chunk("temp", 2))
	clone := *g
	s := *g.streams["temp"]
	clone.streams = map[string]*stream{"temp": &s}
	g.store(g.chunk("temp", 2))
	g.publish("sealed", clone.chunk("temp", 2)) // another chunk in the same place
	g.publish("sealed", clone.chunk("temp", 2)) // and what follows that one
	g.publish("sealed", clone.chunk("temp", 1)) // waits for what only the clone has
	g.mark()
	g.store(g.chunk("temp", 2))
	g.want("temp", 3, 2, "fork fork")
	clone.start()
	clone.counter = g.counter
	clone.epoch = sealing.NewEpoch(g.counter, [8]byte{0xff}) // a twin of the epoch
	clone.key = g.key
	clone.last = map[string]sealing.Before{}
	g.publish("sealed", clone.chunk("temp", 1))
	g.publish("sealed", g.chunk("temp", 1))
	g.mark()
	g.want("temp", 4, 3, "fork fork fork")
}

func TestIngestRollback(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "rollback")
	first := g.key
	g.store(g.chunk("temp", 1))
	knew := g.last["temp"]
	hidden := g.chunk("temp", 1)
	g.store(g.chunk("other", 1))
	g.publish("sealed", hidden)
	g.mark()
	g.start()
	second := g.key
	g.last["temp"] = knew // the keep was shown an old spool
	g.setVerdict(g.verdict(first))
	g.store(g.chunk("temp", 1))
	g.want("temp", 3, 0, "rollback")
	unseen, epoch := g.counter+1, g.epoch
	g.epoch, g.streams = sealing.NewEpoch(unseen, [8]byte{7}), map[string]*stream{}
	late := g.chunk("temp", 1)
	g.last["temp"] = sealing.Before{Epoch: epoch, Count: 1, Head: g.position(g.records("temp")[2]).Checkpoint.Head}
	g.counter++
	g.start()
	g.setVerdict(g.verdict(first, second))
	g.store(g.chunk("temp", 1)) // an epoch that knows nothing of unseen
	g.publish("sealed", late)
	g.store(g.chunk("temp", 1))
	g.want("temp", 5, 1, "rollback rollback")
}

// What the keep may not have been shown may still be in the spool.
func TestIngestWaitsForWhatTheKeepDoesNotKnow(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "unknown")
	old := g.key
	g.store(g.chunk("temp", 1))
	under := g.chunk("temp", 1)
	g.last["temp"] = sealing.Before{Epoch: g.epoch}
	g.start()
	g.setVerdict(g.verdict(old))
	after := g.chunk("temp", 1)
	g.publish("sealed", after)
	if got := g.mark(); got.Epoch == g.epoch {
		t.Fatal("the new epoch came first: the agent will throw away what is under way")
	}
	g.store(under)
	g.say(g.checkpoint("temp"))
	g.store(after)
	g.want("temp", 3, 0, "gap")
}

func TestIngestRefusals(t *testing.T) {
	for i, x := range []struct {
		name   string
		spoil  func(g *gateway)                      // the gateway or its verdict
		data   func(g *gateway, chunk []byte) []byte // what is sent
		reason string
	}{
		{"garbage", nil, func(*gateway, []byte) []byte { return []byte("garbage") }, "malformed"},
		{"nothing", nil, func(*gateway, []byte) []byte { return nil }, "malformed"},
		{"too large", nil, func(*gateway, []byte) []byte { return make([]byte, sealing.MaxChunk+1) }, "at most"},
		{"cut off", nil, func(_ *gateway, c []byte) []byte { return c[:len(c)-1] }, "malformed"},
		{"one bit of the signature", nil, func(_ *gateway, c []byte) []byte { c[len(c)-1] ^= 1; return c }, "signature"},
		{"a key that no verdict names", func(g *gateway) { g.key = newKey(); g.streams = map[string]*stream{} }, nil, "no verdict vouches"},
		{"signed by another key, named as ours", nil, func(g *gateway, c []byte) []byte {
			theirs := must(g.checkpoint("temp").Sign(newKey(), sealing.TypCheckpoint))
			forged, pos, err := sealing.ParseChunk(c)
			if err != nil {
				panic(err)
			}
			forged.Checkpoint = bytes.Replace(theirs, signerOf(theirs), pos.Signer, 1)
			return forged.Marshal()
		}, "verify"},
		{"another gateway's chunk", func(g *gateway) { g.name += "x" }, func(g *gateway, c []byte) []byte { g.name = strings.TrimSuffix(g.name, "x"); return c }, "the chunk is of"},
		{"no verdict", func(g *gateway) {
			if err := bus.Latest.Purge(deadline(g.t), cloud.Key(g.tenant, g.name)); err != nil {
				g.t.Fatal(err)
			}
		}, nil, "no verdict yet"},
		{"an expired verdict", func(g *gateway) { v := g.verdict(); v.Expires = time.Now().Unix(); g.setVerdict(v) }, nil, "expired"},
		{"a contraindicated verdict", func(g *gateway) {
			v := g.verdict()
			bad := attest.Vector{Instance: 2, Executables: 96}
			v.Submods[attest.Submodule] = attest.Appraisal{Status: bad.Status(), Vector: bad}
			g.setVerdict(v)
		}, nil, "contraindicated"},
		{"a verdict about another gateway", func(g *gateway) { v := g.verdict(); v.Subject = "acme/other"; g.setVerdict(v) }, nil, "about acme/other"},
		{"a verdict for another tenant", func(g *gateway) { v := g.verdict(); v.Audience = "globex"; g.setVerdict(v) }, nil, "for globex"},
		{"a verdict by the operator", func(g *gateway) { g.setVerdictBy(g.verdict(), signers["acme"]["operator"]) }, nil, "verdict"},
		{"a verdict by another tenant's verifier", func(g *gateway) { g.setVerdictBy(g.verdict(), signers["globex"]["verifier"]) }, nil, "verdict"},
		{"a revoked gateway", func(g *gateway) { g.change(func(e *cloud.Gateway) { e.Revoked = true }) }, nil, "is revoked"},
		{"a gateway that is gone", func(g *gateway) {
			if err := bus.Gateways.Purge(deadline(g.t), cloud.Key(g.tenant, g.name)); err != nil {
				g.t.Fatal(err)
			}
		}, nil, "is enrolled"},
	} {
		t.Run(x.name, func(t *testing.T) {
			f, stop := startFleet(t) // with nothing remembered
			g := enrolled(t, "acme", name("refused", i))
			hints := must(bus.NC.SubscribeSync("ek1.acme." + g.name + ".down.notify"))
			if x.spoil != nil {
				x.spoil(g)
			}
			data := g.chunk("temp", 1)
			if x.data != nil {
				data = x.data(g, data)
			}
			g.publish("sealed", data)
			eventually(t, "it is refused", func() bool { return refusals(f, "") == 1 })
			if refusals(f, x.reason) != 1 {
				t.Errorf("refused for %v, want %q", f.Metrics.Of("acme"), x.reason)
			}
			stop()
			if n, _, _ := g.acks.Pending(); n != 0 {
				t.Error("it was answered with a watermark")
			}
			g.want("temp", 0, 0, "")
			if x.spoil != nil && x.data == nil && !strings.HasPrefix(x.reason, "is ") {
				if _, err := hints.NextMsgWithContext(deadline(t)); err != nil {
					t.Error("the gateway was not asked to attest")
				}
			}
		})
	}
}

// signerOf is the id of the key that signed a checkpoint.
func signerOf(msg []byte) []byte {
	_, kid, err := sealing.PeekCheckpoint(msg)
	if err != nil {
		panic(err)
	}
	return kid
}

func (g *gateway) change(f func(*cloud.Gateway)) {
	g.t.Helper()
	if _, err := cloud.Change(deadline(g.t), bus.Gateways, cloud.Key(g.tenant, g.name), func(e *cloud.Gateway, _ bool) error {
		f(e)
		return nil
	}); err != nil {
		g.t.Fatal(err)
	}
}

func TestIngestGarbageDisplacesNothing(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "acme", "garbage")
	first := g.chunk("temp", 3)
	// A broker sends forgeries of the place first: other keys, and the true chunk with
	// each of a number of bits changed.
	forger := enrolledKey(t, g)
	g.publish("sealed", forger.chunk("temp", 3))
	r := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		bad := bytes.Clone(first)
		bad[r.IntN(len(bad))] ^= 1 << r.IntN(8)
		g.publish("sealed", bad)
		g.publish("hello", bad)
	}
	g.store(first)
	g.want("temp", 1, 0, "")
	eventually(t, "all of it is refused", func() bool { return refusals(f, "") == 201 })
}

// enrolledKey is g with a key that nobody vouches for.
func enrolledKey(t testing.TB, g *gateway) *gateway {
	return &gateway{t: t, tenant: g.tenant, name: g.name, key: newKey(), epoch: g.epoch, last: map[string]sealing.Before{}, streams: map[string]*stream{}}
}

func TestIngestVerdictIsReadAgainForANewKey(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "newkey")
	g.store(g.chunk("temp", 1))
	old := g.key
	g.start()
	g.setVerdict(g.verdict(old)) // at once: no age of the remembered verdict delays it
	g.store(g.chunk("temp", 1))
	g.want("temp", 2, 0, "")
}

// Messages of many streams lie between each other in the store; a search for an
// old one finds it whatever is around it.
func TestIngestFindsOldChunksAmongManyStreams(t *testing.T) {
	startFleet(t)
	const gateways, streams, epochs, each = 3, 3, 3, 3
	r := rand.New(rand.NewPCG(3, 4))
	var gs []*gateway
	old := make([][]*ecdsa.PrivateKey, gateways)
	type sent struct {
		g    *gateway
		name string
		data []byte
	}
	var all []sent
	for i := range gateways {
		gs = append(gs, enrolled(t, "acme", name("many", i)))
	}
	for e := range epochs {
		for n := range each * gateways * streams {
			i := r.IntN(gateways)
			x := sent{gs[i], name("s", r.IntN(streams)), nil}
			x.data = x.g.chunk(x.name, 1+n%2)
			x.g.store(x.data)
			all = append(all, x)
		}
		if e == epochs-1 {
			break
		}
		for i, g := range gs {
			old[i] = append(old[i], g.key)
			g.start()
			g.setVerdict(g.verdict(old[i]...))
		}
	}
	before := must(bus.Rec.Info(deadline(t))).State.Msgs
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, x := range all {
		x.g.publish("sealed", x.data)
		cp := x.g.position(x.data).Checkpoint
		if got := x.g.mark(); got.Stream != cp.Stream || got.Epoch.Counter() < cp.Epoch.Counter() {
			t.Fatalf("a stored chunk of %s was answered with %s", cp.Stream, got.Stream)
		}
	}
	if after := must(bus.Rec.Info(deadline(t))).State.Msgs; after != before {
		t.Errorf("%d chunks were stored again", after-before)
	}
	for _, g := range gs {
		if f := g.findings(); f != "" {
			t.Errorf("%s: found %s", g.name, f)
		}
	}
}

// Two replicas on one bus, every chunk sent many times and out of order: each is
// stored once, in order.
func TestIngestTwoReplicas(t *testing.T) {
	startFleet(t)
	startFleet(t)
	g := enrolled(t, "acme", "two")
	var sent [][]byte
	for range 30 {
		sent = append(sent, g.chunk("temp", 1))
	}
	want := g.checkpoint("temp")
	eventually(t, "all are stored", func() bool {
		for i := range sent {
			g.publish("sealed", sent[i])
			g.publish("sealed", sent[max(0, i-1)])
			g.publish("sealed", sent[i])
		}
		for {
			m, err := g.acks.NextMsg(20 * time.Millisecond)
			if err != nil {
				return false
			}
			if got, err := sealing.VerifyCheckpoint(&signers["acme"]["fleet"].PublicKey, sealing.TypWatermark, m.Data); err == nil && same(got, want) {
				return true
			}
		}
	})
	got := g.records("temp")
	if len(got) != len(sent) {
		t.Fatalf("%d chunks are stored, %d were sent", len(got), len(sent))
	}
	for i := range got {
		if !bytes.Equal(got[i], sent[i]) {
			t.Fatalf("chunk %d is in another's place", i)
		}
	}
	g.want("temp", len(sent), 0, "")
}

func TestIngestKeepsTheStreamKeyWithItsVerdict(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "keys")
	data := g.chunk("temp", 1)
	g.store(data)
	c, pos, err := sealing.ParseChunk(data)
	if err != nil {
		t.Fatal(err)
	}
	k, _, ok, err := cloud.Get[keybroker.StreamKey](deadline(t), bus.Keys, cloud.Key("acme", "keys")+".temp."+pos.Checkpoint.Epoch.String())
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	v, err := attest.VerifyVerdict(&signers["acme"]["verifier"].PublicKey, k.Verdict)
	if err != nil || v.Subject != "acme/keys" || !bytes.Equal(k.Message, c.StreamKey) {
		t.Fatalf("stored with the verdict on %s: %v", v.Subject, err)
	}
}

func TestIngestOddStreamNames(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "acme", "oddnames")
	for i, n := range []string{"a.b", "*", ">", "with space", strings.Repeat("x", 32), "ü"} {
		g.publish("sealed", g.chunk(n, 1))
		g.publish("hello", must(g.checkpoint(n).Sign(g.key, sealing.TypOldest)))
		eventually(t, "refused: "+n, func() bool {
			return refusals(f, "not a stream's name")+refusals(f, "the message is of") == uint64(2*(i+1))
		})
	}
	g.store(g.chunk("temp", 1))
}

func TestFetch(t *testing.T) {
	startFleet(t)
	a, b := enrolled(t, "globex", "fetch1"), enrolled(t, "globex", "fetch2")
	other := enrolled(t, "acme", "fetch1")
	var want [][]byte
	for range 3 {
		for _, g := range []*gateway{a, b} {
			c := g.chunk("temp", 1)
			g.store(c)
			want = append(want, c)
		}
		other.store(other.chunk("temp", 1))
	}
	ask := func(r fleet.Fetch) fleet.Fetched {
		t.Helper()
		return must(cloud.Ask[fleet.Fetched](deadline(t), bus.NC, "api.globex.data.fetch", r))
	}
	got := ask(fleet.Fetch{})
	if len(got.Chunks) != len(want) {
		t.Fatalf("%d chunks, want %d", len(got.Chunks), len(want))
	}
	for i, c := range got.Chunks {
		if !bytes.Equal(c.Data, want[i]) || c.Gateway != name("fetch", 1+i%2) {
			t.Errorf("chunk %d is of %s", i, c.Gateway)
		}
	}
	if again := ask(fleet.Fetch{After: got.Next}); len(again.Chunks) != 0 || again.Next != got.Next {
		t.Errorf("after the end: %d chunks", len(again.Chunks))
	}
	if one := ask(fleet.Fetch{Gateway: "fetch2", Stream: "temp"}); len(one.Chunks) != 3 {
		t.Errorf("of one gateway: %d chunks", len(one.Chunks))
	}
	if none := ask(fleet.Fetch{Gateway: "fetch3"}); len(none.Chunks) != 0 {
		t.Errorf("of nobody: %d chunks", len(none.Chunks))
	}
	for _, r := range []fleet.Fetch{{Gateway: "*"}, {Gateway: ">"}, {Stream: "*"}, {Gateway: "a.b"}, {Stream: "temp.>"}} {
		if _, err := cloud.Ask[fleet.Fetched](deadline(t), bus.NC, "api.globex.data.fetch", r); err == nil {
			t.Errorf("%+v was answered", r)
		}
	}
	// A reader that waits gets what comes.
	answer := make(chan fleet.Fetched, 1)
	go func() {
		r, _ := cloud.Ask[fleet.Fetched](deadline(t), bus.NC, "api.globex.data.fetch", fleet.Fetch{After: got.Next, Wait: 20_000})
		answer <- r
	}()
	a.store(a.chunk("temp", 1))
	if r := <-answer; len(r.Chunks) != 1 {
		t.Errorf("a reader that waited got %d chunks", len(r.Chunks))
	}
}

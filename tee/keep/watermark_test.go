package keep

import (
	"bytes"
	"crypto/ecdsa"
	"testing"

	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
)

func (g *gateway) watermark(key *ecdsa.PrivateKey, typ string, c tee.Chunk, edit func(*sealing.Checkpoint)) []byte {
	g.t.Helper()
	w := sealing.Checkpoint{Subject: subject, Stream: c.Stream, Epoch: sealing.Epoch(c.Epoch), Seq: c.Seq, Head: c.Head}
	if edit != nil {
		edit(&w)
	}
	return must(w.Sign(key, typ))(g.t)
}

func TestWatermarks(t *testing.T) {
	g := newGateway(t)
	g.up()
	c := tee.Chunk{Stream: "a", Epoch: random(16), Seq: 3, Head: random(32)}
	_, err := tee.CheckWatermark{Message: g.watermark(g.cloud.fleet, sealing.TypWatermark, c, nil)}.Do(g.ctx(), g)
	wantRefusal(t, "not enrolled", err, "the fleet's key is not known")
	g.enrol()
	c.Epoch = g.keep.st.Epoch[:]
	w := must(tee.CheckWatermark{Message: g.watermark(g.cloud.fleet, sealing.TypWatermark, c, nil)}.Do(g.ctx(), g))(t)
	if w.Stream != "a" || !bytes.Equal(w.Epoch, c.Epoch) || w.Seq != 3 || !bytes.Equal(w.Head, c.Head) {
		t.Errorf("%+v", w)
	}
	for name, msg := range map[string][]byte{
		"another subject": g.watermark(g.cloud.fleet, sealing.TypWatermark, c, func(w *sealing.Checkpoint) { w.Subject = "acme/gw2" }),
		"the verifier's":  g.watermark(g.cloud.verifier, sealing.TypWatermark, c, nil),
		"the keep's own":  g.watermark(g.keep.epochKey, sealing.TypWatermark, c, nil),
		"as a checkpoint": g.watermark(g.cloud.fleet, sealing.TypCheckpoint, c, nil),
		"a checkpoint":    g.watermark(g.keep.epochKey, sealing.TypCheckpoint, c, nil),
		"a later epoch": g.watermark(g.cloud.fleet, sealing.TypWatermark, c, func(w *sealing.Checkpoint) {
			w.Epoch = sealing.NewEpoch(w.Epoch.Counter()+1, [8]byte{})
		}),
		"another epoch of its counter": g.watermark(g.cloud.fleet, sealing.TypWatermark, c, func(w *sealing.Checkpoint) { w.Epoch[15] ^= 1 }),
		"nothing":                      nil,
	} {
		_, err := tee.CheckWatermark{Message: msg}.Do(g.ctx(), g)
		wantRefusal(t, name, err, "")
	}
}

// The key of an earlier epoch is vouched for as long as its data is under way, in
// any stream, and not longer.
func TestPriorKeys(t *testing.T) {
	g, first := enrolled(t)
	a, b := g.read(1), g.read(2)
	prior := func(name string, want ...attest.Genuine) {
		t.Helper()
		got := g.attest().Claims.Prior
		ok := len(got) == len(want)
		for i := range want {
			ok = ok && bytes.Equal(got[i], want[i].Claims.Cnf.Key)
		}
		if !ok {
			t.Errorf("%s: %d prior keys, want %d", name, len(got), len(want))
		}
	}
	check := func(c tee.Chunk, edit func(*sealing.Checkpoint)) {
		t.Helper()
		must(tee.CheckWatermark{Message: g.watermark(g.cloud.fleet, sealing.TypWatermark, c, edit)}.Do(g.ctx(), g))(t)
	}
	prior("in its own epoch")
	// The agent shows nothing, or what others signed: nothing is taken over.
	g.checkpoints = [][]byte{g.watermark(newKey(t), sealing.TypCheckpoint, a, nil), {1}, g.watermark(g.cloud.fleet, sealing.TypWatermark, a, nil)}
	state := g.state
	g.boot()
	out := must(g.start())(t) // not stored: as if it had not been
	if len(out.Commit) == 0 {
		t.Fatal("no step")
	}
	if n := len(g.keep.pending.next.Prior); n != 0 {
		t.Errorf("%d prior keys from foreign checkpoints", n)
	}
	g.state = state
	g.checkpoints = [][]byte{a.Checkpoint, b.Checkpoint}
	g.up()
	prior("a and b under way", first)
	second := g.attest()
	c := g.read(1)
	g.checkpoints = [][]byte{c.Checkpoint, b.Checkpoint}
	g.up()
	prior("both epochs", first, second)
	check(c, nil)
	prior("b under way", first, second)
	check(b, func(w *sealing.Checkpoint) { w.Epoch = sealing.NewEpoch(0, [8]byte{}) })
	prior("b covered in an older epoch only", first, second)
	check(b, nil)
	prior("all there")
	// The agent keeps the watermarks: the next start knows at once.
	g.checkpoints = [][]byte{c.Checkpoint, b.Checkpoint}
	g.watermarks = [][]byte{
		g.watermark(g.cloud.fleet, sealing.TypWatermark, c, nil), g.watermark(g.cloud.fleet, sealing.TypWatermark, b, nil),
		g.watermark(g.cloud.owner, sealing.TypWatermark, b, nil),
	}
	g.up()
	prior("started with watermarks")
}

func TestOldest(t *testing.T) {
	g, genuine := enrolled(t)
	c := g.read(1)
	m := must(tee.Oldest{Stream: c.Stream, Epoch: c.Epoch, Seq: c.Seq, Head: c.Head}.Do(g.ctx(), g))(t)
	o, err := sealing.VerifyCheckpoint(genuine.EpochKey, sealing.TypOldest, m.Data)
	if err != nil || m.Kind != "hello" || o.Subject != subject || o.Stream != "a" || o.Seq != c.Seq || !bytes.Equal(o.Head, c.Head) {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := sealing.VerifyCheckpoint(genuine.EpochKey, sealing.TypCheckpoint, m.Data); err == nil {
		t.Error("it passes for a checkpoint")
	}
	for name, r := range map[string]tee.Oldest{
		"a short epoch": {Stream: "a", Epoch: c.Epoch[1:], Head: c.Head},
		"a short head":  {Stream: "a", Epoch: c.Epoch, Head: c.Head[1:]},
		"no stream":     {Stream: "c/d", Epoch: c.Epoch, Head: c.Head},
	} {
		_, err = r.Do(g.ctx(), g)
		wantRefusal(t, name, err, "not a place in a stream")
	}
}

package keep

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"edgekeep/sealing"
	"edgekeep/sensors"
	"edgekeep/tee"
)

// world is one source with its driver and its agent, over any number of keeps.
type world struct {
	t failer

	// The keep that lives now.
	s     *sealer
	conn  *ingestConn
	epoch uint64
	taken []tee.Chunk // by the agent, not durable yet

	// The agent. done is the newest ticket that it was given and made durable.
	durable []tee.Chunk
	keys    []*ecdsa.PublicKey // of each durable chunk
	done    uint64

	// The driver numbers its lines from 1 and sends again what is not acknowledged.
	next, acked uint64
	bad         map[uint64]bool // lines that the keep is to reject

	opened *opener
}

func newWorld(t failer) *world {
	w := &world{t: t, next: 1, bad: map[uint64]bool{}, opened: newOpener()}
	w.newKeep(sealing.Epoch{})
	return w
}

func epochID(counter uint64) sealing.Epoch { return sealing.NewEpoch(counter, [8]byte{9}) }

// newKeep starts a keep with what the agent can show.
func (w *world) newKeep(previous sealing.Epoch) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	cfg := sealerConfig()
	cfg.Sources = cfg.Sources[:1]
	w.s, w.epoch, w.taken, w.done = newSealer(cfg, key), w.epoch+1, nil, 0
	b := beginning{
		subject: subject, data: ownerKey().PublicKey(), epoch: epochID(w.epoch),
		previous: previous, known: []string{"a"}, ends: map[string]end{},
	}
	if n := len(w.durable); n > 0 {
		e, err := sealing.VerifyCheckpoint(w.keys[n-1], sealing.TypCheckpoint, w.durable[n-1].Checkpoint)
		if err != nil {
			w.t.Fatal(err)
		}
		shown := end{Before: sealing.Before{Epoch: e.Epoch, Count: e.Seq + 1, Head: e.Head}}
		if e.Cursor != nil {
			shown.Cursor = *e.Cursor
		}
		b.ends["a"] = shown
	}
	w.s.begin(b)
	w.conn = nil
}

// hello connects the driver, if the keep answers, in place of what was there.
func (w *world) hello() {
	if w.conn != nil {
		w.conn.stale = true
	}
	c := connect(w.s, 1, "x")
	w.conn = nil
	if _, line, settled := c.position(); settled {
		w.conn = c
		w.ack(line)
		w.next = max(line, w.acked) + 1 // the oldest line that it still has
	}
}

// ack checks that what is acknowledged is durable or rejected.
func (w *world) ack(line uint64) {
	if line <= w.acked {
		return
	}
	w.acked = line
	have := map[uint64]bool{}
	for i, c := range w.durable {
		for _, n := range w.lines(newOpenerAt(w.opened, c), c, w.keys[i]) {
			have[n] = true
		}
	}
	for n := uint64(1); n <= line; n++ {
		if !have[n] && !w.bad[n] {
			w.t.Fatalf("line %d is acknowledged, and durable nowhere", n)
		}
	}
}

// newOpenerAt opens one chunk alone, with the stream keys known so far.
func newOpenerAt(o *opener, c tee.Chunk) *opener {
	at := newOpener()
	at.keys = o.keys
	at.next[fmt.Sprintf("%s/%x", c.Stream, c.Epoch)] = c.Seq
	return at
}

func (w *world) lines(o *opener, c tee.Chunk, key *ecdsa.PublicKey) (out []uint64) {
	readings, _, err := o.open(c, key)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range readings {
		out = append(out, uint64(r.Value.(int64)))
	}
	return out
}

func (w *world) send(bad bool) {
	if w.conn == nil {
		return
	}
	n := w.next
	w.next++
	if b, known := w.bad[n]; known {
		bad = b // a line sent again is the same line
	}
	w.bad[n] = bad
	if bad {
		w.s.reject(w.conn, "bad", n)
	} else if !w.s.add(w.conn, sensors.Point{Measurement: "m", Fields: []sensors.Field{{Name: "v", Value: int64(n)}}}, n) {
		w.t.Fatalf("line %d: the connection ended", n)
	}
	w.readAcks()
}

func (w *world) readAcks() {
	if w.conn != nil {
		_, line, _ := w.conn.position()
		w.ack(line)
	}
}

func (w *world) take() {
	for _, c := range w.s.chunks(w.t, w.done, 0) {
		if err := w.opened.once(c); err != nil {
			w.t.Fatal(err)
		}
		if !slices.ContainsFunc(w.taken, func(d tee.Chunk) bool { return d.Ticket == c.Ticket }) {
			w.taken = append(w.taken, c)
		}
	}
}

// store makes n of the chunks taken durable, as the agent's spool does: what it
// has already is not stored again.
func (w *world) store(n int) {
	for _, c := range w.taken[:min(n, len(w.taken))] {
		known := slices.ContainsFunc(w.durable, func(d tee.Chunk) bool { return bytes.Equal(d.Epoch, c.Epoch) && d.Seq == c.Seq })
		if !known {
			w.durable, w.keys = append(w.durable, c), append(w.keys, &w.s.key.PublicKey)
			w.lines(w.opened, c, &w.s.key.PublicKey) // in order, or it fails
		}
		w.done = max(w.done, c.Ticket)
	}
	w.taken = w.taken[min(n, len(w.taken)):]
}

func (w *world) confirm() {
	w.s.chunks(w.t, math.MaxInt64, w.done)
	w.readAcks()
}

// crash ends the keep. What was not durable is gone.
func (w *world) crash() {
	w.take() // to see that places are not used twice, even by what is lost
	w.newKeep(epochID(w.epoch))
}

func (w *world) rotate() {
	w.epoch++
	w.s.begin(beginning{subject: subject, data: ownerKey().PublicKey(), epoch: epochID(w.epoch)})
}

// settle brings everything under way to its end.
func (w *world) settle() {
	w.s.flushAll()
	w.take()
	w.store(math.MaxInt)
	w.confirm()
}

// Whatever happens in which order: each line is in the durable chunks once, in
// order; what is acknowledged is durable; no place in a stream is used twice; and
// each epoch says truly where the one before it ended.
func TestSealerModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld(rt)
		w.settle()
		w.hello()
		rt.Repeat(map[string]func(*rapid.T){
			"send":      func(rt *rapid.T) { w.send(false) },
			"send more": func(rt *rapid.T) { w.send(false) },
			"send bad":  func(rt *rapid.T) { w.send(true) },
			"seal": func(*rapid.T) { // all of it, but the keep is not told
				w.s.flushAll()
				w.take()
				w.store(math.MaxInt)
			},
			"flush":   func(*rapid.T) { w.s.flushAll() },
			"take":    func(*rapid.T) { w.take() },
			"store":   func(rt *rapid.T) { w.store(rapid.IntRange(1, 3).Draw(rt, "chunks")) },
			"confirm": func(*rapid.T) { w.confirm() },
			"hello":   func(*rapid.T) { w.hello() },
			"rotate":  func(*rapid.T) { w.rotate() },
			"keep crash": func(rt *rapid.T) {
				w.crash()
				if rapid.Bool().Draw(rt, "the driver is there") {
					w.settle()
					w.hello()
				}
			},
			"agent crash":  func(*rapid.T) { w.taken, w.done = nil, 0 },
			"driver crash": func(*rapid.T) { w.conn = nil },
		})
		// In the end the driver sends all that was not acknowledged.
		last := w.next - 1
		w.settle()
		w.hello()
		if w.conn == nil {
			rt.Fatal("nothing is under way, and hello is not answered")
		}
		for w.next <= last {
			w.send(false)
		}
		w.settle()
		if last > 0 && w.acked < last {
			rt.Fatalf("%d of %d lines are acknowledged", w.acked, last)
		}
		w.check(last)
	})
}

func (w *world) check(last uint64) {
	var want, got []uint64
	for n := uint64(1); n <= last; n++ {
		if !w.bad[n] {
			want = append(want, n)
		}
	}
	o := newOpener()
	var previous tee.Chunk
	for i, c := range w.durable {
		got = append(got, w.lines(o, c, w.keys[i])...)
		pos := must2(sealing.ParseChunk(c.Data))(w.t)
		if b := pos.First.Before; i > 0 && c.Seq == 0 {
			switch {
			case b == nil:
				w.t.Fatalf("epoch %x says nothing of the one before", c.Epoch)
			case b.Known() && (!bytes.Equal(b.Epoch[:], previous.Epoch) || b.Count != previous.Seq+1 || !bytes.Equal(b.Head, previous.Head)):
				w.t.Fatalf("epoch %x says %+v of the one before, which is %x with %d records", c.Epoch, b, previous.Epoch, previous.Seq+1)
			case !b.Known() && bytes.Equal(b.Epoch[:], previous.Epoch):
				w.t.Fatalf("epoch %x does not know where %x ended", c.Epoch, previous.Epoch)
			}
		}
		previous = c
	}
	if !slices.Equal(got, want) {
		w.t.Fatalf("the durable lines are\n%v, want\n%v", got, want)
	}
}

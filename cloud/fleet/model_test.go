package fleet

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"edgekeep/sealing"
)

// world is a gateway, a network and a store, for one stream. The gateway and the
// store follow the real ones' rules; the network delivers anything that was ever
// sent, in any order and any number of times, or nothing.
type world struct {
	// The gateway: keep, and the agent's spool.
	counter uint64
	epoch   sealing.Epoch
	seq     uint64
	prev    []byte
	last    *sealing.Before // what the keep knows of the end of the stream
	spool   []sealing.Position
	backups [][]sealing.Position
	saved   []keepState
	emitted []sealing.Position
	trimmed []sealing.Position
	unique  uint64

	// Everything that was ever sent.
	chunks, words, marks []any

	// The store, with what was found of each entry, and what was kept aside.
	store    []entry
	asides   []sealing.Position
	oldest   sealing.Checkpoint
	findings []string

	// What the history was like.
	lossy, restored, forgot, cloned bool
	hidden                          bool // a restart on an old spool of the same epoch
}

type entry struct {
	pos     sealing.Position
	finding string
}

type keepState struct {
	counter uint64
	epoch   sealing.Epoch
	seq     uint64
	prev    []byte
	last    *sealing.Before
	spool   []sealing.Position
}

func newWorld() *world {
	w := &world{}
	w.open()
	return w
}

// open begins an epoch, as a start of the keep or a rotation of keys does. Every
// stream opens every epoch with a record.
func (w *world) open() {
	w.counter++
	w.unique++
	var random [8]byte
	binary.BigEndian.PutUint64(random[:], w.unique)
	w.epoch, w.seq, w.prev = sealing.NewEpoch(w.counter, random), 0, make([]byte, 32)
	w.emit(1)
}

// emit seals n records into one chunk.
func (w *world) emit(n int) {
	var p sealing.Position
	for i := range n {
		h := sealing.Header{Stream: "s", Epoch: w.epoch, Seq: w.seq, Prev: w.prev}
		if w.seq == 0 {
			h.Before = w.last
		}
		if i == 0 {
			p.First = h
		}
		w.unique++
		sum := sha256.Sum256(binary.BigEndian.AppendUint64(bytes.Clone(w.prev), w.unique))
		w.prev = sum[:]
		p.Checkpoint = sealing.Checkpoint{Subject: "acme/gw1", Stream: "s", Epoch: w.epoch, Seq: w.seq, Head: w.prev}
		w.seq++
	}
	w.last = &sealing.Before{Epoch: w.epoch, Count: w.seq, Head: w.prev}
	w.spool, w.emitted = append(w.spool, p), append(w.emitted, p)
}

// restart starts the keep again. The agent shows it the newest checkpoint of its
// spool, or none.
func (w *world) restart(shown *sealing.Checkpoint) {
	switch {
	case shown == nil:
		w.last = &sealing.Before{Epoch: w.epoch}
	case shown.Epoch != w.epoch:
		w.last = &sealing.Before{Epoch: w.epoch, Head: bytes.Clone(shown.Epoch[:])}
	default:
		w.last = &sealing.Before{Epoch: w.epoch, Count: shown.Seq + 1, Head: shown.Head}
	}
	w.open()
}

// trim is the spool's: what a watermark covers goes, unless hashes differ.
func (w *world) trim(m sealing.Checkpoint) {
	n := 0
	for n < len(w.spool) {
		c := w.spool[n].Checkpoint
		if c.Epoch == m.Epoch && c.Seq == m.Seq && !bytes.Equal(c.Head, m.Head) {
			return
		}
		if c.Epoch == m.Epoch && c.Seq <= m.Seq || c.Epoch != m.Epoch && c.Epoch.Counter() < m.Epoch.Counter() {
			n++
			continue
		}
		break
	}
	w.trimmed = append(w.trimmed, w.spool[:n]...)
	w.spool = slices.Clone(w.spool[n:])
}

func (w *world) head() head {
	if len(w.store) == 0 {
		return head{}
	}
	return head{found: true, last: w.store[len(w.store)-1].pos.Checkpoint}
}

// receive does with a chunk what ingest does, on a store in memory.
func (w *world) receive(p sealing.Position) {
	h := w.head()
	switch a := assess(h, p, w.oldest); a.verdict {
	case next:
		w.store = append(w.store, entry{p, a.finding})
		w.find(a.finding)
		w.marks = append(w.marks, p.Checkpoint)
	case stored:
		below, above := w.neighbours(p)
		if a := assessOld(below, above, p); a.verdict == stored {
			w.marks = append(w.marks, h.last)
		} else {
			w.aside(p, a.finding)
		}
	case wait:
		if h.found {
			w.marks = append(w.marks, h.last)
		}
	case aside:
		w.aside(p, a.finding)
	}
}

// neighbours is ingest's, on a store in memory.
func (w *world) neighbours(p sealing.Position) (below *sealing.Position, above sealing.Position) {
	for i := range w.store {
		if compare(w.store[i].pos.Checkpoint, p.Checkpoint) >= 0 {
			return below, w.store[i].pos
		}
		below = &w.store[i].pos
	}
	panic("the store ends before the chunk")
}

func (w *world) aside(p sealing.Position, finding string) {
	for _, a := range w.asides {
		if bytes.Equal(a.Checkpoint.Head, p.Checkpoint.Head) {
			return
		}
	}
	w.asides = append(w.asides, p)
	w.find(finding)
}

func (w *world) find(kind string) {
	if kind != "" {
		w.findings = append(w.findings, kind)
	}
}

func (w *world) has(p sealing.Position) bool {
	same := func(q sealing.Position) bool { return bytes.Equal(q.Checkpoint.Head, p.Checkpoint.Head) }
	return slices.ContainsFunc(w.store, func(e entry) bool { return same(e.pos) }) || slices.ContainsFunc(w.asides, same)
}

// settle is a network that works at last: the agent says what is oldest, sends
// its spool in order, and gets every watermark.
func (w *world) settle() {
	for range len(w.spool) + 2 { // one round for each word that a chunk may need
		if len(w.spool) > 0 {
			w.oldest = w.spool[0].Checkpoint
		}
		for _, p := range slices.Clone(w.spool) {
			w.receive(p)
			if n := len(w.marks); n > 0 {
				w.trim(w.marks[n-1].(sealing.Checkpoint))
			}
		}
	}
}

// check holds what must always be true of the store.
func (w *world) check(t *rapid.T) {
	type place struct {
		epoch sealing.Epoch
		seq   uint64
	}
	taken := map[place]bool{}
	h := head{}
	for i, e := range w.store {
		for s := e.pos.First.Seq; s <= e.pos.Checkpoint.Seq; s++ {
			p := place{e.pos.Checkpoint.Epoch, s}
			if taken[p] {
				t.Fatalf("two records in one place: %d/%d", p.epoch.Counter(), p.seq)
			}
			taken[p] = true
		}
		if i > 0 && compare(w.store[i-1].pos.Checkpoint, e.pos.Checkpoint) >= 0 {
			t.Fatal("the store is not in order: a binary search in it fails")
		}
		if why := outOfChain(h, e.pos); why != "" && e.finding == "" {
			t.Fatalf("entry %d is out of chain without a finding: %s", i, why)
		}
		h = head{found: true, last: e.pos.Checkpoint}
	}
	for _, f := range w.findings {
		switch {
		case !w.lossy && !w.restored && !w.forgot && !w.cloned:
			t.Fatalf("false alarm: %s, though nothing was ever lost", f)
		case f == fork && !w.cloned:
			t.Fatal("a fork was found, but there is one history only")
		case f == rollback && !w.restored && !w.cloned:
			t.Fatal("a rollback was found, but nothing was rolled back")
		}
	}
}

func (w *world) history() map[string]func(*rapid.T) {
	pick := func(t *rapid.T, from []any) (any, bool) {
		if len(from) == 0 {
			return nil, false
		}
		return from[rapid.IntRange(0, len(from)-1).Draw(t, "which")], true
	}
	return map[string]func(*rapid.T){
		"": w.check,
		"emit": func(t *rapid.T) {
			for range rapid.IntRange(1, 3).Draw(t, "chunks") {
				w.emit(rapid.IntRange(1, 3).Draw(t, "records"))
			}
		},
		"rotate": func(*rapid.T) { w.open() },
		"restart": func(*rapid.T) {
			w.restart(&sealing.Checkpoint{Epoch: w.last.Epoch, Seq: w.last.Count - 1, Head: w.last.Head})
		},
		"send": func(*rapid.T) {
			for _, p := range w.spool {
				w.chunks = append(w.chunks, p)
			}
			if len(w.spool) > 0 {
				w.words = append(w.words, w.spool[0].Checkpoint)
			}
		},
		"deliver in order": func(*rapid.T) {
			for _, p := range w.spool {
				w.receive(p)
			}
		},
		"deliver any chunk": func(t *rapid.T) {
			if p, ok := pick(t, w.chunks); ok {
				w.receive(p.(sealing.Position))
			}
		},
		"deliver any word": func(t *rapid.T) {
			if c, ok := pick(t, w.words); ok {
				w.oldest = c.(sealing.Checkpoint)
			}
		},
		"deliver any watermark": func(t *rapid.T) {
			if c, ok := pick(t, w.marks); ok {
				w.trim(c.(sealing.Checkpoint))
			}
		},
	}
}

// finish lets the network work and checks that what can still be sent arrives,
// and that what did not arrive was found missing.
func (w *world) finish(t *rapid.T) {
	w.settle()
	w.check(t)
	if w.cloned {
		return // of two histories one may wait for ever for what only the other has
	}
	for _, p := range w.spool {
		if !w.has(p) {
			t.Fatalf("chunk %d/%d is resent, and neither stored nor kept aside", p.Checkpoint.Epoch.Counter(), p.Checkpoint.Seq)
		}
	}
	for _, p := range w.trimmed {
		// An old spool may hold what comes before a watermark and never arrived.
		if !w.has(p) && !w.restored {
			t.Fatalf("chunk %d/%d was trimmed, and neither stored nor kept aside", p.Checkpoint.Epoch.Counter(), p.Checkpoint.Seq)
		}
	}
	w.emit(1) // what comes after a loss at the end shows it
	w.settle()
	w.check(t)
	for _, p := range w.emitted {
		// A keep that is started on an old spool of its last epoch cannot know what it
		// sealed after.
		if !w.has(p) && len(w.findings) == 0 && !w.hidden {
			t.Fatalf("chunk %d/%d was lost without a finding", p.Checkpoint.Epoch.Counter(), p.Checkpoint.Seq)
		}
		if !w.has(p) && !w.lossy && !w.restored {
			t.Fatalf("chunk %d/%d did not arrive, though nothing was lost", p.Checkpoint.Epoch.Counter(), p.Checkpoint.Seq)
		}
	}
}

func TestModelNothingLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		t.Repeat(w.history())
		w.finish(t)
		if len(w.spool) > 0 {
			t.Fatal("everything is stored and the spool is not empty")
		}
	})
}

func TestModelLoss(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		h := w.history()
		h["lose a prefix of the spool"] = func(t *rapid.T) {
			if n := rapid.IntRange(0, len(w.spool)).Draw(t, "n"); n > 0 {
				w.lossy, w.spool = true, slices.Clone(w.spool[n:])
			}
		}
		h["restart without a word"] = func(*rapid.T) {
			w.forgot = true
			w.restart(nil)
		}
		t.Repeat(h)
		w.finish(t)
		if len(w.spool) > 0 {
			t.Fatal("the spool cannot be trimmed any more")
		}
	})
}

func TestModelRestoredSpool(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		h := w.history()
		h["back up"] = func(*rapid.T) { w.backups = append(w.backups, slices.Clone(w.spool)) }
		h["restore, and start the keep on it"] = func(t *rapid.T) {
			if len(w.backups) == 0 {
				return
			}
			old := w.backups[rapid.IntRange(0, len(w.backups)-1).Draw(t, "which")]
			if len(old) == 0 {
				return
			}
			w.restored, w.spool = true, slices.Clone(old)
			w.hidden = w.hidden || old[len(old)-1].Checkpoint.Epoch == w.epoch
			w.restart(&old[len(old)-1].Checkpoint)
		}
		t.Repeat(h)
		w.finish(t)
	})
}

// A clone of a whole gateway, TPM and all, is what nothing on the gateway can
// prevent: the store keeps one history straight and the other aside.
func TestModelClone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		h := w.history()
		h["save"] = func(*rapid.T) {
			w.saved = append(w.saved, keepState{w.counter, w.epoch, w.seq, w.prev, w.last, slices.Clone(w.spool)})
		}
		h["go back"] = func(t *rapid.T) {
			if len(w.saved) == 0 {
				return
			}
			s := w.saved[rapid.IntRange(0, len(w.saved)-1).Draw(t, "which")]
			w.cloned = true
			w.counter, w.epoch, w.seq, w.prev, w.last, w.spool = s.counter, s.epoch, s.seq, s.prev, s.last, slices.Clone(s.spool)
		}
		t.Repeat(h)
		w.finish(t)
	})
}

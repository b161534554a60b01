package keep

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/hpke"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"edgekeep/sealing"
	"edgekeep/sensors"
	"edgekeep/tee"
)

// line gives a line to the sealer as a connection's reader does.
func line(t testing.TB, c *ingestConn, number uint64, text string) bool {
	t.Helper()
	return c.s.add(c, must(sensors.ParseLine([]byte(text)))(t), number)
}

// The data owner, who opens what sealers seal.
var ownerKey = sync.OnceValue(func() hpke.PrivateKey {
	key, err := hpke.MLKEM768P256().GenerateKey()
	if err != nil {
		panic(err)
	}
	return key
})

func sealerConfig() Config {
	return Config{Flush: time.Second, Sources: []SourceConfig{
		{Name: "a", UID: 1, Freshness: time.Minute, Rate: 10}, {Name: "b", UID: 2, Freshness: time.Minute, Rate: 10},
	}}
}

// testSealer is a sealer in an epoch, whose opening records are taken.
func testSealer(t testing.TB, cfg Config) *sealer {
	t.Helper()
	s := newSealer(cfg, newKey(t))
	s.begin(beginning{subject: subject, data: ownerKey().PublicKey(), epoch: sealing.NewEpoch(1, [8]byte{1})})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.confirm(s.tickets)
	return s
}

// connect is a connection of a source with a session, empty for a plain one.
func connect(s *sealer, uid uint32, session string) *ingestConn {
	c := &ingestConn{s: s, src: s.sources[uid], session: session, acks: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	c.src.conns[c] = struct{}{}
	return c
}

func (s *sealer) flushAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, src := range s.sources {
		s.flush(src)
	}
}

// chunks takes all that is there after a ticket, without waiting.
func (s *sealer) chunks(t failer, after, confirm uint64) []tee.Chunk {
	t.Helper()
	var out []tee.Chunk
	for {
		r, err := s.take(context.Background(), tee.Take{After: after, Confirm: confirm})
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Chunks) == 0 {
			return out
		}
		out = append(out, r.Chunks...)
		after = out[len(out)-1].Ticket
	}
}

// opener opens chunks as a consumer does.
type opener struct {
	keys map[string][]byte // stream key by stream and epoch
	next map[string]uint64 // expected sequence by stream and epoch
	seen map[string]string // chunk by stream, epoch and sequence
}

func newOpener() *opener {
	return &opener{keys: map[string][]byte{}, next: map[string]uint64{}, seen: map[string]string{}}
}

// once fails if a place in a stream was used for other bytes.
func (o *opener) once(c tee.Chunk) error {
	at := fmt.Sprintf("%s/%x/%d", c.Stream, c.Epoch, c.Seq)
	if before, ok := o.seen[at]; ok && before != string(c.Data) {
		return fmt.Errorf("%s was used twice", at)
	}
	o.seen[at] = string(c.Data)
	return nil
}

func (o *opener) open(c tee.Chunk, epochKey *ecdsa.PublicKey) ([]sealing.Reading, sealing.Checkpoint, error) {
	chunk, pos, err := sealing.ParseChunk(c.Data)
	if err == nil {
		err = sealing.VerifyChunk(chunk, epochKey)
	}
	if err != nil {
		return nil, pos.Checkpoint, err
	}
	cp := pos.Checkpoint
	if cp.Stream != c.Stream || !bytes.Equal(cp.Epoch[:], c.Epoch) || cp.Seq != c.Seq || !bytes.Equal(cp.Head, c.Head) || !bytes.Equal(chunk.Checkpoint, c.Checkpoint) {
		return nil, cp, errors.New("the agent was told something else than the chunk says")
	}
	stream := fmt.Sprintf("%s/%x", c.Stream, c.Epoch)
	if pos.First.Seq != o.next[stream] {
		return nil, cp, fmt.Errorf("%s: record %d, want %d", stream, pos.First.Seq, o.next[stream])
	}
	if len(chunk.StreamKey) > 0 {
		if _, o.keys[stream], err = sealing.OpenStreamKey(epochKey, sealing.TypStreamKey, chunk.StreamKey, ownerKey()); err != nil {
			return nil, cp, err
		}
	}
	aead, err := sealing.NewAEAD(o.keys[stream])
	if err != nil {
		return nil, cp, err
	}
	var out []sealing.Reading
	for _, r := range chunk.Records {
		_, readings, err := sealing.OpenRecord(aead, r)
		if err != nil {
			return nil, cp, err
		}
		out = append(out, readings...)
		o.next[stream]++
	}
	return out, cp, nil
}

func values(readings []sealing.Reading) (out []any) {
	for _, r := range readings {
		out = append(out, r.Value)
	}
	return out
}

func TestNumberedLines(t *testing.T) {
	s := testSealer(t, sealerConfig())
	c := connect(s, 1, "x")
	for _, n := range []uint64{1, 2, 2, 1, 5, 3, 4, 6} { // 3 and 4 were skipped, and come too late
		line(t, c, n, fmt.Sprintf("m v=%di", n))
	}
	line(t, connect(s, 1, ""), 0, "m v=100i") // another process of the source, without numbers
	if at := s.sources[1].committed; at.Line != 0 {
		t.Errorf("acknowledged before anything is durable: %+v", at)
	}
	s.flushAll()
	got := s.chunks(t, 0, 0)
	chunk, pos, err := sealing.ParseChunk(got[0].Data)
	if len(got) != 1 || err != nil {
		t.Fatalf("%d chunks, %v", len(got), err)
	}
	if len(chunk.StreamKey) != 0 {
		t.Error("a stream key in the second record")
	}
	if pos.Checkpoint.Cursor == nil || *pos.Checkpoint.Cursor != (sealing.Cursor{Session: "x", Line: 6}) {
		t.Errorf("the checkpoint's cursor: %+v", pos.Checkpoint.Cursor)
	}
	if at := s.sources[1].committed; at.Line != 0 {
		t.Errorf("acknowledged when taken: %+v", at)
	}
	s.chunks(t, got[0].Ticket, got[0].Ticket)
	if session, at, settled := c.position(); session != "x" || at != 6 || !settled {
		t.Errorf("%s %d %v", session, at, settled)
	}
	st, _ := s.stats()
	if st[0].Lines != 5 || st[0].Readings != 5 || st[0].Repeated != 4 || st[0].Missing != 2 || st[0].Rejected != 0 || !st[0].Connected || st[1].Connected {
		t.Errorf("%+v", st)
	}

	// Another session begins at its own 1.
	d := connect(s, 1, "y")
	if _, at, settled := d.position(); at != 0 || !settled {
		t.Errorf("a new session is at %d, %v", at, settled)
	}
	line(t, d, 1, "m v=1i")
	if _, at, _ := c.position(); at != 6 {
		t.Errorf("the old session is at %d", at)
	}
	s.flushAll()
	got = s.chunks(t, got[0].Ticket, 0)
	s.chunks(t, got[0].Ticket, got[0].Ticket)
	if _, at, _ := d.position(); at != 1 {
		t.Errorf("the new session is at %d", at)
	}
	if _, at, _ := c.position(); at != 0 {
		t.Errorf("the old session is still known, at %d", at)
	}
}

// A chunk of the session before is confirmed after a new session has begun: that
// acknowledges nothing of the new one.
func TestLateConfirmation(t *testing.T) {
	s := testSealer(t, sealerConfig())
	for n := range uint64(3) {
		line(t, connect(s, 1, "x"), n+1, "m v=1i")
	}
	s.flushAll()
	x := s.chunks(t, 0, 0)[0].Ticket
	c := connect(s, 1, "y")
	line(t, c, 1, "m v=2i")
	s.chunks(t, x, x)
	if _, at, settled := c.position(); at != 0 || settled {
		t.Errorf("at %d, settled %v", at, settled)
	}
	s.flushAll()
	y := s.chunks(t, x, 0)[0].Ticket
	s.chunks(t, y, y)
	if _, at, settled := c.position(); at != 1 || !settled {
		t.Errorf("at %d, settled %v", at, settled)
	}
}

func TestRejectedLines(t *testing.T) {
	s := testSealer(t, sealerConfig())
	c := connect(s, 1, "x")
	at := func(want uint64) {
		t.Helper()
		if _, at, _ := c.position(); at != want {
			t.Errorf("acknowledged up to %d, want %d", at, want)
		}
	}
	s.reject(c, "bad", 1)
	at(1) // nothing before it waits
	line(t, c, 2, "m v=2i")
	s.reject(c, "bad", 3)
	s.reject(c, "bad", 3) // once more
	at(1)
	s.flushAll()
	s.reject(c, "bad", 4)
	at(1) // 2 is under way
	first := s.chunks(t, 0, 0)
	line(t, c, 5, "m v=5i")
	s.reject(c, "worse", 6)
	s.chunks(t, first[0].Ticket, first[0].Ticket)
	at(3) // what the confirmed chunk says: 5 waits, and 4 with it
	s.flushAll()
	second := s.chunks(t, first[0].Ticket, 0)
	s.chunks(t, second[0].Ticket, second[0].Ticket)
	at(6)
	st, _ := s.stats()
	if st[0].Rejected != 6-2+1 || st[0].LastError != "worse" || st[0].Lines != 2 || st[0].Missing != 0 || st[0].Repeated != 1 {
		t.Errorf("%+v", st[0])
	}
	s.reject(connect(s, 1, ""), "plain", 0)
	at(6)
}

// What a connection that was taken over still has in its buffer is not taken: the
// new one says it again.
func TestTakeover(t *testing.T) {
	s := testSealer(t, sealerConfig())
	old := connect(s, 1, "x")
	line(t, old, 1, "m v=1i")
	s.mu.Lock()
	old.stale = true
	s.mu.Unlock()
	if line(t, old, 2, "m v=2i") {
		t.Error("a stale connection goes on")
	}
	s.reject(old, "bad", 2)
	c := connect(s, 1, "x")
	if _, _, settled := c.position(); settled {
		t.Error("settled while line 1 is under way")
	}
	s.flushAll()
	got := s.chunks(t, 0, 0)
	s.chunks(t, got[0].Ticket, got[0].Ticket)
	if _, at, settled := c.position(); at != 1 || !settled {
		t.Errorf("at %d, settled %v", at, settled)
	}
	if !line(t, c, 2, "m v=2i") {
		t.Error("the new connection is refused")
	}
}

func TestRotationInTheMiddle(t *testing.T) {
	s := testSealer(t, sealerConfig())
	o := newOpener()
	c := connect(s, 1, "x")
	line(t, c, 1, "m v=1i")
	s.flushAll()
	line(t, c, 2, "m v=2i")
	old := s.epoch
	s.begin(beginning{subject: subject, data: ownerKey().PublicKey(), epoch: sealing.NewEpoch(2, [8]byte{2})})
	line(t, c, 3, "m v=3i")
	s.flushAll()
	var a []tee.Chunk
	for _, x := range s.chunks(t, 0, 0) {
		if x.Stream == "a" {
			a = append(a, x)
		}
	}
	if len(a) != 4 || sealing.Epoch(a[1].Epoch) != old || sealing.Epoch(a[2].Epoch) != s.epoch {
		t.Fatalf("%d chunks", len(a))
	}
	pos := must2(sealing.ParseChunk(a[2].Data))(t)
	if b := pos.First.Before; b == nil || b.Epoch != old || b.Count != a[1].Seq+1 || !bytes.Equal(b.Head, a[1].Head) {
		t.Errorf("%+v", b)
	}
	if pos.Checkpoint.Cursor == nil || pos.Checkpoint.Cursor.Line != 2 {
		t.Errorf("the cursor is lost with the rotation: %+v", pos.Checkpoint.Cursor)
	}
	s.chunks(t, a[1].Ticket, a[1].Ticket) // only the old epoch is durable
	if _, at, _ := c.position(); at != 2 {
		t.Errorf("at %d", at)
	}
	var got []any
	for _, x := range a[2:] {
		readings, _, err := o.open(x, &s.key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, values(readings)...)
	}
	if !slices.Equal(got, []any{int64(3)}) {
		t.Errorf("%v", got)
	}
}

// The agent does not confirm: sources wait, and go on when it does.
func TestBackpressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSealer(t, sealerConfig())
		text := "m v=\"" + strings.Repeat("x", 8000) + "\""
		big := must(sensors.ParseLine([]byte(text)))(t)
		c := connect(s, 1, "x")
		sent, done := uint64(0), make(chan bool, 1)
		go func() {
			for s.add(c, big, sent+1) {
				sent++
			}
			done <- true
		}()
		synctest.Wait()
		if s.queued < maxQueued || s.queued > maxQueued+sealing.MaxChunk {
			t.Errorf("it stopped at %d bytes", s.queued)
		}
		stopped := sent
		// Another source waits too, and a stale or draining one does not.
		other, ended := connect(s, 2, ""), make(chan bool, 1)
		go func() { ended <- s.add(other, big, 0) }()
		synctest.Wait()
		if len(ended) != 0 {
			t.Error("the other source does not wait")
		}
		got := s.chunks(t, 0, 0)
		size := 0
		for _, c := range got {
			size += len(c.Data)
		}
		if size != s.queued {
			t.Errorf("%d bytes taken, %d queued", size, s.queued)
		}
		if _, err := s.take(t.Context(), tee.Take{After: got[len(got)-1].Ticket, Confirm: got[3].Ticket}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if sent == stopped || len(ended) != 1 || !<-ended {
			t.Error("confirming lets nobody go on")
		}
		s.drain()
		if !<-done {
			t.Error("a source does not end")
		}
		s.drain() // again is no harm
		if s.sources[1].pack.Readings() != 0 {
			t.Error("readings are left after draining")
		}
		st, _ := s.stats()
		if st[0].Lines != sent || st[0].Readings != sent {
			t.Errorf("%d lines sent, %+v", sent, st[0])
		}
	})
}

// Before the first epoch everybody waits; nothing is sealed and nothing lost.
func TestBeforeTheFirstEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSealer(sealerConfig(), newKey(t))
		c := connect(s, 1, "x")
		done := make(chan bool, 1)
		p := must(sensors.ParseLine([]byte("m v=1i")))(t)
		go func() { done <- s.add(c, p, 1) }()
		synctest.Wait()
		if _, _, settled := c.position(); settled || len(done) != 0 || s.flushDue(time.Now()) != time.Second {
			t.Error("before an epoch")
		}
		s.reject(c, "bad", 1)
		s.begin(beginning{subject: subject, data: ownerKey().PublicKey(), epoch: sealing.NewEpoch(1, [8]byte{})})
		if !<-done {
			t.Error("refused")
		}
		// A stale one that waits is let go.
		s = newSealer(sealerConfig(), newKey(t))
		c = connect(s, 1, "x")
		go func() { done <- s.add(c, p, 1) }()
		synctest.Wait()
		s.mu.Lock()
		c.stale = true
		s.mu.Unlock()
		s.room.Broadcast()
		if <-done {
			t.Error("a stale connection's line was taken")
		}
		s.drain() // without an epoch: nothing to seal, and no harm
	})
}

func TestFlushDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSealer(t, sealerConfig())
		if d := s.flushDue(time.Now()); d != time.Second {
			t.Errorf("nothing waits: %v", d)
		}
		line(t, connect(s, 1, ""), 0, "m v=1i")
		time.Sleep(300 * time.Millisecond)
		line(t, connect(s, 2, ""), 0, "m v=2i")
		line(t, connect(s, 1, ""), 0, "m v=3i") // does not put off what waits already
		if d := s.flushDue(time.Now()); d != 700*time.Millisecond || len(s.queue) != 0 {
			t.Errorf("%v, %d", d, len(s.queue))
		}
		time.Sleep(700 * time.Millisecond)
		if d := s.flushDue(time.Now()); d != 300*time.Millisecond || len(s.queue) != 1 || s.queue[0].Stream != "a" {
			t.Errorf("%v, %d", d, len(s.queue))
		}
		time.Sleep(300 * time.Millisecond)
		if d := s.flushDue(time.Now()); d != time.Second || len(s.queue) != 2 {
			t.Errorf("%v, %d", d, len(s.queue))
		}
	})
}

func TestTakeWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSealer(t, sealerConfig())
		begin := time.Now()
		r, err := s.take(t.Context(), tee.Take{Wait: 1500})
		if err != nil || len(r.Chunks) != 0 || time.Since(begin) != 1500*time.Millisecond {
			t.Errorf("%+v, %v after %v", r, err, time.Since(begin))
		}
		go func() {
			time.Sleep(time.Second)
			line(t, connect(s, 1, ""), 0, "m v=1i")
			s.flushAll()
		}()
		begin = time.Now()
		r, err = s.take(t.Context(), tee.Take{Wait: 60_000})
		if err != nil || len(r.Chunks) != 1 || time.Since(begin) != time.Second {
			t.Errorf("%d, %v after %v", len(r.Chunks), err, time.Since(begin))
		}
		// Not confirmed, it is offered again; asked for what is after it, not.
		for _, after := range []uint64{0, r.Chunks[0].Ticket} {
			again, err := s.take(t.Context(), tee.Take{After: after})
			if want := int(r.Chunks[0].Ticket - after); err != nil || len(again.Chunks) != min(want, 1) {
				t.Errorf("after %d: %d, %v", after, len(again.Chunks), err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.take(ctx, tee.Take{After: r.Chunks[0].Ticket, Wait: 1000}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		for _, wait := range []int64{-1, 60_001} {
			if _, err := s.take(t.Context(), tee.Take{Wait: wait}); err == nil {
				t.Errorf("it waits for %d ms", wait)
			}
		}
	})
}

func TestLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSealer(t, sealerConfig())
		late := func(want ...bool) {
			t.Helper()
			st, _ := s.stats()
			h := s.health()
			for i, w := range want {
				if st[i].Late != w || h[i].Late != w || h[i].Name != st[i].Name {
					t.Errorf("%d: %v, want %v", i, st[i].Late, w)
				}
			}
		}
		time.Sleep(time.Minute)
		late(false, false)
		line(t, connect(s, 2, ""), 0, "m v=1i")
		time.Sleep(time.Nanosecond)
		late(true, false)
		s.reject(connect(s, 1, ""), "bad", 0) // no reading
		late(true, false)
		line(t, connect(s, 1, "x"), 1, "m v=1i")
		late(false, false)
		time.Sleep(time.Minute)
		line(t, connect(s, 1, "x"), 1, "m v=1i") // nor is one that is here already
		time.Sleep(time.Nanosecond)
		late(true, true)
	})
}

// The order of stats is that of the configuration, whatever order a map has.
func TestStatsOrder(t *testing.T) {
	cfg := sealerConfig()
	cfg.Sources = nil
	for i := range 64 {
		cfg.Sources = append(cfg.Sources, SourceConfig{Name: fmt.Sprintf("s%d", i), UID: uint32(i), Freshness: 1, Rate: 1})
	}
	st, _ := newSealer(cfg, newKey(t)).stats()
	for i, s := range st {
		if s.Name != cfg.Sources[i].Name {
			t.Fatalf("%d: %s", i, s.Name)
		}
	}
}

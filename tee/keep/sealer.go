package keep

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hpke"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"edgekeep/sealing"
	"edgekeep/sensors"
	"edgekeep/tee"
	"edgekeep/tee/attest"
)

// Bounds of what waits in the keep's memory.
const (
	maxContent = 64 << 10 // bytes of SenML at which a record is sealed; the last line may add 37 KiB
	maxUnit    = 32       // bytes of a unit; a longer one is a tag like any other
	maxQueued  = 16 << 20 // bytes of sealed chunks that the agent has not confirmed
	maxTaken   = 600 << 10
)

// sealer turns readings into sealed chunks. It has its own lock, because nothing
// in it waits for the TPM: stream keys are random and the epoch key is in memory.
type sealer struct {
	cfg Config
	key *ecdsa.PrivateKey

	mu       sync.Mutex // protects what follows
	room     *sync.Cond // signalled when queued shrinks or the epoch begins
	subject  string     // empty until an epoch has begun
	data     hpke.PublicKey
	epoch    sealing.Epoch
	sources  map[uint32]*source                // by user
	all      []*source                         // the same in the order of the configuration, then streams of workloads
	fed      func(stream string, chunk []byte) // told of chunks of configured sources that are durable; must not block
	queue    []queued
	queued   int
	tickets  uint64
	arrived  chan struct{} // closed and replaced when the queue grows
	draining bool

	turnedAway uint64 // connections
}

type queued struct {
	tee.Chunk
	source *source
	cursor sealing.Cursor
}

// source is one source, its stream, and what it may do.
type source struct {
	cfg SourceConfig

	// The stream in this epoch.
	aead       cipher.AEAD // nil until its first record
	seq        uint64
	prev       []byte
	key        []byte // for a workload that reads it
	keyMessage []byte // the stream key, sealed and signed
	last       end    // newest record anywhere; Before of the next epoch

	// What waits to be sealed.
	pack   sealing.Pack
	oldest time.Time
	cursor sealing.Cursor // newest numbered line taken

	inflight  int            // chunks that the agent has not confirmed
	committed sealing.Cursor // newest numbered line that is durable
	stats     tee.Source
	seen      time.Time
	conns     map[*ingestConn]struct{}
	acked     func(sealing.Cursor) // for a workload's results, told when committed has moved; must not block
	marks     []mark               // of a workload's results: where lines are, beyond the watermark
	stored    uint64               // newest line that the cloud has
}

// mark says that the records of this epoch up to seq hold the lines up to line.
type mark struct {
	epoch     sealing.Epoch
	seq, line uint64
}

func newSealer(cfg Config, key *ecdsa.PrivateKey) *sealer {
	s := &sealer{cfg: cfg, key: key, sources: map[uint32]*source{}, arrived: make(chan struct{})}
	s.room = sync.NewCond(&s.mu)
	for _, c := range cfg.Sources {
		src := newSource(c)
		s.sources[c.UID], s.all = src, append(s.all, src)
	}
	return s
}

func newSource(c SourceConfig) *source {
	return &source{cfg: c, prev: make([]byte, 32), stats: tee.Source{Name: c.Name}, seen: time.Now(), conns: map[*ingestConn]struct{}{}}
}

// addStream adds a stream for what a workload has to say, unless it is there.
func (s *sealer) addStream(name string, acked func(sealing.Cursor)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.named(name)
	if src == nil {
		src = newSource(SourceConfig{Name: name})
		src.acked = acked
		s.all = append(s.all, src)
		if s.subject != "" {
			s.push(src)
		}
	}
	src.acked = acked
}

func (s *sealer) named(name string) *source {
	for _, src := range s.all {
		if src.cfg.Name == name {
			return src
		}
	}
	return nil
}

// streamKey is the key of a stream in this epoch.
func (s *sealer) streamKey(name string, epoch []byte) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.named(name)
	if src == nil || src.key == nil || !bytes.Equal(epoch, s.epoch[:]) {
		return nil, false
	}
	return bytes.Clone(src.key), true
}

// emit takes readings of a workload, numbered from first on in their session; 0
// means that they are not numbered. What was taken before is left out. A record
// holds readings of one session with numbers that follow each other, so that its
// checkpoint's cursor tells the number of each. It blocks like add.
func (s *sealer) emit(name, session string, first uint64, readings []sealing.Reading) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.named(name)
	if src == nil {
		return false
	}
	for i, r := range readings {
		for (s.queued >= maxQueued/2 || s.subject == "") && !s.draining { // the other half is the drivers'
			s.room.Wait()
		}
		if s.draining {
			return false
		}
		if first > 0 {
			at := sealing.Cursor{Session: session, Line: first + uint64(i)}
			if src.cursor.Session == session && at.Line <= src.cursor.Line {
				src.stats.Repeated++
				continue
			}
			if src.cursor.Session != session || at.Line != src.cursor.Line+1 {
				s.flush(src)
			}
			src.cursor = at
		}
		src.pack.Add(r)
		src.stats.Lines++
		if src.oldest.IsZero() {
			src.oldest = time.Now()
		}
		if src.pack.Size() >= maxContent {
			s.flush(src)
		}
	}
	return true
}

// beginning is what an epoch begins with.
type beginning struct {
	subject string
	data    hpke.PublicKey
	epoch   sealing.Epoch

	// Only at the first epoch of this start: the epoch before, which streams there
	// were in it, and where streams ended as far as it is known.
	previous sealing.Epoch
	known    []string
	ends     map[string]end
}

// begin starts an epoch: what waits is sealed under the old one first. Each
// stream opens with a record without readings, so that every epoch has an end to
// be shown at the next start: an agent that shows none of the epoch before hides
// something, or its disk lost it, and the record says so.
func (s *sealer) begin(b beginning) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.subject == ""
	for _, src := range s.all {
		if !first {
			s.flush(src)
		} else {
			src.resume(b)
		}
		src.aead, src.seq, src.prev = nil, 0, make([]byte, 32)
	}
	s.subject, s.data, s.epoch = b.subject, b.data, b.epoch
	for _, src := range s.all {
		s.push(src)
		src.notify() // who said hello before waits for an answer
	}
	s.room.Broadcast()
}

// resume takes over where a stream ended before this start.
func (src *source) resume(b beginning) {
	e, shown := b.ends[src.cfg.Name]
	src.cursor, src.committed = e.Cursor, e.Cursor
	switch {
	case shown && e.Before.Epoch == b.previous:
		src.last = e
	case shown:
		src.last = end{Before: sealing.Before{Epoch: b.previous, Head: e.Before.Epoch[:]}} // an earlier end: see Before.Known
	case slices.Contains(b.known, src.cfg.Name):
		src.last = end{Before: sealing.Before{Epoch: b.previous}}
	}
}

// streams are the names of all streams.
func (s *sealer) streams() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]string, 0, len(s.all))
	for _, src := range s.all {
		out = append(out, src.cfg.Name)
	}
	return out
}

// add takes a line's readings. number is 0 for a line without number. It blocks
// while the agent is behind, and returns false when the connection is to end.
func (s *sealer) add(c *ingestConn, p sensors.Point, number uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := c.src
	for (s.queued >= maxQueued || s.subject == "") && !s.draining && !c.stale {
		s.room.Wait()
	}
	if s.draining || c.stale {
		return false
	}
	if number > 0 && !src.number(c.session, number) {
		return true
	}
	now := time.Now()
	t := p.Time
	if !p.HasTime {
		t = now.UnixNano()
	}
	src.stats.Lines++
	src.seen = now
	if src.pack.Size() >= maxContent {
		s.flush(src)
	}
	tags, unit := nameParts(p.Tags)
	for _, f := range p.Fields {
		src.pack.Add(sealing.Reading{Name: sealing.Name(p.Measurement, tags, f.Name), Unit: unit, Time: t, Value: f.Value})
	}
	if src.oldest.IsZero() {
		src.oldest = now
	}
	if number > 0 {
		src.cursor = sealing.Cursor{Session: c.session, Line: number}
	}
	return true
}

// number says whether a numbered line is new.
func (src *source) number(session string, number uint64) bool {
	if src.cursor.Session != session {
		src.cursor = sealing.Cursor{Session: session}
	}
	if number <= src.cursor.Line {
		src.stats.Repeated++
		return false
	}
	src.stats.Missing += number - src.cursor.Line - 1
	return true
}

// nameParts splits the tag "unit" from the tags that become part of the name.
func nameParts(tags []sensors.Tag) (rest [][2]string, unit string) {
	for _, t := range tags {
		if t.Key == "unit" && len(t.Value) <= maxUnit {
			unit = t.Value
			continue
		}
		rest = append(rest, [2]string{t.Key, t.Value})
	}
	return rest, unit
}

// reject counts a malformed line; a numbered one counts as consumed.
func (s *sealer) reject(c *ingestConn, reason string, number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := c.src
	src.stats.Rejected++
	src.stats.LastError = reason
	if number > 0 && s.subject != "" && !c.stale && src.number(c.session, number) {
		src.cursor = sealing.Cursor{Session: c.session, Line: number}
		src.settle(src.committed)
	}
}

// settle acknowledges a cursor, or the newest one when nothing before it waits.
func (src *source) settle(c sealing.Cursor) {
	if src.inflight == 0 && src.pack.Readings() == 0 {
		c = src.cursor
	}
	if c.Session == src.cursor.Session && c != src.committed {
		src.committed = c
		src.notify()
	}
}

// flushDue seals what has waited for longer than the configured time and returns
// how long until the next one is due.
func (s *sealer) flushDue(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.cfg.Flush
	if s.subject == "" {
		return next
	}
	for _, src := range s.all {
		if src.oldest.IsZero() {
			continue
		}
		if wait := src.oldest.Add(s.cfg.Flush).Sub(now); wait <= 0 {
			s.flush(src)
		} else {
			next = min(next, wait)
		}
	}
	return next
}

// flush seals what waits in a source, as one record in one chunk.
func (s *sealer) flush(src *source) {
	if src.pack.Readings() > 0 {
		s.push(src)
	}
}

// push seals what waits in a source, be it nothing, and queues the chunk.
func (s *sealer) push(src *source) {
	data, checkpoint, err := s.seal(src)
	if err != nil {
		panic("keep: sealing own readings: " + err.Error()) // a bug of ours; better stopped than losing readings silently
	}
	s.tickets++
	s.queue = append(s.queue, queued{
		Chunk: tee.Chunk{
			Ticket: s.tickets, Stream: src.cfg.Name, Epoch: bytes.Clone(s.epoch[:]), Seq: src.seq - 1,
			Head: src.prev, Checkpoint: checkpoint, Data: data,
		},
		source: src, cursor: src.cursor,
	})
	s.queued += len(data)
	if src.acked != nil {
		src.marks = append(src.marks, mark{s.epoch, src.seq - 1, src.cursor.Line})
	}
	src.inflight++
	src.stats.Readings += uint64(src.pack.Readings())
	src.pack, src.oldest = sealing.Pack{}, time.Time{}
	close(s.arrived)
	s.arrived = make(chan struct{})
}

// seal makes the chunk of what waits in a source, and its checkpoint.
func (s *sealer) seal(src *source) (data, checkpoint []byte, err error) {
	content := src.pack.Marshal()
	if s.cfg.Compress {
		content = sealing.Compress(content)
	}
	var chunk sealing.Chunk
	var before *sealing.Before
	if src.aead == nil {
		key := random(sealing.KeySize)
		if src.aead, err = sealing.NewAEAD(key); err != nil {
			return nil, nil, err
		}
		src.keyMessage, err = sealing.SealStreamKey(s.key, sealing.TypStreamKey, s.subject, src.cfg.Name, s.epoch, key, s.data)
		clear(src.key)
		src.key = key
		if err != nil {
			return nil, nil, err
		}
		if src.last.Before.Epoch != (sealing.Epoch{}) {
			before = &src.last.Before
		}
	}
	if src.seq%sealing.KeyEvery == 0 {
		chunk.StreamKey = src.keyMessage
	}
	record, err := sealing.SealRecord(src.aead, src.cfg.Name, s.epoch, src.seq, src.prev, before, content, s.cfg.Compress)
	if err != nil {
		return nil, nil, err
	}
	head := sealing.Hash(record)
	cp := sealing.Checkpoint{Subject: s.subject, Stream: src.cfg.Name, Epoch: s.epoch, Seq: src.seq, Head: head}
	if src.cursor.Session != "" {
		cp.Cursor = &src.cursor
	}
	if chunk.Checkpoint, err = cp.Sign(s.key, sealing.TypCheckpoint); err != nil {
		return nil, nil, err
	}
	chunk.Records = [][]byte{record}
	src.seq++
	src.prev = head
	src.last = end{Before: sealing.Before{Epoch: s.epoch, Count: src.seq, Head: head}, Cursor: src.cursor}
	out := chunk.Marshal()
	if len(out) > sealing.MaxChunk {
		return nil, nil, fmt.Errorf("a chunk of %d bytes", len(out))
	}
	return out, chunk.Checkpoint, nil
}

// take implements tee.Take.
func (s *sealer) take(ctx context.Context, r tee.Take) (tee.TakeReply, error) {
	if r.Wait < 0 || r.Wait > 60_000 {
		return tee.TakeReply{}, errors.New("wait must be between 0 and 60000 ms")
	}
	timeout := time.NewTimer(time.Duration(r.Wait) * time.Millisecond)
	defer timeout.Stop()
	for first := true; ; first = false {
		s.mu.Lock()
		if first {
			s.confirm(r.Confirm)
		}
		chunks, arrived := s.after(r.After), s.arrived
		s.mu.Unlock()
		if len(chunks) > 0 {
			return tee.TakeReply{Chunks: chunks}, nil
		}
		select {
		case <-arrived:
		case <-timeout.C:
			return tee.TakeReply{}, nil
		case <-ctx.Done():
			return tee.TakeReply{}, ctx.Err()
		}
	}
}

// confirm forgets what is durable and lets drivers know.
func (s *sealer) confirm(ticket uint64) {
	n := 0
	for n < len(s.queue) && s.queue[n].Ticket <= ticket {
		q := s.queue[n]
		s.queued -= len(q.Data)
		q.source.inflight--
		q.source.settle(q.cursor)
		if s.fed != nil && q.source.acked == nil {
			s.fed(q.Stream, q.Data)
		}
		n++
	}
	if n > 0 {
		s.queue = append([]queued(nil), s.queue[n:]...)
		s.room.Broadcast()
	}
}

func (s *sealer) after(ticket uint64) []tee.Chunk {
	var out []tee.Chunk
	size := 0
	for _, q := range s.queue {
		if q.Ticket <= ticket {
			continue
		}
		if size += len(q.Data) + 128; size > maxTaken && len(out) > 0 {
			break
		}
		out = append(out, q.Chunk)
	}
	return out
}

// position is where a stream ends: what is sealed later comes after it.
func (s *sealer) position(name string) sealing.Before {
	s.mu.Lock()
	defer s.mu.Unlock()
	if src := s.named(name); src != nil {
		return src.last.Before
	}
	return sealing.Before{}
}

// watermark notes what the cloud has stored of a stream.
func (s *sealer) watermark(w sealing.Checkpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.named(w.Stream)
	if src == nil {
		return
	}
	for len(src.marks) > 0 {
		m := src.marks[0]
		if m.epoch.Counter() > w.Epoch.Counter() || m.epoch == w.Epoch && m.seq > w.Seq {
			return
		}
		src.stored, src.marks = max(src.stored, m.line), src.marks[1:]
	}
}

// storedLine reports whether the cloud has a workload's results up to a line. What
// waits is sealed at once.
func (s *sealer) storedLine(name string, line uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.named(name)
	if src == nil || src.stored >= line {
		return src != nil
	}
	s.flush(src)
	return false
}

// line is the newest numbered line of a stream, durable or about to be.
func (s *sealer) line(name string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if src := s.named(name); src != nil {
		return src.cursor.Line
	}
	return 0
}

// empty reports whether the agent has confirmed everything.
func (s *sealer) empty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue) == 0
}

// stats returns a copy of the counts, in the order of the configuration, and how
// many connections were turned away.
func (s *sealer) stats() ([]tee.Source, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]tee.Source, 0, len(s.all))
	for _, src := range s.all {
		st := src.stats
		st.Connected = len(src.conns) > 0 || src.acked != nil
		st.Late = src.cfg.Freshness > 0 && time.Since(src.seen) > src.cfg.Freshness
		out = append(out, st)
	}
	return out, s.turnedAway
}

func (s *sealer) health() []attest.SourceHealth {
	var out []attest.SourceHealth
	sources, _ := s.stats()
	for _, st := range sources[:len(s.cfg.Sources)] {
		out = append(out, attest.SourceHealth{Name: st.Name, Late: st.Late})
	}
	return out
}

// drain seals what waits and takes no more: the keep stops.
func (s *sealer) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	if s.subject != "" {
		for _, src := range s.all {
			s.flush(src)
		}
	}
	s.room.Broadcast()
}

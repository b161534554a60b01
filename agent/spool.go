package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"edgekeep/internal/cose"
	"edgekeep/internal/durable"
	"edgekeep/tee"
)

// spool is one stream's chunks that the cloud does not have yet.
type spool struct {
	stream string
	dir    string
	log    *durable.Log

	mu        sync.Mutex // protects what follows
	positions []position // of the entries in the log, oldest first
	next      uint64     // index after the last of them; the log may be ahead for a moment
	last      tails
}

// position is where an entry is in the log and in the stream.
type position struct {
	index uint64
	epoch []byte
	seq   uint64
	head  []byte
}

// tails is what the keep wants to see at its next start, beside the log: the
// newest checkpoint and the newest watermark. It is written before a trim, which
// may remove the chunk that holds the checkpoint.
type tails struct {
	Epoch      []byte `cbor:"1,keyasint"`
	Seq        uint64 `cbor:"2,keyasint"`
	Checkpoint []byte `cbor:"3,keyasint"`
	Watermark  []byte `cbor:"4,keyasint"`
}

func openSpool(dir, stream string, maxBytes int64) (*spool, error) {
	log, err := durable.Open(dir, durable.Options{MaxBytes: maxBytes, SegmentBytes: min(8<<20, maxBytes/4)})
	if err != nil {
		return nil, err
	}
	s := &spool{stream: stream, dir: dir, log: log}
	if err := s.load(); err != nil {
		log.Close()
		return nil, err
	}
	return s, nil
}

func (s *spool) tailsPath() string { return s.dir + ".tails" }

func (s *spool) load() error {
	s.next = s.log.First()
	raw, err := os.ReadFile(s.tailsPath())
	if err == nil {
		err = cose.Unmarshal(raw, &s.last)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reading %s: %w", s.tailsPath(), err)
	}
	for from := s.log.First(); from < s.log.Next(); {
		entries, err := s.log.Read(from, 256, 8<<20)
		if err != nil {
			return err
		}
		for _, e := range entries {
			var c tee.Chunk
			if err := cose.Unmarshal(e.Data, &c); err != nil {
				return fmt.Errorf("entry %d: %w", e.Index, err)
			}
			s.note(e.Index, c)
			from = e.Index + 1
		}
	}
	return nil
}

// note remembers an entry. The caller holds s.mu, or is alone.
func (s *spool) note(index uint64, c tee.Chunk) {
	s.positions = append(s.positions, position{index: index, epoch: c.Epoch, seq: c.Seq, head: c.Head})
	s.next = index + 1
	s.last.Epoch, s.last.Seq, s.last.Checkpoint = c.Epoch, c.Seq, c.Checkpoint
}

func (s *spool) tail() (checkpoint, watermark []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.Checkpoint, s.last.Watermark
}

// append makes chunks durable, but for those that are so already: a keep that
// was not told offers them again.
func (s *spool) append(ctx context.Context, chunks []tee.Chunk) error {
	var fresh []tee.Chunk
	var entries [][]byte
	for _, c := range chunks {
		if s.has(c) {
			continue
		}
		c.Ticket = 0
		raw, err := cose.Marshal(c)
		if err != nil {
			return err
		}
		fresh, entries = append(fresh, c), append(entries, raw)
	}
	if len(entries) == 0 {
		return nil
	}
	end, err := s.log.Append(ctx, entries...)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range fresh {
		s.note(end-uint64(len(fresh)-1-i), c)
	}
	return nil
}

// has reports whether a chunk was appended before. One of an epoch that is not the
// newest is looked for: the keep offers the end of an old epoch and the beginning
// of the next together.
func (s *spool) has(c tee.Chunk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if bytes.Equal(c.Epoch, s.last.Epoch) {
		return c.Seq <= s.last.Seq
	}
	return slices.ContainsFunc(s.positions, func(p position) bool {
		return bytes.Equal(p.epoch, c.Epoch) && p.seq == c.Seq && bytes.Equal(p.head, c.Head)
	})
}

// trim forgets what a watermark covers, which the keep has verified. message is
// the watermark itself. It returns how many chunks are left.
//
// What is older than the watermark's place is covered. At its place itself the
// hashes must agree: if not, the cloud holds another history than this spool,
// and nothing is thrown away.
func (s *spool) trim(w tee.Watermark, message []byte) (left int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for n < len(s.positions) && s.positions[n].covered(w) {
		n++
	}
	for _, p := range s.positions[:n] {
		if bytes.Equal(p.epoch, w.Epoch) && p.seq == w.Seq && !bytes.Equal(p.head, w.Head) {
			return len(s.positions), fmt.Errorf("the cloud holds other data than this spool at %s/%x/%d: nothing is trimmed", s.stream, w.Epoch, w.Seq)
		}
	}
	if n == 0 {
		return len(s.positions), nil
	}
	s.last.Watermark = message
	if err := durable.WriteFile(s.tailsPath(), cose.MustMarshal(s.last), 0o600); err != nil {
		return len(s.positions), fmt.Errorf("%w: %w", errSpool, err)
	}
	if err := s.log.Trim(s.positions[n-1].index); err != nil {
		return len(s.positions), fmt.Errorf("%w: %w", errSpool, err)
	}
	s.positions = append([]position(nil), s.positions[n:]...)
	return len(s.positions), nil
}

// covered reports whether p is at or before the watermark. Epoch ids begin with
// a counter that only goes up, so they order as bytes; two epochs of one counter
// value are a fork and cover nothing of each other.
func (p position) covered(w tee.Watermark) bool {
	if bytes.Equal(p.epoch, w.Epoch) {
		return p.seq <= w.Seq
	}
	return len(p.epoch) == 16 && len(w.Epoch) == 16 && bytes.Compare(p.epoch[:8], w.Epoch[:8]) < 0
}

// depth is the number of chunks and bytes in the spool.
func (s *spool) depth() (chunks int, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.positions), s.log.Bytes()
}

// oldest is the oldest chunk that is not covered.
func (s *spool) oldest() (position, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.positions) == 0 {
		return position{}, false
	}
	return s.positions[0], true
}

// first is the index of the oldest chunk that is not covered, or of the one to
// come.
func (s *spool) first() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.positions) == 0 {
		return s.next
	}
	return s.positions[0].index
}

func sha256Sum(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:]
}

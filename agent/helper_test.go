package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"edgekeep/tee"
)

var discard = slog.New(slog.DiscardHandler)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// epoch is an id: a counter and what tells two of one counter apart.
func epoch(counter, other byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(counter)), bytes.Repeat([]byte{other}, 8)...)
}

func head(counter byte, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(bytes.Repeat([]byte{counter}, 24), seq)
}

// chunk is one chunk of stream a, of the epoch with this counter.
func chunk(counter byte, seq uint64) tee.Chunk {
	return tee.Chunk{
		Ticket: 100*uint64(counter) + seq, Stream: "a", Epoch: epoch(counter, 0), Seq: seq, Head: head(counter, seq),
		Checkpoint: append([]byte("checkpoint "), head(counter, seq)...), Data: append([]byte("data "), head(counter, seq)...),
	}
}

func chunks(counter byte, from, to uint64) (out []tee.Chunk) {
	for seq := from; seq <= to; seq++ {
		out = append(out, chunk(counter, seq))
	}
	return out
}

func mark(counter byte, seq uint64) tee.Watermark {
	return tee.Watermark{Stream: "a", Epoch: epoch(counter, 0), Seq: seq, Head: head(counter, seq)}
}

func newAgent(t testing.TB, spoolBytes int64) *Agent {
	t.Helper()
	dir := must(os.MkdirTemp("", "agent"))(t) // short enough for a socket
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "spool"), 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "keep.sock")
	a := &Agent{
		cfg: Config{State: dir, SpoolBytes: spoolBytes, KeepSocket: socket}, log: discard, keep: &tee.Socket{Path: socket},
		kick: make(chan struct{}, 1), spools: map[string]*spool{},
	}
	t.Cleanup(a.close)
	return a
}

// reopen is the agent after a crash: what it knows is what is on the disk.
func (a *Agent) reopen(t testing.TB) {
	t.Helper()
	for _, s := range a.spools {
		if err := s.log.Close(); err != nil {
			t.Fatal(err)
		}
	}
	a.spools = map[string]*spool{}
	if err := a.openSpools(); err != nil {
		t.Fatal(err)
	}
}

// places are the epochs' counters and sequences in a spool, as they are on the disk
// and as they are remembered.
func places(t testing.TB, s *spool) (out [][2]uint64) {
	t.Helper()
	var remembered [][2]uint64
	for _, p := range s.positions {
		remembered = append(remembered, [2]uint64{binary.BigEndian.Uint64(p.epoch), p.seq})
	}
	for from := s.log.First(); from < s.log.Next(); from++ {
		e := must(s.log.Read(from, 1, 1<<20))(t)
		c := decode(t, e[0].Data)
		out = append(out, [2]uint64{binary.BigEndian.Uint64(c.Epoch), c.Seq})
		if p := s.positions[len(out)-1]; p.index != e[0].Index || !bytes.Equal(p.head, c.Head) || !bytes.Equal(p.epoch, c.Epoch) {
			t.Errorf("entry %d is remembered as %+v", e[0].Index, p)
		}
	}
	if len(out) != len(remembered) {
		t.Errorf("on the disk: %v, remembered: %v", out, remembered)
	}
	return out
}

func appendTo(t testing.TB, s *spool, cs ...tee.Chunk) {
	t.Helper()
	if err := s.append(context.Background(), cs); err != nil {
		t.Fatal(err)
	}
}

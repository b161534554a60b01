package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee"
	"edgekeep/tee/message"
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
	a := assemble(Config{State: dir, SpoolBytes: spoolBytes, KeepSocket: socket, InstanceBytes: 8 << 20, BlobBytes: 64 << 20}, discard)
	if err := errors.Join(a.instances.open(), a.blobs.open(), a.uploads.reset()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.close)
	return a
}

// fakeConn is a connection to a cloud that is told of each message's kind.
type fakeConn func(kind string, payload []byte)

func (f fakeConn) Publish(topic string, payload []byte) error {
	t, err := mqtt.ParseTopic(topic)
	if err != nil || !t.Up {
		panic("published on " + topic)
	}
	f(t.Kind, payload)
	return nil
}

func (f fakeConn) Send(topic string, payload []byte) error { return f.Publish(topic, payload) }

func (f fakeConn) Flush(_ context.Context, topic string, payload []byte) error {
	return f.Publish(topic, payload)
}

// connect gives the agent a connection. It is lost when the link's cancel is called.
func (a *Agent) connect(t testing.TB, c conn) *link {
	l := &link{a: a, conn: c, topic: mqtt.Topic{Tenant: "acme", Gateway: "gw1"}, peer: make(chan []byte, peerRoom)}
	l.ctx, l.cancel = context.WithCancel(t.Context())
	t.Cleanup(l.cancel)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.setLink(l)
	return l
}

// down is a message that comes to the agent.
func (l *link) down(kind string, payload []byte) {
	t := l.topic
	t.Kind = kind
	l.receive(mqtt.Message{Topic: t.String(), Payload: payload})
}

// answer answers a question.
func (l *link) answer(raw []byte, body any, reason string) {
	var q message.Ask
	if err := cose.Unmarshal(raw, &q); err != nil {
		panic(err)
	}
	l.down("answer", cose.MustMarshal(message.Answer{ID: q.ID, Error: reason, Body: cose.MustMarshal(body)}))
}

// cloud connects the agent to a cloud that answers questions; what it answers nil
// to stays without an answer.
func (a *Agent) cloud(t testing.TB, f func(q message.Ask) any) *link {
	var l *link
	ready := make(chan struct{})
	l = a.connect(t, fakeConn(func(kind string, payload []byte) {
		if kind != "ask" {
			return
		}
		var q message.Ask
		if err := cose.Unmarshal(payload, &q); err != nil {
			t.Errorf("a question: %v", err)
		}
		<-ready
		if body := f(q); body != nil {
			l.answer(payload, body, "")
		}
	}))
	close(ready)
	return l
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

func mustDir(t testing.TB, dir string) (names []string) {
	t.Helper()
	for _, e := range must(os.ReadDir(dir))(t) {
		names = append(names, e.Name())
	}
	return names
}

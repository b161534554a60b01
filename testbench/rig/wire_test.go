package rig

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"
	"sync"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee/message"
	"edgekeep/testbench/hostile"
	"edgekeep/workload"
)

// steps are the messages of a move, in their order, as the broker sees them. The
// command that begins it is the first step.
var steps = []string{"command", "offer", "accept", "begin", "ready", "frame", "ack", "received", "claim", "entry", "release", "done"}

// stepOf names the kinds of messages between gateways that are steps.
var stepOf = map[int]string{
	workload.KindOffer: "offer", workload.KindAccept: "accept", workload.KindBegin: "begin", workload.KindReady: "ready",
	workload.KindFrame: "frame", workload.KindFrameAck: "ack", workload.KindReceived: "received",
	workload.KindRelease: "release", workload.KindDone: "done",
}

// victims are the processes that a move needs.
var victims = []string{"source's keep", "source's agent", "source's worker", "target's keep", "target's agent", "target's worker", "cloud"}

// strike ends processes at a step of a move.
type strike struct {
	step    string
	nth     int // of the messages of that kind
	victims []string
	late    time.Duration // after the message has passed; 0: before that
	lose    bool          // the message does not pass

	seen   chan struct{} // closed when it is time
	struck chan struct{} // closed when they are dead
}

func (s *strike) String() string {
	when := "before"
	if s.late > 0 {
		when = fmt.Sprintf("%d ms after", s.late.Milliseconds())
	}
	if s.lose {
		when = "instead of"
	}
	return fmt.Sprintf("%s killed %s %s %d", strings.Join(s.victims, " and "), when, s.step, s.nth)
}

// wire is the broker between all gateways and the cloud. It knows the steps of a
// move when it sees them, and loses, repeats, reorders and alters what passes.
type wire struct {
	ctx context.Context //nolint:containedctx // of the test

	mu     sync.Mutex                                         // protects what follows
	faults map[string]func(hostile.Message) []hostile.Message // by the last part of a topic
	armed  *strike
	claims map[string]bool // ids of questions with a claim
	passed map[string]int  // messages of each step
	bytes  map[string]int
}

// intercept is what the broker does with a message.
func (w *wire) intercept(m hostile.Message) []hostile.Message {
	w.mu.Lock()
	step := w.step(m)
	if step != "" {
		w.passed[step]++
		w.bytes[step] += len(m.Payload)
	}
	s, faults := w.armed, w.faults[m.Topic[strings.LastIndexByte(m.Topic, '/')+1:]]
	if s != nil && s.step == step {
		s.nth--
	}
	if s == nil || s.nth > 0 {
		s = nil
	} else {
		w.armed = nil
	}
	w.mu.Unlock()
	if s != nil {
		w.meet(s)
		if s.lose {
			return nil
		}
	}
	if faults == nil {
		return []hostile.Message{m}
	}
	return faults(m)
}

// err begins to lose, repeat, reorder and replay what belongs to a move, to readings
// and to results, and to alter it: but for what goes between gateways, because an
// altered part of the last delta is noticed only when all of it is there, and the
// move begins again. A lost command comes 10 s later, which takes long here;
// TestHostileBroker has those.
func (w *wire) err(seed uint64) {
	rates := hostile.Rates{Drop: 0.02, Duplicate: 0.05, Reorder: 0.02, Replay: 0.05}
	peers := hostile.Faults(seed, rates)
	rates.Flip = 0.01
	others := hostile.Faults(seed+1, rates)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = map[string]func(hostile.Message) []hostile.Message{
		"peer": peers, "ask": others, "answer": others, "sealed": others, "ack": others,
	}
}

// meet tells that a strike's time has come. Nothing passes until it is done.
func (w *wire) meet(s *strike) {
	close(s.seen)
	if s.late > 0 {
		return
	}
	select {
	case <-s.struck:
	case <-w.ctx.Done():
	}
}

// step names the step that a message is, on its way to the cloud or, as the
// ledger's answer, back.
func (w *wire) step(m hostile.Message) string {
	_, kind, _ := strings.Cut(m.Topic, "/up/")
	switch {
	case kind == "peer":
		var r message.Routed
		if cose.Unmarshal(m.Payload, &r) != nil {
			return ""
		}
		e, err := workload.Unwrap(r.Data)
		if err != nil {
			return ""
		}
		return stepOf[e.Kind]
	case kind == "ask":
		var a message.Ask
		if cose.Unmarshal(m.Payload, &a) == nil && a.Kind == message.AskLedger {
			w.claims[string(a.ID)] = true
			return "claim"
		}
	case strings.HasSuffix(m.Topic, "/down/answer"):
		var a message.Answer
		if cose.Unmarshal(m.Payload, &a) == nil && w.claims[string(a.ID)] {
			return "entry"
		}
	}
	return ""
}

func (w *wire) arm(s *strike) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = s
}

// wire puts a broker between gateways and cloud. It comes before startCloud.
func (b *bench) wire() *wire {
	b.t.Helper()
	w := &wire{ctx: b.ctx, claims: map[string]bool{}, passed: map[string]int{}, bytes: map[string]int{}}
	cert, err := tls.LoadX509KeyPair(b.path("cloud/keys/server.pem"), b.path("cloud/keys/server.key"))
	b.must(err)
	broker, err := hostile.Listen(&tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}, w.intercept)
	b.must(err)
	b.t.Cleanup(func() {
		if err := broker.Close(); err != nil {
			b.t.Error(err)
		}
	})
	b.Broker = "tls://" + broker.Addr()
	return w
}

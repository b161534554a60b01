package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

// Messages of other gateways reach the keep in order. What it answers is settled
// and published; what it refuses, and what is none, holds nothing up.
func TestPeers(t *testing.T) {
	a := newAgent(t, 1<<20)
	var got []string
	a.serve(t, func(kind int, body []byte) (any, error) {
		switch kind {
		case tee.KindPeer:
			r, err := tee.Body[tee.Peer](body)
			if err != nil {
				return nil, err
			}
			got = append(got, r.From+" "+string(r.Data))
			switch string(r.Data) {
			case "no":
				return nil, errors.New("not wanted")
			case "step":
				return tee.Outcome{Commit: []byte("s1")}, nil
			}
			return tee.Outcome{}, nil
		case tee.KindCommit:
			if len(a.step) != 1 {
				t.Error("a step that others may disturb")
			}
			return tee.Outcome{Publish: []tee.Message{
				{Kind: "result", Data: []byte(a.file("state.cbor"))},
				{Kind: kindPeer, Data: []byte("to gw2")},
			}, Pull: true}, nil
		}
		return nil, tee.ErrKind
	})
	published := make(chan string, 10)
	l := a.connect(t, fakeConn(func(kind string, payload []byte) { published <- kind + " " + string(payload) }))
	want := []string{}
	for i := range 50 {
		text := fmt.Sprint(i)
		switch i {
		case 20:
			text = "no"
		case 30:
			l.down(kindPeer, []byte{0xff})
			l.down(kindPeer, cose.MustMarshal([]any{"gw2"}))
		case 49:
			text = "step"
		}
		l.down(kindPeer, cose.MustMarshal(message.Routed{Peer: "gw2", Data: []byte(text)}))
		want = append(want, "gw2 "+text)
	}
	end := make(chan error)
	go func() { end <- l.peers() }()
	if first, second := <-published, <-published; first != "result s1" || second != "peer to gw2" {
		t.Errorf("%q, %q", first, second)
	}
	l.cancel()
	if err := <-end; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if !slices.Equal(got, want) || len(a.kick) != 1 {
		t.Errorf("%q", got)
	}
	if s := a.snapshot(t.Context()); s.DroppedPeers != 2 || s.RefusedPeers != 1 {
		t.Errorf("%d dropped, %d refused", s.DroppedPeers, s.RefusedPeers)
	}
}

// With no room the newest messages are dropped, and counted.
func TestPeersNoRoom(t *testing.T) {
	a := newAgent(t, 1<<20)
	l := a.connect(t, fakeConn(func(string, []byte) {}))
	for i := range peerRoom + 10 {
		l.down(kindPeer, binary.BigEndian.AppendUint32(nil, uint32(i)))
	}
	for i := range peerRoom {
		if n := binary.BigEndian.Uint32(<-l.peer); n != uint32(i) {
			t.Fatalf("%d instead of %d", n, i)
		}
	}
	if s := a.snapshot(t.Context()); s.DroppedPeers != 10 {
		t.Errorf("%d dropped", s.DroppedPeers)
	}
}

// aheadConn counts what the broker has not acknowledged.
type aheadConn struct {
	mu          sync.Mutex
	seen        []byte
	ahead, most int
	stuck       bool
}

func (c *aheadConn) Publish(string, []byte) error {
	return errors.New("a message to a peer that is to be acknowledged")
}

func (c *aheadConn) Send(_ string, payload []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead++
	c.most = max(c.most, c.ahead)
	c.seen = append(c.seen, payload...)
	return nil
}

func (c *aheadConn) Flush(_ context.Context, topic string, payload []byte) error {
	if c.stuck {
		return errors.New("no acknowledgement")
	}
	_ = c.Send(topic, payload)
	c.ahead = 0
	return nil
}

// Messages to other gateways go out in order and without waiting for each, but not
// without bound: also when the broker stops acknowledging.
func TestPublishPeer(t *testing.T) {
	a := newAgent(t, 1<<20)
	c := &aheadConn{}
	l := a.connect(t, c)
	publish := func(b byte) error { return a.publish([]tee.Message{{Kind: kindPeer, Data: []byte{b}}}) }
	for i := range 200 {
		if err := publish(byte(i)); err != nil {
			t.Fatal(err)
		}
	}
	if c.most != peerAhead || len(c.seen) != 200 || !slices.IsSorted(c.seen) {
		t.Errorf("%d ahead, %v", c.most, c.seen)
	}
	c.stuck = true
	failed := 0
	for range 100 {
		if publish(0) != nil {
			failed++
		}
	}
	if failed < 100-peerAhead || c.most != peerAhead {
		t.Errorf("%d failed, %d ahead", failed, c.most)
	}
	l.cancel()
	if err := publish(0); !errors.Is(err, errNoLink) {
		t.Error(err)
	}
}

// A new identity ends the connection, also one that waits for a step of its own,
// and sets the instances of the old one aside.
func TestSetAsideInstances(t *testing.T) {
	a := newAgent(t, 1<<20)
	appendLog(t, a.instances, logOf("one", 0, "a"))
	l := a.connect(t, fakeConn(func(string, []byte) {}))
	a.serve(t, func(kind int, _ []byte) (any, error) {
		if kind == tee.KindStart {
			go func() { // the session, in the middle of a delivery
				_, err := a.deliver(l.ctx, []byte("item"))
				if !errors.Is(err, context.Canceled) {
					t.Errorf("%v", err)
				}
				a.mu.Lock()
				a.setLink(nil)
				a.mu.Unlock()
			}()
			return tee.Outcome{Commit: []byte("s1"), Fresh: true}, nil
		}
		return tee.Outcome{}, nil
	})
	if err := a.startKeep(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, a.instances, "one", 0, 1)
	if n := appendLog(t, a.instances, logOf("one", 0, "b")); n != 2 {
		t.Error(n)
	}
	var old string
	for _, e := range mustDir(t, a.cfg.State) {
		if strings.HasPrefix(e, "instances.") {
			old = e
		}
	}
	s := &instances{dir: a.path(old), maxBytes: 8 << 20, log: discard, logs: map[string]*instance{}}
	defer s.closeAll()
	wantEntries(t, s, "one", 0, 1, "a")
}

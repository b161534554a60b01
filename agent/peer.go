package agent

import (
	"context"
	"errors"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

const (
	kindPeer     = "peer"
	peerRoom     = 256             // messages from other gateways that wait for the keep
	peerAhead    = 32              // messages to other gateways ahead of the broker
	peerPatience = 5 * time.Second // with the broker
)

// conn is what a link needs of its connection.
type conn interface {
	// Publish hands a message over without waiting for anything.
	Publish(topic string, payload []byte) error
	// Send is Publish of a message that the broker need not acknowledge.
	Send(topic string, payload []byte) error
	// Flush waits until the broker has acknowledged the message.
	Flush(ctx context.Context, topic string, payload []byte) error
}

// offerPeer takes in a message from another gateway. When there is no room the
// newest is dropped and counted: those before it are in order, and whoever sent it
// sends it again.
func (l *link) offerPeer(b []byte) {
	select {
	case l.peer <- b:
	default:
		l.a.count(func(s *Status) { s.DroppedPeers++ })
	}
}

// peers hands the keep what came from other gateways, in order.
func (l *link) peers() error {
	socket := &tee.Socket{Path: l.a.cfg.KeepSocket}
	defer socket.Close()
	for {
		var raw []byte
		select {
		case raw = <-l.peer:
		case <-l.ctx.Done():
			return l.ctx.Err()
		}
		var m message.Routed
		if err := cose.Unmarshal(raw, &m); err != nil {
			l.a.count(func(s *Status) { s.DroppedPeers++ })
			continue
		}
		out, err := l.a.handOver(l.ctx, func(ctx context.Context) (tee.Outcome, error) {
			return tee.Peer{From: m.Peer, Data: m.Data}.Do(ctx, socket)
		})
		var refusal *tee.Refusal
		if errors.As(err, &refusal) {
			l.a.log.Debug("a message of another gateway was refused", "from", m.Peer, "reason", refusal.Reason)
			l.a.count(func(s *Status) { s.RefusedPeers++ })
			continue
		}
		if err != nil {
			return err
		}
		for _, m := range out.Publish {
			if err := l.publish(m); err != nil {
				return err
			}
		}
	}
}

// publishPeer publishes a message to another gateway, in order, at most peerAhead
// of them ahead of the broker: a move sends thousands, and waiting for each would
// take a round trip each. Only the last of so many is to be acknowledged: brokers
// store what they acknowledge, and whoever sent it sends it again anyway.
func (l *link) publishPeer(topic string, data []byte) error {
	l.ahead.Lock()
	defer l.ahead.Unlock()
	if l.ctx.Err() != nil {
		return errNoLink
	}
	if l.unacked+1 < peerAhead {
		l.unacked++
		return l.conn.Send(topic, data)
	}
	ctx, cancel := context.WithTimeout(l.ctx, peerPatience)
	defer cancel()
	if err := l.conn.Flush(ctx, topic, data); err != nil {
		return err
	}
	l.unacked = 0 // brokers acknowledge in order
	return nil
}

// publish publishes the keep's messages, if there is a connection.
func (a *Agent) publish(ms []tee.Message) error {
	for _, m := range ms {
		l, _ := a.liveLink()
		if l == nil {
			return errNoLink
		}
		if err := l.publish(m); err != nil {
			return err
		}
	}
	return nil
}

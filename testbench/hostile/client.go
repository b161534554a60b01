package hostile

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

const (
	maxPacket  = 256 << 10 // bytes after the fixed header
	maxQueue   = 16 << 20  // bytes waiting for one client
	maxFilters = 256       // per client
	refused    = 0x80      // SUBACK code

	packetOverhead   = 64 // bytes counted for a packet besides topic and payload
	handshakeTimeout = 10 * time.Second
)

// client is one connection: a reader (Broker.serve) and a writer (write).
type client struct {
	raw  net.Conn // closed to end the connection: TLS would say goodbye first
	conn net.Conn // raw or TLS over it

	id      string          // protected by Broker.mu
	filters map[string]byte // filter to granted QoS; protected by Broker.mu

	mu       sync.Mutex // protects what follows
	changed  sync.Cond  // of mu: queue or ended has changed
	queue    []packets.ControlPacket
	queued   int                 // bytes in queue and being written, about
	writing  int                 // bytes being written
	inFlight map[uint16]struct{} // packet ids sent and not yet acknowledged
	lastID   uint16
	ended    bool
}

func newClient(raw net.Conn, config *tls.Config) *client {
	c := &client{raw: raw, conn: raw, filters: map[string]byte{}, inFlight: map[uint16]struct{}{}}
	if config != nil {
		c.conn = tls.Server(raw, config)
	}
	c.changed.L = &c.mu
	return c
}

// end closes the connection; reader and writer then return.
func (c *client) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLocked()
}

func (c *client) endLocked() {
	if c.ended {
		return
	}
	c.ended = true
	c.queue = nil
	c.changed.Signal()
	_ = c.raw.Close()
}

// send queues a packet; a client too far behind is disconnected.
func (c *client) send(p packets.ControlPacket) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sendLocked(p)
}

func (c *client) sendLocked(p packets.ControlPacket) {
	if c.ended {
		return
	}
	c.queued += size(p)
	if c.queued > maxQueue {
		c.endLocked()
		return
	}
	c.queue = append(c.queue, p)
	c.changed.Signal()
}

func size(p packets.ControlPacket) int {
	if publish, ok := p.(*packets.PublishPacket); ok {
		return packetOverhead + len(publish.TopicName) + len(publish.Payload)
	}
	return packetOverhead
}

// deliver queues a message if the client subscribes to it. The caller holds
// Broker.mu. A message that has no place in a packet is not delivered.
func (c *client) deliver(m Message) {
	if !validTopic(m.Topic) || len(m.Topic)+len(m.Payload) > maxPacket-4 {
		return
	}
	subscribed, qos := false, byte(0)
	for filter, granted := range c.filters {
		if matches(filter, m.Topic) {
			subscribed, qos = true, max(qos, granted)
		}
	}
	if !subscribed {
		return
	}
	p := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
	p.TopicName, p.Payload, p.Qos = m.Topic, m.Payload, qos
	c.mu.Lock()
	defer c.mu.Unlock()
	if qos > 0 && !c.assignID(p) {
		c.endLocked()
		return
	}
	c.sendLocked(p)
}

// assignID gives the packet an id that is not in flight. The caller holds c.mu.
func (c *client) assignID(p *packets.PublishPacket) bool {
	for range 65535 {
		c.lastID++
		_, taken := c.inFlight[c.lastID]
		if c.lastID != 0 && !taken {
			c.inFlight[c.lastID] = struct{}{}
			p.MessageID = c.lastID
			return true
		}
	}
	return false
}

func (c *client) acknowledge(id uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.inFlight, id)
}

// write sends what is queued until the connection ends.
func (c *client) write() {
	defer c.end()
	out := bufio.NewWriter(c.conn)
	for {
		batch := c.take()
		if batch == nil {
			return
		}
		for _, p := range batch {
			if err := p.Write(out); err != nil {
				return
			}
		}
		if err := out.Flush(); err != nil {
			return
		}
	}
}

// take waits for queued packets, after those taken before have been written; it
// returns none when the connection has ended.
func (c *client) take() []packets.ControlPacket {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queued -= c.writing
	for len(c.queue) == 0 && !c.ended {
		c.changed.Wait()
	}
	batch := c.queue
	c.queue, c.writing = nil, c.queued
	return batch
}

// serve reads a client's packets until the connection ends.
func (b *Broker) serve(c *client) {
	in := bufio.NewReader(c.conn)
	if err := c.conn.SetReadDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return
	}
	first, err := readPacket(in)
	if err != nil {
		return
	}
	connect, ok := first.(*packets.ConnectPacket)
	if !ok || connect.ProtocolVersion != 4 || connect.Validate() != packets.Accepted || !b.register(c, connect.ClientIdentifier) {
		return
	}
	patience := time.Duration(connect.Keepalive) * time.Second * 3 / 2
	for {
		deadline := time.Time{}
		if patience > 0 {
			deadline = time.Now().Add(patience)
		}
		if err := c.conn.SetReadDeadline(deadline); err != nil {
			return
		}
		p, err := readPacket(in)
		if err != nil || !b.handle(c, p) {
			return
		}
	}
}

// handle acts on one packet of a connected client. It reports false when the
// connection has to end.
func (b *Broker) handle(c *client, p packets.ControlPacket) bool {
	switch p := p.(type) {
	case *packets.PublishPacket:
		if p.Qos == 1 {
			ack := packets.NewControlPacket(packets.Puback).(*packets.PubackPacket)
			ack.MessageID = p.MessageID
			c.send(ack)
		}
		b.publish(Message{Topic: p.TopicName, Payload: p.Payload, From: c.id})
	case *packets.PubackPacket:
		c.acknowledge(p.MessageID)
	case *packets.SubscribePacket:
		ack := packets.NewControlPacket(packets.Suback).(*packets.SubackPacket)
		ack.MessageID = p.MessageID
		ack.ReturnCodes = b.subscribe(c, p.Topics, p.Qoss)
		c.send(ack)
	case *packets.UnsubscribePacket:
		b.unsubscribe(c, p.Topics)
		ack := packets.NewControlPacket(packets.Unsuback).(*packets.UnsubackPacket)
		ack.MessageID = p.MessageID
		c.send(ack)
	case *packets.PingreqPacket:
		c.send(packets.NewControlPacket(packets.Pingresp))
	default: // DISCONNECT, or what a client does not send
		return false
	}
	return true
}

var errPacket = errors.New("malformed mqtt packet")

// readPacket reads a packet of a client. It checks, before memory is set aside,
// that the packet is not too long, and afterwards what the codec lets pass.
func readPacket(in *bufio.Reader) (packets.ControlPacket, error) {
	if err := checkLength(in); err != nil {
		return nil, err
	}
	p, err := packets.ReadPacket(in)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errPacket, err)
	}
	ok := true
	switch p := p.(type) {
	case *packets.PublishPacket:
		ok = p.Qos <= 1 && validTopic(p.TopicName) && (p.Qos == 0 || p.MessageID != 0)
	case *packets.SubscribePacket:
		ok = len(p.Topics) > 0 && len(p.Topics) == len(p.Qoss)
	case *packets.UnsubscribePacket:
		ok = len(p.Topics) > 0
	}
	if !ok {
		return nil, fmt.Errorf("%w: %T with a field out of range", errPacket, p)
	}
	return p, nil
}

// checkLength looks at the fixed header (MQTT 3.1.1 section 2.2) and takes
// nothing off the stream.
func checkLength(in *bufio.Reader) error {
	length := 0
	for i := range 4 {
		header, err := in.Peek(2 + i)
		if err != nil {
			return err
		}
		digit := header[1+i]
		length |= int(digit&127) << (7 * i)
		if digit&128 == 0 {
			if length > maxPacket {
				return fmt.Errorf("%w: %d bytes, more than %d", errPacket, length, maxPacket)
			}
			return nil
		}
	}
	return fmt.Errorf("%w: its length has more than four bytes", errPacket)
}

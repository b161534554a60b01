// Package hostile is an MQTT 3.1.1 broker that lies. The product must lose
// nothing, accept nothing twice and believe nothing unsigned even when its
// broker drops, repeats, reorders, alters, invents and replays messages while
// it tells every publisher that all is well.
//
// # What it does
//
// A PUBLISH of a client is acknowledged at once (PUBACK for QoS 1) and handed
// to the intercept function. What that returns, not what was published, goes to
// the subscribers. A nil function is the honest broker: each message goes to
// its subscribers once and in order. Calls of the function come one at a time
// and the messages of one call reach the queues of all subscribers before the
// next call, so that what a function does is repeatable as far as the order of
// what it is given is. It may call Inject and Disconnect. Faults makes one that
// errs at random, but the same way for the same seed.
//
// A subscription is granted at QoS 0 or 1 as asked (QoS 2 becomes 1) and
// messages are delivered at the granted QoS, once per client even when several
// of its filters match. Filters take + and # (MQTT 3.1.1 section 4.7); one that
// is malformed is refused with 0x80. Topics that begin with $ are nothing
// special.
//
// # What it does not do
//
// It keeps no session after a connection ends, no retained messages, no wills,
// and never sends a message twice of its own accord. It takes any client id,
// user name and password; a second connection with the same client id ends the
// first one. A client that publishes at QoS 2 or breaks the protocol is
// disconnected.
//
// # Bounds
//
// Packets of at most 256 KiB, at most 1,024 clients, 256 filters per client and
// 16 MiB waiting for one client: a subscriber that falls further behind is
// disconnected. A client has ten seconds to finish its handshake and one and a
// half times its keep-alive between packets.
package hostile

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

const maxClients = 1024

// Message is an application message on its way through the broker. Nobody may
// change Payload: publisher, interceptor and subscribers share it.
type Message struct {
	Topic   string
	Payload []byte
	From    string // client id of the publisher; anything in an injected message
}

// Broker is a running broker. Its methods are safe for concurrent use.
type Broker struct {
	listener  net.Listener
	tls       *tls.Config // nil: plain TCP
	intercept func(Message) []Message
	group     sync.WaitGroup // accept loop and clients

	// intercepting makes calls of intercept, each with the delivery of its
	// result, one at a time. It is taken before mu, never after.
	intercepting sync.Mutex

	mu      sync.Mutex           // protects what follows
	conns   map[*client]struct{} // every open connection
	byID    map[string]*client   // those that have said CONNECT
	unnamed int                  // counts client ids made up for those without
	closed  bool
}

// Listen starts a broker on a free port of 127.0.0.1, with TLS if tlsConfig is
// not nil. See the package comment for intercept.
func Listen(tlsConfig *tls.Config, intercept func(Message) []Message) (*Broker, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start the hostile broker: %w", err)
	}
	if intercept == nil {
		intercept = func(m Message) []Message { return []Message{m} }
	}
	b := &Broker{
		listener:  listener,
		tls:       tlsConfig,
		intercept: intercept,
		conns:     map[*client]struct{}{},
		byID:      map[string]*client{},
	}
	b.group.Go(b.accept)
	return b, nil
}

// Addr is the address to connect to, "127.0.0.1:port".
func (b *Broker) Addr() string { return b.listener.Addr().String() }

// Inject delivers to the matching subscribers a message that nobody sent. The
// intercept function does not see it.
func (b *Broker) Inject(m Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.byID {
		c.deliver(m)
	}
}

// Disconnect drops the connection of a client without a word, if there is one.
func (b *Broker) Disconnect(clientID string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.byID[clientID]; c != nil {
		b.drop(c)
	}
}

// Close drops all connections, frees the port and returns when no goroutine of
// the broker is left. It must not be called by the intercept function.
func (b *Broker) Close() error {
	b.mu.Lock()
	first := !b.closed
	b.closed = true
	for c := range b.conns {
		b.drop(c)
	}
	b.mu.Unlock()
	var err error
	if first {
		err = b.listener.Close()
	}
	b.group.Wait()
	return err
}

func (b *Broker) accept() {
	for {
		conn, err := b.listener.Accept()
		if err != nil {
			return // closed
		}
		b.admit(conn)
	}
}

// admit starts to serve a connection, if there is room.
func (b *Broker) admit(conn net.Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || len(b.conns) == maxClients {
		conn.Close()
		return
	}
	c := newClient(conn, b.tls)
	b.conns[c] = struct{}{}
	b.group.Go(c.write)
	b.group.Go(func() {
		b.serve(c)
		b.mu.Lock()
		defer b.mu.Unlock()
		b.drop(c)
	})
}

// drop ends a connection and forgets it. The caller holds b.mu.
func (b *Broker) drop(c *client) {
	c.end()
	delete(b.conns, c)
	if b.byID[c.id] == c {
		delete(b.byID, c.id)
	}
}

// register makes a client known by its id, in place of one that had it before.
// It reports false when the connection was dropped in the meantime.
func (b *Broker) register(c *client, id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, open := b.conns[c]; !open {
		return false
	}
	if id == "" {
		b.unnamed++
		id = fmt.Sprintf("unnamed-%d", b.unnamed)
	}
	if before := b.byID[id]; before != nil {
		b.drop(before)
	}
	c.id = id
	b.byID[id] = c
	c.send(&packets.ConnackPacket{FixedHeader: packets.FixedHeader{MessageType: packets.Connack}})
	return true
}

// publish passes a client's message through the lie to the subscribers.
func (b *Broker) publish(m Message) {
	b.intercepting.Lock()
	defer b.intercepting.Unlock()
	for _, lie := range b.intercept(m) {
		b.Inject(lie)
	}
}

// subscribe adds filters to those of a client and returns the SUBACK's codes.
func (b *Broker) subscribe(c *client, filters []string, qos []byte) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	codes := make([]byte, 0, len(filters))
	for i, f := range filters {
		_, again := c.filters[f]
		if !validFilter(f) || qos[i] > 2 || (!again && len(c.filters) == maxFilters) {
			codes = append(codes, refused)
			continue
		}
		c.filters[f] = min(qos[i], 1)
		codes = append(codes, min(qos[i], 1))
	}
	return codes
}

func (b *Broker) unsubscribe(c *client, filters []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range filters {
		delete(c.filters, f)
	}
}

// Package mqtt is the wire between gateway and cloud: MQTT 3.1.1 over TLS, kept
// within what large hosted brokers allow. Topics have at most five levels:
//
//	ek1/{tenant}/{gateway}/up/{hello,evidence,sealed,result,pull,ask,peer}   gateway publishes, QoS 1
//	ek1/{tenant}/{gateway}/down/{notify,ack,item,answer,peer}                gateway subscribes, QoS 0
//	ek1/boot/{ek-hash}/up/{enrol,activate}, …/down/{notify,item}    a box without a certificate
//
// "boot" is therefore no tenant's name. Payloads have at most MaxPayload bytes.
//
// A broker is not trusted with anything but passing messages on: an
// acknowledgement from it means nothing here.
package mqtt

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
)

// MaxPayload bounds a message, in bytes.
const MaxPayload = 128 << 10

// Boot is the second level of the topics of boxes without a certificate.
const Boot = "boot"

// Topic is a parsed topic.
type Topic struct {
	Tenant  string // or Boot
	Gateway string // or the EK hash in hexadecimal
	Up      bool
	Kind    string
}

// String is the topic as it is on the wire.
func (t Topic) String() string {
	return strings.Join([]string{"ek1", t.Tenant, t.Gateway, t.direction(), t.Kind}, "/")
}

// Subject is the topic as a NATS subject.
func (t Topic) Subject() string {
	return strings.Join([]string{"ek1", t.Tenant, t.Gateway, t.direction(), t.Kind}, ".")
}

func (t Topic) direction() string {
	if t.Up {
		return "up"
	}
	return "down"
}

// ParseTopic parses a topic of this protocol.
func ParseTopic(s string) (Topic, error) { return parse(strings.Split(s, "/")) }

// ParseSubject parses a NATS subject of this protocol.
func ParseSubject(s string) (Topic, error) { return parse(strings.Split(s, ".")) }

func parse(l []string) (Topic, error) {
	if len(l) != 5 || l[0] != "ek1" || l[3] != "up" && l[3] != "down" {
		return Topic{}, fmt.Errorf("not a topic of this protocol: %.100q", strings.Join(l, "/"))
	}
	for _, level := range []string{l[1], l[2], l[4]} {
		if !validLevel(level) {
			return Topic{}, fmt.Errorf("a level of the topic is not allowed: %.100q", level)
		}
	}
	return Topic{Tenant: l[1], Gateway: l[2], Up: l[3] == "up", Kind: l[4]}, nil
}

func validLevel(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// ClientID is the MQTT client id of an enrolled gateway: names have no "_", so
// two gateways never share one.
func ClientID(tenant, gateway string) string { return tenant + "_" + gateway }

// CommonName is the CN of a gateway's certificate.
func CommonName(tenant, gateway string) string { return tenant + "/" + gateway }

// Message is a received message.
type Message struct {
	Topic   string
	Payload []byte
}

// Options of one connection.
type Options struct {
	URL       string // tls://host:port (tcp:// for tests)
	TLS       *tls.Config
	ClientID  string
	Username  string
	Subscribe []string // topic filters, QoS 0
	// Receive gets every message, in order, and must not block for long.
	Receive func(Message)
}

// Conn is one connection to a broker. It never reconnects: a new one is made.
type Conn struct {
	client paho.Client
	lost   chan struct{}
	once   sync.Once
}

// ErrRefused means that the broker answered and said no: to the connection or to
// a subscription.
var ErrRefused = errors.New("the broker refuses")

// Dial connects and subscribes.
func Dial(ctx context.Context, o Options) (*Conn, error) {
	c := &Conn{lost: make(chan struct{})}
	opts := paho.NewClientOptions().AddBroker(o.URL).SetClientID(o.ClientID).SetUsername(o.Username).
		SetTLSConfig(o.TLS).SetProtocolVersion(4).SetCleanSession(true).
		SetAutoReconnect(false).SetConnectRetry(false).SetOrderMatters(true).
		SetConnectTimeout(15 * time.Second).SetWriteTimeout(30 * time.Second).
		SetKeepAlive(20 * time.Second).SetPingTimeout(10 * time.Second).
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) {
			o.Receive(Message{Topic: m.Topic(), Payload: m.Payload()})
		}).
		SetConnectionLostHandler(func(paho.Client, error) { c.drop() })
	c.client = paho.NewClient(opts)
	if err := wait(ctx, c.client.Connect()); err != nil {
		c.client.Disconnect(0)
		return nil, fmt.Errorf("connecting to %s: %w", o.URL, err)
	}
	if len(o.Subscribe) == 0 {
		return c, nil
	}
	filters := make(map[string]byte, len(o.Subscribe))
	for _, f := range o.Subscribe {
		filters[f] = 0
	}
	token := c.client.SubscribeMultiple(filters, nil)
	err := wait(ctx, token)
	if st, ok := token.(*paho.SubscribeToken); ok && err == nil {
		for f, code := range st.Result() { // the token says "no error" for a refused subscription
			if code > 2 {
				err = fmt.Errorf("%w to let us subscribe %s", ErrRefused, f)
			}
		}
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("subscribing at %s: %w", o.URL, err)
	}
	return c, nil
}

func wait(ctx context.Context, t paho.Token) error {
	select {
	case <-t.Done():
		return t.Error()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *Conn) drop() { c.once.Do(func() { close(c.lost) }) }

// Lost is closed when the connection is gone.
func (c *Conn) Lost() <-chan struct{} { return c.lost }

// Publish hands a message to the broker at QoS 1 and returns without waiting:
// what a broker acknowledges means nothing. A message that is too large is our
// own mistake.
func (c *Conn) Publish(topic string, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("publishing on %s: %d bytes, at most %d", topic, len(payload), MaxPayload)
	}
	c.client.Publish(topic, 1, false, payload)
	return nil
}

// Send is Publish at QoS 0.
func (c *Conn) Send(topic string, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("publishing on %s: %d bytes, at most %d", topic, len(payload), MaxPayload)
	}
	c.client.Publish(topic, 0, false, payload)
	return nil
}

// Flush is Publish that waits until the broker has acknowledged, so that a
// caller does not run ahead of the connection.
func (c *Conn) Flush(ctx context.Context, topic string, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("publishing on %s: %d bytes, at most %d", topic, len(payload), MaxPayload)
	}
	token := c.client.Publish(topic, 1, false, payload)
	select {
	case <-token.Done():
		return token.Error()
	case <-c.lost:
		return errors.New("the connection was lost")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends the connection.
func (c *Conn) Close() {
	c.client.Disconnect(100)
	c.drop()
}

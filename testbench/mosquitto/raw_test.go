package mosquitto

import (
	"crypto/tls"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// rawClient speaks MQTT packet by packet, so that a test knows for certain what
// the broker has sent it up to a moment.
type rawClient struct {
	*tls.Conn
	t      *testing.T
	topics []string // of all messages read so far
}

// dialRaw connects as one of the identities, with a will if a topic is given.
func (a *authority) dialRaw(b *Broker, name, willTopic string) (*rawClient, error) {
	a.t.Helper()
	user, boot := strings.CutPrefix(name, "boot:")
	address, config := b.ports.boot(), &tls.Config{RootCAs: a.pool}
	if !boot {
		address, config, user = b.ports.mutual(), a.mutual(name), ""
	}
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return nil, err
	}
	a.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(2 * patience)); err != nil {
		return nil, err
	}
	p := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	p.ProtocolName, p.ProtocolVersion, p.CleanSession = "MQTT", 4, true
	p.ClientIdentifier, p.UsernameFlag, p.Username = name, user != "", user
	p.WillFlag, p.WillTopic, p.WillMessage = willTopic != "", willTopic, []byte("last words")
	c := &rawClient{Conn: conn, t: a.t}
	if err := p.Write(c); err != nil {
		return nil, err
	}
	answer, err := packets.ReadPacket(c)
	if err != nil {
		return nil, err
	}
	if ack, ok := answer.(*packets.ConnackPacket); !ok || ack.ReturnCode != 0 {
		return nil, fmt.Errorf("refused: %v", answer)
	}
	return c, nil
}

// exchange sends a packet and reads, noting messages, until the answer comes.
func exchange[Answer packets.ControlPacket](c *rawClient, p packets.ControlPacket) {
	c.t.Helper()
	if err := p.Write(c); err != nil {
		c.t.Fatal(err)
	}
	for {
		answer, err := packets.ReadPacket(c)
		if err != nil {
			c.t.Fatalf("wait for the answer to %v: %v", p, err)
		}
		if _, ok := answer.(Answer); ok {
			return
		}
		message, ok := answer.(*packets.PublishPacket)
		if !ok {
			c.t.Fatalf("%v was answered by %v", p, answer)
		}
		c.topics = append(c.topics, message.TopicName)
	}
}

func (c *rawClient) subscribe(filters ...string) {
	c.t.Helper()
	for _, f := range filters {
		p := packets.NewControlPacket(packets.Subscribe).(*packets.SubscribePacket)
		p.MessageID, p.Topics, p.Qoss = 1, []string{f}, []byte{0}
		exchange[*packets.SubackPacket](c, p)
	}
}

func (c *rawClient) publish(topics ...string) {
	c.t.Helper()
	for _, topic := range topics {
		p := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
		p.MessageID, p.Qos, p.TopicName = 1, 1, topic
		exchange[*packets.PubackPacket](c, p)
	}
}

// received returns the topics of all that the broker has routed to the client
// before now: the answer to a ping comes after it.
func (c *rawClient) received() []string {
	c.t.Helper()
	exchange[*packets.PingrespPacket](c, packets.NewControlPacket(packets.Pingreq))
	return c.topics
}

package hostile

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// raw is a client that may misbehave.
type raw struct {
	net.Conn
	t *testing.T
}

func rawDial(t *testing.T, b *Broker) *raw {
	t.Helper()
	conn, err := net.Dial("tcp", b.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &raw{conn, t}
}

func rawConnect(t *testing.T, b *Broker, id string) *raw {
	t.Helper()
	r := rawDial(t, b)
	r.write(connectPacket(id, 0))
	if ack, ok := r.read().(*packets.ConnackPacket); !ok || ack.ReturnCode != 0 || ack.SessionPresent {
		t.Fatalf("connack %+v", ack)
	}
	return r
}

func connectPacket(id string, keepAlive uint16) *packets.ConnectPacket {
	p := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	p.ProtocolName, p.ProtocolVersion = "MQTT", 4
	p.CleanSession, p.ClientIdentifier, p.Keepalive = true, id, keepAlive
	return p
}

func (r *raw) write(p packets.ControlPacket) {
	r.t.Helper()
	if err := p.Write(r); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) read() packets.ControlPacket {
	r.t.Helper()
	p, err := packets.ReadPacket(r)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// wantEnd reads until the broker has ended the connection.
func (r *raw) wantEnd() {
	r.t.Helper()
	_, err := io.Copy(io.Discard, r)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		r.t.Error("the connection is still there")
	}
}

func encode(p packets.ControlPacket) string {
	var out bytes.Buffer
	_ = p.Write(&out) // a bytes.Buffer takes all
	return out.String()
}

func TestProtocolBreaks(t *testing.T) {
	b := listen(t, nil, func(m Message) []Message {
		t.Errorf("a broken packet was published: %+v", m)
		return nil
	})
	hello := encode(connectPacket("breaker", 0))
	for name, in := range map[string]string{
		"publish before connect":      "\x30\x03\x00\x01t",
		"other protocol":              strings.Replace(hello, "MQTT", "HTTP", 1),
		"mqtt 3.1":                    "\x10\x0f\x00\x06MQIsdp\x03\x02\x00\x00\x00\x01x",
		"mqtt 5":                      strings.Replace(hello, "MQTT\x04", "MQTT\x05", 1),
		"no id and no clean session":  "\x10\x0c\x00\x04MQTT\x04\x00\x00\x00\x00\x00",
		"second connect":              hello + hello,
		"publish at qos 2":            hello + "\x34\x05\x00\x01t\x00\x01",
		"publish at qos 3":            hello + "\x36\x05\x00\x01t\x00\x01",
		"packet id 0":                 hello + "\x32\x05\x00\x01t\x00\x00",
		"topic with a wildcard":       hello + "\x30\x03\x00\x01#",
		"empty topic":                 hello + "\x30\x02\x00\x00",
		"topic longer than packet":    hello + "\x30\x03\x00\x09t",
		"topic not utf-8":             hello + "\x30\x03\x00\x01\xff",
		"topic with nul":              hello + "\x30\x03\x00\x01\x00",
		"subscribe to nothing":        hello + "\x82\x02\x00\x01",
		"unsubscribe from nothing":    hello + "\xa2\x02\x00\x01",
		"packet of 256 MiB":           hello + "\x30\xff\xff\xff\x7f",
		"length of five bytes":        hello + "\x30\xff\xff\xff\xff\x01",
		"packet type 0":               hello + "\x00\x00",
		"packet type 15":              hello + "\xf0\x00",
		"what only a broker may send": hello + "\x20\x02\x00\x00",
		"goodbye":                     hello + "\xe0\x00",
	} {
		t.Run(name, func(t *testing.T) {
			r := rawDial(t, b)
			if _, err := io.WriteString(r, in); err != nil {
				t.Fatal(err)
			}
			r.wantEnd()
		})
	}
	rawConnect(t, b, "others are served all the same")
}

func TestPing(t *testing.T) {
	r := rawConnect(t, listen(t, nil, nil), "pinger")
	r.write(packets.NewControlPacket(packets.Pingreq))
	if p := r.read(); encode(p) != "\xd0\x00" {
		t.Errorf("ping answered by %v", p)
	}
}

func TestKeepAlive(t *testing.T) {
	r := rawDial(t, listen(t, nil, nil))
	begin := time.Now()
	r.write(connectPacket("silent", 1))
	r.wantEnd()
	if after := time.Since(begin); after < time.Second {
		t.Errorf("ended after %v, the keep-alive is one second", after)
	}
}

// TestSlowSubscriber never reads. It must not hold up the others, nor the
// broker's memory.
func TestSlowSubscriber(t *testing.T) {
	b := listen(t, nil, nil)
	slow := rawConnect(t, b, "slow")
	p := packets.NewControlPacket(packets.Subscribe).(*packets.SubscribePacket)
	p.MessageID, p.Topics, p.Qoss = 1, []string{"t"}, []byte{1}
	slow.write(p)
	slow.read()
	payload := make([]byte, 128<<10)
	for i := 0; subscriptionExists(b, "t"); i++ {
		if i > 4096 {
			t.Fatal("512 MiB are waiting")
		}
		b.Inject(Message{Topic: "t", Payload: payload})
		runtime.Gosched()
	}
	slow.wantEnd()
}

// TestPacketIDs leaves packets unacknowledged: ids in flight are not used again.
func TestPacketIDs(t *testing.T) {
	c := newClient(nil, nil)
	seen := map[uint16]bool{}
	next := func() (uint16, bool) {
		p := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
		ok := c.assignID(p)
		return p.MessageID, ok
	}
	for range 65535 {
		id, ok := next()
		if !ok || id == 0 || seen[id] {
			t.Fatalf("id %d, %v after %d", id, ok, len(seen))
		}
		seen[id] = true
	}
	if id, ok := next(); ok {
		t.Errorf("id %d although all are in flight", id)
	}
	c.acknowledge(4711)
	if id, ok := next(); !ok || id != 4711 {
		t.Errorf("id %d, %v; want the one that is free", id, ok)
	}
}

func TestTooLongToDeliver(t *testing.T) {
	b := listen(t, nil, nil)
	sub := connect(t, b, "sub")
	sub.subscribe("#", 1)
	b.Inject(Message{Topic: "t", Payload: make([]byte, maxPacket)})
	b.Inject(Message{Topic: "t", Payload: []byte("next")})
	sub.want("t next")
}

func FuzzReadPacket(f *testing.F) {
	f.Add([]byte(encode(connectPacket("id", 30))))
	f.Add([]byte("\x32\x07\x00\x01t\x00\x01hi"))
	f.Add([]byte("\x82\x08\x00\x01\x00\x03a/#\x01"))
	f.Add([]byte("\xa2\x05\x00\x01\x00\x01t"))
	f.Add([]byte("\x30\xff\xff\xff\x7f"))
	f.Fuzz(func(t *testing.T, in []byte) {
		p, err := readPacket(bufio.NewReader(bytes.NewReader(in)))
		if err != nil {
			return
		}
		if publish, ok := p.(*packets.PublishPacket); ok {
			// What was read can be written, and reads the same.
			again, err := readPacket(bufio.NewReader(strings.NewReader(encode(publish))))
			if err != nil || encode(again) != encode(publish) {
				t.Errorf("%q reads as %v, %v", encode(publish), again, err)
			}
		}
	})
}

package hostile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"
)

const patience = 5 * time.Second // until a test gives up

func listen(t *testing.T, config *tls.Config, intercept func(Message) []Message) *Broker {
	t.Helper()
	b, err := Listen(config, intercept)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

type peer struct {
	paho.Client
	t    *testing.T
	in   chan paho.Message
	lost chan error
}

func connect(t *testing.T, b *Broker, id string) *peer {
	t.Helper()
	return dial(t, "tcp://"+b.Addr(), id, nil)
}

func dial(t *testing.T, url, id string, config *tls.Config) *peer {
	t.Helper()
	p := &peer{t: t, in: make(chan paho.Message, 4096), lost: make(chan error, 1)}
	p.Client = paho.NewClient(paho.NewClientOptions().
		AddBroker(url).SetClientID(id).SetTLSConfig(config).SetProtocolVersion(4).
		SetAutoReconnect(false).SetConnectTimeout(patience).
		SetWriteTimeout(time.Second). // without it a Publish may wait 30 s for a lost connection
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { p.in <- m }).
		SetConnectionLostHandler(func(_ paho.Client, err error) { p.lost <- err }))
	p.wait(p.Connect())
	t.Cleanup(func() { p.Client.Disconnect(0) })
	return p
}

func (p *peer) wait(token paho.Token) {
	p.t.Helper()
	if !token.WaitTimeout(patience) || token.Error() != nil {
		p.t.Fatalf("%T: %v", token, token.Error())
	}
}

func (p *peer) subscribe(filter string, qos byte) {
	p.t.Helper()
	p.wait(p.Client.Subscribe(filter, qos, nil))
}

func (p *peer) publish(topic string, qos byte, payload string) {
	p.t.Helper()
	p.wait(p.Client.Publish(topic, qos, false, payload))
}

// want takes the next messages and compares them, "topic payload".
func (p *peer) want(texts ...string) {
	p.t.Helper()
	for _, text := range texts {
		select {
		case m := <-p.in:
			if got := m.Topic() + " " + string(m.Payload()); got != text {
				p.t.Fatalf("got %q, want %q", got, text)
			}
		case <-time.After(patience):
			p.t.Fatalf("no message, want %q", text)
		}
	}
}

func (p *peer) wantLost() {
	p.t.Helper()
	select {
	case <-p.lost:
	case <-time.After(patience):
		p.t.Fatal("the connection is still there")
	}
}

func TestHonest(t *testing.T) {
	b := listen(t, nil, nil)
	sub, pub := connect(t, b, "sub"), connect(t, b, "pub")
	sub.subscribe("ek1/+/+/up/#", 1)
	const n = 1000
	var want []string
	for i := range n {
		pub.publish("ek1/t/g/up/sealed", byte(i%2), fmt.Sprint(i))
		want = append(want, fmt.Sprint("ek1/t/g/up/sealed ", i))
	}
	sub.want(want...)
	pub.publish("ek1/t/g/down/ack", 1, "not subscribed")
	pub.publish("ek1/t/g/up/sealed", 0, "")
	sub.want("ek1/t/g/up/sealed ")
	sub.wait(sub.Unsubscribe("ek1/+/+/up/#"))
	sub.subscribe("last", 0)
	pub.publish("ek1/t/g/up/sealed", 1, "unsubscribed")
	pub.publish("last", 1, "x")
	sub.want("last x")
}

func TestAckedAndDropped(t *testing.T) {
	var from []string
	b := listen(t, nil, func(m Message) []Message {
		from = append(from, m.From+" "+string(m.Payload))
		return nil
	})
	sub, pub := connect(t, b, "sub"), connect(t, b, "pub")
	sub.subscribe("#", 1)
	pub.publish("t", 1, "1") // returns on its PUBACK
	pub.publish("t", 1, "2")
	pub.publish("t", 1, "3")
	pub.publish("end", 1, "") // its PUBACK comes after the third was intercepted
	b.Inject(Message{Topic: "marker", Payload: []byte("m")})
	sub.want("marker m")
	b.intercepting.Lock()
	defer b.intercepting.Unlock()
	if got := strings.Join(from[:3], ","); got != "pub 1,pub 2,pub 3" {
		t.Errorf("intercepted %q", got)
	}
}

func TestLies(t *testing.T) {
	var b *Broker
	ready := make(chan struct{})
	b = listen(t, nil, func(m Message) []Message {
		<-ready
		b.Inject(Message{Topic: "injected", Payload: m.Payload})
		b.Disconnect("victim")
		return []Message{m, {Topic: "elsewhere", Payload: []byte("forged")}, m, {Topic: "not/+/valid"}, {Topic: ""}}
	})
	close(ready)
	sub, pub, victim := connect(t, b, "sub"), connect(t, b, "pub"), connect(t, b, "victim")
	sub.subscribe("#", 1)
	pub.publish("t", 1, "x")
	sub.want("injected x", "t x", "elsewhere forged", "t x")
	victim.wantLost()
	b.Disconnect("victim")
	b.Disconnect("nobody")
	pub.publish("t", 1, "still here")
	sub.want("injected still here")
}

func TestOverlap(t *testing.T) {
	b := listen(t, nil, nil)
	sub := connect(t, b, "sub")
	sub.subscribe("a/#", 0)
	sub.subscribe("a/+", 2)
	sub.subscribe("+/b", 0)
	b.Inject(Message{Topic: "a/b"})
	b.Inject(Message{Topic: "a/c/d"})
	for _, want := range []string{"a/b 1", "a/c/d 0"} {
		select {
		case m := <-sub.in:
			if got := fmt.Sprint(m.Topic(), " ", m.Qos()); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("no %q", want)
		}
	}
}

func TestRefusedFilter(t *testing.T) {
	b := listen(t, nil, nil)
	sub := connect(t, b, "sub")
	token := sub.SubscribeMultiple(map[string]byte{"good": 1, "best": 0}, nil)
	sub.wait(token)
	raw := rawConnect(t, b, "raw")
	p := packets.NewControlPacket(packets.Subscribe).(*packets.SubscribePacket)
	p.MessageID, p.Topics, p.Qoss = 7, []string{"a/#/b", "ok", "b+", "ok2"}, []byte{0, 2, 1, 3}
	raw.write(p)
	ack, ok := raw.read().(*packets.SubackPacket)
	if !ok || ack.MessageID != 7 || !bytes.Equal(ack.ReturnCodes, []byte{0x80, 1, 0x80, 0x80}) {
		t.Errorf("suback %+v", ack)
	}
}

func TestFilterLimit(t *testing.T) {
	b := listen(t, nil, nil)
	raw := rawConnect(t, b, "raw")
	p := packets.NewControlPacket(packets.Subscribe).(*packets.SubscribePacket)
	p.MessageID = 1
	for i := range maxFilters + 1 {
		p.Topics, p.Qoss = append(p.Topics, fmt.Sprint(i)), append(p.Qoss, 0)
	}
	p.Topics, p.Qoss = append(p.Topics, "0"), append(p.Qoss, 1) // known already
	raw.write(p)
	codes := raw.read().(*packets.SubackPacket).ReturnCodes
	if codes[maxFilters-1] != 0 || codes[maxFilters] != 0x80 || codes[maxFilters+1] != 1 {
		t.Errorf("codes at the limit: %x", codes[maxFilters-1:])
	}
}

func TestTakeOver(t *testing.T) {
	b := listen(t, nil, nil)
	first := connect(t, b, "same")
	second := connect(t, b, "same")
	first.wantLost()
	second.subscribe("t", 1)
	b.Inject(Message{Topic: "t", Payload: []byte("x")})
	second.want("t x")
}

func TestNoID(t *testing.T) {
	from := make(chan string, 2)
	b := listen(t, nil, func(m Message) []Message { from <- m.From; return nil })
	one, two := connect(t, b, ""), connect(t, b, "")
	one.publish("t", 1, "")
	two.publish("t", 1, "")
	if a, b := <-from, <-from; a == "" || a == b {
		t.Errorf("made-up client ids %q and %q", a, b)
	}
}

func TestTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	pair := []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}

	b := listen(t, &tls.Config{Certificates: pair, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}, nil)
	good := dial(t, "ssl://"+b.Addr(), "good", &tls.Config{RootCAs: pool, Certificates: pair})
	good.subscribe("t", 1)
	good.publish("t", 1, "over tls")
	good.want("t over tls")

	bad := paho.NewClient(paho.NewClientOptions().AddBroker("ssl://" + b.Addr()).
		SetTLSConfig(&tls.Config{RootCAs: pool}).SetProtocolVersion(4).SetConnectTimeout(patience))
	if token := bad.Connect(); !token.WaitTimeout(patience) || token.Error() == nil {
		t.Error("connected without a certificate")
	}
	b.Disconnect("good")
	good.wantLost()
}

// TestClose closes under fire: it has to return, and the publishers' calls too.
func TestClose(t *testing.T) {
	b := listen(t, nil, nil)
	var group sync.WaitGroup
	sub := connect(t, b, "sub")
	sub.subscribe("#", 1)
	for i := range 4 {
		pub := connect(t, b, fmt.Sprint("pub", i))
		group.Go(func() {
			for pub.Publish("t", 1, false, "x").WaitTimeout(patience) && pub.IsConnectionOpen() {
			}
		})
	}
	<-sub.in
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	group.Wait()
	if err := b.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	b.Inject(Message{Topic: "t"})
	if conn, err := net.Dial("tcp", b.Addr()); err == nil {
		conn.Close()
		t.Error("the port is still open")
	}
}

// TestMosquittoClients lets clients by other people judge the codec.
func TestMosquittoClients(t *testing.T) {
	for _, program := range []string{"mosquitto_sub", "mosquitto_pub"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal(err)
			}
			t.Skip(program + " is missing (apt-get install mosquitto-clients)")
		}
	}
	b := listen(t, nil, func(m Message) []Message {
		return []Message{m, m}
	})
	_, port, err := net.SplitHostPort(b.Addr())
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	sub := exec.Command("mosquitto_sub", "-h", "127.0.0.1", "-p", port, "-q", "1", "-t", "a/+", "-C", "4", "-W", "5", "-v")
	sub.Stdout = &out
	if err := sub.Start(); err != nil {
		t.Fatal(err)
	}
	// The subscriber is ready when a subscription of its filter exists.
	deadline := time.Now().Add(patience)
	for !subscriptionExists(b, "a/+") {
		if time.Now().After(deadline) {
			t.Fatal("mosquitto_sub did not subscribe")
		}
		time.Sleep(time.Millisecond)
	}
	for _, args := range [][]string{{"-t", "a/b", "-m", "one", "-q", "1"}, {"-t", "a/c", "-m", "two", "-q", "0"}} {
		if text, err := exec.Command("mosquitto_pub", append([]string{"-h", "127.0.0.1", "-p", port}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("mosquitto_pub: %v: %s", err, text)
		}
	}
	if err := sub.Wait(); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), "a/b one\na/b one\na/c two\na/c two\n"; got != want {
		t.Errorf("mosquitto_sub printed %q, want %q", got, want)
	}
}

func subscriptionExists(b *Broker, filter string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.byID {
		if _, ok := c.filters[filter]; ok {
			return true
		}
	}
	return false
}

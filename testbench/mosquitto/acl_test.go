package mosquitto

import (
	"crypto/tls"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	paho "github.com/eclipse/paho.mqtt.golang"
)

const (
	hashA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	hashB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// targets are topics that each identity tries to publish to and to read.
var targets = []string{
	"ek1/acme/gw1/up/hello",
	"ek1/acme/gw1/down/item",
	"ek1/acme/gw2/up/hello",
	"ek1/acme/gw2/down/item",
	"ek1/other/gw1/up/hello",
	"ek1/other/gw1/down/item",
	"ek1/acme/gw1/up/hello/more",
	"ek1/acme/gw1/up",
	"ek1/acme/gw1/side/hello",
	"ek1/acme/up/hello",
	"ek1/acme/gw1/up/up/hello",
	"ek1/boot/" + hashA + "/up/hello",
	"ek1/boot/" + hashA + "/down/item",
	"ek1/boot/" + hashB + "/up/hello",
	"ek1/boot/" + hashB + "/down/item",
	"ek1/boot/" + hashA + "/up/up/hello",
	"ek1/monitor/alarm",
	"ek1/bridge/up/hello",
	"ek1//up/hello",
	"ek1/boot//up/hello",
	"ek1",
	"other/topic",
}

// identities lists every kind of client and the targets it may write and read.
// Boot users begin with "boot:".
var identities = []struct {
	name        string
	write, read []string
}{
	{"acme/gw1", []string{"ek1/acme/gw1/up/hello"}, []string{"ek1/acme/gw1/down/item"}},
	{"acme/gw2", []string{"ek1/acme/gw2/up/hello"}, []string{"ek1/acme/gw2/down/item"}},
	{"acme", []string{"ek1/acme/up/hello"}, nil},
	{"acme/gw1/up", []string{"ek1/acme/gw1/up/up/hello"}, nil},
	{"+/gw1", nil, nil},
	{"acme/+", nil, nil},
	{"acme/#", nil, nil},
	{"#", nil, nil},
	{"ACME/gw1", nil, nil},
	{"acme/gw1/", nil, nil},
	{
		"bridge",
		[]string{"ek1/acme/gw1/down/item", "ek1/acme/gw2/down/item", "ek1/other/gw1/down/item", "ek1/boot/" + hashA + "/down/item", "ek1/boot/" + hashB + "/down/item", "ek1/bridge/up/hello"},
		[]string{"ek1/acme/gw1/up/hello", "ek1/acme/gw2/up/hello", "ek1/other/gw1/up/hello", "ek1/boot/" + hashA + "/up/hello", "ek1/boot/" + hashB + "/up/hello"},
	},
	{"boot:" + hashA, []string{"ek1/boot/" + hashA + "/up/hello"}, []string{"ek1/boot/" + hashA + "/down/item"}},
	{"boot:" + hashA + "/up", []string{"ek1/boot/" + hashA + "/up/up/hello"}, nil},
	{"boot:", nil, nil},
	{"boot:+", nil, nil},
	{"boot:#", nil, nil},
	{"boot:" + hashA + "/#", nil, nil},
	{"boot:bridge", nil, nil},
	{"boot:monitor", nil, nil},
	{"boot:acme/gw1", nil, nil},
	{"boot:../acme/gw1", nil, nil},
}

func (a *authority) identity(b *Broker, name string) *paho.ClientOptions {
	a.t.Helper()
	if user, ok := strings.CutPrefix(name, "boot:"); ok {
		return a.boot(b, user)
	}
	return a.client(b, name)
}

// TestWrite has everybody publish everywhere. The monitor sees what passes.
func TestWrite(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	monitor := dial(t, a.client(b, "monitor"))
	monitor.subscribe("ek1/#", "#")
	for _, id := range identities {
		c, err := tryDial(t, a.identity(b, id.name))
		if err != nil {
			if len(id.write) > 0 {
				t.Errorf("%q cannot connect: %v", id.name, err)
			}
			continue // a refused name is harmless
		}
		for _, topic := range targets {
			c.publish(topic)
		}
		monitor.publish("ek1/monitor/end")
		if got := monitor.until("ek1/monitor/end"); !slices.Equal(sorted(got), sorted(id.write)) {
			t.Errorf("%q could publish to %q, want %q", id.name, got, id.write)
		}
	}
}

// TestRead has everybody subscribe to everything while all topics are written.
func TestRead(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	clients := map[string]*rawClient{}
	for _, id := range identities {
		c, err := a.dialRaw(b, id.name, "")
		if err != nil {
			if len(id.read) > 0 {
				t.Errorf("%q cannot connect: %v", id.name, err)
			}
			continue
		}
		c.subscribe(append([]string{"#", "ek1/#", "+/+/+/+/+", "$SYS/#"}, targets...)...)
		clients[id.name] = c
	}
	for _, id := range identities { // who may write it, writes it
		if c := clients[id.name]; c != nil {
			c.publish(id.write...)
		}
	}
	dial(t, a.client(b, "other/gw1")).publish("ek1/other/gw1/up/hello")
	dial(t, a.boot(b, hashB)).publish("ek1/boot/" + hashB + "/up/hello")
	for _, id := range identities {
		c := clients[id.name]
		if c == nil {
			continue
		}
		if got := slices.Compact(sorted(c.received())); !slices.Equal(got, sorted(id.read)) {
			t.Errorf("%q could read %q, want %q", id.name, got, id.read)
		}
	}
}

func sorted(topics []string) []string {
	topics = slices.Clone(topics)
	slices.Sort(topics)
	return topics
}

func TestMonitor(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	monitor, watcher := dial(t, a.client(b, "monitor")), dial(t, a.client(b, "bridge"))
	gateway := dial(t, a.client(b, "acme/gw1"))
	gateway.subscribe("#")
	monitor.subscribe("#")
	monitor.publish("ek1/acme/gw1/down/item", "ek1/acme/gw1/up/hello", "ek1/monitor/alarm")
	watcher.publish("ek1/acme/gw1/down/last")
	if got := monitor.until("ek1/acme/gw1/down/last"); !slices.Equal(got, []string{"ek1/monitor/alarm"}) {
		t.Errorf("the monitor could publish to %q", got)
	}
	if got := gateway.until("ek1/acme/gw1/down/last"); len(got) > 0 {
		t.Errorf("the gateway was sent %q by the monitor", got)
	}
}

func TestWhoMayConnect(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	foreign := newAuthority(t)
	for name, config := range map[string]*tls.Config{
		"no certificate":               {RootCAs: a.pool},
		"a certificate of another CA":  {RootCAs: a.pool, Certificates: foreign.mutual("acme/gw1").Certificates},
		"tls 1.2":                      {RootCAs: a.pool, Certificates: a.mutual("acme/gw1").Certificates, MaxVersion: tls.VersionTLS12},
		"a certificate without a name": {RootCAs: a.pool, Certificates: a.mutual("").Certificates},
	} {
		o := clientOptions(b.URL(), config).SetUsername("acme/gw1")
		if c, err := tryDial(t, o); err == nil && c.IsConnectionOpen() {
			t.Errorf("connected with %s", name)
		}
	}
}

// TestWill leaves a last will on an own and on a foreign topic. A second
// connection with the same client id makes the broker publish it.
func TestWill(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	monitor := dial(t, a.client(b, "monitor"))
	monitor.subscribe("ek1/#")
	for topic, want := range map[string][]string{
		"ek1/boot/" + hashA + "/up/hello": {"ek1/boot/" + hashA + "/up/hello"},
		"ek1/boot/" + hashB + "/up/hello": nil,
		"ek1/acme/gw1/up/hello":           nil,
		"ek1/acme/gw1/down/item":          nil,
	} {
		for range 2 {
			if _, err := a.dialRaw(b, "boot:"+hashA, topic); err != nil {
				t.Fatal(err)
			}
		}
		monitor.publish("ek1/monitor/end")
		if got := monitor.until("ek1/monitor/end"); !slices.Equal(got, want) {
			t.Errorf("the will on %q came as %q", topic, got)
		}
		if _, err := a.dialRaw(b, "boot:"+hashA, ""); err != nil { // brings out the second will
			t.Fatal(err)
		}
		monitor.publish("ek1/monitor/end")
		monitor.until("ek1/monitor/end")
	}
}

// TestClientID tries to push another gateway off by its client id.
func TestClientID(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	victim := dial(t, a.client(b, "acme/gw2"))
	victim.subscribe("ek1/acme/gw2/down/+")
	for _, id := range []string{"acme/gw2", "whatever"} {
		dial(t, a.client(b, "acme/gw1").SetClientID(id))
	}
	dial(t, a.client(b, "bridge")).publish("ek1/acme/gw2/down/item")
	victim.until("ek1/acme/gw2/down/item")
}

// TestStolenSession has a boot client take the client id of a gateway that is
// away. What waits for the gateway must not be sent to it.
func TestStolenSession(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	gateway := dial(t, a.client(b, "acme/gw1").SetCleanSession(false))
	gateway.subscribe("ek1/acme/gw1/down/+")
	gateway.Client.Disconnect(100)
	bridge := dial(t, a.client(b, "bridge"))
	bridge.publish("ek1/acme/gw1/down/item")
	thief := dial(t, a.boot(b, hashA).SetClientID("acme/gw1").SetCleanSession(false))
	bridge.publish("ek1/acme/gw1/down/item")
	thief.subscribe("ek1/boot/" + hashA + "/down/+")
	bridge.publish("ek1/boot/" + hashA + "/down/last")
	if got := thief.until("ek1/boot/" + hashA + "/down/last"); len(got) > 0 {
		t.Errorf("the thief was sent %q", got)
	}
}

// TestMosquittoClients uses the shipped broker as the documents tell operators.
func TestMosquittoClients(t *testing.T) {
	program, err := exec.LookPath("mosquitto_pub")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("mosquitto_pub is missing (apt-get install mosquitto-clients)")
	}
	a := newAuthority(t)
	b := a.start()
	monitor := dial(t, a.client(b, "monitor"))
	monitor.subscribe("ek1/#")
	out, err := exec.Command(program, "-h", "127.0.0.1", "-p", b.ports.boot()[len("127.0.0.1:"):],
		"--cafile", a.options.CAFile, "-u", hashA, "-q", "1", "-t", "ek1/boot/"+hashA+"/up/hello", "-m", "hi").CombinedOutput()
	if err != nil {
		t.Fatalf("mosquitto_pub: %v: %s", err, out)
	}
	monitor.until("ek1/boot/" + hashA + "/up/hello")
}

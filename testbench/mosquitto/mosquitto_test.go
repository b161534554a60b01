package mosquitto

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	configs "edgekeep/configs/mosquitto"
)

func TestRestart(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	gateway := dial(t, a.client(b, "acme/gw1").SetCleanSession(false))
	gateway.subscribe("ek1/acme/gw1/down/+")
	gateway.Client.Disconnect(100)
	dial(t, a.client(b, "bridge")).publish("ek1/acme/gw1/down/item")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	store, err := os.ReadFile(b.StoreFile())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(store, []byte("to ek1/acme/gw1/down/item")) {
		t.Error("the persistence file does not hold what waits for a client")
	}

	second := a.start()
	if second.URL() != b.URL() || second.BootURL() != b.BootURL() {
		t.Errorf("moved from %s, %s to %s, %s", b.URL(), b.BootURL(), second.URL(), second.BootURL())
	}
	dial(t, a.client(second, "acme/gw1").SetCleanSession(false)).until("ek1/acme/gw1/down/item")
	if err := b.Kill(); err != nil { // the old handle must not harm the new broker
		t.Fatal(err)
	}
	if err := second.Kill(); err != nil {
		t.Fatal(err)
	}
	third := a.start()
	if third.URL() != b.URL() {
		t.Errorf("moved from %s to %s after Kill", b.URL(), third.URL())
	}
	dial(t, a.client(third, "acme/gw1"))
	if err := third.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := third.Stop(); err != nil {
		t.Errorf("stopped again: %v", err)
	}
}

func TestLimits(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	monitor := dial(t, a.client(b, "monitor"))
	monitor.subscribe("ek1/#")
	gateway := dial(t, a.client(b, "acme/gw1"))
	token := gateway.Publish("ek1/acme/gw1/up/sealed", 1, false, make([]byte, 131072))
	if !token.WaitTimeout(patience) || token.Error() != nil {
		t.Fatalf("128 KiB: %v", token.Error())
	}
	monitor.until("ek1/acme/gw1/up/sealed")
	gateway.Publish("ek1/acme/gw1/up/sealed", 1, false, make([]byte, 131073))
	monitor.publish("ek1/monitor/end")
	if got := monitor.until("ek1/monitor/end"); len(got) > 0 {
		t.Errorf("a payload over the limit arrived on %q", got)
	}
	retainer := dial(t, a.client(b, "acme/gw2"))
	retainer.Publish("ek1/acme/gw2/up/hello", 1, true, "retained")
	select {
	case <-retainer.lost:
	case <-time.After(patience):
		t.Error("a retained message was taken")
	}
}

func TestSecondStart(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	if _, err := Start(t.Context(), a.options); err == nil {
		t.Fatal("two brokers run in one directory")
	}
	dial(t, a.client(b, "acme/gw1"))
}

func TestPortTaken(t *testing.T) {
	a := newAuthority(t)
	b := a.start()
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("tcp", b.ports.boot())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	go func() { // a server that is not ours and not TLS
		for conn, err := other.Accept(); err == nil; conn, err = other.Accept() {
			conn.Close()
		}
	}()
	if _, err := Start(t.Context(), a.options); err == nil || !strings.Contains(err.Error(), "Address already in use") {
		t.Errorf("the error does not quote the broker: %v", err)
	}
}

// TestOtherServer has another TLS server on the ports of a broker.
func TestOtherServer(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	b := other.start()
	leaf, err := readLeaf(a.options.CertFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := probe(t.Context(), b.ports.mutual(), leaf); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("another server was taken for the broker: %v", err)
	}
}

func TestRefusedOptions(t *testing.T) {
	good := newAuthority(t).options
	for name, change := range map[string]func(*Options){
		"no directory":          func(o *Options) { o.Dir = "" },
		"relative directory":    func(o *Options) { o.Dir = "broker" },
		"directory with spaces": func(o *Options) { o.Dir = "/tmp/a b" },
		"no CA":                 func(o *Options) { o.CAFile = "" },
		"CA missing":            func(o *Options) { o.CAFile = "/does/not/exist" },
		"no certificate":        func(o *Options) { o.CertFile = "" },
		"certificate missing":   func(o *Options) { o.CertFile = "/does/not/exist" },
		"certificate is a key":  func(o *Options) { o.CertFile = o.KeyFile },
		"no key":                func(o *Options) { o.KeyFile = "" },
		"key is a certificate":  func(o *Options) { o.KeyFile = o.CertFile },
	} {
		o := good
		change(&o)
		if b, err := Start(t.Context(), o); err == nil {
			_ = b.Kill()
			t.Errorf("started with %s", name)
		}
	}
	if err := os.WriteFile(filepath.Join(good.Dir, "ports"), []byte("0 x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), good); err == nil || !strings.Contains(err.Error(), "delete it") {
		t.Errorf("a broken file of ports: %v", err)
	}
}

func TestCancelled(t *testing.T) {
	a := newAuthority(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if b, err := Start(ctx, a.options); !errors.Is(err, context.Canceled) {
		t.Errorf("started without time: %v, %v", b, err)
	}
	a.start() // and nothing is in its way
}

func TestRewrite(t *testing.T) {
	got, err := rewrite("# a 1\na 1\nb 2\na 1\n", map[string]string{"a 1": "a 9"})
	if want := "# a 1\na 9\nb 2\na 9\n"; err != nil || got != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if _, err := rewrite("# a 1\n", map[string]string{"a 1": "a 9"}); err == nil {
		t.Error("a line that is not there was replaced")
	}
}

// TestEveryKeyIsExplained: each paragraph of the shipped files begins with a
// comment.
func TestEveryKeyIsExplained(t *testing.T) {
	for name, text := range map[string]string{"mosquitto.conf": configs.Conf, "acl": configs.ACL, "acl-boot": configs.BootACL} {
		for paragraph := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
			if !strings.HasPrefix(paragraph, "#") && paragraph != "listener 8884" {
				t.Errorf("%s: no comment above %q", name, paragraph)
			}
		}
	}
}

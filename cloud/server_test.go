package cloud_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/mqtt"
)

// dialGateway connects an enrolled gateway of tenant acme.
func dialGateway(t testing.TB, name string, filters ...string) (*mqtt.Conn, <-chan mqtt.Message) {
	t.Helper()
	c, got, err := identify(ca, cloud.RoleGateway, "acme/"+name).dial(t, mqtt.ClientID("acme", name), "", filters...)
	if err != nil {
		t.Fatal(err)
	}
	return c, got
}

func TestGatewayPublishesOnItsOwnTopicsOnly(t *testing.T) {
	c, _ := dialGateway(t, "pub1")
	all := listen(t, ">")
	for _, topic := range []string{
		"ek1/acme/pub2/up/sealed", "ek1/globex/pub1/up/sealed", "ek1/acme/pub1/down/item", "ek1/acme/pub2/down/item",
		"ek1/acme/pub2/up/ask", "ek1/acme/pub2/up/peer", "ek1/globex/pub1/up/ask", "ek1/acme/pub1/down/answer", "ek1/acme/pub1/down/peer", "ek1/acme/pub2/down/peer",
		"ek1/acme/pub1/up/blob", "ek1/acme/pub1/up/enrol", "blob/acme/id/0", "svc/key", "reply/acme/pub1/id", "$KV/ledger/acme/i",
		"ek1/boot/" + strings.Repeat("0", 64) + "/up/enrol", "ek1/acme/pub1/up", "ek1/acme/pub1/up/sealed/more", "ek1/acme/pub1",
		"rec/acme/pub1/s", "find/acme/pub1", "svc/challenge", "svc/appraise", "api/acme/gateway/ls", "verdict/acme/pub1",
		"$KV/gateways/acme/pub1", "$JS/API/STREAM/INFO/REC", "$SYS/REQ/USER/AUTH", "_INBOX/x", "ek2/acme/pub1/up/sealed", "x",
	} {
		if err := c.Publish(topic, []byte("forbidden")); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Publish("ek1/acme/pub1/up/sealed", []byte("allowed")); err != nil {
		t.Fatal(err)
	}
	for {
		m := nextMessage(t, all)
		if bytes.Contains(m.Data, []byte("forbidden")) && !strings.HasPrefix(m.Subject, "$MQTT.") {
			t.Fatalf("published on %s", m.Subject)
		}
		if m.Subject == "ek1.acme.pub1.up.sealed" {
			return // what was sent before on the same connection would have come before
		}
	}
}

func TestGatewayPublishesEveryKind(t *testing.T) {
	c, _ := dialGateway(t, "kinds")
	for _, kind := range []string{"hello", "evidence", "sealed", "result", "pull", "ask", "peer"} {
		sub := listen(t, "ek1.acme.kinds.up."+kind)
		if err := c.Publish("ek1/acme/kinds/up/"+kind, []byte(kind)); err != nil {
			t.Fatal(err)
		}
		if m := nextMessage(t, sub); string(m.Data) != kind {
			t.Errorf("%s arrived as %q", kind, m.Data)
		}
	}
}

func TestGatewayReadsItsOwnTopicsOnly(t *testing.T) {
	id := identify(ca, cloud.RoleGateway, "acme/sub1")
	for _, filter := range []string{
		"ek1/acme/sub2/down/+", "ek1/globex/sub1/down/+", "ek1/acme/+/down/+", "ek1/+/+/down/+", "ek1/acme/sub1/up/+",
		"ek1/acme/sub1/#", "ek1/#", "#", "+/+/+/+/+", "ek1/acme/sub1/+/+", "$KV/#", "$SYS/#", "_INBOX/#", "api/#", "rec/#",
	} {
		if _, _, err := id.dial(t, "acme_sub1", "", filter); !errors.Is(err, mqtt.ErrRefused) {
			t.Errorf("subscribing %s: got %v, want a refusal", filter, err)
		}
	}
	_, got := dialGateway(t, "sub1", "ek1/acme/sub1/down/+")
	for _, m := range []string{"ek1.acme.sub2.down.item", "ek1.acme.sub1.up.sealed", "ek1.globex.sub1.down.item", "ek1.acme.sub1.down.item"} {
		if err := service.Publish(m, []byte(m)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case m := <-got:
		if m.Topic != "ek1/acme/sub1/down/item" {
			t.Fatalf("it got %s", m.Topic)
		}
	case <-deadline(t).Done():
		t.Fatal("it got nothing")
	}
}

func TestWhoMayConnectOverMQTT(t *testing.T) {
	other := must(cloud.NewCA(t.TempDir()+"/ca.pem", t.TempDir()+"/ca.key", "Edgekeep acme CA", time.Now()))
	old := identify(ca, cloud.RoleGateway, "acme/old")
	expiring := identify(ca, cloud.RoleGateway, "acme/expired")
	expiring.leaf = must(ca.Issue(cloud.RoleGateway, "acme/expired", &expiring.key.PublicKey, time.Now().Add(-2*time.Hour), time.Hour))
	server := identity{key: expiring.key}
	server.leaf = must(ca.IssueServer([]string{"acme/srv"}, &server.key.PublicKey, time.Now()))
	hash := strings.Repeat("0f", 32)
	tests := []struct {
		name     string
		id       identity
		clientID string
		user     string
		ok       bool
	}{
		{"a gateway", identify(ca, cloud.RoleGateway, "acme/gw1"), "acme_gw1", "", true},
		{"a gateway under any user name", identify(ca, cloud.RoleGateway, "acme/gw1"), "acme_gw1", "globex/gw2", true},
		{"another client id", identify(ca, cloud.RoleGateway, "acme/gw1"), "acme_gw2", "", false},
		{"another tenant's client id", identify(ca, cloud.RoleGateway, "acme/gw1"), "globex_gw1", "", false},
		{"a box's client id", identify(ca, cloud.RoleGateway, "acme/gw1"), "boot_gw1", "", false},
		{"a certificate of another CA of the same name", identify(other, cloud.RoleGateway, "acme/gw1"), "acme_gw1", "", false},
		{"another CA, as a box", identify(other, cloud.RoleGateway, "acme/gw1"), "boot_gw1", hash, false},
		{"an expired certificate", expiring, "acme_expired", "", false},
		{"a server's certificate", server, "acme_srv", "", false},
		{"a certificate from before an enrolment", old, "acme_old", "", false},
		{"no role", identify(ca, "", "acme/gw1"), "acme_gw1", "", false},
		{"an unknown role", identify(ca, "admin", "acme/gw1"), "acme_gw1", "", false},
		{"an operator", identify(ca, cloud.RoleOperator, "acme/gw1"), "acme_gw1", "", false},
		{"a consumer", identify(ca, cloud.RoleConsumer, "acme/gw1"), "acme_gw1", "", false},
		{"the bridge", identify(ca, cloud.RoleBridge, "bridge"), "bridge", "", false},
		{"a monitor", identify(ca, cloud.RoleMonitor, "monitor"), "m", "", true},
		{"a gateway without tenant", identify(ca, cloud.RoleGateway, "gw1"), "gw1_", "", false},
		{"a gateway with wildcards", identify(ca, cloud.RoleGateway, "*/*"), "*_*", "", false},
		{"a gateway of three names", identify(ca, cloud.RoleGateway, "acme/gw1/x"), "acme_gw1/x", "", false},
		{"a gateway named by a subject", identify(ca, cloud.RoleGateway, "acme/gw1.up.x"), "acme_gw1.up.x", "", false},
		{"a box", identity{}, "boot_1", hash, true},
		{"a box without hash", identity{}, "boot_1", "", false},
		{"a box with half a hash", identity{}, "boot_1", hash[:32], false},
		{"a box with a hash in capitals", identity{}, "boot_1", strings.ToUpper(hash), false},
		{"a box with a wildcard", identity{}, "boot_1", "*", false},
		{"a box with a service's name", identity{}, "boot_1", "edgekeep-service", false},
		{"a box with a gateway's client id", identity{}, "acme_gw1", hash, false},
	}
	revoke(t, "acme/old", old)
	for _, x := range tests {
		t.Run(x.name, func(t *testing.T) {
			_, _, err := x.id.dial(t, x.clientID, x.user)
			if x.ok != (err == nil) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func revoke(t testing.TB, cn string, id identity) {
	t.Helper()
	next := maps.Clone(*refused.Load())
	next[fmt.Sprintf("%s/%x", cn, id.leaf.SerialNumber.Bytes())] = true
	refused.Store(&next)
}

func TestRevokedGatewayIsCutOff(t *testing.T) {
	old := identify(ca, cloud.RoleGateway, "acme/again")
	c, _, err := old.dial(t, "acme_again", "")
	if err != nil {
		t.Fatal(err)
	}
	revoke(t, "acme/again", old)
	srv.Disconnect("acme", "agai") // somebody else: nothing happens
	srv.Disconnect("acme", "again")
	select {
	case <-c.Lost():
	case <-deadline(t).Done():
		t.Fatal("it is still connected")
	}
	if _, _, err := old.dial(t, "acme_again", ""); err == nil {
		t.Fatal("it connected again with the certificate from before")
	}
	if _, _, err := identify(ca, cloud.RoleGateway, "acme/again").dial(t, "acme_again", ""); err != nil {
		t.Fatalf("with a new certificate: %v", err)
	}
}

func TestNoGatewayBeforeAnybodyKnowsWhoIsRevoked(t *testing.T) {
	s, err := cloud.StartServer(cloud.ServerConfig{
		Dir: t.TempDir(), Host: "127.0.0.1", ClientPort: -1, MQTTPort: -1,
		Cert: path("keys/server.pem"), Key: path("keys/server.key"), ClientCA: path("keys/ca.pem"),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	id := identify(ca, cloud.RoleGateway, "acme/gw1")
	_, err = mqtt.Dial(deadline(t), mqtt.Options{URL: "tls://" + s.MQTTAddr(), TLS: id.tls(), ClientID: "acme_gw1"})
	if err == nil {
		t.Fatal("connected")
	}
	s.SetRevoked(func(context.Context, string, string, []byte) bool { return false })
	c, err := mqtt.Dial(deadline(t), mqtt.Options{URL: "tls://" + s.MQTTAddr(), TLS: id.tls(), ClientID: "acme_gw1"})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestBoxReachesItsBootTopicsOnly(t *testing.T) {
	hash, other := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	for _, filter := range []string{"ek1/boot/" + other + "/down/+", "ek1/boot/+/down/+", "ek1/boot/" + hash + "/up/+", "ek1/acme/gw1/down/+", "#"} {
		if _, _, err := (identity{}).dial(t, "boot_x", hash, filter); !errors.Is(err, mqtt.ErrRefused) {
			t.Errorf("subscribing %s: got %v, want a refusal", filter, err)
		}
	}
	c, got, err := (identity{}).dial(t, "boot_x", hash, "ek1/boot/"+hash+"/down/+")
	if err != nil {
		t.Fatal(err)
	}
	all := listen(t, "ek1.>")
	for _, topic := range []string{
		"ek1/boot/" + other + "/up/enrol", "ek1/boot/" + hash + "/down/item", "ek1/acme/gw1/up/sealed", "ek1/boot/" + hash + "/up/enrol",
	} {
		if err := c.Publish(topic, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if m := nextMessage(t, all); m.Subject != "ek1.boot."+hash+".up.enrol" {
		t.Fatalf("published on %s", m.Subject)
	}
	if err := service.Publish("ek1.boot."+hash+".down.item", []byte("y")); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-got:
		if m.Topic != "ek1/boot/"+hash+"/down/item" {
			t.Fatalf("it got %s", m.Topic)
		}
	case <-deadline(t).Done():
		t.Fatal("it got nothing")
	}
}

func TestMonitorSeesAndSaysNothing(t *testing.T) {
	c, got, err := identify(ca, cloud.RoleMonitor, "monitor").dial(t, "monitor", "", "ek1/#")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Publish("ek1/acme/gw1/up/sealed", []byte("forbidden")); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(deadline(t), "ek1/monitor/x/up/y", nil); err != nil {
		t.Fatal(err)
	}
	if err := service.Publish("ek1.acme.seen.up.sealed", []byte("z")); err != nil {
		t.Fatal(err)
	}
	for m := range got {
		if string(m.Payload) == "forbidden" {
			t.Fatal("it published as a gateway")
		}
		if m.Topic == "ek1/acme/seen/up/sealed" {
			return
		}
	}
}

// echo answers requests and tells on which subjects they came.
func echo(t testing.TB, subject string) *nats.Subscription {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if err := cloud.Answer(ctx, bus, subject, "echo", func(_ context.Context, s string, _ question) (question, error) {
		return question{Text: s}, nil
	}); err != nil {
		t.Fatal(err)
	}
	return listen(t, subject)
}

type question struct {
	Text string `cbor:"1,keyasint"`
}

func TestWhoMayAskWhat(t *testing.T) {
	tests := []struct {
		role, cn string
		may, not []string
	}{
		{
			cloud.RoleOperator, "t1/op",
			[]string{"api.t1.gateway.ls", "api.t1.command.send", "api.t1.data.key", "api.t1.evidence", "api.t1.workload.recover", "api.t1.blob.put"},
			[]string{"svc.key", "api.t2.workload.stop", "api.t2.blob.put", "blob.t1.x.0", "$KV.ledger.t1.i", "reply.t1.gw1.x", "ek1.t1.gw1.up.ask", "ek1.t1.gw1.down.peer", "api.t2.gateway.ls", "api.t2.data.key", "api.t1", "svc.challenge", "svc.appraise", "ek1.t1.gw1.up.sealed", "ek1.t1.gw1.down.item", "rec.t1.gw1.s", "$KV.gateways.t1.gw1", "$JS.API.INFO", "$JS.API.STREAM.PURGE.REC", "$SYS.REQ.USER.AUTH", "_INBOX.x"},
		},
		{
			cloud.RoleConsumer, "t1/co",
			[]string{"api.t1.data.key", "api.t1.data.fetch", "api.t1.data.infer", "api.t1.data.attest", "api.t1.data.ledger"},
			[]string{"api.t1.workload.ls", "api.t1.workload.stop", "api.t1.workload.recover", "api.t1.blob.put", "api.t1.blob.rm", "api.t2.data.infer", "api.t1.gateway.ls", "api.t1.gateway.approve", "api.t1.gateway.revoke", "api.t1.gateway.attest", "api.t1.command.send", "api.t1.command.next", "api.t1.evidence", "api.t1.data", "api.t2.data.key", "api.t2.gateway.ls"},
		},
	}
	for _, x := range tests {
		t.Run(x.role, func(t *testing.T) {
			for _, pattern := range []string{"api.>", "svc.>", "rec.t1.>", "ek1.t1.>"} {
				asked := listen(t, pattern)
				defer func() {
					for range len(x.not) {
						if m, err := asked.NextMsg(time.Nanosecond); err == nil && string(m.Data) == "forbidden" {
							t.Errorf("it published on %s", m.Subject)
						}
					}
				}()
			}
			echo(t, "api.*.*.*")
			echo(t, "api.*.*")
			nc, errs := connect(t, identify(ca, x.role, x.cn))
			for _, s := range x.not {
				if err := nc.Publish(s, []byte("forbidden")); err != nil {
					t.Fatal(err)
				}
				if err := nc.Flush(); err != nil {
					t.Fatal(err)
				}
				select {
				case err := <-errs:
					if !errors.Is(err, nats.ErrPermissionViolation) {
						t.Errorf("publishing on %s: %v", s, err)
					}
				case <-deadline(t).Done():
					t.Fatalf("publishing on %s was not refused", s)
				}
			}
			for _, s := range x.may {
				got, err := cloud.Ask[question](deadline(t), nc, s, question{})
				if err != nil || got.Text != s {
					t.Errorf("asking %s: %v, %v", s, got, err)
				}
			}
		})
	}
}

func TestWhoMayConnectAsAPerson(t *testing.T) {
	other := must(cloud.NewCA(t.TempDir()+"/ca.pem", t.TempDir()+"/ca.key", "Edgekeep acme CA", time.Now()))
	for _, x := range []struct {
		name string
		id   identity
		ok   bool
	}{
		{"an operator", identify(ca, cloud.RoleOperator, "acme/op"), true},
		{"a consumer", identify(ca, cloud.RoleConsumer, "acme/co"), true},
		{"an operator of another CA", identify(other, cloud.RoleOperator, "acme/op"), false},
		{"an operator of every tenant", identify(ca, cloud.RoleOperator, "*/op"), false},
		{"an operator of the rest", identify(ca, cloud.RoleOperator, ">/op"), false},
		{"an operator of no tenant", identify(ca, cloud.RoleOperator, "/op"), false},
		{"a gateway", identify(ca, cloud.RoleGateway, "acme/gw1"), false},
		{"a monitor", identify(ca, cloud.RoleMonitor, "monitor"), false},
		{"nobody", identity{}, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			if _, _, err := x.id.person(t); x.ok != (err == nil) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if _, err := nats.Connect(srv.ClientURL(), nats.Secure(identity{}.tls()), nats.UserInfo("edgekeep-service", "guess")); err == nil {
		t.Fatal("a service's name and a guess let somebody in")
	}
}

func TestNobodyReadsAnothersAnswers(t *testing.T) {
	a, b := identify(ca, cloud.RoleOperator, "acme/a"), identify(ca, cloud.RoleOperator, "acme/b")
	nc, errs := connect(t, a)
	for _, s := range []string{cloud.Inbox(b.leaf) + ".>", cloud.Inbox(b.leaf) + ".x", "_INBOX.>", "*.>", ">", "api.acme.>", "_INBOX_*.>", "ek1.>"} {
		if _, err := nc.SubscribeSync(s); err != nil {
			t.Fatal(err)
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-errs:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("subscribing %s: %v", s, err)
			}
		case <-deadline(t).Done():
			t.Fatalf("subscribing %s was not refused", s)
		}
	}
}

// A person chooses where an answer goes. It must not be where the cloud's roles
// may write and the person may not.
func TestAnswersGoToInboxesOnly(t *testing.T) {
	asked := echo(t, "api.acme.gateway.reply")
	nc, _ := connect(t, identify(ca, cloud.RoleOperator, "acme/op"))
	before := must(bus.Rec.Info(deadline(t))).State.LastSeq
	for _, reply := range []string{"rec.globex.gw1.s", "$KV.gateways.globex.gw1", "ek1.globex.gw1.down.item", "api.globex.gateway.reply", "find.globex.gw1"} {
		all := listen(t, reply)
		if err := nc.PublishRequest("api.acme.gateway.reply", reply, []byte{0xa1, 0x01, 0x60}); err != nil {
			t.Fatal(err)
		}
		nextMessage(t, asked)
		// The answer to a request of after comes after the answer to this one.
		if _, err := cloud.Ask[question](deadline(t), nc, "api.acme.gateway.reply", question{}); err != nil {
			t.Fatal(err)
		}
		nextMessage(t, asked)
		if m, err := all.NextMsg(50 * time.Millisecond); err == nil {
			t.Errorf("an answer went to %s", m.Subject)
		}
	}
	if after := must(bus.Rec.Info(deadline(t))).State.LastSeq; after != before {
		t.Error("an answer was stored as data")
	}
}

func TestOddTopicsHurtNobodyElse(t *testing.T) {
	good, _ := dialGateway(t, "good")
	sub := listen(t, "ek1.acme.good.up.sealed")
	odd := listen(t, "ek1.acme.odd.>")
	big := make([]byte, mqtt.MaxPayload+1)
	for i, topic := range []string{
		"ek1/acme/odd/up/with space", "ek1/acme/odd/up/with.dot", "ek1/acme/odd/up/", "ek1//odd/up/sealed", "ek1/acme/odd//sealed", "/", "//", " ",
		"ek1/acme/odd/up/ü", "ek1/acme/odd/up/" + strings.Repeat("x", 4000), "ek1/acme/odd/up/sealed/", "$", "ek1/acme/odd/up/>", "ek1/acme/odd/up/*",
		"ek1/acme/odd/up/a\tb", "ek1/acme/odd/up/a\r\nPUB x 1", "ek1.acme.odd.up.sealed",
	} {
		c, _ := dialGateway(t, "odd") // an odd topic may have cost the last connection
		_ = c.Publish(topic, []byte("odd"))
		flushed := make(chan error, 1)
		go func() { flushed <- c.Flush(deadline(t), "ek1/acme/odd/up/pull", nil) }()
		<-flushed // it went through, or the connection is lost
		if err := good.Flush(deadline(t), "ek1/acme/good/up/sealed", []byte{byte(i)}); err != nil {
			t.Fatalf("after %q: %v", topic, err)
		}
		if m := nextMessage(t, sub); m.Data[0] != byte(i) {
			t.Fatalf("after %q: %d came", topic, m.Data[0])
		}
		c.Close()
	}
	c, _ := dialGateway(t, "odd")
	if err := c.Publish("ek1/acme/odd/up/sealed", big); err == nil {
		t.Error("our own client sent more than is allowed")
	}
	for {
		m, err := odd.NextMsg(time.Nanosecond)
		if err != nil {
			break
		}
		if got, err := mqtt.ParseSubject(m.Subject); err == nil && got.Kind != "pull" {
			t.Errorf("an odd topic became %s", m.Subject)
		}
	}
}

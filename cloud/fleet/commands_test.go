package fleet_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/tee/message"
)

// order signs a command and sends it as an operator of a tenant.
func order(t testing.TB, as string, by *ecdsa.PrivateKey, c message.Command) ([]byte, error) {
	t.Helper()
	msg := must(c.Sign(by))
	_, err := cloud.Ask[fleet.None](deadline(t), bus.NC, "api."+as+".command.send", fleet.Signed{Message: msg})
	return msg, err
}

func (g *gateway) command(sequence uint64, name string) message.Command {
	return message.Command{Audience: g.subject(), Sequence: sequence, Name: name}
}

func (g *gateway) queue() fleet.Queue {
	g.t.Helper()
	q, _, _, err := cloud.Get[fleet.Queue](deadline(g.t), bus.Commands, cloud.Key(g.tenant, g.name))
	if err != nil {
		g.t.Fatal(err)
	}
	return q
}

// pull asks what is next, as the keep does.
func (g *gateway) pull(n uint64) message.Item {
	g.t.Helper()
	sub := must(bus.NC.SubscribeSync("ek1." + g.tenant + "." + g.name + ".down.item"))
	defer func() { _ = sub.Unsubscribe() }()
	g.publish("pull", message.Encode(message.Pull{Nonce: nonce(n)}))
	m, err := sub.NextMsgWithContext(deadline(g.t))
	if err != nil {
		g.t.Fatalf("nothing was delivered: %v", err)
	}
	item, err := message.VerifyItem(&signers["acme"]["fleet"].PublicKey, m.Data)
	if err != nil || !bytes.Equal(item.Nonce, nonce(n)) || item.Subject != g.subject() {
		g.t.Fatalf("delivered for %s over %x: %v", item.Subject, item.Nonce, err)
	}
	return item
}

func (g *gateway) result(command []byte, sequence uint64, done bool) message.Result {
	sum := sha256.Sum256(command)
	return message.Result{Subject: g.subject(), Sequence: sequence, Command: sum[:], Done: done}
}

func TestCommandsAreQueuedInSequence(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "queue")
	op := signers["acme"]["operator"]
	next := func() uint64 {
		t.Helper()
		return must(cloud.Ask[fleet.NextSequence](deadline(t), bus.NC, "api.acme.command.next", fleet.Name{Gateway: "queue"})).Sequence
	}
	if n := next(); n != 1 {
		t.Fatalf("the first sequence is %d", n)
	}
	hints := must(bus.NC.SubscribeSync("ek1.acme.queue.down.notify"))
	first, err := order(t, "acme", op, g.command(1, message.StatusCommand))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hints.NextMsgWithContext(deadline(t)); err != nil {
		t.Error("the gateway got no hint")
	}
	third, err := order(t, "acme", op, g.command(3, message.RotateStreamKeys))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name, as string
		by       *ecdsa.PrivateKey
		c        message.Command
		want     string
	}{
		{"the same again", "acme", op, g.command(3, message.RotateStreamKeys), "sequence 3 was used"},
		{"a sequence that was skipped", "acme", op, g.command(2, message.StatusCommand), "sequence 2 was used"},
		{"sequence zero", "acme", op, g.command(0, message.StatusCommand), "was used"},
		{"signed by another tenant's operator", "acme", signers["globex"]["operator"], g.command(4, message.StatusCommand), "command"},
		{"signed by the verifier", "acme", signers["acme"]["verifier"], g.command(4, message.StatusCommand), "command"},
		{"of another tenant's operator for our gateway", "globex", signers["globex"]["operator"], g.command(4, message.StatusCommand), "not for a gateway of globex"},
		{"sent as another tenant", "globex", op, g.command(4, message.StatusCommand), "command"},
		{"for a gateway that there is not", "acme", op, message.Command{Audience: "acme/nobody", Sequence: 4, Name: message.StatusCommand}, "no gateway acme/nobody"},
		{"for everybody", "acme", op, message.Command{Audience: "acme/*", Sequence: 4, Name: message.StatusCommand}, "not for a gateway"},
		{"for a topic", "acme", op, message.Command{Audience: "acme/queue/down", Sequence: 4, Name: message.StatusCommand}, "not for a gateway"},
		{"for a subject", "acme", op, message.Command{Audience: "acme.queue", Sequence: 4, Name: message.StatusCommand}, "not for a gateway"},
		{"unknown", "acme", op, g.command(4, "reboot"), "unknown command"},
		{"with too much", "acme", op, message.Command{Audience: g.subject(), Sequence: 4, Name: message.StatusCommand, Args: map[string]string{"a": "b"}}, "no arguments"},
		{"expired", "acme", op, message.Command{Audience: g.subject(), Sequence: 4, Name: message.StatusCommand, Expires: time.Now().Unix() - 1}, "expired"},
	} {
		if _, err := order(t, x.as, x.by, x.c); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: got %v, want %q", x.name, err, x.want)
		}
	}
	if q := g.queue(); q.Last != 3 || len(q.Pending) != 2 {
		t.Fatalf("%d commands wait, the last is %d", len(q.Pending), q.Last)
	}
	if n := next(); n != 4 {
		t.Errorf("the next sequence is %d", n)
	}
	// The oldest is delivered until it is answered.
	for i := range 2 {
		if item := g.pull(uint64(i)); !bytes.Equal(item.Command, first) {
			t.Error("not the oldest command was delivered")
		}
	}
	g.publish("result", must(g.result(first, 1, true).Sign(g.key)))
	eventually(t, "the result is taken", func() bool { return len(g.queue().Results) == 1 })
	if item := g.pull(9); !bytes.Equal(item.Command, third) {
		t.Error("the next command was not delivered")
	}
	if r := g.queue().Results[0]; r.Sequence != 1 || !r.Result.Done {
		t.Errorf("the result is of %d", r.Sequence)
	}
}

func TestCommandQueueIsBounded(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "bounded")
	for i := range 64 {
		if _, err := order(t, "acme", signers["acme"]["operator"], g.command(uint64(i+1), message.StatusCommand)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := order(t, "acme", signers["acme"]["operator"], g.command(65, message.StatusCommand)); err == nil {
		t.Error("there is no end to it")
	}
}

func TestResultsThatDoNotCount(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "acme", "results")
	other := enrolled(t, "acme", "results-b")
	command, err := order(t, "acme", signers["acme"]["operator"], g.command(1, message.StatusCommand))
	if err != nil {
		t.Fatal(err)
	}
	good := g.result(command, 1, true)
	refused := uint64(0)
	for name, msg := range map[string][]byte{
		"a key that no verdict names": must(good.Sign(newKey())),
		"the operator's key":          must(good.Sign(signers["acme"]["operator"])),
		"another gateway's key":       must(good.Sign(other.key)),
		"about another gateway":       must(other.result(command, 1, true).Sign(g.key)),
		"garbage":                     []byte("garbage"),
	} {
		g.publish("result", msg)
		refused++
		eventually(t, name+" is refused", func() bool { return refusals(f, "result: ") == refused })
	}
	// Signed by the gateway, and the answer to nothing that waits.
	for _, r := range []message.Result{
		g.result([]byte("another command"), 1, true),
		g.result(command, 1<<63, true), // it cannot move on the sequence that counts as accepted
		g.result(command, 0, true),
	} {
		g.publish("result", must(r.Sign(g.key)))
	}
	g.publish("result", must(good.Sign(g.key)))
	eventually(t, "the good one is taken", func() bool { return len(g.queue().Results) > 0 })
	for range 3 { // and again
		g.publish("result", must(good.Sign(g.key)))
	}
	second, err := order(t, "acme", signers["acme"]["operator"], g.command(2, message.StatusCommand))
	if err != nil {
		t.Fatal(err)
	}
	g.publish("result", must(g.result(second, 0, false).Sign(g.key))) // the keep could not read it
	eventually(t, "the second is answered", func() bool { return len(g.queue().Pending) == 0 })
	q := g.queue()
	if len(q.Results) != 2 || q.Results[0].Sequence != 1 || q.Results[1].Sequence != 2 || q.Results[1].Result.Done {
		t.Errorf("the results are %+v", q.Results)
	}
	eventually(t, "what was accepted is known", func() bool {
		e, _, _, err := cloud.Get[cloud.Gateway](deadline(t), bus.Gateways, "acme.results")
		return err == nil && e.Command == 1
	})
}

func TestPull(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "acme", "pull")
	item := g.pull(1)
	if item.Command != nil || item.Certificate != nil || item.Credential != nil || item.Roots != nil || len(item.Verdict) == 0 {
		t.Errorf("an idle gateway gets %+v", item)
	}
	if age := time.Since(time.Unix(item.Time, 0)); age < -2*time.Second || age > time.Minute {
		t.Errorf("the fleet's clock says %s", age)
	}
	for _, bad := range [][]byte{nil, []byte("garbage"), message.Encode(message.Pull{Nonce: make([]byte, 31)}), message.Encode(message.Pull{Nonce: make([]byte, 33)})} {
		n := refusals(f, "")
		g.publish("pull", bad)
		eventually(t, "it is refused", func() bool { return refusals(f, "") == n+1 })
	}
	g.change(func(e *cloud.Gateway) { e.Revoked = true })
	g.publish("pull", message.Encode(message.Pull{Nonce: nonce(2)}))
	eventually(t, "a revoked gateway is refused", func() bool { return refusals(f, "revoked") == 1 })
	if _, err := order(t, "acme", signers["acme"]["operator"], g.command(1, message.StatusCommand)); err == nil {
		t.Error("a command for a revoked gateway was queued")
	}
}

func TestRevoked(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "acme", "certs")
	ctx := deadline(t)
	now := time.Now().Unix()
	serial := func(issued int64) []byte {
		return append([]byte{byte(issued >> 56), byte(issued >> 48), byte(issued >> 40), byte(issued >> 32), byte(issued >> 24), byte(issued >> 16), byte(issued >> 8), byte(issued)}, make([]byte, 8)...)
	}
	short := func(b []byte) []byte { return bytes.TrimLeft(b, "\x00") }
	g.change(func(e *cloud.Gateway) { e.Enrolled = now })
	for _, x := range []struct {
		name, tenant, gateway string
		serial                []byte
		want                  bool
	}{
		{"of this enrolment", "acme", "certs", short(serial(now)), false},
		{"renewed", "acme", "certs", short(serial(now + 1000)), false},
		{"of an earlier enrolment", "acme", "certs", short(serial(now - 1)), true},
		{"not of ours", "acme", "certs", []byte{1, 2, 3}, true},
		{"no serial", "acme", "certs", nil, true},
		{"another tenant's", "globex", "certs", short(serial(now)), true},
		{"nobody's", "acme", "nobody", short(serial(now)), true},
	} {
		if got := f.Revoked(ctx, x.tenant, x.gateway, x.serial); got != x.want {
			t.Errorf("%s: %v", x.name, got)
		}
	}
	forget(t, strings.Repeat("0", 64))
	cut := make(chan string, 1)
	f.Disconnect = func(tenant, gateway string) { cut <- tenant + "/" + gateway }
	admitted := must(message.Admission{EKHash: make([]byte, 32), Tenant: "acme", Gateway: "certs", ID: make([]byte, 16)}.Sign(signers["acme"]["operator"]))
	if err := cloud.Put(ctx, bus.EKs, strings.Repeat("0", 64), cloud.EK{Hash: make([]byte, 32), State: cloud.Enrolled, Admission: admitted}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := cloud.Ask[fleet.None](ctx, bus.NC, "api.globex.gateway.revoke", fleet.Name{Gateway: "certs"}); err == nil {
		t.Fatal("another tenant revoked it")
	}
	if _, err := cloud.Ask[fleet.None](ctx, bus.NC, "api.acme.gateway.revoke", fleet.Name{Gateway: "certs"}); err != nil {
		t.Fatal(err)
	}
	if who := <-cut; who != "acme/certs" {
		t.Errorf("%s was cut off", who)
	}
	if !f.Revoked(ctx, "acme", "certs", short(serial(now))) {
		t.Error("its certificate still works")
	}
	if e, _, _, err := cloud.Get[cloud.EK](ctx, bus.EKs, strings.Repeat("0", 64)); err != nil || e.State != cloud.Revoked {
		t.Errorf("its TPM is %s: %v", e.State, err)
	}
}

func TestAdmissions(t *testing.T) {
	startFleet(t)
	ctx := deadline(t)
	op, other := signers["acme"]["operator"], signers["globex"]["operator"]
	key := strings.Repeat("a1", 32)
	forget(t, key)
	forget(t, "acme.new")
	hash := func(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }
	id := func(b byte) []byte { return bytes.Repeat([]byte{b}, 16) }
	approve := func(as string, by *ecdsa.PrivateKey, a message.Admission) error {
		_, err := cloud.Ask[fleet.None](ctx, bus.NC, "api."+as+".gateway.approve", fleet.Signed{Message: must(a.Sign(by))})
		return err
	}
	good := message.Admission{EKHash: hash(0xa1), Tenant: "acme", Gateway: "new", ID: id(1)}
	change := func(f func(*message.Admission)) message.Admission { a := good; f(&a); return a }
	for _, x := range []struct {
		name, as string
		by       *ecdsa.PrivateKey
		a        message.Admission
	}{
		{"by another tenant's operator", "acme", other, good},
		{"by the verifier", "acme", signers["acme"]["verifier"], good},
		{"sent as another tenant", "globex", op, good},
		{"for another tenant", "acme", other, change(func(a *message.Admission) { a.Tenant = "globex" })},
		{"for no tenant", "acme", op, change(func(a *message.Admission) { a.Tenant = "" })},
		{"for a path", "acme", op, change(func(a *message.Admission) { a.Tenant = "../acme" })},
		{"of a name that is none", "acme", op, change(func(a *message.Admission) { a.Gateway = "a.b" })},
		{"of everybody", "acme", op, change(func(a *message.Admission) { a.Gateway = "*" })},
		{"half a hash", "acme", op, change(func(a *message.Admission) { a.EKHash = hash(1)[:16] })},
		{"half an id", "acme", op, change(func(a *message.Admission) { a.ID = id(1)[:8] })},
	} {
		if err := approve(x.as, x.by, x.a); err == nil {
			t.Errorf("%s: approved", x.name)
		}
	}
	if err := approve("acme", op, good); err != nil {
		t.Fatal(err)
	}
	if err := approve("globex", other, message.Admission{EKHash: hash(0xa1), Tenant: "globex", Gateway: "new", ID: id(2)}); err == nil {
		t.Error("another tenant overwrote an approval that waits to be used")
	}
	if e, _, ok, err := cloud.Get[cloud.EK](ctx, bus.EKs, key); err != nil || !ok || e.State != cloud.Approved {
		t.Fatalf("it is %s: %v", e.State, err)
	}
	// Enrolled: the approval is used up, and another tenant cannot take the box away.
	if _, err := cloud.Change(ctx, bus.EKs, key, func(e *cloud.EK, _ bool) error { e.State = cloud.Enrolled; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := cloud.Put(ctx, bus.Gateways, "acme.new", cloud.Gateway{Tenant: "acme", Name: "new", EKHash: good.EKHash, AdmissionID: good.ID}, 0); err != nil {
		t.Fatal(err)
	}
	if err := approve("acme", op, good); err == nil {
		t.Error("an approval was used twice")
	}
	theirs := message.Admission{EKHash: hash(0xa1), Tenant: "globex", Gateway: "new", ID: id(2)}
	if err := approve("globex", other, theirs); err == nil {
		t.Error("another tenant took the box over")
	}
	if err := approve("acme", op, change(func(a *message.Admission) { a.ID = id(3) })); err != nil {
		t.Errorf("approving it again: %v", err)
	}
	if err := approve("acme", op, change(func(a *message.Admission) { a.ID, a.EKHash = id(4), hash(0xa2) })); err == nil {
		t.Error("another TPM was approved under the name of one that has streams")
	}
}

// A TPM that was one tenant's and is another's by now is not ended by revoking
// the old entry again.
func TestRevokingAnOldEntryLeavesTheTPMAlone(t *testing.T) {
	startFleet(t)
	ctx := deadline(t)
	ek := bytes.Repeat([]byte{0xb7}, 32)
	key := strings.Repeat("b7", 32)
	forget(t, key)
	forget(t, "globex.before")
	if err := cloud.Put(ctx, bus.Gateways, "globex.before", cloud.Gateway{Tenant: "globex", Name: "before", EKHash: ek, Revoked: true}, 0); err != nil {
		t.Fatal(err)
	}
	now := message.Admission{EKHash: ek, Tenant: "acme", Gateway: "after", ID: make([]byte, 16)}
	if err := cloud.Put(ctx, bus.EKs, key, cloud.EK{Hash: ek, State: cloud.Enrolled, Admission: must(now.Sign(signers["acme"]["operator"]))}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := cloud.Ask[fleet.None](ctx, bus.NC, "api.globex.gateway.revoke", fleet.Name{Gateway: "before"}); err != nil {
		t.Fatal(err)
	}
	if e, _, _, err := cloud.Get[cloud.EK](ctx, bus.EKs, key); err != nil || e.State != cloud.Enrolled {
		t.Errorf("acme's TPM is %s: %v", e.State, err)
	}
}

// A command whose refusal would quote more than a frame holds is refused, and the
// fleet goes on answering.
func TestHugeCommandStopsNothing(t *testing.T) {
	startFleet(t)
	ctx := deadline(t)
	forget(t, "acme.huge")
	if err := cloud.Put(ctx, bus.Gateways, "acme.huge", cloud.Gateway{Tenant: "acme", Name: "huge"}, 0); err != nil {
		t.Fatal(err)
	}
	c := message.Command{Audience: "acme/huge", Sequence: 1, Name: strings.Repeat("\x01", 300_000)}
	_, err := cloud.Ask[fleet.None](ctx, bus.NC, "api.acme.command.send", fleet.Signed{Message: must(c.Sign(signers["acme"]["operator"]))})
	var refused *cloud.Refused
	if !errors.As(err, &refused) || len(refused.Reason) > 2048 {
		t.Errorf("%.200v", err)
	}
	if _, err := cloud.Ask[fleet.List](ctx, bus.NC, "api.acme.gateway.ls", fleet.None{}); err != nil {
		t.Error(err)
	}
}

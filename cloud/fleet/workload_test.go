package fleet_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/internal/cose"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// runner is a gateway on which workloads may run: its verdict names a receiving
// key.
func runner(t testing.TB, name string) *gateway {
	t.Helper()
	g := enrolled(t, "acme", name)
	g.mayRun(nil)
	return g
}

func receivingKey() hpke.PrivateKey { return must(hpke.MLKEM768P256().GenerateKey()) }

// mayRun makes a verdict with a receiving key the newest, and returns the key's
// id.
func (g *gateway) mayRun(change func(*attest.Verdict)) []byte {
	g.t.Helper()
	pub := receivingKey().PublicKey()
	v := g.verdict()
	v.Keys = map[string]attest.Key{attest.PurposeReceive: cose.MarshalHPKEKey(pub)}
	if change != nil {
		change(&v)
	}
	g.setVerdict(v)
	return cose.HPKEKeyID(pub)
}

// asking is one question of a gateway on its way.
type asking struct {
	t   testing.TB
	id  []byte
	sub *nats.Subscription
}

// begin asks; any number may be under way.
func (g *gateway) begin(kind string, body any) asking {
	g.t.Helper()
	a := asking{t: g.t, id: make([]byte, message.AskID), sub: must(bus.NC.SubscribeSync("ek1." + g.tenant + "." + g.name + ".down.answer"))}
	rand.Read(a.id)
	g.publish("ask", message.Encode(message.Ask{ID: a.id, Kind: kind, Body: cose.MustMarshal(body)}))
	return a
}

// answer waits for it.
func (a asking) answer() message.Answer {
	a.t.Helper()
	defer func() { _ = a.sub.Unsubscribe() }()
	for {
		m, err := a.sub.NextMsgWithContext(deadline(a.t))
		if err != nil {
			a.t.Fatalf("no answer came: %v", err)
		}
		got, err := message.Decode[message.Answer](m.Data)
		if err != nil {
			a.t.Fatal(err)
		}
		if bytes.Equal(got.ID, a.id) {
			return got
		}
	}
}

// ask asks and decodes the answer.
func ask[Rep any](g *gateway, kind string, body any) (rep Rep, reason string) {
	g.t.Helper()
	a := g.begin(kind, body).answer()
	if a.Error != "" {
		return rep, a.Error
	}
	if err := cose.Unmarshal(a.Body, &rep); err != nil {
		g.t.Fatal(err)
	}
	return rep, ""
}

// wantRefusal asks what must be refused for a reason.
func wantRefusal[Rep any](t *testing.T, g *gateway, name, kind string, body any, want string) {
	t.Helper()
	if _, reason := ask[Rep](g, kind, body); !strings.Contains(reason, want) || reason == "" {
		t.Errorf("%s: %q, want %q", name, reason, want)
	}
}

// api asks as an operator of acme.
func api[Rep any](t testing.TB, what string, req any) (Rep, error) {
	t.Helper()
	return cloud.Ask[Rep](deadline(t), bus.NC, "api.acme."+what, req)
}

var unique atomic.Uint64

// instanceName is a name that no test has used.
func instanceName() string { return fmt.Sprintf("i%d-%d", unique.Add(1), time.Now().UnixNano()) }

// bundle is a signed manifest whose content is stored.
func bundle(t testing.TB, change func(*workload.Manifest)) []byte {
	t.Helper()
	content := make([]byte, 200)
	rand.Read(content)
	list := must(message.BlobList(content))
	id := message.BlobID(list)
	for i, data := range [][]byte{list, content} {
		if _, err := api[message.Have](t, "blob.put", message.PutBlob{ID: id, Block: i - 1, Data: data}); err != nil {
			t.Fatal(err)
		}
	}
	m := workload.Manifest{
		Name: "watch", Version: "1", Shape: workload.Filter, Module: make([]byte, 32), ModuleSize: 100,
		Input:  workload.Input{Format: workload.JSON, Streams: []string{"temp"}, Batch: 10, Wait: 100},
		Output: workload.JSON, Limits: workload.Limits{Memory: 1 << 20, CPU: 100, Output: 1 << 10},
		Assurance: "tpm", Nodes: []string{"*"}, Moves: 1000, Content: id, ContentSize: 200, Commit: 100,
	}
	if change != nil {
		change(&m)
	}
	return must(m.Sign(signers["acme"]["operator"]))
}

// deployment is the command that deploys.
func (g *gateway) deployment(sequence uint64, instance string, manifest []byte) message.Command {
	readers.Store(instance, g.name)
	c := g.command(sequence, message.WorkloadDeploy)
	c.Args = map[string]string{"instance": instance}
	c.Body = cose.MustMarshal(workload.Deploy{
		Instance: instance, Manifest: manifest, Key: []byte("sealed"), Inputs: []workload.Source{{Gateway: g.name, Stream: "temp"}},
	})
	return c
}

// deploy has the instance deployed on g, and its keep accept it.
func (g *gateway) deploy(instance string, manifest []byte) {
	g.t.Helper()
	next := must(api[fleet.NextSequence](g.t, "command.next", fleet.Name{Gateway: g.name})).Sequence
	msg, err := order(g.t, "acme", signers["acme"]["operator"], g.deployment(next, instance, manifest))
	if err != nil {
		g.t.Fatal(err)
	}
	g.publish("result", must(g.result(msg, next, true).Sign(g.key)))
	eventually(g.t, "the result is taken", func() bool { return len(g.queue().Pending) == 0 })
}

func ledger(t testing.TB, instance string) fleet.Record {
	t.Helper()
	s, err := api[fleet.Signed](t, "data.ledger", fleet.Instance{Instance: instance})
	if err != nil {
		t.Fatal(err)
	}
	return must(fleet.VerifyRecord(&signers["acme"]["fleet"].PublicKey, s.Message))
}

// claimed puts a claim to the ledger.
func (g *gateway) claimed(claim []byte) (workload.Entry, string) {
	g.t.Helper()
	s, reason := ask[message.Signed](g, message.AskLedger, message.Signed{Message: claim})
	if reason != "" {
		return workload.Entry{}, reason
	}
	e := must(workload.VerifyEntry(&signers["acme"]["fleet"].PublicKey, s.Message))
	if !e.Answers(claim) {
		g.t.Error("the answer is to another claim")
	}
	e.Nonce = nil
	return e, ""
}

func (g *gateway) claim(from uint64, e workload.Entry) []byte { return signClaim(g.key, from, e) }

// readers are the gateways whose stream "temp" instances read: those where they were
// deployed.
var readers sync.Map

func inputsOf(instance string) []byte {
	g, _ := readers.Load(instance)
	name, _ := g.(string)
	return workload.InputsHash([]workload.Source{{Gateway: name, Stream: "temp"}})
}

func signClaim(key *ecdsa.PrivateKey, from uint64, e workload.Entry) []byte {
	e.Epoch, e.Tenant = from+1, "acme"
	if e.Inputs == nil {
		e.Inputs = inputsOf(e.Instance)
	}
	return must(workload.Claim{Instance: e.Instance, From: from, Entry: e}.Sign(key))
}

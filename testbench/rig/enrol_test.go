package rig

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/agent"
	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/tee/tpm"
)

// pending returns what the list says of a TPM that waits for approval.
func (b *bench) pending(ekHash []byte) (e cloud.EK, ok bool) {
	b.t.Helper()
	list, err := b.op.Gateways(b.ctx)
	b.must(err)
	for _, p := range list.Pending {
		if bytes.Equal(p.Hash, ekHash) {
			return p, true
		}
	}
	return e, false
}

// booting is a connection of a box without a certificate.
type booting struct {
	b     *bench
	conn  *mqtt.Conn
	topic mqtt.Topic
	items chan message.Item
}

func (b *bench) boot(ekHash []byte) *booting {
	b.t.Helper()
	pool, err := cloud.LoadPool(b.path("cloud/keys/ca.pem"))
	b.must(err)
	hash := hex.EncodeToString(ekHash)
	box := &booting{b: b, topic: mqtt.Topic{Tenant: mqtt.Boot, Gateway: hash}, items: make(chan message.Item, 16)}
	box.conn, err = mqtt.Dial(b.ctx, mqtt.Options{
		URL: b.MQTT, TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13},
		ClientID: "boot_" + rand.Text(), Username: hash,
		Subscribe: []string{mqtt.Topic{Tenant: mqtt.Boot, Gateway: hash, Kind: "item"}.String()},
		Receive: func(m mqtt.Message) {
			if item, err := message.PeekItem(m.Payload); err == nil {
				box.items <- item
			}
		},
	})
	b.must(err)
	b.t.Cleanup(box.conn.Close)
	return box
}

func (x *booting) publish(kind string, m any) {
	x.b.t.Helper()
	t := x.topic
	t.Up, t.Kind = true, kind
	x.b.must(x.conn.Flush(x.b.ctx, t.String(), message.Encode(m)))
}

func (x *booting) item() message.Item {
	x.b.t.Helper()
	select {
	case i := <-x.items:
		return i
	case <-x.b.ctx.Done():
		x.b.t.Fatal("the cloud does not answer")
		return message.Item{}
	}
}

// countedAs waits until the cloud has counted something, by the beginning of its
// reason, as an operator sees it at any gateway.
func (b *bench) countedAs(gateway, what string) {
	b.t.Helper()
	b.until(fmt.Sprintf("the cloud to count %q", what), func() error {
		d, err := b.op.Gateway(b.ctx, gateway)
		if err != nil {
			return err
		}
		for k := range d.Counts {
			if strings.HasPrefix(k, what) {
				return nil
			}
		}
		return fmt.Errorf("it counts %v", d.Counts)
	})
}

// TestStolenEnrolment: who has another TPM's EK and certificate, which are
// public, and an attestation key of his own gets nothing, and takes nothing away.
func TestStolenEnrolment(t *testing.T) {
	b := newBench(t, time.Minute, Options{})
	witness, victim, thief := b.gateway("witness", "machine"), b.gateway("gw1", "machine"), b.gateway("thief", "machine")
	b.startCloud()
	b.enrol(witness)
	dev, err := tpm.Open(victim.TPM.Socket())
	b.must(err)
	ek, err := dev.EK()
	b.must(err)
	b.must(dev.Close())
	ekHash, err := tpm.EKHash(ek.Public)
	b.must(err)
	b.must(b.op.Approve(b.ctx, ekHash, "gw1"))

	if dev, err = tpm.Open(thief.TPM.Socket()); err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	blob, err := dev.NewAK([]byte("thief"))
	b.must(err)
	ak, err := dev.LoadAK(blob, []byte("thief"))
	b.must(err)
	defer ak.Close()
	box := b.boot(ekHash)
	nonce := make([]byte, message.NonceSize)
	rand.Read(nonce) // never fails
	box.publish("enrol", message.Enrol{EK: ek.Public, EKCert: ek.Cert, AK: ak.Public(), Nonce: nonce})
	item := box.item()
	if item.Credential == nil || item.Challenge == nil {
		t.Fatalf("the cloud answers %+v", item)
	}
	if secret, err := ak.Activate(item.Credential.Blob, item.Credential.Secret); err == nil {
		t.Fatalf("another TPM opened the credential: %x", secret)
	}
	evidence := b.forge(ak, item.Challenge, ekHash)
	for _, secret := range [][]byte{nil, make([]byte, 32), item.Credential.Secret[:32]} {
		box.publish("activate", message.Activate{
			EK: ek.Public, EKCert: ek.Cert, AK: ak.Public(), Enrol: nonce, Evidence: evidence,
			Proof: message.Proof(secret, evidence), Nonce: nonce,
		})
	}
	b.countedAs("witness", "refused: the credential was not opened")

	// Nor with his own EK under the other's topic, or a certificate that is not the
	// EK's.
	own, err := dev.EK()
	b.must(err)
	box.publish("enrol", message.Enrol{EK: own.Public, EKCert: own.Cert, AK: ak.Public(), Nonce: nonce})
	b.logged("the EK is not the one that the topic names")
	box.publish("enrol", message.Enrol{EK: ek.Public, EKCert: own.Cert, AK: ak.Public(), Nonce: nonce})
	b.logged("the EK certificate is for another key")
	if e, ok := b.listed("gw1"); ok {
		t.Errorf("the thief was enrolled: %+v", e)
	}
	if len(box.items) != 0 {
		t.Errorf("the thief was answered: %+v", <-box.items)
	}

	b.must(victim.Start(b.ctx)) // the approval is still the victim's
	b.affirmed(victim)
	b.status(victim, "a connection", func(s agent.Status) bool { return s.Connected })
}

// logged waits until the cloud has written a text to its log: what it refuses from
// a box that belongs to no tenant is in no tenant's counts.
func (b *bench) logged(text string) {
	b.until("the cloud to log "+text, func() error {
		logs, err := filepath.Glob(filepath.Join(b.Dir, "logs", "cloud.*"))
		b.must(err)
		for _, path := range logs {
			raw, err := os.ReadFile(path)
			b.must(err)
			if strings.Contains(string(raw), text) {
				return nil
			}
		}
		return errors.New("it has not")
	})
}

// forge makes evidence with an attestation key, for a challenge.
func (b *bench) forge(ak *tpm.AK, challenge, ekHash []byte) []byte {
	b.t.Helper()
	ch, err := attest.PeekChallenge(challenge)
	b.must(err)
	key := b.key("owner/owner.key") // any P-256 key
	roots, err := hex.DecodeString(b.Roots)
	b.must(err)
	c := attest.Claims{
		Nonce: ch.Nonce, Challenge: challenge, UEID: append([]byte{1}, ekHash...), Profile: attest.Profile, Roots: roots,
		Cnf: attest.Confirmation{Key: cose.MarshalKey(key.Public().(*ecdsa.PublicKey))},
	}
	binding, err := c.Binding()
	b.must(err)
	sub := attest.TPM{AK: ak.Public()}
	sub.Quote, sub.PCRs, err = ak.Quote(binding, ch.PCRs)
	b.must(err)
	c.Submods = &attest.Submods{TPM: sub}
	msg, err := cose.Sign1(key, attest.TypEvidence, cose.MustMarshal(c))
	b.must(err)
	return msg
}

// TestSecondKey: the same TPM with a new attestation key, because its state was
// lost, has to be approved again.
func TestSecondKey(t *testing.T) {
	b, g := up(t, time.Minute, Options{}, "machine")
	b.send(g, 1, 100)
	r := b.read(g, "machine")
	r.upTo(100)
	before, _ := b.listed("gw1")
	ekHash := b.keep(g).EKHash
	if p, ok := b.pending(ekHash); ok {
		t.Errorf("an enrolled TPM waits for approval: %+v", p)
	}
	b.halt(g)
	b.must(os.Remove(g.Path("agent/state.cbor")))
	b.run(g)
	b.status(g, "a keep without state", func(s agent.Status) bool { return strings.Contains(s.Reason, "its state is missing") })

	b.halt(g)
	b.must(g.StartKeep(b.ctx, "--reset-identity"))
	b.must(g.StartAgent(b.ctx))
	b.status(g, "the reason", func(s agent.Status) bool {
		return !s.Connected && s.Phase == tee.PhaseNew && strings.Contains(s.Reason, "enrolling again needs approval again")
	})
	if p, ok := b.pending(ekHash); !ok || !strings.Contains(p.Reason, "another attestation key") {
		t.Errorf("the second key is listed as %+v", p)
	}
	if e, _ := b.listed("gw1"); !bytes.Equal(e.AKName, before.AKName) {
		t.Errorf("the second key has replaced the first: %+v", e)
	}
	b.must(b.op.Approve(b.ctx, ekHash, "gw1"))
	b.status(g, "a connection", func(s agent.Status) bool { return s.Connected && s.Phase == tee.PhaseEnrolled })
	after, _ := b.listed("gw1")
	if bytes.Equal(after.AKName, before.AKName) || bytes.Equal(after.AdmissionID, before.AdmissionID) {
		t.Errorf("enrolled again it is %+v, before it was %+v", after, before)
	}
	if _, ok := b.pending(ekHash); ok {
		t.Error("it still waits for approval")
	}
	b.send(g, 1, 50) // it knows nothing of what was
	for len(r.got) < 150 {
		got, err := r.reader.Next(b.ctx, time.Second)
		b.must(err)
		for _, o := range got {
			r.got = append(r.got, o.Readings...)
		}
	}
	r.equal(append(counted(1, 100), counted(1, 50)...))
	b.findings(g, map[string]int{"rollback": 1})
}

// TestOtherRoots: a keep that is configured for another cloud refuses this one.
func TestOtherRoots(t *testing.T) {
	b := newBench(t, time.Minute, Options{})
	g := b.gateway("gw1", "machine")
	b.startCloud()
	other := sha256.Sum256([]byte("another cloud"))
	g.Roots = hex.EncodeToString(other[:])
	b.must(g.Start(b.ctx))
	b.must(g.Approve(b.ctx, b.op))
	b.status(g, "the reason", func(s agent.Status) bool {
		return !s.Connected && s.Phase == tee.PhaseNew && strings.Contains(s.Reason, "it is not our cloud") &&
			strings.Contains(s.Reason, g.Roots[:16]) && strings.Contains(s.Reason, b.Roots[:16])
	})
	if e, ok := b.listed("gw1"); ok {
		t.Errorf("it was enrolled: %+v", e)
	}
	g.Roots = b.Roots
	b.halt(g)
	b.run(g)
	b.affirmed(g)
	b.status(g, "a connection", func(s agent.Status) bool { return s.Connected })

	// And once enrolled it does not change sides.
	g.Roots = hex.EncodeToString(other[:])
	b.halt(g)
	b.run(g)
	b.status(g, "the reason", func(s agent.Status) bool {
		return !s.Connected && strings.Contains(s.Reason, "the configured trust roots are not those this gateway enrolled under")
	})
}

// TestApprovalOnce: an operator's signed approval is good for one enrolment.
func TestApprovalOnce(t *testing.T) {
	b := newBench(t, time.Minute, Options{})
	g := b.gateway("gw1", "machine")
	b.startCloud()
	b.must(g.Start(b.ctx))
	ekHash := b.keep(g).EKHash
	nc := b.raw("operator")
	approve := func(msg []byte) error {
		_, err := ask[fleet.None](b.ctx, nc, "gateway.approve", fleet.Signed{Message: msg})
		return err
	}
	admission := func(signer, tenant string) []byte {
		t.Helper()
		id := make([]byte, 16)
		rand.Read(id) // never fails
		msg, err := message.Admission{EKHash: ekHash, Tenant: tenant, Gateway: "gw1", ID: id}.Sign(b.key(signer))
		b.must(err)
		return msg
	}
	for what, msg := range map[string][]byte{
		"signed by the data owner": admission("owner/owner.key", Tenant),
		"signed by the fleet":      admission("keys/fleet.key", Tenant),
		"of another tenant":        admission("operator/operator.key", "initech"),
		"garbage":                  []byte("garbage"),
	} {
		if err := approve(msg); err == nil {
			t.Errorf("an approval %s was taken", what)
		}
	}
	first := admission("operator/operator.key", Tenant)
	b.must(approve(first))
	b.status(g, "a connection", func(s agent.Status) bool { return s.Connected })
	again := func(what string) {
		t.Helper()
		var no *cloud.Refused
		if err := approve(first); !errors.As(err, &no) || !strings.Contains(no.Reason, "used before") {
			t.Errorf("the approval was used before, and %s: %v", what, err)
		}
	}
	again("the gateway is enrolled")
	b.must(b.op.Revoke(b.ctx, "gw1"))
	again("the gateway is revoked")
	second := admission("operator/operator.key", Tenant)
	b.must(approve(second))
	b.until("the second enrolment", func() error {
		if e, _ := b.listed("gw1"); e.Revoked {
			return fmt.Errorf("it is %+v", e)
		}
		return nil
	})
	again("another one since")
}

// TestRevoke: a revoked gateway is cut off at once, and its data refused.
func TestRevoke(t *testing.T) {
	b, g := up(t, time.Minute, Options{}, "machine")
	b.send(g, 1, 100)
	r := b.read(g, "machine")
	r.upTo(100)
	ekHash := b.keep(g).EKHash
	b.status(g, "a connection", func(s agent.Status) bool { return s.Connected && s.SpoolChunks == 0 })
	b.must(b.op.Revoke(b.ctx, "gw1"))
	b.status(g, "no connection", func(s agent.Status) bool { return !s.Connected && s.Reason != "" })
	if e, ok := b.listed("gw1"); !ok || !e.Revoked {
		t.Errorf("it is listed as %+v", e)
	}
	b.send(g, 101, 200)
	b.status(g, "the reason", func(s agent.Status) bool {
		return !s.Connected && s.SpoolChunks > 0 && strings.Contains(s.Reason, "revoked")
	})
	if p, ok := b.pending(ekHash); !ok || p.State != cloud.Revoked || !strings.Contains(p.Reason, "revoked") {
		t.Errorf("it waits as %+v", p)
	}
	if n := len(b.stored(g)); n == 0 || len(r.got) != 100 {
		t.Errorf("%d chunks", n)
	}
	if _, _, err := b.op.Attest(b.ctx, "gw1"); err == nil {
		t.Error("a revoked gateway was asked to attest")
	}
	if _, err := b.op.Command(b.ctx, "gw1", message.StatusCommand, nil, time.Time{}); err == nil {
		t.Error("a command for a revoked gateway was taken")
	}
	if n, err := r.next(0); n != 0 || err != nil {
		t.Errorf("data of a revoked gateway was accepted (%v)", err)
	}

	b.must(b.op.Approve(b.ctx, ekHash, "gw1")) // pardoned: nothing was lost meanwhile
	r.upTo(200)
	r.all(g)
	r.equal(counted(1, 200))
	b.findings(g, nil)
	if e, _ := b.listed("gw1"); e.Revoked {
		t.Error("it is still listed as revoked")
	}
}

package keep

import (
	"bytes"
	"crypto/ecdsa"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// unchanged fails when f changed what must survive: the state, a slot, the phase.
func (g *gateway) unchanged(name string, f func()) {
	g.t.Helper()
	before, slots, phase, st := g.state, g.slots(), g.keep.phase, cose.MustMarshal(g.keep.st)
	f()
	if g.keep.pending != nil || !bytes.Equal(before, g.state) || slots != g.slots() || phase != g.keep.phase || !bytes.Equal(st, cose.MustMarshal(g.keep.st)) {
		g.t.Errorf("%s: something changed", name)
	}
}

func TestItems(t *testing.T) {
	g, _ := enrolled(t)
	used := g.nonce()
	must(g.deliver(message.Item{Nonce: used, Subject: subject}))(t)
	expired := g.nonce()
	a := g.keep.nonces[string(expired)]
	a.at = a.at.Add(-nonceLife - time.Second)
	g.keep.nonces[string(expired)] = a
	displaced := g.nonce()
	for range maxNonces {
		g.nonce()
	}
	good := func() message.Item { return message.Item{Nonce: g.nonce(), Subject: subject} }
	sign := func(key *ecdsa.PrivateKey, typ string, edit func(*message.Item)) []byte {
		item := good()
		item.Time = g.cloud.now
		if edit != nil {
			edit(&item)
		}
		return must(cose.Sign1(key, typ, cose.MustMarshal(item)))(t)
	}
	nonce := func(n []byte) []byte {
		return sign(g.cloud.fleet, message.TypItem, func(i *message.Item) { i.Nonce = n })
	}
	const noQuestion = "answers no question of this keep"
	for name, c := range map[string]struct {
		msg  []byte
		want string
	}{
		"unknown nonce":       {nonce(random(32)), noQuestion},
		"no nonce":            {nonce(nil), noQuestion},
		"used nonce":          {nonce(used), noQuestion},
		"expired nonce":       {nonce(expired), noQuestion},
		"displaced nonce":     {nonce(displaced), noQuestion},
		"another subject":     {sign(g.cloud.fleet, message.TypItem, func(i *message.Item) { i.Subject = "acme/gw2" }), `the delivery is for "acme/gw2"`},
		"no subject":          {sign(g.cloud.fleet, message.TypItem, func(i *message.Item) { i.Subject = "" }), "the delivery is for"},
		"signed by verifier":  {sign(g.cloud.verifier, message.TypItem, nil), "Item"},
		"signed by a command": {sign(g.cloud.fleet, message.TypCommand, nil), "Item"},
		"another's challenge": {sign(g.cloud.fleet, message.TypItem, func(i *message.Item) { i.Challenge = g.cloud.challenge("gw2") }), "the challenge is for acme/gw2"},
		"not a challenge":     {sign(g.cloud.fleet, message.TypItem, func(i *message.Item) { i.Challenge = []byte("c") }), "challenge"},
		"not a verdict":       {sign(g.cloud.fleet, message.TypItem, func(i *message.Item) { i.Verdict = []byte("v") }), "verdict"},
		"a byte more":         {append(sign(g.cloud.fleet, message.TypItem, nil), 0), "Item"},
		"nothing":             {nil, "Item"},
	} {
		g.unchanged(name, func() {
			_, err := tee.Deliver{Item: c.msg}.Do(g.ctx(), g)
			wantRefusal(t, name, err, c.want)
		})
	}
	// What was refused for its signature has not used the nonce up.
	item := good()
	item.Time = g.cloud.now
	forged := must(cose.Sign1(g.cloud.owner, message.TypItem, cose.MustMarshal(item)))(t)
	_, err := tee.Deliver{Item: forged}.Do(g.ctx(), g)
	wantRefusal(t, "forged", err, "Item")
	msg := g.cloud.sign(item)
	if _, err := (tee.Deliver{Item: msg}).Do(g.ctx(), g); err != nil {
		t.Errorf("after a forgery: %v", err)
	}
	_, err = tee.Deliver{Item: msg}.Do(g.ctx(), g)
	wantRefusal(t, "the same delivery again", err, noQuestion)
	// A new keep knows no question of the one before.
	item = good()
	g.up()
	_, err = g.deliver(item)
	wantRefusal(t, "a delivery to the keep before", err, noQuestion)
	// A verdict and a certificate come through.
	v := g.cloud.verdict(g.attest(), subject, nil)
	out := must(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Verdict: v, Certificate: [][]byte{{1}}}))(t)
	if !bytes.Equal(out.Verdict, v) || len(out.Certificate) != 1 {
		t.Errorf("%+v", out)
	}
}

// What does not come from the configured cloud enrols nobody.
func TestEnrolRefusals(t *testing.T) {
	g := newGateway(t)
	g.up()
	other := newCloud(t)
	cred := func(edit func(*message.Item)) message.Item {
		item := g.credential(g.asks(), random(32))
		edit(&item)
		return item
	}
	deliver := func(name string, c *cloud, item message.Item, want string) {
		t.Helper()
		g.unchanged(name, func() {
			_, err := tee.Deliver{Item: c.sign(item)}.Do(g.ctx(), g)
			wantRefusal(t, name, err, want)
		})
	}
	deliver("another cloud", other, cred(func(i *message.Item) { i.Roots = other.roots }), "it is not our cloud")
	deliver("its keys under our roots", other, cred(func(*message.Item) {}), "Item")
	deliver("roots with a byte more", g.cloud, cred(func(i *message.Item) { i.Roots = append(bytes.Clone(i.Roots), 0) }), "trust roots are")
	deliver("no roots", g.cloud, cred(func(i *message.Item) { i.Roots = nil }), "the cloud says")
	deliver("a question never asked", g.cloud, cred(func(i *message.Item) { i.Nonce = random(32) }), "answers no question")
	deliver("a credential for another AK", g.cloud, cred(func(i *message.Item) { i.Credential.Blob = bytes.Clone(i.Credential.Blob); i.Credential.Blob[9] ^= 1 }), "")
	deliver("no challenge", g.cloud, cred(func(i *message.Item) { i.Challenge = nil }), "challenge")
	deliver("an unsigned challenge", g.cloud, cred(func(i *message.Item) { i.Challenge = []byte{1} }), "challenge")
	deliver("nothing", g.cloud, cred(func(i *message.Item) { i.Credential = nil; i.Reason = "no" }), "the cloud says: no")

	admit := func(edit func(*message.Item, attest.Genuine)) message.Item {
		a, genuine := g.activates()
		item := g.admission(a, genuine)
		edit(&item, genuine)
		return item
	}
	verdict := func(c *cloud, edit func(*attest.Verdict)) func(*message.Item, attest.Genuine) {
		return func(i *message.Item, genuine attest.Genuine) { i.Verdict = c.verdict(genuine, subject, edit) }
	}
	deliver("a verdict of another verifier", g.cloud, admit(verdict(other, nil)), "verdict")
	deliver("a verdict about another keep", g.cloud, admit(verdict(g.cloud, func(v *attest.Verdict) {
		v.Cnf.Key = cose.MarshalKey(&other.owner.PublicKey)
	})), "about another keep")
	for _, name := range []string{"acme/", "acme/a/b", "other/gw1", "acme", "acme/a_b", "/gw1"} {
		deliver("named "+name, g.cloud, admit(func(i *message.Item, genuine attest.Genuine) {
			i.Subject, i.Verdict = name, g.cloud.verdict(genuine, name, nil)
		}), "under the name")
	}
	// A verdict that does not affirm is passed on, and nothing else happens.
	for name, edit := range map[string]func(*message.Item, attest.Genuine){
		"warning": verdict(g.cloud, func(v *attest.Verdict) {
			vector := attest.Vector{Configuration: 36}
			v.Submods = map[string]attest.Appraisal{attest.Submodule: {Status: vector.Status(), Vector: vector}}
		}),
		"expired":         verdict(g.cloud, func(v *attest.Verdict) { v.Expires = g.cloud.now }),
		"other audience":  verdict(g.cloud, func(v *attest.Verdict) { v.Audience = "other" }),
		"another subject": verdict(g.cloud, func(v *attest.Verdict) { v.Subject = "acme/gw2" }),
		"no certificate":  func(i *message.Item, _ attest.Genuine) { i.Certificate = nil },
	} {
		item := admit(edit)
		g.unchanged(name, func() {
			out := must(g.deliver(item))(t)
			if !bytes.Equal(out.Verdict, item.Verdict) || len(out.Commit) != 0 || len(out.Certificate) != 0 || out.Pull {
				t.Errorf("%s: %+v", name, out)
			}
		})
	}
	g.enrol()
}

// A gateway without a working certificate attests over the boot topics, under its
// name and no other.
func TestBootRoundWhenEnrolled(t *testing.T) {
	g, first := enrolled(t)
	a, genuine := g.activates()
	if !genuine.TLSKey.Equal(first.TLSKey) {
		t.Error("another key")
	}
	item := g.admission(a, genuine)
	out := must(g.deliver(item))(t)
	if len(out.Commit) != 0 || len(out.Certificate) != 1 || !out.Pull {
		t.Errorf("%+v", out)
	}
	a, genuine = g.activates()
	item = g.admission(a, genuine)
	item.Subject, item.Verdict = "acme/gw2", g.cloud.verdict(genuine, "acme/gw2", nil)
	g.unchanged("as another", func() {
		_, err := g.deliver(item)
		wantRefusal(t, "as another", err, `the delivery is for "acme/gw2"`)
	})
	// An answer to a pull is none to an enrolment.
	item = g.credential(g.asks(), random(32))
	item.Nonce = g.nonce()
	out = must(g.deliver(item))(t)
	if len(out.Publish) != 1 || out.Publish[0].Kind != "evidence" { // only its challenge counts
		t.Errorf("%+v", out)
	}
}

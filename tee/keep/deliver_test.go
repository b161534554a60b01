package keep

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
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

func (c *cloud) command(cmd message.Command) []byte {
	c.t.Helper()
	if cmd.Audience == "" {
		cmd.Audience = subject
	}
	return must(cmd.Sign(c.operator))(c.t)
}

// result reads the one result in an outcome.
func (g *gateway) result(out tee.Outcome, command []byte) message.Result {
	g.t.Helper()
	if len(out.Publish) == 0 || out.Publish[0].Kind != "result" {
		g.t.Fatalf("%+v", out)
	}
	r := must(message.VerifyResult(&g.keep.epochKey.PublicKey, out.Publish[0].Data))(g.t)
	if sum := sha256.Sum256(command); r.Subject != subject || !bytes.Equal(r.Command, sum[:]) {
		g.t.Errorf("%+v", r)
	}
	return r
}

func TestCommands(t *testing.T) {
	g, _ := enrolled(t)
	do := func(cmd message.Command) message.Result {
		t.Helper()
		msg := g.cloud.command(cmd)
		return g.result(must(g.send(msg))(t), msg)
	}
	interval := g.cloud.command(message.Command{Sequence: 5, Name: message.SetInterval, Args: map[string]string{"seconds": "7"}, Expires: g.cloud.now + 1})
	r := g.result(must(g.send(interval))(t), interval)
	if !r.Done || r.Sequence != 5 || r.Output["seconds"] != "7" {
		t.Errorf("%+v", r)
	}
	if s := g.status(); s.Interval != 7 || s.Command != 5 {
		t.Errorf("%+v", s)
	}
	g.unchanged("the same command again", func() {
		for range 2 {
			again := g.result(must(g.send(interval))(t), interval)
			if !again.Done || !maps.Equal(again.Output, r.Output) || again.Sequence != r.Sequence {
				t.Errorf("%+v, was %+v", again, r)
			}
		}
	})
	g.up() // also by the next keep, with its own key
	if again := g.result(must(g.send(interval))(t), interval); !again.Done || again.Output["seconds"] != "7" || g.status().Interval != 7 {
		t.Errorf("%+v", again)
	}
	if g.attest().Claims.Command != 5 {
		t.Error("the evidence does not show the command")
	}

	other := newKey(t)
	cmd := func(edit func(*message.Command)) []byte {
		c := message.Command{Sequence: 6, Name: message.SetInterval, Args: map[string]string{"seconds": "9"}}
		edit(&c)
		return g.cloud.command(c)
	}
	for name, c := range map[string]struct {
		msg  []byte
		seq  uint64
		want string
	}{
		"older":            {cmd(func(c *message.Command) { c.Sequence = 4 }), 4, "sequence 4 was used"},
		"same sequence":    {cmd(func(c *message.Command) { c.Sequence = 5 }), 5, "sequence 5 was used"},
		"sequence 0":       {cmd(func(c *message.Command) { c.Sequence = 0 }), 0, "was used"},
		"expired":          {cmd(func(c *message.Command) { c.Expires = g.cloud.now }), 6, "expired"},
		"another audience": {cmd(func(c *message.Command) { c.Audience = "acme/gw2" }), 6, "is for acme/gw2"},
		"unknown":          {cmd(func(c *message.Command) { c.Name, c.Args = "reboot", nil }), 6, "unknown command"},
		"no argument":      {cmd(func(c *message.Command) { c.Args = nil }), 6, "needs one argument"},
		"argument of 0":    {cmd(func(c *message.Command) { c.Args["seconds"] = "0" }), 6, "needs one argument"},
		"two arguments":    {cmd(func(c *message.Command) { c.Args["x"] = "1" }), 6, "needs one argument"},
		"needless":         {cmd(func(c *message.Command) { c.Name = message.AttestNow }), 6, "takes no arguments"},
		"signed by fleet":  {must(message.Command{Audience: subject, Sequence: 6, Name: message.AttestNow}.Sign(g.cloud.fleet))(t), 0, "Command"},
		"signed by nobody": {must(message.Command{Audience: subject, Sequence: 6, Name: message.AttestNow}.Sign(other))(t), 0, "Command"},
		"an item":          {g.cloud.sign(message.Item{}), 0, "Command"},
		"no CBOR":          {[]byte("attest-now"), 0, "Command"},
	} {
		g.unchanged(name, func() {
			r := g.result(must(g.send(c.msg))(t), c.msg)
			if r.Done || r.Sequence != c.seq || !strings.Contains(r.Reason, c.want) || r.Output != nil {
				t.Errorf("%s: %+v", name, r)
			}
		})
	}
	// None of that has used the sequence.
	if r := do(message.Command{Sequence: 6, Name: message.StatusCommand}); !r.Done || r.Output["interval"] != "7" || r.Output["source.a"] != "fresh, 0 readings, 0 rejected" {
		t.Errorf("%+v", r)
	}
	attestNow := g.cloud.command(message.Command{Sequence: 7, Name: message.AttestNow})
	out := must(g.settle(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Command: attestNow, Challenge: g.cloud.challenge(gw)})))(t)
	if g.result(out, attestNow); len(out.Publish) != 2 || g.cloud.verify(out.Publish[1].Data).Claims.Command != 7 {
		t.Errorf("attest-now: %+v", out)
	}

	// While a step waits for its Commit there is no other.
	first := g.cloud.command(message.Command{Sequence: 8, Name: message.SetInterval, Args: map[string]string{"seconds": "8"}})
	waits := must(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Command: first}))(t)
	_, err := g.send(g.cloud.command(message.Command{Sequence: 9, Name: message.StatusCommand}))
	wantRefusal(t, "a second step", err, "waits for its Commit")
	_, err = tee.Commit{State: random(32)}.Do(g.ctx(), g)
	wantRefusal(t, "a Commit of something else", err, "no step waits for this state")
	if g.status().Interval != 7 {
		t.Error("it acted before its Commit")
	}
	if r := g.result(must(g.settle(waits, nil))(t), first); !r.Done || g.status().Interval != 8 {
		t.Errorf("%+v", r)
	}
	_, err = g.commit()
	wantRefusal(t, "the Commit again", err, "no step waits for this state")
}

func TestRotateStreamKeys(t *testing.T) {
	g, genuine := enrolled(t)
	g.read(1)
	last := g.read(1)
	s := g.keep.sealer
	line(t, &ingestConn{s: s, src: s.sources[1]}, 0, "m v=2i 2") // waits to be sealed
	msg := g.cloud.command(message.Command{Sequence: 1, Name: message.RotateStreamKeys})
	old := sealing.Epoch(genuine.Claims.Epoch)
	r := g.result(must(g.send(msg))(t), msg)
	now := g.status().Epoch
	if !r.Done || r.Output["epoch"] != now || now == old.String() {
		t.Errorf("%+v, epoch %s", r, now)
	}
	g.read(1)
	var a tee.Chunk // the newest of the old epoch
	for _, c := range g.chunks {
		if c.Stream == "a" && sealing.Epoch(c.Epoch) == old {
			a = c
		}
	}
	epoch := sealing.Epoch(g.attest().Claims.Epoch)
	if a.Seq != last.Seq+1 || epoch.String() != now {
		t.Errorf("the old epoch ends with %d, %d was taken before; epoch %s", a.Seq, last.Seq, epoch)
	}
	pos := g.opening(epoch, "a")
	if b := pos.First.Before; b == nil || b.Epoch != old || b.Count != a.Seq+1 || !bytes.Equal(b.Head, a.Head) {
		t.Errorf("%+v", b)
	}
	var keys [][]byte
	for _, c := range g.chunks {
		chunk, _, err := sealing.ParseChunk(c.Data)
		if err != nil {
			t.Fatal(err)
		}
		if c.Stream != "a" || c.Seq > 0 {
			continue
		}
		_, key, err := sealing.OpenStreamKey(genuine.EpochKey, sealing.TypStreamKey, chunk.StreamKey, g.cloud.data)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	if len(keys) != 2 || bytes.Equal(keys[0], keys[1]) {
		t.Error("the stream key is the old one")
	}
	if again := g.attest(); !again.EpochKey.Equal(genuine.EpochKey) || len(again.Claims.Prior) != 0 {
		t.Error("rotation changes stream keys, not the epoch key")
	}
}

func clientText(n int) []byte {
	return append(bytes.Clone(certificateVerify), make([]byte, n)...)
}

func TestSignTLS(t *testing.T) {
	g, genuine := enrolled(t)
	for _, n := range []int{32, 48} {
		sig := must(tee.SignTLS{Text: clientText(n)}.Do(g.ctx(), g))(t)
		if digest := sha256.Sum256(clientText(n)); !ecdsa.VerifyASN1(genuine.TLSKey, digest[:], sig.DER) {
			t.Errorf("%d: the signature does not verify", n)
		}
	}
	server := append(append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...), make([]byte, 32)...)
	for name, text := range map[string][]byte{
		"server":                    server,
		"nothing":                   nil,
		"a digest, as in TLS 1.2":   random(32),
		"63 spaces":                 clientText(32)[1:],
		"65 spaces":                 append([]byte{' '}, clientText(32)...),
		"no hash":                   clientText(0),
		"short":                     clientText(31),
		"a byte more":               clientText(33),
		"between SHA-256 and -384":  clientText(40),
		"a byte more than SHA-384":  clientText(49),
		"SHA-512":                   clientText(64),
		"other context":             bytes.Replace(clientText(32), []byte("1.3"), []byte("1.4"), 1),
		"no separator":              bytes.Replace(clientText(32), []byte("Verify\x00"), []byte("Verify "), 1),
		"COSE, to sign as evidence": cose.MustMarshal([]any{"Signature1", []byte{}, []byte{}, []byte{}}),
	} {
		_, err := tee.SignTLS{Text: text}.Do(g.ctx(), g)
		wantRefusal(t, name, err, "not a TLS 1.3 client's CertificateVerify")
	}
	fresh := newGateway(t)
	fresh.up()
	_, err := tee.SignTLS{Text: clientText(32)}.Do(fresh.ctx(), fresh)
	wantRefusal(t, "not enrolled", err, "the keep is new")
}

// throughKeep is the agent's use of the TLS key.
type throughKeep struct {
	g   *gateway
	pub *ecdsa.PublicKey
}

func (k throughKeep) Public() crypto.PublicKey { return k.pub }
func (k throughKeep) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("digests are not signed")
}

func (k throughKeep) SignMessage(_ io.Reader, text []byte, _ crypto.SignerOpts) ([]byte, error) {
	s, err := tee.SignTLS{Text: text}.Do(k.g.ctx(), k.g)
	return s.DER, err
}

// A TLS handshake with client authentication goes through the keep in TLS 1.3,
// and not in TLS 1.2.
func TestHandshake(t *testing.T) {
	g, genuine := enrolled(t)
	serverKey := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"broker"}, NotAfter: time.Now().Add(time.Hour)}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &serverKey.PublicKey, serverKey))(t)
	roots := x509.NewCertPool()
	roots.AddCert(must(x509.ParseCertificate(der))(t))
	for _, version := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		a, b := net.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		server := tls.Server(a, &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: serverKey}},
			ClientAuth:   tls.RequireAnyClientCert, MaxVersion: version, MinVersion: version,
		})
		client := tls.Client(b, &tls.Config{ServerName: "broker", RootCAs: roots, MinVersion: version, Certificates: []tls.Certificate{{
			Certificate: g.cloud.certificate(genuine.TLSKey), PrivateKey: throughKeep{g, genuine.TLSKey},
			SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
		}}})
		done := make(chan error, 1)
		go func() {
			err := client.HandshakeContext(ctx)
			if err != nil {
				b.Close()
			}
			done <- err
		}()
		err := server.HandshakeContext(ctx)
		a.Close()
		clientErr := <-done
		cancel()
		if ok := err == nil; ok != (version == tls.VersionTLS13) {
			t.Errorf("version %x: %v, %v", version, err, clientErr)
		}
	}
}

func (g *gateway) watermark(key *ecdsa.PrivateKey, typ string, c tee.Chunk, edit func(*sealing.Checkpoint)) []byte {
	g.t.Helper()
	w := sealing.Checkpoint{Subject: subject, Stream: c.Stream, Epoch: sealing.Epoch(c.Epoch), Seq: c.Seq, Head: c.Head}
	if edit != nil {
		edit(&w)
	}
	return must(w.Sign(key, typ))(g.t)
}

func TestWatermarks(t *testing.T) {
	g := newGateway(t)
	g.up()
	c := tee.Chunk{Stream: "a", Epoch: random(16), Seq: 3, Head: random(32)}
	_, err := tee.CheckWatermark{Message: g.watermark(g.cloud.fleet, sealing.TypWatermark, c, nil)}.Do(g.ctx(), g)
	wantRefusal(t, "not enrolled", err, "the fleet's key is not known")
	g.enrol()
	w := must(tee.CheckWatermark{Message: g.watermark(g.cloud.fleet, sealing.TypWatermark, c, nil)}.Do(g.ctx(), g))(t)
	if w.Stream != "a" || !bytes.Equal(w.Epoch, c.Epoch) || w.Seq != 3 || !bytes.Equal(w.Head, c.Head) {
		t.Errorf("%+v", w)
	}
	for name, msg := range map[string][]byte{
		"another subject":     g.watermark(g.cloud.fleet, sealing.TypWatermark, c, func(w *sealing.Checkpoint) { w.Subject = "acme/gw2" }),
		"the verifier's":      g.watermark(g.cloud.verifier, sealing.TypWatermark, c, nil),
		"the keep's own":      g.watermark(g.keep.epochKey, sealing.TypWatermark, c, nil),
		"as a checkpoint":     g.watermark(g.cloud.fleet, sealing.TypCheckpoint, c, nil),
		"a checkpoint":        g.watermark(g.keep.epochKey, sealing.TypCheckpoint, c, nil),
		"a head that is none": g.watermark(g.cloud.fleet, sealing.TypWatermark, c, func(w *sealing.Checkpoint) { w.Head = nil }),
		"nothing":             nil,
	} {
		_, err := tee.CheckWatermark{Message: msg}.Do(g.ctx(), g)
		wantRefusal(t, name, err, "")
	}
}

// The key of an earlier epoch is vouched for as long as its data is under way, in
// any stream, and not longer.
func TestPriorKeys(t *testing.T) {
	g, first := enrolled(t)
	a, b := g.read(1), g.read(2)
	prior := func(name string, want ...attest.Genuine) {
		t.Helper()
		got := g.attest().Claims.Prior
		ok := len(got) == len(want)
		for i := range want {
			ok = ok && bytes.Equal(got[i], want[i].Claims.Cnf.Key)
		}
		if !ok {
			t.Errorf("%s: %d prior keys, want %d", name, len(got), len(want))
		}
	}
	check := func(c tee.Chunk, edit func(*sealing.Checkpoint)) {
		t.Helper()
		must(tee.CheckWatermark{Message: g.watermark(g.cloud.fleet, sealing.TypWatermark, c, edit)}.Do(g.ctx(), g))(t)
	}
	prior("in its own epoch")
	// The agent shows nothing, or what others signed: nothing is taken over.
	g.checkpoints = [][]byte{g.watermark(newKey(t), sealing.TypCheckpoint, a, nil), {1}, g.watermark(g.cloud.fleet, sealing.TypWatermark, a, nil)}
	state := g.state
	g.boot()
	out := must(g.start())(t) // not stored: as if it had not been
	if len(out.Commit) == 0 {
		t.Fatal("no step")
	}
	if n := len(g.keep.pending.next.Prior); n != 0 {
		t.Errorf("%d prior keys from foreign checkpoints", n)
	}
	g.state = state
	g.checkpoints = [][]byte{a.Checkpoint, b.Checkpoint}
	g.up()
	prior("a and b under way", first)
	second := g.attest()
	c := g.read(1)
	g.checkpoints = [][]byte{c.Checkpoint, b.Checkpoint}
	g.up()
	prior("both epochs", first, second)
	check(c, nil)
	prior("b under way", first, second)
	check(b, func(w *sealing.Checkpoint) { w.Epoch = sealing.NewEpoch(0, [8]byte{}) })
	prior("b covered in an older epoch only", first, second)
	check(b, nil)
	prior("all there")
	// The agent keeps the watermarks: the next start knows at once.
	g.checkpoints = [][]byte{c.Checkpoint, b.Checkpoint}
	g.watermarks = [][]byte{
		g.watermark(g.cloud.fleet, sealing.TypWatermark, c, nil), g.watermark(g.cloud.fleet, sealing.TypWatermark, b, nil),
		g.watermark(g.cloud.owner, sealing.TypWatermark, b, nil),
	}
	g.up()
	prior("started with watermarks")
}

func TestOldest(t *testing.T) {
	g, genuine := enrolled(t)
	c := g.read(1)
	m := must(tee.Oldest{Stream: c.Stream, Epoch: c.Epoch, Seq: c.Seq, Head: c.Head}.Do(g.ctx(), g))(t)
	o, err := sealing.VerifyCheckpoint(genuine.EpochKey, sealing.TypOldest, m.Data)
	if err != nil || m.Kind != "hello" || o.Subject != subject || o.Stream != "a" || o.Seq != c.Seq || !bytes.Equal(o.Head, c.Head) {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := sealing.VerifyCheckpoint(genuine.EpochKey, sealing.TypCheckpoint, m.Data); err == nil {
		t.Error("it passes for a checkpoint")
	}
	_, err = tee.Oldest{Stream: "a", Epoch: c.Epoch[1:], Head: c.Head}.Do(g.ctx(), g)
	wantRefusal(t, "a short epoch", err, "16 bytes")
}

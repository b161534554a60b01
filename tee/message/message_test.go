package message

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/sha256"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/internal/cose"
)

// The messages whose bytes are in testdata.
var (
	testEnrol    = Enrol{EK: []byte("EK"), EKCert: []byte("certificate"), AK: []byte("AK"), Nonce: count(1, 32)}
	testActivate = Activate{
		EK: []byte("EK"), EKCert: []byte("certificate"), AK: []byte("AK"), Enrol: count(1, 32),
		Evidence: []byte("evidence"), Proof: Proof(count(9, 32), []byte("evidence")), Nonce: count(2, 32),
	}
	testPull = Pull{Nonce: count(3, 32)}
	testItem = Item{
		Nonce: count(3, 32), Time: 1750000000, Subject: "acme/gw7", Challenge: []byte("challenge"), Command: []byte("command"),
		Verdict: []byte("verdict"), Credential: &Credential{Blob: []byte("blob"), Secret: []byte("secret")},
		Roots: []byte("roots"), Certificate: [][]byte{[]byte("leaf"), []byte("issuer")}, Reason: "nothing more",
		Entry: []byte("entry"),
	}
	testCommand = Command{
		Audience: "acme/gw7", Sequence: 5, Name: SetInterval, Args: map[string]string{"seconds": "60"}, Expires: 1750000600,
	}
	testDeploy = Command{
		Audience: "acme/gw7", Sequence: 6, Name: WorkloadDeploy, Args: map[string]string{"instance": "press-watch"}, Body: []byte("deploy"),
	}
	testRecover = Recover{
		Tenant: "acme", Instance: "press-watch", From: 3, To: "gw8", Checkpoint: count(7, 32), Head: count(8, 32), Issued: 1750000000,
	}
	testResult = Result{
		Subject: "acme/gw7", Sequence: 5, Command: count(4, 32), Done: true, Reason: "", Output: map[string]string{"phase": "enrolled"},
	}
	testAdmission = Admission{EKHash: count(5, 32), Tenant: "acme", Gateway: "gw7", ID: count(6, 16)}
	testGrant     = Grant{Tenant: "acme", Consumer: "dashboard", Key: cose.Raw{0xa1, 0x01, 0x02}, Expires: 1750000600}
)

func TestUnsignedGolden(t *testing.T) {
	unsigned(t, "enrol.golden", testEnrol)
	unsigned(t, "activate.golden", testActivate)
	unsigned(t, "pull.golden", testPull)
}

func unsigned[M any](t *testing.T, name string, m M) {
	t.Helper()
	want := golden(t, name)
	if got := Encode(m); !bytes.Equal(got, want) {
		t.Errorf("%s: got %x", name, got)
	}
	if got, err := Decode[M](want); err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("%s: %+v, %v", name, got, err)
	}
	for i := range want {
		if _, err := Decode[M](want[:i]); err == nil {
			t.Errorf("%s: the first %d bytes are taken", name, i)
		}
	}
	_, err := Decode[M](append(bytes.Clone(want), 0))
	wantReason(t, name+" and a byte more", err, "malformed")
	_, err = Decode[M](withField(t, want))
	wantReason(t, name+" and an unknown field", err, "malformed")
}

// withField adds an unknown field to a message's map.
func withField(t *testing.T, msg []byte) []byte {
	t.Helper()
	var m map[int]cose.Raw
	if err := cose.Unmarshal(msg, &m); err != nil {
		t.Fatal(err)
	}
	m[99] = cose.Raw{0x01}
	return cose.MustMarshal(m)
}

// A proof binds the secret of the credential to these bytes of evidence.
func TestProof(t *testing.T) {
	secret, evidence := count(9, 32), []byte("evidence")
	sum := sha256.Sum256(evidence)
	mac := hmac.New(sha256.New, secret)
	mac.Write(sum[:])
	if got := Proof(secret, evidence); !bytes.Equal(got, mac.Sum(nil)) {
		t.Errorf("%x", got)
	}
	if bytes.Equal(Proof(secret, []byte("other")), Proof(secret, evidence)) || bytes.Equal(Proof(count(8, 32), evidence), Proof(secret, evidence)) {
		t.Error("another secret or other evidence has the same proof")
	}
}

type signable interface {
	Sign(crypto.Signer) ([]byte, error)
}

// Every signed message: who signs it, how it is verified.
func TestSignedGolden(t *testing.T) {
	signed(t, "item.golden", TypItem, testItem, VerifyItem)
	signed(t, "command.golden", TypCommand, testCommand, VerifyCommand)
	signed(t, "deploy.golden", TypCommand, testDeploy, VerifyCommand)
	signed(t, "recover.golden", TypRecover, testRecover, VerifyRecover)
	signed(t, "result.golden", TypResult, testResult, VerifyResult)
	signed(t, "admission.golden", TypAdmission, testAdmission, VerifyAdmission)
	signed(t, "grant.golden", TypGrant, testGrant, VerifyGrant)
}

func signed[M signable](t *testing.T, name, typ string, m M, verify func(*ecdsa.PublicKey, []byte) (M, error)) {
	t.Helper()
	want, key := golden(t, name), testKey(t, 1)
	if got := must(m.Sign(detSigner{key}))(t); !bytes.Equal(got, want) {
		t.Errorf("%s: got %x", name, got)
	}
	if got, err := verify(&key.PublicKey, want); err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("%s: %+v, %v", name, got, err)
	}
	_, err := verify(&testKey(t, 2).PublicKey, want)
	wantReason(t, name+" by another signer", err, "names key")
	for i := range want {
		for bit := range 8 {
			changed := bytes.Clone(want)
			changed[i] ^= 1 << bit
			if _, err := verify(&key.PublicKey, changed); err == nil {
				t.Errorf("%s: taken with bit %d of byte %d flipped", name, bit, i)
			}
		}
	}
	_, payload, err := cose.Peek1(want)
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{TypItem, TypCommand, TypResult, TypAdmission, TypGrant, TypRecover} {
		if other == typ {
			continue
		}
		_, err = verify(&key.PublicKey, must(cose.Sign1(key, other, payload))(t))
		wantReason(t, name+" signed as another type", err, "the message is a "+other)
	}
	_, err = verify(&key.PublicKey, must(cose.Sign1(key, typ, withField(t, payload)))(t))
	wantReason(t, name+" with an unknown field", err, "malformed")
	_, err = verify(&key.PublicKey, must(cose.Sign1(key, typ, append(bytes.Clone(payload), 0)))(t))
	wantReason(t, name+" and a byte more", err, "malformed")
}

func TestPeekItem(t *testing.T) {
	got, err := PeekItem(golden(t, "item.golden"))
	if err != nil || !reflect.DeepEqual(got, testItem) {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = PeekItem(golden(t, "command.golden"))
	wantReason(t, "a command", err, "the message is a "+TypCommand)
	_, err = PeekItem(nil)
	wantReason(t, "nothing", err, "malformed")
}

// An empty field is absent, and there is no second way to say so.
func TestItemMinimal(t *testing.T) {
	key := testKey(t, 1)
	m := Item{Nonce: count(3, 32), Time: 1}
	msg := must(m.Sign(key))(t)
	if got, err := VerifyItem(&key.PublicKey, msg); err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("%+v, %v", got, err)
	}
	_, payload, _ := cose.Peek1(msg)
	var fields map[int]cose.Raw
	if err := cose.Unmarshal(payload, &fields); err != nil || len(fields) != 3 {
		t.Errorf("%d fields, %v", len(fields), err)
	}
	fields[4] = cose.Raw{0x40}
	_, err := VerifyItem(&key.PublicKey, must(cose.Sign1(key, TypItem, cose.MustMarshal(fields)))(t))
	wantReason(t, "an empty challenge that is there", err, "malformed")
}

func TestCommandRoundTrip(t *testing.T) {
	key := testKey(t, 1)
	rapid.Check(t, func(t *rapid.T) {
		m := Command{
			Audience: rapid.String().Draw(t, "audience"), Sequence: rapid.Uint64().Draw(t, "sequence"),
			Name: rapid.String().Draw(t, "name"), Expires: rapid.Int64().Draw(t, "expires"),
			Args: rapid.MapOfN(rapid.String(), rapid.String(), 1, 5).Draw(t, "args"),
			Body: rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(t, "body"),
		}
		msg, err := m.Sign(key)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := VerifyCommand(&key.PublicKey, msg); err != nil || !reflect.DeepEqual(got, m) {
			t.Fatalf("%+v became %+v, %v", m, got, err)
		}
	})
}

func TestAdmissionSizes(t *testing.T) {
	key := testKey(t, 1)
	for name, change := range map[string]func(*Admission){
		"short hash": func(a *Admission) { a.EKHash = a.EKHash[:31] },
		"long hash":  func(a *Admission) { a.EKHash = count(0, 33) },
		"short id":   func(a *Admission) { a.ID = a.ID[:15] },
		"no id":      func(a *Admission) { a.ID = nil },
	} {
		a := testAdmission
		change(&a)
		_, err := VerifyAdmission(&key.PublicKey, must(a.Sign(key))(t))
		wantReason(t, name, err, "wrong size")
	}
}

func TestCheckCommand(t *testing.T) {
	now := time.Unix(1750000000, 0)
	good := Command{Audience: "acme/gw7", Sequence: 6, Name: AttestNow}
	with := func(change func(*Command)) Command {
		c := good
		change(&c)
		return c
	}
	args := func(name string, args map[string]string) Command {
		return with(func(c *Command) { c.Name, c.Args = name, args })
	}
	instance := map[string]string{"instance": "press-watch"}
	body := func(n int, c Command) Command {
		c.Body = make([]byte, n)
		return c
	}
	for name, tt := range map[string]struct {
		c      Command
		reason string // empty: accepted
	}{
		"deploy":                  {body(1, args(WorkloadDeploy, instance)), ""},
		"a large deploy":          {body(MaxBody, args(WorkloadDeploy, instance)), ""},
		"too large a deploy":      {body(MaxBody+1, args(WorkloadDeploy, instance)), "a body of at most"},
		"deploy nothing":          {args(WorkloadDeploy, instance), "needs a body"},
		"deploy nobody":           {body(1, args(WorkloadDeploy, nil)), `argument "instance" is missing`},
		"deploy and more":         {body(1, args(WorkloadDeploy, map[string]string{"instance": "a", "to": "gw8"})), "an argument too many"},
		"deploy a path":           {body(1, args(WorkloadDeploy, map[string]string{"instance": "../x"})), "no such name"},
		"deploy in capitals":      {body(1, args(WorkloadDeploy, map[string]string{"instance": "Press"})), "no such name"},
		"deploy a long name":      {body(1, args(WorkloadDeploy, map[string]string{"instance": strings.Repeat("a", 27)})), "no such name"},
		"deploy two lines":        {body(1, args(WorkloadDeploy, map[string]string{"instance": "a\n"})), "no such name"},
		"stop":                    {args(WorkloadStop, instance), ""},
		"stop with body":          {body(1, args(WorkloadStop, instance)), "takes no body"},
		"stop nobody":             {args(WorkloadStop, nil), "is missing"},
		"move":                    {args(WorkloadMove, map[string]string{"instance": "a", "to": "gw8"}), ""},
		"move nowhere":            {args(WorkloadMove, instance), `argument "to" is missing`},
		"move to a subject":       {args(WorkloadMove, map[string]string{"instance": "a", "to": "gw8.up"}), "no such name"},
		"move somewhere and more": {args(WorkloadMove, map[string]string{"instance": "a", "to": "gw8", "x": ""}), "an argument too many"},
		"attest with body":        {body(1, good), "takes no body"},
		"interval with body":      {body(1, args(SetInterval, map[string]string{"seconds": "60"})), "takes no body"},
		"attest":                  {good, ""},
		"status":                  {args(StatusCommand, nil), ""},
		"rotate":                  {args(RotateStreamKeys, nil), ""},
		"interval":                {args(SetInterval, map[string]string{"seconds": "60"}), ""},
		"in time":                 {with(func(c *Command) { c.Expires = now.Unix() + 1 }), ""},
		"a gap in sequences":      {with(func(c *Command) { c.Sequence = math.MaxUint64 }), ""},
		"a name to drown in":      {with(func(c *Command) { c.Name = strings.Repeat("\x01", 300_000) }), "unknown command"},
		"another gateway":         {with(func(c *Command) { c.Audience = "acme/gw8" }), "the command is for \"acme/gw8\""},
		"a whole tenant":          {with(func(c *Command) { c.Audience = "acme/" }), "the command is for \"acme/\""},
		"nobody":                  {with(func(c *Command) { c.Audience = "" }), "the command is for"},
		"again":                   {with(func(c *Command) { c.Sequence = 5 }), "sequence 5 was used: the newest accepted is 5"},
		"older":                   {with(func(c *Command) { c.Sequence = 0 }), "sequence 0 was used"},
		"expires now":             {with(func(c *Command) { c.Expires = now.Unix() }), "expired at 2025-06-15T15:06:40Z"},
		"expired long ago":        {with(func(c *Command) { c.Expires = -1 }), "expired at"},
		"unknown":                 {args("reboot", nil), `unknown command "reboot"`},
		"no name":                 {args("", nil), `unknown command ""`},
		"attest with argument":    {args(AttestNow, map[string]string{"a": "b"}), "takes no arguments"},
		"rotate with argument":    {args(RotateStreamKeys, map[string]string{"": ""}), "takes no arguments"},
		"interval without":        {args(SetInterval, nil), "a whole number from 1 to 86400"},
		"interval and more":       {args(SetInterval, map[string]string{"seconds": "60", "x": ""}), "a whole number from 1 to 86400"},
	} {
		err := CheckCommand(tt.c, "acme/gw7", 5, now)
		if tt.reason == "" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if tt.reason != "" {
			wantReason(t, name, err, tt.reason)
		}
	}
}

func TestInterval(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"1": time.Second, "60": time.Minute, "86400": 24 * time.Hour,
		"0": 0, "86401": 0, "-1": 0, "+5": 0, "1.0": 0, "1e3": 0, "1h1": 0, "1000m": 0, "": 0, " 1": 0, "60s": 0, "99999999999999999999": 0,
	} {
		got, err := Interval(Command{Args: map[string]string{"seconds": text}})
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

func TestRecoverSizes(t *testing.T) {
	key := testKey(t, 1)
	for name, change := range map[string]func(*Recover){
		"no instance":      func(r *Recover) { r.Instance = "" },
		"another name":     func(r *Recover) { r.Instance = "a.b" },
		"no target":        func(r *Recover) { r.To = "" },
		"a target's topic": func(r *Recover) { r.To = "acme/gw8" },
		"from nothing":     func(r *Recover) { r.From = 0 },
		"no checkpoint":    func(r *Recover) { r.Checkpoint = nil },
		"half a head":      func(r *Recover) { r.Head = r.Head[:16] },
	} {
		r := testRecover
		change(&r)
		_, err := VerifyRecover(&key.PublicKey, must(r.Sign(key))(t))
		wantReason(t, name, err, "wrong size")
	}
}

// Each target holds a decoder to two promises: it does not panic, and what it takes is
// spelled in the one way that the encoder writes.

func FuzzDecodeEnrol(f *testing.F) {
	f.Add(golden(f, "enrol.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := Decode[Enrol](b); err == nil && !bytes.Equal(Encode(m), b) {
			t.Fatalf("written as %x", Encode(m))
		}
	})
}

func FuzzDecodeActivate(f *testing.F) {
	f.Add(golden(f, "activate.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := Decode[Activate](b); err == nil && !bytes.Equal(Encode(m), b) {
			t.Fatalf("written as %x", Encode(m))
		}
	})
}

func FuzzPeekItem(f *testing.F) {
	f.Add(golden(f, "item.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := PeekItem(b)
		if err != nil {
			return
		}
		if _, payload, _ := cose.Peek1(b); !bytes.Equal(Encode(m), payload) {
			t.Fatalf("written as %x", Encode(m))
		}
	})
}

func FuzzVerifyAdmission(f *testing.F) {
	key := &testKey(f, 1).PublicKey
	f.Add(golden(f, "admission.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := VerifyAdmission(key, b); err == nil && !reflect.DeepEqual(a, testAdmission) {
			t.Fatalf("forged: %+v", a)
		}
	})
}

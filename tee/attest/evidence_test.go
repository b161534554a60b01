package attest

import (
	"bytes"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/internal/cose"
	"edgekeep/tee/tpm"
)

func TestEvidenceGolden(t *testing.T) {
	want := golden(t, "evidence.golden")
	if got := good(t); !bytes.Equal(got, want) {
		t.Errorf("got %x", got)
	}
	f := forge(t)
	f.quote(t, 0, 7)
	if got := must(ParseClaims(want))(t); !reflect.DeepEqual(got, f.claims) {
		t.Errorf("got %+v", got)
	}
	p := params()
	p.AKName = must(tpm.Name(f.claims.Submods.TPM.AK))(t)
	g, err := Verify(want, p)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(g.Claims, f.claims) || !reflect.DeepEqual(g.Challenge, testChallenge) ||
		!g.EpochKey.Equal(&testKey(t, epochSigner).PublicKey) || !g.TLSKey.Equal(&testKey(t, tlsSigner).PublicKey) ||
		!bytes.Equal(cose.MarshalHPKEKey(g.Receive), f.claims.Keys[PurposeReceive]) || g.Quoted.Clock.ResetCount != 3 {
		t.Errorf("%+v", g)
	}
	want1 := []string{"signature", "challenge", "nonce", "ak", "ak enrolled", "quote", "receive key", "tls key"}
	if names := checks(g, OK); !slices.Equal(names, want1) || len(g.Checks) != len(want1) {
		t.Errorf("checks %v, all %v", names, g.Checks)
	}

	offline, err := Verify(want, Params{})
	if err != nil || !slices.Equal(checks(offline, Skipped), []string{"challenge"}) || !reflect.DeepEqual(offline.Challenge, testChallenge) {
		t.Errorf("offline: %v, %v", offline.Checks, err)
	}
}

// checks lists the names of the checks with this result.
func checks(g Genuine, result string) []string {
	var names []string
	for _, c := range g.Checks {
		if c.Result == result {
			names = append(names, c.Name)
		}
	}
	return names
}

func TestEvidenceFlips(t *testing.T) {
	msg := good(t)
	for i := range msg {
		if i%4 != 0 && i >= 80 && len(msg)-i > 64 {
			continue // for time's sake: one signature covers all between
		}
		changed := bytes.Clone(msg)
		changed[i] ^= 1 << (i % 8)
		if _, err := Verify(changed, params()); err == nil {
			t.Errorf("genuine with bit %d of byte %d flipped", i%8, i)
		}
	}
}

// TestVerifyRefuses changes one thing in evidence that is otherwise good and signed by the
// epoch key. What is quoted again is what a forger with the AK could do.
func TestVerifyRefuses(t *testing.T) {
	otherKey := Key(cose.MarshalKey(&testKey(t, 9).PublicKey))
	for name, tt := range map[string]struct {
		change func(*testing.T, *forged) // before the quote
		after  func(*testing.T, *forged)
		params func(*Params)
		failed string // the check that fails first
		reason string
	}{
		"too late":          {params: func(p *Params) { p.Now = time.Unix(testIssued+60, 0) }, failed: "challenge", reason: "valid from"},
		"too early":         {params: func(p *Params) { p.Now = time.Unix(testIssued-6, 0) }, failed: "challenge", reason: "valid from"},
		"foreign challenge": {params: func(p *Params) { p.ChallengeKey = count(1, 32) }, failed: "challenge", reason: "tag is not by this key"},
		"other AK":          {params: func(p *Params) { p.AKName = make([]byte, 34) }, failed: "ak enrolled", reason: "is not the one enrolled"},
		"no challenge":      {change: func(_ *testing.T, f *forged) { f.claims.Challenge = nil }, failed: "challenge", reason: "challenge: "},
		"nonce":             {change: func(_ *testing.T, f *forged) { f.claims.Nonce = count(1, 32) }, failed: "nonce", reason: "eat_nonce"},
		"epoch key swapped": {change: func(_ *testing.T, f *forged) { f.claims.Cnf.Key = otherKey }, failed: "signature", reason: "names key"},
		"prior is no key":   {change: func(_ *testing.T, f *forged) { f.claims.Prior = []Key{{0xa0}} }, failed: "prior keys", reason: "COSE_Key"},
		"AK is none":        {after: func(_ *testing.T, f *forged) { f.claims.Submods.TPM.AK = []byte{1} }, failed: "ak", reason: "parsing"},
		"AK not restricted": {after: func(t *testing.T, f *forged) {
			f.claims.Submods.TPM.AK = f.public(t, template(false, false, nil), &f.ak.PublicKey)
		}, failed: "ak", reason: "restricted"},
		"challenge swapped": {after: func(t *testing.T, f *forged) {
			c := testChallenge
			c.Expires++
			f.claims.Challenge = must(c.Marshal(challengeKey))(t)
		}, failed: "quote", reason: tpm.ErrBinding.Error()},
		"no quote": {after: func(_ *testing.T, f *forged) { f.claims.Submods.TPM.Quote = tpm.Signed{} }, failed: "quote", reason: "signature"},
		"PCR changed": {after: func(_ *testing.T, f *forged) {
			f.claims.Submods.TPM.PCRs = map[int][]byte{0: make([]byte, 32), 7: f.pcrs[7]}
		}, failed: "quote", reason: tpm.ErrPCRDigest.Error()},
		"fewer quoted":  {change: func(t *testing.T, f *forged) { f.claims.Submods.TPM.PCRs = map[int][]byte{0: f.pcrs[0]} }, after: func(t *testing.T, f *forged) { f.quote(t, 0) }, failed: "pcr selection", reason: "quoted [0], wanted [0 7]"},
		"not certified": {after: func(_ *testing.T, f *forged) { delete(f.claims.Submods.TPM.Certified, PurposeTLS) }, failed: "tls key", reason: "not certified by the AK"},
		"not claimed":   {change: func(_ *testing.T, f *forged) { delete(f.claims.Keys, PurposeTLS) }, failed: "tls key", reason: "certified but not claimed"},
		"purposes mixed": {after: func(_ *testing.T, f *forged) {
			c := f.claims.Submods.TPM.Certified
			c[PurposeTLS], c[PurposeReceive] = c[PurposeReceive], c[PurposeTLS]
		}, failed: "receive key", reason: tpm.ErrBinding.Error()},
		"other TLS key": {change: func(_ *testing.T, f *forged) { f.claims.Keys[PurposeTLS] = otherKey }, failed: "tls key", reason: "not the one claimed"},
		"other receive key": {change: func(t *testing.T, f *forged) {
			f.certify(t, PurposeReceive, f.public(t, template(false, true, tpm.PolicyDigest(f.pcrs, true)), &testKey(t, 9).PublicKey))
		}, failed: "receive key", reason: "not the P-256 half"},
		"loose TLS key": {change: func(t *testing.T, f *forged) {
			loose := template(false, false, tpm.PolicyDigest(f.pcrs, true))
			loose.ObjectAttributes.UserWithAuth = true
			f.certify(t, PurposeTLS, f.public(t, loose, &testKey(t, tlsSigner).PublicKey))
		}, failed: "tls key", reason: "other attributes"},
	} {
		f := forge(t)
		if tt.change != nil {
			tt.change(t, f)
		}
		f.quote(t, 0, 7)
		if tt.after != nil {
			tt.after(t, f)
		}
		p := params()
		if tt.params != nil {
			tt.params(&p)
		}
		g, err := Verify(f.evidence(t), p)
		wantReason(t, name, err, tt.reason)
		if failed := checks(g, Failed); len(failed) == 0 || failed[0] != tt.failed {
			t.Errorf("%s: failed %v, want %s first", name, failed, tt.failed)
		}
		if err != nil && !strings.HasPrefix(err.Error(), tt.failed+": ") {
			t.Errorf("%s: %v does not name the check", name, err)
		}
	}
}

// Genuine, but the machine changed under a running keep: its keys are not vouched for.
func TestKeysOfAnotherState(t *testing.T) {
	f := forge(t)
	policy := tpm.PolicyDigest(map[int][]byte{0: f.pcrs[0], 7: make([]byte, 32)}, true)
	f.certify(t, PurposeTLS, f.public(t, template(false, false, policy), &testKey(t, tlsSigner).PublicKey))
	f.quote(t, 0, 7)
	g, err := Verify(f.evidence(t), params())
	if err != nil || g.TLSKey != nil || g.Receive == nil {
		t.Errorf("%v, TLS key %v, receive key %v", err, g.TLSKey, g.Receive)
	}
	if failed := checks(g, Failed); !slices.Equal(failed, []string{"tls key"}) {
		t.Errorf("failed %v", failed)
	}
}

// Evidence without optional claims, as from a keep that could not open its state.
func TestEvidenceMinimal(t *testing.T) {
	f := forge(t)
	f.claims.Keys, f.claims.Prior, f.claims.Epoch, f.claims.Hardening, f.claims.Sources = nil, nil, nil, nil, nil
	f.claims.Submods.TPM.Certified = nil
	f.quote(t, 0, 7)
	g, err := Verify(f.evidence(t), params())
	if err != nil || g.TLSKey != nil || g.Receive != nil {
		t.Errorf("%+v, %v", g, err)
	}
}

func TestParseClaimsRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Claims)
		reason string
	}{
		"profile":         {func(c *Claims) { c.Profile = "tag:psacertified.org,2023:psa#tfm" }, `profile "tag:psacertified.org,2023:psa#tfm" is not known`},
		"no submodule":    {func(c *Claims) { c.Submods = nil }, "no submodule"},
		"short ueid":      {func(c *Claims) { c.UEID = c.UEID[:32] }, "ueid"},
		"ueid of a MAC":   {func(c *Claims) { c.UEID[0] = 2 }, "ueid"},
		"no ueid":         {func(c *Claims) { c.UEID = nil }, "ueid"},
		"many prior keys": {func(c *Claims) { c.Prior = slices.Repeat([]Key{{0xa0}}, maxPrior+1) }, "too many"},
		"many sources":    {func(c *Claims) { c.Sources = make([]SourceHealth, maxSources+1) }, "too many"},
		"short epoch":     {func(c *Claims) { c.Epoch = c.Epoch[:15] }, "epoch id"},
		"PCR 24":          {func(c *Claims) { c.Submods.TPM.PCRs[24] = make([]byte, 32) }, "a PCR is not of 0 to 23"},
		"PCR -1":          {func(c *Claims) { c.Submods.TPM.PCRs[-1] = make([]byte, 32) }, "a PCR is not of 0 to 23"},
		"PCR 1<<40":       {func(c *Claims) { c.Submods.TPM.PCRs[1<<40] = make([]byte, 32) }, "a PCR is not of 0 to 23"},
		"short PCR":       {func(c *Claims) { c.Submods.TPM.PCRs[0] = make([]byte, 20) }, "a PCR is not of 0 to 23"},
		"too long":        {func(c *Claims) { c.Software = strings.Repeat("x", MaxEvidence) }, "at most 65536"},
	} {
		f := forge(t)
		f.quote(t, 0, 7)
		f.claims.Submods.TPM.PCRs = maps.Clone(f.pcrs)
		tt.change(&f.claims)
		msg := f.evidence(t)
		_, err := ParseClaims(msg)
		wantReason(t, name, err, tt.reason)
		if _, err := Verify(msg, params()); err == nil {
			t.Errorf("%s: genuine", name)
		}
	}
	f := forge(t)
	payload := cose.MustMarshal(f.claims)
	_, err := ParseClaims(must(cose.Sign1(testKey(t, epochSigner), TypVerdict, payload))(t))
	wantReason(t, "a verdict", err, "its type is")
	_, err = ParseClaims(must(cose.Sign1(testKey(t, epochSigner), TypEvidence, append(payload, 0)))(t))
	wantReason(t, "a byte more", err, "malformed")
	var fields map[int]cose.Raw
	if err := cose.Unmarshal(payload, &fields); err != nil {
		t.Fatal(err)
	}
	fields[11] = cose.Raw{1}
	_, err = ParseClaims(must(cose.Sign1(testKey(t, epochSigner), TypEvidence, cose.MustMarshal(fields)))(t))
	wantReason(t, "an unknown claim", err, "malformed")
	for _, n := range []int{0, 1, 100} {
		_, err = ParseClaims(good(t)[:n])
		wantReason(t, "cut", err, "malformed")
	}
}

// Each claim, key and challenge that differs gives another binding; the submodules, which
// the binding goes into, do not.
func TestBinding(t *testing.T) {
	base := must(forge(t).claims.Binding())(t)
	if len(base) != 32 {
		t.Fatalf("%x", base)
	}
	seen := map[string]string{string(base): "the claims as they are"}
	for name, change := range map[string]func(*Claims){
		"nonce":           func(c *Claims) { c.Nonce = count(1, 32) },
		"epoch key":       func(c *Claims) { c.Cnf.Key = cose.MarshalKey(&testKey(t, 9).PublicKey) },
		"ueid":            func(c *Claims) { c.UEID[32] ^= 1 },
		"profile":         func(c *Claims) { c.Profile += "x" },
		"challenge":       func(c *Claims) { c.Challenge[len(c.Challenge)-1] ^= 1 },
		"TLS key":         func(c *Claims) { c.Keys[PurposeTLS] = cose.MarshalKey(&testKey(t, 9).PublicKey) },
		"no TLS key":      func(c *Claims) { delete(c.Keys, PurposeTLS) },
		"no receive key":  func(c *Claims) { delete(c.Keys, PurposeReceive) },
		"no keys":         func(c *Claims) { c.Keys = nil },
		"prior":           func(c *Claims) { c.Prior = append(c.Prior, c.Prior[0]) },
		"no prior":        func(c *Claims) { c.Prior = nil },
		"epoch":           func(c *Claims) { c.Epoch[0] ^= 1 },
		"no epoch":        func(c *Claims) { c.Epoch = nil },
		"command":         func(c *Claims) { c.Command++ },
		"roots":           func(c *Claims) { c.Roots[0] ^= 1 },
		"hardening":       func(c *Claims) { c.Hardening["seccomp"] = true },
		"more hardening":  func(c *Claims) { c.Hardening["x"] = false },
		"software":        func(c *Claims) { c.Software = "" },
		"a source late":   func(c *Claims) { c.Sources[0].Late = false },
		"a source's name": func(c *Claims) { c.Sources[0].Name = "press-4" },
		"one source more": func(c *Claims) { c.Sources = append(c.Sources, SourceHealth{}) },
	} {
		c := forge(t).claims
		change(&c)
		b := must(c.Binding())(t)
		if first, ok := seen[string(b)]; ok {
			t.Errorf("%s: the same binding as of %s", name, first)
		}
		seen[string(b)] = name
	}
	c := forge(t).claims
	c.Submods = nil
	if b := must(c.Binding())(t); !bytes.Equal(b, base) {
		t.Error("the submodules are in the binding")
	}
	for name, change := range map[string]func(*Claims){
		"no epoch key":    func(c *Claims) { c.Cnf.Key = nil },
		"an HPKE TLS key": func(c *Claims) { c.Keys[PurposeTLS] = c.Keys[PurposeReceive] },
		"a purpose":       func(c *Claims) { c.Keys["other"] = c.Keys[PurposeTLS] },
	} {
		c := forge(t).claims
		change(&c)
		if _, err := c.Binding(); err == nil {
			t.Errorf("%s: there is a binding", name)
		}
	}
}

func TestBindingProperty(t *testing.T) {
	key := cose.MarshalKey(&testKey(t, epochSigner).PublicKey)
	rapid.Check(t, func(t *rapid.T) {
		draw := func(label string) Claims {
			b := rapid.SliceOfN(rapid.Byte(), 0, 3)
			return Claims{
				Cnf: Confirmation{Key: key}, Nonce: b.Draw(t, label+" nonce"), UEID: b.Draw(t, label+" ueid"),
				Challenge: b.Draw(t, label+" challenge"), Epoch: b.Draw(t, label+" epoch"), Roots: b.Draw(t, label+" roots"),
				Command: rapid.Uint64Range(0, 2).Draw(t, label+" command"), Software: rapid.StringN(0, 2, -1).Draw(t, label+" software"),
			}
		}
		a, b := draw("a"), draw("b")
		x, errX := a.Binding()
		y, errY := b.Binding()
		if err := errors.Join(errX, errY); err != nil {
			t.Fatal(err)
		}
		if same := bytes.Equal(cose.MustMarshal(a), cose.MustMarshal(b)); bytes.Equal(x, y) != same {
			t.Fatalf("%+v and %+v: bindings %x and %x", a, b, x, y)
		}
	})
}

func TestKeyQualifier(t *testing.T) {
	if bytes.Equal(KeyQualifier(PurposeTLS), KeyQualifier(PurposeReceive)) || len(KeyQualifier("")) != 32 {
		t.Error("qualifiers of different purposes are equal, or not of 32 bytes")
	}
}

package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/internal/cose"
)

func TestChallengeGolden(t *testing.T) {
	want := golden(t, "challenge.golden")
	if got := must(testChallenge.Marshal(challengeKey))(t); !bytes.Equal(got, want) {
		t.Errorf("got %x", got)
	}
	if got, err := VerifyChallenge(challengeKey, want, testNow()); err != nil || !reflect.DeepEqual(got, testChallenge) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := PeekChallenge(want); err != nil || !reflect.DeepEqual(got, testChallenge) {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range want {
		for bit := range 8 {
			changed := bytes.Clone(want)
			changed[i] ^= 1 << bit
			if _, err := VerifyChallenge(challengeKey, changed, testNow()); err == nil {
				t.Errorf("taken with bit %d of byte %d flipped", bit, i)
			}
		}
	}
	_, err := VerifyChallenge(count(1, 32), want, testNow())
	wantReason(t, "another key", err, "tag is not by this key")
	_, err = VerifyChallenge(nil, want, testNow())
	wantReason(t, "no key", err, "the key has 0 bytes")
	other := must(cose.Mac0(challengeKey, "application/other", cose.MustMarshal(testChallenge)))(t)
	_, err = VerifyChallenge(challengeKey, other, testNow())
	wantReason(t, "another type", err, "the message is a application/other")
	_, err = PeekChallenge(other)
	wantReason(t, "another type", err, "the message is a application/other")
}

// A challenge lives from 5 seconds before its issue, for clocks of replicas that differ,
// until it expires.
func TestChallengeLife(t *testing.T) {
	msg := must(testChallenge.Marshal(challengeKey))(t)
	for offset, ok := range map[int64]bool{-6: false, -5: true, 0: true, 59: true, 60: false, 1 << 40: false, -(1 << 40): false} {
		if _, err := VerifyChallenge(challengeKey, msg, time.Unix(testIssued+offset, 0)); (err == nil) != ok {
			t.Errorf("at %d s: %v", offset, err)
		}
	}
}

func TestChallengeRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Challenge)
		reason string
	}{
		"short nonce":  {func(c *Challenge) { c.Nonce = c.Nonce[:31] }, "wrong size"},
		"no tenant":    {func(c *Challenge) { c.Tenant = "" }, "wrong size"},
		"tenant":       {func(c *Challenge) { c.Tenant = "a/b" }, "wrong size"},
		"gateway":      {func(c *Challenge) { c.Gateway = "+" }, "wrong size"},
		"no PCRs":      {func(c *Challenge) { c.PCRs = nil }, "wrong size"},
		"no life":      {func(c *Challenge) { c.Expires = c.Issued }, "wrong size"},
		"backwards":    {func(c *Challenge) { c.PCRs = []int{7, 0} }, "ascending"},
		"twice":        {func(c *Challenge) { c.PCRs = []int{0, 0} }, "ascending"},
		"PCR 24":       {func(c *Challenge) { c.PCRs = []int{0, 24} }, "ascending"},
		"PCR -1":       {func(c *Challenge) { c.PCRs = []int{-1, 0} }, "ascending"},
		"PCRs 0 to 24": {func(c *Challenge) { c.PCRs = make([]int, 25) }, "wrong size"},
	} {
		c := testChallenge
		tt.change(&c)
		msg := must(c.Marshal(challengeKey))(t)
		_, err := PeekChallenge(msg)
		wantReason(t, name, err, tt.reason)
		_, err = VerifyChallenge(challengeKey, msg, testNow())
		wantReason(t, name, err, tt.reason)
	}
}

func TestValidName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "gw-7": true, "A0": true, "-": true, strings.Repeat("a", 31): true,
		"": false, strings.Repeat("a", 32): false, "a/b": false, "a.b": false, "a_b": false, "a b": false, "+": false, "#": false,
		"*": false, ">": false, "ä": false, "a\x00": false, "..": false, "$SYS": false,
	} {
		if ValidName(name) != ok {
			t.Errorf("%q: %v", name, !ok)
		}
	}
}

func testRoots(t testing.TB) Roots {
	t.Helper()
	key := func(first byte) Key { return cose.MarshalKey(&testKey(t, first).PublicKey) }
	data := must(hpke.MLKEM768P256().DeriveKeyPair(count(8, 32)))(t).PublicKey()
	return Roots{
		Tenant: "acme", Operator: key(1), Verifier: key(2), Fleet: key(3), Broker: key(4), Owner: key(5), Data: cose.MarshalHPKEKey(data),
	}
}

func TestRootsGolden(t *testing.T) {
	want := golden(t, "roots.golden")
	if got := cose.MustMarshal(testRoots(t)); !bytes.Equal(got, want) {
		t.Errorf("got %x", got)
	}
	r, err := ParseRoots(want)
	if err != nil {
		t.Fatal(err)
	}
	for i, pub := range []*ecdsa.PublicKey{r.Operator, r.Verifier, r.Fleet, r.Broker, r.Owner} {
		if !pub.Equal(&testKey(t, byte(i+1)).PublicKey) {
			t.Errorf("key %d is another", i)
		}
	}
	sum := sha256.Sum256(want)
	if r.Tenant != "acme" || !bytes.Equal(r.Digest, sum[:]) || !bytes.Equal(cose.MarshalHPKEKey(r.Data), testRoots(t).Data) {
		t.Errorf("%+v", r)
	}
}

func TestParseRootsRefuses(t *testing.T) {
	hybrid := testRoots(t).Data
	for name, tt := range map[string]struct {
		change func(*Roots)
		reason string
	}{
		"tenant":          {func(r *Roots) { r.Tenant = "a/b" }, `tenant name "a/b"`},
		"no operator":     {func(r *Roots) { r.Operator = Key{0xa0} }, "operator key: "},
		"verifier":        {func(r *Roots) { r.Verifier = hybrid }, "verifier key: "},
		"fleet":           {func(r *Roots) { r.Fleet = Key{0xf6} }, "fleet key: "},
		"broker":          {func(r *Roots) { r.Broker = Key{0x01} }, "broker key: "},
		"owner off curve": {func(r *Roots) { r.Owner = bytes.Clone(r.Owner); r.Owner[len(r.Owner)-1] ^= 1 }, "owner key: "},
		"data":            {func(r *Roots) { r.Data = r.Owner }, "data key: "},
	} {
		r := testRoots(t)
		tt.change(&r)
		_, err := ParseRoots(cose.MustMarshal(r))
		wantReason(t, name, err, tt.reason)
	}
	msg := cose.MustMarshal(testRoots(t))
	_, err := ParseRoots(append(msg, 0))
	wantReason(t, "a byte more", err, "malformed")
	_, err = ParseRoots(msg[:len(msg)-1])
	wantReason(t, "cut", err, "malformed")
}

func testVerdict(t testing.TB) Verdict {
	t.Helper()
	v := Vector{Instance: 2, Configuration: 2, Executables: 2, Hardware: 2, Storage: 2}
	return Verdict{
		Subject: "acme/gw7", Audience: "acme", Expires: testIssued + 600, NotBefore: testIssued, IssuedAt: testIssued + 1,
		Cnf: Confirmation{Key: cose.MarshalKey(&testKey(t, epochSigner).PublicKey)}, Nonce: testChallenge.Nonce, Profile: VerdictProfile,
		Submods:       map[string]Appraisal{Submodule: {Status: v.Status(), Vector: v, Policies: []string{"acme-1"}}},
		VerifierID:    VerifierID{Developer: "edgekeep", Build: "1.0"},
		ChallengeHash: count(1, 32), EvidenceHash: count(2, 32),
		Keys:   map[string]Key{PurposeTLS: cose.MarshalKey(&testKey(t, tlsSigner).PublicKey)},
		Prior:  []Key{cose.MarshalKey(&testKey(t, 5).PublicKey)},
		Checks: []Check{{Name: "signature", Result: OK, Detail: "it verifies"}}, Assurance: "tpm", Command: 4,
	}
}

func TestVerdictGolden(t *testing.T) {
	want, key := golden(t, "verdict.golden"), testKey(t, 2)
	v := testVerdict(t)
	if got := must(v.Sign(detSigner{key}))(t); !bytes.Equal(got, want) {
		t.Errorf("got %x", got)
	}
	if got, err := VerifyVerdict(&key.PublicKey, want); err != nil || !reflect.DeepEqual(got, v) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := PeekVerdict(want); err != nil || !reflect.DeepEqual(got, v) {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range want {
		changed := bytes.Clone(want)
		changed[i] ^= 1 << (i % 8)
		if _, err := VerifyVerdict(&key.PublicKey, changed); err == nil {
			t.Errorf("taken with bit %d of byte %d flipped", i%8, i)
		}
	}
	_, err := VerifyVerdict(&testKey(t, 3).PublicKey, want)
	wantReason(t, "another signer", err, "names key")
	_, err = VerifyVerdict(&key.PublicKey, must(cose.Sign1(key, TypEvidence, cose.MustMarshal(v)))(t))
	wantReason(t, "another type", err, "the message is a "+TypEvidence)
	keys := must(v.DataKeys())(t)
	if len(keys) != 2 || !keys[0].Equal(&testKey(t, epochSigner).PublicKey) || !keys[1].Equal(&testKey(t, 5).PublicKey) {
		t.Errorf("%d data keys", len(keys))
	}
	v.Prior = []Key{{0xa0}}
	if _, err := v.DataKeys(); err == nil {
		t.Error("data keys of what is no key")
	}
}

func TestVerdictRefuses(t *testing.T) {
	key := testKey(t, 2)
	appraisal := func(status int, v Vector) map[string]Appraisal {
		return map[string]Appraisal{Submodule: {Status: status, Vector: v}}
	}
	good := testVerdict(t).Appraisal()
	for name, tt := range map[string]struct {
		change func(*Verdict)
		reason string
	}{
		"profile":              {func(v *Verdict) { v.Profile = "tag:github.com,2023:veraison/ear" }, "profile"},
		"better than it is":    {func(v *Verdict) { v.Submods = appraisal(TierAffirming, Vector{Instance: 2, Executables: 33}) }, "does not follow"},
		"worse than it is":     {func(v *Verdict) { v.Submods = appraisal(TierContraindicated, Vector{Instance: 2}) }, "does not follow"},
		"affirming on nothing": {func(v *Verdict) { v.Submods = appraisal(TierAffirming, Vector{}) }, "does not follow"},
		"no tier's number":     {func(v *Verdict) { v.Submods = appraisal(3, Vector{Instance: 3}) }, "does not follow"},
		"no submodule":         {func(v *Verdict) { v.Submods = map[string]Appraisal{} }, "does not follow"},
		"another submodule":    {func(v *Verdict) { v.Submods = map[string]Appraisal{"other": good} }, "does not follow"},
		"two submodules":       {func(v *Verdict) { v.Submods["other"] = good }, "does not follow"},
	} {
		v := testVerdict(t)
		tt.change(&v)
		msg := must(v.Sign(key))(t)
		_, err := VerifyVerdict(&key.PublicKey, msg)
		wantReason(t, name, err, tt.reason)
		_, err = PeekVerdict(msg)
		wantReason(t, name, err, tt.reason)
	}
	_, err := PeekVerdict(nil)
	wantReason(t, "nothing", err, "malformed")
}

func TestUsable(t *testing.T) {
	now := time.Unix(testIssued+10, 0)
	warning := Vector{Instance: 2, Executables: 33}
	for name, tt := range map[string]struct {
		change func(*Verdict)
		reason string // empty: usable
	}{
		"as it is":        {func(*Verdict) {}, ""},
		"one second left": {func(v *Verdict) { v.Expires = now.Unix() + 1 }, ""},
		"another gateway": {func(v *Verdict) { v.Subject = "acme/gw8" }, "about acme/gw8, not acme/gw7"},
		"another tenant":  {func(v *Verdict) { v.Audience = "other" }, "for other, not acme"},
		"expires now":     {func(v *Verdict) { v.Expires = now.Unix() }, "expired at 2025-06-15T15:06:50Z"},
		"expired":         {func(v *Verdict) { v.Expires = 0 }, "expired at"},
		"a warning": {func(v *Verdict) {
			v.Submods = map[string]Appraisal{Submodule: {Status: warning.Status(), Vector: warning}}
		}, "the verdict is warning"},
		"contraindicated":    {func(v *Verdict) { v.Submods = map[string]Appraisal{Submodule: {Status: TierContraindicated}} }, "the verdict is contraindicated"},
		"nothing was proven": {func(v *Verdict) { v.Submods = nil }, "the verdict is none"},
	} {
		v := testVerdict(t)
		tt.change(&v)
		err := v.Usable("acme/gw7", "acme", now)
		if tt.reason == "" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if tt.reason != "" {
			wantReason(t, name, err, tt.reason)
		}
	}
}

// The tiers of AR4SI (draft-ietf-rats-ar4si §2.3.2), at their edges.
func TestTier(t *testing.T) {
	for v, want := range map[int]string{
		-128: "contraindicated", -97: "contraindicated", -96: "warning", -33: "warning", -32: "affirming", -2: "affirming",
		-1: "none", 0: "none", 1: "none", 2: "affirming", 31: "affirming", 32: "warning", 95: "warning", 96: "contraindicated", 127: "contraindicated",
		128: "contraindicated", -129: "contraindicated", math.MaxInt: "contraindicated", math.MinInt: "contraindicated",
	} {
		if got := Tier(v); got != want {
			t.Errorf("%d: %s, want %s", v, got, want)
		}
	}
}

func vector() *rapid.Generator[Vector] {
	return rapid.Custom(func(t *rapid.T) Vector {
		claim := rapid.OneOf(rapid.Just(0), rapid.IntRange(-128, 127))
		var v Vector
		for _, p := range []*int{&v.Instance, &v.Configuration, &v.Executables, &v.FileSystem, &v.Hardware, &v.Runtime, &v.Storage, &v.SourcedData} {
			*p = claim.Draw(t, "claim")
		}
		return v
	})
}

// A status is the worst of its vector, and a verdict carries no other one.
func TestStatusProperty(t *testing.T) {
	key := testKey(t, 2)
	rapid.Check(t, func(t *rapid.T) {
		v := vector().Draw(t, "vector")
		order := []string{"none", "affirming", "warning", "contraindicated"}
		worst := 0
		for _, n := range v.List() {
			for i, tier := range order {
				if Tier(n.Value) == tier {
					worst = max(worst, i)
				}
			}
		}
		status := v.Status()
		if Tier(status) != order[worst] {
			t.Fatalf("%+v is %s, want %s", v, Tier(status), order[worst])
		}
		claimed := rapid.SampledFrom([]int{TierNone, TierAffirming, TierWarning, TierContraindicated}).Draw(t, "claimed")
		verdict := testVerdictOf(claimed, v)
		msg, err := verdict.Sign(key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyVerdict(&key.PublicKey, msg); (err == nil) != (claimed == status) {
			t.Fatalf("%+v with status %d: %v", v, claimed, err)
		}
	})
}

func testVerdictOf(status int, v Vector) Verdict {
	return Verdict{
		Profile: VerdictProfile, Cnf: Confirmation{Key: Key{0xa0}}, Checks: []Check{},
		Submods: map[string]Appraisal{Submodule: {Status: status, Vector: v}},
	}
}

package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/mlkem"
	"crypto/rand"
	"errors"
	"slices"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee/attest"
	"edgekeep/tee/tpm"
)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// keep has what a keep has of a TPM, and makes evidence as it does.
type keep struct {
	ak       *tpm.AK
	epochKey *ecdsa.PrivateKey
	claims   attest.Claims
	tpm      attest.TPM
}

func auth(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func newKeep(t *testing.T, d *tpm.Device) keep {
	t.Helper()
	ek := must(d.EK())(t)
	k := keep{
		ak:       must(d.LoadAK(must(d.NewAK(auth(1)))(t), auth(1)))(t),
		epochKey: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t),
	}
	t.Cleanup(k.ak.Close)
	tlsBlob := must(d.NewKey(tpm.Signing, tpm.Measured, auth(2)))(t)
	receiveBlob := must(d.NewKey(tpm.Agreement, tpm.Measured, auth(3)))(t)
	tlsKey := must(d.Key(tlsBlob, tpm.Measured, auth(2)))(t)
	half := must(d.Key(receiveBlob, tpm.Measured, auth(3)))(t)
	receive := must(hpke.NewHybridPrivateKey(must(mlkem.GenerateKey768())(t), half))(t)
	k.claims = attest.Claims{
		Cnf:  attest.Confirmation{Key: cose.MarshalKey(&k.epochKey.PublicKey)},
		UEID: append([]byte{1}, must(tpm.EKHash(ek.Public))(t)...), Profile: attest.Profile, Roots: make([]byte, 32),
		Keys: map[string]attest.Key{
			attest.PurposeTLS:     cose.MarshalKey(tlsKey.Public().(*ecdsa.PublicKey)),
			attest.PurposeReceive: cose.MarshalHPKEKey(receive.PublicKey()),
		},
	}
	k.tpm = attest.TPM{AK: k.ak.Public(), Certified: map[string]attest.Certified{
		attest.PurposeTLS:     {Public: tlsBlob.Public, By: must(k.ak.Certify(tlsKey, attest.KeyQualifier(attest.PurposeTLS)))(t)},
		attest.PurposeReceive: {Public: receiveBlob.Public, By: must(k.ak.Certify(half, attest.KeyQualifier(attest.PurposeReceive)))(t)},
	}}
	return k
}

func (k keep) evidence(t *testing.T, challenge []byte) []byte {
	t.Helper()
	ch := must(attest.PeekChallenge(challenge))(t)
	c, sub := k.claims, k.tpm
	c.Nonce, c.Challenge = ch.Nonce, challenge
	var err error
	if sub.Quote, sub.PCRs, err = k.ak.Quote(must(c.Binding())(t), ch.PCRs); err != nil {
		t.Fatal(err)
	}
	c.Submods = &attest.Submods{TPM: sub}
	return must(cose.Sign1(k.epochKey, attest.TypEvidence, cose.MustMarshal(c)))(t)
}

var challengeKey = bytes.Repeat([]byte{7}, 32)

func challenge(t *testing.T, nonce byte) []byte {
	t.Helper()
	now := time.Now().Unix()
	c := attest.Challenge{Tenant: "acme", Gateway: "gw7", Nonce: bytes.Repeat([]byte{nonce}, 32), Issued: now, Expires: now + 60, PCRs: tpm.Measured}
	return must(c.Marshal(challengeKey))(t)
}

func TestEvidence(t *testing.T) {
	d := tpm.OpenShared(t)
	k := newKeep(t, d)
	evidence := k.evidence(t, challenge(t, 1))
	p := attest.Params{ChallengeKey: challengeKey, Now: time.Now(), AKName: must(tpm.Name(k.ak.Public()))(t)}
	g, err := attest.Verify(evidence, p)
	if err != nil {
		t.Fatalf("%v; checks %v", err, g.Checks)
	}
	if !slices.Equal(g.Quoted.PCRs, tpm.Measured) || !g.EpochKey.Equal(&k.epochKey.PublicKey) || g.TLSKey == nil || g.Receive == nil {
		t.Errorf("%+v", g)
	}
	for _, c := range g.Checks {
		if c.Result != attest.OK {
			t.Errorf("%+v", c)
		}
	}
	for i := range evidence {
		changed := bytes.Clone(evidence)
		changed[i] ^= 1 << (i % 8)
		if i%16 == 0 || len(evidence)-i < 64 {
			if _, err := attest.Verify(changed, p); err == nil {
				t.Errorf("genuine with bit %d of byte %d flipped", i%8, i)
			}
		}
	}

	// What was quoted for one challenge answers no other.
	c := must(attest.ParseClaims(evidence))(t)
	second := challenge(t, 2)
	c.Challenge, c.Nonce = second, must(attest.PeekChallenge(second))(t).Nonce
	replayed := must(cose.Sign1(k.epochKey, attest.TypEvidence, cose.MustMarshal(c)))(t)
	if _, err := attest.Verify(replayed, p); !errors.Is(err, tpm.ErrBinding) {
		t.Errorf("an old quote for a new challenge: %v", err)
	}
	// Nor does another epoch key take it over.
	thief := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	c = must(attest.ParseClaims(evidence))(t)
	c.Cnf.Key = cose.MarshalKey(&thief.PublicKey)
	if _, err := attest.Verify(must(cose.Sign1(thief, attest.TypEvidence, cose.MustMarshal(c)))(t), p); !errors.Is(err, tpm.ErrBinding) {
		t.Errorf("a quote with another epoch key: %v", err)
	}

	// The machine changes under the running keep: it says so, and its keys are left out.
	tpm.ExtendShared(t, d, tpm.Measured[0], "something else boots")
	g, err = attest.Verify(k.evidence(t, challenge(t, 3)), p)
	if err != nil || g.TLSKey != nil || g.Receive != nil {
		t.Errorf("in another state: %v, TLS key %v, receive key %v", err, g.TLSKey, g.Receive)
	}
}

// Another AK of the same TPM is not the one enrolled.
func TestEvidenceOfAnotherAK(t *testing.T) {
	d := tpm.OpenShared(t)
	k := newKeep(t, d)
	p := attest.Params{ChallengeKey: challengeKey, Now: time.Now(), AKName: must(tpm.Name(must(d.NewAK(auth(1)))(t).Public))(t)}
	g, err := attest.Verify(k.evidence(t, challenge(t, 1)), p)
	if err == nil || !slices.ContainsFunc(g.Checks, func(c attest.Check) bool { return c.Name == "ak enrolled" && c.Result == attest.Failed }) {
		t.Errorf("%v, %v", err, g.Checks)
	}
}

package attest

import (
	"bytes"
	"testing"

	"edgekeep/internal/cose"
)

// Each target holds a decoder to two promises: it does not panic, and what it takes is
// spelled in the one way that the encoder writes.

func FuzzParseClaims(f *testing.F) {
	f.Add(golden(f, "evidence.golden"))
	key := testKey(f, epochSigner)
	f.Fuzz(func(t *testing.T, b []byte) {
		// Both as a message, and as the claims in one that its sender has signed.
		signed, err := cose.Sign1(detSigner{key}, TypEvidence, b)
		if err != nil {
			return
		}
		for _, msg := range [][]byte{b, signed} {
			c, err := ParseClaims(msg)
			if err != nil {
				continue
			}
			if _, payload, _ := cose.Peek1(msg); !bytes.Equal(cose.MustMarshal(c), payload) {
				t.Fatalf("written as %x", cose.MustMarshal(c))
			}
			_, _ = Verify(msg, Params{})
		}
	})
}

func FuzzPeekVerdict(f *testing.F) {
	f.Add(golden(f, "verdict.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := PeekVerdict(b)
		if err != nil {
			return
		}
		if a := v.Appraisal(); a.Status != a.Vector.Status() {
			t.Fatalf("%+v", a)
		}
		if _, payload, _ := cose.Peek1(b); !bytes.Equal(cose.MustMarshal(v), payload) {
			t.Fatalf("written as %x", cose.MustMarshal(v))
		}
		_, _ = v.DataKeys()
	})
}

func FuzzPeekChallenge(f *testing.F) {
	f.Add(golden(f, "challenge.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := PeekChallenge(b)
		if err == nil && (len(c.Nonce) != 32 || !ValidName(c.Tenant) || !ValidName(c.Gateway) || len(c.PCRs) == 0) {
			t.Fatalf("%+v", c)
		}
		if got, err := VerifyChallenge(challengeKey, b, testNow()); err == nil && !bytes.Equal(cose.MustMarshal(got), cose.MustMarshal(testChallenge)) {
			t.Fatalf("forged: %+v", got)
		}
	})
}

func FuzzParseRoots(f *testing.F) {
	f.Add(golden(f, "roots.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRoots(b)
		if err == nil && (!ValidName(r.Tenant) || r.Operator == nil || r.Owner == nil || r.Data == nil) {
			t.Fatalf("%+v", r)
		}
	})
}

package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/fxamacker/cbor/v2"
	gocose "github.com/veraison/go-cose"

	"edgekeep/internal/cose"
)

// vectors is a folder of the published vectors.
func vectors(t testing.TB, name string) string {
	t.Helper()
	dir := must(os.Getwd())(t)
	candidates := []string{os.Getenv("EDGEKEEP_VECTORS")}
	for ; candidates[0] == "" && dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		candidates = append(candidates, filepath.Join(dir, "..", "shared", "vectors"))
	}
	for _, c := range candidates {
		if _, err := os.Stat(filepath.Join(c, name)); c != "" && err == nil {
			return filepath.Join(c, name)
		}
	}
	t.Skip("the published vectors are not here: set EDGEKEEP_VECTORS to their folder")
	return ""
}

// TestPSATokens reads the EATs that another implementation made and signed. They have the
// claims' numbers in common with our evidence, but no key of their own in cnf and no kid:
// they are none of it, and refused.
func TestPSATokens(t *testing.T) {
	dir := vectors(t, "psa")
	block, _ := pem.Decode(must(os.ReadFile(filepath.Join(dir, "public.pem")))(t))
	pub := must(x509.ParsePKIXPublicKey(block.Bytes))(t).(*ecdsa.PublicKey)
	for name, numbers := range map[string]struct{ nonce, ueid, profile int64 }{
		"psa-2_0_0_sign1.bin": {10, 256, 265},
		"psa-iot-1_sign1.bin": {-75008, -75009, -75000}, // before RFC 9711 had its numbers
	} {
		msg := must(os.ReadFile(filepath.Join(dir, name)))(t)
		var m gocose.Sign1Message
		if err := m.UnmarshalCBOR(msg); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := m.Verify(nil, must(gocose.NewVerifier(gocose.AlgorithmES256, pub))(t)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var claims map[int64]cbor.RawMessage
		if err := cbor.Unmarshal(m.Payload, &claims); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var nonce, ueid []byte
		var profile string
		for number, v := range map[int64]any{numbers.nonce: &nonce, numbers.ueid: &ueid, numbers.profile: &profile} {
			if err := cbor.Unmarshal(claims[number], v); err != nil {
				t.Errorf("%s: claim %d: %v", name, number, err)
			}
		}
		if len(nonce) < 32 || len(ueid) != 33 || ueid[0] != 1 || profile == "" || profile == Profile {
			t.Errorf("%s: nonce %x, ueid %x, profile %q", name, nonce, ueid, profile)
		}
		_, err := ParseClaims(msg)
		if !errors.Is(err, cose.ErrMalformed) {
			t.Errorf("%s: %v, want malformed", name, err)
		}
		wantReason(t, name, err, "evidence: read COSE_Sign1: ")

		// In our own envelope it is still not our profile, or has claims we do not know.
		_, err = ParseClaims(must(cose.Sign1(testKey(t, epochSigner), TypEvidence, m.Payload))(t))
		wantReason(t, name+" signed by us", err, "evidence: ")
	}
}

// The numbers of RFC 9711 and RFC 8747 in our evidence, read by another decoder.
func TestEATNumbers(t *testing.T) {
	var m gocose.Sign1Message
	if err := m.UnmarshalCBOR(golden(t, "evidence.golden")); err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Nonce   []byte `cbor:"10,keyasint"`
		UEID    []byte `cbor:"256,keyasint"`
		Profile string `cbor:"265,keyasint"`
		Cnf     struct {
			Key cbor.RawMessage `cbor:"1,keyasint"`
		} `cbor:"8,keyasint"`
	}
	if err := cbor.Unmarshal(m.Payload, &claims); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(claims.Nonce, testChallenge.Nonce) || len(claims.UEID) != 33 || claims.Profile != Profile {
		t.Errorf("%+v", claims)
	}
	var key gocose.Key
	if err := key.UnmarshalCBOR(claims.Cnf.Key); err != nil {
		t.Fatal(err)
	}
	pub, ok := must(key.PublicKey())(t).(*ecdsa.PublicKey)
	if !ok || m.Verify(nil, must(gocose.NewVerifier(gocose.AlgorithmES256, pub))(t)) != nil {
		t.Error("the evidence does not verify with the key in cnf")
	}
}

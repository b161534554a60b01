package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"edgekeep/internal/cose"
	"edgekeep/tee/tpm"
)

// What the tests' evidence is about.
const (
	testIssued  = 1750000000
	epochSigner = 1 // first byte of a private key
	akSigner    = 33
	tlsSigner   = 65
	receiveSeed = 97
)

var testChallenge = Challenge{
	Tenant: "acme", Gateway: "gw7", Nonce: count(0x20, 32), Issued: testIssued, Expires: testIssued + 60, PCRs: []int{0, 7},
}

var challengeKey = count(0xc0, 32)

func testNow() time.Time { return time.Unix(testIssued+1, 0) }

// forged is a software key that speaks as an AK: what a forger has, who has no TPM. Its
// evidence is genuine in all but the AK's name. So the tests can change any part of it
// and sign it again. That a TPM makes the same is tested where there is one.
type forged struct {
	ak     *ecdsa.PrivateKey
	claims Claims
	pcrs   map[int][]byte
}

func forge(t testing.TB) *forged {
	t.Helper()
	f := &forged{
		ak:   testKey(t, akSigner),
		pcrs: map[int][]byte{0: bytes.Repeat([]byte{1}, 32), 7: bytes.Repeat([]byte{2}, 32)},
	}
	receive := must(hpke.MLKEM768P256().DeriveKeyPair(count(receiveSeed, 32)))(t).PublicKey()
	f.claims = Claims{
		Nonce: testChallenge.Nonce, Cnf: Confirmation{Key: cose.MarshalKey(&testKey(t, epochSigner).PublicKey)},
		UEID: append([]byte{1}, count(0x30, 32)...), Profile: Profile,
		Challenge: must(testChallenge.Marshal(challengeKey))(t),
		Keys: map[string]Key{
			PurposeTLS:     cose.MarshalKey(&testKey(t, tlsSigner).PublicKey),
			PurposeReceive: cose.MarshalHPKEKey(receive),
		},
		Prior: []Key{cose.MarshalKey(&testKey(t, 5).PublicKey)}, Epoch: count(0x50, 16), Command: 4, Roots: count(0x60, 32),
		Hardening: map[string]bool{"landlock": true, "seccomp": false}, Software: "edgekeep 1.0",
		Sources: []SourceHealth{{Name: "press-3", Late: true}},
	}
	f.claims.Submods = &Submods{TPM: TPM{AK: f.public(t, template(true, false, nil), &f.ak.PublicKey), PCRs: f.pcrs, Certified: map[string]Certified{}}}
	policy := tpm.PolicyDigest(f.pcrs, true)
	f.certify(t, PurposeTLS, f.public(t, template(false, false, policy), &testKey(t, tlsSigner).PublicKey))
	f.certify(t, PurposeReceive, receiveArea(t, f, receive, policy))
	return f
}

// receiveArea is the public area of the P-256 half of a hybrid key.
func receiveArea(t testing.TB, f *forged, receive hpke.PublicKey, policy []byte) []byte {
	t.Helper()
	raw := receive.Bytes()
	return f.area(template(false, true, policy), raw[len(raw)-64:])
}

// template is the public area of an AK, or of a key of the keep, without its point.
func template(ak, agreement bool, policy []byte) tpm2.TPMTPublic {
	scheme := tpm2.TPMTECCScheme{
		Scheme:  tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
	}
	if agreement {
		scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
	}
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true,
			UserWithAuth: ak, Restricted: ak, SignEncrypt: !agreement, Decrypt: agreement,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256, Scheme: scheme}),
	}
}

func (f *forged) public(t testing.TB, pub tpm2.TPMTPublic, key *ecdsa.PublicKey) []byte {
	t.Helper()
	return f.area(pub, must(key.Bytes())(t)[1:])
}

func (f *forged) area(pub tpm2.TPMTPublic, xy []byte) []byte {
	pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: xy[:32]}, Y: tpm2.TPM2BECCParameter{Buffer: xy[32:]},
	})
	return tpm2.Marshal(pub)
}

func (f *forged) sign(t testing.TB, kind tpm2.TPMST, qualifying []byte, attested tpm2.TPMUAttest) tpm.Signed {
	t.Helper()
	attest := tpm2.Marshal(tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: kind, ExtraData: tpm2.TPM2BData{Buffer: qualifying},
		ClockInfo: tpm2.TPMSClockInfo{Clock: 1000, ResetCount: 3, Safe: true}, FirmwareVersion: 0x20240125, Attested: attested,
	})
	digest := sha256.Sum256(attest)
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(must(f.ak.Sign(nil, digest[:], crypto.SHA256))(t), &sig); err != nil {
		t.Fatal(err)
	}
	return tpm.Signed{Attest: attest, Signature: tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: sig.R.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: sig.S.FillBytes(make([]byte, 32))},
		}),
	})}
}

func (f *forged) certify(t testing.TB, purpose string, area []byte) {
	t.Helper()
	name := must(tpm.Name(area))(t)
	f.claims.Submods.TPM.Certified[purpose] = Certified{Public: area, By: f.sign(t, tpm2.TPMSTAttestCertify, KeyQualifier(purpose),
		tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{
			Name: tpm2.TPM2BName{Buffer: name}, QualifiedName: tpm2.TPM2BName{Buffer: name},
		}))}
}

// quote quotes the PCRs over the binding of the claims as they are.
func (f *forged) quote(t testing.TB, pcrs ...uint) {
	t.Helper()
	h := sha256.New()
	for _, p := range pcrs {
		h.Write(f.pcrs[int(p)])
	}
	f.claims.Submods.TPM.Quote = f.sign(t, tpm2.TPMSTAttestQuote, must(f.claims.Binding())(t),
		tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
				Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...),
			}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
		}))
}

// evidence signs the claims as they are.
func (f *forged) evidence(t testing.TB) []byte {
	t.Helper()
	return must(cose.Sign1(detSigner{testKey(t, epochSigner)}, TypEvidence, cose.MustMarshal(f.claims)))(t)
}

// good is complete evidence.
func good(t testing.TB) []byte {
	t.Helper()
	f := forge(t)
	f.quote(t, 0, 7)
	return f.evidence(t)
}

func params() Params { return Params{ChallengeKey: challengeKey, Now: testNow()} }

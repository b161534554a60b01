package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"math/big"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// softAK has the public area of an AK and its private key in software: what a forger, who
// has no TPM, can show. Only that nobody vouches for its name gives it away.
type softAK struct {
	public []byte
	key    *ecdsa.PrivateKey
}

func newSoftAK(t testing.TB) softAK {
	t.Helper()
	key := must(ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{1}, 32)))(t)
	point := must(key.PublicKey.Bytes())(t)
	pub := akTemplate()
	pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	return softAK{public: tpm2.Marshal(pub), key: key}
}

func (k softAK) sign(t testing.TB, attest []byte) Signed {
	t.Helper()
	digest := sha256.Sum256(attest)
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(must(k.key.Sign(nil, digest[:], crypto.SHA256))(t), &sig); err != nil {
		t.Fatal(err)
	}
	return Signed{Attest: attest, Signature: tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: sig.R.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: sig.S.Bytes()},
		}),
	})}
}

func quoteOf(values map[int][]byte, pcrs []int) tpm2.TPMSAttest {
	h := sha256.New()
	for _, p := range pcrs {
		h.Write(values[p])
	}
	return tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote,
		ExtraData: tpm2.TPM2BData{Buffer: qualifying},
		ClockInfo: tpm2.TPMSClockInfo{Clock: 5, ResetCount: 6, RestartCount: 7, Safe: true},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: selection(pcrs), PCRDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
		}),
	}
}

func TestCheckQuoteStructure(t *testing.T) {
	ak := newSoftAK(t)
	values := map[int][]byte{0: bytes.Repeat([]byte{1}, 32), 7: bytes.Repeat([]byte{2}, 32)}
	good := quoteOf(values, []int{0, 7})
	got, err := CheckQuote(ak.public, ak.sign(t, tpm2.Marshal(good)), qualifying, values)
	if want := (Clock{ResetCount: 6, RestartCount: 7, Milliseconds: 5, Safe: true}); err != nil || got.Clock != want {
		t.Fatalf("%+v, %v", got, err)
	}
	magic := quoteOf(values, []int{0, 7})
	magic.Magic++
	nonce := quoteOf(values, []int{0, 7})
	nonce.ExtraData.Buffer = nil
	twice, bank, none := quoteOf(values, []int{0, 7}), quoteOf(values, []int{0, 7}), quoteOf(values, []int{0, 7})
	info, _ := twice.Attested.Quote()
	info.PCRSelect.PCRSelections = append(info.PCRSelect.PCRSelections, info.PCRSelect.PCRSelections[0])
	info, _ = bank.Attested.Quote()
	info.PCRSelect.PCRSelections[0].Hash = tpm2.TPMAlgSHA1
	info, _ = none.Attested.Quote()
	info.PCRSelect.PCRSelections = nil
	for name, tt := range map[string]struct {
		attest []byte
		want   error
	}{
		"not made by a TPM": {tpm2.Marshal(magic), nil},
		"other nonce":       {tpm2.Marshal(nonce), ErrBinding},
		"two banks":         {tpm2.Marshal(twice), nil},
		"SHA-1 bank":        {tpm2.Marshal(bank), nil},
		"no bank":           {tpm2.Marshal(none), nil},
		"a byte more":       {append(tpm2.Marshal(good), 0), nil},
		"nothing":           {nil, nil},
	} {
		_, err := CheckQuote(ak.public, ak.sign(t, tt.attest), qualifying, values)
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, sig := range map[string][]byte{"none": nil, "short": {0, 0x18}, "HMAC": {0, 5, 0, 0xb}} {
		if _, err := CheckQuote(ak.public, Signed{Attest: tpm2.Marshal(good), Signature: sig}, qualifying, values); !errors.Is(err, ErrSignature) {
			t.Errorf("signature %s: %v", name, err)
		}
	}
}

// What comes in evidence goes through these functions before anything in it is trusted.
func FuzzHostileStructures(f *testing.F) {
	ak := newSoftAK(f)
	values := map[int][]byte{0: bytes.Repeat([]byte{1}, 32)}
	f.Add(tpm2.Marshal(quoteOf(values, []int{0})))
	f.Add(ak.public)
	f.Add(tpm2.Marshal(keyTemplate(Signing, make([]byte, 32))))
	for _, p := range ekProfiles() {
		f.Add(tpm2.Marshal(p.template))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		signed := ak.sign(t, b)
		if q, err := CheckQuote(ak.public, signed, qualifying, values); err == nil && len(q.PCRs) > 1 {
			t.Errorf("PCRs %v are those of %v", q.PCRs, values)
		}
		_, _ = CheckQuote(ak.public, Signed{Attest: b, Signature: b}, qualifying, values)
		_, _ = CheckQuote(b, signed, qualifying, values)
		_, _ = CheckCertified(ak.public, signed, qualifying, b, Agreement, values)
		if _, err := EKHash(b); err == nil {
			_, _, _ = MakeCredential(b, qualifying, qualifying)
		}
		if CheckAK(b) == nil {
			if _, err := Name(b); err != nil {
				t.Errorf("an AK without a name: %v", err)
			}
		}
	})
}

// An EK with a modulus that is none must not crash who makes a credential for it.
func TestMakeCredentialForBadKeys(t *testing.T) {
	for _, n := range [][]byte{nil, {0}, {1}, {2}, {0xff}, bytes.Repeat([]byte{0xff}, 256), append([]byte{1}, make([]byte, 600)...)} {
		pub := tpm2.RSAEKTemplate
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: n})
		if _, err := EKHash(tpm2.Marshal(pub)); (err == nil) != (len(n) == 256) {
			t.Errorf("the hash of a modulus of %d bytes: %v", len(n), err)
		}
		if _, _, err := MakeCredential(tpm2.Marshal(pub), qualifying, qualifying); err == nil && len(n) != 256 {
			t.Errorf("a credential for a modulus of %d bytes", len(n))
		}
	}
	for _, xy := range [][]byte{nil, {0}, {1}, bytes.Repeat([]byte{0xff}, 32), bytes.Repeat([]byte{1}, 100)} {
		pub := tpm2.ECCEKTemplate
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: xy}, Y: tpm2.TPM2BECCParameter{Buffer: xy}})
		if _, err := EKHash(tpm2.Marshal(pub)); err == nil {
			t.Errorf("a point at %x has a hash", xy)
		}
		if _, _, err := MakeCredential(tpm2.Marshal(pub), qualifying, qualifying); err == nil {
			t.Errorf("a credential for a point at %x", xy)
		}
	}
}

func openRaw(path string) (*Device, error) {
	t, err := linuxudstpm.Open(path)
	if err != nil {
		return nil, err
	}
	return &Device{tpm: retrying{t}, path: path}, nil
}

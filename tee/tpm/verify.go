package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// Clock is the TPM's time as a quote shows it (TPM 2.0 Part 1 §36). Quotes of
// one TPM are ordered by ResetCount, then RestartCount; Milliseconds compare
// only within the same pair.
type Clock struct {
	_            struct{} `cbor:",toarray"`
	ResetCount   uint32
	RestartCount uint32
	Milliseconds uint64
	Safe         bool
}

// Before reports whether c is certainly older than d.
func (c Clock) Before(d Clock) bool {
	if c.ResetCount != d.ResetCount {
		return c.ResetCount < d.ResetCount
	}
	if c.RestartCount != d.RestartCount {
		return c.RestartCount < d.RestartCount
	}
	return c.Milliseconds < d.Milliseconds
}

// Quoted is what a checked quote says.
type Quoted struct {
	Clock    Clock
	Firmware uint64
	PCRs     []int // the quoted PCRs of the SHA-256 bank, ascending
}

// Errors of CheckQuote and CheckCertified, for callers that name the check.
var (
	ErrSignature = errors.New("the TPM's signature does not verify with the attestation key")
	ErrBinding   = errors.New("the TPM signed other qualifying data")
	ErrPCRDigest = errors.New("the PCR values given are not those the TPM signed")
	// ErrKeyPolicy comes with a genuine key: either PCRs have changed since it was
	// made, or it is bound to other PCRs than were quoted.
	ErrKeyPolicy = errors.New("the key is bound to another state of the machine than the one quoted")
)

// CheckAK checks that a public area is that of an attestation key as NewAK
// makes it: restricted, so that it signs only what the TPM itself made.
func CheckAK(akPublic []byte) error {
	if _, err := Name(akPublic); err != nil {
		return err
	}
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](akPublic)
	if err != nil {
		return fmt.Errorf("parsing an attestation key: %w", err)
	}
	if !sameTemplate(*pub, akTemplate()) {
		return errors.New("the attestation key is not a restricted, TPM-bound ECDSA P-256 key")
	}
	_, err = PublicKey(akPublic)
	return err
}

// CheckQuote checks a quote: the AK's signature, that the TPM made it
// (TPM_GENERATED), its qualifying data, and that values are exactly the PCRs it
// signed. It does not judge the values.
func CheckQuote(akPublic []byte, q Signed, qualifying []byte, values map[int][]byte) (Quoted, error) {
	att, err := checkSigned(akPublic, q, tpm2.TPMSTAttestQuote, qualifying)
	if err != nil {
		return Quoted{}, err
	}
	info, err := att.Attested.Quote()
	if err != nil {
		return Quoted{}, fmt.Errorf("parsing a quote: %w", err)
	}
	sel := info.PCRSelect.PCRSelections
	if len(sel) != 1 || sel[0].Hash != tpm2.TPMAlgSHA256 {
		return Quoted{}, errors.New("the quote is not over exactly the SHA-256 bank")
	}
	var idx []int
	for i, b := range sel[0].PCRSelect {
		for bit := range 8 {
			if b&(1<<bit) != 0 {
				idx = append(idx, i*8+bit)
			}
		}
	}
	h := sha256.New()
	for _, p := range idx {
		v, ok := values[p]
		if !ok || len(v) != 32 {
			return Quoted{}, fmt.Errorf("%w: PCR %d is missing", ErrPCRDigest, p)
		}
		h.Write(v)
	}
	if len(values) != len(idx) || !bytes.Equal(h.Sum(nil), info.PCRDigest.Buffer) {
		return Quoted{}, ErrPCRDigest
	}
	slices.Sort(idx)
	return Quoted{PCRs: idx, Firmware: att.FirmwareVersion, Clock: Clock{
		ResetCount: att.ClockInfo.ResetCount, RestartCount: att.ClockInfo.RestartCount,
		Milliseconds: att.ClockInfo.Clock, Safe: att.ClockInfo.Safe,
	}}, nil
}

// CheckCertified checks that the AK certified keyPublic, and that keyPublic is a
// key of the keep for this use, usable only with an auth value and only while
// the PCRs have these values.
func CheckCertified(akPublic []byte, c Signed, qualifying, keyPublic []byte, use Use, values map[int][]byte) (*ecdsa.PublicKey, error) {
	att, err := checkSigned(akPublic, c, tpm2.TPMSTAttestCertify, qualifying)
	if err != nil {
		return nil, err
	}
	info, err := att.Attested.Certify()
	if err != nil {
		return nil, fmt.Errorf("parsing a certification: %w", err)
	}
	name, err := Name(keyPublic)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(name, info.Name.Buffer) {
		return nil, errors.New("the TPM certified another key")
	}
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](keyPublic)
	if err != nil {
		return nil, fmt.Errorf("parsing a certified key: %w", err)
	}
	if !sameTemplate(*pub, keyTemplate(use, pub.AuthPolicy.Buffer)) {
		return nil, errors.New("the certified key has other attributes than a keep's key")
	}
	for p := range values { // they may come from the evidence too
		if p < 0 || p > maxPCR {
			return nil, fmt.Errorf("there is no PCR %d", p)
		}
	}
	key, err := PublicKey(keyPublic)
	if err == nil && !bytes.Equal(pub.AuthPolicy.Buffer, PolicyDigest(values, true)) {
		err = ErrKeyPolicy
	}
	return key, err
}

func checkSigned(akPublic []byte, s Signed, kind tpm2.TPMST, qualifying []byte) (*tpm2.TPMSAttest, error) {
	if err := CheckAK(akPublic); err != nil {
		return nil, err
	}
	ak, err := PublicKey(akPublic)
	if err != nil {
		return nil, err
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](s.Signature)
	if err != nil || !bytes.Equal(tpm2.Marshal(sig), s.Signature) || sig.SigAlg != tpm2.TPMAlgECDSA {
		return nil, fmt.Errorf("%w: it is not an ECDSA signature", ErrSignature)
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil || ec.Hash != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("%w: it is not an ECDSA signature with SHA-256", ErrSignature)
	}
	digest := sha256.Sum256(s.Attest)
	r, t := new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)
	if !ecdsa.Verify(ak, digest[:], r, t) {
		return nil, ErrSignature
	}
	att, err := tpm2.Unmarshal[tpm2.TPMSAttest](s.Attest)
	if err != nil || !bytes.Equal(tpm2.Marshal(att), s.Attest) {
		return nil, errors.New("the signed structure is not a canonical TPMS_ATTEST")
	}
	if att.Magic != tpm2.TPMGeneratedValue || att.Type != kind {
		return nil, errors.New("the signed structure is not of the expected kind")
	}
	if !bytes.Equal(att.ExtraData.Buffer, qualifying) {
		return nil, ErrBinding
	}
	return att, nil
}

package keep

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/attest"
)

// evidence answers a challenge. A locked keep has no keys to claim, no epoch and
// no sources: it still shows what was booted.
func (k *Keep) evidence(challenge []byte) ([]byte, error) {
	ch, err := attest.PeekChallenge(challenge)
	if err != nil {
		return nil, err
	}
	if s := k.subject(); s != "" && s != ch.Tenant+"/"+ch.Gateway {
		return nil, fmt.Errorf("the challenge is for %s/%s, this is %s", ch.Tenant, ch.Gateway, s)
	}
	c := attest.Claims{
		Nonce: ch.Nonce, Challenge: challenge,
		Cnf:  attest.Confirmation{Key: cose.MarshalKey(&k.epochKey.PublicKey)},
		UEID: append([]byte{1}, k.ekHash...), Profile: attest.Profile,
		Command: k.st.Command, Roots: k.cfg.RootsDigest,
		Hardening: k.cfg.Hardening, Software: k.cfg.Software,
	}
	sub := attest.TPM{AK: k.ident.ak.Public()}
	if k.phase != tee.PhaseLocked {
		c.Keys, c.Prior, c.Epoch, c.Sources = k.st.keys, k.st.Prior, k.st.Epoch[:], k.sealer.health()
		c.Workloads = k.workloadClaims()
		k.noteChallenge(ch.Nonce)
		sub.Certified = map[string]attest.Certified{
			attest.PurposeTLS:     {Public: k.st.TLS.Public, By: k.st.Certified[attest.PurposeTLS]},
			attest.PurposeReceive: {Public: k.st.Receive.Public, By: k.st.Certified[attest.PurposeReceive]},
		}
	}
	binding, err := c.Binding()
	if err != nil {
		return nil, err
	}
	if sub.Quote, sub.PCRs, err = k.ident.ak.Quote(binding, ch.PCRs); err != nil {
		return nil, err
	}
	c.Submods = &attest.Submods{TPM: sub}
	payload, err := cose.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encoding evidence: %w", err)
	}
	return cose.Sign1(k.epochKey, attest.TypEvidence, payload)
}

// certificateVerify is what precedes the transcript hash in the text that a TLS
// 1.3 client signs (RFC 8446 §4.4.3).
var certificateVerify = append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, client CertificateVerify\x00"...)

// signTLS signs with the TLS client key, and nothing but a TLS 1.3 client's
// CertificateVerify over a SHA-256 or SHA-384 transcript.
func (k *Keep) signTLS(r tee.SignTLS) (tee.Signature, error) {
	if k.phase != tee.PhaseEnrolled {
		return tee.Signature{}, fmt.Errorf("the keep is %s", k.phase)
	}
	hash, ok := bytes.CutPrefix(r.Text, certificateVerify)
	if !ok || len(hash) != 32 && len(hash) != 48 {
		return tee.Signature{}, errors.New("the text is not a TLS 1.3 client's CertificateVerify")
	}
	key, err := k.dev.Key(k.st.TLS, k.cfg.PCRs, k.ident.auth(attest.PurposeTLS))
	if err != nil {
		return tee.Signature{}, err
	}
	digest := sha256.Sum256(r.Text)
	der, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return tee.Signature{}, err
	}
	if !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest[:], der) {
		return tee.Signature{}, errors.New("the TPM returned a signature that does not verify")
	}
	return tee.Signature{DER: der}, nil
}

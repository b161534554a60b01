package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// Blob is an object as the TPM gives it out to be stored: its TPMT_PUBLIC and
// its private part, which only this TPM can open. It is not secret.
type Blob struct {
	_       struct{} `cbor:",toarray"`
	Public  []byte   // TPMT_PUBLIC
	Private []byte   // TPM2B_PRIVATE contents, encrypted under the parent
}

// Use says what a key of the keep may do.
type Use int

// The two uses. A key has one.
const (
	Signing   Use = iota // ECDSA P-256 with SHA-256, not restricted
	Agreement            // ECDH P-256 (TPM2_ECDH_ZGen)
)

// keyTemplate is the public area of a keep's key: everything but its point. The
// verifier rebuilds it to check a certified key, so it is fixed.
func keyTemplate(use Use, policy []byte) tpm2.TPMTPublic {
	pub := tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true,
			SignEncrypt: use == Signing, Decrypt: use == Agreement,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
	}
	scheme := tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
	if use == Signing {
		scheme = ecdsaScheme()
	}
	pub.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256, Scheme: scheme})
	return pub
}

// akTemplate is the public area of an AK but for its point.
func akTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true,
			UserWithAuth: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256, Scheme: ecdsaScheme()}),
	}
}

func ecdsaScheme() tpm2.TPMTECCScheme {
	return tpm2.TPMTECCScheme{
		Scheme:  tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
	}
}

// NewKey makes a key of the keep, bound to the current values of pcrs and to
// auth (1 to 32 bytes without a zero byte: see AuthValue).
func (d *Device) NewKey(use Use, pcrs []int, auth []byte) (Blob, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	values, err := d.readPCRs(pcrs)
	if err != nil {
		return Blob{}, err
	}
	if err := CheckPCRs(values); err != nil {
		return Blob{}, err
	}
	blob, err := d.create(d.srk, d.session(nil, coverBoth), keyTemplate(use, PolicyDigest(values, true)), auth, nil)
	if err != nil {
		return Blob{}, fmt.Errorf("creating a key: %w", err)
	}
	return blob, nil
}

func (d *Device) create(parent tpm2.NamedHandle, session tpm2.Session, pub tpm2.TPMTPublic, auth, data []byte) (Blob, error) {
	sensitive := tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: auth}}
	if data != nil {
		sensitive.Data = tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data})
	}
	cmd := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: parent.Handle, Name: parent.Name, Auth: session},
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &sensitive},
		InPublic:     tpm2.New2B(pub),
	}
	var extra []tpm2.Session
	if parent.Handle != d.srk.Handle { // the EK's policy session cannot encrypt: add one that does
		extra = append(extra, d.session(nil, coverBoth))
	}
	rsp, err := cmd.Execute(d.tpm, extra...)
	if err != nil {
		return Blob{}, explain(err)
	}
	return Blob{Public: bytes.Clone(rsp.OutPublic.Bytes()), Private: bytes.Clone(rsp.OutPrivate.Buffer)}, nil
}

func (d *Device) load(parent tpm2.NamedHandle, session tpm2.Session, b Blob) (tpm2.NamedHandle, error) {
	rsp, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: parent.Handle, Name: parent.Name, Auth: session},
		InPrivate:    tpm2.TPM2BPrivate{Buffer: b.Private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](b.Public),
	}.Execute(d.tpm)
	if err != nil {
		return tpm2.NamedHandle{}, explain(err)
	}
	name, err := Name(b.Public)
	if err != nil {
		d.flush(rsp.ObjectHandle)
		return tpm2.NamedHandle{}, err
	}
	if !bytes.Equal(name, rsp.Name.Buffer) {
		d.flush(rsp.ObjectHandle)
		return tpm2.NamedHandle{}, errors.New("the TPM loaded an object with another name than the blob's")
	}
	return tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, nil
}

// Key is a key of the keep: it is loaded for each use and flushed after it,
// because a TPM has room for three objects. It is a crypto.Signer or an
// ecdh.KeyExchanger by its use.
type Key struct {
	d    *Device
	blob Blob
	pcrs []int
	auth []byte
	pub  *ecdsa.PublicKey
}

// Key returns the key of a blob made by NewKey. Nothing is sent to the TPM yet.
func (d *Device) Key(b Blob, pcrs []int, auth []byte) (*Key, error) {
	pub, err := PublicKey(b.Public)
	if err != nil {
		return nil, err
	}
	return &Key{d: d, blob: b, pcrs: slices.Clone(pcrs), auth: bytes.Clone(auth), pub: pub}, nil
}

// Public returns the *ecdsa.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.pub }

// PublicKey returns the key as an ECDH public key. With Curve and ECDH it makes
// Key an ecdh.KeyExchanger.
func (k *Key) PublicKey() *ecdh.PublicKey {
	p, err := k.pub.ECDH()
	if err != nil {
		panic("tpm: a point that was checked at load is no longer on the curve") // our own bug
	}
	return p
}

// Curve is P-256.
func (k *Key) Curve() ecdh.Curve { return ecdh.P256() }

// Sign signs a SHA-256 digest with ECDSA and returns ASN.1 DER, as
// crypto.Signer wants. The randomness is the TPM's.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("this key signs SHA-256 digests only")
	}
	var sig []byte
	err := k.use(coverCommand, func(h tpm2.AuthHandle) error {
		rsp, err := tpm2.Sign{
			KeyHandle:  h,
			Digest:     tpm2.TPM2BDigest{Buffer: digest},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(k.d.tpm)
		if err != nil {
			return err
		}
		sig, err = derSignature(rsp.Signature)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("signing in the TPM: %w", err)
	}
	return sig, nil
}

func derSignature(s tpm2.TPMTSignature) ([]byte, error) {
	e, err := s.Signature.ECDSA()
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(e.SignatureR.Buffer), new(big.Int).SetBytes(e.SignatureS.Buffer),
	})
}

// ECDH returns the 32-byte X coordinate of the shared point.
func (k *Key) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	if peer.Curve() != ecdh.P256() {
		return nil, errors.New("this key agrees on P-256 only")
	}
	raw := peer.Bytes()
	var x []byte
	err := k.use(coverBoth, func(h tpm2.AuthHandle) error {
		rsp, err := tpm2.ECDHZGen{KeyHandle: h, InPoint: tpm2.New2B(tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: raw[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[33:65]},
		})}.Execute(k.d.tpm)
		if err != nil {
			return err
		}
		p, err := rsp.OutPoint.Contents()
		if err != nil {
			return err
		}
		x = new(big.Int).SetBytes(p.X.Buffer).FillBytes(make([]byte, 32))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("key agreement in the TPM: %w", err)
	}
	return x, nil
}

// use loads the key, has f use it in a session that covers c, and flushes it.
func (k *Key) use(c cover, f func(tpm2.AuthHandle) error) error {
	k.d.mu.Lock()
	defer k.d.mu.Unlock()
	h, err := k.d.load(k.d.srk, k.d.session(nil, coverBoth), k.blob)
	if err != nil {
		return err
	}
	defer k.d.flush(h.Handle)
	return explain(f(tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: k.d.policySession(k.pcrs, k.auth, c)}))
}

// PublicKey returns the P-256 point of a TPMT_PUBLIC.
func PublicKey(public []byte) (*ecdsa.PublicKey, error) {
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, fmt.Errorf("parsing a TPM public area: %w", err)
	}
	if pub.Type != tpm2.TPMAlgECC {
		return nil, errors.New("the TPM public area is not of an ECC key")
	}
	parms, err := pub.Parameters.ECCDetail()
	if err != nil {
		return nil, fmt.Errorf("parsing a TPM public area: %w", err)
	}
	point, err := pub.Unique.ECC()
	if err != nil {
		return nil, fmt.Errorf("parsing a TPM public area: %w", err)
	}
	if parms.CurveID != tpm2.TPMECCNistP256 || len(point.X.Buffer) > 32 || len(point.Y.Buffer) > 32 {
		return nil, errors.New("the TPM public area is not of a P-256 key")
	}
	raw := make([]byte, 65)
	raw[0] = 4
	copy(raw[33-len(point.X.Buffer):33], point.X.Buffer)
	copy(raw[65-len(point.Y.Buffer):], point.Y.Buffer)
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), raw)
	if err != nil {
		return nil, fmt.Errorf("parsing a TPM public area: %w", err)
	}
	return key, nil
}

// Name computes the name of an object: nameAlg and digest of its public area
// (TPM 2.0 Part 1 §16).
func Name(public []byte) ([]byte, error) {
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, fmt.Errorf("parsing a TPM public area: %w", err)
	}
	if pub.NameAlg != tpm2.TPMAlgSHA256 || !bytes.Equal(tpm2.Marshal(pub), public) {
		return nil, errors.New("the TPM public area is not in canonical form or has another name algorithm than SHA-256")
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return nil, err
	}
	return name.Buffer, nil
}

// PolicyDigest is the SHA-256 policy PolicyPCR(values), followed by
// PolicyAuthValue when auth is set (TPM 2.0 Part 3 §23.7 and §23.17).
func PolicyDigest(values map[int][]byte, auth bool) []byte {
	idx := make([]int, 0, len(values))
	for p := range values {
		idx = append(idx, p)
	}
	slices.Sort(idx)
	h := sha256.New()
	for _, p := range idx {
		h.Write(values[p])
	}
	pcrDigest := h.Sum(nil)
	policy := make([]byte, 32)
	if len(idx) > 0 {
		policy = extendPolicy(policy, tpm2.TPMCCPolicyPCR, tpm2.Marshal(selection(idx)), pcrDigest)
	}
	if auth {
		policy = extendPolicy(policy, tpm2.TPMCCPolicyAuthValue)
	}
	return policy
}

func extendPolicy(old []byte, cc tpm2.TPMCC, parts ...[]byte) []byte {
	h := sha256.New()
	h.Write(old)
	h.Write([]byte{byte(cc >> 24), byte(cc >> 16), byte(cc >> 8), byte(cc)})
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// AuthValue makes a TPM auth value from secret key material: 32 bytes with no
// zero byte. A TPM ignores trailing zeros of an auth value and go-tpm cuts it at
// the first; what is lost is under 0.2 bits of 256.
func AuthValue(material [32]byte) []byte {
	out := make([]byte, 32)
	for i, b := range material {
		out[i] = max(b, 1)
	}
	return out
}

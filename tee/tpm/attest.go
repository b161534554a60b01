package tpm

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// EK is the TPM's endorsement key.
type EK struct {
	Public []byte // TPMT_PUBLIC
	Cert   []byte // X.509 DER, as the manufacturer put it in NV
}

// ekProfile is one of the TCG EK Credential Profile's templates and where its
// certificate is (profile v2.5 §2.2.1.4 and §2.2.1.5).
type ekProfile struct {
	certIndex tpm2.TPMHandle
	handle    tpm2.TPMHandle // where provisioning software keeps the key, if it does
	template  tpm2.TPMTPublic
}

func ekProfiles() []ekProfile {
	return []ekProfile{
		{0x01c00002, 0x81010001, tpm2.RSAEKTemplate}, // L-1
		{0x01c0000a, 0x81010002, tpm2.ECCEKTemplate}, // L-2
	}
}

// EK reads the endorsement key and its certificate.
func (d *Device) EK() (EK, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range ekProfiles() {
		cert, err := d.readCert(p.certIndex)
		if err != nil {
			continue
		}
		_, pub, closeEK, err := d.openEK(p)
		if err != nil {
			return EK{}, fmt.Errorf("endorsement key: %w", err)
		}
		closeEK()
		return EK{Public: pub, Cert: cert}, nil
	}
	return EK{}, errors.New("the TPM has no EK certificate at NV 0x1c00002 (RSA-2048) or 0x1c0000a (ECC P-256): " +
		"a TPM whose maker cannot be checked is not admitted; a software TPM gets one from swtpm_setup --create-ek-cert")
}

// readCert reads a certificate from NV and cuts it at its ASN.1 length: what
// follows is padding.
func (d *Device) readCert(index tpm2.TPMHandle) ([]byte, error) {
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(d.tpm)
	if err != nil {
		return nil, err
	}
	nv, err := pub.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	var raw []byte
	for off := uint16(0); off < nv.DataSize; {
		n := min(nv.DataSize-off, 512)
		rsp, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName}, Size: n, Offset: off,
		}.Execute(d.tpm)
		if err != nil {
			return nil, err
		}
		if len(rsp.Data.Buffer) != int(n) {
			return nil, errors.New("short NV read")
		}
		raw = append(raw, rsp.Data.Buffer...)
		off += n
	}
	var cert asn1.RawValue
	if _, err := asn1.Unmarshal(raw, &cert); err != nil {
		return nil, fmt.Errorf("EK certificate: %w", err)
	}
	return cert.FullBytes, nil
}

// openEK returns the EK's handle, its public area, and what releases it.
func (d *Device) openEK(p ekProfile) (tpm2.NamedHandle, []byte, func(), error) {
	if rsp, err := (tpm2.ReadPublic{ObjectHandle: p.handle}).Execute(d.tpm); err == nil {
		if pub, err := rsp.OutPublic.Contents(); err == nil && sameTemplate(*pub, p.template) {
			return tpm2.NamedHandle{Handle: p.handle, Name: rsp.Name}, bytes.Clone(rsp.OutPublic.Bytes()), func() {}, nil
		}
	}
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(p.template)}.Execute(d.tpm)
	if err != nil {
		return tpm2.NamedHandle{}, nil, nil, err
	}
	return tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, bytes.Clone(rsp.OutPublic.Bytes()),
		func() { d.flush(rsp.ObjectHandle) }, nil
}

// sameTemplate compares two public areas without their key.
func sameTemplate(a, b tpm2.TPMTPublic) bool {
	a.Unique, b.Unique = tpm2.TPMUPublicID{}, tpm2.TPMUPublicID{}
	switch a.Type {
	case tpm2.TPMAlgECC:
		a.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
		b.Unique = a.Unique
	case tpm2.TPMAlgRSA:
		a.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
		b.Unique = a.Unique
	default:
		return false
	}
	return a.Type == b.Type && bytes.Equal(tpm2.Marshal(a), tpm2.Marshal(b))
}

// withEK runs f with the EK whose public area is given, or the first one with a
// certificate when it is nil.
func (d *Device) withEK(f func(tpm2.NamedHandle) error) error {
	for _, p := range ekProfiles() {
		if _, err := d.readCert(p.certIndex); err != nil {
			continue
		}
		h, _, closeEK, err := d.openEK(p)
		if err != nil {
			return err
		}
		defer closeEK()
		return f(h)
	}
	return errors.New("the TPM has no EK with a certificate")
}

// NewAK makes an attestation key under the EK. Its auth (see AuthValue) does not
// depend on PCRs: a machine in a bad state must be able to say so.
func (d *Device) NewAK(auth []byte) (Blob, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var b Blob
	err := d.withEK(func(ek tpm2.NamedHandle) error {
		var err error
		b, err = d.create(ek, d.endorsement(), akTemplate(), auth, nil)
		return err
	})
	if err != nil {
		return Blob{}, fmt.Errorf("creating an attestation key: %w", err)
	}
	return b, nil
}

// AK is a loaded attestation key.
type AK struct {
	d      *Device
	h      tpm2.NamedHandle
	auth   []byte
	public []byte
}

// LoadAK loads an attestation key. It takes one of the TPM's three places until
// it is closed.
func (d *Device) LoadAK(b Blob, auth []byte) (*AK, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ak := &AK{d: d, auth: bytes.Clone(auth), public: bytes.Clone(b.Public)}
	err := d.withEK(func(ek tpm2.NamedHandle) error {
		var err error
		ak.h, err = d.load(ek, d.endorsement(), b)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("loading the attestation key (was it made by this TPM?): %w", err)
	}
	return ak, nil
}

// Close flushes the key.
func (k *AK) Close() {
	k.d.mu.Lock()
	defer k.d.mu.Unlock()
	k.d.flush(k.h.Handle)
}

// Public returns the key's TPMT_PUBLIC.
func (k *AK) Public() []byte { return k.public }

func (k *AK) handle(c cover) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.h.Handle, Name: k.h.Name, Auth: k.d.session(k.auth, c)}
}

// Signed is a structure that the TPM made and signed.
type Signed struct {
	_         struct{} `cbor:",toarray"`
	Attest    []byte   // TPMS_ATTEST
	Signature []byte   // TPMT_SIGNATURE
}

// Quote signs the SHA-256 PCRs together with 32 qualifying bytes and returns the
// PCR values too. If a PCR changes in between it tries again, at most 5 times.
func (k *AK) Quote(qualifying []byte, pcrs []int) (Signed, map[int][]byte, error) {
	k.d.mu.Lock()
	defer k.d.mu.Unlock()
	for range 5 {
		values, err := k.d.readPCRs(pcrs)
		if err != nil {
			return Signed{}, nil, err
		}
		rsp, err := tpm2.Quote{
			SignHandle: k.handle(coverBoth), QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
			InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: selection(pcrs),
		}.Execute(k.d.tpm)
		if err != nil {
			return Signed{}, nil, fmt.Errorf("quoting PCRs %v: %w", pcrs, err)
		}
		q := Signed{Attest: bytes.Clone(rsp.Quoted.Bytes()), Signature: tpm2.Marshal(rsp.Signature)}
		if _, err := CheckQuote(k.public, q, qualifying, values); err == nil {
			return q, values, nil
		}
	}
	return Signed{}, nil, errors.New("quoting: PCRs keep changing")
}

// Certify has the AK sign the public area of a key of the keep
// (TPM2_Certify), with 32 qualifying bytes. Certifying is in the ADMIN role,
// which the key gives to its auth value (adminWithPolicy is clear): no PCRs.
func (k *AK) Certify(key *Key, qualifying []byte) (Signed, error) {
	k.d.mu.Lock()
	defer k.d.mu.Unlock()
	h, err := k.d.load(k.d.srk, k.d.session(nil, coverBoth), key.blob)
	if err != nil {
		return Signed{}, fmt.Errorf("certifying a key: %w", err)
	}
	defer k.d.flush(h.Handle)
	rsp, err := tpm2.Certify{
		ObjectHandle:   tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: k.d.session(key.auth, coverBoth)},
		SignHandle:     k.handle(coverNone),
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(k.d.tpm)
	if err != nil {
		return Signed{}, fmt.Errorf("certifying a key: %w", explain(err))
	}
	return Signed{Attest: bytes.Clone(rsp.CertifyInfo.Bytes()), Signature: tpm2.Marshal(rsp.Signature)}, nil
}

// Activate opens a credential that MakeCredential made for this EK and AK.
func (k *AK) Activate(credential, secret []byte) ([]byte, error) {
	k.d.mu.Lock()
	defer k.d.mu.Unlock()
	var out []byte
	err := k.d.withEK(func(ek tpm2.NamedHandle) error {
		rsp, err := tpm2.ActivateCredential{
			ActivateHandle: k.handle(coverBoth),
			KeyHandle:      tpm2.AuthHandle{Handle: ek.Handle, Name: ek.Name, Auth: k.d.endorsement()},
			CredentialBlob: tpm2.TPM2BIDObject{Buffer: credential},
			Secret:         tpm2.TPM2BEncryptedSecret{Buffer: secret},
		}.Execute(k.d.tpm)
		if err != nil {
			return err
		}
		out = bytes.Clone(rsp.CertInfo.Buffer)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("activating a credential (was it made for this TPM and this key?): %w", err)
	}
	return out, nil
}

// MakeCredential encrypts up to 32 bytes so that only the TPM with this EK opens
// them, and only for the AK with this name (TPM 2.0 Part 1 §24).
func MakeCredential(ekPublic, akName, value []byte) (credential, secret []byte, err error) {
	if len(value) > sha256.Size {
		return nil, nil, fmt.Errorf("making a credential of %d bytes: at most %d", len(value), sha256.Size)
	}
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](ekPublic)
	if err != nil {
		return nil, nil, fmt.Errorf("parsing an EK: %w", err)
	}
	key, err := tpm2.ImportEncapsulationKey(pub)
	if err != nil {
		return nil, nil, fmt.Errorf("parsing an EK: %w", err)
	}
	return tpm2.CreateCredential(rand.Reader, key, akName, value)
}

// EKPublicKey returns the EK's public key after checking that its area is one of
// the standard EK templates: an EK with other attributes could be used to
// sign or decrypt for anyone.
func EKPublicKey(ekPublic []byte) (crypto.PublicKey, error) {
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](ekPublic)
	if err != nil {
		return nil, fmt.Errorf("parsing an EK: %w", err)
	}
	for _, p := range ekProfiles() {
		if sameTemplate(*pub, p.template) {
			key, err := tpm2.Pub(*pub)
			if k, ok := key.(*rsa.PublicKey); ok && k.N.BitLen() != 2048 {
				err = fmt.Errorf("parsing an EK: its modulus has %d bits, not 2048", k.N.BitLen())
			}
			return key, err
		}
	}
	return nil, errors.New("the EK does not follow a standard template (TCG EK Credential Profile L-1 or L-2)")
}

// EKHash names a TPM: SHA-256 of its EK's SubjectPublicKeyInfo in DER.
func EKHash(ekPublic []byte) ([]byte, error) {
	key, err := EKPublicKey(ekPublic)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding an EK: %w", err)
	}
	sum := sha256.Sum256(spki)
	return sum[:], nil
}

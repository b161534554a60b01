package tpm

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

func TestEK(t *testing.T) {
	d := open(t)
	ek := must(d.EK())(t)
	cert := must(x509.ParseCertificate(ek.Cert))(t)
	roots, issuers := x509.NewCertPool(), x509.NewCertPool()
	for name, pool := range map[string]*x509.CertPool{"root.pem": roots, "issuer.pem": issuers} {
		pool.AppendCertsFromPEM(must(os.ReadFile(filepath.Join(maker, name)))(t))
	}
	// subjectAltName is critical and has only a directoryName in it, which names the TPM's maker.
	for i, oid := range cert.UnhandledCriticalExtensions {
		if oid.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			cert.UnhandledCriticalExtensions = append(cert.UnhandledCriticalExtensions[:i], cert.UnhandledCriticalExtensions[i+1:]...)
			break
		}
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: issuers, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Errorf("the certificate is not its maker's: %v", err)
	}
	spki := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	if hash := must(EKHash(ek.Public))(t); !bytes.Equal(hash, spki[:]) {
		t.Errorf("EKHash %x, the certificate is of %x", hash, spki)
	}
	again := must(d.EK())(t)
	if !bytes.Equal(again.Public, ek.Public) || !bytes.Equal(again.Cert, ek.Cert) {
		t.Error("read again, it differs")
	}
}

// An EK in which one attribute differs could decrypt for anyone.
func TestEKTemplate(t *testing.T) {
	for _, p := range ekProfiles() {
		pub := p.template
		if pub.Type == tpm2.TPMAlgRSA {
			pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: bytes.Repeat([]byte{0xff}, 256)})
			if _, err := EKHash(tpm2.Marshal(pub)); err != nil {
				t.Errorf("a modulus in the template: %v", err)
			}
		}
		pub.ObjectAttributes.Restricted = false
		if _, err := EKPublicKey(tpm2.Marshal(pub)); err == nil || !strings.Contains(err.Error(), "standard template") {
			t.Errorf("not restricted: %v", err)
		}
		pub = p.template
		pub.AuthPolicy = tpm2.TPM2BDigest{Buffer: make([]byte, 32)}
		if _, err := EKHash(tpm2.Marshal(pub)); err == nil || !strings.Contains(err.Error(), "standard template") {
			t.Errorf("other policy: %v", err)
		}
	}
	for _, b := range [][]byte{nil, {0}, tpm2.Marshal(akTemplate())} {
		if _, err := EKHash(b); err == nil {
			t.Errorf("%x is an EK", b)
		}
		if _, _, err := MakeCredential(b, []byte("name"), qualifying); err == nil {
			t.Errorf("a credential for %x", b)
		}
	}
}

// TestEKCertVectors puts the certificates of two makers into NV as they do, with padding
// after the end.
func TestEKCertVectors(t *testing.T) {
	dir := vectors(t, "ek")
	d := open(t)
	const index = 0x01c0000a // of L-2, which this TPM does not have
	for _, name := range []string{"nuvoton_ecdsa_sha256_der.der", "st_ecdsa_sha256_der.der"} {
		der := must(os.ReadFile(filepath.Join(dir, name)))(t)
		whole := der
		if block, _ := pem.Decode(der); block != nil {
			whole = block.Bytes
		}
		var cert asn1.RawValue
		must(asn1.Unmarshal(whole, &cert))(t)
		for _, padding := range [][]byte{nil, bytes.Repeat([]byte{0xff}, 100), make([]byte, 7)} {
			writeNV(t, d, index, append(bytes.Clone(cert.FullBytes), padding...))
			got, err := d.readCert(index)
			if err != nil || !bytes.Equal(got, cert.FullBytes) {
				t.Fatalf("%s and %d bytes of padding: read %d of %d bytes, %v", name, len(padding), len(got), len(cert.FullBytes), err)
			}
			if _, err := x509.ParseCertificate(got); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if err := d.undefine(index); err != nil {
				t.Fatal(err)
			}
		}
	}
	writeNV(t, d, index, bytes.Repeat([]byte{0xff}, 64))
	if _, err := d.readCert(index); err == nil {
		t.Error("padding alone is a certificate")
	}
	if err := d.undefine(index); err != nil {
		t.Fatal(err)
	}
	certs, err := os.ReadDir(filepath.Join(dir, "ca"))
	if err != nil || len(certs) == 0 {
		t.Fatalf("%d CA certificates, %v", len(certs), err)
	}
}

// writeNV writes data to an NV index that its owner may read and write.
func writeNV(t *testing.T, d *Device, index tpm2.TPMHandle, data []byte) {
	t.Helper()
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
		}),
	}.Execute(d.tpm)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(data); off += 512 {
		pub := must(tpm2.NVReadPublic{NVIndex: index}.Execute(d.tpm))(t)
		_, err := tpm2.NVWrite{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data[off:min(off+512, len(data))]}, Offset: uint16(off),
		}.Execute(d.tpm)
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestCredential(t *testing.T) {
	d := open(t)
	ek, ak := must(d.EK())(t), newAK(t, d)
	name := must(Name(ak.Public()))(t)
	secret := bytes.Repeat([]byte{7}, 32)
	credential, seed, err := MakeCredential(ek.Public, name, secret)
	if err != nil {
		t.Fatal(err)
	}
	if got := must(ak.Activate(credential, seed))(t); !bytes.Equal(got, secret) {
		t.Errorf("opened %x", got)
	}
	other := newAK(t, d)
	if _, err := other.Activate(credential, seed); err == nil {
		t.Error("another AK of this TPM opened it")
	}
	credential[len(credential)-1] ^= 1
	if _, err := ak.Activate(credential, seed); err == nil {
		t.Error("opened with a flipped bit")
	}
	if _, _, err := MakeCredential(ek.Public, name, make([]byte, 33)); err == nil {
		t.Error("a credential of 33 bytes")
	}
}

func TestCredentialOfAnotherTPM(t *testing.T) {
	d := open(t)
	ek, akBlob := must(d.EK())(t), must(d.NewAK(auth(1)))(t)
	sealed := must(d.Seal([]byte("x"), nil))(t)
	d.Close()
	other := openDevice(t, startTPM(t, shortDir(t)))
	ak := newAK(t, other)
	credential, seed, err := MakeCredential(ek.Public, must(Name(ak.Public()))(t), qualifying)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ak.Activate(credential, seed); err == nil || !strings.Contains(err.Error(), "made for this TPM") {
		t.Errorf("another TPM opened it: %v", err)
	}
	if _, err := other.LoadAK(akBlob, auth(1)); err == nil || !strings.Contains(err.Error(), "made by this TPM") {
		t.Errorf("another TPM loaded the AK: %v", err)
	}
	if _, err := other.Unseal(sealed, nil); err == nil || !strings.Contains(err.Error(), "made by this TPM") {
		t.Errorf("another TPM unsealed: %v", err)
	}
}

func TestAK(t *testing.T) {
	d := open(t)
	ak := newAK(t, d)
	if err := CheckAK(ak.Public()); err != nil {
		t.Error(err)
	}
	blob := must(d.NewAK(auth(1)))(t)
	blob.Public = ak.Public()
	if _, err := d.LoadAK(blob, auth(1)); err == nil {
		t.Error("loaded one key as another")
	}
	_, signing := newKey(t, d, Signing)
	_, agreement := newKey(t, d, Agreement)
	for name, public := range map[string][]byte{"EK": must(d.EK())(t).Public, "signing key": signing.Public, "ECDH key": agreement.Public} {
		if err := CheckAK(public); err == nil {
			t.Errorf("%s is taken for an AK", name)
		}
	}
	for name, change := range map[string]func(*tpm2.TPMTPublic){
		"not restricted": func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false },
		"not fixed":      func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false },
		"imported":       func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false },
		"decrypts":       func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = true },
		"other name alg": func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA384 },
	} {
		pub := must(tpm2.Unmarshal[tpm2.TPMTPublic](ak.Public()))(t)
		change(pub)
		if err := CheckAK(tpm2.Marshal(pub)); err == nil {
			t.Errorf("an AK that is %s", name)
		}
	}
}

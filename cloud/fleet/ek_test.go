package fleet

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// vectors is a folder of the published vectors.
func vectors(t testing.TB, name string) string {
	t.Helper()
	candidates := []string{os.Getenv("EDGEKEEP_VECTORS")}
	for dir, err := os.Getwd(); err == nil && candidates[0] == "" && dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
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

func read(t testing.TB, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// makers are the published CA certificates, by file name.
func makers(t testing.TB) map[string]*x509.Certificate {
	t.Helper()
	dir := vectors(t, "ek")
	files, err := filepath.Glob(filepath.Join(dir, "ca", "*.pem"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*x509.Certificate{}
	for _, f := range files {
		b, _ := pem.Decode(read(t, f))
		if b == nil {
			t.Fatalf("%s holds no PEM", f)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			t.Errorf("%s: Go does not parse it: %v", filepath.Base(f), err)
			continue
		}
		out[filepath.Base(f)] = c
	}
	if len(out) != 51 {
		t.Fatalf("%d CA certificates parse, want 51", len(out))
	}
	return out
}

func without(all map[string]*x509.Certificate, but ...string) []*x509.Certificate {
	var out []*x509.Certificate
	for name, c := range all {
		if !slices.Contains(but, name) {
			out = append(out, c)
		}
	}
	return out
}

// published is when all the published certificates used here were valid.
var published = time.Date(2024, 6, 1, 0, 0, 0, 0, time.UTC)

func TestVerifyEKPublished(t *testing.T) {
	cas, dir := makers(t), vectors(t, "ek")
	nuvoton, st := read(t, filepath.Join(dir, "nuvoton_ecdsa_sha256_der.der")), read(t, filepath.Join(dir, "st_ecdsa_sha256_der.der"))
	tests := []struct {
		name string
		der  []byte
		cas  []*x509.Certificate
		now  time.Time
		want string // part of the error; empty: accepted
	}{
		{"nuvoton", nuvoton, without(cas), published, ""},
		{"nuvoton, its CA only", nuvoton, []*x509.Certificate{cas["NUVO_2110.pem"]}, published, ""},
		{"nuvoton, its CA missing", nuvoton, without(cas, "NUVO_2110.pem"), published, "does not chain"},
		{"nuvoton, nobody trusted", nuvoton, nil, published, "does not chain"},
		{"st", st, without(cas), published, ""},
		{"st, its issuer only", st, []*x509.Certificate{cas["STM_ECC_01I.pem"]}, published, ""},
		{"st, root above it only", st, []*x509.Certificate{cas["STM_ECC_01RT.pem"]}, published, "does not chain"},
		{"st, its CAs missing", st, without(cas, "STM_ECC_01I.pem", "STM_ECC_01RT.pem"), published, "does not chain"},
		{"st, expired", st, without(cas), time.Date(2028, 7, 27, 0, 0, 0, 0, time.UTC), "expired"},
		{"st, not yet valid", st, without(cas), time.Date(2018, 7, 25, 0, 0, 0, 0, time.UTC), "not yet valid"},
		{"st, padded with 0xff", append(bytes.Clone(st), bytes.Repeat([]byte{0xff}, 100)...), without(cas), published, "trailing data"},
		{"st, padded with zero", append(bytes.Clone(st), 0), without(cas), published, "trailing data"},
		{"st, cut off", st[:len(st)-1], without(cas), published, "EK certificate"},
		{"nothing", nil, without(cas), published, "EK certificate"},
	}
	for _, x := range tests {
		t.Run(x.name, func(t *testing.T) {
			cert, err := VerifyEK(x.der, x.cas, x.now)
			switch {
			case x.want == "" && err != nil:
				t.Fatal(err)
			case x.want == "" && !bytes.Equal(cert.Raw, x.der):
				t.Fatal("another certificate came back")
			case x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)):
				t.Fatalf("got error %v, want one with %q", err, x.want)
			}
		})
	}
	cert, err := x509.ParseCertificate(st)
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.UnhandledCriticalExtensions) != 1 || !cert.UnhandledCriticalExtensions[0].Equal(oidSubjectAltName) {
		t.Fatal("the ST certificate does not test what it is here for: a critical subjectAltName that Go leaves unhandled")
	}
}

// Every bit of a certificate counts: what is flipped is refused, or makes no
// certificate.
func TestVerifyEKFlipped(t *testing.T) {
	cas := without(makers(t))
	st := read(t, filepath.Join(vectors(t, "ek"), "st_ecdsa_sha256_der.der"))
	for i := 0; i < len(st); i += 7 {
		bad := bytes.Clone(st)
		bad[i] ^= 1 << (i % 8)
		if _, err := VerifyEK(bad, cas, published); err == nil {
			t.Fatalf("accepted with bit %d of byte %d flipped", i%8, i)
		}
	}
}

// maker is a CA of our own.
type maker struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue makes a certificate, which Go itself may refuse to parse.
func issue(t testing.TB, c *x509.Certificate, by *maker, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = published.AddDate(-1, 0, 0), published.AddDate(1, 0, 0)
	}
	if by == nil {
		by = &maker{key, c}
	}
	return must(x509.CreateCertificate(rand.Reader, c, by.cert, &key.PublicKey, by.key))
}

func newMaker(t testing.TB, name string, by *maker) *maker {
	t.Helper()
	key := newKey(t)
	return &maker{key, must(x509.ParseCertificate(issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, by, key)))}
}

func TestVerifyEKMade(t *testing.T) {
	root := newMaker(t, "TPM maker", nil)
	sub := newMaker(t, "TPM maker, plant 2", root)
	evil := newMaker(t, "TPM maker", nil) // the same name, another key
	evilSub := newMaker(t, "TPM maker, plant 2", evil)
	ekUse := []asn1.ObjectIdentifier{oidEKCertificate}
	san := func(value []byte) pkix.Extension {
		return pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: value}
	}
	model := must(asn1.Marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: must(asn1.Marshal(
		asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: must(asn1.Marshal(pkix.Name{CommonName: "id:1234"}.ToRDNSequence()))}))}))
	strange := pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}
	trusted := []*x509.Certificate{root.cert, sub.cert}
	tests := []struct {
		name string
		cert *x509.Certificate
		by   *maker
		cas  []*x509.Certificate
		want string
	}{
		{"by the root", &x509.Certificate{UnknownExtKeyUsage: ekUse}, root, trusted, ""},
		{"by the intermediate", &x509.Certificate{UnknownExtKeyUsage: ekUse}, sub, trusted, ""},
		{"by the intermediate, which is not configured", &x509.Certificate{UnknownExtKeyUsage: ekUse}, sub, trusted[:1], "does not chain"},
		{"no extended key usage", &x509.Certificate{}, sub, trusted, ""},
		{"EK and another use", &x509.Certificate{UnknownExtKeyUsage: ekUse, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, sub, trusted, ""},
		{"a TLS certificate", &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, sub, trusted, "not for an EK"},
		{"any use", &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}, sub, trusted, "not for an EK"},
		{"another unknown use", &x509.Certificate{UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 3}}}, sub, trusted, "not for an EK"},
		{"expired", &x509.Certificate{UnknownExtKeyUsage: ekUse, NotBefore: published.AddDate(-2, 0, 0), NotAfter: published.AddDate(0, 0, -1)}, sub, trusted, "expired"},
		{"self-signed", &x509.Certificate{UnknownExtKeyUsage: ekUse, Subject: pkix.Name{CommonName: "TPM maker"}}, nil, trusted, "does not chain"},
		{"by an attacker's CA of the same name", &x509.Certificate{UnknownExtKeyUsage: ekUse}, evil, trusted, "does not chain"},
		{"by an attacker's intermediate of the same name", &x509.Certificate{UnknownExtKeyUsage: ekUse}, evilSub, trusted, "does not chain"},
		{"model of the TPM, critical", &x509.Certificate{UnknownExtKeyUsage: ekUse, ExtraExtensions: []pkix.Extension{san(model)}}, sub, trusted, ""},
		{"model with trailing bytes", &x509.Certificate{UnknownExtKeyUsage: ekUse, ExtraExtensions: []pkix.Extension{san(append(bytes.Clone(model), 5, 0))}}, sub, trusted, "subjectAltName is malformed"},
		{"model that is no sequence", &x509.Certificate{UnknownExtKeyUsage: ekUse, ExtraExtensions: []pkix.Extension{san([]byte{4, 0})}}, sub, trusted, "alternative name"},
		{"model with half a name", &x509.Certificate{UnknownExtKeyUsage: ekUse, ExtraExtensions: []pkix.Extension{san([]byte{0x30, 2, 0xa4, 9})}}, sub, trusted, "alternative name"},
		{"another critical extension", &x509.Certificate{UnknownExtKeyUsage: ekUse, ExtraExtensions: []pkix.Extension{strange}}, sub, trusted, "critical"},
		{"model and another critical extension", &x509.Certificate{UnknownExtKeyUsage: ekUse, ExtraExtensions: []pkix.Extension{san(model), strange}}, sub, trusted, "critical"},
	}
	for _, x := range tests {
		t.Run(x.name, func(t *testing.T) {
			_, err := VerifyEK(issue(t, x.cert, x.by, newKey(t)), x.cas, published)
			if x.want == "" && err != nil {
				t.Fatal(err)
			}
			if x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)) {
				t.Fatalf("got error %v, want one with %q", err, x.want)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

package cloud

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"

	"edgekeep/internal/durable"
)

// CA certifies servers, gateways and people for TLS.
type CA struct {
	key  crypto.Signer
	cert *x509.Certificate
}

// NewCA makes a CA and writes its certificate and key as PEM.
func NewCA(certPath, keyPath, name string, now time.Time) (*CA, error) {
	key, err := NewSigningKey(keyPath)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial(now), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	ca := &CA{key: key, cert: t}
	if ca.cert, err = ca.sign(t, &key.PublicKey); err != nil {
		return nil, err
	}
	return ca, WriteCertificate(certPath, ca.cert)
}

// LoadCA reads what NewCA wrote.
func LoadCA(certPath, keyPath string) (*CA, error) {
	key, err := LoadSigningKey(keyPath)
	if err != nil {
		return nil, err
	}
	raw, err := readFile(certPath)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM certificate", certPath)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", certPath, err)
	}
	return &CA{key: key, cert: cert}, nil
}

// Certificate is the CA's own.
func (c *CA) Certificate() *x509.Certificate { return c.cert }

// Issue certifies a client: its role in the organizational unit, who it is in
// the common name.
func (c *CA) Issue(role, cn string, pub crypto.PublicKey, now time.Time, life time.Duration) (*x509.Certificate, error) {
	if k, ok := pub.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
		return nil, errors.New("certificates are for ECDSA P-256 keys")
	}
	return c.sign(&x509.Certificate{
		SerialNumber: serial(now), Subject: pkix.Name{CommonName: cn, OrganizationalUnit: []string{role}},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, pub)
}

// IssueServer certifies a server for host names and addresses.
func (c *CA) IssueServer(hosts []string, pub crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	t := &x509.Certificate{
		SerialNumber: serial(now), Subject: pkix.Name{CommonName: hosts[0]},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(5, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	return c.sign(t, pub)
}

func (c *CA) sign(t *x509.Certificate, pub crypto.PublicKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, c.cert, pub, c.key)
	if err != nil {
		return nil, fmt.Errorf("certifying %s: %w", t.Subject, err)
	}
	return x509.ParseCertificate(der)
}

// serial is a serial number: when it was issued, in Unix seconds, and 8 random
// bytes.
func serial(now time.Time) *big.Int {
	b := make([]byte, 16)
	binary.BigEndian.PutUint64(b, uint64(now.Unix()))
	rand.Read(b[8:]) // never fails
	return new(big.Int).SetBytes(b)
}

// SerialTime reads from a serial number when its certificate was issued; 0 if it
// is not one of ours.
func SerialTime(serial []byte) int64 {
	if len(serial) > 16 || len(serial) < 9 {
		return 0
	}
	b := new(big.Int).SetBytes(serial).FillBytes(make([]byte, 16))
	return int64(binary.BigEndian.Uint64(b))
}

// WriteCertificate writes certificates as PEM.
func WriteCertificate(path string, certs ...*x509.Certificate) error {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return durable.WriteFile(path, out, 0o644)
}

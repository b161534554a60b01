package keep

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
)

func clientText(n int) []byte {
	return append(bytes.Clone(certificateVerify), make([]byte, n)...)
}

func TestSignTLS(t *testing.T) {
	g, genuine := enrolled(t)
	for _, n := range []int{32, 48} {
		sig := must(tee.SignTLS{Text: clientText(n)}.Do(g.ctx(), g))(t)
		if digest := sha256.Sum256(clientText(n)); !ecdsa.VerifyASN1(genuine.TLSKey, digest[:], sig.DER) {
			t.Errorf("%d: the signature does not verify", n)
		}
	}
	server := append(append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...), make([]byte, 32)...)
	for name, text := range map[string][]byte{
		"server":                    server,
		"nothing":                   nil,
		"a digest, as in TLS 1.2":   random(32),
		"63 spaces":                 clientText(32)[1:],
		"65 spaces":                 append([]byte{' '}, clientText(32)...),
		"no hash":                   clientText(0),
		"short":                     clientText(31),
		"a byte more":               clientText(33),
		"between SHA-256 and -384":  clientText(40),
		"a byte more than SHA-384":  clientText(49),
		"SHA-512":                   clientText(64),
		"other context":             bytes.Replace(clientText(32), []byte("1.3"), []byte("1.4"), 1),
		"no separator":              bytes.Replace(clientText(32), []byte("Verify\x00"), []byte("Verify "), 1),
		"COSE, to sign as evidence": cose.MustMarshal([]any{"Signature1", []byte{}, []byte{}, []byte{}}),
	} {
		_, err := tee.SignTLS{Text: text}.Do(g.ctx(), g)
		wantRefusal(t, name, err, "not a TLS 1.3 client's CertificateVerify")
	}
	fresh := newGateway(t)
	fresh.up()
	_, err := tee.SignTLS{Text: clientText(32)}.Do(fresh.ctx(), fresh)
	wantRefusal(t, "not enrolled", err, "the keep is new")
}

// throughKeep is the agent's use of the TLS key.
type throughKeep struct {
	g   *gateway
	pub *ecdsa.PublicKey
}

func (k throughKeep) Public() crypto.PublicKey { return k.pub }
func (k throughKeep) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("digests are not signed")
}

func (k throughKeep) SignMessage(_ io.Reader, text []byte, _ crypto.SignerOpts) ([]byte, error) {
	s, err := tee.SignTLS{Text: text}.Do(k.g.ctx(), k.g)
	return s.DER, err
}

// A TLS handshake with client authentication goes through the keep in TLS 1.3,
// and not in TLS 1.2.
func TestHandshake(t *testing.T) {
	g, genuine := enrolled(t)
	serverKey := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"broker"}, NotAfter: time.Now().Add(time.Hour)}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &serverKey.PublicKey, serverKey))(t)
	roots := x509.NewCertPool()
	roots.AddCert(must(x509.ParseCertificate(der))(t))
	for _, version := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		a, b := net.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		server := tls.Server(a, &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: serverKey}},
			ClientAuth:   tls.RequireAnyClientCert, MaxVersion: version, MinVersion: version,
		})
		client := tls.Client(b, &tls.Config{ServerName: "broker", RootCAs: roots, MinVersion: version, Certificates: []tls.Certificate{{
			Certificate: g.cloud.certificate(genuine.TLSKey), PrivateKey: throughKeep{g, genuine.TLSKey},
			SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256},
		}}})
		done := make(chan error, 1)
		go func() {
			err := client.HandshakeContext(ctx)
			if err != nil {
				b.Close()
			}
			done <- err
		}()
		err := server.HandshakeContext(ctx)
		a.Close()
		clientErr := <-done
		cancel()
		if ok := err == nil; ok != (version == tls.VersionTLS13) {
			t.Errorf("version %x: %v, %v", version, err, clientErr)
		}
	}
}

package cloud_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud"
	"edgekeep/cloud/node"
)

func writePEM(t testing.TB, path, kind string, raw []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: raw}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSigningKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.key")
	key := must(cloud.NewSigningKey(path))
	if fi := must(os.Stat(path)); fi.Mode().Perm() != 0o600 {
		t.Errorf("its mode is %s", fi.Mode())
	}
	if again := must(cloud.LoadSigningKey(path)); !key.Equal(again) {
		t.Error("read back it is another")
	}
	pkcs8 := func(k any) []byte { return must(x509.MarshalPKCS8PrivateKey(k)) }
	for name, raw := range map[string][]byte{
		"P-384":   pkcs8(must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))),
		"RSA":     pkcs8(must(rsa.GenerateKey(rand.Reader, 2048))),
		"Ed25519": pkcs8(ed25519.NewKeyFromSeed(make([]byte, 32))),
		"garbage": []byte("garbage"),
		"nothing": nil,
		"SEC 1":   must(x509.MarshalECPrivateKey(key)),
	} {
		writePEM(t, path, "PRIVATE KEY", raw)
		if _, err := cloud.LoadSigningKey(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(path, pkcs8(key), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := cloud.LoadSigningKey(path); err == nil || !strings.Contains(err.Error(), "no PEM") {
		t.Errorf("DER: %v", err)
	}
	if _, err := cloud.LoadSigningKey(path + "x"); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("no file: %v", err)
	}
	if _, err := cloud.NewSigningKey(filepath.Join(path, "x")); err == nil {
		t.Error("a key was made where none can be written")
	}
}

func TestHPKEKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.key")
	for _, hybrid := range []bool{false, true} {
		key := must(cloud.NewHPKEKey(path, hybrid))
		again := must(cloud.LoadHPKEKey(path))
		sealed := must(hpke.Seal(key.PublicKey(), hpke.HKDFSHA256(), hpke.AES256GCM(), nil, []byte("x")))
		if got, err := hpke.Open(again, hpke.HKDFSHA256(), hpke.AES256GCM(), nil, sealed); err != nil || string(got) != "x" {
			t.Errorf("hybrid %v: %v", hybrid, err)
		}
		if hybrid == (again.KEM().ID() != hpke.MLKEM768P256().ID()) {
			t.Errorf("hybrid %v: read back it is of KEM %#x", hybrid, again.KEM().ID())
		}
	}
	block, _ := pem.Decode(must(os.ReadFile(path)))
	for _, x := range []struct {
		name, kind string
		raw        []byte
	}{
		{"a signing key", "PRIVATE KEY", block.Bytes},
		{"cut off", block.Type, block.Bytes[:len(block.Bytes)-1]},
		{"nothing", block.Type, nil},
	} {
		writePEM(t, path, x.kind, x.raw)
		if _, err := cloud.LoadHPKEKey(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}

func TestSecrets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.secret")
	for n, ok := range map[int]bool{0: false, 31: false, 32: true, 33: false} {
		if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := cloud.LoadSecret(path); ok != (err == nil) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestCA(t *testing.T) {
	cert, key := filepath.Join(t.TempDir(), "ca.pem"), filepath.Join(t.TempDir(), "ca.key")
	now := time.Now()
	made := must(cloud.NewCA(cert, key, "test", now))
	loaded := must(cloud.LoadCA(cert, key))
	if !made.Certificate().Equal(loaded.Certificate()) {
		t.Error("read back it is another")
	}
	pub := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).PublicKey
	leaf := must(loaded.Issue(cloud.RoleGateway, "acme/gw1", &pub, now, time.Hour))
	pool := must(cloud.LoadPool(cert))
	for use, ok := range map[x509.ExtKeyUsage]bool{x509.ExtKeyUsageClientAuth: true, x509.ExtKeyUsageServerAuth: false} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{use}}); ok != (err == nil) {
			t.Errorf("use %d: %v", use, err)
		}
	}
	if leaf.IsCA || leaf.Subject.CommonName != "acme/gw1" {
		t.Errorf("issued %s", leaf.Subject)
	}
	if got := cloud.SerialTime(leaf.SerialNumber.Bytes()); got != now.Unix() {
		t.Errorf("its serial number says %d, it is %d", got, now.Unix())
	}
	for _, bad := range []any{&must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)).PublicKey, ed25519.PublicKey(make([]byte, 32)), nil} {
		if _, err := loaded.Issue(cloud.RoleGateway, "acme/gw1", bad, now, time.Hour); err == nil {
			t.Errorf("a certificate for a %T", bad)
		}
	}
	server := must(loaded.IssueServer([]string{"127.0.0.1", "cloud.example"}, &pub, now))
	for _, host := range []string{"127.0.0.1", "cloud.example"} {
		if err := server.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if _, err := server.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("a server's certificate is good for a client")
	}
	for _, p := range []string{key, cert + "x"} {
		if _, err := cloud.LoadPool(p); err == nil {
			t.Errorf("a pool from %s", p)
		}
		if _, err := cloud.LoadCA(p, key); err == nil {
			t.Errorf("a CA from %s", p)
		}
	}
}

func TestSerialTime(t *testing.T) {
	for _, x := range []struct {
		hex  string
		want int64
	}{{"", 0}, {"01", 0}, {"0102030405060708", 0}, {"5f0102030405060708", 0x5f}, {"65a1b2c30102030405060708", 0x65a1b2c3}, {strings.Repeat("01", 17), 0}} {
		n, _ := new(big.Int).SetString("0"+x.hex, 16)
		raw := n.Bytes()
		if got := cloud.SerialTime(raw); got != x.want {
			t.Errorf("%s: %d", x.hex, got)
		}
	}
}

func TestTenants(t *testing.T) {
	home := t.TempDir()
	if _, err := node.Init(node.InitOptions{Dir: home, Tenant: "acme", Hosts: []string{"127.0.0.1"}, Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(home, "tenants")
	tenants := &cloud.Tenants{Dir: dir}
	a, err := tenants.Tenant("acme")
	if err != nil || a.Tenant != "acme" || a.Dir != filepath.Join(dir, "acme") || len(a.Bundle) == 0 {
		t.Fatalf("%+v: %v", a, err)
	}
	if err := os.Rename(filepath.Join(dir, "acme"), filepath.Join(dir, "globex")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "broken"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "broken/roots.cbor"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"globex": "are of tenant acme", "empty": "not known here", "nobody": "not known here", "broken": "trust roots",
		"": "not a tenant's name", "../tenants/globex": "not a tenant's name", "*": "not a tenant's name",
	} {
		if _, err := tenants.Tenant(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
}

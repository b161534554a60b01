package cloud

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"edgekeep/internal/durable"
	"edgekeep/tee/attest"
)

func readFile(path string) ([]byte, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return raw, nil
}

// NewSigningKey makes a P-256 key and writes it as PKCS #8 PEM, mode 0600.
func NewSigningKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, durable.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// LoadSigningKey reads what NewSigningKey wrote.
func LoadSigningKey(path string) (crypto.Signer, error) {
	raw, err := readFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM key", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%s holds another kind of key than ECDSA P-256", path)
	}
	return ec, nil
}

// LoadSecret reads a secret of 32 bytes.
func LoadSecret(path string) ([]byte, error) {
	raw, err := readFile(path)
	if err == nil && len(raw) != 32 {
		err = fmt.Errorf("%s: a secret has 32 bytes", path)
	}
	return raw, err
}

// hpkeBlock are the PEM types of HPKE private keys, by KEM.
var hpkeBlock = map[string]hpke.KEM{
	"EDGEKEEP HPKE P-256 PRIVATE KEY":         hpke.DHKEM(ecdh.P256()),
	"EDGEKEEP HPKE MLKEM768-P256 PRIVATE KEY": hpke.MLKEM768P256(),
}

// NewHPKEKey makes an HPKE key, hybrid or P-256 only, and writes it as PEM with
// the bytes of SerializePrivateKey (RFC 9180 §7.1.2).
func NewHPKEKey(path string, hybrid bool) (hpke.PrivateKey, error) {
	kind := "EDGEKEEP HPKE P-256 PRIVATE KEY"
	if hybrid {
		kind = "EDGEKEEP HPKE MLKEM768-P256 PRIVATE KEY"
	}
	key, err := hpkeBlock[kind].GenerateKey()
	if err != nil {
		return nil, err
	}
	raw, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	return key, durable.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: raw}), 0o600)
}

// LoadHPKEKey reads what NewHPKEKey wrote.
func LoadHPKEKey(path string) (hpke.PrivateKey, error) {
	raw, err := readFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM key", path)
	}
	kem, ok := hpkeBlock[block.Type]
	if !ok {
		return nil, fmt.Errorf("%s holds a %s, not an HPKE key", path, block.Type)
	}
	key, err := kem.NewPrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return key, nil
}

// Tenants gives the trust roots of tenants: DIR/{tenant}/roots.cbor.
type Tenants struct {
	Dir string

	mu     sync.Mutex // protects what follows
	loaded map[string]Tenant
}

// Tenant is a tenant's trust roots and where the rest of its files are.
type Tenant struct {
	attest.Trusted
	Bundle []byte
	Dir    string
}

// Tenant returns a tenant's roots.
func (t *Tenants) Tenant(name string) (Tenant, error) {
	if !attest.ValidName(name) {
		return Tenant{}, fmt.Errorf("not a tenant's name: %.64q", name)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if r, ok := t.loaded[name]; ok {
		return r, nil
	}
	dir := filepath.Join(t.Dir, name)
	bundle, err := os.ReadFile(filepath.Join(dir, "roots.cbor"))
	if errors.Is(err, os.ErrNotExist) {
		return Tenant{}, fmt.Errorf("tenant %s is not known here: make it with `edgekeep-cloud init --tenant %s`", name, name)
	}
	if err != nil {
		return Tenant{}, fmt.Errorf("trust roots of %s: %w", name, err)
	}
	roots, err := attest.ParseRoots(bundle)
	if err != nil {
		return Tenant{}, err
	}
	if roots.Tenant != name {
		return Tenant{}, fmt.Errorf("the trust roots in %s are of tenant %s", dir, roots.Tenant)
	}
	if t.loaded == nil {
		t.loaded = map[string]Tenant{}
	}
	t.loaded[name] = Tenant{Trusted: roots, Bundle: bundle, Dir: dir}
	return t.loaded[name], nil
}

package swtpm

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

func TestManufacturer(t *testing.T) {
	dir := shortDir(t)
	ca := filepath.Join(dir, "maker")
	type result struct {
		tpm *TPM
		err error
	}
	results := make(chan result)
	for _, name := range []string{"a", "b"} { // at the same time, one manufacturer
		go func() {
			tpm, err := Start(t.Context(), Options{Dir: filepath.Join(dir, name), CADir: ca})
			results <- result{tpm, err}
		}()
	}
	serials := map[string]bool{}
	for range 2 {
		r := <-results
		if r.err != nil {
			t.Error(r.err)
			continue
		}
		defer r.tpm.Kill()
		roots, issuers := x509.NewCertPool(), x509.NewCertPool()
		addPEM(t, roots, filepath.Join(r.tpm.CADir(), "root.pem"))
		addPEM(t, issuers, filepath.Join(r.tpm.CADir(), "issuer.pem"))
		for _, index := range []tpm2.TPMHandle{0x01c00002, 0x01c00016} {
			cert, err := x509.ParseCertificate(readNV(t, r.tpm, index))
			if err != nil {
				t.Fatalf("EK certificate %x: %v", index, err)
			}
			serials[cert.SerialNumber.String()] = true
			// The critical subjectAltName holds TPM attributes only (TCG EK
			// Credential Profile 3.2.9), which crypto/x509 does not know.
			cert.UnhandledCriticalExtensions = nil
			_, err = cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: issuers, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			if err != nil {
				t.Errorf("EK certificate %x does not chain to the manufacturer: %v", index, err)
			}
		}
	}
	if len(serials) != 4 {
		t.Errorf("4 EK certificates have %d serial numbers", len(serials))
	}
	names, err := filepath.Glob(filepath.Join(ca, "*.pem"))
	if err != nil || len(names) != 2 {
		t.Errorf("the manufacturer publishes %v, %v; want root.pem and issuer.pem", names, err)
	}
	if info, err := os.Stat(filepath.Join(ca, "private")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the manufacturer's private directory: %v, %v", info, err)
	}
}

func addPEM(t *testing.T, pool *x509.CertPool, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			t.Errorf("%s holds a %s", path, block.Type)
		}
	}
	if !pool.AppendCertsFromPEM(data) {
		t.Fatalf("%s holds no certificate", path)
	}
}

func TestHalfMadeIsMadeAgain(t *testing.T) {
	dir := shortDir(t)
	for _, name := range []string{"state.new", "manufacturer"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "state.new", "tpm2-00.permall"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	startTPM(t, Options{Dir: dir})
}

// TestCancel stops the manufacturing half-way. Nothing may keep running in the
// directory, and the next start has to succeed.
func TestCancel(t *testing.T) {
	dir := shortDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for ctx.Err() == nil { // until swtpm_setup has begun to write
			if entries, _ := os.ReadDir(filepath.Join(dir, "state.new")); len(entries) > 0 {
				cancel()
			}
		}
	}()
	if _, err := Start(ctx, Options{Dir: dir, CADir: maker}); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled start: %v", err)
	}
	if pids := users(t, dir); len(pids) > 0 {
		t.Errorf("processes are left behind: %v", pids)
	}
	startTPM(t, Options{Dir: dir, CADir: maker})
}

// users lists the processes that name dir on their command line.
func users(t *testing.T, dir string) (found []string) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range lines {
		if line, err := os.ReadFile(path); err == nil && bytes.Contains(line, []byte(dir)) {
			found = append(found, path+": "+string(line))
		}
	}
	return found
}

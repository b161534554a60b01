package tpm

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckquote has tpm2-tools judge a quote. The files are the structures as they are:
// attest (TPMS_ATTEST), sig (TPMT_SIGNATURE), pcrs (the values one after the other, in
// ascending order of their indices), ak.pem (SubjectPublicKeyInfo).
//
//	tpm2_checkquote -u ak.pem -m attest -s sig -f pcrs -l sha256:0,1,7 -q QUALIFYING-HEX
//
// The tool holds the values against the signed digest, and takes the indices of -l only
// to print them: which PCRs were quoted, CheckQuote says.
func TestCheckquote(t *testing.T) {
	program, err := exec.LookPath("tpm2_checkquote")
	if err != nil && os.Getenv("CI") == "" {
		t.Skip("tpm2_checkquote is missing (apt-get install tpm2-tools)")
	}
	d := open(t)
	ak := newAK(t, d)
	pcrs := []int{0, 1, 7, 14}
	q, values, err := ak.Quote(qualifying, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	var all []byte
	for _, p := range pcrs {
		list = append(list, fmt.Sprint(p))
		all = append(all, values[p]...)
	}
	spki := must(x509.MarshalPKIXPublicKey(must(PublicKey(ak.Public()))(t)))(t)
	good := map[string][]byte{
		"ak.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}),
		"attest": q.Attest, "sig": q.Signature, "pcrs": all,
	}
	check := func(change string, nonce []byte) error {
		dir := t.TempDir()
		for name, b := range good {
			b = bytes.Clone(b)
			if name == change {
				b[len(b)-1] ^= 1
			}
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c := exec.Command(program, "-u", "ak.pem", "-m", "attest", "-s", "sig", "-f", "pcrs",
			"-l", "sha256:"+strings.Join(list, ","), "-q", hex.EncodeToString(nonce))
		c.Dir, c.Env = dir, append(os.Environ(), "TPM2TOOLS_TCTI=none")
		out, err := c.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if err := check("", qualifying); err != nil {
		t.Error(err)
	}
	for _, change := range []string{"attest", "sig", "pcrs"} {
		if check(change, qualifying) == nil {
			t.Errorf("taken with a flipped bit in %s", change)
		}
	}
	if check("", make([]byte, 32)) == nil {
		t.Error("taken with other qualifying data")
	}
}

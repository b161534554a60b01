package attest

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"edgekeep/tee/tpm"
)

// Extract writes the TPM's part of evidence to dir, which is made if need be, in
// the formats of tpm2-tools, so that a quote can be checked with none of our code:
//
//	ak.pem      the attestation key, SubjectPublicKeyInfo
//	quote.msg   TPMS_ATTEST
//	quote.sig   TPMT_SIGNATURE
//	pcrs.bin    the PCR values, 32 bytes each, in ascending order of their indices
//	README.txt  the tpm2_checkquote command
//
// Nothing is verified here: a forged quote is written as it is, and the command
// refuses it. The qualifying data in the command are those that the claims ask
// for, so it also says whether the quote is bound to this evidence.
func Extract(dir string, evidence []byte) error {
	c, err := ParseClaims(evidence)
	if err != nil {
		return err
	}
	t := c.Submods.TPM
	ak, err := tpm.PublicKey(t.AK)
	if err != nil {
		return fmt.Errorf("evidence: attestation key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(ak)
	if err != nil {
		return fmt.Errorf("evidence: attestation key: %w", err)
	}
	binding, err := c.Binding()
	if err != nil {
		return fmt.Errorf("evidence: %w", err)
	}
	var list []string
	var values []byte
	for _, p := range slices.Sorted(maps.Keys(t.PCRs)) {
		list = append(list, strconv.Itoa(p))
		values = append(values, t.PCRs[p]...)
	}
	command := fmt.Sprintf("tpm2_checkquote -u ak.pem -m quote.msg -s quote.sig -f pcrs.bin -l sha256:%s -g sha256 -q %x\n",
		strings.Join(list, ","), binding)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("extracting the quote: %w", err)
	}
	for name, data := range map[string][]byte{
		"ak.pem":    pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}),
		"quote.msg": t.Quote.Attest, "quote.sig": t.Quote.Signature, "pcrs.bin": values, "README.txt": []byte(command),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return fmt.Errorf("extracting the quote: %w", err)
		}
	}
	return nil
}

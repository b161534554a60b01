package main

import (
	"crypto/ecdsa"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// finding is what verify says of a file.
type finding struct {
	Kind    string         `json:"kind"`
	Checks  []attest.Check `json:"-"`
	Listed  []listed       `json:"checks"`
	Details map[string]any `json:"details"`
	OK      bool           `json:"ok"` // nothing failed; see which checks were skipped
	verdict *attest.Verdict
}

type listed struct {
	Check  string `json:"check"`
	Result string `json:"result"`
	Detail string `json:"detail"`
}

func (f *finding) check(name string, err error, ok string) {
	c := attest.Check{Name: name, Result: attest.OK, Detail: ok}
	if err != nil {
		c.Result, c.Detail = attest.Failed, err.Error()
	}
	f.Checks = append(f.Checks, c)
}

func (f *finding) skip(name, why string) {
	f.Checks = append(f.Checks, attest.Check{Name: name, Result: attest.Skipped, Detail: why})
}

func (a *app) verifyCommand() *cobra.Command {
	var rootsPath, epochKey, extract string
	c := &cobra.Command{
		Use: "verify FILE", Short: "Check a saved evidence, verdict, record, chunk, checkpoint or watermark offline, and say which it is", Args: cobra.ExactArgs(1),
		Long: "Says what a file is and checks all that can be checked without the cloud. Signatures by\n" +
			"the cloud need the trust roots (--roots, or those of your kit); signatures by a gateway\n" +
			"need its epoch key, which is in its evidence (--evidence).",
		RunE: func(_ *cobra.Command, args []string) error {
			raw, err := os.ReadFile(args[0])
			if err != nil {
				return fmt.Errorf("reading the file: %w", err)
			}
			v := verifier{roots: loadRoots(rootsPath, a.kit)}
			if epochKey != "" {
				if v.keys, err = keysFrom(epochKey); err != nil {
					return err
				}
			}
			f, err := v.verify(raw)
			if err != nil {
				return err
			}
			if extract != "" {
				if f.Kind != "evidence" {
					return fmt.Errorf("--extract takes the TPM quote out of evidence; this is a %s", f.Kind)
				}
				if err := attest.Extract(extract, raw); err != nil {
					return err
				}
			}
			return a.report(args[0], f, extract)
		},
	}
	c.Flags().StringVar(&rootsPath, "roots", "", "trust roots of the tenant, roots.cbor")
	c.Flags().StringVar(&epochKey, "evidence", "", "evidence or verdict of the gateway that signed the file")
	c.Flags().StringVar(&extract, "extract", "", "write TPM quote, signature, PCRs and AK to `DIR`, for tpm2_checkquote")
	return c
}

func (a *app) report(path string, f *finding, extract string) error {
	f.OK = true
	for _, c := range f.Checks {
		f.Listed = append(f.Listed, listed{c.Name, c.Result, c.Detail})
		f.OK = f.OK && c.Result != attest.Failed
	}
	err := a.print(f, func(w io.Writer) {
		fmt.Fprintf(w, "%s: %s\n\n", path, f.Kind)
		if f.verdict != nil {
			printVerdict(w, *f.verdict)
			fmt.Fprintln(w, "\nChecked here")
		}
		for _, c := range f.Checks {
			fmt.Fprintf(w, "  %-7s %-14s %s\n", c.Result, c.Name, c.Detail)
		}
		f.printDetails(w)
		if extract != "" {
			fmt.Fprintf(w, "\nWrote the quote in tpm2-tools' formats to %s: README.txt there has the command.\n", extract)
		}
	})
	if err == nil && !f.OK {
		err = errors.New("a check failed")
	}
	return err
}

func (f *finding) printDetails(w io.Writer) {
	if f.verdict != nil {
		return // printed before
	}
	fmt.Fprintln(w)
	for _, k := range []string{"subject", "stream", "epoch", "seq", "head", "records", "software"} {
		if v, ok := f.Details[k]; ok {
			fmt.Fprintf(w, "  %-9s %v\n", k, v)
		}
	}
	pcrs, _ := f.Details["pcrs"].(map[int]string)
	for _, i := range slices.Sorted(maps.Keys(pcrs)) {
		fmt.Fprintf(w, "  pcr %-5d %s\n", i, pcrs[i])
	}
}

// loadRoots reads trust roots; nil where there are none.
func loadRoots(path, kit string) *attest.Trusted {
	if path == "" {
		path = filepath.Join(kit, "roots.cbor")
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	r, err := attest.ParseRoots(raw)
	if err != nil {
		return nil
	}
	return &r
}

// keysFrom takes a gateway's epoch keys out of its evidence or verdict.
func keysFrom(path string) ([]*ecdsa.PublicKey, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the evidence: %w", err)
	}
	if v, err := attest.PeekVerdict(raw); err == nil {
		return v.DataKeys()
	}
	c, err := attest.ParseClaims(raw)
	if err != nil {
		return nil, fmt.Errorf("%s is neither evidence nor a verdict: %w", path, err)
	}
	return attest.Verdict{Cnf: c.Cnf, Prior: c.Prior}.DataKeys()
}

// verifier holds what a file can be checked against.
type verifier struct {
	roots *attest.Trusted
	keys  []*ecdsa.PublicKey
}

func (v verifier) verify(raw []byte) (*finding, error) {
	if h, _, err := cose.Peek1(raw); err == nil {
		return v.signed(raw, h)
	}
	if h, err := sealing.ParseRecord(raw); err == nil {
		f := &finding{Kind: "sealed record", Details: map[string]any{
			"stream": h.Stream, "epoch": h.Epoch.String(), "seq": h.Seq, "head": hex.EncodeToString(sealing.Hash(raw)),
		}}
		f.check("form", nil, "a COSE_Encrypt0 of this profile; its IV follows from its sequence")
		f.skip("content", "only a consumer's key opens it; a checkpoint over its hash authenticates it")
		return f, nil
	}
	if c, pos, err := sealing.ParseChunk(raw); err == nil {
		f := v.checkpoint("chunk", pos.Checkpoint, pos.Signer)
		f.Details["records"] = len(c.Records)
		f.check("chain", nil, "records follow each other by sequence and hash; the checkpoint covers the last")
		v.byGateway(f, func(k *ecdsa.PublicKey) error { return sealing.VerifyChunk(c, k) })
		return f, nil
	}
	if r, err := attest.ParseRoots(raw); err == nil {
		f := &finding{Kind: "bundle of trust roots", Details: map[string]any{"subject": r.Tenant, "head": hex.EncodeToString(r.Digest)}}
		f.check("form", nil, "its SHA-256 is what keep.toml calls roots")
		return f, nil
	}
	return nil, errors.New("this is no evidence, verdict, chunk, record, checkpoint, watermark, result or bundle of trust roots of ours: " +
		"the bytes follow none of the formats in docs/protocol.md")
}

func (v verifier) signed(raw []byte, h cose.Header) (*finding, error) {
	switch h.Typ {
	case attest.TypEvidence:
		return v.evidence(raw)
	case attest.TypVerdict:
		return v.verdict(raw)
	case sealing.TypCheckpoint, sealing.TypOldest, sealing.TypWatermark:
		c, signer, err := sealing.PeekCheckpoint(raw)
		if err != nil {
			return nil, err
		}
		kind := map[string]string{sealing.TypCheckpoint: "checkpoint", sealing.TypOldest: "statement of the oldest chunk", sealing.TypWatermark: "watermark"}[h.Typ]
		f := v.checkpoint(kind, c, signer)
		verify := func(k *ecdsa.PublicKey) error {
			_, err := sealing.VerifyCheckpoint(k, h.Typ, raw)
			return err
		}
		if h.Typ == sealing.TypWatermark {
			v.byCloud(f, func(r attest.Trusted) error { return verify(r.Fleet) })
		} else {
			v.byGateway(f, verify)
		}
		return f, nil
	case message.TypResult:
		f := &finding{Kind: "command's result", Details: map[string]any{}}
		v.byGateway(f, func(k *ecdsa.PublicKey) error {
			r, err := message.VerifyResult(k, raw)
			f.Details["subject"], f.Details["seq"] = r.Subject, r.Sequence
			return err
		})
		return f, nil
	}
	return nil, fmt.Errorf("this is a signed message of type %s, which is not checked offline", h.Typ)
}

func (v verifier) evidence(raw []byte) (*finding, error) {
	g, err := attest.Verify(raw, attest.Params{})
	if err != nil && g.Checks == nil {
		return nil, err
	}
	f := &finding{Kind: "evidence", Checks: g.Checks, Details: map[string]any{
		"subject": g.Challenge.Tenant + "/" + g.Challenge.Gateway, "software": g.Claims.Software, "epoch": hex.EncodeToString(g.Claims.Epoch),
	}}
	if g.Claims.Submods != nil {
		pcrs := map[int]string{}
		for i, p := range g.Claims.Submods.TPM.PCRs {
			pcrs[i] = hex.EncodeToString(p)
		}
		f.Details["pcrs"] = pcrs
	}
	f.skip("policy", "whether these PCRs are acceptable is the verifier's question: its verdict answers it")
	return f, nil
}

func (v verifier) verdict(raw []byte) (*finding, error) {
	d, err := attest.PeekVerdict(raw)
	if err != nil {
		return nil, err
	}
	f := &finding{Kind: "verdict", Details: verdictJSON(d), verdict: &d}
	v.byCloud(f, func(r attest.Trusted) error {
		_, err := attest.VerifyVerdict(r.Verifier, raw)
		return err
	})
	return f, nil
}

func (v verifier) checkpoint(kind string, c sealing.Checkpoint, signer []byte) *finding {
	return &finding{Kind: kind, Details: map[string]any{
		"subject": c.Subject, "stream": c.Stream, "epoch": c.Epoch.String(), "seq": c.Seq, "head": hex.EncodeToString(c.Head),
		"signer": hex.EncodeToString(signer),
	}}
}

func (v verifier) byCloud(f *finding, verify func(attest.Trusted) error) {
	if v.roots == nil {
		f.skip("signature", "the cloud's key is needed: give --roots, or a kit with roots.cbor")
		return
	}
	f.check("signature", verify(*v.roots), "verifies with the trust roots of "+v.roots.Tenant)
}

func (v verifier) byGateway(f *finding, verify func(*ecdsa.PublicKey) error) {
	if len(v.keys) == 0 {
		f.skip("signature", "the gateway's epoch key is needed: give its evidence or verdict with --evidence")
		return
	}
	err := errors.New("no key in the evidence has signed it")
	for _, k := range v.keys {
		if e := verify(k); e == nil {
			err = nil
			break
		}
	}
	f.check("signature", err, "verifies with an epoch key of the gateway")
}

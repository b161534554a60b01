package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/cloud/fleet"
	"edgekeep/tee/attest"
	"edgekeep/workload"
)

func (a *app) workloadInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect INSTANCE", Short: "Show an instance's ledger entry, history, bundle, and its holder's evidence", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				rec, err := c.Inspect(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				m, err := workload.VerifyManifest(c.Roots.Operator, rec.Manifest)
				if err == nil && !bytes.Equal(workload.ID(rec.Manifest), rec.Entry.Bundle) {
					err = errors.New("the cloud sent another bundle's manifest")
				}
				if err != nil {
					return err
				}
				v := inspected{rec: rec, manifest: m, line: instanceLine{
					Instance: args[0], Workload: m.Name, Version: m.Version, Holder: rec.Entry.Holder, Epoch: rec.Entry.Epoch, Moves: rec.Moves, State: "stopped",
				}}
				last := rec.History[len(rec.History)-1]
				v.line.Since, v.line.By = when(last.Time), last.By
				if rec.Entry.Holder != "" {
					s, err := evidence(cmd.Context(), c.Saved, rec.Entry.Holder)
					v.line.fill(s, err)
					v.claims, v.seen = s.of(args[0], rec.Entry.Epoch)
					v.verdict = s.Verdict
				}
				return a.print(v.json(), v.print)
			})
		},
	}
}

// inspected is all that is known of an instance.
type inspected struct {
	rec      fleet.Record
	manifest workload.Manifest
	line     instanceLine
	seen     bool // the holder's evidence has it
	claims   attest.Workload
	verdict  attest.Verdict
}

func (i inspected) json() map[string]any {
	history := []map[string]any{}
	for n, e := range i.rec.History {
		history = append(history, map[string]any{
			"epoch": e.Epoch, "holder": e.Holder, "lines_after": e.Line, "lines_until": i.fence(n), "owner": e.Owner,
			"attempt": hex.EncodeToString(e.Attempt), "by": e.By, "time": time.Unix(e.Time, 0).UTC(),
		})
	}
	out := map[string]any{
		"instance": i.line, "bundle": hex.EncodeToString(i.rec.Entry.Bundle), "manifest": manifestJSON(i.manifest), "history": history,
		"head": hex.EncodeToString(i.rec.Entry.Head), "receive_key": hex.EncodeToString(i.rec.Entry.Receive), "evidence": nil,
	}
	if i.seen {
		models := []string{}
		for _, m := range i.claims.Models {
			models = append(models, hex.EncodeToString(m))
		}
		out["evidence"] = map[string]any{
			"evidence_sha256": hex.EncodeToString(i.verdict.EvidenceHash), "verdict": attest.Tier(i.verdict.Appraisal().Status), "assurance": i.verdict.Assurance,
			"time": time.Unix(i.verdict.IssuedAt, 0).UTC(), "bundle": hex.EncodeToString(i.claims.Bundle),
			"module_sha256": hex.EncodeToString(i.claims.Module), "rewritten_sha256": hex.EncodeToString(i.claims.Rewritten), "rewriter": i.claims.Rewriter,
			"models": models, "phase": i.claims.Phase, "running": i.claims.Running, "compiler": i.claims.Compiler, "protection": i.claims.Protection,
			"failures": i.claims.Failures, "reason": i.claims.Reason,
		}
	}
	return out
}

// fence is the last line of a history's event that counts, nil if it is the
// current one.
func (i inspected) fence(n int) any {
	if n+1 < len(i.rec.History) {
		return i.rec.History[n+1].Line
	}
	return nil
}

func (i inspected) print(w io.Writer) {
	l := i.line
	fmt.Fprintf(w, "%s  %s %s  %s\n", l.Instance, l.Workload, l.Version, l.State)
	if l.Reason != "" {
		fmt.Fprintf(w, "  reason    %s\n", l.Reason)
	}
	fmt.Fprintf(w, "  holder    %s, epoch %d, since %s by %s; moved %d times\n", orNobody(l.Holder), l.Epoch, l.Since, l.By, l.Moves)
	fmt.Fprintf(w, "\nBundle, signed by the operator\n  id        %x\n", i.rec.Entry.Bundle)
	printManifest(w, i.manifest)
	if len(i.manifest.Args) > 0 {
		fmt.Fprintf(w, "  args      %q\n", i.manifest.Args)
	}
	if i.seen {
		i.printEvidence(w)
	}
	fmt.Fprintln(w, "\nHistory: whose results count, by the ledger")
	for n, e := range i.rec.History {
		until := "goes on"
		if f := i.fence(n); f != nil {
			until = fmt.Sprintf("until line %d, later ones are fenced", f)
		}
		fmt.Fprintf(w, "  epoch %-4d %-12s after line %d, %s; by %s, %s\n", e.Epoch, orNobody(e.Holder), e.Line, until, e.By, when(e.Time))
	}
}

func (i inspected) printEvidence(w io.Writer) {
	c := i.claims
	fmt.Fprintf(w, "\nEvidence of %s, verified %s, assurance %s\n", i.verdict.Subject, when(i.verdict.IssuedAt), i.verdict.Assurance)
	fmt.Fprintf(w, "  module    %x: %s\n", c.Module, same(bytes.Equal(c.Module, i.manifest.Module) && bytes.Equal(c.Bundle, i.rec.Entry.Bundle)))
	fmt.Fprintf(w, "  runs as   %s\n", runsAs(c))
	for n, m := range c.Models {
		fmt.Fprintf(w, "  model     %x: %s\n", m, same(n < len(i.manifest.Models) && bytes.Equal(m, i.manifest.Models[n].Hash)))
	}
	fmt.Fprintf(w, "  memory    %s\n  phase     %s; %d failures\n", orUnknown(c.Protection), stateText(c), c.Failures)
}

func same(ok bool) string {
	if ok {
		return "that of the bundle"
	}
	return "NOT that of the bundle"
}

func runsAs(c attest.Workload) string {
	if len(c.Rewritten) == 0 {
		return "not known: no runner has it"
	}
	how := "interpreted"
	if c.Compiler {
		how = "compiled"
	}
	return fmt.Sprintf("%x, by version %s of the rules, %s", c.Rewritten, c.Rewriter, how)
}

func orUnknown(s string) string {
	if s == "" {
		return "not known"
	}
	return s
}

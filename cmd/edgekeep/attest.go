package main

import (
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/cloud/fleet"
	"edgekeep/tee/attest"
)

func (a *app) attestCommand() *cobra.Command {
	var last bool
	var save string
	c := &cobra.Command{
		Use: "attest GATEWAY", Short: "Challenge a gateway now and show, claim by claim, what was checked", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				ask := c.Attest
				if last {
					ask = c.Saved
				}
				s, v, err := ask(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if err := saveEvidence(save, s); err != nil {
					return err
				}
				return a.print(verdictJSON(v), func(w io.Writer) {
					printVerdict(w, v)
					if save != "" {
						fmt.Fprintf(w, "\nSaved %s.evidence and %s.verdict: edgekeep verify checks them offline.\n", save, save)
					}
				})
			})
		},
	}
	c.Flags().BoolVar(&last, "last", false, "show the newest verdict instead of asking for a new one")
	c.Flags().StringVar(&save, "save", "", "write evidence and verdict to `NAME`.evidence and NAME.verdict")
	return c
}

func saveEvidence(name string, s fleet.Saved) error {
	if name == "" {
		return nil
	}
	if err := os.WriteFile(name+".evidence", s.Evidence, 0o644); err != nil {
		return fmt.Errorf("saving the evidence: %w", err)
	}
	if err := os.WriteFile(name+".verdict", s.Verdict, 0o644); err != nil {
		return fmt.Errorf("saving the verdict: %w", err)
	}
	return nil
}

func verdictJSON(v attest.Verdict) map[string]any {
	vector := map[string]int{}
	for _, n := range v.Appraisal().Vector.List() {
		vector[n.Name] = n.Value
	}
	checks := []map[string]string{}
	for _, c := range v.Checks {
		checks = append(checks, map[string]string{"check": c.Name, "result": c.Result, "detail": c.Detail})
	}
	return map[string]any{
		"gateway": v.Subject, "verdict": attest.Tier(v.Appraisal().Status), "vector": vector, "assurance": v.Assurance,
		"policy": v.Appraisal().Policies, "issued": time.Unix(v.IssuedAt, 0).UTC(), "expires": time.Unix(v.Expires, 0).UTC(),
		"evidence_sha256": hex.EncodeToString(v.EvidenceHash), "checks": checks,
	}
}

func printVerdict(w io.Writer, v attest.Verdict) {
	fmt.Fprintf(w, "%s is %s\n\n", v.Subject, attest.Tier(v.Appraisal().Status))
	for _, n := range v.Appraisal().Vector.List() {
		fmt.Fprintf(w, "  %-18s %3d  %s\n", n.Name, n.Value, attest.Tier(n.Value))
	}
	fmt.Fprintln(w, "\nWhat was checked")
	for _, c := range v.Checks {
		fmt.Fprintf(w, "  %-7s %-14s %s\n", c.Result, c.Name, c.Detail)
	}
	fmt.Fprintf(w, "\nassurance    %s: measured boot and sealed storage; root on the running machine is detected, not stopped\n", v.Assurance)
	for _, p := range v.Appraisal().Policies {
		fmt.Fprintf(w, "policy       %s\n", p)
	}
	fmt.Fprintf(w, "valid        %s until %s\n", when(v.IssuedAt), when(v.Expires))
}

func (a *app) commandCommand() *cobra.Command {
	var args []string
	var expires, wait time.Duration
	c := &cobra.Command{
		Use: "command GATEWAY NAME", Short: "Send a signed command to a gateway and wait for its signed result", Args: cobra.ExactArgs(2),
		Long: "Commands: attest-now, status, rotate-stream-keys, and set-interval with --arg seconds=N\n" +
			"(how often the gateway asks the cloud). The command is signed with the operator's key,\n" +
			"checked inside the keep, and executed at most once.",
		ValidArgs: []string{"attest-now", "set-interval", "status", "rotate-stream-keys"},
		RunE: func(cmd *cobra.Command, pos []string) error {
			return a.with(func(c *client.Client) error { return a.sendCommand(cmd, c, pos, args, expires, wait) })
		},
	}
	c.Flags().StringArrayVar(&args, "arg", nil, "argument as `name=value` (repeat for more)")
	c.Flags().DurationVar(&expires, "expires", 0, "the gateway refuses it after this time; 0: never")
	c.Flags().DurationVar(&wait, "wait", 30*time.Second, "how long to wait for the result")
	return c
}

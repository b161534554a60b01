package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/cloud/fleet"
	"edgekeep/tee/attest"
)

// said is what a gateway's newest evidence says of its instances.
type said struct {
	Verdict   attest.Verdict
	Workloads []attest.Workload
}

// of returns what is said of an instance in this epoch. What was said of an
// earlier one is out of date.
func (s said) of(instance string, epoch uint64) (attest.Workload, bool) {
	for _, w := range s.Workloads {
		if w.Instance == instance && w.Epoch == epoch {
			return w, true
		}
	}
	return attest.Workload{}, false
}

// asker asks for evidence: client.Attest for new one, client.Saved for the newest.
type asker func(ctx context.Context, gateway string) (fleet.Saved, attest.Verdict, error)

// evidence gets a gateway's evidence and checks it: the signatures in it, that the
// verdict is on it, and that it is affirming.
func evidence(ctx context.Context, ask asker, gateway string) (said, error) {
	s, v, err := ask(ctx, gateway)
	if err != nil {
		return said{}, err
	}
	return checkEvidence(s.Evidence, v)
}

func checkEvidence(raw []byte, v attest.Verdict) (said, error) {
	g, err := attest.Verify(raw, attest.Params{})
	if err != nil {
		return said{}, fmt.Errorf("the evidence: %w", err)
	}
	switch sum := sha256.Sum256(raw); {
	case !bytes.Equal(sum[:], v.EvidenceHash):
		return said{}, fmt.Errorf("the newest verdict on %s is not on its newest evidence: try again in a moment", v.Subject)
	case !v.Affirming():
		return said{}, fmt.Errorf("the verdict on %s is %s: `edgekeep attest` shows why", v.Subject, attest.Tier(v.Appraisal().Status))
	}
	return said{Verdict: v, Workloads: g.Claims.Workloads}, nil
}

// instanceLine is an instance in a list.
type instanceLine struct {
	Instance string `json:"instance"`
	Workload string `json:"workload"`
	Version  string `json:"version"`
	Holder   string `json:"holder"` // empty: nobody may run it
	Epoch    uint64 `json:"epoch"`
	Moves    uint64 `json:"moves"`
	Since    string `json:"since"`
	By       string `json:"by"`
	State    string `json:"state"`
	Running  bool   `json:"running"`
	Failures uint64 `json:"failures"`
	Reason   string `json:"reason,omitempty"` // of the last failure, or why nothing is known
}

func (a *app) workloadLs() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List instances: who holds them by the ledger, and what the holders' evidence says", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				views, err := c.Workloads(cmd.Context())
				if err != nil {
					return err
				}
				lines := instanceLines(views, func(gateway string) (said, error) { return evidence(cmd.Context(), c.Saved, gateway) })
				return a.print(map[string]any{"instances": lines}, func(w io.Writer) { printInstances(w, lines) })
			})
		},
	}
}

// instanceLines joins the ledger with the holders' evidence, each of which is
// asked for once.
func instanceLines(views []fleet.View, ask func(gateway string) (said, error)) []instanceLine {
	type answer struct {
		said
		err error
	}
	asked := map[string]answer{}
	out := []instanceLine{}
	for _, v := range views {
		l := instanceLine{
			Instance: v.Entry.Instance, Workload: v.Name, Version: v.Version, Holder: v.Entry.Holder, Epoch: v.Entry.Epoch,
			Moves: v.Moves, Since: when(v.Since), By: v.By, State: "stopped",
		}
		if l.Holder != "" {
			ans, ok := asked[l.Holder]
			if !ok {
				ans.said, ans.err = ask(l.Holder)
				asked[l.Holder] = ans
			}
			l.fill(ans.said, ans.err)
		}
		out = append(out, l)
	}
	return out
}

func (l *instanceLine) fill(s said, err error) {
	if err != nil {
		l.State, l.Reason = "not known", err.Error()
		return
	}
	w, ok := s.of(l.Instance, l.Epoch)
	if !ok {
		l.State, l.Reason = "not seen yet", fmt.Sprintf("the evidence of %s is older than this entry, or its keep has refused it", l.Holder)
		return
	}
	l.State, l.Running, l.Failures, l.Reason = stateText(w), w.Running, w.Failures, w.Reason
}

// stateText is a phase for a person.
func stateText(w attest.Workload) string {
	if w.Phase == "live" && w.Running {
		return "running"
	}
	if w.Phase == "live" {
		return "not running"
	}
	return w.Phase
}

func printInstances(w io.Writer, lines []instanceLine) {
	if len(lines) == 0 {
		fmt.Fprintln(w, "No instance was deployed.\nTo deploy one: edgekeep workload pack DIR, then edgekeep workload deploy GATEWAY BUNDLE.ekw")
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "INSTANCE\tWORKLOAD\tHOLDER\tEPOCH\tSTATE\tFAILURES\tSINCE\tREASON")
	for _, l := range lines {
		fmt.Fprintf(t, "%s\t%s %s\t%s\t%d\t%s\t%d\t%s\t%s\n", l.Instance, l.Workload, l.Version, orNobody(l.Holder), l.Epoch, l.State, l.Failures, l.Since, l.Reason)
	}
	t.Flush()
}

func orNobody(holder string) string {
	if holder == "" {
		return "nobody"
	}
	return holder
}

package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud"
	"edgekeep/cloud/client"
	"edgekeep/cloud/fleet"
	"edgekeep/tee/attest"
)

func (a *app) gatewayCommand() *cobra.Command {
	c := &cobra.Command{Use: "gateway", Short: "List, show, approve and revoke gateways"}
	c.AddCommand(a.gatewayLs(), a.gatewayShow(), a.gatewayApprove(), a.gatewayRevoke())
	return c
}

// gatewayLine is a gateway in a list.
type gatewayLine struct {
	Gateway  string `json:"gateway"`
	State    string `json:"state"`
	Verdict  string `json:"verdict"`
	Expires  string `json:"verdict_expires,omitempty"`
	EKHash   string `json:"ek_hash"`
	Enrolled string `json:"enrolled"`
}

type pendingLine struct {
	EKHash string `json:"ek_hash"`
	State  string `json:"state"`
	Maker  string `json:"tpm_maker"`
	Seen   string `json:"first_seen"`
	Reason string `json:"reason,omitempty"`
}

func (a *app) gatewayLs() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List gateways, and TPMs that wait for approval", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				list, err := c.Gateways(cmd.Context())
				if err != nil {
					return err
				}
				out := struct {
					Gateways []gatewayLine `json:"gateways"`
					Pending  []pendingLine `json:"pending"`
				}{[]gatewayLine{}, []pendingLine{}}
				for _, g := range list.Gateways {
					out.Gateways = append(out.Gateways, lineOf(g, c.Roots))
				}
				for _, e := range list.Pending {
					out.Pending = append(out.Pending, pendingLine{hex.EncodeToString(e.Hash), e.State, e.Maker, when(e.Seen), e.Reason})
				}
				return a.print(out, func(w io.Writer) { printList(w, out.Gateways, out.Pending) })
			})
		},
	}
}

func lineOf(s fleet.Summary, roots attest.Trusted) gatewayLine {
	g := s.Gateway
	l := gatewayLine{
		Gateway: g.Tenant + "/" + g.Name, State: "enrolled", Verdict: "none yet",
		EKHash: hex.EncodeToString(g.EKHash), Enrolled: when(g.Enrolled),
	}
	if g.Revoked {
		l.State = "revoked"
	}
	if len(s.Verdict) == 0 {
		return l
	}
	v, err := attest.VerifyVerdict(roots.Verifier, s.Verdict)
	if err != nil {
		l.Verdict = "not by our verifier"
		return l
	}
	l.Verdict, l.Expires = attest.Tier(v.Appraisal().Status), when(v.Expires)
	if time.Now().Unix() >= v.Expires {
		l.Verdict += " (expired)"
	}
	return l
}

func printList(w io.Writer, gateways []gatewayLine, pending []pendingLine) {
	if len(gateways) == 0 {
		fmt.Fprintln(w, "No gateway is enrolled.")
	} else {
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(t, "GATEWAY\tSTATE\tVERDICT\tVALID UNTIL\tENROLLED")
		for _, g := range gateways {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", g.Gateway, g.State, g.Verdict, g.Expires, g.Enrolled)
		}
		t.Flush()
	}
	for _, p := range pending {
		fmt.Fprintf(w, "\nTPM %s\n  %s since %s, made by %s\n", p.EKHash, p.State, p.Seen, p.Maker)
		if p.State == cloud.Approved {
			fmt.Fprintln(w, "  may enrol now; it has not come yet")
		} else {
			fmt.Fprintf(w, "  to admit it: edgekeep gateway approve %s NAME\n", p.EKHash)
		}
	}
}

func when(unix int64) string {
	if unix == 0 {
		return ""
	}
	return time.Unix(unix, 0).Local().Format("2006-01-02 15:04:05")
}

func (a *app) gatewayShow() *cobra.Command {
	return &cobra.Command{
		Use: "show GATEWAY", Short: "Show where a gateway's streams stand, findings and results", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				d, err := c.Gateway(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				line := lineOf(d.Summary, c.Roots)
				out := map[string]any{
					"gateway": line, "streams": streams(d), "findings": orEmpty(d.Findings), "results": results(d),
					"commands_pending": d.Pending, "counts": d.Counts,
				}
				return a.print(out, func(w io.Writer) { printDetails(w, line, d) })
			})
		},
	}
}

func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func streams(d fleet.Details) []map[string]any {
	out := []map[string]any{}
	for _, s := range d.Streams {
		out = append(out, map[string]any{"stream": s.Stream, "epoch": s.Epoch.String(), "records": s.Seq + 1, "head": hex.EncodeToString(s.Head)})
	}
	return out
}

func results(d fleet.Details) []map[string]any {
	out := []map[string]any{}
	for _, r := range d.Results {
		out = append(out, map[string]any{"sequence": r.Sequence, "done": r.Result.Done, "reason": r.Result.Reason, "output": r.Result.Output})
	}
	return out
}

func printDetails(w io.Writer, l gatewayLine, d fleet.Details) {
	fmt.Fprintf(w, "%s  %s\n  verdict   %s, valid until %s\n  EK hash   %s\n  enrolled  %s\n", l.Gateway, l.State, l.Verdict, l.Expires, l.EKHash, l.Enrolled)
	fmt.Fprintln(w, "\nStreams (what is stored and watermarked)")
	if len(d.Streams) == 0 {
		fmt.Fprintln(w, "  none yet")
	}
	for _, s := range d.Streams {
		fmt.Fprintf(w, "  %-20s epoch %d, %d records\n", s.Stream, s.Epoch.Counter(), s.Seq+1)
	}
	fmt.Fprintln(w, "\nFindings")
	if len(d.Findings) == 0 {
		fmt.Fprintln(w, "  none")
	}
	for _, f := range d.Findings {
		fmt.Fprintf(w, "  %s  %-9s %s  %s\n", when(f.Time), f.Kind, f.Stream, f.Detail)
	}
	fmt.Fprintf(w, "\nCommands (%d waiting)\n", d.Pending)
	for _, r := range d.Results {
		fmt.Fprintf(w, "  %d  %s\n", r.Sequence, resultText(r.Result.Done, r.Result.Reason, r.Result.Output))
	}
}

func resultText(done bool, reason string, output map[string]string) string {
	if !done {
		return "refused: " + reason
	}
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(output)) {
		parts = append(parts, k+" = "+output[k])
	}
	return strings.Join(append([]string{"done"}, parts...), "\n       ")
}

func (a *app) gatewayApprove() *cobra.Command {
	return &cobra.Command{
		Use: "approve EK-HASH NAME", Short: "Admit the TPM with this EK hash, once, as a gateway", Args: cobra.ExactArgs(2),
		Long: "Signs, with the operator's key, that the TPM with this endorsement key may enrol once\n" +
			"as the gateway NAME. Compare the hash with the one the gateway shows in its log or on\n" +
			"its label: the certificate of a TPM's maker says that a TPM is genuine, not whose it is.",
		RunE: func(cmd *cobra.Command, args []string) error {
			hash, err := hex.DecodeString(args[0])
			if err != nil || len(hash) != 32 {
				return errors.New("an EK hash is 64 hexadecimal digits: `edgekeep gateway ls` shows those that wait")
			}
			if !attest.ValidName(args[1]) {
				return fmt.Errorf("%q cannot be a gateway's name: 1 to 31 letters, digits and hyphens", args[1])
			}
			return a.with(func(c *client.Client) error {
				if err := c.Approve(cmd.Context(), hash, args[1]); err != nil {
					return err
				}
				return a.print(map[string]string{"approved": c.Tenant + "/" + args[1], "ek_hash": args[0]}, func(w io.Writer) {
					fmt.Fprintf(w, "Approved: this TPM may enrol once as %s/%s.\nIt enrols within seconds if it is connected: edgekeep gateway show %s\n", c.Tenant, args[1], args[1])
				})
			})
		},
	}
}

func (a *app) gatewayRevoke() *cobra.Command {
	return &cobra.Command{
		Use: "revoke GATEWAY", Short: "End a gateway: its data, requests and certificate are refused from now on", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				if err := c.Revoke(cmd.Context(), args[0]); err != nil {
					return err
				}
				return a.print(map[string]string{"revoked": c.Tenant + "/" + args[0]}, func(w io.Writer) {
					fmt.Fprintf(w, "Revoked: %s/%s is disconnected, and nothing from it is accepted any more.\nWhat it sent before stays readable. To let it in again: edgekeep gateway approve\n", c.Tenant, args[0])
				})
			})
		},
	}
}

package main

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/tee/attest"
	"edgekeep/workload"
)

func (a *app) inferCommand() *cobra.Command {
	var input string
	var wait time.Duration
	c := &cobra.Command{
		Use: "infer GATEWAY INSTANCE", Short: "Ask a workload, confidentially: the input goes to its gateway's keep alone", Args: cobra.ExactArgs(2),
		Long: "Sends a batch in the workload's input format (standard input, or --input), sealed to the\n" +
			"receiving key in a fresh verdict on the gateway, and writes the result to standard output.\n" +
			"What was verified is said on standard error.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if !attest.ValidName(args[0]) || !workload.ValidInstance(args[1]) {
				return fmt.Errorf("%q on %q: an instance and its gateway are needed; `edgekeep workload ls` shows them", args[1], args[0])
			}
			batch, err := readInput(input, cmd.InOrStdin())
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), wait)
				defer cancel()
				return a.infer(ctx, c, args[0], args[1], batch)
			})
		},
	}
	c.Flags().StringVar(&input, "input", "", "`FILE` with the batch; standard input if not given")
	c.Flags().DurationVar(&wait, "wait", time.Minute, "how long to wait for verdict and result")
	return c
}

func readInput(path string, stdin io.Reader) ([]byte, error) {
	from := stdin
	if path != "" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("the input: %w", err)
		}
		defer f.Close()
		from = f
	}
	data, err := io.ReadAll(io.LimitReader(from, workload.MaxInput+1))
	if err != nil {
		return nil, fmt.Errorf("reading the input: %w", err)
	}
	if len(data) > workload.MaxInput {
		return nil, fmt.Errorf("the input has more than %s: send it in parts", bytesText(workload.MaxInput))
	}
	return data, nil
}

func (a *app) infer(ctx context.Context, c *client.Client, gateway, instance string, batch []byte) error {
	r, err := c.Infer(ctx, gateway, instance, batch)
	if err != nil {
		return err
	}
	return a.inferred(r)
}

// inferred writes a result, as bytes that may be piped on.
func (a *app) inferred(r client.Inference) error {
	if a.json {
		return a.print(inferredJSON(r), nil)
	}
	if _, err := a.out.Write(r.Output); err != nil {
		return fmt.Errorf("writing the result: %w", err)
	}
	a.say("result of %s, epoch %d, bundle %x", r.Response.Instance, r.Response.Epoch, r.Response.Module)
	a.say("signed by the keep of %s, on which the verdict is %s, assurance %s, until %s", r.Verdict.Subject, attest.Tier(r.Verdict.Appraisal().Status), r.Verdict.Assurance, when(r.Verdict.Expires))
	return nil
}

func inferredJSON(r client.Inference) map[string]any {
	return map[string]any{
		"result": base64.StdEncoding.EncodeToString(r.Output), "instance": r.Response.Instance, "epoch": r.Response.Epoch,
		"bundle": hex.EncodeToString(r.Response.Module), "request_sha256": hex.EncodeToString(r.Response.Request),
		"gateway": r.Verdict.Subject, "verdict": attest.Tier(r.Verdict.Appraisal().Status), "assurance": r.Verdict.Assurance,
		"verdict_issued": time.Unix(r.Verdict.IssuedAt, 0).UTC(), "verdict_expires": time.Unix(r.Verdict.Expires, 0).UTC(),
		"evidence_sha256": hex.EncodeToString(r.Verdict.EvidenceHash),
	}
}

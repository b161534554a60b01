package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
	"edgekeep/workload/pack"
)

func (a *app) workloadCommand() *cobra.Command {
	c := &cobra.Command{Use: "workload", Short: "Pack, deploy, watch, move and stop confidential workloads"}
	c.AddCommand(a.workloadPack(), a.workloadDeploy(), a.workloadLs(), a.workloadInspect(), a.workloadLogs(), a.workloadResults(),
		a.workloadMove(), a.workloadRecover(), a.workloadStop())
	return c
}

func (a *app) workloadDeploy() *cobra.Command {
	var keyFile, name string
	var inputs []string
	var wait time.Duration
	c := &cobra.Command{
		Use: "deploy GATEWAY BUNDLE.ekw", Short: "Run a packed workload on a gateway", Args: cobra.ExactArgs(2),
		Long: "Uploads the encrypted content, asks for the gateway's verdict, seals the bundle key to the\n" +
			"receiving key in it, and sends the signed command. Nothing is decrypted outside the\n" +
			"gateway's keep. An upload that broke off goes on where it was.",
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := loadDeployment(args[0], args[1], keyFile, name, inputs)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				if _, err := d.bundle.Open(c.Roots.Operator, d.key); err != nil {
					return fmt.Errorf("%s: %w", args[1], err)
				}
				ctx, cancel := context.WithTimeout(cmd.Context(), wait)
				defer cancel()
				return a.deploy(ctx, c, d)
			})
		},
	}
	c.Flags().StringVar(&keyFile, "key", "", "the bundle's key; the file beside the bundle that ends in .key if not given")
	c.Flags().StringVar(&name, "name", "", "name of the instance; the workload's if not given")
	c.Flags().StringArrayVar(&inputs, "input", nil, "`GATEWAY/STREAM` to read, in the order of the manifest's streams (repeat for more); those of GATEWAY if not given")
	c.Flags().DurationVar(&wait, "wait", 5*time.Minute, "how long to wait for upload and answer")
	return c
}

// deployment is what the command line and the bundle say.
type deployment struct {
	gateway, instance string
	bundle            pack.Bundle
	key               []byte
	inputs            []workload.Source
}

func loadDeployment(gateway, path, keyFile, name string, inputs []string) (deployment, error) {
	d := deployment{gateway: gateway, instance: name}
	if !attest.ValidName(gateway) {
		return d, fmt.Errorf("%q cannot be a gateway's name: `edgekeep gateway ls` shows which there are", gateway)
	}
	raw, err := readBundle(path)
	if err != nil {
		return d, err
	}
	if d.bundle, err = pack.Parse(raw); err != nil {
		return d, fmt.Errorf("%s: %w", path, err)
	}
	m, err := workload.PeekManifest(d.bundle.Manifest) // verified with the kit's roots later
	if err != nil {
		return d, fmt.Errorf("%s: %w", path, err)
	}
	if keyFile == "" {
		keyFile = keyOf(path)
	}
	if d.key, err = os.ReadFile(keyFile); err != nil {
		return d, fmt.Errorf("the bundle's key: %w: `edgekeep workload pack` wrote it beside the bundle; name it with --key", err)
	}
	if len(d.key) != workload.KeySize {
		return d, fmt.Errorf("%s has %d bytes, the key of a bundle has %d", keyFile, len(d.key), workload.KeySize)
	}
	if d.instance == "" {
		d.instance = m.Name
	}
	if !workload.ValidInstance(d.instance) {
		return d, fmt.Errorf("%q cannot be an instance's name: 1 to 26 small letters, digits and hyphens", d.instance)
	}
	if !m.Allows(gateway) {
		return d, fmt.Errorf("%s may not run on %s: its manifest allows %s", m.Name, gateway, nodesText(m.Nodes))
	}
	d.inputs, err = sources(gateway, m.Input.Streams, inputs)
	return d, err
}

func readBundle(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err == nil && info.Size() > pack.MaxFile {
		return nil, fmt.Errorf("%s has %s: no bundle is that large", path, bytesText(uint64(info.Size())))
	}
	var raw []byte
	if err == nil {
		raw, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the bundle: %w: `edgekeep workload pack` makes one", err)
	}
	return raw, nil
}

// sources are the inputs of an instance: what was named, or the manifest's streams
// of the gateway.
func sources(gateway string, streams, named []string) ([]workload.Source, error) {
	out := []workload.Source{}
	if len(named) == 0 {
		for _, s := range streams {
			out = append(out, workload.Source{Gateway: gateway, Stream: s})
		}
		return out, nil
	}
	if len(named) != len(streams) {
		return nil, fmt.Errorf("the manifest has %d streams (%s), --input was given %d times: once for each, in this order", len(streams), strings.Join(streams, ", "), len(named))
	}
	for _, n := range named {
		g, s, ok := strings.Cut(n, "/")
		if !ok || !attest.ValidName(g) || !attest.ValidName(s) {
			return nil, fmt.Errorf("--input %s: GATEWAY/STREAM is needed, like %s/machine", n, gateway)
		}
		out = append(out, workload.Source{Gateway: g, Stream: s})
	}
	return out, nil
}

func (a *app) deploy(ctx context.Context, c *client.Client, d deployment) error {
	if _, err := c.Gateway(ctx, d.gateway); err != nil { // before the upload
		return err
	}
	progress := a.progress("uploaded", len(d.bundle.Content))
	if _, err := c.PutBundle(ctx, d.bundle.Content, progress); err != nil {
		return fmt.Errorf("%w: the same command goes on where the upload broke off", err)
	}
	r, err := c.Deploy(ctx, d.gateway, d.instance, d.bundle.Manifest, d.key, d.inputs)
	if err != nil {
		return err
	}
	id := hex.EncodeToString(workload.ID(d.bundle.Manifest))
	out := resultJSON(r, d.gateway)
	out["instance"], out["bundle"], out["inputs"] = d.instance, id, inputsText(d.inputs)
	return a.answered(r, out, func(w io.Writer) {
		fmt.Fprintf(w, "Deployed %s on %s: its keep has signed that it took command %d.\n", d.instance, d.gateway, r.Sequence)
		fmt.Fprintf(w, "  bundle    %s\n  reads     %s\n", id, strings.Join(orNone(inputsText(d.inputs)), ", "))
		fmt.Fprintf(w, "Next: edgekeep workload inspect %s shows when it runs; edgekeep workload results %s opens what it writes.\n", d.instance, d.instance)
	})
}

// answered prints a keep's signed answer. One that refuses is an error.
func (a *app) answered(r message.Result, out map[string]any, done func(io.Writer)) error {
	if !r.Done && !a.json {
		return fmt.Errorf("the keep of %s refuses: %s", r.Subject, r.Reason)
	}
	if err := a.print(out, done); err != nil || r.Done {
		return err
	}
	return errors.New("the gateway refused the command")
}

func resultJSON(r message.Result, gateway string) map[string]any {
	return map[string]any{"gateway": gateway, "sequence": r.Sequence, "done": r.Done, "reason": r.Reason, "output": r.Output}
}

func inputsText(inputs []workload.Source) []string {
	out := []string{}
	for _, i := range inputs {
		out = append(out, i.Gateway+"/"+i.Stream)
	}
	return out
}

func orNone(s []string) []string {
	if len(s) == 0 {
		return []string{"no stream; it answers requests"}
	}
	return s
}

// progress says about once a second how far something is.
func (a *app) progress(what string, total int) func(done int) {
	last := time.Now()
	return func(done int) {
		if time.Since(last) < time.Second {
			return
		}
		last = time.Now()
		fmt.Fprintf(a.err, "edgekeep: %s %s of %s\n", what, bytesText(uint64(done)), bytesText(uint64(total)))
	}
}

func (a *app) workloadStop() *cobra.Command {
	var wait time.Duration
	c := &cobra.Command{
		Use: "stop INSTANCE", Short: "Stop an instance for good: its state is destroyed, its results stay", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), wait)
				defer cancel()
				return a.stop(ctx, c, args[0])
			})
		},
	}
	c.Flags().DurationVar(&wait, "wait", 30*time.Second, "how long to wait for the answer")
	return c
}

func (a *app) stop(ctx context.Context, c *client.Client, instance string) error {
	r, err := c.Stop(ctx, instance)
	if err != nil {
		return err
	}
	out := resultJSON(r, strings.TrimPrefix(r.Subject, c.Tenant+"/"))
	out["instance"] = instance
	return a.answered(r, out, func(w io.Writer) {
		if r.Sequence == 0 { // no command: nobody could have taken it
			fmt.Fprintf(w, "Stopped %s in the ledger: %s was revoked, or never ran it.\n", instance, r.Subject)
		} else {
			fmt.Fprintf(w, "Stopped %s: the keep of %s has signed that it destroyed keys and state.\n", instance, r.Subject)
		}
		fmt.Fprintf(w, "What it wrote stays readable: edgekeep workload results %s\n", instance)
	})
}

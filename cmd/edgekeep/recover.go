package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/workload"
)

func (a *app) workloadRecover() *cobra.Command {
	var to, owner, keyFile string
	var inputs []string
	var wait time.Duration
	c := &cobra.Command{
		Use: "recover INSTANCE BUNDLE.ekw --to GATEWAY --owner KIT", Short: "Let a lost instance go on elsewhere from its newest checkpoint, as the data owner", Args: cobra.ExactArgs(2),
		Long: "For an instance whose gateway is gone for good. Signs, with the data owner's key from\n" +
			"the kit --owner, that the instance goes on at --to from its newest checkpoint in the\n" +
			"cloud, then deploys it there with the operator's kit. What it did after the checkpoint\n" +
			"it does again; results that were stored already are not counted twice. If the lost\n" +
			"gateway comes back, what is on it is fenced and dropped.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if owner == "" {
				return errors.New("--owner is missing: the directory of the data owner's kit; the operator's word is not enough")
			}
			d, err := loadDeployment(to, args[1], keyFile, args[0], nil)
			if err != nil {
				return err
			}
			kit, err := client.LoadKit(owner)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				if _, err := d.bundle.Open(c.Roots.Operator, d.key); err != nil {
					return fmt.Errorf("%s: %w", args[1], err)
				}
				ctx, cancel := context.WithTimeout(cmd.Context(), wait)
				defer cancel()
				return a.recover(ctx, c, kit, d, inputs)
			})
		},
	}
	c.Flags().StringVar(&to, "to", "", "`GATEWAY` where it goes on")
	c.Flags().StringVar(&owner, "owner", "", "the data owner's `KIT`, a directory")
	c.Flags().StringVar(&keyFile, "key", "", "the bundle's key; the file beside the bundle that ends in .key if not given")
	c.Flags().StringArrayVar(&inputs, "input", nil, "`GATEWAY/STREAM` to read, in the order of the manifest's streams; those of the gateway where it was deployed if not given")
	c.Flags().DurationVar(&wait, "wait", 5*time.Minute, "how long to wait for upload and answer")
	return c
}

func (a *app) recover(ctx context.Context, c *client.Client, owner *client.Kit, d deployment, inputs []string) error {
	rec, err := c.Inspect(ctx, d.instance)
	if err != nil {
		return err
	}
	if !bytes.Equal(rec.Entry.Bundle, workload.ID(d.bundle.Manifest)) {
		return fmt.Errorf("instance %s is of another bundle, %x: a checkpoint opens in the workload that wrote it", d.instance, rec.Entry.Bundle)
	}
	m, err := workload.PeekManifest(d.bundle.Manifest)
	if err != nil {
		return err
	}
	if d.inputs, err = sources(rec.History[0].Holder, m.Input.Streams, inputs); err != nil {
		return err
	}
	all, err := c.Snapshots(ctx, d.instance)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return fmt.Errorf("instance %s has no checkpoint in the cloud: its manifest says whether and how often it makes one (checkpoint = \"10m\")", d.instance)
	}
	s := all[len(all)-1]
	if _, err := c.PutBundle(ctx, d.bundle.Content, a.progress("uploaded", len(d.bundle.Content))); err != nil {
		return err
	}
	if err := c.Recover(ctx, owner, d.instance, d.gateway, s.Blob, s.Head); err != nil {
		return err
	}
	r, err := c.Deploy(ctx, d.gateway, d.instance, d.bundle.Manifest, d.key, d.inputs)
	if err != nil {
		return fmt.Errorf("the data owner's word is in the ledger, but the instance was not deployed: %w: run the same command again", err)
	}
	at := time.Unix(s.Time, 0).UTC()
	out := resultJSON(r, d.gateway)
	out["instance"], out["checkpoint"], out["time"], out["line"], out["epoch"] = d.instance, hex.EncodeToString(s.Blob), at, s.Line, rec.Entry.Epoch+1
	return a.answered(r, out, func(w io.Writer) {
		fmt.Fprintf(w, "Instance %s goes on at %s from its checkpoint of %s, result %d.\n", d.instance, d.gateway, at.Format(time.DateTime), s.Line)
		fmt.Fprintf(w, "What %s still has of it is fenced from now on.\nNext: edgekeep workload inspect %s shows when it runs.\n", rec.Entry.Holder, d.instance)
	})
}

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
	"edgekeep/cloud/fleet"
	"edgekeep/tee/attest"
)

func (a *app) workloadMove() *cobra.Command {
	var to string
	var wait time.Duration
	c := &cobra.Command{
		Use: "move INSTANCE --to GATEWAY", Short: "Move a running instance to another gateway, with its state", Args: cobra.ExactArgs(1),
		Long: "Sends the holder the signed command, and waits until the ledger has the new holder and\n" +
			"the new holder's evidence says that the instance runs there. Batches run on until the\n" +
			"last moment. The gateways need no help from here: interrupting this command does not\n" +
			"stop a move.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if !attest.ValidName(to) {
				return fmt.Errorf("--to %q: the gateway to move to is needed; `edgekeep gateway ls` shows which there are", to)
			}
			return a.with(func(c *client.Client) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), wait)
				defer cancel()
				return a.move(ctx, c, args[0], to)
			})
		},
	}
	c.Flags().StringVar(&to, "to", "", "`GATEWAY` to move to")
	c.Flags().DurationVar(&wait, "wait", 2*time.Minute, "how long to wait until it runs there")
	return c
}

// moveCloud is what a move is watched with.
type moveCloud struct {
	inspect func(ctx context.Context, instance string) (fleet.Record, error)
	attest  func(ctx context.Context, gateway string) (said, error)
}

func (a *app) move(ctx context.Context, c *client.Client, instance, to string) error {
	before, err := c.Inspect(ctx, instance)
	if err != nil {
		return err
	}
	from := before.Entry.Holder
	switch from {
	case "":
		return fmt.Errorf("instance %s was stopped: edgekeep workload deploy starts one", instance)
	case to:
		return fmt.Errorf("instance %s is on %s already", instance, to)
	}
	began := time.Now()
	r, err := c.Move(ctx, instance, to)
	if err != nil {
		return err
	}
	if !r.Done {
		return a.answered(r, resultJSON(r, from), nil)
	}
	attempt, err := hex.DecodeString(r.Output["attempt"])
	if err != nil || len(attempt) == 0 {
		return fmt.Errorf("the keep of %s took the command, but names no attempt", from)
	}
	a.say("the keep of %s has begun to move %s to %s", from, instance, to)
	w := watch{a: a, before: before, attempt: attempt, to: to}
	w.cloud = moveCloud{c.Inspect, func(ctx context.Context, gateway string) (said, error) { return evidence(ctx, c.Attest, gateway) }}
	epoch, err := w.ledger(ctx)
	if err != nil {
		return err
	}
	committed := time.Since(began)
	a.say("the ledger has it: %s at epoch %d, after %s", to, epoch, committed.Round(time.Millisecond))
	now, err := w.running(ctx, epoch)
	if err != nil {
		return err
	}
	out := map[string]any{
		"instance": instance, "from": from, "to": to, "epoch": epoch, "attempt": hex.EncodeToString(attempt),
		"ledger_ms": committed.Milliseconds(), "running_ms": time.Since(began).Milliseconds(), "protection": now.Protection,
	}
	return a.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "Moved %s from %s to %s: epoch %d, seen running after %s.\n", instance, from, to, epoch, time.Since(began).Round(time.Millisecond))
		fmt.Fprintf(w, "%s has destroyed its means to run it; results that it might still seal are fenced.\n", from)
	})
}

// say tells about progress, beside the output.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.err, "edgekeep: "+format+"\n", args...)
}

// watch follows one move.
type watch struct {
	a       *app
	cloud   moveCloud
	before  fleet.Record
	attempt []byte
	to      string
}

const (
	pollEvery = 500 * time.Millisecond
	tellEvery = 10 * time.Second
)

// ledger waits for the entry that replaces the one before, and returns its epoch.
func (w watch) ledger(ctx context.Context) (uint64, error) {
	e := w.before.Entry
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	told := time.Now()
	for {
		rec, err := w.cloud.inspect(ctx, e.Instance)
		if err == nil {
			if epoch, err := w.decided(rec); epoch != 0 || err != nil {
				return epoch, err
			}
		}
		if time.Since(told) >= tellEvery {
			told = time.Now()
			w.a.say("%s is still on %s, which copies its state while it runs", e.Instance, e.Holder)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("instance %s is still held by %s, and nothing is lost: if its keep has given up, its log says why (\"a move was given up\"), and you can move it again; `edgekeep workload ls` shows whether it went after all",
				e.Instance, e.Holder)
		}
	}
}

// decided says what became of the entry before: nothing yet (0), the epoch of the
// move, or why it failed.
func (w watch) decided(rec fleet.Record) (uint64, error) {
	e := w.before.Entry
	for _, h := range rec.History {
		if h.Holder == w.to && bytes.Equal(h.Attempt, w.attempt) {
			return h.Epoch, nil
		}
	}
	for _, h := range rec.History {
		switch {
		case h.Epoch != e.Epoch+1:
			continue
		case h.Holder == e.Holder:
			return 0, fmt.Errorf("the move did not come about: the ledger refused %s, and %s goes on on %s at epoch %d; `edgekeep attest %s` shows whether its verdict is good", w.to, e.Instance, e.Holder, h.Epoch, w.to)
		case h.Holder == "":
			return 0, fmt.Errorf("instance %s was stopped meanwhile", e.Instance)
		default:
			return 0, fmt.Errorf("%s holds instance %s now, at epoch %d, by %s's word and not by this move", h.Holder, e.Instance, h.Epoch, h.By)
		}
	}
	if rec.Entry.Epoch > e.Epoch {
		return 0, fmt.Errorf("instance %s is at epoch %d by now: `edgekeep workload inspect %s` shows what happened", e.Instance, rec.Entry.Epoch, e.Instance)
	}
	return 0, nil
}

// running waits until the new holder's evidence says that the instance runs.
func (w watch) running(ctx context.Context, epoch uint64) (attest.Workload, error) {
	name := w.before.Entry.Instance
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	why := errors.New("it has not attested since")
	for {
		s, err := w.cloud.attest(ctx, w.to)
		now, seen := s.of(name, epoch)
		switch {
		case ctx.Err() != nil: // below
		case err != nil:
			why = err
		case !seen:
			why = errors.New("its evidence does not have it in this epoch")
		case now.Phase == "live" && now.Running:
			return now, nil
		case now.Reason != "":
			why = fmt.Errorf("there it is %s: %s", stateText(now), now.Reason)
		default:
			why = fmt.Errorf("there it is %s", stateText(now))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return attest.Workload{}, fmt.Errorf("the ledger has %s on %s at epoch %d, but it was not seen running: %w; `edgekeep workload inspect %s` shows when it does", name, w.to, epoch, why, name)
		}
	}
}

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/workload"
)

// logSuffix makes the name of an instance's log of its name.
const logSuffix = "-log"

func (a *app) workloadLogs() *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use: "logs INSTANCE", Short: "Show what an instance wrote to stderr, on all gateways where it ran", Args: cobra.ExactArgs(1),
		Long: "A log may say what the workload has read: it is sealed like its results, and opens with\nthe consumer's kit.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := validInstance(args[0]); err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				rd, err := c.Reader("", args[0]+logSuffix)
				if err != nil {
					return err
				}
				n, err := each(cmd.Context(), follow, rd.Next, a.logRecord)
				if n == 0 && err == nil {
					a.say("nothing is stored that %s wrote to stderr: `edgekeep workload inspect %s` shows whether it runs", args[0], args[0])
				}
				return err
			})
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	return c
}

func validInstance(name string) error {
	if !workload.ValidInstance(name) {
		return fmt.Errorf("%q cannot be an instance's name: `edgekeep workload ls` shows which there are", name)
	}
	return nil
}

// each hands over all that is stored, and with follow what comes, until ctx ends.
// It returns how many there were.
func each[T any](ctx context.Context, follow bool, next func(context.Context, time.Duration) ([]T, error), show func(T) error) (n int, err error) {
	wait := time.Duration(0)
	if follow {
		wait = 10 * time.Second
	}
	for ctx.Err() == nil {
		got, err := next(ctx, wait)
		if err != nil && ctx.Err() == nil {
			return n, err
		}
		for _, g := range got {
			if err := show(g); err != nil {
				return n, err
			}
		}
		if n += len(got); len(got) == 0 && !follow {
			return n, nil
		}
	}
	return n, nil
}

func (a *app) logRecord(o client.Opened) error {
	if o.Gap != "" {
		a.say("%s/%s: %s", o.Gateway, o.Stream, o.Gap)
	}
	for _, r := range o.Readings {
		if err := a.print(newLine(o, r), func(w io.Writer) {
			fmt.Fprintf(w, "%s  %s  %v\n", time.Unix(0, r.Time).Local().Format("2006-01-02 15:04:05.000"), o.Gateway, r.Value)
		}); err != nil {
			return err
		}
	}
	return nil
}

// resultLine is a reading that a workload wrote, as JSON.
type resultLine struct {
	Instance string `json:"instance"`
	Epoch    uint64 `json:"epoch"` // of the instance
	Line     uint64 `json:"line"`
	Gateway  string `json:"gateway"`
	Time     string `json:"time"`
	Name     string `json:"name"`
	Value    any    `json:"value"`
	Unit     string `json:"unit,omitempty"`
	Conflict bool   `json:"conflict,omitempty"` // another one came under this line before
}

func (a *app) workloadResults() *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use: "results INSTANCE", Short: "Open an instance's results, each once, wherever it ran", Args: cobra.ExactArgs(1),
		Long: "Opens what the instance wrote with the consumer's kit, in the order of its lines, and\n" +
			"leaves out what the ledger fences: results that a gateway sealed when the instance was\n" +
			"not its own any more.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := validInstance(args[0]); err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				rd, err := c.Results(args[0])
				if err != nil {
					return err
				}
				n, err := each(cmd.Context(), follow, rd.Next, a.result)
				if n == 0 && err == nil {
					a.say("no results of %s are stored: `edgekeep workload inspect %s` shows whether it runs", args[0], args[0])
				}
				if fenced := rd.Fenced(); fenced > 0 {
					a.say("%d results were left out: the ledger does not accept them; `edgekeep workload inspect %s` shows whose count", fenced, args[0])
				}
				return err
			})
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	return c
}

func (a *app) result(r client.Result) error {
	for _, problem := range []string{r.Gap, r.Conflict} {
		if problem != "" {
			a.say("%s, epoch %d, on %s: %s", r.Instance, r.Epoch, r.Gateway, problem)
		}
	}
	l := resultLine{
		Instance: r.Instance, Epoch: r.Epoch, Line: r.Line, Gateway: r.Gateway, Time: time.Unix(0, r.Time).UTC().Format(time.RFC3339Nano),
		Name: r.Name, Value: r.Value, Unit: r.Unit, Conflict: r.Conflict != "",
	}
	return a.print(l, func(w io.Writer) {
		fmt.Fprintf(w, "%d.%d  %s  %s  %s  %v %s\n", r.Epoch, r.Line, time.Unix(0, r.Time).Local().Format("2006-01-02 15:04:05.000"), r.Gateway, r.Name, r.Value, r.Unit)
	})
}

// Command edgekeep-sensor is a driver: it reads one source and gives its
// readings, numbered and until they are acknowledged, to the keep on this
// machine.
//
//	edgekeep-sensor host                 reads this machine once a second
//	edgekeep-sensor replay FILE.csv      replays old readings; started again, it goes on
//
// On SIGTERM or SIGINT it stops reading and gives the keep up to 5 seconds for
// what was read. At the end it prints one JSON line: lines sent, lines the keep
// has acked, readings (fields) in these, and lines that the keep rejected.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run returns the exit status: 0 when everything that was read is acknowledged
// or rejected.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := defaults()
	root := command(&c)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if c.JSON {
		logger(&c, stderr).Error(err.Error())
	} else {
		fmt.Fprintln(stderr, "edgekeep-sensor:", err)
	}
	return 1
}

func logger(c *config, stderr io.Writer) *slog.Logger {
	if c.JSON {
		return slog.New(slog.NewJSONHandler(stderr, nil))
	}
	return slog.New(slog.NewTextHandler(stderr, nil))
}

func command(c *config) *cobra.Command {
	path := ""
	root := &cobra.Command{
		Use:               "edgekeep-sensor",
		Short:             "Read one source and give its readings to the keep",
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return c.settle(path, cmd) },
	}
	root.PersistentFlags().StringVar(&path, "config", path, "settings in TOML; flags win")
	root.PersistentFlags().StringVar(&c.Socket, "socket", c.Socket, "the keep's ingest socket")
	root.PersistentFlags().BoolVar(&c.JSON, "json", c.JSON, "write messages as JSON lines")

	host := &cobra.Command{
		Use:   "host",
		Short: "Read this machine: load, memory, disks, network, pressure, hardware monitors",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.driveHost(cmd.Context(), cmd.OutOrStdout(), logger(c, cmd.ErrOrStderr()))
		},
	}
	host.Flags().DurationVar(&c.Host.Interval, "interval", c.Host.Interval, "time between two samples")
	host.Flags().StringVar(&c.Host.Root, "root", c.Host.Root, "directory with proc and sys in it")
	host.Flags().Int64Var(&c.Host.Count, "count", c.Host.Count, "stop after so many samples; 0 is never")

	replay := &cobra.Command{
		Use:   "replay FILE.csv",
		Short: "Replay old readings; the same file goes on where it was stopped",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.driveReplay(cmd.Context(), args[0], cmd.OutOrStdout(), logger(c, cmd.ErrOrStderr()))
		},
	}
	replay.Flags().Float64Var(&c.Replay.Speed, "speed", c.Replay.Speed, "1 is real time, 0 as fast as possible")
	replay.Flags().StringVar(&c.Replay.Measurement, "measurement", c.Replay.Measurement, "name of what was measured")
	replay.Flags().StringVar(&c.Replay.TimeColumn, "time-column", c.Replay.TimeColumn, "column of the time (default: the first named time, timestamp or ts)")

	root.AddCommand(host, replay)
	return root
}

// Edgekeep-cloud is the side that gateways prove themselves to: verifier, key
// broker, fleet and bridge, all in one process or each in its own.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"edgekeep/cloud/node"
	"edgekeep/internal/config"
	"edgekeep/internal/durable"
)

// version is set by the build.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "edgekeep-cloud:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cobra.Command{
		Use: "edgekeep-cloud", Short: "The cloud side of Edgekeep", Version: version, SilenceUsage: true, SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(initCommand(stdout), runCommand(stdout, stderr))
	return root.ExecuteContext(ctx)
}

func runCommand(stdout, stderr io.Writer) *cobra.Command {
	var path string
	c := &cobra.Command{
		Use: "run", Short: "Run the roles that the configuration names", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := node.Config{Roles: []string{"verifier", "keybroker", "fleet"}}
			cfg.Server.Host, cfg.Server.ClientPort, cfg.Server.MQTTPort = "0.0.0.0", 4222, 8883
			if err := config.Load(path, &cfg); err != nil {
				return err
			}
			n, err := node.Start(cmd.Context(), cfg, version, slog.New(slog.NewTextHandler(stderr, nil)))
			if err != nil {
				return err
			}
			where, err := json.Marshal(n.Endpoints)
			if err == nil {
				err = durable.WriteFile(filepath.Join(cfg.Data, "endpoints.json"), append(where, '\n'), 0o644)
			}
			if err != nil {
				return fmt.Errorf("writing where we are: %w", err)
			}
			fmt.Fprintf(stdout, "%s\n", where)
			return n.Run(cmd.Context())
		},
	}
	c.Flags().StringVar(&path, "config", "/etc/edgekeep/cloud.toml", "configuration file")
	return c
}

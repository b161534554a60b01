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
	"time"

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

func initCommand(stdout io.Writer) *cobra.Command {
	var o node.InitOptions
	var asJSON bool
	c := &cobra.Command{
		Use: "init DIR", Short: "Make keys, certificates and trust roots for a new cloud", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			o.Dir, o.Now = args[0], time.Now()
			digest, err := node.Init(o)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(stdout).Encode(map[string]string{"dir": o.Dir, "tenant": o.Tenant, "roots": fmt.Sprintf("%x", digest)})
			}
			fmt.Fprintf(stdout, "Made a cloud for tenant %s in %s.\n\n", o.Tenant, o.Dir)
			fmt.Fprintf(stdout, "  roots = \"%x\"   goes into keep.toml of every gateway\n", digest)
			fmt.Fprintf(stdout, "  %s   goes to every gateway, for agent.toml\n\n", filepath.Join(o.Dir, "keys/ca.pem"))
			fmt.Fprintf(stdout, "Next: write %s (configs/policy.toml explains it),\n", filepath.Join(o.Dir, "tenants", o.Tenant, "policy.toml"))
			fmt.Fprintf(stdout, "move %s to whoever operates the fleet and %s to whoever\nowns the data: their keys must not stay here,\n", filepath.Join(o.Dir, "operator"), filepath.Join(o.Dir, "owner"))
			fmt.Fprintf(stdout, "then start: edgekeep-cloud run --config cloud.toml\n")
			return nil
		},
	}
	c.Flags().StringVar(&o.Tenant, "tenant", "", "name of the first tenant")
	c.Flags().StringSliceVar(&o.Hosts, "host", []string{"127.0.0.1"}, "name or address under which gateways and people reach the server (repeat for more)")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	_ = c.MarkFlagRequired("tenant") // fails for an unknown flag only
	return c
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

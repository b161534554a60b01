package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/node"
)

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

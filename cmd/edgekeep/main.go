// Edgekeep is the operator's, consumer's and auditor's command.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
)

// version is set by the build.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "edgekeep:", err)
		os.Exit(1)
	}
}

// app is what the commands share.
type app struct {
	out, err io.Writer
	kit      string
	json     bool
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	a := &app{out: stdout, err: stderr}
	root := &cobra.Command{
		Use:   "edgekeep",
		Short: "Operate a fleet of Edgekeep gateways, read their data, check their evidence",
		Long: "Edgekeep seals sensor readings inside a small trusted process on edge gateways and\n" +
			"attests to the cloud what was booted. This command is for operators (gateways,\n" +
			"commands, workloads), consumers (data, results, infer) and auditors (verify).\n" +
			"`edgekeep demo` shows it all on this machine.",
		Version: version, SilenceUsage: true, SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.PersistentFlags().StringVar(&a.kit, "kit", defaultKit(), "directory with your certificate and keys (or EDGEKEEP_KIT)")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON")
	root.AddCommand(a.gatewayCommand(), a.attestCommand(), a.commandCommand(), a.dataCommand(), a.workloadCommand(), a.inferCommand(),
		a.verifyCommand(), a.demoCommand())
	return root.ExecuteContext(ctx)
}

func defaultKit() string {
	if dir := os.Getenv("EDGEKEEP_KIT"); dir != "" {
		return dir
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "edgekeep-kit"
	}
	return filepath.Join(dir, "edgekeep")
}

// connect connects with the kit.
func (a *app) connect() (*client.Client, error) {
	kit, err := client.LoadKit(a.kit)
	if err != nil {
		return nil, fmt.Errorf("%w\nname your kit's directory with --kit or EDGEKEEP_KIT; `edgekeep-cloud init` made them", err)
	}
	return kit.Connect()
}

// with runs f with a connection.
func (a *app) with(f func(c *client.Client) error) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

// print prints v as one JSON line if asked to, else what text writes.
func (a *app) print(v any, text func(w io.Writer)) error {
	if a.json {
		return json.NewEncoder(a.out).Encode(v)
	}
	text(a.out)
	return nil
}

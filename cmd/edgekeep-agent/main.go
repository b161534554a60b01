// Edgekeep-agent is the gateway's process on the network: it moves what the keep
// sealed and signed, and can open none of it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"edgekeep/agent"
	"edgekeep/internal/config"
)

// version is set by the build.
var version = "devel"

// file is agent.toml. configs/agent.toml explains every key.
type file struct {
	Broker struct {
		URL     string `toml:"url"`
		BootURL string `toml:"boot_url"`
		CA      string `toml:"ca"`
	} `toml:"broker"`
	Keep struct {
		Socket string `toml:"socket"`
	} `toml:"keep"`
	State struct {
		Dir string `toml:"dir"`
	} `toml:"state"`
	Spool struct {
		Bytes int64 `toml:"bytes"`
	} `toml:"spool"`
	Instances struct {
		Bytes int64 `toml:"bytes"`
	} `toml:"instances"`
	Blobs struct {
		Bytes int64 `toml:"bytes"`
	} `toml:"blobs"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "edgekeep-agent:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("edgekeep-agent", flag.ContinueOnError)
	path := flags.String("config", "/etc/edgekeep/agent.toml", "configuration `file`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var f file
	f.Keep.Socket, f.State.Dir, f.Spool.Bytes = "/run/edgekeep/keep.sock", "/var/lib/edgekeep/agent", 1<<30
	f.Instances.Bytes, f.Blobs.Bytes = 1<<30, 512<<20
	if err := config.Load(*path, &f); err != nil {
		return err
	}
	if f.Broker.BootURL == "" {
		f.Broker.BootURL = f.Broker.URL
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	a, err := agent.New(agent.Config{
		Broker: f.Broker.URL, BootBroker: f.Broker.BootURL, CA: f.Broker.CA,
		KeepSocket: f.Keep.Socket, State: f.State.Dir, SpoolBytes: f.Spool.Bytes,
		InstanceBytes: f.Instances.Bytes, BlobBytes: f.Blobs.Bytes,
	}, log)
	if err != nil {
		return fmt.Errorf("%s: %w", *path, err)
	}
	log.Info("ready", "version", version)
	return a.Run(ctx)
}

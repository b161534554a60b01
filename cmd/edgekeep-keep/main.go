// Edgekeep-keep is the trusted process of a gateway: it seals readings and
// attests. It needs the TPM and two sockets, and gives up everything else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/internal/sandbox"
	"edgekeep/tee/keep"
)

// version is set by the build.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "edgekeep-keep:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("edgekeep-keep", flag.ContinueOnError)
	path := flags.String("config", "/etc/edgekeep/keep.toml", "configuration `file`")
	reset := flags.Bool("reset-identity", false, "give up an identity whose state is lost; the gateway then has to be approved again")
	if err := flags.Parse(args); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	f, cfg, err := load(*path)
	if err != nil {
		return err
	}
	cfg.Reset = *reset
	keepSocket, err := listen(f.Sockets.Keep, f.Sockets.KeepMode)
	if err != nil {
		return err
	}
	ingest, err := listen(f.Sockets.Ingest, f.Sockets.IngestMode)
	if err != nil {
		return err
	}
	var runners net.Listener
	if cfg.RunnerUID != keep.NoRunners {
		if runners, err = listen(f.Sockets.Runner, f.Sockets.RunnerMode); err != nil {
			return err
		}
	}
	cfg.Hardening, err = sandbox.Apply(sandbox.Policy{
		Files: []string{cfg.TPM}, Write: []string{filepath.Dir(f.Sockets.Keep), filepath.Dir(f.Sockets.Ingest), filepath.Dir(f.Sockets.Runner)},
	})
	if err != nil {
		return err
	}
	k, err := keep.New(cfg, log)
	if err != nil {
		return err
	}
	log.Info("ready", "version", version, "hardening", fmt.Sprint(cfg.Hardening))
	g, ctx := errgroup.WithContext(ctx)
	requests, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g.Go(func() error {
		defer end() // the agent is served until it has taken what was sealed last
		err := k.Ingest(ctx, ingest)
		k.AwaitTaken(3 * time.Second)
		return err
	})
	g.Go(func() error { return serve(requests, keepSocket, k, log) })
	g.Go(func() error { k.Repeat(ctx); return nil })
	if runners != nil {
		g.Go(func() error { return k.Runners(ctx, runners) })
	}
	return errors.Join(g.Wait(), k.Close())
}

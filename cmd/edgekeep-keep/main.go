// Edgekeep-keep is the trusted process of a gateway: it seals readings and
// attests. It needs the TPM and two sockets, and gives up everything else.
package main

import (
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/internal/config"
	"edgekeep/internal/sandbox"
	"edgekeep/tee"
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
	cfg.Hardening, err = sandbox.Apply(sandbox.Policy{
		Files: []string{cfg.TPM}, Write: []string{filepath.Dir(f.Sockets.Keep), filepath.Dir(f.Sockets.Ingest)},
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
	return errors.Join(g.Wait(), k.Close())
}

// serve answers the agent's requests on every connection.
func serve(ctx context.Context, l net.Listener, h tee.Handler, log *slog.Logger) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				err = nil
			}
			return errors.Join(err, g.Wait())
		}
		g.Go(func() error {
			if err := tee.ServeConn(ctx, conn, h); err != nil && ctx.Err() == nil {
				log.Warn("the agent's connection ended", "err", err)
			}
			return nil
		})
	}
}

func decodeDigest(s string) ([]byte, error) {
	b, err := hex.DecodeString(strings.TrimPrefix(s, "sha256:"))
	if err != nil || len(b) != 32 {
		return nil, errors.New(`roots must be the SHA-256 of your tenant's trust roots, 64 hexadecimal digits: "edgekeep-cloud init" printed it`)
	}
	return b, nil
}

func load(path string) (file, keep.Config, error) {
	f := defaults()
	if err := config.Load(path, &f); err != nil {
		return f, keep.Config{}, err
	}
	cfg, err := f.keep()
	if err != nil {
		return f, cfg, fmt.Errorf("%s: %w", path, err)
	}
	return f, cfg, nil
}

// Edgekeep-runner executes one workload instance at a time, for the keep. It is
// two processes: this one, which has nothing but the connection, and kills the
// other one when the keep hangs up; and the worker, which has the guest in it. A
// guest in a tight loop can stop every goroutine of its own process, so it takes
// another one to end it.
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
	"syscall"
	"time"

	"edgekeep/tee/runner"
)

// version is set by the build.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "edgekeep-runner:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("edgekeep-runner", flag.ContinueOnError)
	socket := flags.String("socket", "/run/edgekeep/runner.sock", "the keep's `socket` for runners")
	interpreter := flags.Bool("interpreter", false, "interpret modules, also where they could be compiled")
	worker := flags.Bool("worker", false, "be the worker: the connection is file descriptor 3")
	if err := flags.Parse(args); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	if *worker {
		return work(ctx, *interpreter)
	}
	log.Info("ready", "version", version)
	for ctx.Err() == nil {
		conn, err := net.Dial("unix", *socket)
		if err == nil {
			err = supervise(ctx, conn.(*net.UnixConn), *interpreter, stderr)
		}
		if err != nil && ctx.Err() == nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
			log.Warn("the worker ended", "reason", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// work is the worker's whole life.
func work(ctx context.Context, interpreter bool) error {
	f := os.NewFile(3, "keep")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("the connection to the keep: %w", err)
	}
	defer conn.Close()
	w, err := runner.Prepare(runner.Config{Version: version, Interpreter: interpreter})
	if err != nil {
		return err
	}
	if err := confine(); err != nil {
		return err
	}
	return w.Run(ctx, conn)
}

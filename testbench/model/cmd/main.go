// Model checks the model of the move, docs/move.pml: see the package above. Its
// last line is {"states":N,"errors":0,"mutants_caught":M,"mutants":M}.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"edgekeep/testbench/model"
)

func main() {
	short := flag.Bool("short", false, "leave out the larger bounds")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	_, err := model.Run(ctx, os.Stdout, *short)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "model:", err)
		os.Exit(1)
	}
}

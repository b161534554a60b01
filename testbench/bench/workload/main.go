// Workload measures what confidential workloads cost, as ratios within one run:
// absolute times mean little on a shared machine. Everything runs on one machine,
// as real processes, in a temporary directory.
//
//	batch_vs_wazero  readings/s of the example "anomaly" in a gateway whose driver
//	                 replays at full speed (driver, keep, agent and runner share the
//	                 machine; results are sealed and durable) / readings/s of the
//	                 same module in bare wazero, alone, on batches of the same size
//	batch_cpu        CPU time that bare wazero takes for a batch / CPU time of the
//	                 runner for it: what opening, feeding, committing and sealing
//	                 leave of the runner
//	batch_vs_native  as batch_vs_wazero, against the same Go code without WebAssembly
//	loop_vs_wazero   time of a tight loop of about a second in a runner / in bare
//	                 wazero; both less the time of a batch without the loop
//	start_ms         from the operator's command to the first answer: cold, when the
//	                 gateway has to fetch and compile the bundle; warm, when it has it
//	                 and compiles; bare, wazero's own time to compile and instantiate
//	move_ms          downtime of a move, by MiB of state, as a client sees it who asks
//	                 for inference all the time: from the last answer of the source to
//	                 the first of the target. Meanwhile the instance consumes a stream
//	move_vs_bare     that / encrypting (AES-256-GCM) and sending the final delta over
//	                 loopback TCP, and decrypting it
//	moved_vs_state_bytes  bytes of sealed state that went over / guest memory
//	link             the same for 4 MiB, each gateway behind a link of 10 Mbit/s and
//	                 100 ms (a relay of the bench's own: see link.go)
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

type figures struct {
	BatchVsWazero float64            `json:"batch_vs_wazero"`
	BatchVsNative float64            `json:"batch_vs_native"`
	BatchCPU      float64            `json:"batch_cpu"`
	BatchesPerS   float64            `json:"batches_per_s"`
	LoopVsWazero  float64            `json:"loop_vs_wazero"`
	StartMS       map[string]float64 `json:"start_ms"`
	MoveMS        map[string]float64 `json:"move_ms"`
	MoveVsBare    map[string]float64 `json:"move_vs_bare"`
	MovedVsState  map[string]float64 `json:"moved_vs_state_bytes"`
	Link          map[string]float64 `json:"link"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("workload", flag.ContinueOnError)
	short := flags.Bool("short", false, "fewer and smaller, and no link: in less than a minute")
	only := flags.String("only", "", "`part` to measure: batch, loop, start, move or link; all if empty")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	b, err := prepare(ctx, *short)
	if err != nil {
		return err
	}
	defer func() { _ = b.end() }() // what is left is in a temporary directory
	for _, p := range []struct {
		name string
		do   func(context.Context) error
	}{{"loop", b.loop}, {"start", b.start}, {"batch", b.batch}, {"move", b.moves}, {"link", b.link}} {
		if *only != "" && *only != p.name {
			continue
		}
		fmt.Println(p.name, "…")
		if err := p.do(ctx); err != nil {
			return fmt.Errorf("%s: %w\n%s", p.name, err, b.logs())
		}
	}
	line, err := json.Marshal(b.figures)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", line)
	return nil
}

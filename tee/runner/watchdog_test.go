package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"edgekeep/workload"
)

// runUntilKilled is the child of TestWatchdog: a guest in a tight loop, and beside it
// a garbage collection, which waits for the guest for ever and everything with it.
func runUntilKilled() {
	ctx := context.Background()
	wasm, err := os.ReadFile(os.Getenv("EDGEKEEP_TEST_WATCHDOG"))
	check := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	check(err)
	h, err := NewHost(false)
	check(err)
	m := testManifest(workload.Reactor)
	m.Limits.CPU = 300
	g, err := h.Load(ctx, m, wasm, nil)
	check(err)
	check(g.Start(ctx))
	_, err = g.Batch(ctx, []byte("e"))
	check(err)
	begin := time.Now() // disarmed, more than its budget does no harm
	for time.Since(begin) < 600*time.Millisecond {
	}
	fmt.Println("running")
	go runtime.GC()
	_, err = g.Batch(ctx, []byte("b"))
	check(fmt.Errorf("the batch ended: %w", err))
}

func TestWatchdog(t *testing.T) {
	module(t, workload.Reactor)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "EDGEKEEP_TEST_WATCHDOG="+built.dir+"/reactor.wasm")
	cmd.Stderr = os.Stderr
	killed := time.AfterFunc(30*time.Second, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer killed.Stop()
	out, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || string(out) != "running\n" {
		t.Fatalf("%q, %v", out, err)
	}
	if used := exit.UserTime() + exit.SystemTime(); used > 5*time.Second {
		t.Errorf("it used %v", used)
	}
}

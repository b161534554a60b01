package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/workload"
	"edgekeep/workload/examples/anomaly/detect"
)

// loop compares a tight loop in a runner with one in bare wazero, in turn.
func (b *bench) loop(ctx context.Context) error {
	module, err := b.guest(ctx, 0)
	if err != nil {
		return err
	}
	w, err := b.pack(ctx, manifest("loop", 16<<20), module)
	if err != nil {
		return err
	}
	if err := b.deploy(ctx, b.edge, "loop", w); err != nil {
		return err
	}
	g, err := b.asker.at(ctx, b.edge.Name)
	if err != nil {
		return err
	}
	if _, err := b.asker.answered(ctx, g, "loop", "spin 0"); err != nil {
		return err
	}
	wazero, err := newBare(ctx, module, "")
	if err != nil {
		return err
	}
	defer wazero.close()
	alone := func(rounds int) (time.Duration, error) {
		began := time.Now()
		err := wazero.batch(ctx, []byte("spin "+strconv.Itoa(rounds)))
		return time.Since(began), err
	}
	const few = 50_000_000
	took, err := alone(few)
	if err != nil {
		return err
	}
	rounds, n := int(few/took.Seconds()), 9
	if b.short {
		rounds, n = rounds/3, 5
	}
	var here, there []float64
	for range n {
		bare, err := less(alone(rounds))(alone(0))
		if err != nil {
			return err
		}
		full, err := less(b.asker.answered(ctx, g, "loop", "spin "+strconv.Itoa(rounds)))(b.asker.answered(ctx, g, "loop", "spin 0"))
		if err != nil {
			return err
		}
		there, here = append(there, bare.Seconds()), append(here, full.Seconds())
	}
	b.LoopVsWazero = round(median(here) / median(there))
	fmt.Printf("  a loop of %.0f ms takes %.0f ms in a runner\n", 1000*median(there), 1000*median(here))
	return b.stop(ctx, "loop")
}

// less subtracts the second of two measurements from the first.
func less(a time.Duration, err error) func(time.Duration, error) (time.Duration, error) {
	return func(b time.Duration, err2 error) (time.Duration, error) {
		if err == nil {
			err = err2
		}
		return a - b, err
	}
}

const model = "machine-temperature.json"

func (b *bench) packAnomaly(ctx context.Context, module, trained []byte, streams ...string) (packed, error) {
	m := manifest("anomaly", 64<<20, streams...)
	m.Args, m.Models = []string{model}, []workload.Model{{Name: model}}
	return b.pack(ctx, m, module, trained)
}

// start measures how long it takes until an instance answers.
func (b *bench) start(ctx context.Context) error {
	module, trained, err := b.anomaly(ctx)
	if err != nil {
		return err
	}
	g, err := b.asker.at(ctx, b.edge.Name)
	if err != nil {
		return err
	}
	times := map[string][]float64{}
	n := 3
	if b.short {
		n = 1
	}
	for range n {
		w, err := b.packAnomaly(ctx, module, trained) // under a new key: another bundle
		if err != nil {
			return err
		}
		for _, kind := range []string{"cold", "warm"} {
			time.Sleep(time.Second) // until the runner is ready, which `stop` has ended
			began := time.Now()
			if err := b.deploy(ctx, b.edge, "start", w); err != nil {
				return err
			}
			if _, err := b.asker.answered(ctx, g, "start", string(batchOf(0, 1))); err != nil {
				return err
			}
			times[kind] = append(times[kind], ms(time.Since(began)))
			if err := b.stop(ctx, "start"); err != nil {
				return err
			}
		}
		began := time.Now()
		alone, err := newBare(ctx, module, b.path("examples/anomaly"), "anomaly", "model.json")
		if err != nil {
			return err
		}
		times["bare"] = append(times["bare"], ms(time.Since(began)))
		alone.close()
	}
	for kind, t := range times {
		b.StartMS[kind] = median(t)
	}
	fmt.Printf("  %v\n", b.StartMS)
	return nil
}

// batchOf is a batch as the runner makes it of what `replay` sends.
func batchOf(first, n int) []byte {
	var out []byte
	name := sealing.Name("replay", nil, "value")
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Unix()
	for i := first; i < first+n; i++ {
		out = fmt.Appendf(out, "{\"n\":%q,\"t\":%d,\"v\":%.3f}\n", name, at+int64(i), 80+float64(i%9973)/700)
	}
	return out
}

const readingsInBatch = 500

// batch compares batches in a gateway with the same in wazero, and in native Go.
func (b *bench) batch(ctx context.Context) error {
	module, trained, err := b.anomaly(ctx)
	if err != nil {
		return err
	}
	parsed, err := detect.ParseModel(trained)
	if err != nil {
		return err
	}
	wazero, err := newBare(ctx, module, b.path("examples/anomaly"), "anomaly", "model.json")
	if err != nil {
		return err
	}
	defer wazero.close()
	bareWall, bareCPU, err := b.rate(func(in []byte) error { return wazero.batch(ctx, in) })
	if err != nil {
		return err
	}
	native := detect.NewDetector(parsed)
	nativeWall, _, err := b.rate(func(in []byte) error { _, err := native.Batch(in); return err })
	if err != nil {
		return err
	}
	wall, cpu, err := b.gatewayRate(ctx, module, trained)
	if err != nil {
		return err
	}
	b.BatchesPerS = round(1 / wall)
	b.BatchVsWazero, b.BatchVsNative, b.BatchCPU = round(bareWall/wall), round(nativeWall/wall), round(bareCPU/cpu)
	fmt.Printf("  a batch of %d readings: native %.2f ms; wazero %.2f ms, CPU %.2f ms; gateway %.2f ms, CPU of its runner %.2f ms\n",
		readingsInBatch, 1000*nativeWall, 1000*bareWall, 1000*bareCPU, 1000*wall, 1000*cpu)
	return nil
}

func (b *bench) batches() int {
	if b.short {
		return 100
	}
	return 1000
}

// rate is the time, and this process's CPU time, that a batch takes in s.
func (b *bench) rate(do func([]byte) error) (wall, cpu float64, err error) {
	n := b.batches()
	inputs := make([][]byte, n)
	for i := range inputs {
		inputs[i] = batchOf(i*readingsInBatch, readingsInBatch)
	}
	before, err := cpuTime(os.Getpid())
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	for _, in := range inputs {
		if err := do(in); err != nil {
			return 0, 0, err
		}
	}
	wall = time.Since(began).Seconds() / float64(n)
	after, err := cpuTime(os.Getpid())
	return wall, (after - before) / float64(n), err
}

// gatewayRate is the time, and the runner's CPU time, that a batch takes in a
// gateway whose driver does what it can.
func (b *bench) gatewayRate(ctx context.Context, module, trained []byte) (wall, cpu float64, err error) {
	w, err := b.packAnomaly(ctx, module, trained, "numbers")
	if err != nil {
		return 0, 0, err
	}
	time.Sleep(time.Second) // until the runner is ready, which an earlier `stop` has ended
	if err := b.deploy(ctx, b.edge, "anomaly", w, "numbers"); err != nil {
		return 0, 0, err
	}
	g, err := b.asker.at(ctx, b.edge.Name)
	if err != nil {
		return 0, 0, err
	}
	if _, err := b.asker.answered(ctx, g, "anomaly", string(batchOf(0, 1))); err != nil {
		return 0, 0, err
	}
	pid, err := workerOf(b.edge.RunnerPIDs()[0])
	if err != nil {
		return 0, 0, err
	}
	total := b.batches() * readingsInBatch
	if err := b.replay(total, 0); err != nil {
		return 0, 0, err
	}
	var began time.Time
	var from, cpuFrom float64
	keep := &tee.Socket{Path: b.edge.KeepSocket()}
	defer keep.Close()
	err = until(ctx, "all readings have results", func() (bool, error) {
		n, err := results(ctx, keep, "anomaly")
		if err != nil {
			return false, err
		}
		now, err := cpuTime(pid)
		if began.IsZero() {
			if n >= float64(total)/10 { // it is at speed
				began, from, cpuFrom = time.Now(), n, now
			}
			return false, err
		}
		batches := (n - from) / readingsInBatch
		wall, cpu = time.Since(began).Seconds()/batches, (now-cpuFrom)/batches
		return n >= float64(total), err
	})
	if err != nil {
		return 0, 0, err
	}
	if line, err := b.edge.StopDriver("numbers"); err != nil {
		return 0, 0, fmt.Errorf("the driver: %w: %s", err, line)
	}
	return wall, cpu, b.stop(ctx, "anomaly")
}

// results is how many results of an instance the keep has taken.
func results(ctx context.Context, keep *tee.Socket, instance string) (float64, error) {
	s, err := tee.Status{}.Do(ctx, keep)
	if err != nil {
		return 0, err
	}
	for _, src := range s.Sources {
		if src.Name == instance {
			return float64(src.Lines), nil
		}
	}
	return 0, nil
}

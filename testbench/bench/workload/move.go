package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"edgekeep/internal/durable"
	"edgekeep/testbench/rig"
	"edgekeep/workload"
)

// moved is what came of moves with so much state.
type moved struct {
	down  []time.Duration // a client's view
	total []time.Duration // from the command on
	bytes []float64       // of sealed state
	final []float64       // of them, after the source had stopped
	bare  []time.Duration // for the final ones
}

// moves measures moves of several sizes.
func (b *bench) moves(ctx context.Context) error {
	sizes, n := []int{4, 64, 256}, 3
	if b.short {
		sizes, n = []int{4}, 3
	}
	for _, mib := range sizes {
		m, err := b.movesOf(ctx, mib, n)
		if err != nil {
			return fmt.Errorf("%d MiB: %w", mib, err)
		}
		k := strconv.Itoa(mib)
		b.MoveMS[k] = ms(median(m.down))
		b.MoveVsBare[k] = round(median(m.down).Seconds() / median(m.bare).Seconds())
		b.MovedVsState[k] = round(median(m.bytes) / float64(mib<<20))
		m.tell(mib)
	}
	return nil
}

func (m moved) tell(mib int) {
	fmt.Printf("  %d MiB: down %v; sent %.1f MiB, the last %.0f KiB of it after the stop, bare %v; the whole move %v\n",
		mib, rounded(m.down), median(m.bytes)/(1<<20), median(m.final)/1024, median(m.bare).Round(time.Microsecond), rounded(m.total))
}

func rounded(xs []time.Duration) (out []time.Duration) {
	for _, x := range xs {
		out = append(out, x.Round(100*time.Microsecond))
	}
	return out
}

// movesOf moves an instance back and forth n times, while it consumes a stream.
func (b *bench) movesOf(ctx context.Context, mib, n int) (m moved, err error) {
	module, err := b.guest(ctx, mib)
	if err != nil {
		return m, err
	}
	instance := fmt.Sprintf("move-%d", mib)
	w, err := b.pack(ctx, manifest(instance, uint64(mib+16)<<20, "numbers"), module)
	if err != nil {
		return m, err
	}
	time.Sleep(time.Second) // until the runners are ready, which an earlier `stop` has ended
	if err := b.deploy(ctx, b.edge, instance, w, "numbers"); err != nil {
		return m, err
	}
	if err := b.replay(500*600, 500); err != nil { // it is stopped before it ends
		return m, err
	}
	from, to := b.edge, b.other
	for range n {
		if err := b.moveOnce(ctx, &m, instance, from, to); err != nil {
			return m, err
		}
		from, to = to, from
	}
	if line, err := b.edge.StopDriver("numbers"); err != nil {
		return m, fmt.Errorf("the driver: %w: %s", err, line)
	}
	return m, b.stop(ctx, instance)
}

// moveOnce moves an instance while a client asks for inference all the time: there
// where it got the last answer, and when it gets none any more, at the other
// place.
func (b *bench) moveOnce(ctx context.Context, m *moved, instance string, from, to *rig.Gateway) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	there, err := b.asker.at(ctx, to.Name)
	if err != nil {
		return err
	}
	here, err := b.asker.at(ctx, from.Name)
	if err != nil {
		return err
	}
	const input = "{}\n"
	if _, err := b.asker.answered(ctx, here, instance, input); err != nil {
		return err
	}
	time.Sleep(time.Second) // the runner at the target is ready, and readings flow
	began := time.Now()
	sent := make(chan error, 1)
	go func() { // joined below
		res, err := b.op.Move(ctx, instance, to.Name)
		if err == nil && !res.Done {
			err = fmt.Errorf("the move is refused: %s", res.Reason)
		}
		sent <- err
	}()
	last, err := b.lastAnswer(ctx, here, instance, input)
	if err != nil {
		return err
	}
	if _, err := b.asker.answered(ctx, there, instance, input); err != nil {
		return err
	}
	now := time.Now()
	if err := <-sent; err != nil {
		return err
	}
	m.down, m.total = append(m.down, now.Sub(last)), append(m.total, now.Sub(began))
	return b.weigh(m, instance, to)
}

// lastAnswer asks until the instance has gone.
func (b *bench) lastAnswer(ctx context.Context, g at, instance, input string) (last time.Time, err error) {
	for {
		refused, err := b.asker.ask(ctx, g, instance, input)
		if err != nil && (!refused || ctx.Err() != nil) {
			return last, err
		}
		if refused {
			return last, nil // it has gone: that is what was waited for
		}
		last = time.Now()
		time.Sleep(2 * time.Millisecond) // asking takes the machine's time too
	}
}

// weigh looks up what a target has taken in: first what came under the session key,
// then the last delta, and then its own.
func (b *bench) weigh(m *moved, instance string, to *rig.Gateway) error {
	dir, err := os.MkdirTemp(b.dir, "log-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, os.DirFS(to.Path("agent/instances", instance))); err != nil {
		return fmt.Errorf("copying the instance's log: %w", err)
	}
	log, err := durable.Open(dir, durable.Options{MaxBytes: 1 << 30})
	if err != nil {
		return err
	}
	defer log.Close()
	var keys []string
	sizes := map[string]float64{}
	for from := log.First(); from < log.Next(); {
		entries, err := log.Read(from, 256, 8<<20)
		if err != nil {
			return err
		}
		for _, e := range entries {
			key, _, err := workload.PeekPart(e.Data)
			if err != nil {
				return err
			}
			if len(keys) == 0 || keys[len(keys)-1] != string(key) {
				keys = append(keys, string(key))
			}
			sizes[string(key)] += float64(len(e.Data))
			from = e.Index + 1
		}
	}
	if len(keys) < 2 {
		return fmt.Errorf("the log of %s was trimmed before it could be weighed", instance)
	}
	final := sizes[keys[1]]
	bare, err := carry(int(final))
	if err != nil {
		return err
	}
	m.bytes, m.final, m.bare = append(m.bytes, sizes[keys[0]]+final), append(m.final, final), append(m.bare, bare)
	return nil
}

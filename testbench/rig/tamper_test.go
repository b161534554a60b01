package rig

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/durable"
	"edgekeep/workload"
)

// logOf reads what is in an instance's log in an agent's directory.
func (b *bench) logOf(dir string) (parts [][]byte) {
	b.t.Helper()
	log, err := durable.Open(dir, durable.Options{MaxBytes: 1 << 30})
	b.must(err)
	defer log.Close()
	for next := log.First(); next < log.Next(); {
		entries, err := log.Read(next, 1<<20, 1<<30)
		b.must(err)
		for _, e := range entries {
			parts = append(parts, e.Data)
			next = e.Index + 1
		}
	}
	return parts
}

// putLog puts a log in its place, with good checksums: as root of the box would.
func (b *bench) putLog(dir string, parts [][]byte) {
	b.t.Helper()
	b.must(os.RemoveAll(dir))
	if len(parts) == 0 {
		return
	}
	log, err := durable.Open(dir, durable.Options{MaxBytes: 1 << 30})
	b.must(err)
	for _, p := range parts {
		_, err := log.Append(context.WithoutCancel(b.ctx), p)
		b.must(err)
	}
	b.must(log.Close())
}

// TestTamperedState alters what the agent stores of an instance in each of the ways
// that there are, while its keep runs. The instance does not go on from it and says
// why, each time for another reason; nothing wrong is ever let out. With what was
// there before it goes on, and each reading counts once.
func TestTamperedState(t *testing.T) {
	module := clang(t, "counter.c", "-mexec-model=reactor")
	b, g := up(t, 3*time.Minute, Options{}, "numbers")
	b.must(g.StartRunners(2))
	w, from := b.pack(counter("numbers"), module), workload.Source{Gateway: g.Name, Stream: "numbers"}
	b.deploy(g, "counter", w, from)
	b.deploy(g, "another", w, from)
	const n = 30_000
	path, sum := b.numbers(n)
	b.must(g.StartDriver("numbers", "replay", path, "--speed", "300"))
	c := b.tally("counter")
	c.upTo(300)
	logs := func(name string) string { return g.Path("agent/instances", name) }
	b.must(g.KillAgent())
	old := b.logOf(logs("counter"))
	b.must(g.StartAgent(b.ctx))

	for _, how := range []struct {
		name, reason string
		do           func(parts [][]byte) [][]byte
	}{
		{"corrupted", "changed or damaged", func(p [][]byte) [][]byte {
			last := bytes.Clone(p[len(p)-1])
			last[len(last)-1] ^= 1
			return append(p[:len(p)-1], last)
		}},
		{"the newest cut off", "put back to an older state", func(p [][]byte) [][]byte { return p[:len(p)-1] }},
		{"an old copy", "put back to an older state", func([][]byte) [][]byte { return old }},
		{"the oldest cut off", "needs an earlier one", func(p [][]byte) [][]byte { return p[1:] }},
		{"one left out", "out of order or was played twice", func(p [][]byte) [][]byte { return slices.Delete(p, len(p)/2, len(p)/2+1) }},
		{"one played twice", "out of order or was played twice", func(p [][]byte) [][]byte { return append(p, p[len(p)-1]) }},
		{"of another instance", "the state of another instance", func([][]byte) [][]byte { return b.logOf(logs("another")) }},
		{"gone", "log is gone", func([][]byte) [][]byte { return nil }},
	} {
		count := int(c.count)
		c.upTo(count + 100) // it has come back to life
		b.must(g.KillAgent())
		genuine := b.logOf(logs("counter"))
		b.putLog(logs("counter"), how.do(slices.Clone(genuine)))
		b.must(g.StartAgent(b.ctx))
		b.until(how.name+" is refused", func() error {
			all, err := b.workloads(g)
			if err != nil {
				return err
			}
			for _, w := range all {
				if w.Instance == "counter" && !w.Running && strings.Contains(w.Reason, how.reason) {
					t.Logf("%s: %s", how.name, w.Reason)
					return nil
				}
			}
			return fmt.Errorf("its evidence says %+v", all)
		})
		b.must(g.KillAgent())
		b.putLog(logs("counter"), genuine)
		b.must(g.StartAgent(b.ctx))
	}
	c.upTo(int(c.count) + 100)
	b.must(g.KillDriver("numbers"))
	b.must(g.StartDriver("numbers", "replay", path, "--speed", "6000"))
	c.upTo(n)
	if c.count != n || c.sum != float64(sum) {
		t.Errorf("counted %.0f with the sum %.0f, it was %d and %d", c.count, c.sum, n, sum)
	}
	if fenced := c.r.Fenced(); fenced != 0 {
		t.Errorf("%d results were let out that do not count", fenced)
	}
}

package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"edgekeep/workload"
)

func TestLoadRefuses(t *testing.T) {
	h := newHost(t, false)
	for name, c := range map[string]struct {
		change func(*workload.Manifest)
		wasm   []byte
		want   string
	}{
		"another shape":   {func(m *workload.Manifest) { m.Shape = workload.Filter }, module(t, workload.Reactor), "the manifest calls it a filter"},
		"a filter":        {func(*workload.Manifest) {}, module(t, workload.Filter), "the manifest calls it a reactor"},
		"too much memory": {func(m *workload.Manifest) { m.Limits.Memory = 64 << 10 }, module(t, workload.Reactor), "its manifest allows 64"},
		"no module":       {func(*workload.Manifest) {}, []byte("no module"), "malformed module"},
		"invalid code":    {func(*workload.Manifest) {}, invalid(), "invalid function[0]"},
	} {
		t.Run(name, func(t *testing.T) {
			m := testManifest(workload.Reactor)
			c.change(&m)
			_, err := h.Load(t.Context(), m, c.wasm, nil)
			var refused *RefusedError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// invalid is a reactor whose edgekeep_alloc leaves no value for its result, which
// is for the runtime to find.
func invalid() []byte {
	return slices.Concat([]byte("\x00asm\x01\x00\x00\x00"),
		[]byte("\x01\x0c\x02\x60\x01\x7f\x01\x7f\x60\x02\x7f\x7f\x01\x7e"), // (i32) -> (i32), (i32, i32) -> (i64)
		[]byte("\x03\x03\x02\x00\x01\x05\x03\x01\x00\x01"),
		[]byte("\x07\x2c\x03\x06memory\x02\x00\x0eedgekeep_alloc\x00\x00\x0eedgekeep_batch\x00\x01"),
		[]byte("\x0a\x09\x02\x02\x00\x0b\x04\x00\x42\x00\x0b"))
}

// TestFailures: what can go wrong in a batch is told apart, in the host's words.
func TestFailures(t *testing.T) {
	for _, c := range []struct{ shapes, in, want string }{
		{"filter reactor", "t", "unreachable"},
		{"filter reactor", "k", "wasm error"},
		{"filter reactor", "x3", "exit code 3"},
		{"reactor", "x0", "exit code 0"},
		{"filter", "f", "exit code 1"},
		{"reactor", "f", "says that the batch failed"},
		{"filter", "o300000", "more than the 262144 bytes"},
		{"reactor", "o300000", "results of 300000 bytes, its manifest allows 262144"},
		{"reactor", "p", "outside of its memory"},
		{"reactor", "h", "its manifest allows"},
		{"filter", "m2000", "exit code 1"},
		{"reactor", "m2000", "says that the batch failed"},
		{"filter", "d2000000", "exit code 1"},
		{"reactor", "d2000000", "says that the batch failed"},
		{"reactor", "e" + strings.Repeat("x", 1<<20), "no room for a batch of 1048577 bytes"},
	} {
		for shape := range strings.FieldsSeq(c.shapes) {
			t.Run(shape+" "+c.in[:min(len(c.in), 8)], func(t *testing.T) {
				g := probe(t, shape)
				out, err := g.Batch(t.Context(), []byte(c.in))
				if err == nil || !strings.Contains(err.Error(), c.want) || out != nil || strings.Contains(err.Error(), "\n") {
					t.Errorf("got %.40q, %v, want %q", out, err, c.want)
				}
			})
		}
	}
}

func TestBatches(t *testing.T) {
	for _, shape := range []string{workload.Filter, workload.Reactor} {
		g := probe(t, shape)
		for _, in := range []string{"", "e", "e" + strings.Repeat("x", 200_000), "o262144"} {
			want := in
			if in == "o262144" {
				want = strings.Repeat("o", 262144)
			}
			if got := batch(t, g, in); got != want {
				t.Errorf("%s: %.30q gave %.30q of %d bytes", shape, in, got, len(got))
			}
		}
		if len(g.Digest()) != 32 || g.Protection() == "" {
			t.Errorf("digest %x, protection %q", g.Digest(), g.Protection())
		}
	}
}

func TestGuestLog(t *testing.T) {
	g := probe(t, workload.Reactor)
	_, err := g.Batch(t.Context(), []byte("f"))
	if got := g.Log(); err == nil || !slices.Equal(got, []string{"probe: as asked"}) {
		t.Errorf("%q, %v", got, err) // three writes, one line
	}
	g = probe(t, workload.Filter)
	batch(t, g, "w500")
	got := g.Log()
	if len(got) != maxLines+1 || got[0] != "line 0" || got[maxLines] != "runner: 300 more lines were dropped" {
		t.Errorf("%d lines, %q .. %q", len(got), got[0], got[len(got)-1])
	}
	w := lineWriter{g}
	for _, piece := range []string{"a", "", "b\nc\x1b[2J\xff\td\r\n\n", strings.Repeat("x", 3000), strings.Repeat("x", 3000) + "\ny"} {
		if n, err := w.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	if got, want := g.Log(), []string{"ab", "c\uFFFD[2J\uFFFD\td\uFFFD", "", strings.Repeat("x", maxLogLine), "y"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := g.Log(); len(got) != 0 {
		t.Errorf("again: %q", got)
	}
}

func TestSleepIsBounded(t *testing.T) {
	g := probe(t, workload.Reactor)
	g.deadline = time.Now().Add(-time.Second)
	if err := g.sleep(t.Context(), time.Hour); err == nil {
		t.Error("slept past the end of a batch's time")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g.deadline = time.Now().Add(time.Hour)
	if err := g.sleep(ctx, time.Hour); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := g.Batch(ctx, []byte("n3600")); err == nil {
		t.Error("a guest slept though its runner ends")
	}
}

// TestStateSurvives: counters, an open file without a name, clocks, and memory that
// has grown come along; each restore reseeds.
func TestStateSurvives(t *testing.T) {
	for _, interpreter := range []bool{false, true} {
		g, l := probe(t, workload.Reactor), newLog(t)
		l.commit(t, g, true)
		sizes := 0
		for n := 1; n <= 6; n++ {
			sizes += 2
			want := fmt.Sprintf("batch %d, %d bytes, reseeds %d, back 0, grown %d", n, sizes, n/2, 20*(n-1))
			if got := batch(t, g, "s"); got != want {
				t.Fatalf("got %q, want %q", got, want)
			}
			batch(t, g, "m20")
			sum := batch(t, g, "g7")
			l.commit(t, g, false)
			if n%2 == 1 { // elsewhere
				g = l.mustRestore(t, load(t, newHost(t, interpreter && n%4 == 1), testManifest(workload.Reactor), module(t, workload.Reactor), nil))
				if got := batch(t, g, "g0"); got != sum {
					t.Fatalf("memory: %s, want %s", got, sum)
				}
				l.commit(t, g, false)
			}
		}
	}
}

func TestFilterStateSurvives(t *testing.T) {
	g, l := probe(t, workload.Filter), newLog(t)
	l.commit(t, g, true)
	for n := 1; n <= 4; n++ {
		if got, want := batch(t, g, "c"), fmt.Sprintf("batch %d", n); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
		batch(t, load(t, g.host, g.manifest, module(t, workload.Filter), nil).started(t), "c") // another instance, apart
		l.commit(t, g, n == 2)
		g = l.mustRestore(t, load(t, newHost(t, false), testManifest(workload.Filter), module(t, workload.Filter), nil))
	}
}

func (g *Guest) started(t *testing.T) *Guest {
	t.Helper()
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return g
}

// TestFailedBatchLeavesNoTrace: after a batch that changed state and then failed,
// the same process goes on from the last commit.
func TestFailedBatchLeavesNoTrace(t *testing.T) {
	for _, shape := range []string{workload.Filter, workload.Reactor} {
		g, l := probe(t, shape), newLog(t)
		l.commit(t, g, true)
		count := "s"
		if shape == workload.Filter {
			count = "c"
		}
		batch(t, g, count)
		l.commit(t, g, false)
		for range 3 {
			batch(t, g, count)
			if shape == workload.Reactor {
				batch(t, g, "m30")
			}
			if _, err := g.Batch(t.Context(), []byte("t")); err == nil {
				t.Fatal("no trap")
			}
			l.mustRestore(t, g)
		}
		if got := batch(t, g, count); !strings.HasPrefix(got, "batch 2") || strings.Contains(got, "grown 30") {
			t.Errorf("%s: %q", shape, got)
		}
	}
}

// TestManyFullDeltas: a log may have more full deltas than a process has instances,
// also when a torn one makes the reader begin again.
func TestManyFullDeltas(t *testing.T) {
	g, l := probe(t, workload.Reactor), newLog(t)
	for n := range 3 * reactors {
		batch(t, g, "s")
		batch(t, g, "m3")
		l.commit(t, g, n%3 != 1)
	}
	h := newHost(t, false)
	h.tracked = h.tracked[:1]
	fresh := load(t, h, testManifest(workload.Reactor), module(t, workload.Reactor), nil)
	torn := &instanceLog{key: l.key, parts: l.parts[:1]}
	if err := torn.restore(fresh); !errors.Is(err, workload.StateTruncated) {
		t.Fatal(err)
	}
	if got := batch(t, l.mustRestore(t, fresh), "s"); !strings.HasPrefix(got, fmt.Sprintf("batch %d,", 3*reactors+1)) {
		t.Errorf("%q", got)
	}
}

func TestRestoreRefuses(t *testing.T) {
	ctx := context.Background()
	state := func(shape string) *instanceLog {
		g, l := probe(t, shape), newLog(t)
		l.commit(t, g, true)
		return l
	}
	other := testManifest(workload.Reactor)
	other.Limits.Memory = 4 << 20
	large, l := probe(t, workload.Reactor), newLog(t)
	batch(t, large, "m100")
	l.commit(t, large, true)
	for name, c := range map[string]struct {
		log *instanceLog
		m   workload.Manifest
	}{
		"a filter's":       {state(workload.Filter), testManifest(workload.Reactor)},
		"a reactor's":      {state(workload.Reactor), testManifest(workload.Filter)},
		"too large":        {l, other},
		"another module's": {changed(t, state(workload.Reactor), func(d *workload.Delta) { d.Globals = nil }), testManifest(workload.Reactor)},
		"a broken tree":    {changed(t, state(workload.Reactor), func(d *workload.Delta) { d.Tree = []byte{0xa0} }), testManifest(workload.Reactor)},
		"broken files":     {changed(t, state(workload.Reactor), func(d *workload.Delta) { d.FDs = []byte{0xa0} }), testManifest(workload.Reactor)},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.log.restore(load(t, newHost(t, false), c.m, module(t, c.m.Shape), nil)); err == nil {
				t.Error("went on from it")
			}
		})
	}
	g := load(t, newHost(t, false), testManifest(workload.Reactor), module(t, workload.Reactor), nil)
	r, err := g.Restorer()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Resume(ctx, r); err == nil {
		t.Error("went on from nothing")
	}
}

// changed is a log with its only delta changed, and without pages.
func changed(t *testing.T, l *instanceLog, change func(*workload.Delta)) *instanceLog {
	t.Helper()
	o, err := workload.NewStateOpener("probe", []workload.StateKey{l.key}, discard{})
	if err != nil {
		t.Fatal(err)
	}
	var d *workload.Delta
	for _, part := range l.parts {
		if d, err = o.Open(part); err != nil {
			t.Fatal(err)
		}
	}
	change(d)
	out := newLog(t)
	if err := out.sealer.Seal(*d, nil, func(part []byte) error { out.parts = append(out.parts, part); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

type discard struct{}

func (discard) Begin(*workload.Delta) error { return nil }
func (discard) Page(workload.Page) error    { return nil }
func (discard) End() error                  { return nil }

// TestContinuation: for the example guests in C, Rust and Go, any batches with
// commits and restores between them, in compiled and interpreted guests, give what
// one uninterrupted guest gives.
func TestContinuation(t *testing.T) {
	for _, c := range []struct {
		name     string
		batches  int
		readings int
		moves    int
	}{{"threshold", 40, 60, 8}, {"rolling", 40, 60, 8}, {"anomaly", 6, 8, 2}} {
		t.Run(c.name, func(t *testing.T) {
			m, wasm, models := example(t, c.name)
			random := rand.New(rand.NewPCG(5, 6))
			straight := start(t, newHost(t, false), m, wasm, models)
			g, l := start(t, newHost(t, false), m, wasm, models), newLog(t)
			l.commit(t, g, true)
			at, outputs := 0, 0
			for n := range c.batches {
				in := series(m.Input.Format, at, 1+random.IntN(c.readings))
				at += c.readings
				want, got := batch(t, straight, in), batch(t, g, in)
				if got != want {
					t.Fatalf("batch %d gave\n%s, want\n%s", n, got, want)
				}
				outputs += len(want)
				if random.IntN(2) == 0 {
					l.commit(t, g, random.IntN(6) == 0)
				}
				if n%(c.batches/c.moves) == 0 {
					l.commit(t, g, false)
					g.Close(context.Background())
					g = l.mustRestore(t, load(t, newHost(t, n/(c.batches/c.moves)%2 == 0), m, wasm, models))
				}
			}
			if outputs == 0 {
				t.Error("no outputs at all")
			}
		})
	}
}

// series is readings of two series, whose values cross 90 now and then.
func series(format string, at, n int) string {
	var b strings.Builder
	if format == workload.CSV {
		b.WriteString(csvHeader)
	}
	for i := at; i < at+n; i++ {
		v := float64(i*37%101) + 0.5
		if format == workload.CSV {
			fmt.Fprintf(&b, "m/%d,%d,%v,Cel\n", i%2, 1_700_000_000+i*300, v)
		} else {
			fmt.Fprintf(&b, "{\"n\":\"m/%d\",\"t\":%d,\"v\":%v}\n", i%2, 1_700_000_000+i*300, v)
		}
	}
	return b.String()
}

// TestCaptureIsSmall: a delta has the pages that changed, and a full one no zeros.
func TestCaptureIsSmall(t *testing.T) {
	g := probe(t, workload.Reactor)
	batch(t, g, "m500")
	count := func(full bool) (n int) {
		_, pages, err := g.Capture(full)
		if err != nil {
			t.Fatal(err)
		}
		for p := range pages {
			if full && p.Space == workload.SpaceMemory && bytes.Equal(p.Data[:workload.MemoryPage], zeros[:]) {
				t.Errorf("page %d is all zeros", p.Index)
			}
			n += len(p.Data)
		}
		return n
	}
	if n := count(true); n < 490<<16 || n > 510<<16 {
		t.Errorf("all: %d bytes", n)
	}
	if n := count(false); n != 0 {
		t.Errorf("nothing changed: %d bytes", n)
	}
	batch(t, g, "g5")
	if n := count(false); n < 5*workload.MemoryPage || n > 64<<10 {
		t.Errorf("five pages and what is around them: %d bytes", n)
	}
}

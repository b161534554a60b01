package runner

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"

	"edgekeep/workload"
)

// BenchmarkBatch is a batch of 500 readings in the Rust example, in this engine and
// in wazero without it.
func BenchmarkBatch(b *testing.B) {
	m, wasm, models := example(b, "rolling")
	in := series(m.Input.Format, 0, 500)
	b.Run("edgekeep", func(b *testing.B) {
		g := start(b, newHost(b, false), m, wasm, models)
		for b.Loop() {
			batch(b, g, in)
		}
	})
	b.Run("wazero", func(b *testing.B) {
		ctx := context.Background()
		r := wazero.NewRuntime(ctx)
		defer r.Close(ctx)
		wasi_snapshot_preview1.MustInstantiate(ctx, r)
		mod, err := r.InstantiateWithConfig(ctx, wasm, wazero.NewModuleConfig().WithArgs(append([]string{m.Name}, m.Args...)...).WithStartFunctions("_initialize"))
		if err != nil {
			b.Fatal(err)
		}
		alloc, run := mod.ExportedFunction("edgekeep_alloc"), mod.ExportedFunction("edgekeep_batch")
		for b.Loop() {
			p, err := alloc.Call(ctx, uint64(len(in)))
			if err != nil || !mod.Memory().WriteString(uint32(p[0]), in) {
				b.Fatal(err)
			}
			got, err := run.Call(ctx, p[0], uint64(len(in)))
			if err != nil || int64(got[0]) == -1 {
				b.Fatal(err)
			}
			out, _ := mod.Memory().Read(uint32(got[0]>>32), uint32(got[0]))
			_ = strings.Clone(string(out))
		}
	})
	b.Run("filter", func(b *testing.B) {
		g := probe(b, workload.Filter)
		for b.Loop() {
			batch(b, g, "c")
		}
	})
}

// BenchmarkSnapshot is all of a guest's state, sealed, and opened into another
// guest; and the delta after one batch that touched little.
func BenchmarkSnapshot(b *testing.B) {
	for _, mib := range []int{4, 64, 256} {
		m := testManifest(workload.Reactor)
		m.Limits.Memory = 512 << 20
		g := start(b, newHost(b, false), m, module(b, workload.Reactor), nil)
		batch(b, g, fmt.Sprintf("m%d", mib<<4))
		l := newLog(b)
		l.commit(b, g, true)
		seal := func(b *testing.B, full bool) (size int) {
			d, pages, err := g.Capture(full)
			if err != nil {
				b.Fatal(err)
			}
			if err := newLog(b).sealer.Seal(d, pages, func(part []byte) error { size += len(part); return nil }); err != nil {
				b.Fatal(err)
			}
			return size
		}
		b.Run(fmt.Sprintf("seal/%dMiB", mib), func(b *testing.B) {
			b.SetBytes(int64(mib) << 20)
			for b.Loop() {
				seal(b, true)
			}
		})
		b.Run(fmt.Sprintf("delta/%dMiB", mib), func(b *testing.B) {
			size := 0
			for b.Loop() {
				b.StopTimer()
				batch(b, g, "e")
				b.StartTimer()
				size = seal(b, false)
			}
			b.ReportMetric(float64(size), "bytes")
		})
		b.Run(fmt.Sprintf("restore/%dMiB", mib), func(b *testing.B) {
			b.SetBytes(int64(mib) << 20)
			for b.Loop() {
				b.StopTimer()
				to := load(b, newHost(b, false), m, module(b, workload.Reactor), nil)
				b.StartTimer()
				l.mustRestore(b, to)
				b.StopTimer()
				to.Close(context.Background())
				b.StartTimer()
			}
		})
	}
}

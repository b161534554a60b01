package memory

import (
	"bytes"
	"context"
	"os"
	"slices"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"
)

// section is a Wasm section; all of ours are shorter than 128 bytes.
func section(id byte, body ...byte) []byte { return append([]byte{id, byte(len(body))}, body...) }

// export names function number i.
func export(name string, i byte) []byte {
	return append(append([]byte{byte(len(name))}, name...), 0, i)
}

// code is a function body without locals of its own.
func code(b ...byte) []byte { return append([]byte{byte(len(b) + 2), 0}, append(b, 0x0b)...) }

// guestModule has 2 pages of memory and no maximum, and exports
//
//	load(at) -> byte
//	grow(pages) -> pages before, or -1
//	fill(at, n, step): stores the byte n at at, n-1 at at+step, … 1
var guestModule = slices.Concat([]byte("\x00asm\x01\x00\x00\x00"),
	section(1, 2, // types
		0x60, 1, 0x7f, 1, 0x7f, // (i32) -> i32
		0x60, 3, 0x7f, 0x7f, 0x7f, 0), // (i32, i32, i32)
	section(3, 3, 0, 0, 1), // functions
	section(5, 1, 0, 2),    // memory
	section(7, slices.Concat([]byte{3}, export("load", 0), export("grow", 1), export("fill", 2))...),
	section(10, slices.Concat([]byte{3},
		code(0x20, 0, 0x2d, 0, 0), // local.get 0; i32.load8_u
		code(0x20, 0, 0x40, 0),    // local.get 0; memory.grow
		code(0x03, 0x40, // loop
			0x20, 0, 0x20, 1, 0x3a, 0, 0, // store8 at, n
			0x20, 0, 0x20, 2, 0x6a, 0x21, 0, // at += step
			0x20, 1, 0x41, 1, 0x6b, 0x22, 1, // n -= 1
			0x0d, 0, // br_if loop
			0x0b))...))

// guest runs guestModule on a Memory.
type guest struct {
	tb  testing.TB
	mod api.Module
}

func startGuest(tb testing.TB, config wazero.RuntimeConfig, m *Memory) *guest {
	ctx := context.Background()
	r := wazero.NewRuntimeWithConfig(ctx, config)
	tb.Cleanup(func() { r.Close(ctx) })
	mod, err := r.Instantiate(experimental.WithMemoryAllocator(ctx, m), guestModule)
	if err != nil {
		tb.Fatal(err)
	}
	return &guest{tb, mod}
}

func (g *guest) call(name string, args ...int) int32 {
	var params []uint64
	for _, a := range args {
		params = append(params, api.EncodeI32(int32(a)))
	}
	got, err := g.mod.ExportedFunction(name).Call(context.Background(), params...)
	if err != nil {
		g.tb.Fatalf("%s%v: %v", name, args, err)
	}
	if len(got) == 0 {
		return 0
	}
	return api.DecodeI32(got[0])
}

func engines() map[string]wazero.RuntimeConfig {
	return map[string]wazero.RuntimeConfig{
		"compiler":    wazero.NewRuntimeConfig(), // where there is one for the processor
		"interpreter": wazero.NewRuntimeConfigInterpreter(),
	}
}

// TestGuest has a real guest write, read and grow, and compares each look with
// a copy of its whole memory.
func TestGuest(t *testing.T) {
	for name, config := range engines() {
		t.Run(name, func(t *testing.T) {
			forEachTracker(t, func(t *testing.T, p protection, scan bool) {
				m := with(t, p, 4*mib)
				tr := mustTrack(t, m, scan)
				g := startGuest(t, config, m)
				var before []byte
				check := func(what string) {
					t.Helper()
					now, ok := g.mod.Memory().Read(0, g.mod.Memory().Size())
					if !ok || &now[0] != &m.Bytes()[0] || len(now) != len(m.Bytes()) {
						t.Fatal("the guest's memory is not ours")
					}
					before = append(before, make([]byte, len(now)-len(before))...)
					ps := os.Getpagesize()
					want := wantRuns(len(now), func(i int) bool {
						return !bytes.Equal(now[i*ps:(i+1)*ps], before[i*ps:(i+1)*ps])
					})
					got, err := dirty(tr)
					if err != nil || !slices.Equal(got, want) {
						t.Fatalf("%s: got %v, want %v: %v", what, got, want, err)
					}
					before = bytes.Clone(now)
				}
				g.call("fill", 100, 20, 1)
				check("first look")
				check("nothing written")
				g.call("fill", 90, 20, 1)
				g.call("fill", 0x18000, 3, 0x2000)
				check("scattered")
				for range 20 {
					g.call("load", 0x10000)
					if g.call("grow", 1) < 0 {
						t.Fatal("cannot grow")
					}
					g.call("load", int(g.mod.Memory().Size())-1)
				}
				check("grown")
				g.call("fill", int(g.mod.Memory().Size())-1, 1, 1)
				check("the last byte")
				if old, got := g.mod.Memory().Size(), g.call("grow", 64); got != -1 || g.mod.Memory().Size() != old {
					t.Fatalf("growing beyond the limit: %d", got)
				}
				g.call("fill", 5, 1, 1)
				check("after a refused growth")
			})
		})
	}
}

// TestCloseFrees: closing the module gives its memory back.
func TestCloseFrees(t *testing.T) {
	m := with(t, plain, 4*mib)
	g := startGuest(t, wazero.NewRuntimeConfig(), m)
	if err := g.mod.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if len(m.Bytes()) != 0 || m.guest.space != nil {
		t.Fatal("the memory is still there")
	}
}

// TestModuleBeyondTheLimit is how a runner refuses one: an error, not a panic.
func TestModuleBeyondTheLimit(t *testing.T) {
	m := with(t, plain, 64<<10)
	ctx := experimental.WithMemoryAllocator(context.Background(), m)
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().WithMemoryLimitPages(1))
	defer r.Close(ctx)
	if _, err := r.Instantiate(ctx, guestModule); err == nil {
		t.Fatal("a module with 128 KiB got into 64 KiB")
	}
}

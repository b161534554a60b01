package wasi

import (
	"context"
	"slices"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	other "github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
)

// TestSignatures compares the functions with those of wazero's own module, in which
// guests of all toolchains have been linked.
func TestSignatures(t *testing.T) {
	ctx := context.Background()
	ours := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	defer func() { _ = ours.Close(ctx) }()
	if err := newSystem(t, newWorld().config(nil)).Instantiate(ctx, ours); err != nil {
		t.Fatal(err)
	}
	theirs := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	defer func() { _ = theirs.Close(ctx) }()
	other.MustInstantiate(ctx, theirs)
	got := ours.Module(moduleName).ExportedFunctionDefinitions()
	want := theirs.Module(moduleName).ExportedFunctionDefinitions()
	if len(got) != 46 || len(want) != 46 {
		t.Fatalf("%d functions, wazero has %d, preview 1 has 46", len(got), len(want))
	}
	for name, w := range want {
		g := got[name]
		if g == nil {
			t.Errorf("no %s", name)
		} else if !slices.Equal(g.ParamTypes(), w.ParamTypes()) || !slices.Equal(g.ResultTypes(), w.ResultTypes()) {
			t.Errorf("%s: %v to %v, want %v to %v", name, g.ParamTypes(), g.ResultTypes(), w.ParamTypes(), w.ResultTypes())
		}
	}
}

// TestNoMemory runs a guest that has no memory: (func (export "f") (result i32)
// (call $random_get (i32.const 0) (i32.const 4))).
func TestNoMemory(t *testing.T) {
	guest := slices.Concat(
		[]byte("\x00asm\x01\x00\x00\x00"),
		[]byte("\x01\x0b\x02\x60\x02\x7f\x7f\x01\x7f\x60\x00\x01\x7f"),
		[]byte("\x02\x25\x01\x16wasi_snapshot_preview1\x0arandom_get\x00\x00"),
		[]byte("\x03\x02\x01\x01"),
		[]byte("\x07\x05\x01\x01f\x00\x01"),
		[]byte("\x0a\x0a\x01\x08\x00\x41\x00\x41\x04\x10\x00\x0b"))
	ctx := context.Background()
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	defer func() { _ = r.Close(ctx) }()
	if err := newSystem(t, newWorld().config(nil)).Instantiate(ctx, r); err != nil {
		t.Fatal(err)
	}
	m, err := r.Instantiate(ctx, guest)
	if err != nil {
		t.Fatal(err)
	}
	if res, err := m.ExportedFunction("f").Call(ctx); err != nil || errno(res[0]) != eFAULT {
		t.Fatalf("got %v, %v, want errno %d", res, err, eFAULT)
	}
}

// whole is a memory of 4 GiB whose own check of ranges overflows.
type whole struct{ api.Memory }

func (whole) Read(offset, n uint32) ([]byte, bool) {
	if offset+n < offset {
		panic("overflow")
	}
	return make([]byte, n), true
}

func TestEndOfMemory(t *testing.T) {
	c := &call{memory: whole{}}
	for _, at := range []struct {
		ptr  uint32
		n    uint64
		want errno
	}{
		{1<<32 - 9, 8, success},
		{1<<32 - 8, 8, eFAULT},
		{1<<32 - 1, 1, eFAULT},
		{1<<32 - 1, 1<<32 - 1, eFAULT},
		{0, 1 << 32, eFAULT},
		{0, 0, success},
	} {
		if _, err := c.view(at.ptr, at.n); err != at.want {
			t.Errorf("%d bytes at %#x: errno %d, want %d", at.n, at.ptr, err, at.want)
		}
	}
}

// TestStrings wants arguments and environment in memory to the byte.
func TestStrings(t *testing.T) {
	cfg := newWorld().config(nil)
	cfg.Args = []string{"a", "", "héllo"}
	g := newDriver(t, newSystem(t, cfg))
	for i := range 64 {
		g.memory.b[atBuffer+i] = 0xff
	}
	g.want(success, "args_sizes_get", atResult, atResult+4)
	if n, size := g.u32(atResult), g.u32(atResult+4); n != 3 || size != 10 {
		t.Fatalf("%d arguments of %d bytes", n, size)
	}
	g.want(success, "args_get", atResult, atBuffer)
	if got := string(g.memory.b[atBuffer:][:12]); got != "a\x00\x00héllo\x00\xff\xff" {
		t.Errorf("arguments %q", got)
	}
	for i, want := range []uint64{atBuffer, atBuffer + 2, atBuffer + 3} {
		if got := g.u32(atResult + 4*i); got != want {
			t.Errorf("argument %d at %#x, want %#x", i, got, want)
		}
	}
	g.want(success, "environ_sizes_get", atResult, atResult+4)
	if n, size := g.u32(atResult), g.u32(atResult+4); n != 0 || size != 0 {
		t.Errorf("%d variables of %d bytes", n, size)
	}
	g.want(success, "environ_get", atEnd, atEnd) // nothing is written there
	g.want(eFAULT, "args_get", atEnd-8, atBuffer)
	g.want(eFAULT, "args_get", atResult, atEnd-9)
	g.want(eFAULT, "args_sizes_get", atResult, atEnd-3)
}

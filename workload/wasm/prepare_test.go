package wasm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
)

// full uses every section, every form of a segment, and padded numbers.
func full() *module {
	m := reactor()
	m.custom = cat(custom("before", 1, 2, 3), custom("", 0))
	m.types = append(m.types, functype(i32, ""), functype("\x7d\x7c\x7b\x70\x6f", i32+i64))
	m.imports = items{
		importFunc(wasiModule, "proc_exit", 3), importFunc(wasiModule, "fd_close", typeAlloc),
		importFunc(wasiModule, "fd_close", typeAlloc),
	}
	m.tables = items{{0x70, 0x01, 0x02, 0x09}, {0x6f, 0x00, 0x01}}
	m.memories = items{{0x01, 0x01, 0x83, 0x80, 0x00}}
	m.globals = append(m.globals,
		cat([]byte{0x7b, 0, 0xfd, 0x0c}, make([]byte, 16), []byte{0x0b}),
		[]byte{0x70, 0, 0xd2, 0x03, 0x0b}, []byte{0x6f, 0, 0xd0, 0x6f, 0x0b},
		[]byte{0x7c, 1, 0x44, 1, 2, 3, 4, 5, 6, 7, 8, 0x0b},
		[]byte{0x7f, 1, 0x41, 0xff, 0xff, 0xff, 0xff, 0x7f, 0x0b})
	m.exports = items{
		export("memory", kindMemory, 0), export("other memory", kindMemory, 0), export("t", kindTable, 1),
		export("a", kindGlobal, 7), export("b", kindGlobal, 7), export("c", kindGlobal, 1),
		export("edgekeep_alloc", kindFunc, 3), export("edgekeep_batch", kindFunc, 4),
		export("edgekeep_reseed", kindFunc, 5), cat(str("_initialize"), []byte{kindFunc, 0x85, 0x80, 0x00}),
	}
	m.elements = items{
		{0x00, 0x41, 0x00, 0x0b, 0x01, 0x05},
		{0x02, 0x00, 0x41, 0x00, 0x0b, 0x00, 0x01, 0x05},
		{0x03, 0x00, 0x01, 0x05},
		{0x04, 0x41, 0x00, 0x0b, 0x01, 0xd2, 0x05, 0x0b},
		{0x06, 0x01, 0x41, 0x00, 0x0b, 0x6f, 0x01, 0xd0, 0x6f, 0x0b},
		{0x07, 0x70, 0x01, 0xd2, 0x05, 0x0b},
	}
	m.dataCount = num(2)
	m.data = append(m.data, cat([]byte{0x02, 0x00, 0x41, 0x20, 0x0b}, str("")))
	m.bodies[2] = body(
		0x03, 0x7f, 0x41, 0x80, 0x80, 0x00, 0x0b, 0x1a, // loop, i32.const 0
		0x02, 0x02, 0x41, 0x00, 0x0e, 0x01, 0x00, 0x00, 0x0b, // block of a type, br_table
		0x41, 0x00, 0x28, 0x82, 0x80, 0x00, 0x84, 0x00, 0x1a, // i32.load, padded
		0x41, 0x00, 0x11, 0x02, 0x00, // call_indirect
		0x41, 0x00, 0x41, 0x00, 0x41, 0x00, 0xfc, 0x0a, 0x00, 0x00, // memory.copy
		0xfc, 0x10, 0x01, 0x1a, 0x41, 0x00, 0x25, 0x00, 0x1a) // table.size, table.get
	return m
}

// The output for one version is the same for ever: if this digest changes, so must Version.
func TestGolden(t *testing.T) {
	const want = "1:5d7c322ad1d9f04f303ca48e6be29ff0f696a6df21bb44278b31a165fce658e0"
	out, _, err := Prepare(full().build())
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%s:%x", Version, sha256.Sum256(out)); got != want {
		t.Errorf("%s, not %s", got, want)
	}
}

func TestPrepare(t *testing.T) {
	m := full()
	in := m.build()
	before := bytes.Clone(in)
	out, info, err := Prepare(in)
	if err != nil {
		t.Fatal(err)
	}
	want := Info{
		Kind: Reactor,
		Globals: []Global{
			{0, I32, "edgekeep:g0"},
			{2, I64, "edgekeep:g2"},
			{3, F32, "edgekeep:g3"},
			{7, F64, "a"},
			{8, I32, "edgekeep:g8"},
		},
		MemoryMin: 1, MemoryMax: 3,
		Imports:    []string{"wasi_snapshot_preview1.fd_close", "wasi_snapshot_preview1.proc_exit"},
		Reseed:     true,
		Initialize: true,
	}
	if !reflect.DeepEqual(info, want) {
		t.Errorf("%+v", info)
	}
	if got := fmt.Sprint(Command, Reactor, Kind(0)); got != "command reactor Kind(0)" {
		t.Error(got)
	}
	if !bytes.Equal(in, before) {
		t.Error("the input was changed")
	}
	m.exports = append(m.exports, export("edgekeep:g0", 3, 0), export("edgekeep:g2", 3, 2),
		export("edgekeep:g3", 3, 3), export("edgekeep:g8", 3, 8))
	if !bytes.Equal(out, m.build()) {
		t.Errorf("prepared: %x", out)
	}
	var refused *RefusedError
	if _, _, err := Prepare(out); !errors.As(err, &refused) || refused.Reason != reservedExport {
		t.Errorf("prepared twice: %v", err)
	}
	compile(t, out)
}

// A padded size and count of the export section become short, the entries stay.
func TestExportSectionIsWrittenShort(t *testing.T) {
	m := reactor()
	entries := cat(m.exports...)
	short := section(sectionExport, vec(m.exports))
	padded := cat([]byte{sectionExport}, []byte{byte(len(entries)+3) | 0x80, 0x80, 0x00}, []byte{0x84, 0x80, 0x00}, entries)
	in := bytes.Replace(m.build(), short, padded, 1)
	a, _, err := Prepare(in)
	if err != nil {
		t.Fatal(err)
	}
	b, _, _ := Prepare(m.build())
	if !bytes.Equal(a, b) {
		t.Errorf("%x\n%x", a, b)
	}
}

func TestNothingToAdd(t *testing.T) {
	m := command()
	m.globals = m.globals[1:2]
	m.bodies[1] = body(0x42, 0)
	in := m.build()
	out, info, err := Prepare(in)
	if err != nil || !bytes.Equal(in, out) || info.Kind != Command || info.Globals != nil || info.MemoryMax != 65536 {
		t.Errorf("%+v, %v", info, err)
	}
	in[0] = 1
	if out[0] != 0 {
		t.Error("the output is the input")
	}
}

// Modules of random shape: what is accepted compiles, and every mutable global can be read
// and set through the name that Info gives it.
func TestRandomModules(t *testing.T) {
	ctx := t.Context()
	rt := newRuntime(t)
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 0))
		in, mutable := randomModule(rng)
		out, info, err := Prepare(in)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		instance, err := rt.InstantiateWithConfig(ctx, out, wazero.NewModuleConfig().WithName("").WithStartFunctions())
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		var got []uint32
		for _, g := range info.Globals {
			got = append(got, g.Index)
			global, ok := instance.ExportedGlobal(g.Name).(api.MutableGlobal)
			if !ok || global.Type() != api.ValueType(g.Type) || global.Get() != uint64(g.Index) {
				t.Fatalf("seed %d: global %+v is %v", seed, g, instance.ExportedGlobal(g.Name))
			}
		}
		if !slices.Equal(got, mutable) {
			t.Fatalf("seed %d: globals %v, not %v", seed, got, mutable)
		}
		if err := instance.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// randomModule has up to 300 globals, each with its index as the value. It returns those
// that are mutable.
func randomModule(rng *rand.Rand) (module []byte, mutable []uint32) {
	m := reactor()
	m.globals, m.bodies[1] = nil, body(0x42, 0)
	for i := range rng.IntN(300) {
		typ := byte(0x7f - rng.IntN(4))
		value := cat([]byte{0x41}, signedNum(i))
		switch ValueType(typ) {
		case I64:
			value = cat([]byte{0x42}, signedNum(i))
		case F32:
			value = []byte{0x43, byte(i), byte(i >> 8), 0, 0}
		case F64:
			value = []byte{0x44, byte(i), byte(i >> 8), 0, 0, 0, 0, 0, 0}
		}
		isMutable := byte(rng.IntN(2))
		if isMutable == 1 {
			mutable = append(mutable, uint32(i))
		}
		m.globals = append(m.globals, cat([]byte{typ, isMutable}, value, []byte{0x0b}))
		if rng.IntN(4) == 0 {
			m.exports = append(m.exports, export(fmt.Sprint("own ", i), kindGlobal, i))
		}
	}
	m.exports[1] = export("none", kindFunc, funcNone)
	rng.Shuffle(len(m.exports), func(i, j int) { m.exports[i], m.exports[j] = m.exports[j], m.exports[i] })
	if rng.IntN(2) == 0 {
		m.custom = custom("custom", byte(rng.Uint32()))
	}
	return m.build(), mutable
}

func signedNum(v int) []byte { return cat([]byte{byte(v) | 0x80}, []byte{byte(v>>7) & 0x3f}) }

// The table of WASI functions is that of another implementation.
func TestWASI(t *testing.T) {
	rt := newRuntime(t)
	theirs := rt.Module(wasiModule).ExportedFunctionDefinitions()
	if len(theirs) != len(wasi) || len(wasi) != 46 {
		t.Fatalf("%d functions, wazero has %d", len(wasi), len(theirs))
	}
	for name, want := range wasi {
		f := theirs[name]
		if f == nil {
			t.Errorf("wazero has no %s", name)
			continue
		}
		if got := (signature{f.ParamTypes(), f.ResultTypes()}).String(); got != want {
			t.Errorf("%s is %s, in wazero %s", name, want, got)
		}
	}
}

func newRuntime(t testing.TB) wazero.Runtime {
	t.Helper()
	rt := wazero.NewRuntimeWithConfig(context.Background(), wazero.NewRuntimeConfigInterpreter())
	t.Cleanup(func() { rt.Close(context.Background()) })
	wasi_snapshot_preview1.MustInstantiate(context.Background(), rt)
	return rt
}

func compile(t *testing.T, module []byte) {
	t.Helper()
	if _, err := newRuntime(t).CompileModule(t.Context(), module); err != nil {
		t.Fatalf("wazero does not take %s: %v", hex.EncodeToString(module), err)
	}
}

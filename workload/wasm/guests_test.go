package wasm

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
)

// guest is a module that a real toolchain makes from testdata.
type guest struct {
	name   string
	tool   string // the test is skipped without it
	env    []string
	args   []string // before -o and the output
	source string

	kind       Kind
	globals    int
	initialize bool
	differs    bool // without its globals it does not go on as before
}

var guests = []guest{
	{
		name: "go command", tool: "go", env: []string{"GOOS=wasip1", "GOARCH=wasm"}, args: []string{"build"},
		source: "./testdata/command", kind: Command, globals: 8,
	},
	{
		name: "go reactor", tool: "go", env: []string{"GOOS=wasip1", "GOARCH=wasm"}, args: []string{"build", "-buildmode=c-shared"},
		source: "./testdata/reactor", kind: Reactor, globals: 8, initialize: true, differs: true,
	},
	{
		name: "c command", tool: "clang", args: []string{"--target=wasm32-wasi", "-O1"},
		source: "testdata/command.c", kind: Command, globals: 1,
	},
	{
		name: "c reactor", tool: "clang", args: []string{"--target=wasm32-wasi", "-O1", "-mexec-model=reactor"},
		source: "testdata/reactor.c", kind: Reactor, globals: 2, initialize: true, differs: true,
	},
	{
		name: "c reactor with vectors", tool: "clang", args: []string{"--target=wasm32-wasi", "-O3", "-mexec-model=reactor", "-msimd128", "-mbulk-memory", "-mnontrapping-fptoint", "-msign-ext"},
		source: "testdata/reactor.c", kind: Reactor, globals: 2, initialize: true, differs: true,
	},
	{
		name: "rust reactor", tool: "/usr/bin/rustc", args: []string{"--target=wasm32-wasi", "--crate-type=cdylib", "-O"},
		source: "testdata/reactor.rs", kind: Reactor, globals: 1,
	},
}

func (g guest) build(t testing.TB) []byte {
	t.Helper()
	if _, err := exec.LookPath(g.tool); err != nil {
		t.Skipf("no %s: install it for this test (Debian: clang lld wasi-libc libclang-rt-14-dev-wasm32, rustc libstd-rust-dev-wasm32)", g.tool)
	}
	out := filepath.Join(t.TempDir(), "guest.wasm")
	cmd := exec.Command(g.tool, append(slices.Clone(g.args), "-o", out, g.source)...)
	cmd.Env = append(os.Environ(), g.env...)
	if b, err := cmd.CombinedOutput(); err != nil {
		if missingTarget(string(b)) {
			t.Skipf("%s cannot build for wasm32-wasi here: %s", g.tool, b)
		}
		t.Fatalf("%v: %s", err, b)
	}
	module, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return module
}

// missingTarget says whether a compiler lacks its WebAssembly half.
func missingTarget(output string) bool {
	return slices.ContainsFunc([]string{
		"target may not be installed", "file not found", "unable to find", "unable to execute command: Executable \"wasm-ld\"",
	}, func(s string) bool { return strings.Contains(output, s) })
}

var compiled = sync.OnceValue(wazero.NewCompilationCache)

// instantiate gives a guest in wazero that has run nothing, not even _initialize, with the
// same randomness and clocks for each.
func instantiate(t *testing.T, module []byte, config wazero.ModuleConfig) api.Module {
	t.Helper()
	ctx := t.Context()
	rt := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().WithCompilationCache(compiled()))
	t.Cleanup(func() { rt.Close(context.Background()) })
	wasi_snapshot_preview1.MustInstantiate(ctx, rt)
	m, err := rt.InstantiateWithConfig(ctx, module, config.WithName("").WithStartFunctions())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestGuests(t *testing.T) {
	for _, g := range guests {
		t.Run(g.name, func(t *testing.T) {
			in := g.build(t)
			out, info, err := Prepare(in)
			if err != nil {
				t.Fatal(err)
			}
			if info.Kind != g.kind || len(info.Globals) != g.globals || info.Initialize != g.initialize {
				t.Errorf("%+v", info)
			}
			if again, _, _ := Prepare(in); !bytes.Equal(out, again) {
				t.Error("prepared twice, two results")
			}
			if g.kind == Command {
				runCommand(t, out)
				return
			}
			continues(t, out, info, g.differs)
		})
	}
}

func runCommand(t *testing.T, module []byte) {
	t.Helper()
	var stdout bytes.Buffer
	m := instantiate(t, module, wazero.NewModuleConfig().WithStdin(strings.NewReader("one\n")).WithStdout(&stdout))
	if _, err := m.ExportedFunction("_start").Call(t.Context()); err != nil && !strings.Contains(err.Error(), "exit_code(0)") {
		t.Fatal(err)
	}
	if !strings.HasPrefix(stdout.String(), "one") {
		t.Errorf("it wrote %q", stdout.String())
	}
}

// A snapshot is all of the state of an instance.
type snapshot struct {
	memory  []byte
	globals []uint64
}

func take(m api.Module, info Info) snapshot {
	b, _ := m.Memory().Read(0, m.Memory().Size())
	s := snapshot{memory: bytes.Clone(b)}
	for _, g := range info.Globals {
		s.globals = append(s.globals, m.ExportedGlobal(g.Name).Get())
	}
	return s
}

func (s snapshot) restore(t *testing.T, m api.Module, info Info, globals bool) {
	t.Helper()
	memory := m.Memory()
	if _, ok := memory.Grow((uint32(len(s.memory)) - memory.Size()) / 65536); !ok || !memory.Write(0, s.memory) {
		t.Fatal("the memory does not grow")
	}
	for i, g := range info.Globals {
		if globals {
			m.ExportedGlobal(g.Name).(api.MutableGlobal).Set(s.globals[i])
		}
	}
}

// continues checks that a second instance, which gets the state of the first one after
// three batches, goes on exactly as the first one does; and, if differs, that it does not
// when it gets the memory only.
func continues(t *testing.T, module []byte, info Info, differs bool) {
	t.Helper()
	fresh := func() api.Module { return instantiate(t, module, wazero.NewModuleConfig()) }
	first := fresh()
	if info.Initialize {
		if _, err := first.ExportedFunction("_initialize").Call(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	results, _ := batches(t.Context(), first, 0, 3)
	at := take(first, info)
	want, wantErr := batches(t.Context(), first, 3, 40)
	if wantErr != nil || len(results) != 3 || slices.Contains(want, results[2]) {
		t.Fatalf("%v, then %v: %v", results, want, wantErr)
	}
	wantState := take(first, info)

	second := fresh()
	at.restore(t, second, info, true)
	got, err := batches(t.Context(), second, 3, 40)
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("restored: %x, %v; the first one: %x", got, err, want)
	}
	if state := take(second, info); !bytes.Equal(state.memory, wantState.memory) || !slices.Equal(state.globals, wantState.globals) {
		t.Error("the state is another one in the end")
	}

	if differs {
		third := fresh()
		at.restore(t, third, info, false)
		if got, err := batches(t.Context(), third, 3, 40); err == nil && slices.Equal(got, want) {
			t.Error("the globals make no difference: this test shows nothing")
		}
	}
}

// batches gives a reactor the batches from first to last.
func batches(ctx context.Context, m api.Module, first, last int) (results []uint64, err error) {
	for i := first; i < last; i++ {
		input := bytes.Repeat(binary.BigEndian.AppendUint32(nil, uint32(i*i)), 5)
		at, err := m.ExportedFunction("edgekeep_alloc").Call(ctx, uint64(len(input)))
		if err != nil {
			return results, err
		}
		m.Memory().Write(uint32(at[0]), input)
		r, err := m.ExportedFunction("edgekeep_batch").Call(ctx, at[0], uint64(len(input)))
		if err != nil {
			return results, err
		}
		results = append(results, r[0])
	}
	return results, nil
}

// The same for a module written by hand, whose result is nothing but a hidden global.
func TestHiddenGlobalContinues(t *testing.T) {
	out, info, err := Prepare(reactor().build())
	if err != nil {
		t.Fatal(err)
	}
	continues(t, out, info, true)
}

func BenchmarkPrepare(b *testing.B) {
	module := guests[0].build(b)
	b.SetBytes(int64(len(module)))
	for b.Loop() {
		if _, _, err := Prepare(module); err != nil {
			b.Fatal(err)
		}
	}
}

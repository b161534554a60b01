package examples

import (
	"bytes"
	"encoding/csv"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"
)

// needs are the files that a compiler comes with.
var needs = map[string][]string{
	"threshold": {"/usr/lib/wasm32-wasi/libc.a"},
	"rolling":   {"/usr/bin/rustc", "/usr/lib/rustlib/wasm32-wasi"},
}

func requireCompiler(t *testing.T, name string) {
	t.Helper()
	for _, path := range needs[name] {
		if _, err := os.Stat(path); err != nil {
			t.Skipf("%s: apt-get install clang lld wasi-libc libclang-rt-14-dev-wasm32 rustc libstd-rust-dev-wasm32", err)
		}
	}
	if _, err := exec.LookPath("clang"); name == "threshold" && err != nil {
		t.Skip("clang is missing: apt-get install clang lld")
	}
}

var built = struct {
	sync.Mutex
	dir string
}{}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "examples")
	if err != nil {
		panic(err)
	}
	built.dir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// guest is a built example and what its manifest says.
type guest struct {
	dir, name string
	manifest  manifest
	files     string // its private directory
	stderr    bytes.Buffer
	module    api.Module // of a reactor
}

// manifest has every key that an example may use.
type manifest struct {
	Name, Version, Shape, Module string
	Args                         []string
	Input                        struct {
		Format  string
		Streams []string
		Batch   int
		Wait    string
	}
	Output  struct{ Format string }
	Limits  struct{ Memory, CPU, Disk, Output string }
	Require struct{ Assurance string }
	Place   struct {
		Nodes []string
		Moves int
	}
	Models []struct{ Name, File string }
}

func newGuest(t *testing.T, name string) *guest {
	t.Helper()
	requireCompiler(t, name)
	g := &guest{dir: filepath.Join(built.dir, name), name: name, files: t.TempDir()}
	built.Lock()
	defer built.Unlock()
	if _, err := os.Stat(g.dir); err != nil {
		if err := Build(t.Context(), built.dir, name); err != nil {
			t.Fatal(err)
		}
	}
	meta, err := toml.DecodeFile(filepath.Join(g.dir, "workload.toml"), &g.manifest)
	if err != nil || len(meta.Undecoded()) > 0 {
		t.Fatalf("workload.toml: %v, unknown keys %v", err, meta.Undecoded())
	}
	return g
}

// instantiate starts the guest as a runner would: its arguments, directory,
// models and memory limit are those of the manifest.
func (g *guest) instantiate(t *testing.T, stdin []byte, args []string) (stdout []byte, err error) {
	t.Helper()
	ctx := t.Context()
	mib, err := strconv.Atoi(g.manifest.Limits.Memory[:len(g.manifest.Limits.Memory)-len("MiB")])
	if err != nil {
		t.Fatal(err)
	}
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().WithMemoryLimitPages(uint32(mib*16)).WithCompilationCache(cache))
	t.Cleanup(func() { r.Close(ctx) })
	wasi_snapshot_preview1.MustInstantiate(ctx, r)
	wasm, err := os.ReadFile(filepath.Join(g.dir, g.manifest.Module))
	if err != nil {
		t.Fatal(err)
	}
	models := t.TempDir()
	for _, m := range g.manifest.Models {
		raw, err := os.ReadFile(filepath.Join(g.dir, m.File))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(models, m.Name), raw, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	start := "_start"
	if g.manifest.Shape == "reactor" {
		start = "_initialize"
	}
	config := wazero.NewModuleConfig().WithArgs(append([]string{g.name}, args...)...).WithStartFunctions(start).
		WithStdin(bytes.NewReader(stdin)).WithStdout(&out).WithStderr(&g.stderr).
		WithFSConfig(wazero.NewFSConfig().WithDirMount(g.files, "/").WithReadOnlyDirMount(models, "/models"))
	g.module, err = r.InstantiateWithConfig(ctx, wasm, config)
	return out.Bytes(), err
}

var cache = wazero.NewCompilationCache()

// run gives a filter one batch.
func (g *guest) run(t *testing.T, batch string, args ...string) (stdout string, status uint32) {
	t.Helper()
	g.stderr.Reset()
	out, err := g.instantiate(t, []byte(batch), args)
	if exit := (*sys.ExitError)(nil); errors.As(err, &exit) {
		return string(out), exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	return string(out), 0
}

// call gives a reactor one batch; false when the batch failed.
func (g *guest) call(t *testing.T, batch string) (string, bool) {
	t.Helper()
	g.stderr.Reset()
	ptr := g.export(t, "edgekeep_alloc", uint64(len(batch)))
	if !g.module.Memory().WriteString(uint32(ptr), batch) {
		t.Fatalf("edgekeep_alloc(%d) = %#x, outside of the memory", len(batch), ptr)
	}
	result := g.export(t, "edgekeep_batch", ptr, uint64(len(batch)))
	if int64(result) == -1 {
		return "", false
	}
	out, ok := g.module.Memory().Read(uint32(result>>32), uint32(result))
	if !ok {
		t.Fatalf("edgekeep_batch = %#x, outside of the memory", result)
	}
	return string(out), true
}

func (g *guest) export(t *testing.T, name string, args ...uint64) uint64 {
	t.Helper()
	got, err := g.module.ExportedFunction(name).Call(t.Context(), args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, g.stderr.String())
	}
	return got[0]
}

// reactor starts a reactor with the arguments of its manifest, or others.
func reactor(t *testing.T, name string, args ...string) *guest {
	t.Helper()
	g := newGuest(t, name)
	if len(args) == 0 {
		args = g.manifest.Args
	}
	if _, err := g.instantiate(t, nil, args); err != nil {
		t.Fatalf("%v\n%s", err, g.stderr.String())
	}
	return g
}

// point is a reading of the published series.
type point struct {
	t int64
	v float64
}

// machine reads the published series of a machine's temperature.
func machine(t *testing.T) []point {
	t.Helper()
	file, err := os.Open(filepath.Join(vectors(t), "machine_temperature_system_failure.csv"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	rows, err := csv.NewReader(file).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var out []point
	for _, row := range rows[1:] {
		at, err := time.Parse("2006-01-02 15:04:05", row[0])
		if err != nil {
			t.Fatal(err)
		}
		v, err := strconv.ParseFloat(row[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, point{at.Unix(), v})
	}
	return out
}

func vectors(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("EDGEKEEP_VECTORS"); dir != "" {
		return filepath.Join(dir, "nab")
	}
	dir, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		nab := filepath.Join(dir, "../shared/vectors/nab")
		if _, err := os.Stat(nab); err == nil {
			return nab
		}
	}
	t.Skip("no vectors: set EDGEKEEP_VECTORS")
	return ""
}

package runner

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/BurntSushi/toml"

	"edgekeep/workload"
	"edgekeep/workload/examples"
)

// built are the modules that tests run, each compiled once.
var built struct {
	sync.Mutex
	dir string
}

func TestMain(m *testing.M) {
	if os.Getenv("EDGEKEEP_TEST_WATCHDOG") != "" {
		runUntilKilled()
	}
	dir, err := os.MkdirTemp("", "guests")
	if err != nil {
		panic(err)
	}
	built.dir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// module compiles testdata/probe.c, as a "filter" or a "reactor".
func module(t testing.TB, shape string) []byte {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	out := filepath.Join(built.dir, shape+".wasm")
	if _, err := os.Stat(out); err != nil {
		args := []string{"--target=wasm32-wasi", "-O1", "-Wl,--strip-all", "-Wno-unused", "-o", out, "testdata/probe.c"}
		if shape == workload.Filter {
			args = append(args, "-DFILTER")
		} else {
			args = append(args, "-mexec-model=reactor")
		}
		if _, err := os.Stat("/usr/lib/wasm32-wasi/libc.a"); err != nil {
			t.Skipf("%v: apt-get install clang lld wasi-libc libclang-rt-14-dev-wasm32", err)
		}
		if msg, err := exec.Command("clang", args...).CombinedOutput(); err != nil {
			t.Skipf("clang: %v: %s", err, msg)
		}
	}
	wasm, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return wasm
}

// example compiles an example workload and reads what of its manifest matters.
func example(t testing.TB, name string) (m workload.Manifest, wasm []byte, models [][]byte) {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	dir := filepath.Join(built.dir, name)
	if _, err := os.Stat(filepath.Join(dir, name+".wasm")); err != nil {
		if err := examples.Build(context.Background(), built.dir, name); err != nil {
			t.Skip(err)
		}
	}
	read := func(file string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var d struct {
		Shape, Module string
		Args          []string
		Input         struct{ Format string }
		Models        []struct{ Name, File string }
	}
	if _, err := toml.Decode(string(read("workload.toml")), &d); err != nil {
		t.Fatal(err)
	}
	m = testManifest(d.Shape)
	m.Name, m.Args, m.Input.Format, m.Output = name, d.Args, d.Input.Format, d.Input.Format
	for _, f := range d.Models {
		m.Models = append(m.Models, workload.Model{Name: f.Name})
		models = append(models, read(f.File))
	}
	return m, read(d.Module), models
}

func testManifest(shape string) workload.Manifest {
	return workload.Manifest{
		Name: "probe", Shape: shape, Input: workload.Input{Format: workload.JSON}, Output: workload.JSON,
		Limits: workload.Limits{Memory: 64 << 20, CPU: 60_000, Disk: 1 << 20, Output: 256 << 10},
	}
}

func newHost(t testing.TB, interpreter bool) *Host {
	t.Helper()
	h, err := NewHost(interpreter)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, m := range h.tracked {
			m.memory.Free()
		}
	})
	return h
}

func load(t testing.TB, h *Host, m workload.Manifest, wasm []byte, models [][]byte) *Guest {
	t.Helper()
	g, err := h.Load(context.Background(), m, wasm, models)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close(context.Background()) })
	return g
}

func start(t testing.TB, h *Host, m workload.Manifest, wasm []byte, models [][]byte) *Guest {
	t.Helper()
	g := load(t, h, m, wasm, models)
	if err := g.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	return g
}

// probe starts the probe.
func probe(t testing.TB, shape string) *Guest {
	t.Helper()
	return start(t, newHost(t, false), testManifest(shape), module(t, shape), nil)
}

func batch(t testing.TB, g *Guest, in string) string {
	t.Helper()
	out, err := g.Batch(context.Background(), []byte(in))
	if err != nil {
		t.Fatalf("batch %.60q: %v\n%s", in, err, strings.Join(g.Log(), "\n"))
	}
	return string(out)
}

// instanceLog is an instance's log.
type instanceLog struct {
	sealer *workload.StateSealer
	parts  [][]byte
	key    workload.StateKey
}

func newLog(t testing.TB) *instanceLog {
	t.Helper()
	l := &instanceLog{key: workload.StateKey{ID: bytes.Repeat([]byte{1}, 8), Key: bytes.Repeat([]byte{2}, 32)}}
	var err error
	if l.sealer, err = workload.NewStateSealer("probe", l.key.ID, l.key.Key, nil, 0, rand.Reader); err != nil {
		t.Fatal(err)
	}
	return l
}

// commit adds what changed to the log, or with full all there is.
func (l *instanceLog) commit(t testing.TB, g *Guest, full bool) {
	t.Helper()
	d, pages, err := g.Capture(full)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.sealer.Seal(d, pages, func(part []byte) error {
		l.parts = append(l.parts, part)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// restore puts the log's state into a guest.
func (l *instanceLog) restore(g *Guest) error {
	r, err := g.Restorer()
	if err != nil {
		return err
	}
	o, err := workload.NewStateOpener("probe", []workload.StateKey{l.key}, r)
	if err != nil {
		return err
	}
	for i, part := range l.parts {
		if _, err := o.Open(part); err != nil {
			return fmt.Errorf("part %d of %d: %w", i, len(l.parts), err)
		}
	}
	if err := o.End(); err != nil {
		return err
	}
	return g.Resume(context.Background(), r)
}

func (l *instanceLog) mustRestore(t testing.TB, g *Guest) *Guest {
	t.Helper()
	if err := l.restore(g); err != nil {
		t.Fatal(err)
	}
	return g
}

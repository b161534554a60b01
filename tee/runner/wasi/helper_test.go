package wasi

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/sys"
)

var roomy = Limits{Bytes: 1 << 20, Entries: 4000, FDs: 128, Output: 1 << 20}

// world is a host for tests: clocks that a test moves, and sleeps that take no time.
type world struct {
	now, mono int64
	slept     time.Duration
	sleepErr  error
}

func (w *world) config(dir *Dir) Config {
	return Config{
		Limits: roomy,
		Dir:    dir,
		Rand:   rand.NewChaCha8([32]byte{1}),
		Now:    func() int64 { w.now += 1000; return w.now },
		Monotonic: func() int64 {
			w.mono += 1000
			return w.mono
		},
		Sleep: func(_ context.Context, d time.Duration) error {
			w.slept += d
			return w.sleepErr
		},
	}
}

func newWorld() *world { return &world{now: 1_700_000_000_000_000_000, mono: 5_000_000} }

func newSystem(t testing.TB, cfg Config) *System {
	t.Helper()
	s, err := NewSystem(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// compileC builds a guest from testdata, or skips the test.
func compileC(t testing.TB, name string, flags ...string) []byte {
	t.Helper()
	if _, err := os.Stat("/usr/lib/wasm32-wasi/libc.a"); err != nil {
		t.Skip("no wasi-libc: apt-get install clang lld wasi-libc libclang-rt-14-dev-wasm32")
	}
	out := filepath.Join(t.TempDir(), "guest.wasm")
	args := append([]string{"--target=wasm32-wasi", "-O1", "-o", out, filepath.Join("testdata", name)}, flags...)
	return build(t, out, exec.Command("clang", args...))
}

func build(t testing.TB, out string, cmd *exec.Cmd) []byte {
	t.Helper()
	if _, err := exec.LookPath(cmd.Path); err != nil {
		t.Skipf("no %s", cmd.Path)
	}
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, text)
	}
	code, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

// program is a compiled guest that can be run many times.
type program struct {
	cache  wazero.CompilationCache
	config wazero.RuntimeConfig
	code   []byte
}

func newProgram(t testing.TB, code []byte, config wazero.RuntimeConfig) *program {
	t.Helper()
	p := &program{cache: wazero.NewCompilationCache(), code: code}
	t.Cleanup(func() { _ = p.cache.Close(context.Background()) })
	p.config = config.WithCompilationCache(p.cache)
	return p
}

// run runs a WASI command and returns its exit code.
func (p *program) run(t testing.TB, ctx context.Context, s *System) uint32 {
	t.Helper()
	r := wazero.NewRuntimeWithConfig(ctx, p.config)
	defer func() { _ = r.Close(context.Background()) }()
	if err := s.Instantiate(ctx, r); err != nil {
		t.Fatal(err)
	}
	_, err := r.Instantiate(ctx, p.code)
	var exit *sys.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	t.Fatal(err)
	return 0
}

// runGuest runs a command with arguments on a directory, wants it to end well, and
// returns what it wrote.
func runGuest(t testing.TB, p *program, cfg Config, stdin string, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cfg.Args = append([]string{"guest"}, args...)
	cfg.Stdin, cfg.Stdout, cfg.Stderr = strings.NewReader(stdin), &stdout, &stderr
	s := newSystem(t, cfg)
	defer s.Close()
	if code := p.run(t, context.Background(), s); code != 0 {
		t.Fatalf("exit code %d\n%s%s", code, &stdout, &stderr)
	}
	if cfg.Dir != nil {
		checkDir(t, cfg.Dir)
	}
	return stdout.String()
}

// checkDir wants the sums of a directory to be right, and its tree to restore to
// itself.
func checkDir(t testing.TB, d *Dir) {
	t.Helper()
	tree := d.Tree()
	again, err := RestoreDir(d.limits, tree, func(id PageID) ([]byte, error) { return d.Page(id), nil })
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.Tree(), tree) {
		t.Fatal("the tree restores to another one")
	}
	if d.bytes != again.bytes || d.names != again.names || d.cost != again.cost {
		t.Fatalf("bytes %d, names %d, cost %d; recomputed %d, %d, %d", d.bytes, d.names, d.cost, again.bytes, again.names, again.cost)
	}
	if len(tree) > d.cost+128 {
		t.Fatalf("tree of %d bytes, its cost is only %d", len(tree), d.cost)
	}
	for _, id := range d.Pages() {
		if !bytes.Equal(d.Page(id), again.Page(id)) {
			t.Fatalf("page %v restores to another one", id)
		}
	}
}

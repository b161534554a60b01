package wasi

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
)

// TestSuite runs the tests of testdata/suite.c. They follow the expectations of the
// preview 1 tests of WebAssembly/wasi-testsuite, and pin what those leave open.
func TestSuite(t *testing.T) {
	p := newProgram(t, compileC(t, "suite.c", "-Wall", "-Werror"), wazero.NewRuntimeConfig())
	names := strings.Fields(runGuest(t, p, newWorld().config(nil), ""))
	names = names[:len(names)-1] // see TestExit
	if len(names) < 40 {
		t.Fatalf("%d tests", len(names))
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			runGuest(t, p, newWorld().config(NewDir(roomy)), "input", name)
		})
	}
	t.Run("exit", func(t *testing.T) {
		cfg := newWorld().config(nil)
		cfg.Args = []string{"guest", "exit_33"}
		if code := p.run(t, context.Background(), newSystem(t, cfg)); code != 33 {
			t.Fatalf("exit code %d, want 33", code)
		}
	})
}

var models = map[string][]byte{"m": []byte("model"), "sub/deep": {1}}

func TestLibc(t *testing.T) {
	p := newProgram(t, compileC(t, "posix.c"), wazero.NewRuntimeConfig())
	w := newWorld()
	cfg := w.config(NewDir(roomy))
	cfg.ReadOnly = models
	if got := runGuest(t, p, cfg, "", "files"); got != "well\n" {
		t.Fatalf("wrote %q", got)
	}
	if w.slept != 5*time.Millisecond {
		t.Errorf("slept %v", w.slept)
	}
	runGuest(t, p, newWorld().config(nil), "", "bare")
	if got := runGuest(t, p, newWorld().config(nil), "some\nlines", "echo"); got != "some\nlines" {
		t.Errorf("echo wrote %q", got)
	}
	cfg = newWorld().config(nil)
	cfg.Env = []string{"A=1", "LONG=" + strings.Repeat("x", 300), "EMPTY="}
	want := strings.Join(append([]string{"guest", "with", "", "arguments"}, cfg.Env...), "\n") + "\n"
	if got := runGuest(t, p, cfg, "", "with", "", "arguments"); got != want {
		t.Errorf("arguments and environment %q, want %q", got, want)
	}
}

func TestGoGuest(t *testing.T) {
	out := filepath.Join(t.TempDir(), "guest.wasm")
	cmd := exec.Command("go", "build", "-o", out, "./testdata/goguest")
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "CGO_ENABLED=0")
	p := newProgram(t, build(t, out, cmd), wazero.NewRuntimeConfig())
	cfg := newWorld().config(NewDir(roomy))
	cfg.ReadOnly, cfg.Env = models, []string{"NAME=env"}
	// Sleeping is real: the guest's scheduler waits for its clock.
	w := cfg.Sleep
	cfg.Sleep = func(ctx context.Context, d time.Duration) error {
		time.Sleep(d)
		return w(ctx, d)
	}
	start := time.Now()
	cfg.Monotonic = func() int64 { return int64(time.Since(start)) }
	if got := runGuest(t, p, cfg, "input", "arg"); got != "arg env INPUT\n" {
		t.Fatalf("wrote %q", got)
	}
}

func TestRustGuest(t *testing.T) {
	const rustc = "/usr/bin/rustc"
	if _, err := os.Stat("/usr/lib/rustlib/wasm32-wasi"); err != nil {
		t.Skip("no Rust for wasm32-wasi: apt-get install rustc libstd-rust-dev-wasm32")
	}
	out := filepath.Join(t.TempDir(), "guest.wasm")
	code := build(t, out, exec.Command(rustc, "--edition=2021", "--target=wasm32-wasi", "-Cstrip=symbols", "-o", out, "testdata/guest.rs"))
	cfg := newWorld().config(NewDir(roomy))
	cfg.ReadOnly = models
	if got := runGuest(t, newProgram(t, code, wazero.NewRuntimeConfig()), cfg, "input", "arg"); got != "arg input\n" {
		t.Fatalf("wrote %q", got)
	}
}

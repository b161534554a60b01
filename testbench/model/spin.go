package model

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"edgekeep/testbench/internal/process"
)

const (
	depth      = 100_000 // steps of the longest run searched; the model needs 100
	megabytes  = 2600    // memory of a check with two restores and three freezes
	megabytes2 = 1200    // of any other: two at a time stay below 4 GB
)

// finding is what spin says of one check.
type finding struct {
	states   int64
	errors   int
	complete bool // the search saw every state
	steps    int  // of the counter-example
	broken   string
	story    []string // the counter-example, a line for a step
}

// spin runs checks in a directory of its own.
type spin struct {
	spin, gcc, dir string
	model          []byte
}

func newSpin() (*spin, error) {
	s := &spin{}
	var err error
	if s.spin, err = process.Find("spin", "spin"); err != nil {
		return nil, err
	}
	if s.gcc, err = process.Find("gcc", "gcc"); err != nil {
		return nil, err
	}
	path, err := source()
	if err != nil {
		return nil, err
	}
	if s.model, err = os.ReadFile(path); err != nil {
		return nil, fmt.Errorf("read the model: %w", err)
	}
	if s.dir, err = os.MkdirTemp("", "edgekeep-model-"); err != nil {
		return nil, fmt.Errorf("make a directory for spin: %w", err)
	}
	return s, nil
}

func (s *spin) close() { os.RemoveAll(s.dir) }

// run generates, compiles and runs the verifier of one check.
func (s *spin) run(ctx context.Context, c check) (finding, error) {
	dir, err := os.MkdirTemp(s.dir, "")
	if err != nil {
		return finding{}, fmt.Errorf("make a directory for spin: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "move.pml"), s.model, 0o600); err != nil {
		return finding{}, fmt.Errorf("write the model for spin: %w", err)
	}
	if _, err := command(ctx, dir, s.spin, append(append([]string{"-a"}, c.defines()...), "move.pml")...); err != nil {
		return finding{}, err
	}
	compile, search := c.flags()
	if _, err := command(ctx, dir, s.gcc, append(compile, "-o", "pan", "pan.c")...); err != nil {
		return finding{}, err
	}
	pan := filepath.Join(dir, "pan")
	out, err := command(ctx, dir, pan, search...)
	if err != nil {
		return finding{}, err
	}
	f, err := parseSearch(out)
	if err != nil || f.errors == 0 {
		return f, err
	}
	if out, err = command(ctx, dir, pan, "-S"); err != nil {
		return f, err
	}
	f.parseStory(out)
	return f, nil
}

// flags of the compiler and the verifier. What must hold is searched depth
// first by fast code; what must fail is small, and breadth first gives the
// shortest counter-example.
func (c check) flags() (compile, search []string) {
	limit := megabytes2
	if c.bounds.restores == 2 && c.bounds.freezes > 2 {
		limit = megabytes
	}
	compile = []string{"-w", "-DNOREDUCE", fmt.Sprintf("-DMEMLIM=%d", limit)}
	search = []string{fmt.Sprintf("-m%d", depth)}
	switch c.kind {
	case holds, variant:
		compile = append(compile, "-DSAFETY", "-O1")
	case mutant, reachable:
		compile = append(compile, "-DSAFETY", "-DBFS", "-O0")
	case ends:
		compile = append(compile, "-DNOSTUTTER", "-O1")
		search = append(search, "-a")
	case cycle: // past the property that the mutant breaks as well
		compile = append(compile, "-DNOSTUTTER", "-O0")
		search = append(search, "-a", "-A")
	}
	return compile, search
}

var (
	statesRE = regexp.MustCompile(`(?m)^\s*([0-9.e+]+) states, stored`)
	errorsRE = regexp.MustCompile(`errors: (\d+)`)
	stepsRE  = regexp.MustCompile(`(?m)^spin: trail ends after (\d+) steps`)
)

// parseSearch reads the verifier's report.
func parseSearch(out string) (finding, error) {
	states, errs := statesRE.FindStringSubmatch(out), errorsRE.FindStringSubmatch(out)
	if states == nil || errs == nil {
		return finding{}, fmt.Errorf("read the report of pan: no count of states and errors in %q", tail(out))
	}
	n, err := strconv.ParseFloat(states[1], 64) // large counts come as 1.2e+08
	if err != nil {
		return finding{}, fmt.Errorf("read the report of pan: states: %w", err)
	}
	f := finding{states: int64(n), broken: "a property that has no name"}
	if f.errors, err = strconv.Atoi(errs[1]); err != nil {
		return finding{}, fmt.Errorf("read the report of pan: errors: %w", err)
	}
	f.complete = !strings.Contains(out, "Search not completed") && !strings.Contains(out, "max search depth too small")
	if strings.Contains(out, "acceptance cycle (") {
		f.broken = "the calm has a cycle"
	}
	return f, nil
}

// parseStory reads the replay of a counter-example.
func (f *finding) parseStory(out string) {
	if m := stepsRE.FindStringSubmatch(out); m != nil {
		f.steps, _ = strconv.Atoi(m[1])
	}
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		switch what, broken := strings.CutPrefix(line, "BROKEN: "); {
		case broken:
			f.broken = what
			return
		case line == "REACHED":
			f.broken = reached
			return
		case strings.HasPrefix(line, "spin: "):
			return
		case line != "" && !strings.HasPrefix(line, "MSC: "):
			f.story = append(f.story, line)
		}
	}
}

// command runs a program in dir and returns what it printed. It and its
// children end with the context, and it ends with this process.
func command(ctx context.Context, dir, program string, args ...string) (string, error) {
	// The signal at the parent's death is sent when the thread that forked ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return "", fmt.Errorf("run %s: %w", filepath.Base(program), context.Cause(ctx))
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return "", fmt.Errorf("run %s: %w: %s", filepath.Base(program), err, tail(string(out)))
	}
	if err != nil {
		return "", fmt.Errorf("run %s: %w", filepath.Base(program), err)
	}
	return string(out), nil
}

func tail(s string) string { return strings.TrimSpace(s[max(0, len(s)-1000):]) }

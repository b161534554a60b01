package durable

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

var scriptOptions = Options{SegmentBytes: 120, MaxBytes: 1 << 20}

// childScript goes through all that changes files, on one thread. A failure
// ends it, after it has looked that the failure is final.
func childScript(dir string) error {
	runtime.LockOSThread()
	l, err := Open(dir, scriptOptions)
	if err != nil {
		fmt.Println("failed", err)
		return nil
	}
	for range 10 {
		last, err := l.Append(context.Background(), []byte("0123456789"))
		if err != nil {
			fmt.Println("failed", err)
			_, again := l.Append(context.Background(), []byte("more"))
			if again == nil || again.Error() != err.Error() || l.Trim(last) == nil {
				return fmt.Errorf("not final: %w", again)
			}
			return l.Close()
		}
		fmt.Println(last)
		if last%4 != 0 {
			continue
		}
		if err := l.Trim(last); err != nil {
			fmt.Println("failed", err)
			late := strings.Contains(err.Error(), "sync "+dir+":") || strings.Contains(err.Error(), "remove "+dir)
			next, again := l.Append(context.Background(), []byte("after trim"))
			if late != (again != nil) {
				return fmt.Errorf("append after %w: %w", err, again)
			}
			if late {
				return l.Close()
			}
			fmt.Println(next)
		}
	}
	return l.Close()
}

// TestEachCallFails lets every system call that changes the disk fail in turn,
// in the real program under strace, and looks for all that it promised.
func TestEachCallFails(t *testing.T) {
	strace := findStrace(t)
	if testing.Short() {
		t.Skip("starts many processes")
	}
	torn := build(t, scriptOptions, [][]byte{numbered(1)}, [][]byte{numbered(2)}, [][]byte{numbered(3)})
	name := torn.lastSegment()
	torn = torn.with(name, append(torn[name], torn[name][headerLen:headerLen+20]...)) // a marker and a piece
	for _, call := range []string{"pwrite64", "fdatasync", "fsync", "ftruncate", "unlinkat", "renameat", "fchmod", "flock", "mkdirat"} {
		t.Run(call, func(t *testing.T) {
			n := 1
			for ; failCall(t, strace, call, n, torn); n++ {
			}
			if n == 1 {
				t.Errorf("%s is never called", call)
			}
		})
	}
}

// failCall reports whether there was an n-th call to fail.
func failCall(t *testing.T, strace, call string, n int, before image) bool {
	t.Helper()
	dir := filepath.Join(ramDir(t), "log")
	var held uint64
	if call != "mkdirat" {
		before.restore(t, dir)
		held = 3
	}
	cmd := childCommand("script", dir, strace, "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call,
		"-e", fmt.Sprintf("inject=%s:error=EIO:when=%d", call, n))
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %d: %v: %s", call, n, err, out)
	}
	failed := false
	for line := range strings.Lines(string(out)) {
		if last, err := strconv.ParseUint(strings.TrimSpace(line), 10, 64); err == nil {
			held = last
		} else if failed = true; !strings.Contains(line, "input/output error") {
			t.Fatalf("%s %d: %s", call, n, line)
		}
	}
	l := mustOpen(t, dir, scriptOptions)
	defer l.Close()
	if first := l.First(); l.Next() <= held || first%4 != 1 || first > held+1 {
		t.Fatalf("%s %d: log is [%d, %d), acknowledged were %d", call, n, first, l.Next(), held)
	}
	if got := readAll(t, l); uint64(len(got)) != l.Next()-l.First() {
		t.Fatalf("%s %d: %d entries of [%d, %d)", call, n, len(got), l.First(), l.Next())
	}
	return failed
}

func findStrace(t *testing.T) string {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	if out, err := exec.Command(strace, "-qq", "-o", "/dev/null", "true").CombinedOutput(); err != nil {
		t.Skipf("strace is not permitted: %v %s", err, out)
	}
	return strace
}

// wantCalls is what the comments above the functions promise, for a new log
// and up to the fifth answer of childScript.
const wantCalls = `
mkdirat log; fsync parent; openat lock; flock lock; fsync log
openat 1.seg; pwrite64 1.seg; fdatasync 1.seg; fsync log
pwrite64 1.seg; fdatasync 1.seg; write stdout
pwrite64 1.seg; fdatasync 1.seg; write stdout
openat 3.seg; pwrite64 3.seg; fdatasync 3.seg; fsync log
pwrite64 3.seg; fdatasync 3.seg; write stdout
pwrite64 3.seg; fdatasync 3.seg; write stdout
openat tmp; write tmp; fchmod tmp; fsync tmp; renameat tmp; fsync log
unlinkat 1.seg; fsync log
openat 5.seg; pwrite64 5.seg; fdatasync 5.seg; fsync log; unlinkat 3.seg; fsync log
pwrite64 5.seg; fdatasync 5.seg; write stdout`

// wantReopen is Open of a log with one segment.
const wantReopen = `
mkdirat log; openat lock; flock lock; ftruncate 1.seg; pwrite64 1.seg; fsync 1.seg; fsync log
pwrite64 1.seg; fdatasync 1.seg; write stdout`

// TestCallSequence compares what the program does with what it says.
func TestCallSequence(t *testing.T) {
	strace := findStrace(t)
	dir := filepath.Join(t.TempDir(), "parent", "log")
	if err := os.Mkdir(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	compareCalls(t, strace, dir, wantCalls)
	build(t, scriptOptions, [][]byte{numbered(1)}).restore(t, dir)
	compareCalls(t, strace, dir, wantReopen)
}

func compareCalls(t *testing.T, strace, dir, want string) {
	t.Helper()
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := childCommand("script", dir, strace, "-f", "-y", "-qq", "-o", trace, "-e",
		"trace=mkdirat,flock,openat,pwrite64,fdatasync,fsync,unlinkat,renameat,ftruncate,write,fchmod")
	if out, err := cmd.Output(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	wanted := strings.FieldsFunc(want, func(r rune) bool { return r == '\n' || r == ';' })
	got := parseTrace(t, string(b), dir)
	for i, w := range wanted {
		if i >= len(got) || got[i] != strings.TrimSpace(w) {
			t.Fatalf("call %d is not %q:\n%s", i, w, strings.Join(got[:min(len(got), i+1)], "\n"))
		}
	}
}

var (
	callPattern = regexp.MustCompile(`^\d+ +(\w+)\((?:AT_FDCWD(?:<[^>]*>)?, )?(?:(\d+)<([^>]*)>|"([^"]*)")`)
	namePattern = regexp.MustCompile(`^0+(\d+\.seg)$|^\.trimmed\.\d+\.(tmp)$`)
)

// parseTrace returns "call name" for each call that concerns dir, its parent,
// or the answers of the child.
func parseTrace(t *testing.T, trace, dir string) (calls []string) {
	t.Helper()
	for line := range strings.Lines(trace) {
		m := callPattern.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		path := m[3] + m[4]
		name := namePattern.ReplaceAllString(filepath.Base(path), "$1$2")
		switch {
		case m[1] == "write" && m[2] == "1":
			name = "stdout"
		case path != dir && path != filepath.Dir(dir) && filepath.Dir(path) != dir:
			continue
		case m[1] == "openat" && !strings.Contains(line, "O_CLOEXEC"):
			t.Errorf("without O_CLOEXEC: %s", line)
		case m[1] == "openat" && !strings.Contains(line, "O_CREAT"):
			continue // reading, or a directory to sync
		}
		calls = append(calls, m[1]+" "+name)
	}
	return calls
}

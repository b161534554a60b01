package durable

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// child runs in a process of its own and tells its parent, a line at a time,
// what the log told it.
func child(mode, dir string) {
	modes := map[string]func(string) error{"load": childLoad, "limit": childLimit, "script": childScript}
	if err := modes[mode](dir); err != nil {
		fmt.Println("child:", err)
		os.Exit(1)
	}
}

func childCommand(mode, dir string, wrap ...string) *exec.Cmd {
	args := append(wrap, os.Args[0])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "EDGEKEEP_DURABLE_CHILD="+mode, "EDGEKEEP_DURABLE_DIR="+dir, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	return cmd
}

var loadOptions = Options{SegmentBytes: 4096, MaxBytes: 1 << 20}

// childLoad appends from four goroutines until it is killed, and says so after
// each: "index source count". Before a trim it says "trim index".
func childLoad(dir string) error {
	l, err := Open(dir, loadOptions)
	if err != nil {
		return err
	}
	start := l.Next()
	fail := make(chan error)
	for g := range 4 {
		go func() {
			for n := 0; ; n++ {
				data := fmt.Appendf(nil, "%d %d %d %s", start, g, n, strings.Repeat("x", n*37%300))
				last, err := l.Append(context.Background(), data)
				if err != nil {
					fail <- err
					return
				}
				fmt.Fprintf(os.Stdout, "%d %d %d\n", last, g, n) // one write
				if g == 0 && n%50 == 49 {
					fmt.Fprintf(os.Stdout, "trim %d\n", last-40)
					if err := l.Trim(last - 40); err != nil {
						fail <- err
						return
					}
				}
			}
		}()
	}
	return <-fail
}

// TestKill kills a process under load and looks for all that it was promised.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	for round := range 6 {
		cmd := childCommand("load", dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		acked, trimmed := map[uint64]string{}, uint64(0)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			index, rest, _ := strings.Cut(lines.Text(), " ")
			if n, err := strconv.ParseUint(index, 10, 64); err == nil {
				acked[n] = rest
			} else if n, err := strconv.ParseUint(rest, 10, 64); err == nil && index == "trim" {
				trimmed = n
			} else {
				t.Fatal(lines.Text())
			}
			if len(acked) == 150+70*round {
				_ = cmd.Process.Kill() // and read on, to the last promise
			}
		}
		if err := cmd.Wait(); err == nil || len(acked) < 150 {
			t.Fatalf("the child was not killed: %v after %d appends", err, len(acked))
		}
		checkKilled(t, dir, acked, trimmed)
	}
}

func checkKilled(t *testing.T, dir string, acked map[uint64]string, trimmed uint64) {
	t.Helper()
	l := mustOpen(t, dir, loadOptions)
	defer l.Close()
	if l.First() > trimmed+1 && trimmed > 0 {
		t.Fatalf("first %d, but only %d was trimmed", l.First(), trimmed)
	}
	held := map[uint64]string{}
	count := map[string]int{}
	for i, e := range readAll(t, l) {
		if e.Index != l.First()+uint64(i) {
			t.Fatalf("entry %d in place of %d", e.Index, l.First()+uint64(i))
		}
		f := strings.Split(string(e.Data), " ")
		held[e.Index] = f[1] + " " + f[2]
		n, _ := strconv.Atoi(f[2])
		if before, ok := count[f[0]+f[1]]; ok && n != before+1 {
			t.Fatalf("source %s: %d follows %d", f[1], n, before)
		}
		count[f[0]+f[1]] = n
	}
	for index, want := range acked {
		if got, ok := held[index]; got != want && (ok || index > trimmed) {
			t.Fatalf("entry %d is %q, acknowledged was %q", index, got, want)
		}
	}
}

// childLimit appends until the kernel refuses a write in its middle, and goes
// on after the limit is gone.
func childLimit(dir string) error {
	signal.Ignore(syscall.SIGXFSZ)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	l, err := Open(dir, roomy)
	if err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 10_000, Max: old.Max}); err != nil {
		return err
	}
	var first error
	for first == nil {
		var last uint64
		if last, first = l.Append(context.Background(), bytes.Repeat([]byte("z"), 333)); first == nil {
			fmt.Println(last)
		}
	}
	if !errors.Is(first, syscall.EFBIG) {
		return first
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	for range 3 {
		if _, err := l.Append(context.Background(), []byte("more")); !errors.Is(err, first) {
			return fmt.Errorf("append after a failure: %w, want the first cause", err)
		}
	}
	return l.Close()
}

func TestWriteRefusedByKernel(t *testing.T) {
	dir := t.TempDir()
	out, err := childCommand("limit", dir).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n := strings.Count(string(out), "\n")
	if want := (10_000 - headerLen) / (markerLen + entryHead + 333); n != want {
		t.Fatalf("%d appends were acknowledged, want %d", n, want)
	}
	l := mustOpen(t, dir, roomy)
	defer l.Close()
	if l.Recovered() == 0 || l.Next() != uint64(n+1) || len(readAll(t, l)) != n {
		t.Fatalf("recovered %d bytes, next %d, want %d", l.Recovered(), l.Next(), n+1)
	}
}

// TestTrimOnFullDisk has no room for the mark; that is no reason to stop.
func TestTrimOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir, roomy)
	defer l.Close()
	mustAppend(t, l, numbered(1))
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 10, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	err := l.Trim(1)
	if err2 := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err2 != nil {
		t.Fatal(err2)
	}
	if !errors.Is(err, syscall.EFBIG) || l.First() != 1 {
		t.Fatalf("trim: %v, first %d; want EFBIG, 1", err, l.First())
	}
	mustAppend(t, l, numbered(2))
	if err := l.Trim(1); err != nil || l.First() != 2 {
		t.Fatalf("trim: %v, first %d", err, l.First())
	}
	if temps, _ := filepath.Glob(filepath.Join(dir, ".*")); len(temps) != 0 {
		t.Fatalf("left behind: %v", temps)
	}
}

package wasi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/sys"
)

func TestBytesLimit(t *testing.T) {
	dir := NewDir(Limits{Bytes: 100_000, Entries: 10})
	g := newDriver(t, newSystem(t, newWorld().config(dir)))
	fd := g.mustOpen("f", openCreate)
	g.mustWrite(fd, strings.Repeat("x", 70_000))
	if n, err := g.write(fd, strings.Repeat("x", 70_000)); n != 30_000 || err != 0 {
		t.Fatalf("a write over the limit: %d bytes, errno %d", n, err)
	}
	if _, err := g.write(fd, "x"); err != eNOSPC {
		t.Fatalf("a full directory: errno %d", err)
	}
	if err := g.twoPaths("path_symlink", "t", "s"); err != eNOSPC {
		t.Fatalf("a link in a full directory: errno %d", err)
	}
	// Overwriting needs no room, and what is removed gives it back when it is closed.
	if n, err := g.transfer("fd_pwrite", fd, 50_000, 10); n != 50_000 || err != 0 {
		t.Fatalf("overwrite: %d, errno %d", n, err)
	}
	if err := g.pathCall("path_unlink_file", "f"); err != 0 {
		t.Fatal(err)
	}
	other := g.mustOpen("g", openCreate)
	if _, err := g.write(other, "x"); err != eNOSPC {
		t.Fatalf("its file is still open: errno %d", err)
	}
	checkDir(t, dir)
	g.want(success, "fd_close", fd)
	g.want(success, "fd_filestat_set_size", other, 100_000)
	g.want(eNOSPC, "fd_filestat_set_size", other, 100_001)
	g.want(eNOSPC, "fd_allocate", other, 1<<62, 1)
	g.want(success, "fd_seek", other, 1<<62, 0, atResult)
	if _, err := g.write(other, "x"); err != eNOSPC {
		t.Fatalf("far beyond the limit: errno %d", err)
	}
	g.want(success, "fd_seek", other, 1<<63-1, 0, atResult)
	if _, err := g.write(other, "x"); err != eFBIG {
		t.Fatalf("at the end of the world: errno %d", err)
	}
	checkDir(t, dir)
	if dir.bytes != 100_000 {
		t.Fatalf("%d bytes are counted", dir.bytes)
	}
}

// TestShrinkForgets wants what a file has lost not to come back when it grows.
func TestShrinkForgets(t *testing.T) {
	g := newDriver(t, newSystem(t, newWorld().config(NewDir(roomy))))
	fd := g.mustOpen("f", openCreate)
	g.mustWrite(fd, strings.Repeat("x", 2*PageSize))
	for _, size := range []uint64{PageSize + 10, 20} {
		g.want(success, "fd_filestat_set_size", fd, size)
		g.want(success, "fd_seek", fd, size+5, 0, atResult)
		g.mustWrite(fd, "y")
		g.want(success, "fd_seek", fd, size-1, 0, atResult)
		if text, err := g.read(fd, 100); text != "x\x00\x00\x00\x00\x00y" || err != 0 {
			t.Errorf("at %d: %q, errno %d", size, text, err)
		}
	}
}

func TestEntriesLimit(t *testing.T) {
	dir := NewDir(Limits{Bytes: 1000, Entries: 3})
	g := newDriver(t, newSystem(t, newWorld().config(dir)))
	g.mustOpen("f", openCreate)
	for name, do := range map[string]func() errno{
		"open":    func() errno { _, err := g.open("x", openCreate, 0); return err },
		"mkdir":   func() errno { return g.pathCall("path_create_directory", "x") },
		"symlink": func() errno { return g.twoPaths("path_symlink", "t", "x") },
		"link":    func() errno { return g.twoPaths("path_link", "f", "x") },
	} {
		for i := range 2 {
			if err := g.twoPaths("path_link", "f", fmt.Sprint("l", i)); err != 0 {
				t.Fatal(err)
			}
		}
		if err := do(); err != eNOSPC {
			t.Errorf("%s: errno %d", name, err)
		}
		if err := g.twoPaths("path_rename", "l1", "r"); err != 0 {
			t.Errorf("renaming needs no room: errno %d", err)
		}
		for _, n := range []string{"l0", "r"} {
			if err := g.pathCall("path_unlink_file", n); err != 0 {
				t.Fatal(err)
			}
		}
	}
	checkDir(t, dir)
}

// TestTreeLimit fills a directory with the longest names: its tree stays one CBOR
// item that can be written and read.
func TestTreeLimit(t *testing.T) {
	limits := Limits{Bytes: 1 << 30, Entries: 1 << 30}
	dir := NewDir(limits)
	g := newDriver(t, newSystem(t, newWorld().config(dir)))
	made, err := 0, errno(0)
	for ; err == 0; made++ {
		name := strings.Repeat("n", 240) + fmt.Sprint(made)
		if made%2 == 0 {
			err = g.pathCall("path_create_directory", name)
		} else {
			err = g.twoPaths("path_symlink", strings.Repeat("t", 4000), name)
		}
	}
	if err != eNOSPC || made < 300 {
		t.Fatalf("%d names, then errno %d", made, err)
	}
	checkDir(t, dir)
	long := strings.Repeat("n", 240)
	if err := g.twoPaths("path_rename", long+"0", long+"012345678901234"); err != 0 && err != eNOSPC {
		t.Fatal(err)
	}
	checkDir(t, dir)
}

func TestDescriptorLimit(t *testing.T) {
	cfg := newWorld().config(NewDir(roomy))
	cfg.Limits.FDs = 6
	g := newDriver(t, newSystem(t, cfg))
	first := g.mustOpen("f", openCreate)
	g.mustOpen("f", 0)
	if _, err := g.open("g", openCreate, 0); err != eMFILE {
		t.Fatalf("errno %d", err)
	}
	if _, err := g.open("g", 0, 0); err != eMFILE {
		t.Fatalf("errno %d", err)
	}
	g.want(success, "fd_close", first)
	if got := g.mustOpen("f", 0); got != first {
		t.Fatalf("descriptor %d, the lowest free one is %d", got, first)
	}
	if names := g.list(root); len(names) != 1 {
		t.Errorf("an open without a descriptor made a file: %v", names)
	}
}

func TestFlood(t *testing.T) {
	cfg := newWorld().config(nil)
	cfg.Limits.Output = 10
	s := newSystem(t, cfg)
	g := newDriver(t, s)
	var out, errs bytes.Buffer
	s.SetStdio(nil, &out, &errs)
	g.mustWrite(1, "12345")
	g.mustWrite(2, "12345")
	if s.Flooded() {
		t.Fatal("flooded at the limit")
	}
	for range 2 {
		if n, err := g.write(1, "x"); err != eNOSPC {
			t.Fatalf("over the limit: %d, errno %d", n, err)
		}
	}
	if _, err := g.write(2, ""); err != eNOSPC || !s.Flooded() {
		t.Fatalf("after a flood: errno %d, %v", err, s.Flooded())
	}
	if out.String() != "12345" || errs.String() != "12345" {
		t.Fatalf("%q and %q came out", &out, &errs)
	}
	s.SetStdio(nil, &out, nil)
	g.mustWrite(1, "next")
	g.mustWrite(2, "nobody")
	if s.Flooded() || out.String() != "12345next" {
		t.Fatalf("the next call: %v, %q", s.Flooded(), &out)
	}
}

type failing struct{ n int }

func (f failing) Write([]byte) (int, error) { return f.n, errors.New("gone") }

func TestStreams(t *testing.T) {
	s := newSystem(t, newWorld().config(nil))
	g := newDriver(t, s)
	if text, err := g.read(0, 10); text != "" || err != 0 {
		t.Errorf("no stdin: %q, errno %d", text, err)
	}
	s.SetStdio(iotest.OneByteReader(strings.NewReader("ab")), failing{0}, failing{2})
	for _, want := range []string{"a", "b", ""} {
		if text, err := g.read(0, 10); text != want || err != 0 {
			t.Errorf("read %q, errno %d, want %q", text, err, want)
		}
	}
	if _, err := g.write(1, "xyz"); err != eIO {
		t.Errorf("a broken stdout: errno %d", err)
	}
	if n, err := g.write(2, "xyz"); n != 2 || err != 0 {
		t.Errorf("a stderr that breaks after two: %d, errno %d", n, err)
	}
	s.SetStdio(iotest.ErrReader(errors.New("gone")), nil, nil)
	if _, err := g.read(0, 1); err != eIO {
		t.Errorf("a broken stdin: errno %d", err)
	}
	s.SetStdio(stuck{}, nil, nil)
	if _, err := g.read(0, 1); err != eIO {
		t.Errorf("a stuck stdin: errno %d", err)
	}
	g.want(eBADF, "fd_read", 1, atVector, 1, atResult)
	g.want(eBADF, "fd_write", 0, atVector, 1, atResult)
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

func TestBrokenRandomness(t *testing.T) {
	cfg := newWorld().config(nil)
	cfg.Rand = io.LimitReader(strings.NewReader("1234"), 4)
	g := newDriver(t, newSystem(t, cfg))
	g.want(eIO, "random_get", atBuffer, 8)
}

func TestNewSystemRefuses(t *testing.T) {
	good := newWorld().config(nil)
	for name, change := range map[string]func(*Config){
		"no randomness":    func(c *Config) { c.Rand = nil },
		"no clock":         func(c *Config) { c.Now = nil },
		"no monotonic":     func(c *Config) { c.Monotonic = nil },
		"no sleep":         func(c *Config) { c.Sleep = nil },
		"few descriptors":  func(c *Config) { c.Limits.FDs = 4 },
		"zero in argument": func(c *Config) { c.Args = []string{"a\x00b"} },
		"zero in variable": func(c *Config) { c.Env = []string{"A=\x00"} },
		"long arguments":   func(c *Config) { c.Args = []string{strings.Repeat("x", maxStrings)} },
		"model outside":    func(c *Config) { c.ReadOnly = map[string][]byte{"../m": nil} },
		"absolute model":   func(c *Config) { c.ReadOnly = map[string][]byte{"/m": nil} },
		"model in a model": func(c *Config) { c.ReadOnly = map[string][]byte{"m": nil, "m/n": nil} },
		"unnamed model":    func(c *Config) { c.ReadOnly = map[string][]byte{"a//b": nil} },
	} {
		cfg := good
		change(&cfg)
		if _, err := NewSystem(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestSleepEnds ends a guest that sleeps for good when the host's context is done.
func TestSleepEnds(t *testing.T) {
	p := newProgram(t, compileC(t, "reactor.c", "-mexec-model=reactor"), wazero.NewRuntimeConfig())
	for want, err := range map[uint32]error{
		sys.ExitCodeContextCanceled:  context.Canceled,
		sys.ExitCodeDeadlineExceeded: context.DeadlineExceeded,
	} {
		w := newWorld()
		w.sleepErr = err
		i := newInstance(t, p, newSystem(t, w.config(NewDir(roomy))))
		_, got := i.module.ExportedFunction("doze").Call(context.Background())
		var exit *sys.ExitError
		if !errors.As(got, &exit) || exit.ExitCode() != want {
			t.Errorf("%v: got %v", err, got)
		}
		if w.slept > 60_000_000_000 {
			t.Errorf("slept %v in one piece", w.slept)
		}
	}
}

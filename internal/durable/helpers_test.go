package durable

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tester is what *testing.T and *rapid.T share.
type tester interface {
	Helper()
	Fatalf(format string, args ...any)
}

func mustOpen(t tester, dir string, o Options) *Log {
	t.Helper()
	l, err := Open(dir, o)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return l
}

func mustClose(t tester, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func mustAppend(t tester, l *Log, entries ...[]byte) uint64 {
	t.Helper()
	last, err := l.Append(context.Background(), entries...)
	if err != nil {
		t.Fatalf("append: %v", err)
	}
	return last
}

func readAll(t tester, l *Log) []Entry {
	t.Helper()
	entries, err := l.Read(0, math.MaxInt, math.MaxInt)
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	return entries
}

// sameEntries fails unless l holds exactly want, the first of it at index first.
func sameEntries(t tester, l *Log, first uint64, want [][]byte) {
	t.Helper()
	got := readAll(t, l)
	if len(got) != len(want) || l.First() != first || l.Next() != first+uint64(len(want)) {
		t.Fatalf("log holds %d entries, [%d, %d), want %d from %d", len(got), l.First(), l.Next(), len(want), first)
	}
	for i, e := range got {
		if e.Index != first+uint64(i) || !bytes.Equal(e.Data, want[i]) {
			t.Fatalf("entry %d is (%d, %.20x), want (%d, %.20x)", i, e.Index, e.Data, first+uint64(i), want[i])
		}
	}
}

// ramRoot is where tests work that sync often and do not need a disk for it.
func ramRoot() string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() && unix.Access("/dev/shm", unix.W_OK) == nil {
		return "/dev/shm"
	}
	return ""
}

func ramDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(ramRoot(), "durable")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func numbered(n int) []byte { return fmt.Appendf(nil, "entry %d|", n) }

// segments returns the paths of the segments in dir, in order.
func segments(t tester, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*"+segSuffix))
	if err != nil {
		t.Fatalf("glob: %v", err)
	}
	slices.Sort(paths)
	return paths
}

func diskBytes(t tester, dir string) (n int64) {
	t.Helper()
	for _, path := range segments(t, dir) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatalf("stat: %v", err)
		}
		n += info.Size()
	}
	return n
}

// image is the content of a log directory.
type image map[string][]byte

func snapshot(t tester, dir string) image {
	t.Helper()
	im := image{}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatalf("read dir: %v", err)
	}
	for _, f := range files {
		if im[f.Name()], err = os.ReadFile(filepath.Join(dir, f.Name())); err != nil {
			t.Fatalf("read file: %v", err)
		}
	}
	return im
}

// restore makes dir hold exactly im.
func (im image) restore(t tester, dir string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatalf("mkdir: %v", err)
	}
	for name, b := range im {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatalf("write file: %v", err)
		}
	}
}

func (im image) with(name string, b []byte) image {
	out := image{}
	maps.Copy(out, im)
	out[name] = b
	return out
}

func (im image) equal(other image) bool {
	if len(im) != len(other) {
		return false
	}
	for name, b := range im {
		if o, ok := other[name]; !ok || !bytes.Equal(b, o) {
			return false
		}
	}
	return true
}

func (im image) lastSegment() (name string) {
	for n := range im {
		if strings.HasSuffix(n, segSuffix) && n > name {
			name = n
		}
	}
	return name
}

func TestMain(m *testing.M) {
	if mode := os.Getenv("EDGEKEEP_DURABLE_CHILD"); mode != "" {
		child(mode, os.Getenv("EDGEKEEP_DURABLE_DIR"))
		return
	}
	os.Exit(m.Run())
}

package wasi

import (
	"context"
	"strings"
	"testing"

	"github.com/tetratelabs/wazero/api"
)

// driver calls the functions of a System as a guest does, with a memory of its own.
type driver struct {
	t      testing.TB
	s      *System
	memory *fakeMemory
}

type fakeMemory struct {
	api.Memory // nil: only Read is called
	b          []byte
}

func (m *fakeMemory) Read(offset, n uint32) ([]byte, bool) {
	if uint64(offset)+uint64(n) > uint64(len(m.b)) {
		return nil, false
	}
	return m.b[offset : offset+n : offset+n], true
}

// The driver's memory: results, an iovec, two strings, and a buffer to its end.
const (
	atResult = 64
	atVector = 512
	atPath   = 1 << 12
	atPath2  = 1 << 13
	atBuffer = 1 << 15
	atEnd    = 1 << 18

	root = 3 // the descriptor of "/"
)

func newDriver(t testing.TB, s *System) *driver {
	return &driver{t: t, s: s, memory: &fakeMemory{b: make([]byte, atEnd)}}
}

func (g *driver) call(name string, args ...uint64) errno {
	for _, f := range functions {
		if f.name == name {
			if len(args) != len(f.params) {
				g.t.Fatalf("%s takes %d arguments, not %d", name, len(f.params), len(args))
			}
			return f.do(g.s, &call{ctx: context.Background(), memory: g.memory, args: args})
		}
	}
	g.t.Fatalf("no function %s", name)
	return 0
}

func (g *driver) want(want errno, name string, args ...uint64) {
	g.t.Helper()
	if got := g.call(name, args...); got != want {
		g.t.Fatalf("%s %v: errno %d, want %d", name, args, got, want)
	}
}

func (g *driver) put(at int, text string) (ptr, n uint64) {
	return uint64(at), uint64(copy(g.memory.b[at:], text))
}

func (g *driver) u32(at int) uint64 { return uint64(le.Uint32(g.memory.b[at:])) }
func (g *driver) u64(at int) uint64 { return le.Uint64(g.memory.b[at:]) }

func (g *driver) open(path string, oflags uint64, base rights) (uint64, errno) {
	p, n := g.put(atPath, path)
	err := g.call("path_open", root, 0, p, n, oflags, uint64(base), 0, 0, atResult)
	return g.u32(atResult), err
}

func (g *driver) mustOpen(path string, oflags uint64) uint64 {
	g.t.Helper()
	fd, err := g.open(path, oflags, fileRights)
	if err != 0 {
		g.t.Fatalf("open %s: errno %d", path, err)
	}
	return fd
}

// pathCall is a call with a descriptor and a path.
func (g *driver) pathCall(name, path string) errno {
	p, n := g.put(atPath, path)
	return g.call(name, root, p, n)
}

// twoPaths is path_rename, path_link or path_symlink.
func (g *driver) twoPaths(name, from, to string) errno {
	p, n := g.put(atPath, from)
	q, m := g.put(atPath2, to)
	switch name {
	case "path_symlink":
		return g.call(name, p, n, root, q, m)
	case "path_link":
		return g.call(name, root, 0, p, n, root, q, m)
	}
	return g.call(name, root, p, n, root, q, m)
}

// transfer is fd_read, fd_write, fd_pread or fd_pwrite of one buffer; off is for the
// last two.
func (g *driver) transfer(name string, fd uint64, size int, off uint64) (int, errno) {
	le.PutUint32(g.memory.b[atVector:], atBuffer)
	le.PutUint32(g.memory.b[atVector+4:], uint32(size))
	args := []uint64{fd, atVector, 1, atResult}
	if strings.HasPrefix(name, "fd_p") {
		args = []uint64{fd, atVector, 1, off, atResult}
	}
	err := g.call(name, args...)
	return int(g.u32(atResult)), err
}

func (g *driver) write(fd uint64, text string) (int, errno) {
	g.put(atBuffer, text)
	return g.transfer("fd_write", fd, len(text), 0)
}

func (g *driver) mustWrite(fd uint64, text string) {
	g.t.Helper()
	if n, err := g.write(fd, text); err != 0 || n != len(text) {
		g.t.Fatalf("write %d bytes: %d, errno %d", len(text), n, err)
	}
}

func (g *driver) read(fd uint64, size int) (string, errno) {
	n, err := g.transfer("fd_read", fd, size, 0)
	if err != 0 {
		return "", err
	}
	return string(g.memory.b[atBuffer:][:n]), 0
}

// list returns the names of a directory, without the dots.
func (g *driver) list(fd uint64) []string {
	g.t.Helper()
	var names []string
	cookie := uint64(0)
	for {
		const size = 4096
		g.want(success, "fd_readdir", fd, atBuffer, size, cookie, atResult)
		used := g.u32(atResult)
		b := g.memory.b[atBuffer:][:used]
		for len(b) >= 24 && len(b) >= 24+int(le.Uint32(b[16:])) {
			name := string(b[24:][:le.Uint32(b[16:])])
			if name != "." && name != ".." {
				names = append(names, name)
			}
			cookie, b = le.Uint64(b), b[24+len(name):]
		}
		if used < size {
			return names
		}
	}
}

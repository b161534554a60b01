package wasi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// onHost are the host's error numbers for ours.
var onHost = map[errno]error{
	success: nil, eBADF: unix.EBADF, eBUSY: unix.EBUSY, eEXIST: unix.EEXIST, eINVAL: unix.EINVAL, eISDIR: unix.EISDIR,
	eLOOP: unix.ELOOP, eNOENT: unix.ENOENT, eNOTDIR: unix.ENOTDIR, eNOTEMPTY: unix.ENOTEMPTY, ePERM: unix.EPERM,
}

// pair does each operation here and in a directory of the host, and wants the same.
type pair struct {
	*driver
	dir  string
	open []openPair
}

type openPair struct {
	fd   uint64
	host int
}

// same compares the outcome of an operation. It tells whether there is something
// else to compare.
func (p *pair) same(t *rapid.T, got errno, host func() error, what string, args ...any) bool {
	if got == eNOTCAPABLE {
		return false // out of the sandbox: the host would let it
	}
	want, known := onHost[got]
	if err := host(); !known || !errors.Is(err, want) {
		t.Fatalf("%s %q: errno %d, the host says %v", what, args, got, err)
	}
	return got == success
}

// at is a path on the host, with its dots and slashes as they are.
func (p *pair) at(path string) string { return p.dir + "/" + path }

// TestLikeHost does random operations on paths and files here and on the host's file
// system: the same results and errors, the same names, contents and link counts.
func TestLikeHost(t *testing.T) {
	dir := t.TempDir()
	runs := 0
	rapid.Check(t, func(rt *rapid.T) {
		runs++
		host := filepath.Join(dir, fmt.Sprint(runs), "root")
		if err := os.MkdirAll(host, 0o755); err != nil {
			rt.Fatal(err)
		}
		s := newSystem(t, newWorld().config(NewDir(roomy)))
		p := &pair{driver: newDriver(t, s), dir: host}
		defer func() {
			for _, o := range p.open {
				_ = unix.Close(o.host)
			}
		}()
		name := rapid.SampledFrom([]string{"a", "b", "c"})
		part := rapid.SampledFrom([]string{"a", "b", "c", "a", "b", ".", ".."})
		path := rapid.Custom(func(t *rapid.T) string {
			parts := append(rapid.SliceOfN(part, 0, 3).Draw(t, "parts"), name.Draw(t, "name"))
			if rapid.IntRange(0, 9).Draw(t, "dots at the end") == 0 {
				parts = append(parts, part.Draw(t, "end"))
			}
			return strings.Join(parts, "/") + strings.Repeat("/", rapid.SampledFrom([]int{0, 0, 0, 0, 1}).Draw(t, "slashes"))
		})
		rt.Repeat(map[string]func(*rapid.T){
			"mkdir": func(t *rapid.T) {
				f := path.Draw(t, "path")
				p.same(t, p.pathCall("path_create_directory", f), func() error { return unix.Mkdir(p.at(f), 0o755) }, "mkdir", f)
			},
			"rmdir": func(t *rapid.T) {
				f := path.Draw(t, "path")
				p.same(t, p.pathCall("path_remove_directory", f), func() error { return unix.Rmdir(p.at(f)) }, "rmdir", f)
			},
			"unlink": func(t *rapid.T) {
				f := path.Draw(t, "path")
				p.same(t, p.pathCall("path_unlink_file", f), func() error { return unix.Unlink(p.at(f)) }, "unlink", f)
			},
			"symlink": func(t *rapid.T) {
				target, f := path.Draw(t, "target"), strings.TrimRight(path.Draw(t, "path"), "/")
				p.same(t, p.twoPaths("path_symlink", target, f), func() error { return unix.Symlink(target, p.at(f)) }, "symlink", target, f)
			},
			"link": func(t *rapid.T) {
				f, g := path.Draw(t, "from"), strings.TrimRight(path.Draw(t, "to"), "/")
				p.same(t, p.twoPaths("path_link", f, g), func() error { return unix.Link(p.at(f), p.at(g)) }, "link", f, g)
			},
			"rename": func(t *rapid.T) {
				f, g := path.Draw(t, "from"), path.Draw(t, "to")
				p.same(t, p.twoPaths("path_rename", f, g), func() error { return unix.Rename(p.at(f), p.at(g)) }, "rename", f, g)
			},
			"readlink": func(t *rapid.T) { p.readlink(t, path.Draw(t, "path")) },
			"stat":     func(t *rapid.T) { p.stat(t, path.Draw(t, "path"), rapid.Bool().Draw(t, "follow")) },
			"open":     func(t *rapid.T) { p.openPath(t, path.Draw(t, "path")) },
			"write":    p.onOpen(p.writeFile),
			"read":     p.onOpen(p.readFile),
			"resize":   p.onOpen(p.resize),
			"seek":     p.onOpen(p.seek),
			"close":    p.onOpen(p.closeFile),
			"":         func(t *rapid.T) { p.compare(t, "") },
		})
		checkDir(t, s.cfg.Dir)
	})
}

func (p *pair) readlink(t *rapid.T, path string) {
	at, n := p.put(atPath, path)
	var b [256]byte
	var k int
	err := p.driver.call("path_readlink", root, at, n, atBuffer, 256, atResult)
	if p.same(t, err, func() (err error) { k, err = unix.Readlink(p.at(path), b[:]); return err }, "readlink", path) {
		if got := string(p.memory.b[atBuffer:][:p.u32(atResult)]); got != string(b[:k]) {
			t.Fatalf("readlink %q: %q, want %q", path, got, b[:k])
		}
	}
}

func (p *pair) stat(t *rapid.T, path string, follow bool) {
	at, n := p.put(atPath, path)
	var st unix.Stat_t
	flags, look := unix.AT_SYMLINK_NOFOLLOW, uint64(0)
	if follow {
		flags, look = 0, 1
	}
	err := p.driver.call("path_filestat_get", root, look, at, n, atResult)
	if p.same(t, err, func() error { return unix.Fstatat(unix.AT_FDCWD, p.at(path), &st, flags) }, "stat", path, follow) {
		p.sameStat(t, path, &st)
	}
}

func (p *pair) sameStat(t *rapid.T, path string, st *unix.Stat_t) {
	types := map[byte]uint32{3: unix.S_IFDIR, 4: unix.S_IFREG, 7: unix.S_IFLNK}
	kind := types[p.memory.b[atResult+16]]
	if kind != st.Mode&unix.S_IFMT {
		t.Fatalf("%q: type %o, want %o", path, kind, st.Mode&unix.S_IFMT)
	}
	if kind == unix.S_IFDIR {
		return // sizes and link counts of directories are a host's own
	}
	if links, size := p.u64(atResult+24), p.u64(atResult+32); links != uint64(st.Nlink) || size != uint64(st.Size) { //nolint:unconvert // 32 bits on some architectures
		t.Fatalf("%q: %d links, %d bytes, want %d, %d", path, links, size, st.Nlink, st.Size)
	}
}

func (p *pair) openPath(t *rapid.T, path string) {
	hostFlags := []int{unix.O_CREAT, unix.O_DIRECTORY, unix.O_EXCL, unix.O_TRUNC}
	oflags := rapid.SampledFrom([]uint64{0, 0, openCreate, openCreate, openCreate | openExclusive, openTruncate, openCreate | openTruncate, openDirectory}).Draw(t, "oflags")
	base, flags := fileRights, unix.O_RDWR
	if oflags == openDirectory || rapid.Bool().Draw(t, "to read") && oflags&openTruncate == 0 {
		base, flags = base&^rightFDWrite, unix.O_RDONLY
	}
	for i, f := range hostFlags {
		if oflags>>i&1 != 0 {
			flags |= f
		}
	}
	fdflags, look := uint64(0), uint64(1)
	if rapid.Bool().Draw(t, "append") {
		fdflags, flags = flagAppend, flags|unix.O_APPEND
	}
	if rapid.Bool().Draw(t, "no follow") {
		look, flags = 0, flags|unix.O_NOFOLLOW
	}
	at, n := p.put(atPath, path)
	o := openPair{}
	err := p.driver.call("path_open", root, look, at, n, oflags, uint64(base), 0, fdflags, atResult)
	o.fd = p.u32(atResult)
	if err == eLOOP && oflags == openDirectory {
		return // Linux looks at the type first: ENOTDIR
	}
	if p.same(t, err, func() (err error) { o.host, err = unix.Open(p.at(path), flags|unix.O_CLOEXEC, 0o644); return err }, "open", path, oflags, look, base&rightFDWrite) {
		p.open = append(p.open, o)
	}
}

// onOpen does something with one of the open files.
func (p *pair) onOpen(do func(*rapid.T, openPair)) func(*rapid.T) {
	return func(t *rapid.T) {
		if len(p.open) == 0 {
			t.Skip("nothing is open")
		}
		do(t, rapid.SampledFrom(p.open).Draw(t, "file"))
	}
}

func (p *pair) writeFile(t *rapid.T, o openPair) {
	text := strings.Repeat(rapid.SampledFrom([]string{"x", "yz", "0123456789"}).Draw(t, "text"), rapid.SampledFrom([]int{0, 1, 10, 7000}).Draw(t, "times"))
	n, err := p.write(o.fd, text)
	if err == eISDIR { // preview 1 says more than the host's EBADF
		err = eBADF
	}
	var k int
	if p.same(t, err, func() (err error) { k, err = unix.Write(o.host, []byte(text)); return err }, "write", len(text)) && n != k {
		t.Fatalf("write: %d, want %d", n, k)
	}
}

func (p *pair) readFile(t *rapid.T, o openPair) {
	size := rapid.SampledFrom([]int{0, 1, 100, 150_000}).Draw(t, "size")
	text, err := p.read(o.fd, size)
	b := make([]byte, size)
	var k int
	if p.same(t, err, func() (err error) { k, err = unix.Read(o.host, b); return err }, "read", size) && text != string(b[:k]) {
		t.Fatalf("read %d bytes that differ from the host's %d", len(text), k)
	}
}

func (p *pair) resize(t *rapid.T, o openPair) {
	size := rapid.SampledFrom([]uint64{0, 1, 20, PageSize - 1, PageSize, PageSize + 1, 200_000}).Draw(t, "size")
	var st unix.Stat_t
	if err := unix.Fstat(o.host, &st); err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(o.host), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE == unix.O_RDONLY || st.Mode&unix.S_IFMT != unix.S_IFREG {
		t.Skip("preview 1 has a right of its own for this")
	}
	p.same(t, p.driver.call("fd_filestat_set_size", o.fd, size), func() error { return unix.Ftruncate(o.host, int64(size)) }, "resize", size)
}

func (p *pair) seek(t *rapid.T, o openPair) {
	off, whence := rapid.SampledFrom([]int64{-70_000, -5, 0, 3, 70_000}).Draw(t, "offset"), rapid.IntRange(0, 2).Draw(t, "whence")
	var at int64
	err := p.driver.call("fd_seek", o.fd, uint64(off), uint64(whence), atResult)
	if err == eISDIR {
		return // a host can seek in a directory
	}
	if p.same(t, err, func() (err error) { at, err = unix.Seek(o.host, off, whence); return err }, "seek", off, whence) && p.u64(atResult) != uint64(at) {
		t.Fatalf("seek: %d, want %d", p.u64(atResult), at)
	}
}

func (p *pair) closeFile(t *rapid.T, o openPair) {
	p.open = slices.DeleteFunc(p.open, func(other openPair) bool { return other == o })
	p.same(t, p.driver.call("fd_close", o.fd), func() error { return unix.Close(o.host) }, "close")
}

// compare walks both directories.
func (p *pair) compare(t *rapid.T, path string) {
	host, err := os.ReadDir(p.at(path))
	if err != nil {
		t.Fatal(err)
	}
	fd, e := p.driver.open(path+".", openDirectory, rightFDReaddir)
	if e != 0 {
		t.Fatalf("open %q: errno %d", path, e)
	}
	names := p.list(fd)
	p.driver.call("fd_close", fd)
	slices.Sort(names)
	want := []string{}
	for _, h := range host {
		want = append(want, h.Name())
	}
	if !slices.Equal(names, want) && len(names)+len(want) > 0 {
		t.Fatalf("%q has %q, want %q", path, names, want)
	}
	for _, h := range host {
		if h.IsDir() {
			p.compare(t, path+h.Name()+"/")
		}
	}
}

package wasi

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/sys"

	"edgekeep/internal/cose"
)

var small = Limits{Bytes: 4 * PageSize, Entries: 20, FDs: 12, Output: 1000}

// FuzzRestoreDir wants what is accepted to be the one spelling of a sound directory
// that can be worked with.
func FuzzRestoreDir(f *testing.F) {
	dir, _ := sample(f)
	f.Add(dir.Tree())
	f.Add(NewDir(roomy).Tree())
	f.Fuzz(func(t *testing.T, tree []byte) {
		d, err := RestoreDir(small, tree, func(id PageID) ([]byte, error) {
			var r treeRecord
			if err := cose.Unmarshal(tree, &r); err != nil {
				return nil, err
			}
			for _, n := range r.Nodes {
				if n.Number == id.Inode {
					return make([]byte, min(PageSize, n.Size-uint64(id.Index)*PageSize)), nil
				}
			}
			return nil, fmt.Errorf("no inode %d", id.Inode)
		})
		if err != nil {
			return
		}
		if !bytes.Equal(d.Tree(), tree) {
			t.Fatal("accepted, and written in another way")
		}
		checkDir(t, d)
		cfg := newWorld().config(d)
		s := newSystem(t, cfg)
		g := newDriver(t, s)
		for _, name := range g.list(root) {
			if fd, err := g.open(name, 0, fileRights); err == 0 {
				_, _ = g.write(fd, "x")
			}
			_ = g.twoPaths("path_rename", name, "new")
			_ = g.pathCall("path_remove_directory", name)
			_ = g.pathCall("path_unlink_file", name)
		}
		s.Close()
		checkDir(t, d)
	})
}

// FuzzRestoreState wants what is accepted to be the one spelling of what it is.
func FuzzRestoreState(f *testing.F) {
	dir, s := sample(f)
	f.Add(s.State())
	cfg := s.cfg
	tree, pages := dir.Tree(), copyPages(dir)
	f.Fuzz(func(t *testing.T, state []byte) {
		d, err := RestoreDir(roomy, tree, from(pages))
		if err != nil {
			t.Fatal(err)
		}
		cfg := cfg
		cfg.Dir, cfg.Monotonic = d, func() int64 { return 7 }
		s := newSystem(t, cfg)
		if s.RestoreState(state) != nil {
			return
		}
		if !bytes.Equal(s.State(), state) {
			t.Fatal("accepted, and written in another way")
		}
		g := newDriver(t, s)
		for fd := range uint64(roomy.FDs) {
			_, _ = g.read(fd, 10)
			_, _ = g.write(fd, "x")
			_ = g.call("fd_readdir", fd, atBuffer, 100, 0, atResult)
			_ = g.call("fd_close", fd)
		}
		checkDir(t, d)
		for number, n := range d.nodes {
			if n.names == 0 {
				t.Errorf("inode %d has no name and is not open", number)
			}
		}
	})
}

// FuzzCalls makes calls with arguments of all kinds on a small system: nothing
// panics, the limits hold, and the directory stays sound. Each call is a byte for the
// function and one for each argument, which chooses one of the values that matter.
func FuzzCalls(f *testing.F) {
	f.Add([]byte{31, 1, 2, 3, 4, 5, 6, 7, 8, 9, 26, 3, 4, 5, 6})
	for i := range functions {
		f.Add(bytes.Repeat([]byte{byte(i), 3, 7, 9}, 8))
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) > 1000 {
			return
		}
		w := newWorld()
		w.sleepErr = context.Canceled
		cfg := w.config(NewDir(small))
		cfg.Limits, cfg.ReadOnly, cfg.Args = small, models, []string{"a", "b"}
		s := newSystem(t, cfg)
		g := newDriver(t, s)
		interesting := fuzzMemory(g)
		for len(program) > 0 {
			fn := functions[int(program[0])%len(functions)]
			program = program[1:]
			args := make([]uint64, len(fn.params))
			for i := range args {
				if len(program) > 0 {
					args[i] = interesting[int(program[0])%len(interesting)]
					program = program[1:]
				}
				if fn.params[i] == 'i' {
					args[i] &= 1<<32 - 1
				}
			}
			c := &call{ctx: context.Background(), module: noModule{}, memory: g.memory, args: args}
			mustNotPanic(t, fn, s, c)
		}
		checkDir(t, cfg.Dir)
		if d := cfg.Dir; d.bytes > small.Bytes || d.names > small.Entries || len(s.fds) > small.FDs || s.output > small.Output {
			t.Fatalf("over a limit: %d bytes, %d names, %d descriptors, %d of output", d.bytes, d.names, len(s.fds), s.output)
		}
		tree, state := cfg.Dir.Tree(), s.State()
		again, err := RestoreDir(small, tree, from(copyPages(cfg.Dir)))
		if err != nil {
			t.Fatal(err)
		}
		cfg.Dir = again
		if err := newSystem(t, cfg).RestoreState(state); err != nil {
			t.Fatal(err)
		}
	})
}

// noModule is a guest that can only be closed.
type noModule struct{ api.Module }

func (noModule) CloseWithExitCode(context.Context, uint32) error { return nil }

// fuzzMemory puts paths and vectors into memory and returns values for arguments.
func fuzzMemory(g *driver) []uint64 {
	values := []uint64{
		0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 64, 100, PageSize, 3 * PageSize,
		1 << 31, 1<<32 - 1, 1<<32 - 8, 1<<63 - 1, 1 << 63, 1<<64 - 1, atEnd - 4, atEnd,
		uint64(allRights), uint64(fileRights), uint64(dirRights), uint64(rightFDRead),
	}
	for i, path := range []string{"a", "b", "a/b", "a/c", "m", "../a", "a/..", "b/", ".", "s", "s/x"} {
		at := 1024 + 64*i
		g.put(at, path+"\x00")
		values = append(values, uint64(at), uint64(len(path)))
	}
	vectors := [][2]uint32{{atBuffer, 10}, {atBuffer, PageSize}, {atEnd - 8, 8}, {atEnd - 8, 9}, {1<<32 - 1, 1}, {0, 1<<32 - 1}}
	for i, v := range vectors {
		binary.LittleEndian.PutUint32(g.memory.b[2048+8*i:], v[0])
		binary.LittleEndian.PutUint32(g.memory.b[2048+8*i+4:], v[1])
		values = append(values, uint64(2048+8*i))
	}
	return values
}

func mustNotPanic(t *testing.T, fn function, s *System, c *call) {
	args := bytes.Clone(fmt.Append(nil, c.args))
	defer func() {
		switch r := recover().(type) {
		case nil, *sys.ExitError: // a sleep that was cancelled
		default:
			t.Fatalf("%s %s: %v", fn.name, args, r)
		}
	}()
	fn.do(s, c)
}

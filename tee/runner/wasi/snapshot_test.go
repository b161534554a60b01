package wasi

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	"edgekeep/internal/cose"
)

// instance is a reactor between calls.
type instance struct {
	t      testing.TB
	system *System
	module api.Module
}

func newInstance(t testing.TB, p *program, s *System) *instance {
	t.Helper()
	ctx := context.Background()
	r := wazero.NewRuntimeWithConfig(ctx, p.config)
	t.Cleanup(func() { _ = r.Close(ctx) })
	if err := s.Instantiate(ctx, r); err != nil {
		t.Fatal(err)
	}
	m, err := r.InstantiateWithConfig(ctx, p.code, wazero.NewModuleConfig().WithStartFunctions("_initialize"))
	if err != nil {
		t.Fatal(err)
	}
	return &instance{t: t, system: s, module: m}
}

func (i *instance) call(name string) int {
	i.t.Helper()
	var stderr bytes.Buffer
	i.system.SetStdio(nil, nil, &stderr)
	res, err := i.module.ExportedFunction(name).Call(context.Background())
	if err != nil {
		i.t.Fatalf("%s: %v\n%s", name, err, &stderr)
	}
	if len(res) == 0 {
		return 0
	}
	return int(res[0])
}

// copyPages are the pages of a directory as a mover has them.
func copyPages(d *Dir) map[PageID][]byte {
	pages := map[PageID][]byte{}
	for _, id := range d.Pages() {
		pages[id] = d.Page(id)
	}
	return pages
}

func from(pages map[PageID][]byte) func(PageID) ([]byte, error) {
	return func(id PageID) ([]byte, error) { return pages[id], nil }
}

// TestMove freezes a reactor that has a log, an unlinked file, a model and a half-read
// directory open, and goes on with it on another engine and a host whose clock is
// behind. (All of the reactor's memory is one linear memory: its stack pointer, the
// only mutable global, is where it was before the call.)
func TestMove(t *testing.T) {
	code := compileC(t, "reactor.c", "-mexec-model=reactor")
	w := newWorld()
	cfg := w.config(NewDir(roomy))
	cfg.ReadOnly = models
	source := newInstance(t, newProgram(t, code, wazero.NewRuntimeConfig()), newSystem(t, cfg))
	source.call("setup")
	source.call("step")
	checkDir(t, cfg.Dir)
	tree, state, pages := cfg.Dir.Tree(), source.system.State(), copyPages(cfg.Dir)
	memory, _ := source.module.Memory().Read(0, source.module.Memory().Size())
	memory = bytes.Clone(memory)
	wantLeft := source.call("step")

	dir, err := RestoreDir(roomy, tree, from(pages))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dir.Tree(), tree) {
		t.Fatal("the tree restores to another one")
	}
	there := newWorld()
	there.mono = 1
	cfg = there.config(dir)
	cfg.ReadOnly = models
	s := newSystem(t, cfg)
	target := newInstance(t, newProgram(t, code, wazero.NewRuntimeConfigInterpreter()), s)
	if err := s.RestoreState(state); err != nil {
		t.Fatal(err)
	}
	if missing := uint32(len(memory)) - target.module.Memory().Size(); missing > 0 {
		target.module.Memory().Grow(missing >> 16)
	}
	target.module.Memory().Write(0, memory)
	if left := target.call("step"); left != wantLeft || left < 400 {
		t.Fatalf("%d names left, at the source %d", left, wantLeft)
	}
	g := newDriver(t, s)
	if log, err := g.read(g.mustOpen("log", 0), 100); log != "0\n1\n" || err != 0 {
		t.Fatalf("log %q, errno %d", log, err)
	}
	ghosts := func() (n int) {
		for _, node := range dir.nodes {
			if node.names == 0 {
				n++
			}
		}
		return n
	}
	if ghosts() != 1 {
		t.Errorf("%d files without a name", ghosts())
	}
	s.Close()
	if ghosts() != 0 {
		t.Error("Close leaves files without a name")
	}
	checkDir(t, dir)
}

// TestPreCopy keeps a copy up to date by Dirty and Tree alone while files change in
// every way.
func TestPreCopy(t *testing.T) {
	dir := NewDir(roomy)
	g := newDriver(t, newSystem(t, newWorld().config(dir)))
	copied := map[PageID][]byte{}
	big := strings.Repeat("abcdefgh", 20_000) // 160,000 bytes: 3 pages
	var fd, fd2 uint64
	steps := []struct {
		name  string
		do    func()
		dirty int
	}{
		{"nothing", func() {}, 0},
		{"create", func() { fd = g.mustOpen("f", openCreate) }, 0},
		{"write", func() { g.mustWrite(fd, big) }, 3},
		{"read", func() { g.want(success, "fd_seek", fd, 0, 0, atResult); _, _ = g.read(fd, 1000) }, 0},
		{"write in the middle", func() { g.want(success, "fd_seek", fd, PageSize-1, 0, atResult); g.mustWrite(fd, "xy") }, 2},
		{"rename", func() { _ = g.twoPaths("path_rename", "f", "h") }, 0},
		{"shrink to within a page", func() { g.want(success, "fd_filestat_set_size", fd, PageSize+7) }, 1},
		{"grow over a page", func() { g.want(success, "fd_filestat_set_size", fd, 3*PageSize) }, 2},
		{"shrink to whole pages", func() { g.want(success, "fd_filestat_set_size", fd, PageSize) }, 0},
		{"write far", func() { g.want(success, "fd_seek", fd, 5*PageSize+3, 0, atResult); g.mustWrite(fd, "!") }, 5},
		{"another file", func() { fd2 = g.mustOpen("g", openCreate); g.mustWrite(fd2, "small") }, 1},
		{"write and remove", func() {
			g.mustWrite(fd2, "gone")
			g.want(success, "fd_close", fd2)
			_ = g.pathCall("path_unlink_file", "g")
		}, 0},
		{"unlink while open", func() { _ = g.pathCall("path_unlink_file", "h"); g.mustWrite(fd, "?") }, 1},
	}
	for _, step := range steps {
		step.do()
		ids := dir.Dirty()
		if len(ids) != step.dirty || !slices.IsSortedFunc(ids, PageID.compare) {
			t.Errorf("%s: dirty %v, want %d pages", step.name, ids, step.dirty)
		}
		for _, id := range ids {
			copied[id] = dir.Page(id)
		}
		target, err := RestoreDir(roomy, dir.Tree(), from(copied))
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if !maps.EqualFunc(copyPages(dir), copyPages(target), bytes.Equal) {
			t.Fatalf("%s: the copy differs", step.name)
		}
		if d := target.Dirty(); len(d) != 0 {
			t.Errorf("%s: dirty right after it is restored: %v", step.name, d)
		}
	}
	if dir.Page(PageID{Inode: 99}) != nil || dir.Page(PageID{Inode: rootNumber}) != nil {
		t.Error("a page of nothing")
	}
}

func TestMonotonicNeverGoesBack(t *testing.T) {
	w := newWorld()
	s := newSystem(t, w.config(NewDir(roomy)))
	before := s.monotonic()
	if before < 1_000_000_000 || before > 1_100_000_000 {
		t.Errorf("the clock starts at %d", before)
	}
	w.mono -= 1_000_000 // a hostile host
	if now := s.monotonic(); now < before {
		t.Fatalf("%d after %d", now, before)
	}
	state := s.State()
	before = s.monoLast
	w = newWorld()
	w.mono = -1 << 62
	s = newSystem(t, w.config(NewDir(roomy)))
	if err := s.RestoreState(state); err != nil {
		t.Fatal(err)
	}
	if now := s.monotonic(); now <= before || now > before+10_000 {
		t.Fatalf("%d after a move at %d", now, before)
	}
}

// sample has every kind of inode, an unlinked file with a descriptor and a hole.
func sample(t testing.TB) (*Dir, *System) {
	dir := NewDir(roomy)
	cfg := newWorld().config(dir)
	cfg.ReadOnly = models
	g := newDriver(t, newSystem(t, cfg))
	fd := g.mustOpen("f", openCreate)
	g.mustWrite(fd, "content")
	_ = g.pathCall("path_create_directory", "d")
	_ = g.pathCall("path_create_directory", "d/e")
	_ = g.twoPaths("path_symlink", "../f", "d/s")
	_ = g.twoPaths("path_link", "f", "d/e/hard")
	ghost := g.mustOpen("ghost", openCreate)
	g.mustWrite(ghost, "boo")
	_ = g.pathCall("path_unlink_file", "ghost")
	g.want(success, "fd_filestat_set_size", fd, PageSize+1)
	return dir, g.s
}

func TestRestoreDirRefuses(t *testing.T) {
	dir, _ := sample(t)
	pages := copyPages(dir)
	var good treeRecord
	if err := cose.Unmarshal(dir.Tree(), &good); err != nil {
		t.Fatal(err)
	}
	// Inodes: 1 /, 2 f, 3 d, 4 d/e, 5 d/s, 6 ghost.
	for name, change := range map[string]func(*treeRecord){
		"version":          func(r *treeRecord) { r.Version = 2 },
		"next inode":       func(r *treeRecord) { r.Next = 6 },
		"inodes run out":   func(r *treeRecord) { r.Next = 1<<64 - 1 },
		"cookies run out":  func(r *treeRecord) { r.Nodes[0].NextCookie = 1<<64 - 1 },
		"inode twice":      func(r *treeRecord) { r.Nodes[2].Number = 2 },
		"inode zero":       func(r *treeRecord) { r.Nodes[0].Number = 0 },
		"no inodes":        func(r *treeRecord) { r.Nodes = nil },
		"root is a file":   func(r *treeRecord) { r.Nodes = r.Nodes[1:2]; r.Nodes[0].Number = 1 },
		"kind":             func(r *treeRecord) { r.Nodes[1].Kind = 4 },
		"kind wraps":       func(r *treeRecord) { r.Nodes[1].Kind = 256 + 2 },
		"directory size":   func(r *treeRecord) { r.Nodes[0].Size = 1 },
		"file target":      func(r *treeRecord) { r.Nodes[1].Target = "x" },
		"file names":       func(r *treeRecord) { r.Nodes[1].Names = r.Nodes[0].Names },
		"file cookie":      func(r *treeRecord) { r.Nodes[1].NextCookie = 3 },
		"low next cookie":  func(r *treeRecord) { r.Nodes[0].NextCookie = 2 },
		"cookie too high":  func(r *treeRecord) { r.Nodes[0].NextCookie = r.Nodes[0].Names[1].Cookie },
		"cookie of a dot":  func(r *treeRecord) { r.Nodes[0].Names[0].Cookie = 2 },
		"cookies descend":  func(r *treeRecord) { r.Nodes[0].Names[1].Cookie = 3 },
		"negative size":    func(r *treeRecord) { r.Nodes[1].Size = 1 << 63 },
		"too large":        func(r *treeRecord) { r.Nodes[1].Size = 1 << 30 },
		"other size":       func(r *treeRecord) { r.Nodes[1].Size++ },
		"another page":     func(r *treeRecord) { r.Nodes[1].Size += PageSize },
		"name is dots":     func(r *treeRecord) { r.Nodes[0].Names[0].Name = ".." },
		"name has a slash": func(r *treeRecord) { r.Nodes[0].Names[0].Name = "a/b" },
		"name has a zero":  func(r *treeRecord) { r.Nodes[0].Names[0].Name = "a\x00" },
		"empty name":       func(r *treeRecord) { r.Nodes[0].Names[0].Name = "" },
		"long name":        func(r *treeRecord) { r.Nodes[0].Names[0].Name = strings.Repeat("x", 256) },
		"name twice":       func(r *treeRecord) { r.Nodes[0].Names[1].Name = r.Nodes[0].Names[0].Name },
		"no such inode":    func(r *treeRecord) { r.Nodes[0].Names[0].Number = 77 },
		"root has a name":  func(r *treeRecord) { r.Nodes[2].Names[0].Number = 1 },
		"directory twice":  func(r *treeRecord) { r.Nodes[0].Names[0].Number = 3 },
		"cycle":            func(r *treeRecord) { r.Nodes[0].Names[1].Number = 2; r.Nodes[3].Names[0].Number = 3 },
		"own parent": func(r *treeRecord) {
			r.Nodes[0].Names[1].Number = 2
			r.Nodes[3].Names[0].Number = 4
			r.Nodes[2].Names = nil
		},
		"nameless with name": func(r *treeRecord) { r.Nodes[0].Names = r.Nodes[0].Names[:1] },
		"nameless link":      func(r *treeRecord) { r.Nodes[2].Names = r.Nodes[2].Names[:1] },
		"absolute link":      func(r *treeRecord) { r.Nodes[4].Target = "/f" },
		"empty link":         func(r *treeRecord) { r.Nodes[4].Target = "" },
	} {
		bad := good
		bad.Nodes = slices.Clone(good.Nodes)
		for i := range bad.Nodes {
			bad.Nodes[i].Names = slices.Clone(bad.Nodes[i].Names)
		}
		change(&bad)
		if _, err := RestoreDir(roomy, cose.MustMarshal(bad), from(pages)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for name, limits := range map[string]Limits{
		"bytes":   {Bytes: PageSize, Entries: 100},
		"entries": {Bytes: 1 << 20, Entries: 4},
	} {
		if _, err := RestoreDir(limits, dir.Tree(), from(pages)); err == nil {
			t.Errorf("limit of %s: no error", name)
		}
	}
	if _, err := RestoreDir(roomy, append(dir.Tree(), 0), from(pages)); err == nil {
		t.Error("a byte too many: no error")
	}
}

func TestRestoreStateRefuses(t *testing.T) {
	dir, s := sample(t)
	var good stateRecord
	if err := cose.Unmarshal(s.State(), &good); err != nil {
		t.Fatal(err)
	}
	// Descriptors: 0-2, 3 /, 4 /models, 5 f, 6 ghost.
	for name, change := range map[string]func(*stateRecord){
		"version":          func(r *stateRecord) { r.Version = 0 },
		"clock":            func(r *stateRecord) { r.Monotonic = 1 << 63 },
		"other models":     func(r *stateRecord) { r.Models = make([]byte, 32) },
		"short models":     func(r *stateRecord) { r.Models = r.Models[:31] },
		"number twice":     func(r *stateRecord) { r.FDs[1].Number = 0 },
		"number too high":  func(r *stateRecord) { r.FDs[6].Number = uint64(roomy.FDs) },
		"kind":             func(r *stateRecord) { r.FDs[0].Kind = 5 },
		"kind wraps":       func(r *stateRecord) { r.FDs[0].Kind = 256 },
		"stream inode":     func(r *stateRecord) { r.FDs[0].Inode = 2 },
		"stream offset":    func(r *stateRecord) { r.FDs[0].Offset = 1 },
		"stdin writes":     func(r *stateRecord) { r.FDs[0].Base |= uint64(rightFDWrite) },
		"stdout reads":     func(r *stateRecord) { r.FDs[1].Base |= uint64(rightFDRead) },
		"stream inherits":  func(r *stateRecord) { r.FDs[1].Inheriting = 1 },
		"preopened stream": func(r *stateRecord) { r.FDs[1].Preopen = true },
		"preopened file":   func(r *stateRecord) { r.FDs[5].Preopen = true },
		"preopened inside": func(r *stateRecord) { r.FDs[3].Inode = 3 },
		"no inode":         func(r *stateRecord) { r.FDs[5].Inode = 0 },
		"link":             func(r *stateRecord) { r.FDs[5].Inode = 5 },
		"directory offset": func(r *stateRecord) { r.FDs[3].Offset = 1 },
		"directory reads":  func(r *stateRecord) { r.FDs[3].Base |= uint64(rightFDRead) },
		"unknown rights":   func(r *stateRecord) { r.FDs[3].Inheriting |= 1 << 40 },
		"file inherits":    func(r *stateRecord) { r.FDs[5].Inheriting = 1 },
		"negative offset":  func(r *stateRecord) { r.FDs[5].Offset = 1 << 63 },
		"unknown flags":    func(r *stateRecord) { r.FDs[5].Flags = 32 },
		"flags wrap":       func(r *stateRecord) { r.FDs[5].Flags = 1 << 16 },
		"model writes":     func(r *stateRecord) { r.FDs[5].Kind = 4 },
		"ghost not open":   func(r *stateRecord) { r.FDs = r.FDs[:6] },
	} {
		bad := good
		bad.FDs = slices.Clone(good.FDs)
		change(&bad)
		before := s.State()
		if err := s.RestoreState(cose.MustMarshal(bad)); err == nil {
			t.Errorf("%s: no error", name)
		}
		var after, unchanged stateRecord
		_, _ = cose.Unmarshal(before, &unchanged), cose.Unmarshal(s.State(), &after)
		if !slices.Equal(after.FDs, unchanged.FDs) {
			t.Fatalf("%s: descriptors changed", name)
		}
	}
	if err := s.RestoreState(s.State()); err != nil {
		t.Fatal(err)
	}
	checkDir(t, dir)
	for _, state := range [][]byte{s.State(), NewDir(roomy).Tree(), nil} {
		bare := newSystem(t, newWorld().config(nil))
		if err := bare.RestoreState(state); err == nil {
			t.Error("a state that is not this system's: no error")
		}
	}
}

// TestCloseDropsNameless restores a directory whose open files nobody takes up.
func TestCloseDropsNameless(t *testing.T) {
	dir, _ := sample(t)
	again, err := RestoreDir(roomy, dir.Tree(), from(copyPages(dir)))
	if err != nil {
		t.Fatal(err)
	}
	s := newSystem(t, newWorld().config(again))
	if again.nodes[6] == nil {
		t.Fatal("no nameless file")
	}
	s.Close()
	if again.nodes[6] != nil || len(again.nodes) != 5 {
		t.Fatalf("%d inodes are left", len(again.nodes))
	}
	checkDir(t, again)
}

package runner

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/sys"

	"edgekeep/tee/runner/memory"
	"edgekeep/tee/runner/wasi"
	"edgekeep/workload"
	"edgekeep/workload/wasm"
)

// Host is what guests run in.
type Host struct {
	compiler bool
	watchdog *watchdog
	tracked  []tracked // of each reactor that may be started in this process, one
}

// tracked is memory whose changes are known. It takes files that a confined
// process cannot open, so some of them are made before.
type tracked struct {
	memory  *memory.Memory
	tracker *memory.Tracker
}

// reactors is how often a reactor can be put back to its last commit in one
// process; then it takes a new one.
const reactors = 8

// NewHost prepares what a confined process cannot get any more.
func NewHost(interpreter bool) (*Host, error) {
	h := &Host{compiler: !interpreter && compilerHere()}
	var err error
	if h.watchdog, err = newWatchdog(); err != nil {
		return nil, err
	}
	n, limit := reactors, uint64(workload.MaxMemory)
	if bits.UintSize == 32 { // address space is short
		n, limit = 1, 256<<20
	}
	for range n {
		m, err := memory.New(limit)
		if err != nil {
			return nil, err
		}
		t, err := m.Track()
		if err != nil {
			return nil, err
		}
		h.tracked = append(h.tracked, tracked{m, t})
	}
	return h, nil
}

// compilerHere reports whether wazero compiles on this machine.
func compilerHere() (yes bool) {
	defer func() { yes = recover() == nil }()
	r := wazero.NewRuntimeWithConfig(context.Background(), wazero.NewRuntimeConfigCompiler())
	_ = r.Close(context.Background())
	return
}

// Compiler reports whether guests are compiled, and not interpreted.
func (h *Host) Compiler() bool { return h.compiler }

// RefusedError says that a workload can never run here.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "it cannot run here: " + e.Reason }

// Guest is one instance's module, and while it runs its state.
type Guest struct {
	host     *Host
	manifest workload.Manifest
	models   map[string][]byte
	info     wasm.Info
	digest   []byte
	runtime  wazero.Runtime
	compiled wazero.CompiledModule

	dir    *wasi.Dir
	system *wasi.System
	module api.Module // of a reactor
	tracked
	protection string
	untouched  bool // the reactor's instance was made, and nothing of it has run
	lines      []string
	dropped    int
	partial    []byte    // the beginning of a line
	deadline   time.Time // of the batch at hand, for a guest that sleeps
}

// Load prepares a module. An error of type *RefusedError is for good.
func (h *Host) Load(ctx context.Context, m workload.Manifest, module []byte, models [][]byte) (*Guest, error) {
	g := &Guest{host: h, manifest: m, models: map[string][]byte{}}
	for i, f := range m.Models {
		g.models[f.Name] = models[i]
	}
	rewritten, info, err := wasm.Prepare(module)
	if err != nil {
		return nil, &RefusedError{err.Error()}
	}
	if (info.Kind == wasm.Reactor) != (m.Shape == workload.Reactor) {
		return nil, &RefusedError{fmt.Sprintf("the module is a %s, the manifest calls it a %s", info.Kind, m.Shape)}
	}
	if uint64(info.MemoryMin)<<16 > m.Limits.Memory {
		return nil, &RefusedError{fmt.Sprintf("it begins with %d KiB of memory, its manifest allows %d", info.MemoryMin<<6, m.Limits.Memory>>10)}
	}
	sum := sha256.Sum256(rewritten)
	g.info, g.digest = info, sum[:]
	cfg := wazero.NewRuntimeConfigInterpreter()
	if h.compiler {
		cfg = wazero.NewRuntimeConfigCompiler()
	}
	g.runtime = wazero.NewRuntimeWithConfig(ctx, cfg.WithMemoryLimitPages(uint32(m.Limits.Memory>>16)).WithDebugInfoEnabled(false))
	if g.compiled, err = g.runtime.CompileModule(ctx, rewritten); err != nil {
		g.Close(ctx)
		return nil, &RefusedError{err.Error()}
	}
	return g, nil
}

// Digest is the SHA-256 of the module as it runs.
func (g *Guest) Digest() []byte { return g.digest }

// Protection is what protects guest memory.
func (g *Guest) Protection() string { return g.protection }

// Close ends the guest.
func (g *Guest) Close(ctx context.Context) { _ = g.runtime.Close(ctx) }

func (g *Guest) limits() wasi.Limits {
	return wasi.Limits{Bytes: int64(g.manifest.Limits.Disk), Entries: 16384, FDs: 1024, Output: int64(g.manifest.Limits.Output) + maxLog}
}

const (
	maxLog     = 64 << 10 // bytes of stderr in a batch
	maxLogLine = 1024
	maxLines   = 200 // between two calls of Log
)

// newSystem makes the guest's WASI state and puts it behind the module that guests
// import.
func (g *Guest) newSystem(ctx context.Context) error {
	began := time.Now()
	s, err := wasi.NewSystem(wasi.Config{
		Limits: g.limits(), Args: append([]string{g.manifest.Name}, g.manifest.Args...), Dir: g.dir, ReadOnly: g.models,
		Rand: rand.Reader, Now: func() int64 { return time.Now().UnixNano() }, Monotonic: func() int64 { return int64(time.Since(began)) },
		Sleep: g.sleep,
	})
	if err != nil {
		return err
	}
	if g.system != nil { // guests are linked to that one
		*g.system = *s
		return nil
	}
	g.system = s
	return s.Instantiate(ctx, g.runtime)
}

// sleep lets a guest sleep within its batch's time.
func (g *Guest) sleep(ctx context.Context, d time.Duration) error {
	left := time.Until(g.deadline)
	if d > left {
		d = max(left, 0)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	if !time.Now().Before(g.deadline) {
		return fmt.Errorf("its batch took too long: %w", context.DeadlineExceeded)
	}
	return nil
}

// Start begins with nothing.
func (g *Guest) Start(ctx context.Context) error {
	g.dir = wasi.NewDir(g.limits())
	if g.info.Kind != wasm.Reactor {
		return nil
	}
	if err := g.instantiate(ctx); err != nil {
		return err
	}
	g.untouched = false
	if !g.info.Initialize {
		return nil
	}
	return g.guarded(func() error {
		_, err := g.module.ExportedFunction("_initialize").Call(ctx)
		return err
	})
}

// instantiate makes a reactor's instance, in memory whose changes are known.
func (g *Guest) instantiate(ctx context.Context) error {
	if len(g.host.tracked) == 0 {
		return errors.New("this process has started the workload often enough: another one goes on")
	}
	if g.module != nil {
		_ = g.module.Close(ctx)
		g.module = nil
	}
	g.tracked, g.host.tracked = g.host.tracked[0], g.host.tracked[1:]
	if err := g.newSystem(ctx); err != nil {
		return err
	}
	var err error
	g.module, err = g.newModule(ctx, g.memory)
	g.protection = g.memory.Protection()
	g.untouched = err == nil
	return err
}

func (g *Guest) newModule(ctx context.Context, m *memory.Memory) (mod api.Module, err error) {
	defer func() {
		if p := recover(); p != nil { // the only word there is for memory that cannot be had
			err = fmt.Errorf("the workload could not be given its memory: %v", p)
		}
	}()
	ctx = experimental.WithMemoryAllocator(ctx, m)
	return g.runtime.InstantiateModule(ctx, g.compiled, wazero.NewModuleConfig().WithName("").WithStartFunctions())
}

// Batch runs one batch. After an error the guest is of no more use until Resume:
// what it has done since the last Capture is to be forgotten.
func (g *Guest) Batch(ctx context.Context, in []byte) ([]byte, error) {
	if g.info.Kind == wasm.Reactor {
		return g.call(ctx, in)
	}
	return g.command(ctx, in)
}

// guarded runs the guest under its budget: a guest that uses more is killed with
// this process.
func (g *Guest) guarded(f func() error) error {
	cpu := time.Duration(g.manifest.Limits.CPU) * time.Millisecond
	g.deadline = time.Now().Add(10*cpu + 10*time.Second)
	if err := g.host.watchdog.arm(cpu); err != nil {
		return err
	}
	err := f()
	g.host.watchdog.disarm()
	return err
}

// command runs a filter: afresh, with the batch on stdin.
func (g *Guest) command(ctx context.Context, in []byte) ([]byte, error) {
	if err := g.newSystem(ctx); err != nil {
		return nil, err
	}
	defer g.system.Close()
	var out bytes.Buffer
	g.system.SetStdio(bytes.NewReader(in), &out, lineWriter{g})
	m, err := memory.New(g.manifest.Limits.Memory)
	if err != nil {
		return nil, err
	}
	defer m.Free()
	err = g.guarded(func() error {
		mod, err := g.newModule(ctx, m)
		if err != nil {
			return err
		}
		defer mod.Close(ctx)
		g.protection = m.Protection()
		_, err = mod.ExportedFunction("_start").Call(ctx)
		return err
	})
	return g.result(out.Bytes(), err)
}

// call runs a reactor.
func (g *Guest) call(ctx context.Context, in []byte) ([]byte, error) {
	g.system.SetStdio(nil, lineWriter{g}, lineWriter{g})
	var out []byte
	err := g.guarded(func() error {
		mem := g.module.Memory()
		p, err := g.module.ExportedFunction("edgekeep_alloc").Call(ctx, uint64(len(in)))
		if err != nil {
			return err
		}
		if uint32(p[0]) == 0 && len(in) > 0 {
			return fmt.Errorf("edgekeep_alloc has no room for a batch of %d bytes", len(in))
		}
		if !mem.Write(uint32(p[0]), in) {
			return errors.New("edgekeep_alloc returned a place outside of its memory")
		}
		r, err := g.module.ExportedFunction("edgekeep_batch").Call(ctx, p[0], uint64(len(in)))
		if err != nil {
			return err
		}
		if int64(r[0]) == -1 {
			return errors.New("it says that the batch failed")
		}
		if uint64(uint32(r[0])) > g.manifest.Limits.Output {
			return fmt.Errorf("results of %d bytes, its manifest allows %d", uint32(r[0]), g.manifest.Limits.Output)
		}
		b, ok := mem.Read(uint32(r[0]>>32), uint32(r[0]))
		if !ok {
			return errors.New("its results are outside of its memory")
		}
		out = bytes.Clone(b)
		return nil
	})
	return g.result(out, err)
}

// result says in the host's words what went wrong; what the guest itself has to
// say is in its log.
func (g *Guest) result(out []byte, err error) ([]byte, error) {
	var exit *sys.ExitError
	switch {
	case g.system.Flooded() || uint64(len(out)) > g.manifest.Limits.Output:
		return nil, fmt.Errorf("it wrote more than the %d bytes that its manifest allows", g.manifest.Limits.Output)
	case errors.As(err, &exit) && exit.ExitCode() == 0 && g.info.Kind == wasm.Command:
		return out, nil
	case errors.As(err, &exit) && exit.ExitCode() == sys.ExitCodeDeadlineExceeded:
		return nil, errors.New("its batch took too long: it slept")
	case errors.As(err, &exit):
		return nil, fmt.Errorf("it ended with exit code %d", exit.ExitCode())
	case err != nil:
		reason, _, _ := strings.Cut(err.Error(), "\n") // the stack is the guest's
		return nil, errors.New(reason)
	}
	return out, nil
}

// Log returns the lines that the guest has written to stderr, a reactor also to
// stdout.
func (g *Guest) Log() []string {
	if len(g.partial) > 0 {
		g.addLine(nil)
	}
	out := g.lines
	if g.dropped > 0 {
		out = append(out, fmt.Sprintf("runner: %d more lines were dropped", g.dropped))
	}
	g.lines, g.dropped = nil, 0
	return out
}

// lineWriter takes in what a guest writes to its log, in pieces of any size.
type lineWriter struct{ g *Guest }

func (w lineWriter) Write(b []byte) (int, error) {
	n := len(b)
	for {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		if !whole {
			break
		}
		w.g.addLine(line)
		b = rest
	}
	w.g.partial = append(w.g.partial, b[:min(len(b), maxLogLine-len(w.g.partial))]...)
	return n, nil
}

// addLine ends the line at hand. What could steer a terminal is replaced.
func (g *Guest) addLine(end []byte) {
	line := append(g.partial, end[:min(len(end), maxLogLine-len(g.partial))]...)
	if len(g.lines) < maxLines {
		g.lines = append(g.lines, strings.Map(func(c rune) rune {
			if unicode.IsControl(c) && c != '\t' {
				return utf8.RuneError
			}
			return c
		}, strings.ToValidUTF8(string(line), "\uFFFD")))
	} else {
		g.dropped++
	}
	g.partial = g.partial[:0]
}

// Capture returns what changed since the last Capture, or with full all there is.
// Pages are read from the guest's memory: they may be gone through as often as
// needed until it runs again.
func (g *Guest) Capture(full bool) (workload.Delta, workload.Pages, error) {
	d := workload.Delta{Full: full, Tree: g.dir.Tree()}
	files := g.dir.Dirty()
	if full {
		files = g.dir.Pages()
	}
	var runs []run
	var linear []byte
	if g.module != nil {
		d.FDs = g.system.State()
		d.Memory = g.module.Memory().Size() >> 16
		for _, v := range g.info.Globals {
			d.Globals = append(d.Globals, g.module.ExportedGlobal(v.Name).Get())
		}
		linear = g.memory.Bytes()
		if err := g.tracker.Dirty(func(offset, length int) { runs = append(runs, run{offset, length}) }); err != nil {
			return d, nil, err
		}
		if full {
			runs = []run{{0, len(linear)}}
		}
	}
	return d, func(yield func(workload.Page) bool) {
		for _, r := range runs {
			if !r.pages(linear, full, yield) {
				return
			}
		}
		for _, id := range files {
			if !yield(workload.Page{Space: workload.SpaceFiles, Inode: id.Inode, Index: uint64(id.Index), Data: g.dir.Page(id)}) {
				return
			}
		}
	}, nil
}

// run is a run of bytes, whole pages.
type run struct{ offset, length int }

// pagesAtOnce is how many pages go in one piece.
const pagesAtOnce = workload.FilePage / workload.MemoryPage

var zeros [workload.MemoryPage]byte

// pages gives out a run in pieces; with sparse, without pages of zeros.
func (r run) pages(linear []byte, sparse bool, yield func(workload.Page) bool) bool {
	for at, end := r.offset, r.offset+r.length; at < end; {
		n := min(pagesAtOnce*workload.MemoryPage, end-at)
		if sparse {
			if bytes.Equal(linear[at:at+workload.MemoryPage], zeros[:]) {
				at += workload.MemoryPage
				continue
			}
			k := workload.MemoryPage
			for k < n && !bytes.Equal(linear[at+k:at+k+workload.MemoryPage], zeros[:]) {
				k += workload.MemoryPage
			}
			n = k
		}
		if !yield(workload.Page{Space: workload.SpaceMemory, Index: uint64(at / workload.MemoryPage), Data: linear[at : at+n]}) {
			return false
		}
		at += n
	}
	return true
}

// Restorer takes in deltas; then Resume goes on from there.
type Restorer struct {
	g     *Guest
	last  *workload.Delta
	files map[wasi.PageID][]byte
}

// Restorer makes one. The guest is of no use until Resume.
func (g *Guest) Restorer() (*Restorer, error) {
	return &Restorer{g: g, files: map[wasi.PageID][]byte{}}, nil
}

// Begin implements workload.StateSink.
func (r *Restorer) Begin(d *workload.Delta) error {
	r.last = d
	if d.Full {
		r.files = map[wasi.PageID][]byte{}
	}
	if r.g.info.Kind != wasm.Reactor {
		return nil
	}
	if d.Full {
		if err := r.wipe(d.Memory); err != nil {
			return err
		}
	}
	mem := r.g.module.Memory()
	if have := mem.Size() >> 16; d.Memory > have {
		if _, ok := mem.Grow(d.Memory - have); !ok {
			return fmt.Errorf("%d KiB of memory could not be had", d.Memory<<6)
		}
	}
	return nil
}

// wipe makes an instance with nothing in its memory, of at most this many pages of
// 64 KiB. One that has not run is used again: a log may have any number of full
// deltas, and a process has few instances.
func (r *Restorer) wipe(pages uint32) error {
	if !r.g.untouched || r.g.module.Memory().Size()>>16 > pages {
		r.g.dir = wasi.NewDir(r.g.limits())
		if err := r.g.instantiate(context.Background()); err != nil {
			return err
		}
	}
	linear := r.g.memory.Bytes()
	for at := 0; at < len(linear); at += workload.MemoryPage {
		if page := linear[at : at+workload.MemoryPage]; !bytes.Equal(page, zeros[:]) {
			clear(page)
		}
	}
	return nil
}

// Page implements workload.StateSink.
func (r *Restorer) Page(p workload.Page) error {
	if p.Space == workload.SpaceFiles {
		r.files[wasi.PageID{Inode: p.Inode, Index: uint32(p.Index)}] = bytes.Clone(p.Data)
		return nil
	}
	if r.g.module == nil {
		return errors.New("a filter has no memory between batches")
	}
	linear, at := r.g.memory.Bytes(), p.Index*workload.MemoryPage
	if at+uint64(len(p.Data)) > uint64(len(linear)) {
		return errors.New("a page outside of the memory")
	}
	copy(linear[at:], p.Data)
	return nil
}

// End implements workload.StateSink.
func (r *Restorer) End() error { return nil }

// Resume goes on from what a Restorer took in.
func (g *Guest) Resume(ctx context.Context, r *Restorer) error {
	d := r.last
	if d == nil {
		return errors.New("there is no state to go on from")
	}
	dir, err := wasi.RestoreDir(g.limits(), d.Tree, func(id wasi.PageID) ([]byte, error) {
		if p, ok := r.files[id]; ok {
			return p, nil
		}
		return nil, errors.New("it is missing")
	})
	if err != nil {
		return err
	}
	g.dir = dir
	if g.info.Kind != wasm.Reactor {
		return nil
	}
	if len(d.Globals) != len(g.info.Globals) || d.Memory != g.module.Memory().Size()>>16 {
		return errors.New("the state is of another module")
	}
	for i, v := range g.info.Globals {
		global, ok := g.module.ExportedGlobal(v.Name).(api.MutableGlobal)
		if !ok {
			return fmt.Errorf("global %s cannot be set", v.Name)
		}
		global.Set(d.Globals[i])
	}
	if err := g.system.Replace(dir, d.FDs); err != nil {
		return err
	}
	if err := g.tracker.Dirty(func(int, int) {}); err != nil { // the next Capture is against this
		return err
	}
	g.untouched = false
	if !g.info.Reseed {
		return nil
	}
	g.system.SetStdio(nil, lineWriter{g}, lineWriter{g})
	return g.guarded(func() error {
		_, err := g.module.ExportedFunction("edgekeep_reseed").Call(ctx)
		return err
	})
}

var _ io.Writer = lineWriter{}

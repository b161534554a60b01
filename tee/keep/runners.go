package keep

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/workload"
)

// Bounds of what waits for a runner or for the agent.
const (
	maxRunners     = 32
	maxOut         = 16 << 20 // bytes that wait for a runner
	maxJobs        = 256      // of one instance, or of the keep itself, under way
	maxJobBytes    = 32 << 20 // of one instance, under way
	maxJobsReply   = 600 << 10
	restartMin     = time.Second
	restartMax     = time.Minute
	maxJobBody     = tee.MaxFrame - 4096 // bytes: with what the keep puts around it, it fits a frame
	maxResult      = 32 << 10            // bytes of one result: it fits a record
	maxKeys        = 64                  // keys that one runner waits for
	maxAside       = 4
	runnerPatience = 10 * time.Second
)

// workloads knows the runners and which instance each of them has. It has its
// own lock, which is taken last: nothing in it waits for the TPM or for a runner.
type workloads struct {
	k *Keep

	mu      sync.Mutex // protects what follows
	specs   map[string]instance
	run     map[string]*running
	runners map[*runner]struct{}
	queue   []*job // not taken by the agent yet, oldest first
	jobs    map[uint64]*job
	nextJob uint64
	arrived chan struct{} // closed and replaced when the queue grows
	advance bool          // the agent was asked to call Advance
	routes  map[string]route
	agent   int // counts starts of the agent
}

// running is what is known of an instance beside its state.
type running struct {
	runner   *runner
	report   tee.Report
	newest   []byte         // head of the newest state that was committed here
	acked    sealing.Cursor // newest result that is durable
	reached  uint64         // frames that it took
	progress time.Time      // when the other side of a move last took something
	recover  []byte         // blob that it goes on from
	starts   int            // in a row that did not last
	after    time.Time
	began    time.Time
	final    *tee.Final // what a runner that moves away has sent
	received []byte     // head of what a runner that takes in has
	infer    map[uint64]func(tee.Inferred)
	failures uint64    // of the runners before this one
	hello    tee.Hello // of the newest runner
}

// runner is a connected runner.
type runner struct {
	d        *tee.Duplex
	hello    tee.Hello
	instance string // empty: idle
	word     bool   // it has said why it ends
	cut      bool   // this keep has ended it

	out    []outgoing
	size   int
	missed map[string]bool // streams of which a chunk found no room
	keys   int             // keys that it waits for
	aside  int             // see aside
	wake   chan struct{}
}

type outgoing struct {
	kind int
	body any
	size int
}

func newWorkloads(k *Keep) *workloads {
	return &workloads{
		k: k, specs: map[string]instance{}, run: map[string]*running{}, runners: map[*runner]struct{}{},
		jobs: map[uint64]*job{}, arrived: make(chan struct{}), routes: map[string]route{},
	}
}

// Runners serves runners on l until ctx ends.
func (k *Keep) Runners(ctx context.Context, l net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil {
				g.Go(func() error { return fmt.Errorf("accepting runners: %w", err) })
			}
			return g.Wait()
		}
		uid, err := peerUID(conn)
		if err != nil || uid != k.cfg.RunnerUID {
			k.log.Warn("a runner was turned away: it is not of the configured user", "user", uid, "err", err)
			conn.Close()
			continue
		}
		g.Go(func() error { k.workloads.serve(ctx, conn); return nil })
	}
}

// serve talks with one runner until either side ends.
func (w *workloads) serve(ctx context.Context, conn net.Conn) {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer conn.Close()
	r := &runner{d: tee.NewDuplex(conn), missed: map[string]bool{}, wake: make(chan struct{}, 1)}
	_ = conn.SetReadDeadline(time.Now().Add(runnerPatience))
	kind, body, err := r.d.Receive()
	if err == nil && kind != tee.KindHello {
		err = errors.New("it did not say hello")
	}
	if err == nil {
		r.hello, err = tee.Body[tee.Hello](body)
	}
	if err == nil {
		err = w.add(r)
	}
	if err != nil {
		w.k.log.Warn("a runner was turned away", "reason", err)
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { // joined below
		defer close(done)
		defer conn.Close()
		w.write(ctx, r)
	}()
	for err == nil {
		if kind, body, err = r.d.Receive(); err == nil {
			err = w.message(r, kind, body)
		}
	}
	cancel()
	<-done
	w.gone(r, err)
}

func (w *workloads) add(r *runner) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.runners) >= maxRunners {
		return fmt.Errorf("%d runners are connected already", maxRunners)
	}
	w.runners[r] = struct{}{}
	w.assign()
	return nil
}

// write sends what waits for a runner.
func (w *workloads) write(ctx context.Context, r *runner) {
	for {
		w.mu.Lock()
		out := r.out
		r.out = nil
		w.mu.Unlock()
		for _, o := range out {
			if r.d.Send(o.kind, o.body) != nil {
				return
			}
			w.mu.Lock()
			r.size -= o.size
			w.mu.Unlock()
		}
		if len(out) > 0 {
			w.mu.Lock()
			w.sendMissed(r)
			w.mu.Unlock()
			continue
		}
		select {
		case <-r.wake:
		case <-ctx.Done():
			return
		}
	}
}

// send queues a message for a runner. One that does not read is cut off. The
// caller holds w.mu.
func (w *workloads) send(r *runner, kind int, body any, size int) {
	if r.size+size > maxOut+tee.MaxFrame {
		r.d.Close()
		return
	}
	r.out, r.size = append(r.out, outgoing{kind, body, size}), r.size+size
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// gone notes that a runner has ended. Its instance gets another one, later each
// time that it did not last.
func (w *workloads) gone(r *runner, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.runners, r)
	maps.DeleteFunc(w.jobs, func(_ uint64, j *job) bool { return j.runner == r })
	w.queue = slices.DeleteFunc(w.queue, func(j *job) bool { return j.runner == r })
	st := w.run[r.instance]
	if st == nil || st.runner != r {
		return
	}
	st.failed(r, err, w.specs[r.instance])
	st.runner, st.report.Running, st.final, st.received = nil, false, nil, nil
	for id, f := range st.infer {
		f(tee.Inferred{ID: id, Error: "the workload's runner ended before it answered"})
	}
	st.infer = map[uint64]func(tee.Inferred){}
	if time.Since(st.began) > restartMax {
		st.starts = 0
	}
	wait := min(restartMin<<min(st.starts, 10), restartMax)
	st.starts++
	st.after = time.Now().Add(wait)
	time.AfterFunc(wait, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.assign()
	})
	if spec, ok := w.specs[r.instance]; ok && spec.Phase == phaseLive {
		w.k.log.Warn("a workload's runner ended", "instance", r.instance, "reason", err, "last", st.report.Reason, "again in", wait)
	}
}

// failed counts the failures of a runner that has ended. One that was killed has
// no last word, so the keep says what it can.
func (st *running) failed(r *runner, err error, spec instance) {
	st.failures += st.report.Failures
	st.report.Failures = 0
	if r.word || r.cut {
		return
	}
	st.failures++
	if errors.Is(err, errRunner) {
		st.report.Reason = cut(err.Error(), 256)
		return
	}
	m, _ := workload.PeekManifest(spec.Manifest) // checked when it was deployed
	st.report.Reason = fmt.Sprintf("its runner was killed: over its CPU budget of %d ms for a batch, out of memory, or from outside", m.Limits.CPU)
}

// set takes over the committed state of instances.
func (w *workloads) set(specs map[string]instance) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.specs = specs
	for name, st := range w.run {
		if s, ok := specs[name]; !ok || !s.runs() {
			w.release(st)
			delete(w.routes, name)
			if !ok {
				delete(w.run, name)
			}
		}
	}
	for name, s := range specs {
		if s.Phase == phaseHolding {
			w.routes[name] = route{s.Move.Peer, s.Move.Attempt}
		}
		if w.run[name] == nil {
			w.run[name] = &running{infer: map[uint64]func(tee.Inferred){}}
		}
	}
	w.assign()
}

// release ends an instance's runner. The caller holds w.mu.
func (w *workloads) release(st *running) {
	if st.runner != nil {
		st.runner.cut = true
		st.runner.d.Close()
	}
}

// assign gives idle runners instances. The caller holds w.mu.
func (w *workloads) assign() {
	for name, st := range w.run {
		spec := w.specs[name]
		if st.runner != nil || st.report.Refused || !spec.runs() || time.Now().Before(st.after) {
			continue
		}
		for r := range w.runners {
			if r.instance != "" {
				continue
			}
			r.instance, st.runner, st.hello, st.began = name, r, r.hello, time.Now()
			st.final, st.received = nil, nil
			w.send(r, tee.KindAssign, w.assignment(name, spec, st), 4096)
			break
		}
	}
}

func (w *workloads) assignment(name string, spec instance, st *running) tee.Assign {
	a := tee.Assign{
		Instance: name, Epoch: spec.Epoch, Manifest: spec.Manifest, BundleKey: spec.BundleKey,
		Keys: spec.Keys, Receive: spec.Phase == phaseHolding, Newest: st.newest, Recover: spec.Recover,
	}
	a.Line, a.Arrived = spec.Line, spec.Phase == phaseLive && spec.Move != nil
	if st.acked.Session == workload.Session(name, spec.Epoch) {
		a.Line = max(a.Line, st.acked.Line)
	}
	for _, in := range spec.Inputs {
		input := tee.Input{Gateway: in.Gateway, Stream: in.Stream, Local: in.Gateway == w.k.gatewayName()}
		if at, ok := spec.Starts[in.Stream]; ok && input.Local && at.Known() {
			input.Epoch, input.Seq, input.Head = at.Epoch[:], at.Count-1, at.Head
		}
		a.Inputs = append(a.Inputs, input)
	}
	return a
}

// idle reports whether a runner waits for work.
func (w *workloads) idle() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for r := range w.runners {
		if r.instance == "" {
			return true
		}
	}
	return false
}

// feed hands a durable chunk to the instances that read its stream. A runner that
// is behind is told that it missed something, and fetches it.
func (w *workloads) feed(stream string, chunk []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, st := range w.run {
		spec := w.specs[name]
		if st.runner == nil || spec.Phase != phaseLive || !spec.reads(w.k.gatewayName(), stream) {
			continue
		}
		r := st.runner
		if r.size+len(chunk) > maxOut {
			r.missed[stream] = true
			continue
		}
		w.sendMissed(r)
		w.send(r, tee.KindFeed, tee.Feed{Stream: stream, Chunk: chunk}, len(chunk)+64)
	}
}

// sendMissed tells a runner of which streams a chunk found no room, once there is
// some. The caller holds w.mu.
func (w *workloads) sendMissed(r *runner) {
	for stream := range r.missed {
		if r.size > maxOut/2 {
			return
		}
		delete(r.missed, stream)
		w.send(r, tee.KindFeed, tee.Feed{Stream: stream}, 64)
	}
}

// acked tells an instance how far its results are durable.
func (w *workloads) acked(name string, c sealing.Cursor) {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.run[name]
	if st == nil {
		return
	}
	st.acked = c
	if st.runner != nil && c.Session == workload.Session(name, w.specs[name].Epoch) {
		w.send(st.runner, tee.KindOutputAck, tee.OutputAck{Line: c.Line}, 64)
	}
}

var errRunner = errors.New("it broke the contract")

// message takes a runner's message.
func (w *workloads) message(r *runner, kind int, body []byte) error {
	w.mu.Lock()
	name := r.instance
	st := w.run[name]
	mine := st != nil && st.runner == r
	w.mu.Unlock()
	switch {
	case name == "":
		return fmt.Errorf("%w: a message before it has an instance", errRunner)
	case !mine:
		return nil // taken away from it
	}
	switch kind {
	case tee.KindJob:
		return taken(body, func(j tee.Job) error { return w.runnerJob(r, name, j) })
	case tee.KindOutput:
		return taken(body, func(o tee.Output) error { return w.output(name, o) })
	case tee.KindLog:
		return taken(body, func(l tee.Log) error { return w.logged(name, l) })
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch kind {
	case tee.KindReport:
		return taken(body, func(p tee.Report) error {
			if len(p.Newest) > 0 && len(p.Newest) != sha256.Size || len(p.Module) > 0 && len(p.Module) != sha256.Size {
				return fmt.Errorf("%w: a hash of the wrong size", errRunner)
			}
			p.Reason, p.Protection = cut(p.Reason, 256), cut(p.Protection, 32)
			if p.Refused && !st.report.Refused {
				w.k.log.Error("a workload cannot run here", "instance", name, "reason", p.Reason)
			}
			if len(p.Newest) > 0 {
				st.newest = p.Newest
			}
			r.word = !p.Running && p.Failures > 0
			if p.Reason == "" {
				p.Reason = st.report.Reason // of the failure before
			}
			st.report = p
			return nil
		})
	case tee.KindInferred:
		return taken(body, func(i tee.Inferred) error {
			if f := st.infer[i.ID]; f != nil {
				delete(st.infer, i.ID)
				f(i)
			}
			return nil
		})
	case tee.KindFinal:
		return taken(body, func(f tee.Final) error {
			if err := sized(f.Head); err != nil {
				return err
			}
			st.final = &f
			w.wantAdvance()
			return nil
		})
	case tee.KindReceived:
		return taken(body, func(f tee.Received) error {
			if err := sized(f.Head); err != nil {
				return err
			}
			st.received = f.Head
			w.wantAdvance()
			return nil
		})
	}
	return fmt.Errorf("%w: a message of kind %d", errRunner, kind)
}

func taken[M any](body []byte, f func(M) error) error {
	m, err := tee.Body[M](body)
	if err != nil {
		return err
	}
	return f(m)
}

func sized(head []byte) error {
	if len(head) != sha256.Size {
		return fmt.Errorf("%w: a hash of the wrong size", errRunner)
	}
	return nil
}

// output seals results. What a runner was told is durable, or hands over again
// after a restart, is left out.
func (w *workloads) output(name string, o tee.Output) error {
	readings, err := sealing.ParsePack(o.Readings)
	if err != nil {
		return fmt.Errorf("%w: results: %w", errRunner, err)
	}
	for _, r := range readings {
		text, _ := r.Value.(string)
		if len(r.Name)+len(r.Unit)+len(text) > maxResult {
			return fmt.Errorf("%w: a result of more than %d bytes", errRunner, maxResult)
		}
	}
	w.mu.Lock()
	spec := w.specs[name]
	w.mu.Unlock()
	if spec.Phase != phaseLive || o.First == 0 {
		return fmt.Errorf("%w: results of an instance that is not live", errRunner)
	}
	if !w.k.sealer.emit(name, workload.Session(name, spec.Epoch), o.First, readings) {
		return errors.New("the keep stops")
	}
	return nil
}

// logged seals what the guest wrote to stderr: it may say what it read, so it is
// for whoever may read the results, and not for this keep's log.
func (w *workloads) logged(name string, l tee.Log) error {
	var out []sealing.Reading
	now := time.Now().UnixNano()
	for _, line := range l.Lines {
		out = append(out, sealing.Reading{Name: name + "/log", Time: now, Value: cut(line, 4096)})
	}
	if !w.k.sealer.emit(name+logSuffix, "", 0, out) {
		return errors.New("the keep stops")
	}
	return nil
}

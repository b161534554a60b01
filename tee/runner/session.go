// Package runner executes one workload instance: it takes its module and sealed
// state from the keep, runs batches of readings and inference requests through the
// guest, and commits what came of them. It is a process of its own, because a
// guest in a tight loop can stop every goroutine beside it, and because what goes
// wrong in a guest must not go wrong in the keep.
//
// # Commit
//
// State, cursors of the inputs, and results commit together: one delta (package
// workload) in the instance's log, sealed under a key of the instance, appended by
// the agent, durable before anything of it is let out. A runner that was killed
// begins again at the last commit; results that it may have handed over already
// have their numbers, and the keep leaves out those it has. Between commits
// several batches may run: at most for as long as the manifest says, and for as
// long as there is more to do.
//
// # Move
//
// The source seals its whole state under the session key and sends it in frames;
// every commit from then on is sealed twice, for its own log and for the target.
// When the target has nearly all of it, one last commit is sealed under the
// snapshot key, which the target does not have yet. The target appends what comes
// to its own log, acknowledges it when it is durable, and opens it as far as it
// can, so that little is left to do when the snapshot key comes.
package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/workload"
	"edgekeep/workload/wasm"
)

// Config is a worker's configuration.
type Config struct {
	Version     string
	Interpreter bool // also where there is a compiler
}

// Worker is a process that is ready to run an instance.
type Worker struct {
	cfg  Config
	host *Host
}

// Prepare takes what a worker needs before it gives up the right to take it.
func Prepare(cfg Config) (*Worker, error) {
	host, err := NewHost(cfg.Interpreter)
	if err != nil {
		return nil, err
	}
	return &Worker{cfg: cfg, host: host}, nil
}

// Run serves one connection to the keep: one instance, until either side ends.
func (w *Worker) Run(ctx context.Context, conn net.Conn) error {
	s := &session{
		w: w, d: tee.NewDuplex(conn), jobs: map[uint64]chan tee.JobDone{},
		infers: make(chan tee.Infer, maxInfers), control: make(chan any, 16), frames: make(chan tee.Frame, 2*sendWindow),
		acks: make(chan uint64, 1), told: make(chan struct{}, 1), records: make(chan record, 16),
	}
	if err := s.d.Send(tee.KindHello, tee.Hello{
		Version: w.cfg.Version, Arch: runtime.GOARCH, Compiler: w.host.Compiler(), Rewriter: wasm.Version,
	}); err != nil {
		return err
	}
	kind, body, err := s.d.Receive() // for as long as there is nothing to do
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err == nil && kind != tee.KindAssign {
		err = fmt.Errorf("the keep began with a message of kind %d", kind)
	}
	if err != nil {
		return err
	}
	if s.assign, err = tee.Body[tee.Assign](body); err != nil {
		return err
	}
	for i, in := range s.assign.Inputs {
		s.inputs = append(s.inputs, &input{s: s, of: i, in: in, feed: make(chan []byte, feedQueue)})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { s.d.Close() })()
	s.group = g
	g.Go(func() error { return s.receive(ctx) })
	g.Go(func() error {
		err := s.run(ctx)
		if err != nil && ctx.Err() == nil {
			s.report.Running, s.report.Reason = false, err.Error()
			s.report.Failures++
			var refused *RefusedError
			s.report.Refused = errors.As(err, &refused)
			s.sendReport()
			s.note(err.Error())
		}
		return err
	})
	if err := g.Wait(); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

const (
	maxInfers       = 64
	sendWindow      = 128       // frames under way to another runner
	maxEntries      = 600 << 10 // bytes of parts in one append
	maxResults      = 512 << 10 // bytes of results that wait for a commit
	maxPack         = 256 << 10 // bytes of results in one pack, but for the last of them
	maxPackReadings = 4096      // what a decoder of packs takes is more
	minFull         = 4 << 20   // bytes of deltas after which a full one is written, at least
	reportEvery     = time.Second
	loadTime        = 2 * time.Minute // of CPU, to compile a module
)

// session is one instance's life in this process.
type session struct {
	w      *Worker
	d      *tee.Duplex
	group  *errgroup.Group
	assign tee.Assign

	mu      sync.Mutex // protects jobs, nextJob, acked
	jobs    map[uint64]chan tee.JobDone
	nextJob uint64
	acked   uint64 // newest result that is durable

	infers  chan tee.Infer
	control chan any
	frames  chan tee.Frame
	acks    chan uint64
	told    chan struct{} // acked has moved
	inputs  []*input

	// What follows belongs to run.
	manifest workload.Manifest
	guest    *Guest
	report   tee.Report
	reported time.Time

	records chan record
	queue   []record // that batches have yet to be made of
	waiting int      // readings in it that were not consumed
	since   time.Time
	cursors []workload.Cursor // after what was consumed

	line    uint64 // number of the newest result
	pack    sealing.Pack
	packs   [][]byte      // of results that wait for a commit, before those in pack
	results int           // how many wait
	size    int           // bytes of packs
	reply   *tee.Inferred // that waits for a commit

	dirty     bool // something ran since the last commit
	committed time.Time
	sealer    *workload.StateSealer
	next      uint64 // index after the newest entry of the log
	grown     int64  // bytes of deltas since the last full one
	base      int64  // bytes of that one
	cuts      []cut
	out       *outgoing // the move away, if there is one
	uploaded  time.Time // when the newest checkpoint was begun
	uploading sync.Mutex
}

// cut is where the log may be cut off, at the beginning of a full delta, once the
// results before it are durable.
type cut struct{ index, line uint64 }

// receive sorts what the keep sends.
func (s *session) receive(ctx context.Context) error {
	for {
		kind, body, err := s.d.Receive()
		if err != nil {
			return err
		}
		switch kind {
		case tee.KindFeed:
			err = taken(body, func(f tee.Feed) { s.fed(ctx, f) })
		case tee.KindJobDone:
			err = taken(body, s.jobDone)
		case tee.KindInfer:
			err = taken(body, func(i tee.Infer) {
				select {
				case s.infers <- i:
				default:
					_ = s.d.Send(tee.KindInferred, tee.Inferred{ID: i.ID, Error: "the workload is busy"})
				}
			})
		case tee.KindOutputAck:
			err = taken(body, s.outputAck)
		case tee.KindSend:
			err = taken(body, func(m tee.Send) { s.tell(ctx, m) })
		case tee.KindResume:
			err = taken(body, func(m tee.Resume) { s.tell(ctx, m) })
		case tee.KindActivate:
			err = taken(body, func(m tee.Activate) { s.tell(ctx, m) })
		case tee.KindFrame:
			err = taken(body, func(f tee.Frame) {
				select {
				case s.frames <- f:
				default: // it comes again
				}
			})
		case tee.KindFrameAck:
			err = taken(body, func(a tee.FrameAck) { replace(s.acks, a.N) })
		default:
			err = fmt.Errorf("the keep sent a message of kind %d", kind)
		}
		if err != nil {
			return err
		}
	}
}

func taken[M any](body []byte, f func(M)) error {
	m, err := tee.Body[M](body)
	if err == nil {
		f(m)
	}
	return err
}

// replace puts the newest value into a channel of one.
func replace[V any](c chan V, v V) {
	for {
		select {
		case c <- v:
			return
		default:
		}
		select {
		case <-c:
		default:
		}
	}
}

func (s *session) tell(ctx context.Context, m any) {
	select {
	case s.control <- m:
	case <-ctx.Done():
	}
}

func (s *session) fed(ctx context.Context, f tee.Feed) {
	for _, in := range s.inputs {
		if !in.in.Local || in.in.Stream != f.Stream {
			continue
		}
		select {
		case in.feed <- f.Chunk:
		case <-ctx.Done():
		default: // it is behind: what found no room comes from the cloud
			select {
			case <-in.feed:
			default:
			}
			select {
			case in.feed <- nil:
			default:
			}
		}
	}
}

func (s *session) outputAck(a tee.OutputAck) {
	s.mu.Lock()
	s.acked = max(s.acked, a.Line)
	s.mu.Unlock()
	replace(s.told, struct{}{})
}

func (s *session) durable() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.acked
}

// start begins a job.
func (s *session) start(kind string, body any) (chan tee.JobDone, error) {
	done := make(chan tee.JobDone, 1)
	s.mu.Lock()
	s.nextJob++
	id := s.nextJob
	s.jobs[id] = done
	s.mu.Unlock()
	return done, s.d.Send(tee.KindJob, tee.Job{ID: id, Kind: kind, Body: cose.MustMarshal(body)})
}

func (s *session) jobDone(d tee.JobDone) {
	s.mu.Lock()
	done := s.jobs[d.ID]
	delete(s.jobs, d.ID)
	s.mu.Unlock()
	if done != nil {
		done <- d
	}
}

// job has something done elsewhere and waits for it.
func job[R any](ctx context.Context, s *session, kind string, body any) (R, error) {
	done, err := s.start(kind, body)
	if err != nil {
		var r R
		return r, err
	}
	return finish[R](ctx, kind, done)
}

func finish[R any](ctx context.Context, kind string, done chan tee.JobDone) (R, error) {
	var r R
	select {
	case d := <-done:
		if d.Error != "" {
			return r, fmt.Errorf("job %s: %s", kind, d.Error)
		}
		if err := cose.Unmarshal(d.Body, &r); err != nil {
			return r, fmt.Errorf("job %s: %w", kind, err)
		}
		return r, nil
	case <-ctx.Done():
		return r, ctx.Err()
	}
}

// note writes a line to the workload's log, which is sealed like its results.
func (s *session) note(line string) { s.logLines([]string{"runner: " + line}) }

func (s *session) logLines(lines []string) {
	if len(lines) > 0 {
		_ = s.d.Send(tee.KindLog, tee.Log{Lines: lines}) // a connection that broke is noticed elsewhere
	}
}

func (s *session) sendReport() {
	s.reported = time.Now()
	if s.guest != nil {
		s.report.Protection = s.guest.Protection() // a filter has memory in batches only
	}
	_ = s.d.Send(tee.KindReport, s.report)
}

// run loads the instance and works until ctx ends.
func (s *session) run(ctx context.Context) error {
	var err error
	if s.manifest, err = workload.PeekManifest(s.assign.Manifest); err != nil {
		return err
	}
	s.acked = s.assign.Line
	module, models, err := s.bundle(ctx)
	if err != nil {
		return err
	}
	if err := s.w.host.watchdog.arm(loadTime); err != nil {
		return err
	}
	s.guest, err = s.w.host.Load(ctx, s.manifest, module, models)
	s.w.host.watchdog.disarm()
	if err != nil {
		return err
	}
	defer s.guest.Close(context.WithoutCancel(ctx))
	s.report.Module = s.guest.Digest()
	if s.assign.Receive {
		err = s.takeIn(ctx)
	} else {
		err = s.load(ctx)
	}
	if err != nil {
		return err
	}
	s.report.Running, s.report.Reason = true, ""
	s.sendReport()
	return s.work(ctx)
}

// bundle gets module and models.
func (s *session) bundle(ctx context.Context) (module []byte, models [][]byte, err error) {
	content := make([]byte, 0, s.manifest.ContentSize)
	for int64(len(content)) < s.manifest.ContentSize {
		p, err := job[tee.BlobPart](ctx, s, tee.JobBlob, tee.ReadBlob{ID: s.manifest.Content, Offset: int64(len(content))})
		if err != nil {
			return nil, nil, err
		}
		if len(p.Data) == 0 || p.Size != s.manifest.ContentSize {
			return nil, nil, errors.New("the bundle's content is not of the size that its manifest says")
		}
		content = append(content, p.Data...)
	}
	return workload.OpenContent(s.manifest, s.assign.BundleKey, content)
}

// work is the instance's life: batches, requests, commits, and a move away.
func (s *session) work(ctx context.Context) error {
	reading, stop := context.WithCancel(ctx)
	defer stop()
	for i, in := range s.inputs {
		in.at = s.cursors[i]
		in.at.Skip = 0
		s.group.Go(func() error {
			err := in.run(reading, s.records)
			if reading.Err() != nil {
				err = nil // it was told to end
			}
			return err
		})
	}
	s.committed = time.Now()
	for {
		if err := s.turn(ctx); err != nil {
			return err
		}
	}
}

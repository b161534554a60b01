package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

const (
	maxHeld   = 64 << 20              // bytes of jobs under way; at the bound the keep is asked for no more
	maxDone   = tee.MaxFrame - 64<<10 // bytes of results in one request, and of one result
	maxReason = 2048                  // bytes
	doneRoom  = 16                    // results that wait for the keep; then jobs wait
	jobCost   = 256                   // bytes that a job takes beside its body
	pollWait  = 10 * time.Second      // for jobs
	workRetry = time.Second           // to the next try with a keep that refuses
	wide      = 8                     // jobs at a time in a lane without order
)

// worker does the keep's jobs. It has two sockets: one waits for jobs, the other
// hands results back at once.
//
// Jobs are done in lanes. In that of an instance's log and of its messages to
// other gateways there is one at a time, in the order of the keep; questions,
// blobs and uploads, which may wait long, have lanes of their own. Lanes run side
// by side. All of it ends with the connection to the keep: what was under way is
// dropped, and the keep, when it is started again, knows that.
type worker struct {
	a     *Agent
	group *errgroup.Group
	ctx   context.Context //nolint:containedctx // of the connection to the keep: jobs end with it
	done  chan tee.JobDone

	mu    sync.Mutex // protects what follows
	lanes map[laneKey]*lane
	held  int           // bytes of jobs under way
	freed chan struct{} // has an item when held went down
}

type laneKey struct{ instance, class string }

type lane struct {
	queue   []tee.InstanceJob
	running int
}

// runWork does jobs until the keep goes away.
func (a *Agent) runWork(ctx context.Context) error {
	if err := a.uploads.reset(); err != nil {
		return err
	}
	w := newWorker(ctx, a)
	w.group.Go(w.poll)
	w.group.Go(w.deliver)
	return w.group.Wait()
}

func newWorker(ctx context.Context, a *Agent) *worker {
	w := &worker{a: a, done: make(chan tee.JobDone, doneRoom), lanes: map[laneKey]*lane{}, freed: make(chan struct{}, 1)}
	w.group, w.ctx = errgroup.WithContext(ctx)
	return w
}

// poll asks for jobs.
func (w *worker) poll() error {
	socket := &tee.Socket{Path: w.a.cfg.KeepSocket}
	defer socket.Close()
	for {
		if err := w.awaitRoom(); err != nil {
			return err
		}
		r, err := tee.Work{Wait: pollWait.Milliseconds()}.Do(w.ctx, socket)
		var refusal *tee.Refusal
		if errors.As(err, &refusal) { // it has no use for a worker now
			if !sleep(w.ctx, workRetry) {
				return w.ctx.Err()
			}
			continue
		}
		if err != nil {
			return err
		}
		w.add(r.Jobs)
	}
}

// awaitRoom waits until another frame full of jobs keeps within maxHeld.
func (w *worker) awaitRoom() error {
	for {
		w.mu.Lock()
		room := w.held <= maxHeld-tee.MaxFrame
		w.mu.Unlock()
		if room {
			return w.ctx.Err()
		}
		select {
		case <-w.freed:
		case <-w.ctx.Done():
			return w.ctx.Err()
		}
	}
}

// deliver hands results back, as many at once as are there.
func (w *worker) deliver() error {
	socket := &tee.Socket{Path: w.a.cfg.KeepSocket}
	defer socket.Close()
	var next *tee.JobDone // found no room in the request before
	for {
		batch, size := []tee.JobDone{}, 0
		if next == nil {
			select {
			case d := <-w.done:
				next = &d
			case <-w.ctx.Done():
				return w.ctx.Err()
			}
		}
		for next != nil && (len(batch) == 0 || size+cost(*next) <= maxDone) {
			batch, size = append(batch, *next), size+cost(*next)
			next = nil
			select {
			case d := <-w.done:
				next = &d
			default:
			}
		}
		r, err := tee.Work{Done: batch}.Do(w.ctx, socket)
		var refusal *tee.Refusal
		if errors.As(err, &refusal) {
			w.a.log.Error("the keep refuses results of jobs", "reason", refusal.Reason)
			continue
		}
		if err != nil {
			return err
		}
		w.add(r.Jobs)
	}
}

func cost(d tee.JobDone) int { return len(d.Body) + len(d.Error) + 64 }

// add puts jobs into their lanes.
func (w *worker) add(jobs []tee.InstanceJob) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, j := range jobs {
		key, width := laneOf(j)
		l := w.lanes[key]
		if l == nil {
			l = &lane{}
			w.lanes[key] = l
		}
		l.queue = append(l.queue, j)
		w.held += len(j.Body) + jobCost
		if l.running < width {
			l.running++
			w.group.Go(func() error { return w.run(key, l) })
		}
	}
}

// laneOf says in which lane a job is done, and how many at a time are there.
func laneOf(j tee.InstanceJob) (laneKey, int) {
	switch j.Kind {
	case tee.JobAppend, tee.JobRead, tee.JobPeer:
		return laneKey{j.Instance, "order"}, 1
	case tee.JobDrop: // the keep's own job, about an instance
		r, err := tee.Body[tee.DropLog](j.Body)
		if err != nil {
			return laneKey{j.Instance, "order"}, 1
		}
		return laneKey{r.Instance, "order"}, 1
	case tee.JobPut: // parts have an order, and the last one waits for the cloud
		return laneKey{j.Instance, j.Kind}, 1
	case tee.JobAdvance:
		return laneKey{"", j.Kind}, 1
	case tee.JobAsk:
		if q, err := tee.Body[tee.Question](j.Body); err == nil && q.Kind == message.AskRecords {
			return laneKey{j.Instance, tee.JobRecords}, wide // waits at the cloud, and must not hold up other questions
		}
	}
	return laneKey{j.Instance, j.Kind}, wide
}

// run does the jobs of a lane until there are none.
func (w *worker) run(key laneKey, l *lane) error {
	for {
		w.mu.Lock()
		if len(l.queue) == 0 || w.ctx.Err() != nil {
			if l.running--; l.running == 0 {
				delete(w.lanes, key)
			}
			w.mu.Unlock()
			return w.ctx.Err()
		}
		j := l.queue[0]
		l.queue[0] = tee.InstanceJob{} // let its body go
		l.queue = l.queue[1:]
		w.mu.Unlock()
		later := func() {} // when the answer is on its way
		v, err := w.do(j, &later)
		if errors.Is(err, errSpool) {
			return err
		}
		select {
		case w.done <- jobDone(j.ID, v, err):
		case <-w.ctx.Done():
			return w.ctx.Err()
		}
		later()
		w.free(len(j.Body) + jobCost)
	}
}

func (w *worker) free(n int) {
	w.mu.Lock()
	w.held -= n
	w.mu.Unlock()
	select {
	case w.freed <- struct{}{}:
	default:
	}
}

func jobDone(id uint64, v any, err error) tee.JobDone {
	d := tee.JobDone{ID: id, Body: cose.Raw{0xf6}}
	if err == nil && v != nil {
		var body []byte
		if body, err = cose.Marshal(v); err == nil && len(body) > maxDone {
			err = fmt.Errorf("the result has %d bytes, at most %d", len(body), maxDone)
		}
		if err == nil {
			d.Body = body
		}
	}
	if err != nil {
		reason := err.Error()
		d.Error = string([]rune(reason[:min(len(reason), maxReason)])) // invalid UTF-8 becomes U+FFFD
	}
	return d
}

// do does one job.
func (w *worker) do(j tee.InstanceJob, later *func()) (any, error) {
	a := w.a
	switch j.Kind {
	case tee.JobAppend:
		return with(j.Body, func(r tee.AppendLog) (any, error) {
			if err := own(j, r.Instance); err != nil {
				return nil, err
			}
			end, err := a.instances.append(w.ctx, r)
			if err == nil && r.Trim > 1 {
				*later = func() { a.instances.trim(r.Instance, r.Trim) }
			}
			return end, err
		})
	case tee.JobRead:
		return with(j.Body, func(r tee.ReadLog) (any, error) {
			if err := own(j, r.Instance); err != nil {
				return nil, err
			}
			return a.instances.read(r)
		})
	case tee.JobDrop:
		return with(j.Body, func(r tee.DropLog) (any, error) { return nil, a.instances.drop(r.Instance) })
	case tee.JobPut:
		return with(j.Body, func(r tee.PutPart) (any, error) {
			if err := own(j, r.Instance); err != nil {
				return nil, err
			}
			return a.uploads.put(w.ctx, r)
		})
	case tee.JobBlob:
		return with(j.Body, func(r tee.ReadBlob) (any, error) { return a.blobs.read(w.ctx, r) })
	case tee.JobAsk:
		return with(j.Body, func(r tee.Question) (any, error) { return a.ask(w.ctx, r.Kind, r.Body) })
	case tee.JobRecords:
		return a.ask(w.ctx, message.AskRecords, j.Body)
	case tee.JobPeer:
		return nil, a.publish([]tee.Message{{Kind: kindPeer, Data: j.Body}})
	case tee.JobAdvance:
		return nil, a.advance(w.ctx)
	}
	return nil, fmt.Errorf("this agent knows no job of kind %.32q: is it older than the keep?", j.Kind)
}

func with[R any](body []byte, f func(R) (any, error)) (any, error) {
	r, err := tee.Body[R](body)
	if err != nil {
		return nil, err
	}
	return f(r)
}

// own refuses a job of one instance about another; the keep's own jobs have none.
func own(j tee.InstanceJob, instance string) error {
	if j.Instance != "" && j.Instance != instance {
		return fmt.Errorf("a job of instance %.32q about %.32q", j.Instance, instance)
	}
	return nil
}

// advance lets the keep take a step that it asked for.
func (a *Agent) advance(ctx context.Context) error {
	out, err := a.exchange(ctx, func(ctx context.Context) (tee.Outcome, error) { return tee.Advance{}.Do(ctx, a.keep) })
	if err != nil {
		return err
	}
	return a.publish(out.Publish)
}

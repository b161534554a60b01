package keep

import (
	"context"
	"errors"
	"fmt"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// job is something for the agent to do, and who waits for it.
type job struct {
	tee.InstanceJob
	runner *runner // with theirs
	theirs uint64
	done   func(tee.JobDone) // of the keep's own jobs; may be nil
}

// runnerJob passes a runner's job on, if it is about its own instance.
func (w *workloads) runnerJob(r *runner, name string, j tee.Job) error {
	w.mu.Lock()
	spec := w.specs[name]
	w.mu.Unlock()
	if len(j.Body) > maxJobBody {
		return fmt.Errorf("%w: a job of %d bytes, at most %d", errRunner, len(j.Body), maxJobBody)
	}
	var err error
	switch j.Kind {
	case tee.JobAppend:
		err = taken(j.Body, func(b tee.AppendLog) error { return own(b.Instance, name) })
	case tee.JobRead:
		err = taken(j.Body, func(b tee.ReadLog) error { return own(b.Instance, name) })
	case tee.JobPut:
		err = taken(j.Body, func(b tee.PutPart) error { return own(b.Instance, name) })
	case tee.JobBlob:
		err = taken(j.Body, func(b tee.ReadBlob) error {
			if m, err := workload.PeekManifest(spec.Manifest); err != nil || string(m.Content) != string(b.ID) && !w.recovers(name, b.ID) {
				return fmt.Errorf("%w: a blob that is not its own", errRunner)
			}
			return nil
		})
	case tee.JobRecords:
		return taken(j.Body, func(b message.AskedRecords) error {
			if !spec.reads(b.Gateway, b.Stream) {
				return fmt.Errorf("%w: a stream that is not its own", errRunner)
			}
			return w.ask(r, name, j.ID, message.AskRecords, j.Body)
		})
	case tee.JobKey:
		return taken(j.Body, func(b tee.WantKey) error { return w.wantKey(r, name, spec, j.ID, b) })
	case tee.JobCheckpoint:
		return w.aside(r, func() { w.checkpointKey(r, name, j.ID) })
	case tee.JobSnapshot:
		return taken(j.Body, func(b tee.Snapshot) error { return w.aside(r, func() { w.snapshot(r, name, spec, j.ID, b) }) })
	case tee.JobRecover:
		return w.aside(r, func() { w.recover(r, name, spec, j.ID) })
	case tee.JobFrame:
		return taken(j.Body, func(b tee.Frame) error { return w.relay(name, workload.KindFrame, b.N, b.Data) })
	case tee.JobAck:
		return taken(j.Body, func(b tee.FrameAck) error { return w.relay(name, workload.KindFrameAck, b.N, nil) })
	default:
		err = fmt.Errorf("%w: a job of kind %q", errRunner, j.Kind)
	}
	if err != nil {
		return err
	}
	return w.enqueue(&job{InstanceJob: tee.InstanceJob{Instance: name, Job: tee.Job{Kind: j.Kind, Body: j.Body}}, runner: r, theirs: j.ID})
}

// aside does what waits for the TPM, or takes its time, beside the runner's other
// messages; a few at a time.
func (w *workloads) aside(r *runner, f func()) error {
	w.mu.Lock()
	r.aside++
	n := r.aside
	w.mu.Unlock()
	if n > maxAside {
		return fmt.Errorf("%w: too many jobs under way", errRunner)
	}
	go func() {
		f()
		w.mu.Lock()
		r.aside--
		w.mu.Unlock()
	}()
	return nil
}

func own(of, name string) error {
	if of != name {
		return fmt.Errorf("%w: a job about another instance", errRunner)
	}
	return nil
}

// ask puts a runner's question to the cloud.
func (w *workloads) ask(r *runner, name string, id uint64, kind string, body cose.Raw) error {
	q := cose.MustMarshal(tee.Question{Kind: kind, Body: body})
	return w.enqueue(&job{InstanceJob: tee.InstanceJob{Instance: name, Job: tee.Job{Kind: tee.JobAsk, Body: q}}, runner: r, theirs: id})
}

// do has the agent do a job of the keep's own; those about one instance are done
// in order. done, which may be nil, is called without a lock held.
func (w *workloads) do(instance, kind string, body any, done func(tee.JobDone)) {
	j := &job{InstanceJob: tee.InstanceJob{Instance: instance, Job: tee.Job{Kind: kind, Body: cose.MustMarshal(body)}}, done: done}
	if err := w.enqueue(j); err != nil {
		w.k.log.Warn("not done now", "job", kind, "reason", err)
		if done != nil {
			go done(tee.JobDone{Error: err.Error(), Body: cose.Raw{0xf6}}) // takes locks of its own
		}
	}
}

// wantAdvance asks the agent to let the keep take a step. The caller holds w.mu.
func (w *workloads) wantAdvance() {
	if !w.advance {
		w.advance = true
		w.push(&job{InstanceJob: tee.InstanceJob{Job: tee.Job{Kind: tee.JobAdvance, Body: cose.Raw{0xf6}}}})
	}
}

func (w *workloads) enqueue(j *job) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	n, size := 0, 0
	for _, o := range w.jobs {
		if o.Instance == j.Instance {
			n, size = n+1, size+len(o.Body)
		}
	}
	for _, o := range w.queue {
		if o.Instance == j.Instance && w.jobs[o.ID] == nil {
			n, size = n+1, size+len(o.Body)
		}
	}
	if n >= maxJobs || size+len(j.Body) > maxJobBytes {
		return fmt.Errorf("%w: too many jobs under way", errRunner)
	}
	w.push(j)
	return nil
}

func (w *workloads) push(j *job) {
	w.nextJob++
	j.ID = w.nextJob
	w.queue = append(w.queue, j)
	if j.runner != nil || j.done != nil {
		w.jobs[j.ID] = j
	}
	close(w.arrived)
	w.arrived = make(chan struct{})
}

// work implements tee.Work.
func (w *workloads) work(ctx context.Context, r tee.Work) (tee.WorkReply, error) {
	if r.Wait < 0 || r.Wait > 60_000 {
		return tee.WorkReply{}, errors.New("wait must be between 0 and 60000 ms")
	}
	for _, d := range r.Done {
		w.done(d)
	}
	if len(r.Done) > 0 && r.Wait == 0 {
		return tee.WorkReply{}, nil // only to tell what is done
	}
	timeout := time.NewTimer(time.Duration(r.Wait) * time.Millisecond)
	defer timeout.Stop()
	w.mu.Lock()
	agent := w.agent
	w.mu.Unlock()
	for {
		w.mu.Lock()
		if w.agent != agent { // of an agent that is gone: nobody would do what it took
			w.mu.Unlock()
			return tee.WorkReply{}, errors.New("the agent was started again")
		}
		jobs, arrived := w.takeJobs(), w.arrived
		w.mu.Unlock()
		if len(jobs) > 0 {
			return tee.WorkReply{Jobs: jobs}, nil
		}
		select {
		case <-arrived:
		case <-timeout.C:
			return tee.WorkReply{}, nil
		case <-ctx.Done():
			return tee.WorkReply{}, ctx.Err()
		}
	}
}

func (w *workloads) takeJobs() []tee.InstanceJob {
	var out []tee.InstanceJob
	size := 0
	for len(w.queue) > 0 {
		j := w.queue[0]
		if size += len(j.Body) + 64; size > maxJobsReply && len(out) > 0 {
			break
		}
		if j.Kind == tee.JobAdvance {
			w.advance = false
		}
		out, w.queue = append(out, j.InstanceJob), w.queue[1:]
	}
	return out
}

// done hands a job's answer to whoever waits for it.
func (w *workloads) done(d tee.JobDone) {
	w.mu.Lock()
	j := w.jobs[d.ID]
	delete(w.jobs, d.ID)
	if j != nil && j.runner != nil {
		w.send(j.runner, tee.KindJobDone, tee.JobDone{ID: j.theirs, Error: d.Error, Body: body(d)}, len(d.Body)+len(d.Error)+64)
	}
	w.mu.Unlock()
	if j != nil && j.done != nil {
		go j.done(d) // it may wait for the TPM
	}
}

// body is what a job's answer holds; one that failed holds nothing.
func body(d tee.JobDone) cose.Raw {
	if len(d.Body) == 0 {
		return cose.Raw{0xf6}
	}
	return d.Body
}

// reset forgets what was under way: the agent was restarted, and nobody knows
// what it did. Runners begin again from what is durable.
func (w *workloads) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue, w.advance = nil, false
	w.agent++
	jobs := w.jobs
	w.jobs = map[uint64]*job{}
	for _, st := range w.run {
		if st.runner != nil {
			st.starts = 0
			w.release(st)
		}
	}
	for _, j := range jobs {
		if j.done != nil {
			go j.done(tee.JobDone{ID: j.ID, Error: "the agent was restarted"}) // takes locks of its own
		}
	}
	w.wantAdvance()
}

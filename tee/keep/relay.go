package keep

import (
	"bytes"
	"errors"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// relay passes a frame, or word of how many came, on to the other runner.
func (w *workloads) relay(name string, kind int, n uint64, data []byte) error {
	w.mu.Lock()
	to := w.routes[name]
	w.mu.Unlock()
	if to.peer == "" {
		return nil // the move is over
	}
	msg := workload.Wrap(kind, workload.Frame{Attempt: to.attempt, N: n, Data: data})
	j := &job{InstanceJob: tee.InstanceJob{Instance: name, Job: tee.Job{Kind: tee.JobPeer, Body: cose.MustMarshal(message.Routed{Peer: to.peer, Data: msg})}}}
	if w.enqueue(j) != nil {
		w.k.log.Debug("a frame found no room: it is sent again", "instance", name)
	}
	return nil
}

// frame hands a frame from another gateway to the runner it is for, without the
// keep's lock. What finds no room is sent again.
func (w *workloads) frame(e workload.Envelope) error {
	f, err := workload.Body[workload.Frame](e)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, to := range w.routes {
		st := w.run[name]
		if !bytes.Equal(to.attempt, f.Attempt) || st == nil || st.runner == nil || st.runner.size+len(f.Data) > maxOut {
			continue
		}
		if e.Kind == workload.KindFrame {
			w.send(st.runner, tee.KindFrame, tee.Frame{N: f.N, Data: f.Data}, len(f.Data)+64)
		} else {
			if f.N > st.reached {
				st.reached, st.progress = f.N, time.Now()
			}
			w.send(st.runner, tee.KindFrameAck, tee.FrameAck{N: f.N}, 64)
		}
		return nil
	}
	return errors.New("a frame of no move that is under way")
}

// route is where an instance's frames go.
type route struct {
	peer    string
	attempt []byte
}

// setRoute starts, or without a peer ends, the passing on of frames of an instance
// that moves away.
func (w *workloads) setRoute(name string, to route) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.routes, name)
	if st := w.run[name]; st != nil && to.peer != "" {
		st.final, st.reached = nil, 0
		w.routes[name] = to
	}
}

// tell sends an instance's runner a message, and returns the runner; nil if there
// is none.
func (w *workloads) tell(name string, kind int, body any) *runner {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.run[name]
	if st == nil || st.runner == nil {
		return nil
	}
	w.send(st.runner, kind, body, 4096)
	return st.runner
}

// has reports whether an instance still has this runner.
func (w *workloads) has(name string, r *runner) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.run[name]
	return r != nil && st != nil && st.runner == r
}

// committed notes the newest state of an instance that moved here, before its
// runner says so: nothing older is to be gone on from.
func (w *workloads) committed(name string, head []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		st.newest = head
	}
}

// progressed is when the other side of a move last took something.
func (w *workloads) progressed(name string) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		return st.progress
	}
	return time.Time{}
}

func (w *workloads) final(name string) *tee.Final {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		return st.final
	}
	return nil
}

func (w *workloads) receivedHead(name string) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		return st.received
	}
	return nil
}

// forget drops what is known of an earlier instance of this name, and its runner.
func (w *workloads) forget(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if st := w.run[name]; st != nil {
		w.release(st)
		delete(w.run, name)
	}
}

func (w *workloads) advanceSoon() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wantAdvance()
}

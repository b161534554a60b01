package durable

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
)

// ErrFull is wrapped by the error of an Append that would exceed MaxBytes.
// Nothing was written; Trim makes room.
var ErrFull = errors.New("durable: log is full")

// Entry is one entry of a Log.
type Entry struct {
	Index uint64
	Data  []byte
}

// Log is an append-only sequence of entries that survives crashes. All methods
// may be called concurrently. It starts no goroutine: of the Appends that wait,
// one holds the token and writes for all.
type Log struct {
	dir                    string
	maxBytes, segmentBytes int64
	lock                   *os.File
	recovered              int64
	sync                   func(*os.File) error // fdatasync, except in tests

	// token is full while somebody changes files. Only its holder changes f,
	// buf, segs, total, next and trimmed (the latter four also under mu), so
	// the holder may read them without mu. It is taken before mu.
	token chan struct{}
	f     *os.File // the last segment, nil if there is none
	buf   []byte

	mu      sync.Mutex // protects all below; never held during a system call
	segs    []*segment
	total   int64  // bytes of segs
	next    uint64 // index after the last durable entry
	trimmed uint64 // the durable mark
	queue   []*request
	grown   chan struct{} // closed and replaced when Wait has to look again
	failed  error         // the first failure, see poison
	closed  bool
}

// request is one call of Append.
type request struct {
	entries [][]byte
	size    int64 // encoded, without a marker
	last    uint64
	err     error
	done    chan struct{} // closed once last and err are set
}

// Append adds entries under consecutive indices and returns the last of them,
// after all of them are durable. Concurrent calls share one fdatasync. An entry
// has 1 to 1,048,576 bytes.
//
// If ctx ends before the write has begun, nothing is written and the error is
// that of ctx; later on, Append waits for the outcome. ErrFull is the answer
// when MaxBytes would be exceeded, and nothing is written. After any other
// failure of a write or a sync it is unknown what is on the disk: from then on
// Append and Trim fail with that first error until the log is closed and opened
// again; a failed sync is never tried again.
//
//	pwrite(segment, group); fdatasync(segment)
//
// and before it, when a new segment is needed, those of addSegment and of drop.
func (l *Log) Append(ctx context.Context, entries ...[]byte) (last uint64, err error) {
	r := &request{entries: entries, done: make(chan struct{})}
	if len(entries) == 0 {
		return 0, errors.New("durable: append: no entries given")
	}
	for i, e := range entries {
		if len(e) == 0 || len(e) > maxEntry {
			return 0, fmt.Errorf("durable: append: entry %d of the call has %d bytes, want 1 to %d", i, len(e), maxEntry)
		}
		r.size += entryHead + int64(len(e))
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := l.enqueue(r); err != nil {
		return 0, err
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		if l.withdraw(r) {
			return 0, ctx.Err()
		}
		<-r.done
	case l.token <- struct{}{}:
		defer func() { <-l.token }()
		if ctx.Err() != nil && l.withdraw(r) {
			return 0, ctx.Err()
		}
		l.lead(r)
	}
	return r.last, r.err
}

func (l *Log) enqueue(r *request) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	l.queue = append(l.queue, r)
	return nil
}

// withdraw takes r back, unless a writer already has it.
func (l *Log) withdraw(r *request) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.queue, r)
	if i < 0 {
		return false
	}
	l.queue = slices.Delete(l.queue, i, i+1)
	return true
}

// usable is called with mu held.
func (l *Log) usable() error {
	if l.closed {
		return fmt.Errorf("durable: log %s: %w", l.dir, os.ErrClosed)
	}
	return l.failed
}

// poison records the first failure, ends everything that waits, and returns
// the error that all later calls get.
func (l *Log) poison(cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed == nil {
		l.failed = fmt.Errorf("durable: log %s stopped after a failure, close and reopen it: %w", l.dir, cause)
	}
	l.flush(l.failed)
	return l.failed
}

// flush ends all queued requests and wakes all that Wait. Mu is held.
func (l *Log) flush(err error) {
	for _, r := range l.queue {
		r.err = err
		close(r.done)
	}
	l.queue = nil
	l.wake()
}

func (l *Log) wake() {
	close(l.grown)
	l.grown = make(chan struct{})
}

// Close lets a write in progress end, fails what still waits with os.ErrClosed,
// and gives the lock back. It has nothing to sync. Later calls return nil.
func (l *Log) Close() error {
	l.token <- struct{}{}
	defer func() { <-l.token }()
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.flush(l.usable())
	l.mu.Unlock()
	return l.closeFiles()
}

func (l *Log) closeFiles() error {
	var err error
	if l.f != nil {
		err = l.f.Close()
	}
	if l.lock != nil {
		err = errors.Join(err, l.lock.Close())
	}
	return err
}

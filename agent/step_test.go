package agent

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"

	"edgekeep/tee"
)

// stepper is a keep whose answer to Peer is out, and which counts Commits.
func stepper(a *Agent, t *testing.T, out func() (any, error)) (commits *atomic.Int64) {
	commits = &atomic.Int64{}
	a.serve(t, func(kind int, _ []byte) (any, error) {
		switch kind {
		case tee.KindPeer:
			return out()
		case tee.KindCommit:
			commits.Add(1)
			return tee.Outcome{Publish: []tee.Message{{Kind: "result"}}}, nil
		case tee.KindStart:
			return tee.Outcome{Commit: []byte("offered anew")}, nil
		}
		return nil, tee.ErrKind
	})
	return commits
}

func (a *Agent) peer(ctx context.Context) (tee.Outcome, error) {
	socket := &tee.Socket{Path: a.cfg.KeepSocket}
	defer socket.Close()
	return a.handOver(ctx, func(ctx context.Context) (tee.Outcome, error) { return tee.Peer{From: "gw2"}.Do(ctx, socket) })
}

// A frame does not wait for a step that is under way.
func TestFrameDuringStep(t *testing.T) {
	a := newAgent(t, 1<<20)
	stepper(a, t, func() (any, error) { return tee.Outcome{Publish: []tee.Message{{Kind: "x"}}, Pull: true}, nil })
	a.step <- struct{}{}
	if out, err := a.peer(t.Context()); err != nil || len(out.Publish) != 1 || len(a.kick) != 1 {
		t.Errorf("%+v, %v", out, err)
	}
}

// A step that such a message turns out to be waits for the other one, is stored
// and committed.
func TestStepDuringStep(t *testing.T) {
	a := newAgent(t, 1<<20)
	asked, refuse := make(chan struct{}, 2), true
	commits := stepper(a, t, func() (any, error) {
		defer func() { asked <- struct{}{} }()
		if refuse {
			refuse = false
			return nil, errors.New("a step waits for its Commit")
		}
		return tee.Outcome{Commit: []byte("s1")}, nil
	})
	for _, refused := range []bool{true, false} { // asked again with the lock, or settled with it
		refuse = refused
		os.Remove(a.path("state.cbor"))
		a.step <- struct{}{}
		done := make(chan error, 1)
		go func() {
			out, err := a.peer(t.Context())
			if err == nil && len(out.Publish) != 1 {
				err = errors.New("nothing to publish")
			}
			done <- err
		}()
		<-asked
		if len(done) != 0 || a.file("state.cbor") == "s1" {
			t.Error("it did not wait")
		}
		before := commits.Load()
		release(a.step)
		if err := <-done; err != nil || a.file("state.cbor") != "s1" || commits.Load() != before+1 {
			t.Errorf("refused %v: %v, %q", refused, err, a.file("state.cbor"))
		}
		if refused {
			<-asked
		}
	}
	if len(a.again) != 0 {
		t.Error("the keep is to be started again")
	}
}

// If the keep is started in between, it offers the step anew, and the older state
// must not take its place: it would be worthless.
func TestStartDuringStep(t *testing.T) {
	a := newAgent(t, 1<<20)
	asked := make(chan struct{})
	commits := stepper(a, t, func() (any, error) {
		defer close(asked)
		return tee.Outcome{Commit: []byte("worthless")}, nil
	})
	a.step <- struct{}{}
	done := make(chan error)
	go func() {
		_, err := a.peer(t.Context())
		done <- err
	}()
	<-asked
	a.starts.Add(2) // the Start of the one who has the lock
	release(a.step)
	if err := <-done; err == nil || commits.Load() != 0 || len(a.again) != 1 {
		t.Errorf("%v, %d Commits", err, commits.Load())
	}
	if _, err := os.Stat(a.path("state.cbor")); err == nil {
		t.Error("it was stored")
	}
	if err := a.startKeep(t.Context()); err != nil || a.file("state.cbor") != "offered anew" || len(a.again) != 0 {
		t.Errorf("%v, %q", err, a.file("state.cbor"))
	}
}

// A connection that is lost in the middle of a step does not cut it short.
func TestStepOutlivesLink(t *testing.T) {
	a := newAgent(t, 1<<20)
	ctx, cancel := context.WithCancel(t.Context())
	commits := stepper(a, t, func() (any, error) {
		cancel()
		return tee.Outcome{Commit: []byte("s1")}, nil
	})
	if _, err := a.peer(ctx); err != nil || commits.Load() != 1 || len(a.again) != 0 {
		t.Errorf("%v, %d Commits", err, commits.Load())
	}
}

// A keep that did not give its word is started again.
func TestStartAgain(t *testing.T) {
	a := newAgent(t, 1<<20)
	ctx, cancel := context.WithCancel(t.Context())
	starts, asked := 0, 0
	take := func() { // a step whose outcome nobody hears
		if asked++; asked == 1 {
			go a.take(ctx, func(context.Context) (tee.Outcome, error) { return tee.Outcome{}, errors.New("cut short") })
		}
	}
	a.serve(t, func(kind int, _ []byte) (any, error) {
		switch kind {
		case tee.KindStart:
			if starts++; starts == 2 {
				cancel()
			}
			return tee.Outcome{}, nil
		case tee.KindWork:
			take()
			<-ctx.Done()
		case tee.KindTake:
			<-ctx.Done()
		}
		return nil, tee.ErrKind
	})
	if err := a.runKeep(ctx); !errors.Is(err, context.Canceled) || starts != 2 {
		t.Errorf("%d starts: %v", starts, err)
	}
}

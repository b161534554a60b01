package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

const (
	maxQuestions = 64 // outstanding
	maxPatient   = 48 // of them, that may wait long at the cloud: others find room always
	askTries     = 4
	askAgain     = 3 * time.Second // without an answer
	maxPatience  = 20_000          // ms that a question may wait at the cloud
	linkPatience = 30 * time.Second
)

// asker puts a question to the cloud and returns the body of its answer. It is
// not signed: whoever asks checks what it holds.
type asker func(ctx context.Context, kind string, body cose.Raw) (cose.Raw, error)

// questions are those that wait for an answer.
type questions struct {
	room, patient chan struct{} // an item for each question

	mu      sync.Mutex // protects waiting
	waiting map[string]chan message.Answer
}

func newQuestions() *questions {
	return &questions{
		room: make(chan struct{}, maxQuestions), patient: make(chan struct{}, maxPatient),
		waiting: map[string]chan message.Answer{},
	}
}

func (q *questions) count() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting)
}

// wait registers a question; its answer comes once at most.
func (q *questions) wait() (id []byte, answer chan message.Answer) {
	id, answer = make([]byte, message.AskID), make(chan message.Answer, 1)
	rand.Read(id) // never fails
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting[string(id)] = answer
	return id, answer
}

func (q *questions) forget(id []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.waiting, string(id))
}

// answered hands an answer to whoever waits for it. One that is malformed, or that
// nobody waits for, is dropped.
func (q *questions) answered(payload []byte) {
	var m message.Answer
	if err := cose.Unmarshal(payload, &m); err != nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if answer, ok := q.waiting[string(m.ID)]; ok {
		answer <- m // has room: the first takes it out of the map
		delete(q.waiting, string(m.ID))
	}
}

// ask implements asker. Without an answer it asks again under the same id, and on
// a new connection at once.
func (a *Agent) ask(ctx context.Context, kind string, body cose.Raw) (cose.Raw, error) {
	again := askAgain
	if kind == message.AskRecords {
		r, err := tee.Body[message.AskedRecords](body)
		if err != nil {
			return nil, err
		}
		if r.Wait < 0 || r.Wait > maxPatience {
			return nil, fmt.Errorf("a question may wait up to %d ms at the cloud, not %d", maxPatience, r.Wait)
		}
		again += time.Duration(r.Wait) * time.Millisecond
		if err := acquire(ctx, a.questions.patient); err != nil {
			return nil, err
		}
		defer release(a.questions.patient)
	}
	if err := acquire(ctx, a.questions.room); err != nil {
		return nil, err
	}
	defer release(a.questions.room)
	id, answer := a.questions.wait()
	defer a.questions.forget(id)
	raw, err := cose.Marshal(message.Ask{ID: id, Kind: kind, Body: body})
	if err != nil {
		return nil, err
	}
	for range askTries {
		m, err := a.askOnce(ctx, raw, answer, again)
		if err != nil {
			return nil, err
		}
		if m != nil && m.Error != "" {
			return nil, fmt.Errorf("%s%.1000s", tee.CloudRefuses, m.Error)
		}
		if m != nil {
			return m.Body, nil
		}
	}
	return nil, fmt.Errorf("the cloud did not answer a question about %.32q, asked %d times", kind, askTries)
}

// askOnce asks and waits; nil means that there is no answer yet.
func (a *Agent) askOnce(ctx context.Context, raw []byte, answer <-chan message.Answer, patience time.Duration) (*message.Answer, error) {
	l, err := a.awaitLink(ctx)
	if err != nil {
		return nil, err
	}
	if err := l.publish(tee.Message{Kind: "ask", Data: raw}); err != nil {
		return nil, err
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case m := <-answer:
		return &m, nil
	case <-timer.C:
		return nil, nil
	case <-l.ctx.Done(): // asked again on the next connection
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// errNoLink says that there is no connection to the cloud now.
var errNoLink = errors.New("there is no connection to the cloud")

// awaitLink returns the connection to the cloud, for which it waits a while.
func (a *Agent) awaitLink(ctx context.Context) (*link, error) {
	timer := time.NewTimer(linkPatience)
	defer timer.Stop()
	for {
		l, arrives := a.liveLink()
		if l != nil {
			return l, nil
		}
		select {
		case <-arrives:
		case <-timer.C:
			return nil, fmt.Errorf("%w, for %s already", errNoLink, linkPatience)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// liveLink returns the connection to the cloud, or else a channel that is closed
// when there is a new one.
func (a *Agent) liveLink() (*link, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.link != nil && a.link.ctx.Err() == nil {
		return a.link, nil
	}
	if a.arrives == nil {
		a.arrives = make(chan struct{})
	}
	return nil, a.arrives
}

// setLink says that there is a connection to the cloud, or none. The caller holds
// a.mu.
func (a *Agent) setLink(l *link) {
	a.link = l
	if l != nil && a.arrives != nil {
		close(a.arrives)
		a.arrives = nil
	}
}

func acquire(ctx context.Context, room chan struct{}) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case room <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func release(room chan struct{}) { <-room }

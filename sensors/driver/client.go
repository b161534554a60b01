// Package driver is a driver's end of the ingest protocol of package sensors: it
// numbers lines and keeps them until the keep has acknowledged them.
package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"edgekeep/sensors"
)

const (
	maxWindowLines = 32768
	maxWindowBytes = 8 << 20

	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
)

// Client is the driver's end of a session: it numbers lines and keeps them until
// the keep has acknowledged them, through any number of connections. Run does
// the work; the other methods may be called from other goroutines while it runs.
type Client struct {
	socket, session string
	minBackoff      time.Duration // shortened by tests

	mu   sync.Mutex // protects everything below
	cond *sync.Cond // something below has changed

	// Lines are counted from 0 as Send takes them; line i has the number
	// origin+1+i. The queue is lines head to head+len(queue).
	greeted bool   // the first #ack of this run is here, and origin with it
	origin  uint64 // what the keep had of this session before this run
	head    uint64 // lines consumed by the keep
	written uint64 // lines that a connection was given at least once
	queue   []queued
	bytes   int // in the queue, each line with its "\n"

	// Of the current connection.
	cursor uint64 // the next line to write
	next   uint64 // the number the keep will give to the next line; 0 before #seq
	down   bool   // the keep is gone

	stats   Stats
	lastErr error // why the last connection failed
	ended   error // Run has returned
}

type queued struct {
	line     []byte
	readings int
	rejected bool
}

// Stats counts lines of this run. After a Flush, Sent is Acked + Rejected.
type Stats struct {
	Sent       uint64 // written to the keep, repetitions not counted
	Acked      uint64 // committed by the keep
	Rejected   uint64 // refused by the keep; an #err lost with a connection counts as Acked
	Readings   uint64 // fields in the lines that count as Acked
	Reconnects uint64 // connections answered by the keep, after the first
}

// NewClient makes the client of one session (1 to 32 characters A-Z a-z 0-9 -)
// on the keep's ingest socket. Nothing happens until Run.
func NewClient(socket, session string) *Client {
	c := &Client{socket: socket, session: session, minBackoff: minBackoff}
	c.cond = sync.NewCond(&c.mu)
	return c
}

// Run connects, says hello, sends what is not acknowledged, and connects again
// when the connection breaks, waiting up to 5 s in between. It returns nil when
// ctx ends, and an error when going on makes no sense: the session's name is
// invalid, or the peer does not speak this protocol, or claims lines that were
// never sent. A client runs once.
func (c *Client) Run(ctx context.Context) error {
	err := c.run(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = err
	if err == nil {
		c.ended = errors.New("the client has been stopped")
	}
	c.cond.Broadcast()
	return err
}

func (c *Client) run(ctx context.Context) error {
	if !sensors.ValidSession(c.session) {
		return fmt.Errorf("session name %q: want 1 to 32 of A-Z a-z 0-9 and -", c.session)
	}
	backoff := c.minBackoff
	for ctx.Err() == nil {
		before := c.Stats()
		err := c.connection(ctx)
		if fatal := (*protocolError)(nil); errors.As(err, &fatal) {
			return fmt.Errorf("keep at %s, session %s: %w", c.socket, c.session, err)
		}
		c.mu.Lock()
		c.lastErr = err
		c.mu.Unlock()
		if after := c.Stats(); after.Acked+after.Rejected > before.Acked+before.Rejected {
			backoff = c.minBackoff
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
	return nil
}

// Resume waits for the first answer of this run and returns the last number of
// the session that the keep has from earlier runs: the first line given to Send
// is the one after it.
func (c *Client) Resume(ctx context.Context) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.await(ctx, func() bool { return c.greeted })
	if err != nil {
		return 0, fmt.Errorf("wait for the keep at %s: %w", c.socket, err)
	}
	return c.origin, nil
}

// Send queues a copy of a line, given without its "\n". It blocks while 32768
// lines or 8 MiB are not acknowledged. It does not parse: what is wrong inside
// the line is for the keep to reject.
func (c *Client) Send(ctx context.Context, line []byte) error {
	if len(line) == 0 || len(line) > sensors.MaxLine || line[0] == '#' || bytes.IndexByte(line, '\n') >= 0 {
		return fmt.Errorf("send: want one line of 1 to %d bytes that is no control line", sensors.MaxLine)
	}
	point, _ := sensors.ParseLine(line) // no fields when malformed
	c.mu.Lock()
	defer c.mu.Unlock()
	room := func() bool {
		return c.ended == nil && len(c.queue) < maxWindowLines && c.bytes+len(line)+1 <= maxWindowBytes
	}
	if err := c.await(ctx, room); err != nil {
		return fmt.Errorf("send: %d lines wait for the keep: %w", len(c.queue), err)
	}
	c.queue = append(c.queue, queued{line: bytes.Clone(line), readings: len(point.Fields)})
	c.bytes += len(line) + 1
	c.cond.Broadcast()
	return nil
}

// Flush waits until every line that Send took before is acknowledged.
func (c *Client) Flush(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	target := c.head + uint64(len(c.queue))
	if err := c.await(ctx, func() bool { return c.head >= target }); err != nil {
		return fmt.Errorf("flush: %d lines are not acknowledged: %w", target-c.head, err)
	}
	return nil
}

// Stats returns the counts so far.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Sent = c.written
	return s
}

// await waits, with mu held, until ready holds, Run returns or ctx ends.
func (c *Client) await(ctx context.Context, ready func() bool) error {
	if ready() {
		return nil
	}
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.cond.Broadcast()
	})
	defer stop()
	for !ready() {
		switch {
		case c.ended != nil:
			return c.ended
		case ctx.Err() != nil && c.lastErr != nil:
			return fmt.Errorf("%w; the last connection failed: %w", ctx.Err(), c.lastErr)
		case ctx.Err() != nil:
			return ctx.Err()
		}
		c.cond.Wait()
	}
	return nil
}

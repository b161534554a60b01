package keep

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"edgekeep/sensors"
)

// maxConns bounds the connections of one source.
const maxConns = 4

// Ingest takes readings from drivers on l until ctx ends. A connection belongs
// to the source of the user at its other end; other users are turned away.
func (k *Keep) Ingest(ctx context.Context, l net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() {
		l.Close()
		k.sealer.drain()
	})
	defer stop()
	g.Go(func() error {
		timer := time.NewTimer(k.cfg.Flush)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-timer.C:
				timer.Reset(max(k.sealer.flushDue(time.Now()), time.Millisecond))
			}
		}
	})
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil {
				g.Go(func() error { return fmt.Errorf("accepting drivers: %w", err) })
			}
			err := g.Wait()
			k.sealer.drain() // the other call may not have come to its end
			return err
		}
		c, err := k.admit(conn)
		if err != nil {
			k.log.Warn("a driver was turned away", "reason", err)
			conn.Close()
			continue
		}
		g.Go(func() error { c.run(ctx); return nil })
	}
}

// AwaitTaken waits until the agent has made durable what was sealed, at most so
// long: a source without numbers would lose what the keep dropped at its end.
func (k *Keep) AwaitTaken(limit time.Duration) {
	for end := time.Now().Add(limit); time.Now().Before(end) && !k.sealer.empty(); {
		time.Sleep(10 * time.Millisecond)
	}
}

func (k *Keep) admit(conn net.Conn) (*ingestConn, error) {
	uid, err := peerUID(conn)
	if err != nil {
		return nil, err
	}
	s := k.sealer
	s.mu.Lock()
	defer s.mu.Unlock()
	src, ok := s.sources[uid]
	if !ok {
		s.turnedAway++
		return nil, fmt.Errorf("user %d is no configured source", uid)
	}
	if len(src.conns) >= maxConns {
		s.turnedAway++
		return nil, fmt.Errorf("source %s has %d connections already", src.cfg.Name, maxConns)
	}
	c := &ingestConn{conn: conn, s: s, src: src, acks: make(chan struct{}, 1), bucket: src.cfg.Rate, filled: time.Now()}
	src.conns[c] = struct{}{}
	return c, nil
}

func peerUID(conn net.Conn) (uint32, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a Unix socket")
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, fmt.Errorf("peer credentials: %w", credErr)
	}
	return cred.Uid, nil
}

// ingestConn is one driver's connection.
type ingestConn struct {
	conn net.Conn
	s    *sealer
	src  *source
	acks chan struct{}

	// Protected by s.mu; the reader, which alone sets session, reads it without.
	session string
	stale   bool // another connection took over: its lines are taken no more

	// Used by the reader only.
	next   uint64
	bucket int // lines that may come before the next second
	filled time.Time
}

// notify tells the writers of a source's connections that committed has moved.
// The caller holds s.mu.
func (src *source) notify() {
	for c := range src.conns {
		select {
		case c.acks <- struct{}{}:
		default:
		}
	}
	if src.acked != nil {
		src.acked(src.committed)
	}
}

func (c *ingestConn) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	done := make(chan struct{})
	go func() { // joined below
		defer close(done)
		c.writeAcks(ctx)
	}()
	c.readLines(ctx)
	cancel()
	<-done
	c.s.mu.Lock()
	delete(c.src.conns, c)
	c.s.mu.Unlock()
}

// writeAcks writes the newest acknowledgement whenever it has moved. A driver
// that does not read delays nobody but itself.
func (c *ingestConn) writeAcks(ctx context.Context) {
	sent := uint64(0)
	greeted := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.acks:
		}
		session, line, settled := c.position()
		if session == "" || !greeted && !settled || greeted && line <= sent {
			continue
		}
		sent, greeted = line, true
		ack := sensors.Control{Kind: "ack", Session: session, Seq: line}
		if err := c.write(ack); err != nil {
			c.conn.Close()
			return
		}
	}
}

// position is how far the connection's session is committed. It is settled when
// the keep knows the session's past and nothing of it is under way any more, so
// that a driver which begins again is not told of lines that it has yet to send.
func (c *ingestConn) position() (session string, line uint64, settled bool) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.src.committed.Session == c.session {
		line = c.src.committed.Line
	}
	settled = c.s.subject != "" && (c.src.cursor.Session != c.session || c.src.cursor == c.src.committed)
	return c.session, line, settled
}

func (c *ingestConn) write(m sensors.Control) error {
	_ = c.conn.SetWriteDeadline(time.Now().Add(30 * time.Second))
	_, err := io.WriteString(c.conn, m.String()+"\n")
	return err
}

func (c *ingestConn) readLines(ctx context.Context) {
	r := bufio.NewReaderSize(c.conn, sensors.MaxLine+1)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = r.ReadSlice('\n')
			}
			if err == nil {
				err = c.refuse(fmt.Sprintf("longer than %d bytes", sensors.MaxLine))
			}
			line = nil
		}
		if err != nil {
			return // closed, or cut off in a line: an incomplete line is no reading
		}
		if line = bytes.TrimSuffix(line, []byte("\n")); len(line) == 0 {
			continue
		}
		if !c.pace(ctx) || c.line(line) != nil {
			return
		}
	}
}

// pace lets a source send its rate of lines a second; more waits in its socket.
func (c *ingestConn) pace(ctx context.Context) bool {
	if c.bucket > 0 {
		c.bucket--
		return true
	}
	if wait := time.Until(c.filled.Add(time.Second)); wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return false
		}
	}
	c.bucket, c.filled = c.src.cfg.Rate-1, time.Now()
	return true
}

var errEnd = errors.New("the connection ends")

func (c *ingestConn) line(line []byte) error {
	if line[0] == '#' {
		return c.control(line)
	}
	p, err := sensors.ParseLine(line)
	if err != nil {
		return c.refuse(err.Error())
	}
	if !c.s.add(c, p, c.count()) {
		return errEnd
	}
	return nil
}

// count is the number of the line at hand, 0 if lines are not numbered.
func (c *ingestConn) count() uint64 {
	if c.session == "" {
		return 0
	}
	c.next++
	return c.next
}

func (c *ingestConn) refuse(reason string) error {
	n := c.count()
	if n > 0 {
		if err := c.write(sensors.Control{Kind: "err", Seq: n, Reason: reason}); err != nil {
			return err
		}
	}
	c.s.reject(c, reason, n)
	return nil
}

func (c *ingestConn) control(line []byte) error {
	m, err := sensors.ParseControl(line)
	if err != nil {
		c.s.reject(c, err.Error(), 0)
		return errEnd
	}
	switch m.Kind {
	case "": // a comment
	case "hello":
		if c.session != "" {
			return errEnd
		}
		c.hello(m.Session)
	case "seq":
		if c.session == "" || m.Seq == 0 {
			return errEnd
		}
		c.next = m.Seq - 1
	default:
		return errEnd // ack and err are ours to say
	}
	return nil
}

// hello starts a numbered connection. A source has one: an older one is a driver
// that died without its socket's knowing.
func (c *ingestConn) hello(session string) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for other := range c.src.conns {
		if other != c && other.session != "" {
			other.stale = true
			other.conn.Close()
		}
	}
	c.s.room.Broadcast() // a stale one may wait there
	c.session = session
	select {
	case c.acks <- struct{}{}:
	default:
	}
}

package tee

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// ReadFrame reads one length-prefixed frame.
func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > MaxFrame {
		return nil, fmt.Errorf("a frame of %d bytes, at most %d", n, MaxFrame)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("a frame was cut off: %w", err)
	}
	return b, nil
}

func writeFrame(w io.Writer, b []byte) error {
	if len(b) > MaxFrame {
		return fmt.Errorf("a frame of %d bytes, at most %d", len(b), MaxFrame)
	}
	out := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b)))
	_, err := w.Write(append(out, b...))
	return err
}

// Socket is a Transport over the keep's Unix socket. It connects when needed and
// forgets a connection that failed; a request is never sent twice. One request
// at a time: a caller that waits long (Take) uses a Socket of its own.
type Socket struct {
	Path string

	mu   sync.Mutex // protects conn and the order of frames on it
	conn net.Conn
}

// Call implements Transport.
func (s *Socket) Call(ctx context.Context, request []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if s.conn == nil {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", s.Path)
		if err != nil {
			return nil, fmt.Errorf("connecting to the keep (is edgekeep-keep running?): %w", err)
		}
		s.conn = conn
	}
	conn := s.conn
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	answer, err := exchange(conn, request)
	if !stop() || err != nil { // a deadline that has been set would fail the next call
		conn.Close()
		s.conn = nil
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("talking to the keep: %w", err)
	}
	return answer, nil
}

func exchange(conn net.Conn, request []byte) ([]byte, error) {
	if err := writeFrame(conn, request); err != nil {
		return nil, err
	}
	return readFrame(conn)
}

// Close closes the connection.
func (s *Socket) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

// ServeConn answers requests on conn until it ends, breaks the framing, or ctx
// ends. A malformed request inside a good frame gets an answer; the connection
// goes on.
func ServeConn(ctx context.Context, conn net.Conn, h Handler) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	for {
		req, err := readFrame(conn)
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading a request: %w", err)
		}
		if err := writeFrame(conn, Serve(ctx, h, req)); err != nil {
			return fmt.Errorf("writing an answer: %w", err)
		}
	}
}

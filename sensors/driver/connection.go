package driver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"

	"edgekeep/sensors"
)

// batchBytes is about how much one write gives to the socket.
const batchBytes = 64 << 10

// protocolError is an answer of the keep after which there is no way on.
type protocolError struct{ what string }

func (e *protocolError) Error() string { return e.what }

// connection lives as long as one connection, and returns why it ended.
func (c *Client) connection(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	hello := sensors.Control{Kind: "hello", Session: c.session}
	if _, err := conn.Write([]byte(hello.String() + "\n")); err != nil {
		return err
	}
	answers := bufio.NewReaderSize(conn, sensors.MaxControl+1)
	ack, err := readAnswer(answers)
	if err == nil {
		err = c.greet(ack)
	}
	if err != nil {
		return err
	}
	reading := make(chan error, 1)
	go func() {
		err := c.readAnswers(answers)
		conn.Close() // ends a write that the keep does not read
		c.hangUp()
		reading <- err
	}()
	writing := c.writeLines(conn)
	conn.Close()
	err = <-reading
	// What the keep said last tells more than the write that failed.
	if fatal := (*protocolError)(nil); writing != nil && !errors.As(err, &fatal) {
		return writing
	}
	return err
}

// readAnswer returns the keep's next answer that is no comment. A line cut short
// by the end of the connection is no answer.
func readAnswer(r *bufio.Reader) (sensors.Control, error) {
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			return sensors.Control{}, &protocolError{fmt.Sprintf("answer of more than %d bytes", sensors.MaxControl)}
		}
		if err != nil {
			return sensors.Control{}, err
		}
		answer, err := sensors.ParseControl(line[:len(line)-1])
		if err != nil {
			return sensors.Control{}, &protocolError{"answer: " + err.Error()}
		}
		if answer.Kind != "" {
			return answer, nil
		}
	}
}

// greet takes the answer to hello, and with it the place to go on from.
func (c *Client) greet(ack sensors.Control) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ack.Kind != "ack" {
		return &protocolError{"hello was answered with #" + ack.Kind}
	}
	if !c.greeted {
		c.greeted, c.origin = true, ack.Seq
	} else {
		c.stats.Reconnects++
	}
	if err := c.acked(ack); err != nil {
		return err
	}
	c.cursor, c.next, c.down = c.head, 0, false
	c.cond.Broadcast()
	return nil
}

func (c *Client) readAnswers(r *bufio.Reader) error {
	for {
		answer, err := readAnswer(r)
		if err != nil {
			return err
		}
		if err := c.answered(answer); err != nil {
			return err
		}
	}
}

func (c *Client) answered(answer sensors.Control) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch answer.Kind {
	case "ack":
		return c.acked(answer)
	case "err":
		return c.refused(answer.Seq)
	}
	return &protocolError{"unexpected #" + answer.Kind}
}

// acked drops what the keep has consumed. An ack below that is old news.
func (c *Client) acked(ack sensors.Control) error {
	if ack.Session != c.session {
		return &protocolError{"acknowledgement for the session " + ack.Session}
	}
	if ack.Seq > c.origin+c.written {
		return &protocolError{fmt.Sprintf("line %d is acknowledged, %d was the last one sent; use a new session name",
			ack.Seq, c.origin+c.written)}
	}
	for c.origin+c.head < ack.Seq {
		c.drop()
	}
	c.cond.Broadcast()
	return nil
}

func (c *Client) drop() {
	line := c.queue[0]
	c.queue[0] = queued{}
	c.queue = c.queue[1:]
	c.head++
	c.bytes -= len(line.line) + 1
	if line.rejected {
		c.stats.Rejected++
		return
	}
	c.stats.Acked++
	c.stats.Readings += uint64(line.readings)
}

func (c *Client) refused(seq uint64) error {
	if seq > c.origin+c.written {
		return &protocolError{fmt.Sprintf("line %d is rejected, %d was the last one sent", seq, c.origin+c.written)}
	}
	if first := c.origin + c.head + 1; seq >= first {
		c.queue[seq-first].rejected = true
	}
	return nil
}

func (c *Client) hangUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = true
	c.cond.Broadcast()
}

func (c *Client) writeLines(conn net.Conn) error {
	buf := make([]byte, 0, batchBytes+sensors.MaxLine+64)
	for {
		buf = c.batch(buf[:0])
		if len(buf) == 0 {
			return nil
		}
		if _, err := conn.Write(buf); err != nil {
			return err
		}
	}
}

// batch waits for lines to write and appends some of them to buf, none when the
// keep is gone. They count as sent from here on: the keep may acknowledge them
// before the write returns.
func (c *Client) batch(buf []byte) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.down && max(c.cursor, c.head) == c.head+uint64(len(c.queue)) {
		c.cond.Wait()
	}
	if c.down {
		return buf
	}
	// The keep may have finished lines of an earlier connection meanwhile.
	c.cursor = max(c.cursor, c.head)
	if number := c.origin + 1 + c.cursor; number != c.next {
		buf = append(buf, "#seq "...)
		buf = append(strconv.AppendUint(buf, number, 10), '\n')
		c.next = number
	}
	for _, q := range c.queue[c.cursor-c.head:] {
		if len(buf) >= batchBytes {
			break
		}
		buf = append(append(buf, q.line...), '\n')
		c.cursor++
		c.next++
	}
	c.written = max(c.written, c.cursor)
	return buf
}

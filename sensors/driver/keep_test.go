package driver

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/sensors"
)

// life is one run of the fake keep, from one connection to its crash. What a
// crash destroys is everything that was not committed.
type life struct {
	deaf       bool // crash before reading anything
	crashHello int  // -1: no; else crash after writing so many bytes of the first answer
	lines      int  // crash after reading so many lines; -1: never
	group      int  // commit in groups of so many lines
	ackEvery   int  // ack every so many commits
	cutAck     int  // -1: no; else write so many bytes of the last ack before the crash
}

var healthy = life{crashHello: -1, lines: -1, group: 3, ackEvery: 1, cutAck: -1}

// fakeKeep keeps one session. It writes down what is committed, and every
// departure from the protocol that it sees.
type fakeKeep struct {
	socket    string
	session   string
	reject    func(line string) bool
	committed []string // in order; index+1 is the number
	rejected  map[uint64]bool
}

// serve goes through the lives, one connection each, and then lives healthily
// until the listener is closed by stop.
func (k *fakeKeep) serve(lives []life, stop <-chan struct{}) error {
	for i := 0; ; i++ {
		l := healthy
		if i < len(lives) {
			l = lives[i]
		}
		again, err := k.listenOnce(l, stop)
		if err != nil || !again {
			return err
		}
	}
}

func (k *fakeKeep) listenOnce(l life, stop <-chan struct{}) (again bool, err error) {
	listener, err := net.Listen("unix", k.socket)
	if err != nil {
		return false, err
	}
	defer listener.Close()
	done := make(chan struct{})
	defer close(done)
	conns := make(chan net.Conn, 1)
	go func() {
		select {
		case <-stop:
			listener.Close()
			select {
			case c := <-conns:
				c.Close()
			case <-done:
			}
		case <-done:
		}
	}()
	conn, err := listener.Accept()
	if err != nil {
		return false, nil // stopped
	}
	defer conn.Close()
	conns <- conn
	err = k.live(l, conn)
	select {
	case <-stop:
		return false, err
	default:
		return true, err
	}
}

// live returns nil for a crash or the end of the connection, an error for a
// client that broke the protocol.
func (k *fakeKeep) live(l life, conn net.Conn) error {
	if l.deaf {
		return nil
	}
	lines := bufio.NewReader(conn)
	hello, err := lines.ReadString('\n')
	if err != nil {
		return nil //nolint:nilerr // the driver went away: the next life
	}
	if want := "#hello 1 " + k.session + "\n"; hello != want {
		return fmt.Errorf("first line %q, want %q", hello, want)
	}
	answer := k.ack()
	if l.crashHello >= 0 {
		_, _ = conn.Write([]byte(answer[:min(l.crashHello, len(answer))]))
		return nil
	}
	_, _ = conn.Write([]byte(answer))
	var pending []string
	next, commits := uint64(0), 0
	for read := 0; read != l.lines; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return nil //nolint:nilerr // the driver went away: the next life
		}
		line = strings.TrimSuffix(line, "\n")
		if line[0] == '#' {
			c, err := sensors.ParseControl([]byte(line))
			if err != nil || c.Kind != "seq" {
				return fmt.Errorf("%q where only #seq may be: %w", line, err)
			}
			next = c.Seq
			continue
		}
		read++
		number := next
		next++
		have := uint64(len(k.committed) + len(pending))
		switch {
		case number == 0:
			return errors.New("a line before #seq")
		case number <= have:
			if want := append(k.committed, pending...)[number-1]; line != want {
				return fmt.Errorf("line %d was %q and is %q now", number, want, line)
			}
			continue
		case number > have+1:
			return fmt.Errorf("gap: line %d after %d", number, have)
		}
		pending = append(pending, line)
		if len(pending) < l.group && lines.Buffered() > 0 {
			continue
		}
		for _, p := range pending {
			k.committed = append(k.committed, p)
			if number := uint64(len(k.committed)); k.reject != nil && k.reject(p) {
				k.rejected[number] = true
				fmt.Fprintf(conn, "# a comment\n%s\n", sensors.Control{Kind: "err", Seq: number, Reason: "by the test"})
			}
		}
		pending = nil
		if commits++; commits%l.ackEvery == 0 || lines.Buffered() == 0 {
			_, _ = conn.Write([]byte(k.ack()))
		}
	}
	if ack := k.ack(); l.cutAck >= 0 {
		_, _ = conn.Write([]byte(ack[:min(l.cutAck, len(ack)-1)]))
	}
	return nil
}

func (k *fakeKeep) ack() string {
	return sensors.Control{Kind: "ack", Session: k.session, Seq: uint64(len(k.committed))}.String() + "\n"
}

// script is a keep that says and expects exact bytes: "<" lines are expected
// from the driver, ">" lines are answered, "!" ends the connection. It returns
// when the script is through, with the last connection still open.
func script(listener net.Listener, steps []string) (net.Conn, error) {
	var conn net.Conn
	var lines *bufio.Reader
	for _, step := range steps {
		if step == "!" {
			conn.Close()
			conn = nil
			continue
		}
		if conn == nil {
			var err error
			if conn, err = listener.Accept(); err != nil {
				return nil, err
			}
			_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
			lines = bufio.NewReader(conn)
		}
		if step[0] == '>' {
			if _, err := conn.Write([]byte(step[1:])); err != nil {
				return conn, err
			}
			continue
		}
		got, err := lines.ReadString('\n')
		if got != step[1:]+"\n" {
			return conn, fmt.Errorf("got %q, %w; want %q", got, err, step[1:])
		}
	}
	return conn, nil
}

func listen(t *testing.T) (string, net.Listener) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ek")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return socket, listener
}

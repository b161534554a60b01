package rig

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"edgekeep/agent"
)

// writer is a driver's connection, written to by the test.
type writer struct {
	b    *bench
	conn net.Conn
	in   *bufio.Reader
}

// writer connects as the user of a source.
func (b *bench) writer(g *Gateway, source string) *writer {
	b.t.Helper()
	for i, s := range g.Sources {
		if s == source {
			return b.writerAs(g, g.uid(i))
		}
	}
	b.t.Fatalf("no source %q", source)
	return nil
}

func (b *bench) writerAs(g *Gateway, uid int) *writer {
	b.t.Helper()
	conn, err := dialAs(b.ctx, uid, g.Ingest())
	b.must(err)
	b.t.Cleanup(func() { conn.Close() })
	if deadline, ok := b.ctx.Deadline(); ok {
		b.must(conn.SetDeadline(deadline))
	}
	return &writer{b: b, conn: conn, in: bufio.NewReader(conn)}
}

// dialAs connects as another user: Linux takes a peer's user from the thread
// that connects. The thread is not used for anything else afterwards.
func dialAs(ctx context.Context, uid int, path string) (net.Conn, error) {
	if uid == os.Getuid() {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		keep := ^uintptr(0)
		if _, _, no := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, uintptr(uid), keep); no != 0 {
			done <- result{nil, no}
			return
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

func (w *writer) lines(lines ...string) {
	w.b.t.Helper()
	_, err := io.WriteString(w.conn, strings.Join(lines, "\n")+"\n")
	w.b.must(err)
}

// answer checks the next line that the keep writes.
func (w *writer) answer(prefix string) {
	w.b.t.Helper()
	line, err := w.in.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, prefix) {
		w.b.t.Errorf("the keep writes %q (%v), want %q", line, err, prefix)
	}
}

// ended checks that the keep closes the connection and writes nothing before.
func (w *writer) ended(what string) {
	w.b.t.Helper()
	rest, err := io.ReadAll(w.in)
	if len(rest) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		w.b.t.Errorf("%s: the keep wrote %q (%v), want the end of the connection", what, rest, err)
	}
}

// TestIngest gives the keep what a broken or an evil driver would. The good
// lines arrive, the others are counted, and nobody else is disturbed.
func TestIngest(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("drivers of several users need root")
	}
	b, g := up(t, time.Minute, Options{}, "machine", "other")
	other := b.writer(g, "other")
	other.lines("calm v=1i 1")

	// As `socat` writes: no hello, no numbers, no answer.
	w := b.writer(g, "machine")
	w.lines("m v=1i 1", "", "# a comment", "m v=2i 2")
	w.lines(
		"no fields 3",
		"m v=NaN 3",
		"m v=1i,v=2i 3",
		"m v=\"a\x00b\" 3",
		"m\x00 v=1i 3",
		"\xff\xfe v=1i 3",
		"m v=\""+strings.Repeat("x", 10_000)+"\" 3",
		strings.Repeat("y", 300_000),
		"m v=1i 99999999999999999999",
	)
	w.lines("m v=3i 3")
	s := b.status(g, "nine rejected lines", func(s agent.Status) bool { return s.Rejected == 9 })
	for _, src := range s.Sources {
		if src["name"] == "machine" && (src["rejected"] != 9.0 || src["last_error"] == "") || src["name"] == "other" && src["rejected"] != 0.0 {
			t.Errorf("the agent says of a source %v", src)
		}
	}
	if strings.Contains(s.Sources[0]["last_error"].(string), "99999") {
		t.Errorf("the reason holds a piece of the line: %v", s.Sources[0]["last_error"])
	}

	// A user who is no source, and a source with too many connections.
	b.writerAs(g, SourceUID+17).ended("an unknown user")
	several := []*writer{w}
	for i := range 3 {
		w := b.writer(g, "machine")
		several = append(several, w)
		w.lines("m v=" + string(rune('4'+i)) + "i " + string(rune('4'+i)))
		b.status(g, "another line", func(s agent.Status) bool { return s.Readings == uint64(5+i) })
	}
	b.writer(g, "machine").ended("a fifth connection")
	b.status(g, "two connections turned away", func(s agent.Status) bool { return s.TurnedAway == 2 })
	for _, w := range several {
		w.conn.Close()
	}
	b.takeover(g)
	other.lines("calm v=2i 2")

	r := b.read(g, "machine")
	r.upTo(9)
	o := b.read(g, "other")
	o.upTo(2)
	r.all(g)
	o.all(g)
	for i, x := range r.got {
		if x.Name != "m/v" || x.Value != int64(i+1) || x.Time != int64(i+1) {
			t.Errorf("reading %d is %+v", i, x)
		}
	}
	if len(r.got) != 9 || len(o.got) != 2 {
		t.Errorf("%d and %d readings, want 9 and 2: %v %v", len(r.got), len(o.got), r.got, o.got)
	}
	b.findings(g, nil)
}

// takeover lets a second numbered connection replace the first.
func (b *bench) takeover(g *Gateway) {
	b.t.Helper()
	first := b.writerSoon(g, "#hello 1 s1")
	first.answer("#ack s1 0\n")
	first.lines("#seq 1", "m v=7i 7", "broken")
	first.answer("#err 2 ")
	first.answer("#ack s1 2\n")
	second := b.writerSoon(g, "#hello 1 s1")
	first.ended("a connection that was taken over")
	second.answer("#ack s1 2\n")
	second.lines("#seq 2", "m v=666i 666", "m v=8i 8") // 2 is known already
	second.answer("#ack s1 3\n")
	second.lines("#seq 6", "m v=9i 9") // 4 and 5 are missing
	second.answer("#ack s1 6\n")
	second.lines("#ack s1 7")
	second.ended("a driver that acknowledges")
	s := b.keep(g).Sources[0]
	if s.Repeated != 1 || s.Missing != 2 || s.Rejected != 10 {
		b.t.Errorf("the keep counts %+v", s)
	}
}

// writerSoon connects when the keep has noticed that there is room again.
func (b *bench) writerSoon(g *Gateway, line string) *writer {
	b.t.Helper()
	for {
		w := b.writer(g, "machine")
		if _, err := io.WriteString(w.conn, line+"\n"); err == nil {
			if _, err := w.in.Peek(1); err == nil {
				return w
			}
		}
		w.conn.Close()
		if b.ctx.Err() != nil {
			b.t.Fatal("the keep has no room for a connection")
		}
	}
}

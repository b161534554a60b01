package keep

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"edgekeep/sensors"
	"edgekeep/sensors/driver"
	"edgekeep/tee"
)

// ingest is a keep without a TPM that takes lines on a Unix socket.
type ingest struct {
	t    *testing.T
	k    *Keep
	path string
	stop func() // ends Ingest and waits for it
}

func newIngest(t *testing.T, uid int, s *sealer) *ingest {
	t.Helper()
	cfg := sealerConfig()
	cfg.Sources[0].UID, cfg.Sources[0].Rate, cfg.Flush = uint32(uid), 1<<20, time.Millisecond
	if s == nil {
		s = testSealer(t, cfg)
	}
	dir := must(os.MkdirTemp("", "keep"))(t) // short enough for a socket
	t.Cleanup(func() { os.RemoveAll(dir) })
	i := &ingest{t: t, k: &Keep{cfg: cfg, log: discard, sealer: s}, path: filepath.Join(dir, "s")}
	l := must(net.Listen("unix", i.path))(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.k.Ingest(ctx, l) }()
	stopped := false
	i.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Ingest: %v", err)
		}
	}
	t.Cleanup(i.stop)
	return i
}

// agent confirms chunks until the test ends.
func (i *ingest) agent() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ticket := uint64(0); ; {
			r, err := i.k.sealer.take(ctx, tee.Take{After: ticket, Confirm: ticket, Wait: 60_000})
			if err != nil {
				return
			}
			ticket = r.Chunks[len(r.Chunks)-1].Ticket
		}
	}()
	i.t.Cleanup(func() { cancel(); <-done })
}

// peer is a driver's end of a connection.
type peer struct {
	t *testing.T
	*net.UnixConn
	r *bufio.Reader
}

func (i *ingest) dial() *peer {
	i.t.Helper()
	conn := must(net.Dial("unix", i.path))(i.t).(*net.UnixConn)
	i.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		i.t.Fatal(err)
	}
	return &peer{t: i.t, UnixConn: conn, r: bufio.NewReader(conn)}
}

func (p *peer) say(lines ...string) {
	p.t.Helper()
	if _, err := io.WriteString(p, strings.Join(lines, "\n")+"\n"); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) hears(want string) {
	p.t.Helper()
	got, err := p.r.ReadString('\n')
	if err != nil || got != want+"\n" {
		p.t.Fatalf("%q, %v; want %q", got, err, want)
	}
}

// acked reads acknowledgements up to one.
func (p *peer) acked(session string, want uint64) {
	p.t.Helper()
	for last := uint64(0); last < want; {
		text, err := p.r.ReadString('\n')
		if err != nil {
			p.t.Fatal(err)
		}
		c := must(sensors.ParseControl([]byte(strings.TrimSuffix(text, "\n"))))(p.t)
		if c.Kind != "ack" || c.Session != session || c.Seq <= last || c.Seq > want {
			p.t.Fatalf("%q on the way from %d to %d", text, last, want)
		}
		last = c.Seq
	}
}

// ends reads to the end of the connection and returns what was left.
func (p *peer) ends() string {
	p.t.Helper()
	rest, err := io.ReadAll(p.r)
	if nerr := net.Error(nil); errors.As(err, &nerr) && nerr.Timeout() {
		p.t.Fatal("the connection does not end")
	}
	return string(rest)
}

func (i *ingest) stats() tee.Source {
	st, _ := i.k.sealer.stats()
	return st[0]
}

func TestDialogue(t *testing.T) {
	i := newIngest(t, os.Getuid(), nil)
	i.agent()
	p := i.dial()
	p.say("# a comment", "#hello 1 x")
	p.hears("#ack x 0")
	p.say("#seq 1", "m v=1i", "", "# a comment", "m v=2i")
	p.acked("x", 2)
	p.say("m v=", "m v=4i")
	p.hears("#err 3 line refused at byte 4: malformed field")
	p.acked("x", 4)
	p.say("#seq 9", "m v=9i")
	p.acked("x", 9)
	p.say("m v=10i", "m v=11i") // and the last line is cut off
	if _, err := io.WriteString(p, "m v=12i"); err != nil {
		t.Fatal(err)
	}
	if err := p.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	p.ends()

	q := i.dial()
	q.say("#hello 1 x")
	q.hears("#ack x 11")
	q.say("#seq 10", "m v=10i", "m v=11i", "m v=12i")
	q.hears("#ack x 12")
	if st := i.stats(); st.Lines != 7 || st.Rejected != 1 || st.Missing != 4 || st.Repeated != 2 {
		t.Errorf("%+v", st)
	}
	other := i.dial()
	other.say("#hello 1 y")
	other.hears("#ack y 0")
	q.ends() // a source has one numbered connection
}

func TestLongLines(t *testing.T) {
	i := newIngest(t, os.Getuid(), nil)
	i.agent()
	p := i.dial()
	p.say("#hello 1 x")
	p.hears("#ack x 0")
	fits := `m v="` + strings.Repeat("x", sensors.MaxLine-6) + `"`
	p.say("#seq 1", fits, "x"+fits, strings.Repeat("x", 100_000), "#"+strings.Repeat("c", 100_000), "m v=5i")
	for n := 2; n <= 4; n++ {
		for text := ""; !strings.HasPrefix(text, "#err"); { // acknowledgements may come between
			var err error
			if text, err = p.r.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("#err %d longer than 8192 bytes\n", n); strings.HasPrefix(text, "#err") && text != want {
				t.Errorf("%q, want %q", text, want)
			}
		}
	}
	p.acked("x", 5)
	if st := i.stats(); st.Lines != 2 || st.Rejected != 3 || strings.Contains(st.LastError, "xx") {
		t.Errorf("%+v", st)
	}
}

func TestMalformedControl(t *testing.T) {
	i := newIngest(t, os.Getuid(), nil)
	for _, text := range []string{
		"#hello 2 x", "#hello 1 ", "#hello 1 x y", "#hello", "#seq 1", "#ack x 1", "#err 1 no",
		"#hello 1 x\n#hello 1 x", "#hello 1 x\n#seq 0", "#hello 1 x\n#seq 01", "#hello 1 x\n#seq 9223372036854775808", "#hello 1 x\n#ack x 0",
	} {
		p := i.dial()
		p.say(text)
		if rest := p.ends(); rest != "" && rest != "#ack x 0\n" {
			t.Errorf("%q is answered with %q", text, rest)
		}
	}
	if st := i.stats(); st.Lines != 0 {
		t.Errorf("%+v", st)
	}
}

// A source that only sends is never written to.
func TestPlainLines(t *testing.T) {
	i := newIngest(t, os.Getuid(), nil)
	i.agent()
	p := i.dial()
	p.say("m v=1i", "malformed", strings.Repeat("x", 9000), "# comment", "m v=2i")
	if err := p.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest := p.ends(); rest != "" {
		t.Errorf("it is told %q", rest)
	}
	if st := i.stats(); st.Lines != 2 || st.Rejected != 2 || st.Missing != 0 {
		t.Errorf("%+v", st)
	}
}

func TestTurnedAway(t *testing.T) {
	i := newIngest(t, os.Getuid()+1, nil)
	p := i.dial()
	if rest := p.ends(); rest != "" {
		t.Errorf("another user is told %q", rest)
	}
	if _, n := i.k.sealer.stats(); n != 1 {
		t.Errorf("%d were turned away", n)
	}

	i = newIngest(t, os.Getuid(), nil)
	i.agent()
	var peers []*peer
	for range maxConns {
		peers = append(peers, i.dial())
	}
	if rest := i.dial().ends(); rest != "" {
		t.Errorf("one too many is told %q", rest)
	}
	if _, n := i.k.sealer.stats(); n != 1 {
		t.Errorf("%d were turned away", n)
	}
	peers[3].say("#hello 1 x") // the others live
	peers[3].hears("#ack x 0")
	peers[0].say("m v=1i")
	_ = peers[0].CloseWrite()
	peers[0].ends()
	if st := i.stats(); st.Lines != 1 {
		t.Errorf("%+v", st)
	}
	// Its place is free again, at the latest a moment later.
	for greeted := false; !greeted; {
		p := i.dial()
		_, _ = io.WriteString(p, "#hello 1 y\n")
		text, _ := p.r.ReadString('\n')
		greeted = text == "#ack y 0\n"
	}
	peers[3].ends() // x was taken over
	a, b := net.Pipe()
	defer b.Close()
	defer a.Close()
	if _, err := i.k.admit(a); err == nil {
		t.Error("admitted without a user")
	}
}

// What has been read when the keep is told to stop is sealed when Ingest returns.
func TestIngestDrains(t *testing.T) {
	for range 20 {
		cfg := sealerConfig()
		cfg.Sources[0].UID = uint32(os.Getuid())
		s := testSealer(t, cfg)
		i := newIngest(t, os.Getuid(), s)
		p := i.dial()
		p.say("#hello 1 x")
		p.hears("#ack x 0")
		p.say("m v=1i", "malformed")
		p.hears(`#err 2 line refused at byte 9: malformed tag`) // both have been read
		i.stop()
		s.mu.Lock()
		n, waits := s.sources[uint32(os.Getuid())].stats.Readings, s.sources[uint32(os.Getuid())].pack.Readings()
		s.mu.Unlock()
		if n != 1 || waits != 0 {
			t.Fatalf("%d readings are sealed, %d wait", n, waits)
		}
	}
}

// A listener that fails ends Ingest with an error, and nobody is left behind.
func TestIngestListenerFails(t *testing.T) {
	k := &Keep{cfg: sealerConfig(), log: discard, sealer: testSealer(t, sealerConfig())}
	dir := must(os.MkdirTemp("", "keep"))(t)
	defer os.RemoveAll(dir)
	l := must(net.Listen("unix", filepath.Join(dir, "s")))(t)
	l.Close()
	if err := k.Ingest(t.Context(), l); err == nil || !strings.Contains(err.Error(), "accepting drivers") {
		t.Errorf("%v", err)
	}
}

func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSealer(t, sealerConfig())
		c := connect(s, 1, "")
		c.bucket, c.filled = c.src.cfg.Rate, time.Now()
		begin := time.Now()
		for range 35 {
			if !c.pace(t.Context()) {
				t.Fatal("it ends")
			}
		}
		if d := time.Since(begin); d != 3*time.Second {
			t.Errorf("35 lines at 10 a second take %v", d)
		}
		time.Sleep(time.Hour) // silence saves up no more than one second's lines
		begin = time.Now()
		for range 26 {
			c.pace(t.Context())
		}
		if d := time.Since(begin); d != 2*time.Second {
			t.Errorf("26 lines after silence take %v", d)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		c.bucket, c.filled = 0, time.Now()
		if c.pace(ctx) {
			t.Error("it waits although everything ends")
		}
	})
}

// The driver of package sensors/driver, through keeps that are killed and
// succeeded in the middle: each line is durable once, in order.
func TestDriverThroughKeeps(t *testing.T) {
	const lines = 400
	dir := must(os.MkdirTemp("", "keep"))(t)
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	c := driver.NewClient(socket, "x")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()

	w := newWorld(t)
	var got []uint64
	live := func(killAfter int) { // chunks
		w.s.sources = map[uint32]*source{uint32(os.Getuid()): w.s.sources[1]}
		w.s.sources[uint32(os.Getuid())].cfg.Rate = 1 << 20
		w.s.cfg.Flush = time.Millisecond
		k := &Keep{cfg: w.s.cfg, log: discard, sealer: w.s}
		l := must(net.Listen("unix", socket))(t)
		kctx, kill := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- k.Ingest(kctx, l) }()
		for n := 0; n < killAfter && uint64(len(got)) < lines; n++ {
			r, err := w.s.take(ctx, tee.Take{After: w.done, Confirm: w.done, Wait: 10_000})
			if err != nil {
				t.Fatal(err)
			}
			for _, chunk := range r.Chunks {
				w.durable, w.keys, w.done = append(w.durable, chunk), append(w.keys, &w.s.key.PublicKey), chunk.Ticket
				got = append(got, w.lines(w.opened, chunk, &w.s.key.PublicKey)...)
			}
		}
		if uint64(len(got)) >= lines {
			if _, err := w.s.take(ctx, tee.Take{After: w.done, Confirm: w.done}); err != nil {
				t.Fatal(err)
			}
			if err := c.Flush(ctx); err != nil {
				t.Error(err)
			}
		}
		kill()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	go func() {
		for n := range lines {
			if c.Send(ctx, fmt.Appendf(nil, "m v=%di", n+1)) != nil {
				return
			}
			if n%8 == 7 && c.Flush(ctx) != nil { // so that there are chunks enough to die between
				return
			}
		}
	}()
	for n := 2; uint64(len(got)) < lines && ctx.Err() == nil; n++ {
		live(n)
		w.newKeep(epochID(w.epoch))
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	var want []uint64
	for n := range uint64(lines) {
		want = append(want, n+1)
	}
	if !slices.Equal(got, want) {
		t.Errorf("durable are %d lines: %v", len(got), got)
	}
	if s := c.Stats(); s.Acked != lines || s.Rejected != 0 {
		t.Errorf("%+v after %d keeps", s, w.epoch)
	}
	if w.epoch < 5 {
		t.Errorf("only %d keeps", w.epoch)
	}
}

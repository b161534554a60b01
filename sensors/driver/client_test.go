package driver

import (
	"context"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/sensors"
)

func newTestClient(socket, session string) *Client {
	c := NewClient(socket, session)
	c.minBackoff = time.Millisecond
	return c
}

// start runs c until the test ends; what Run returned comes from the channel.
func start(t *testing.T, c *Client) (context.Context, <-chan error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	result := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		result <- c.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return ctx, result
}

func TestExactlyOnceWhateverCrashes(t *testing.T) {
	drawLife := rapid.Custom(func(t *rapid.T) life {
		return life{
			deaf:       rapid.IntRange(0, 4).Draw(t, "deaf") == 0,
			crashHello: max(-1, rapid.IntRange(-60, 12).Draw(t, "crash in hello")),
			lines:      rapid.IntRange(0, 60).Draw(t, "lines"),
			group:      rapid.IntRange(1, 10).Draw(t, "group"),
			ackEvery:   rapid.IntRange(1, 5).Draw(t, "ack every"),
			cutAck:     rapid.IntRange(-1, 12).Draw(t, "cut ack"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		lives := rapid.SliceOfN(drawLife, 0, 8).Draw(t, "lives")
		total := rapid.IntRange(1, 150).Draw(t, "total")
		earlier := rapid.IntRange(0, 20).Draw(t, "lines of an earlier run")
		if err := crashes(lives, earlier, total); err != nil {
			t.Fatal(err)
		}
	})
}

func crashes(lives []life, earlier, total int) error {
	dir, err := os.MkdirTemp("", "ek")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var want []string
	for i := range earlier + total {
		want = append(want, fmt.Sprintf("m,pad=%s f=%di", strings.Repeat("x", i*7%97+1), i))
	}
	k := &fakeKeep{
		socket: filepath.Join(dir, "s"), session: "s", rejected: map[uint64]bool{},
		reject:    func(line string) bool { return strings.HasSuffix(line, "3i") },
		committed: append([]string(nil), want[:earlier]...),
	}
	stop, served := make(chan struct{}), make(chan error, 1)
	go func() { served <- k.serve(lives, stop) }()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c := newTestClient(k.socket, "s")
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	resumed, err := c.Resume(ctx)
	if err == nil && resumed != uint64(earlier) {
		err = fmt.Errorf("resumed at %d, want %d", resumed, earlier)
	}
	for i := earlier; i < len(want) && err == nil; i++ {
		err = c.Send(ctx, []byte(want[i]))
	}
	if err == nil {
		err = c.Flush(ctx)
	}
	cancel()
	close(stop)
	if err := errors.Join(err, <-ran, <-served); err != nil {
		return err
	}
	if !reflect.DeepEqual(k.committed, want) {
		return fmt.Errorf("committed %d lines, want %d:\n%v", len(k.committed), len(want), k.committed)
	}
	s := c.Stats()
	if s.Sent != uint64(total) || s.Acked+s.Rejected != s.Sent || s.Readings != s.Acked ||
		s.Rejected > uint64(len(k.rejected)) || len(lives) == 0 && s.Rejected != uint64(len(k.rejected)) {
		return fmt.Errorf("%d lines sent, %d rejected, and the stats are %+v", total, len(k.rejected), s)
	}
	return nil
}

// The example in the package comment, run: our side of it against a keep that
// says what is written there.
func TestExampleOfThePackageComment(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../doc.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var steps, lines []string
	for line := range strings.Lines(file.Doc.Text()) {
		line = strings.TrimSpace(line)
		if text, ok := strings.CutPrefix(line, "driver: "); ok {
			steps = append(steps, "<"+text)
			if text[0] != '#' {
				lines = append(lines, text)
			}
		} else if text, ok := strings.CutPrefix(line, "keep:   "); ok && text == "(restarts)" {
			steps = append(steps, "!")
		} else if ok {
			steps = append(steps, ">"+text+"\n")
		}
	}
	if len(lines) != 3 {
		t.Fatalf("the example has %d readings: %q", len(lines), steps)
	}
	socket, listener := listen(t)
	c := newTestClient(socket, "hall-7")
	ctx, _ := start(t, c)
	scripted := make(chan error, 1)
	go func() {
		conn, err := script(listener, steps)
		scripted <- err
		<-ctx.Done()
		conn.Close()
	}()
	send := func(line string) {
		t.Helper()
		if _, err := sensors.ParseLine([]byte(line)); err != nil {
			t.Error(err)
		}
		if err := c.Send(ctx, []byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	send(lines[0])
	send(lines[1])
	if err := c.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	for c.Stats().Reconnects == 0 { // the restart comes before the third line
		runtime.Gosched()
	}
	send(lines[2])
	if err := errors.Join(c.Flush(ctx), <-scripted); err != nil {
		t.Fatal(err)
	}
	if got, want := c.Stats(), (Stats{Sent: 3, Acked: 2, Rejected: 1, Readings: 2, Reconnects: 1}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestWindow(t *testing.T) {
	for class, size := range map[string]int{"lines": 1, "bytes": sensors.MaxLine} {
		t.Run(class, func(t *testing.T) {
			fits := min(maxWindowLines, maxWindowBytes/(size+1))
			socket, listener := listen(t)
			c := newTestClient(socket, "s")
			line := []byte(strings.Repeat("x", size))
			for range fits {
				if err := c.Send(t.Context(), line); err != nil {
					t.Fatal(err)
				}
			}
			full, cancel := context.WithCancel(t.Context())
			cancel()
			if err := c.Send(full, line); !errors.Is(err, context.Canceled) {
				t.Fatalf("line %d: %v", fits+1, err)
			}
			blocked := make(chan error, 1)
			go func() { blocked <- c.Send(t.Context(), line) }()
			ctx, _ := start(t, c)
			go func() {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				k := &fakeKeep{session: "s"}
				if err := k.live(healthy, conn); err != nil {
					t.Error(err)
				}
			}()
			if err := errors.Join(<-blocked, c.Flush(ctx)); err != nil {
				t.Fatal(err)
			}
			if s := c.Stats(); s.Acked != uint64(fits+1) || s.Readings != 0 || c.bytes != 0 || len(c.queue) != 0 {
				t.Errorf("%+v, %d bytes and %d lines left", s, c.bytes, len(c.queue))
			}
		})
	}
}

func TestSendRefuses(t *testing.T) {
	c := NewClient("", "s")
	for _, line := range []string{"", "#seq 5", "m f=1\n", "m f=1\n#seq 9", strings.Repeat("x", sensors.MaxLine+1)} {
		if err := c.Send(t.Context(), []byte(line)); err == nil {
			t.Errorf("took %.20q", line)
		}
	}
}

func TestRunEnds(t *testing.T) {
	for _, session := range []string{"", "a b", "a\n#seq 7", strings.Repeat("a", 33)} {
		if err := NewClient("", session).Run(t.Context()); err == nil {
			t.Errorf("session %q was taken", session)
		}
	}
	c := newTestClient(filepath.Join(t.TempDir(), "absent"), "s")
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	for {
		c.mu.Lock()
		failed := c.lastErr != nil
		c.mu.Unlock()
		if failed {
			break
		}
		runtime.Gosched()
	}
	// A caller who gives up learns why there was no answer.
	short, cancelShort := context.WithCancel(ctx)
	cancelShort()
	if _, err := c.Resume(short); !errors.Is(err, context.Canceled) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Resume: %v", err)
	}
	cancel()
	if err := <-ran; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := c.Resume(t.Context()); err == nil {
		t.Error("Resume after the end of Run")
	}
	if err := c.Send(t.Context(), []byte("m f=1")); err == nil {
		t.Error("Send after the end of Run")
	}
}

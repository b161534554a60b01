package driver

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"testing"

	"edgekeep/sensors"
)

func TestAnswers(t *testing.T) {
	hello := "<#hello 1 s"
	for class, tt := range map[string]struct {
		steps []string
		want  string // in the error of Run; "" is: the two lines arrive
	}{
		"fresh":               {[]string{hello, ">#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", ">#ack s 1\n#ack s 2\n"}, ""},
		"resumed":             {[]string{hello, ">#ack s 40\n", "<#seq 41", "<m f=1", "<m f=2", ">#ack s 42\n"}, ""},
		"old acks again":      {[]string{hello, ">#ack s 40\n", "<#seq 41", "<m f=1", "<m f=2", ">#ack s 7\n#ack s 42\n"}, ""},
		"comments":            {[]string{hello, "># hi\n#\n#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", ">#x\n#ack s 2\n"}, ""},
		"ack without its end": {[]string{hello, ">#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", ">#ack s 2", "!", hello, ">#ack s 1\n", "<#seq 2", "<m f=2", ">#ack s 2\n"}, ""},
		"first ack cut":       {[]string{hello, ">#ack s 10", "!", hello, ">#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", ">#ack s 2\n"}, ""},
		"late ack of an earlier connection": {[]string{
			hello, ">#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", "!",
			hello, ">#ack s 0\n#ack s 2\n",
		}, ""},
		"keep forgot everything": {[]string{
			hello, ">#ack s 40\n", "<#seq 41", "<m f=1", "<m f=2", ">#ack s 41\n", "!",
			hello, ">#ack s 0\n", "<#seq 42", "<m f=2", ">#ack s 42\n",
		}, ""},
		"keep went back": {[]string{
			hello, ">#ack s 40\n", "<#seq 41", "<m f=1", "<m f=2", ">#ack s 41\n", "!",
			hello, ">#ack s 40\n", "<#seq 42", "<m f=2", ">#ack s 42\n",
		}, ""},
		"ack above what was sent":     {[]string{hello, ">#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", ">#ack s 3\n"}, "line 3 is acknowledged"},
		"hello ack above what was":    {[]string{hello, ">#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", "!", hello, ">#ack s 3\n"}, "line 3 is acknowledged"},
		"err above what was sent":     {[]string{hello, ">#ack s 0\n", "<#seq 1", "<m f=1", "<m f=2", ">#err 3 x\n"}, "line 3 is rejected"},
		"another session":             {[]string{hello, ">#ack other 0\n"}, "session other"},
		"another session later":       {[]string{hello, ">#ack s 0\n", "<#seq 1", ">#ack other 1\n"}, "session other"},
		"no ack first":                {[]string{hello, ">#err 1 x\n"}, "answered with #err"},
		"a driver at the other end":   {[]string{hello, ">#hello 1 s\n"}, "answered with #hello"},
		"seq from the keep":           {[]string{hello, ">#ack s 0\n", "<#seq 1", ">#seq 5\n"}, "unexpected #seq"},
		"malformed":                   {[]string{hello, ">#ack s 007\n"}, "malformed #ack"},
		"a number of 64 bits":         {[]string{hello, ">#ack s 18446744073709551615\n"}, "malformed #ack"},
		"a reading from the keep":     {[]string{hello, ">m f=1\n"}, "no control line"},
		"http":                        {[]string{hello, ">HTTP/1.1 400 Bad Request\r\n"}, "no control line"},
		"an answer that does not end": {[]string{hello, ">" + strings.Repeat("#", 600)}, "more than 512 bytes"},
	} {
		t.Run(class, func(t *testing.T) {
			socket, listener := listen(t)
			c := newTestClient(socket, "s")
			ctx, ran := start(t, c)
			scripted := make(chan error, 1)
			go func() {
				conn, err := script(listener, tt.steps)
				scripted <- err
				<-ctx.Done()
				conn.Close()
			}()
			sent := errors.Join(c.Send(ctx, []byte("m f=1")), c.Send(ctx, []byte("m f=2")))
			flushed := c.Flush(ctx)
			if tt.want == "" {
				if err := errors.Join(sent, flushed, <-scripted); err != nil {
					t.Fatal(err)
				}
				return
			}
			err := <-ran
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("Run returned %v, want ...%s...", err, tt.want)
			}
			if sent == nil && !errors.Is(flushed, c.ended) {
				t.Errorf("Flush: %v", flushed)
			}
			if err := c.Send(ctx, []byte("m f=3")); !errors.Is(err, c.ended) {
				t.Errorf("Send after the end: %v", err)
			}
		})
	}
}

// The keep may finish lines of an earlier connection after it has answered the
// hello of the next one: what is written then is numbered anew.
func TestLateAck(t *testing.T) {
	c := NewClient("", "s")
	ack := func(seq uint64) sensors.Control { return sensors.Control{Kind: "ack", Session: "s", Seq: seq} }
	pad := strings.Repeat("x", sensors.MaxLine-len(" f=000"))
	const perBatch = 8 // lines of this size
	var lines []string
	for i := range 3 * perBatch {
		lines = append(lines, fmt.Sprintf("%s f=%03d", pad, i))
		if err := c.Send(t.Context(), []byte(lines[i])); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		what string
		do   func() error
		from int // the lines that are written next
		seq  string
	}{
		{"hello", func() error { return c.greet(ack(0)) }, 0, "#seq 1\n"},
		{"nothing", func() error { return nil }, 8, ""},
		{"nothing", func() error { return nil }, 16, ""},
		{"hello again", func() error { return c.greet(ack(0)) }, 0, "#seq 1\n"},
		{"a late ack below what is written here", func() error { return c.acked(ack(5)) }, 8, ""},
		{"a late ack above what is written here", func() error { return c.acked(ack(18)) }, 18, "#seq 19\n"},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		want := step.seq + strings.Join(lines[step.from:min(step.from+perBatch, len(lines))], "\n") + "\n"
		if got := string(c.batch(nil)); got != want {
			t.Fatalf("after %s: got %d bytes %.20q, want %d bytes %.20q", step.what, len(got), got, len(want), want)
		}
	}
}

// A peer that ends its side and reads no more must not hold the client.
func TestHalfClosed(t *testing.T) {
	socket, listener := listen(t)
	c := newTestClient(socket, "s")
	line := []byte(strings.Repeat("x", sensors.MaxLine))
	for range 500 { // more than a socket buffers
		if err := c.Send(t.Context(), line); err != nil {
			t.Fatal(err)
		}
	}
	held := make(chan error, 2)
	go func() {
		conn, err := script(listener, []string{"<#hello 1 s", ">#ack s 0\n", "<#seq 1"})
		if err != nil {
			held <- err
			return
		}
		defer conn.Close()
		for sent, before := uint64(1), uint64(0); sent != before; { // the buffer fills
			before = sent
			for range 10000 {
				runtime.Gosched()
			}
			sent = c.Stats().Sent
		}
		held <- conn.(*net.UnixConn).CloseWrite()
		if conn, err := listener.Accept(); err == nil {
			defer conn.Close()
			k := &fakeKeep{session: "s"}
			held <- k.live(healthy, conn)
		}
	}()
	ctx, _ := start(t, c)
	if err := errors.Join(c.Flush(ctx), <-held); err != nil {
		t.Fatal(err)
	}
}

package tee

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/cose"
)

// direct is a Transport to a handler in the same process, over the bytes of the wire.
type direct struct{ h Handler }

func (d direct) Call(ctx context.Context, request []byte) ([]byte, error) {
	return Serve(ctx, d.h, request), nil
}

type handler func(kind int, body []byte) (any, error)

func (h handler) Handle(_ context.Context, kind int, body []byte) (any, error) { return h(kind, body) }

// echo decodes a request of type R and answers with reply.
func echo[R any](t *testing.T, wantKind int, want R, reply any) Transport {
	return direct{handler(func(kind int, body []byte) (any, error) {
		got, err := Body[R](body)
		if err != nil || kind != wantKind || !reflect.DeepEqual(got, want) {
			t.Errorf("kind %d: %+v, %v; want kind %d: %+v", kind, got, err, wantKind, want)
		}
		return reply, nil
	})}
}

// Every request has its number on the wire, and its reply comes back as it was.
func TestRequests(t *testing.T) {
	ctx := t.Context()
	b := [][]byte{[]byte("x")}
	outcome := Outcome{
		Commit: b[0], Publish: []Message{{Kind: "hello", Data: b[0]}}, Certificate: b, Verdict: b[0], Pull: true,
	}
	check := func(name string, got, want any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	start := Start{State: b[0], Checkpoints: b, Watermarks: b}
	got, err := start.Do(ctx, echo(t, 1, start, outcome))
	check("start", got, outcome, err)
	status := StatusReply{Phase: PhaseNew, EKHash: b[0], TLSKey: b[0], Sources: []Source{{Name: "a", Late: true}}}
	gotStatus, err := Status{}.Do(ctx, echo(t, 2, Status{}, status))
	check("status", gotStatus, status, err)
	take := Take{After: 1, Confirm: 2, Wait: 3}
	chunks := TakeReply{Chunks: []Chunk{{Ticket: 4, Stream: "s", Epoch: b[0], Seq: 5, Head: b[0], Checkpoint: b[0], Data: b[0]}}}
	gotChunks, err := take.Do(ctx, echo(t, 3, take, chunks))
	check("take", gotChunks, chunks, err)
	message := Message{Kind: "pull", Data: b[0]}
	gotMessage, err := Enrol{}.Do(ctx, echo(t, 4, Enrol{}, message))
	check("enrol", gotMessage, message, err)
	gotMessage, err = Pull{}.Do(ctx, echo(t, 5, Pull{}, message))
	check("pull", gotMessage, message, err)
	got, err = Deliver{Item: b[0]}.Do(ctx, echo(t, 6, Deliver{Item: b[0]}, outcome))
	check("deliver", got, outcome, err)
	got, err = Commit{State: b[0]}.Do(ctx, echo(t, 7, Commit{State: b[0]}, outcome))
	check("commit", got, outcome, err)
	watermark := Watermark{Stream: "s", Epoch: b[0], Seq: 1, Head: b[0]}
	gotWatermark, err := CheckWatermark{Message: b[0]}.Do(ctx, echo(t, 8, CheckWatermark{Message: b[0]}, watermark))
	check("watermark", gotWatermark, watermark, err)
	gotSignature, err := SignTLS{Text: b[0]}.Do(ctx, echo(t, 9, SignTLS{Text: b[0]}, Signature{DER: b[0]}))
	check("sign", gotSignature, Signature{DER: b[0]}, err)
	oldest := Oldest{Stream: "s", Epoch: b[0], Seq: 1, Head: b[0]}
	gotMessage, err = oldest.Do(ctx, echo(t, 10, oldest, message))
	check("oldest", gotMessage, message, err)
}

func TestRefusal(t *testing.T) {
	for reason, want := range map[string]string{
		"the keep is locked":        "the keep refuses: the keep is locked",
		"":                          "the keep refuses: unknown error",
		"bytes \xff":                "the keep refuses: bytes \uFFFD",
		strings.Repeat("é", 2000):   "the keep refuses: " + strings.Repeat("é", 1024),
		strings.Repeat("xé\xff", 5): "the keep refuses: " + strings.Repeat("xé\uFFFD", 5),
	} {
		_, err := Pull{}.Do(t.Context(), direct{handler(func(int, []byte) (any, error) { return nil, errors.New(reason) })})
		var refusal *Refusal
		if !errors.As(err, &refusal) || err.Error() != want {
			t.Errorf("%.20q: %.60v", reason, err)
		}
	}
	broken := errors.New("cut")
	_, err := Pull{}.Do(t.Context(), transport(func([]byte) ([]byte, error) { return nil, broken }))
	var refusal *Refusal
	if !errors.Is(err, broken) || errors.As(err, &refusal) {
		t.Errorf("a transport that failed: %v", err)
	}
}

type transport func([]byte) ([]byte, error)

func (f transport) Call(_ context.Context, request []byte) ([]byte, error) { return f(request) }

// What is too large, for a frame or for CBOR, is refused, and brings nobody down.
func TestTooLarge(t *testing.T) {
	for _, over := range []int{0, 9, 10} { // 0: the body fits, and with its kind or its error it does not
		_, err := Deliver{Item: make([]byte, MaxFrame-8+over)}.Do(t.Context(), transport(func(b []byte) ([]byte, error) {
			t.Errorf("sent %d bytes", len(b))
			return nil, errors.New("sent")
		}))
		if err == nil {
			t.Errorf("a request, %d: no error", over)
		}
		_, err = Pull{}.Do(t.Context(), direct{handler(func(int, []byte) (any, error) { return Message{Data: make([]byte, MaxFrame-10+over)}, nil })})
		var refusal *Refusal
		if !errors.As(err, &refusal) {
			t.Errorf("a reply, %d: %v", over, err)
		}
	}
	// The largest body whose frame still fits.
	reply, err := Pull{}.Do(t.Context(), direct{handler(func(int, []byte) (any, error) { return Message{Data: make([]byte, MaxFrame-20)}, nil })})
	if err != nil || len(reply.Data) != MaxFrame-20 {
		t.Errorf("%d bytes, %v", len(reply.Data), err)
	}
}

func TestServeMalformed(t *testing.T) {
	h := handler(func(_ int, body []byte) (any, error) { return Body[Take](body) })
	for name, raw := range map[string][]byte{
		"nothing": nil, "no array": {0x01}, "one element": {0x81, 0x01}, "not canonical": {0x82, 0x18, 0x01, 0xa0},
		"a byte more": {0x82, 0x01, 0xa0, 0x00}, "wrong body": {0x82, 0x03, 0x80},
		"unknown field": cose.MustMarshal([]any{3, map[int]int{1: 0, 2: 0, 3: 0, 4: 0}}),
		"missing field": cose.MustMarshal([]any{3, map[int]int{1: 0}}),
	} {
		var a answer
		if err := cose.Unmarshal(Serve(t.Context(), h, raw), &a); err != nil || a.Error == "" {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
}

func FuzzServe(f *testing.F) {
	f.Add(cose.MustMarshal([]any{3, Take{After: 1, Confirm: 2, Wait: 3}}))
	f.Add(cose.MustMarshal([]any{1, Start{State: []byte("s"), Checkpoints: [][]byte{nil}}}))
	h := handler(func(kind int, body []byte) (any, error) {
		if kind == KindStart {
			return Body[Start](body)
		}
		return Body[Take](body)
	})
	f.Fuzz(func(t *testing.T, raw []byte) {
		var a answer
		if err := cose.Unmarshal(Serve(t.Context(), h, raw), &a); err != nil {
			t.Fatal(err)
		}
		if a.Error == "" && !bytes.Contains(raw, a.Body) {
			t.Fatalf("read as %x", a.Body)
		}
	})
}

// listen serves each connection on a Unix socket with serve.
func listen(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	return path
}

func TestSocket(t *testing.T) {
	ended := make(chan error, 10)
	path := listen(t, func(conn net.Conn) {
		ended <- ServeConn(t.Context(), conn, handler(func(kind int, body []byte) (any, error) {
			if kind == KindPull {
				return Message{Data: make([]byte, 500<<10)}, nil
			}
			return nil, ErrKind
		}))
	})
	s := &Socket{Path: path}
	for range 3 {
		m, err := Pull{}.Do(t.Context(), s)
		if err != nil || len(m.Data) != 500<<10 {
			t.Fatalf("%d bytes, %v", len(m.Data), err)
		}
		var refusal *Refusal
		if _, err := (Enrol{}).Do(t.Context(), s); !errors.As(err, &refusal) { // the connection goes on
			t.Fatal(err)
		}
	}
	s.Close()
	if err := <-ended; err != nil {
		t.Errorf("the end of a connection: %v", err)
	}
	if _, err := (Pull{}).Do(t.Context(), s); err != nil { // it connects again
		t.Error(err)
	}
	s.Close()
	if _, err := (Pull{}).Do(t.Context(), &Socket{Path: path + "x"}); err == nil || !strings.Contains(err.Error(), "is edgekeep-keep running?") {
		t.Errorf("nobody listens: %v", err)
	}
}

// A call that was cancelled does not spoil the next one, wherever it was.
func TestSocketCancel(t *testing.T) {
	release := make(chan struct{})
	requests := make(chan struct{}, 10)
	path := listen(t, func(conn net.Conn) {
		_ = ServeConn(t.Context(), conn, handler(func(kind int, _ []byte) (any, error) {
			requests <- struct{}{}
			if kind == KindTake {
				<-release
			}
			return Message{}, nil
		}))
	})
	defer close(release)
	s := &Socket{Path: path}
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-requests
		cancel()
	}()
	if _, err := (Take{}).Do(ctx, s); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while it waits: %v", err)
	}
	if _, err := (Pull{}).Do(ctx, s); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
	for range 300 { // cancelled as the answer comes
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-requests
			cancel()
		}()
		if _, err := (Pull{}).Do(ctx, s); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatalf("%v", err)
		}
		<-ctx.Done()
	}
}

// A peer that breaks the framing is not listened to any longer.
func TestFraming(t *testing.T) {
	for name, raw := range map[string][]byte{
		"empty frame": {0, 0, 0, 0},
		"too long":    binary.BigEndian.AppendUint32(nil, MaxFrame+1),
		"cut head":    {0, 0},
		"cut frame":   {0, 0, 0, 9, 1},
	} {
		client, server := net.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- ServeConn(t.Context(), server, handler(func(int, []byte) (any, error) { return nil, ErrKind }))
		}()
		if _, err := client.Write(raw); err != nil {
			t.Fatal(err)
		}
		client.Close()
		if err := <-done; err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	answers := map[string][]byte{"no frame": nil, "cut": {0, 0, 0, 9, 1}, "too long": {0xff, 0xff, 0xff, 0xff}, "no answer": {0, 0, 0, 1, 0x80}}
	for name, raw := range answers {
		path := listen(t, func(conn net.Conn) {
			_, _ = readFrame(conn)
			_, _ = conn.Write(raw)
			conn.Close()
		})
		if _, err := (Pull{}).Do(t.Context(), &Socket{Path: path}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := writeFrame(io.Discard, make([]byte, MaxFrame+1)); err == nil {
		t.Error("wrote a frame that is too long")
	}
}

// ServeConn ends when its context does, also while nothing is asked.
func TestServeConnEnds(t *testing.T) {
	client, server := net.Pipe()
	defer client.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeConn(ctx, server, handler(func(int, []byte) (any, error) { return nil, nil })) }()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it does not end")
	}
}

// One connection through everything that a peer may get wrong inside a good
// frame: each is answered, and the connection goes on.
func TestServeConnGoesOn(t *testing.T) {
	client, server := net.Pipe()
	defer client.Close()
	done := make(chan error, 1)
	go func() {
		done <- ServeConn(t.Context(), server, handler(func(kind int, body []byte) (any, error) {
			switch kind {
			case KindTake:
				return Body[Take](body)
			case KindPull:
				return Message{Data: make([]byte, MaxFrame)}, nil
			}
			return nil, ErrKind
		}))
	}()
	ask := func(frame []byte) (a answer) {
		t.Helper()
		raw, err := exchange(client, frame)
		if err == nil {
			err = cose.Unmarshal(raw, &a)
		}
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	good := cose.MustMarshal([]any{KindTake, Take{After: 1, Confirm: 2, Wait: 3}})
	for want, frame := range map[string][]byte{
		"unknown kind":      cose.MustMarshal([]any{99, Take{}}),
		"malformed request": cose.MustMarshal([]any{KindTake, "take"}),
		"too large":         cose.MustMarshal([]any{KindPull, Pull{}}),
		"malformed":         {0xff},
		"unexpected EOF":    good[:len(good)-1],
	} {
		if a := ask(frame); want != "too large" && !strings.Contains(a.Error, want) || a.Error == "" || !bytes.Equal(a.Body, []byte{0xf6}) {
			t.Errorf("%s: %+v", want, a)
		}
		if a := ask(good); a.Error != "" {
			t.Errorf("after %s: %+v", want, a)
		}
	}
	client.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A request is sent once: when a connection breaks under it, the caller is told,
// and only its next call connects again.
func TestSocketSendsOnce(t *testing.T) {
	requests := make(chan struct{}, 10)
	path := listen(t, func(conn net.Conn) {
		_, _ = readFrame(conn)
		requests <- struct{}{}
		conn.Close()
	})
	s := &Socket{Path: path}
	defer s.Close()
	for n := range 3 {
		if _, err := (Commit{}).Do(t.Context(), s); err == nil || !strings.Contains(err.Error(), "talking to the keep") {
			t.Errorf("%d: %v", n, err)
		}
		<-requests
		if len(requests) != 0 {
			t.Error("the request was sent again")
		}
	}
}

func FuzzFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 0x80})
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 9, 1})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add(append([]byte{0, 0, 0, 7}, cose.MustMarshal([]any{3, Take{}})...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := readFrame(bytes.NewReader(raw))
		if err == nil {
			var again bytes.Buffer
			if err := writeFrame(&again, got); err != nil || !bytes.HasPrefix(raw, again.Bytes()) {
				t.Fatalf("%x is written as %x, %v", raw, again.Bytes(), err)
			}
		}
		// The same bytes on a connection: every whole frame is answered by one.
		client, server := net.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- ServeConn(t.Context(), server, handler(func(int, []byte) (any, error) { return Message{}, nil }))
		}()
		frames := 0
		for rest := raw; ; frames++ {
			frame, err := readFrame(bytes.NewReader(rest))
			if err != nil {
				break
			}
			rest = rest[4+len(frame):]
		}
		go func() {
			_, _ = client.Write(raw)
			_ = client.SetReadDeadline(time.Now().Add(10 * time.Second)) // ends, if an answer is missing
		}()
		for range frames {
			answered, err := readFrame(client)
			var a answer
			if err == nil {
				err = cose.Unmarshal(answered, &a)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		client.Close()
		<-done
	})
}

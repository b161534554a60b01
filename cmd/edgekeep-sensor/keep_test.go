package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"edgekeep/sensors"
)

// fakeKeep commits lines of any number of sessions.
type fakeKeep struct {
	socket string
	reject func(line string) bool
	crash  int // drop the connection after each so many lines; 0: never

	mu        sync.Mutex
	committed map[string][]string // by session
	changed   chan struct{}       // has room for one
}

func startKeep(t *testing.T, k *fakeKeep) *fakeKeep {
	t.Helper()
	k.socket = filepath.Join(t.TempDir(), "s")
	k.committed = map[string][]string{}
	k.changed = make(chan struct{}, 1)
	listener, err := net.Listen("unix", k.socket)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				if err := k.serve(conn); err != nil {
					t.Error(err)
				}
			})
		}
	})
	t.Cleanup(func() { cancel(); listener.Close(); all.Wait() })
	return k
}

func (k *fakeKeep) serve(conn net.Conn) error {
	in := bufio.NewScanner(conn)
	session, next := "", 0
	for n := 0; in.Scan(); {
		line := in.Text()
		if line[0] == '#' {
			c, err := sensors.ParseControl(in.Bytes())
			switch {
			case err != nil:
				return err
			case c.Kind == "hello":
				session = c.Session
				fmt.Fprintf(conn, "#ack %s %d\n", session, len(k.lines(session)))
			case c.Kind == "seq":
				next = int(c.Seq)
			}
			continue
		}
		if n++; n == k.crash {
			return nil
		}
		k.mu.Lock()
		have := len(k.committed[session])
		if next == have+1 {
			k.committed[session] = append(k.committed[session], line)
		}
		k.mu.Unlock()
		if next > have+1 {
			return fmt.Errorf("line %d after %d", next, have)
		}
		if k.reject != nil && k.reject(line) {
			fmt.Fprintf(conn, "#err %d by the test\n", next)
		}
		fmt.Fprintf(conn, "#ack %s %d\n", session, max(next, have))
		next++
		select {
		case k.changed <- struct{}{}:
		default:
		}
	}
	return nil
}

func (k *fakeKeep) lines(session string) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]string(nil), k.committed[session]...)
}

// only returns the one session there is.
func (k *fakeKeep) only(t *testing.T) (session string, lines []string) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.committed) != 1 {
		t.Fatalf("%d sessions, want 1", len(k.committed))
	}
	for session, lines = range k.committed {
	}
	return session, lines
}

// invoke runs the command in this process.
func invoke(ctx context.Context, args ...string) (status int, stdout, stderr string) {
	var out, err bytes.Buffer
	status = run(ctx, args, strings.NewReader(""), &out, &err)
	return status, out.String(), err.String()
}

package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"edgekeep/sensors"
)

// The test binary is the command itself when it is told so.
func TestMain(m *testing.M) {
	if os.Getenv("EDGEKEEP_SENSOR_TEST") == "main" {
		main()
	}
	os.Exit(m.Run())
}

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// A real machine's temperature, 22,695 readings, through a keep that loses its
// connections and a driver that is stopped and started again.
func TestReplayOfRealFile(t *testing.T) {
	dir := os.Getenv("EDGEKEEP_VECTORS")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "vectors")
	}
	path := filepath.Join(dir, "nab", "machine_temperature_system_failure.csv")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Skipf("no test vectors: %v; set EDGEKEEP_VECTORS", err)
	}
	rows, err := csv.NewReader(bytes.NewReader(data)).ReadAll()
	if err != nil || len(rows) != 22696 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	k := startKeep(t, &fakeKeep{crash: 5000})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for range k.changed {
			k.mu.Lock()
			for _, lines := range k.committed {
				if len(lines) > 8000 {
					cancel()
				}
			}
			k.mu.Unlock()
			if ctx.Err() != nil {
				return
			}
		}
	}()
	args := []string{"replay", path, "--socket", k.socket, "--speed", "0", "--measurement", "temperature"}
	var sum int
	for i, c := range []context.Context{ctx, t.Context(), t.Context()} {
		status, out, errs := invoke(c, args...)
		var s struct{ Sent, Acked, Readings, Rejected int }
		if err := json.Unmarshal([]byte(out), &s); err != nil || status != 0 || errs != "" {
			t.Fatalf("run %d: status %d, %q, %q, %v", i, status, out, errs, err)
		}
		if s.Sent != s.Acked || s.Readings != s.Acked || s.Rejected != 0 {
			t.Errorf("run %d: %s", i, out)
		}
		sum += s.Acked
	}
	session, lines := k.only(t)
	if sum != 22695 || len(lines) != 22695 || !strings.HasPrefix(session, "replay-") {
		t.Fatalf("%d acked in three runs, session %s has %d lines", sum, session, len(lines))
	}
	for i, line := range lines {
		p, err := sensors.ParseLine([]byte(line))
		value, _ := strconv.ParseFloat(rows[i+1][1], 64)
		at, _ := time.Parse(time.DateTime, rows[i+1][0])
		if err != nil || p.Measurement != "temperature" || p.Fields[0] != (sensors.Field{Name: "value", Value: value}) || p.Time != at.UnixNano() {
			t.Fatalf("row %d %v arrived as %s, %v", i+1, rows[i+1], line, err)
		}
	}
}

func TestReplaySessions(t *testing.T) {
	k := startKeep(t, &fakeKeep{reject: func(line string) bool { return strings.Contains(line, "b=2") }})
	path := file(t, "a.csv", "ts,a,b\n1,1,1\n2,1,2\n3,1,3\n")
	same := file(t, "copy.csv", "ts,a,b\n1,1,1\n2,1,2\n3,1,3\n")
	other := file(t, "b.csv", "ts,a,b\n1,1,1\n2,1,4\n")
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{path}, `{"sent":3,"acked":2,"readings":4,"rejected":1}`},
		{[]string{path}, `{"sent":0,"acked":0,"readings":0,"rejected":0}`},
		{[]string{same}, `{"sent":0,"acked":0,"readings":0,"rejected":0}`},
		{[]string{other}, `{"sent":2,"acked":2,"readings":4,"rejected":0}`},
		{[]string{path, "--measurement", "m"}, `{"sent":3,"acked":2,"readings":4,"rejected":1}`},
		{[]string{path, "--time-column", "a"}, `{"sent":3,"acked":2,"readings":4,"rejected":1}`},
	} {
		status, out, errs := invoke(t.Context(), append([]string{"replay", "--speed=0", "--socket", k.socket}, tt.args...)...)
		if status != 0 || out != tt.want+"\n" || errs != "" {
			t.Errorf("%v: status %d, %s%s; want %s", tt.args, status, out, errs, tt.want)
		}
	}
}

func TestHost(t *testing.T) {
	k := startKeep(t, &fakeKeep{})
	root := filepath.Dir(filepath.Dir(file(t, "x", "")))
	if err := os.MkdirAll(filepath.Join(root, "proc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/loadavg"), []byte("1 2 3 4/5 6\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"host", "--socket", k.socket, "--root", root, "--count", "3", "--interval", "10ms", "--json"}
	for range 2 {
		status, out, errs := invoke(t.Context(), args...)
		if status != 0 || out != `{"sent":3,"acked":3,"readings":15,"rejected":0}`+"\n" {
			t.Errorf("status %d, %s%s", status, out, errs)
		}
		var message struct{ Level, Err string }
		if err := json.Unmarshal([]byte(errs), &message); err != nil { // one line: the errors are the same each time
			t.Errorf("%v: %s", err, errs)
		}
		if message.Level != "WARN" || !strings.Contains(message.Err, "meminfo") {
			t.Errorf("message %+v", message)
		}
	}
	if len(k.committed) != 2 {
		t.Errorf("two starts had %d sessions", len(k.committed))
	}
	for session, lines := range k.committed {
		if !strings.HasPrefix(session, "host-") || len(lines) != 3 || !strings.HasPrefix(lines[0], "load load1=1,") {
			t.Errorf("%s: %q", session, lines)
		}
	}
}

// A signal stops the sampling; what was read is delivered, and accounted for.
func TestSignal(t *testing.T) {
	k := startKeep(t, &fakeKeep{})
	cmd := exec.Command(os.Args[0], "host", "--socket", k.socket, "--interval", "10ms")
	cmd.Env = append(os.Environ(), "EDGEKEEP_SENSOR_TEST=main")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		<-k.changed
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, &errs)
	}
	_, lines := k.only(t)
	readings := 0
	for _, line := range lines {
		p, err := sensors.ParseLine([]byte(line))
		if err != nil {
			t.Error(err)
		}
		readings += len(p.Fields)
	}
	want := fmt.Sprintf(`{"sent":%d,"acked":%d,"readings":%d,"rejected":0}`, len(lines), len(lines), readings)
	if out.String() != want+"\n" {
		t.Errorf("got %swant %s", &out, want)
	}
}

// A keep that accepts and says nothing: the driver says so, and does not hang.
func TestSilentKeep(t *testing.T) {
	defer func(g, p time.Duration) { grace, patience = g, p }(grace, patience)
	grace, patience = 20*time.Millisecond, 5*time.Millisecond
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	status, out, errs := invoke(ctx, "host", "--socket", socket, "--interval", "10ms")
	if status != 1 || out != `{"sent":0,"acked":0,"readings":0,"rejected":0}`+"\n" ||
		!strings.Contains(errs, "no answer from the keep yet") || !strings.Contains(errs, "lines are not acknowledged") {
		t.Errorf("status %d, %q, %s", status, out, errs)
	}
}

func TestFailures(t *testing.T) {
	defer func(g time.Duration) { grace = g }(grace)
	grace = 20 * time.Millisecond
	k := startKeep(t, &fakeKeep{})
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, "220 mail.example.org ESMTP\n")
			conn.Close()
		}
	}()
	good := file(t, "good.csv", "ts,a\n1,1\n")
	for _, tt := range []struct {
		args []string
		want string // on stderr
		out  string
	}{
		{[]string{"host", "file"}, "unknown command", ""},
		{[]string{"replay"}, "accepts 1 arg", ""},
		{[]string{"replay", "absent.csv"}, "absent.csv: no such file", ""},
		{[]string{"host", "--interval", "1ms"}, "host.interval 1ms: want", ""},
		{[]string{"host", "--socket", ""}, "socket: want", ""},
		{[]string{"host", "--root", ""}, "host.root: want", ""},
		{[]string{"replay", good, "--speed", "-1"}, "replay.speed -1: want", ""},
		{[]string{"host", "--config", "absent.toml"}, "config absent.toml: no such file", ""},
		{[]string{"replay", good, "--socket", socket}, "does not start with", `{"sent":0,"acked":0,"readings":0,"rejected":0}` + "\n"},
		{[]string{"replay", file(t, "bad.csv", "ts,a\n1,1\n2,x\n"), "--speed=0", "--socket", k.socket}, "row 2", `{"sent":1,"acked":1,"readings":1,"rejected":0}` + "\n"},
	} {
		status, out, errs := invoke(t.Context(), tt.args...)
		if status != 1 || out != tt.out || !strings.HasPrefix(errs, "edgekeep-sensor: ") || !strings.Contains(errs, tt.want) {
			t.Errorf("%v: status %d, %q, %q; want %q, %q", tt.args, status, out, errs, tt.out, tt.want)
		}
	}
}

package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"edgekeep/internal/durable"
	"edgekeep/tee"
)

func appendLog(t testing.TB, s *instances, r tee.AppendLog) uint64 {
	t.Helper()
	next := must(s.append(t.Context(), r))(t).Next
	s.trim(r.Instance, r.Trim)
	return next
}

// entries is what a log holds, read as a runner reads it.
func (s *instances) entries(t testing.TB, name string, from uint64) (first uint64, out []string) {
	t.Helper()
	for first = 0; ; {
		r := must(s.read(tee.ReadLog{Instance: name, From: from}))(t)
		if first == 0 {
			first = r.First
		}
		if len(r.Entries) == 0 {
			if r.First != r.Next {
				t.Errorf("no entries from %d, the log ends at %d", r.First, r.Next)
			}
			return first, out
		}
		for _, e := range r.Entries {
			out = append(out, string(e))
		}
		from = r.First + uint64(len(r.Entries))
	}
}

func wantEntries(t testing.TB, s *instances, name string, from, wantFirst uint64, want ...string) {
	t.Helper()
	if first, got := s.entries(t, name, from); first != wantFirst || strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("from %d: %d, %q", from, first, got)
	}
}

func logOf(name string, trim uint64, entries ...string) tee.AppendLog {
	r := tee.AppendLog{Instance: name, Trim: trim}
	for _, e := range entries {
		r.Entries = append(r.Entries, []byte(e))
	}
	return r
}

func TestInstanceLog(t *testing.T) {
	s := newAgent(t, 1<<20).instances
	wantEntries(t, s, "one", 0, 1)
	if _, err := os.Stat(filepath.Join(s.dir, "one")); err == nil {
		t.Error("reading made a log")
	}
	if n := appendLog(t, s, logOf("one", 0, "a", "b")); n != 3 {
		t.Error(n)
	}
	appendLog(t, s, logOf("two", 0, "x"))
	if n := appendLog(t, s, logOf("one", 2, "c", "d")); n != 5 {
		t.Error(n)
	}
	wantEntries(t, s, "one", 0, 2, "b", "c", "d")
	wantEntries(t, s, "one", 3, 3, "c", "d")
	wantEntries(t, s, "one", 5, 5)
	wantEntries(t, s, "one", 99, 5)
	if n := appendLog(t, s, logOf("one", 4)); n != 5 { // only trims
		t.Error(n)
	}
	wantEntries(t, s, "one", 0, 4, "d")
	if got := fmt.Sprint(s.status()); !strings.HasPrefix(got, "[{one ") || !strings.Contains(got, " 1} {two ") {
		t.Error(got)
	}
	if n := appendLog(t, s, logOf("one", 1<<40, "e")); n != 6 { // beyond the end is all of it
		t.Error(n)
	}
	wantEntries(t, s, "one", 0, 6)
	wantEntries(t, s, "two", 0, 1, "x")
	for _, bad := range []tee.AppendLog{logOf("one", 0, ""), logOf("one", 0, "ok", strings.Repeat("x", maxEntry+1))} {
		if _, err := s.append(t.Context(), bad); err == nil {
			t.Errorf("%d bytes were appended", len(bad.Entries[len(bad.Entries)-1]))
		}
	}
	wantEntries(t, s, "one", 0, 6)
}

// An answer holds as much as a frame takes, and at least one entry.
func TestInstanceLargeEntries(t *testing.T) {
	s := newAgent(t, 1<<20).instances
	var want []string
	for i := range 5 {
		e := strings.Repeat(fmt.Sprint(i), []int{maxEntry, 1, 300 << 10, 300 << 10, 300 << 10}[i])
		appendLog(t, s, logOf("one", 0, e))
		want = append(want, e)
	}
	wantEntries(t, s, "one", 0, 1, want...)
	for from := uint64(1); from <= 5; from++ {
		r := must(s.read(tee.ReadLog{Instance: "one", From: from}))(t)
		if d := jobDone(1, r, nil); d.Error != "" || len(r.Entries) == 0 {
			t.Errorf("from %d: %d entries, %s", from, len(r.Entries), d.Error)
		}
	}
}

// What was answered is on the disk: another process finds it there.
func TestInstanceDurable(t *testing.T) {
	a := newAgent(t, 1<<20)
	appendLog(t, a.instances, logOf("one", 0, "a", "b"))
	copied := filepath.Join(t.TempDir(), "one")
	if err := os.CopyFS(copied, os.DirFS(filepath.Join(a.instances.dir, "one"))); err != nil {
		t.Fatal(err)
	}
	l := must(durable.Open(copied, durable.Options{MaxBytes: 8 << 20}))(t)
	defer l.Close()
	if e := must(l.Read(0, 10, 1<<20))(t); len(e) != 2 || string(e[1].Data) != "b" {
		t.Errorf("%v", e)
	}
	// And after a restart of the agent.
	a.instances.closeAll()
	if err := a.instances.open(); err != nil {
		t.Fatal(err)
	}
	if len(a.instances.status()) != 1 {
		t.Error("the log is not open")
	}
	wantEntries(t, a.instances, "one", 0, 1, "a", "b")
}

func TestInstanceQuota(t *testing.T) {
	s := newAgent(t, 1<<20).instances
	big := strings.Repeat("x", maxEntry)
	var err error
	var next uint64
	for range 20 {
		var end tee.LogEnd
		if end, err = s.append(t.Context(), logOf("one", 0, big)); err != nil {
			break
		}
		next = end.Next
	}
	if !errors.Is(err, durable.ErrFull) || !strings.Contains(err.Error(), "the disk quota of instance one is full: ") || !strings.Contains(err.Error(), "of 8388608 bytes") {
		t.Fatalf("%v", err)
	}
	appendLog(t, s, logOf("two", 0, big)) // each has its own
	if n := appendLog(t, s, logOf("one", next)); n != next {
		t.Errorf("%d, %d", n, next)
	}
	if n := appendLog(t, s, logOf("one", 0, big)); n != next+1 { // there is room again
		t.Errorf("%d, %d", n, next)
	}
}

func TestInstanceDrop(t *testing.T) {
	s := newAgent(t, 1<<20).instances
	appendLog(t, s, logOf("one", 0, "a", "b"))
	for range 2 { // again is no error
		if err := s.drop("one"); err != nil {
			t.Fatal(err)
		}
	}
	if e := must(os.ReadDir(s.dir))(t); len(e) != 0 || len(s.status()) != 0 {
		t.Errorf("%v, %v", e, s.status())
	}
	wantEntries(t, s, "one", 0, 1)
	if n := appendLog(t, s, logOf("one", 0, "c")); n != 2 {
		t.Error(n)
	}
	wantEntries(t, s, "one", 0, 1, "c")
	// A crash between the rename and the removal.
	s.closeAll()
	if err := os.Rename(filepath.Join(s.dir, "one"), filepath.Join(s.dir, "one"+dropped)); err != nil {
		t.Fatal(err)
	}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	if e := must(os.ReadDir(s.dir))(t); len(e) != 0 {
		t.Errorf("%v", e)
	}
}

func TestInstanceNames(t *testing.T) {
	s := newAgent(t, 1<<20).instances
	for _, name := range []string{"", ".", "..", "../x", "a/b", "A", "a_b", "a.dropped", "é", strings.Repeat("a", 27), "a\x00"} {
		_, errAppend := s.append(t.Context(), logOf(name, 0, "x"))
		_, errRead := s.read(tee.ReadLog{Instance: name})
		for _, err := range []error{errAppend, errRead, s.drop(name)} {
			if err == nil || !strings.Contains(err.Error(), "no name of an instance") {
				t.Errorf("%q: %v", name, err)
			}
		}
	}
	for i := range maxInstances {
		appendLog(t, s, logOf(fmt.Sprintf("%026d", i), 0, "x"))
	}
	if _, err := s.append(t.Context(), logOf("one-more", 0, "x")); err == nil || !strings.Contains(err.Error(), "64 instances already") {
		t.Error(err)
	}
	if err := s.drop(fmt.Sprintf("%026d", 0)); err != nil {
		t.Fatal(err)
	}
	appendLog(t, s, logOf("one-more", 0, "x"))
}

// A damaged log is no reason for the agent not to start: who wants it is told, and
// others are not touched.
func TestInstanceDamaged(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := a.instances
	appendLog(t, s, logOf("bad", 0, strings.Repeat("a", 100), "b"))
	appendLog(t, s, logOf("bad", 0, "c"))
	appendLog(t, s, logOf("good", 0, "x"))
	files := must(filepath.Glob(filepath.Join(s.dir, "bad", "*.seg")))(t)
	raw := must(os.ReadFile(files[0]))(t)
	raw[bytes.Index(raw, []byte("aaaa"))] ^= 1
	if err := os.WriteFile(files[0], raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is opened anew
		if _, err := s.read(tee.ReadLog{Instance: "bad"}); !errors.Is(err, durable.ErrCorrupt) {
			t.Error(err)
		}
	}
	s.closeAll()
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.append(t.Context(), logOf("bad", 0, "d")); !errors.Is(err, durable.ErrCorrupt) {
		t.Error(err)
	}
	wantEntries(t, s, "good", 0, 1, "x")
	if err := s.drop("bad"); err != nil { // and it can be begun anew
		t.Error(err)
	}
	appendLog(t, s, logOf("bad", 0, "d"))
}

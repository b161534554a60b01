package durable

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"pgregory.net/rapid"
)

// modelLog is a log beside the simplest thing that it must agree with.
type modelLog struct {
	dir     string
	o       Options
	l       *Log
	all     [][]byte // entry i has index i+1
	trimmed int
}

func TestLogAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp(ramRoot(), "durable")
		if err != nil {
			t.Fatalf("temp dir: %v", err)
		}
		defer os.RemoveAll(dir)
		m := &modelLog{dir: dir, o: Options{SegmentBytes: 400, MaxBytes: 3000}}
		m.l = mustOpen(t, dir, m.o)
		t.Repeat(map[string]func(*rapid.T){
			"":       m.check,
			"append": m.append,
			"trim":   m.trim,
			"read":   m.read,
			"reopen": func(t *rapid.T) { mustClose(t, m.l); m.reopen(t, 0) },
			"tear":   m.tear,
			"break":  m.breakOne,
		})
		mustClose(t, m.l)
	})
}

var drawEntries = rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 1, 150), 1, 4)

func (m *modelLog) append(t *rapid.T) {
	entries := drawEntries.Draw(t, "entries")
	size := int64(markerLen)
	for _, e := range entries {
		size += entryHead + int64(len(e))
	}
	before, held := snapshot(t, m.dir), m.l.Bytes()
	last, err := m.l.Append(context.Background(), entries...)
	if errors.Is(err, ErrFull) {
		if m.trimmed == len(m.all) {
			t.Fatalf("nothing is kept, and %d bytes are too much", size)
		}
		if held+size+headerLen <= m.o.MaxBytes {
			t.Fatalf("full with %d of %d bytes and %d to come", held, m.o.MaxBytes, size)
		}
		if !snapshot(t, m.dir).equal(before) {
			t.Fatalf("a refused append changed files")
		}
		return
	}
	if err != nil {
		t.Fatalf("append: %v", err)
	}
	if m.all = append(m.all, entries...); last != uint64(len(m.all)) {
		t.Fatalf("last index %d, want %d", last, len(m.all))
	}
}

func (m *modelLog) trim(t *rapid.T) {
	upTo := rapid.IntRange(0, len(m.all)).Draw(t, "upTo")
	if err := m.l.Trim(uint64(upTo)); err != nil {
		t.Fatalf("trim: %v", err)
	}
	m.trimmed = max(m.trimmed, upTo)
	for i, path := range segments(t, m.dir) {
		if i > 0 && path <= segmentPath(m.dir, uint64(m.trimmed+1)) {
			t.Fatalf("a segment before %s is wholly trimmed, and is still there", path)
		}
	}
}

func (m *modelLog) read(t *rapid.T) {
	from := rapid.IntRange(0, len(m.all)+2).Draw(t, "from")
	maxEntries := rapid.IntRange(-1, 10).Draw(t, "maxEntries")
	maxBytes := rapid.IntRange(-1, 600).Draw(t, "maxBytes")
	got, err := m.l.Read(uint64(from), maxEntries, maxBytes)
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	at, n, sum := max(from-1, m.trimmed), 0, 0
	for i := at; i < len(m.all); i++ {
		if sum += len(m.all[i]); n > 0 && (n >= maxEntries || sum > maxBytes) {
			break
		}
		n++
	}
	if len(got) != n {
		t.Fatalf("read %d entries, want %d", len(got), n)
	}
	for i, e := range got {
		if e.Index != uint64(at+i+1) || !bytes.Equal(e.Data, m.all[at+i]) {
			t.Fatalf("read entry %d wrongly", e.Index)
		}
	}
}

func (m *modelLog) reopen(t *rapid.T, recovered int64) {
	m.l = mustOpen(t, m.dir, m.o)
	if m.l.Recovered() != recovered {
		t.Fatalf("recovered %d bytes, want %d", m.l.Recovered(), recovered)
	}
}

// tear puts a part of a next group behind the last segment, as a crash does.
func (m *modelLog) tear(t *rapid.T) {
	mustClose(t, m.l)
	paths := segments(t, m.dir)
	if len(paths) == 0 {
		m.reopen(t, 0)
		return
	}
	b, err := os.ReadFile(paths[len(paths)-1])
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	group := append([]byte(nil), b[16:16+markerLen]...)
	group = appendEntry(group, uint64(len(m.all)+1), rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "torn"))
	group = group[:rapid.IntRange(1, len(group)-1).Draw(t, "cut")]
	if err := os.WriteFile(paths[len(paths)-1], append(b, group...), 0o600); err != nil {
		t.Fatalf("write: %v", err)
	}
	m.reopen(t, int64(len(group)))
}

// breakOne flips a bit in a segment that is not the last: that is never a torn
// tail. Then it repairs the log.
func (m *modelLog) breakOne(t *rapid.T) {
	paths := segments(t, m.dir)
	if len(paths) < 2 {
		t.Skip("one segment")
	}
	mustClose(t, m.l)
	path := rapid.SampledFrom(paths[:len(paths)-1]).Draw(t, "path")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	bad := bytes.Clone(good)
	bad[rapid.IntRange(0, len(bad)-1).Draw(t, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
	if err := os.WriteFile(path, bad, 0o600); err != nil {
		t.Fatalf("write: %v", err)
	}
	if l, err := Open(m.dir, m.o); !errors.Is(err, ErrCorrupt) || !bytes.Contains([]byte(err.Error()), []byte(path)) {
		t.Fatalf("open = %v, %v, want ErrCorrupt about %s", l, err, path)
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatalf("write: %v", err)
	}
	m.reopen(t, 0)
}

func (m *modelLog) check(t *rapid.T) {
	sameEntries(t, m.l, uint64(m.trimmed+1), m.all[m.trimmed:])
	if n := diskBytes(t, m.dir); n != m.l.Bytes() || n > m.o.MaxBytes {
		t.Fatalf("%d bytes on disk, the log says %d, the bound is %d", n, m.l.Bytes(), m.o.MaxBytes)
	}
}

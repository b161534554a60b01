package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

// boss is a keep that has jobs to be done. It holds a poll until there are some,
// and none with a request that brings results.
type boss struct {
	t    testing.TB
	a    *Agent
	jobs chan []tee.InstanceJob
	done chan tee.JobDone
	end  context.CancelFunc

	mu   sync.Mutex
	next uint64
}

func newBoss(t testing.TB, a *Agent, other fakeKeep) *boss {
	b := &boss{t: t, a: a, jobs: make(chan []tee.InstanceJob, 10_000), done: make(chan tee.JobDone, 10_000)}
	ctx, cancel := context.WithCancel(t.Context())
	l := must(net.Listen("unix", a.cfg.KeepSocket))(t)
	var conns sync.WaitGroup
	b.end = func() { cancel(); l.Close(); conns.Wait() }
	t.Cleanup(b.end)
	h := fakeKeep(func(kind int, body []byte) (any, error) {
		if kind != tee.KindWork {
			return other(kind, body)
		}
		r, err := tee.Body[tee.Work](body)
		if err != nil {
			return nil, err
		}
		for _, d := range r.Done {
			b.done <- d
		}
		if r.Wait == 0 {
			return tee.WorkReply{}, nil
		}
		select {
		case jobs := <-b.jobs:
			return tee.WorkReply{Jobs: jobs}, nil
		case <-ctx.Done():
			return tee.WorkReply{}, nil
		}
	})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { tee.ServeConn(ctx, conn, h) })
		}
	}()
	return b
}

// run has the agent work; the returned function waits for its end.
func (b *boss) run() (wait func() error) {
	end := make(chan error, 1)
	go func() { end <- b.a.runWork(b.t.Context()) }()
	return func() error { b.end(); return <-end }
}

func (b *boss) job(instance, kind string, body any) tee.InstanceJob {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.next++
	raw, ok := body.(cose.Raw)
	if !ok {
		raw = cose.MustMarshal(body)
	}
	return tee.InstanceJob{Instance: instance, Job: tee.Job{ID: b.next, Kind: kind, Body: raw}}
}

func (b *boss) give(instance, kind string, body any) uint64 {
	j := b.job(instance, kind, body)
	b.jobs <- []tee.InstanceJob{j}
	return j.ID
}

func result[R any](t testing.TB, d tee.JobDone, id uint64) R {
	t.Helper()
	var r R
	if d.ID != id || d.Error != "" {
		t.Fatalf("job %d: %+v", id, d)
	}
	if err := cose.Unmarshal(d.Body, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func noKind(int, []byte) (any, error) { return nil, tee.ErrKind }

// Every kind of job, by way of the keep's socket, while the next poll waits.
func TestWork(t *testing.T) {
	a := newAgent(t, 1<<20)
	st := newStore()
	id, content := st.add(t, 1, 1000)
	sh := &shelf{blocks: map[int][]byte{}}
	var sent []byte
	var l *link
	l = a.connect(t, fakeConn(func(kind string, payload []byte) {
		if kind == kindPeer {
			sent = bytes.Clone(payload)
			return
		}
		var q message.Ask
		if err := cose.Unmarshal(payload, &q); err != nil {
			t.Error(err)
		}
		switch q.Kind {
		case message.AskBlob:
			l.answer(payload, st.answer(q), "")
		case message.AskPut:
			l.answer(payload, sh.answer(q), "")
		case message.AskRecords:
			l.answer(payload, message.Records{Chunks: [][]byte{[]byte("chunk")}}, "")
		case message.AskLedger:
			l.answer(payload, nil, "not the holder")
		}
	}))
	steps := 0
	b := newBoss(t, a, func(kind int, _ []byte) (any, error) {
		switch steps++; {
		case kind == tee.KindAdvance && steps == 1:
			return tee.Outcome{Commit: []byte("s1")}, nil
		case kind == tee.KindCommit && a.file("state.cbor") == "s1":
			return tee.Outcome{Publish: []tee.Message{{Kind: kindPeer, Data: []byte("advanced")}}}, nil
		case kind == tee.KindAdvance:
			return nil, errors.New("nothing to do")
		}
		return nil, tee.ErrKind
	})
	wait := b.run()
	n := b.give("one", tee.JobAppend, logOf("one", 0, "a", "b"))
	if r := result[tee.LogEnd](t, <-b.done, n); r.Next != 3 {
		t.Error(r)
	}
	n = b.give("one", tee.JobAppend, logOf("one", 3, "c"))
	if r := result[tee.LogEnd](t, <-b.done, n); r.Next != 4 {
		t.Error(r)
	}
	n = b.give("one", tee.JobRead, tee.ReadLog{Instance: "one"})
	if r := result[tee.LogEntries](t, <-b.done, n); r.First != 3 || len(r.Entries) != 1 || string(r.Entries[0]) != "c" {
		t.Errorf("%+v", r)
	}
	n = b.give("one", tee.JobBlob, tee.ReadBlob{ID: id})
	if r := result[tee.BlobPart](t, <-b.done, n); r.Size != 1000 || !bytes.Equal(r.Data, content) {
		t.Error(r.Size)
	}
	n = b.give("one", tee.JobPut, tee.PutPart{Instance: "one", Data: content[:10]})
	if d := <-b.done; d.ID != n || d.Error != "" || !bytes.Equal(d.Body, []byte{0xf6}) {
		t.Errorf("%+v", d)
	}
	n = b.give("one", tee.JobPut, tee.PutPart{Instance: "one", Data: content[10:], Last: true})
	if r := result[tee.PutDone](t, <-b.done, n); !bytes.Equal(r.ID, id) {
		t.Errorf("%x", r.ID)
	}
	asked := message.AskedRecords{Gateway: "gw1", Stream: "a", Wait: 1000}
	for kind, body := range map[string]any{tee.JobRecords: asked, tee.JobAsk: tee.Question{Kind: message.AskRecords, Body: cose.MustMarshal(asked)}} {
		n = b.give("one", kind, body)
		if r := result[message.Records](t, <-b.done, n); len(r.Chunks) != 1 || string(r.Chunks[0]) != "chunk" {
			t.Errorf("%q", r.Chunks)
		}
	}
	n = b.give("", tee.JobAsk, tee.Question{Kind: message.AskLedger, Body: nothing})
	if d := <-b.done; d.ID != n || d.Error != "the cloud refuses: not the holder" {
		t.Errorf("%+v", d)
	}
	n = b.give("one", tee.JobPeer, message.Routed{Peer: "gw2", Data: []byte("frame")})
	if d := <-b.done; d.ID != n || d.Error != "" || !bytes.Equal(sent, cose.MustMarshal(message.Routed{Peer: "gw2", Data: []byte("frame")})) {
		t.Errorf("%+v: %q", d, sent)
	}
	n = b.give("", tee.JobAdvance, cose.Raw{0xf6})
	if d := <-b.done; d.ID != n || d.Error != "" || string(sent) != "advanced" {
		t.Errorf("%+v: %q", d, sent)
	}
	n = b.give("", tee.JobAdvance, cose.Raw{0xf6})
	if d := <-b.done; d.ID != n || !strings.Contains(d.Error, "nothing to do") {
		t.Errorf("%+v", d)
	}
	n = b.give("", tee.JobDrop, tee.DropLog{Instance: "one"})
	if d := <-b.done; d.ID != n || d.Error != "" {
		t.Errorf("%+v", d)
	}
	if s := a.snapshot(t.Context()); len(s.InstanceLogs) != 0 || s.BlocksFetched != 1 || s.Questions != 0 {
		t.Errorf("%+v", s)
	}
	l.cancel()
	n = b.give("one", tee.JobPeer, message.Routed{Peer: "gw2", Data: []byte("frame")})
	if d := <-b.done; d.ID != n || d.Error != errNoLink.Error() {
		t.Errorf("%+v", d)
	}
	for _, tt := range []struct {
		instance, kind string
		body           any
		want           string
	}{
		{"one", "dance", 1, "no job of kind \"dance\""},
		{"one", tee.JobAppend, 1, "malformed request"},
		{"one", tee.JobDrop, 1, "malformed request"},
		{"one", tee.JobAsk, 1, "malformed request"},
		{"one", tee.JobRecords, 1, "malformed request"},
		{"one", tee.JobAppend, logOf("two", 0, "x"), "about \"two\""},
		{"one", tee.JobRead, tee.ReadLog{Instance: "two"}, "about \"two\""},
		{"one", tee.JobPut, tee.PutPart{Instance: "two"}, "about \"two\""},
		{"one", tee.JobAppend, logOf("one", 0, ""), "an entry has 1 to"},
		{"..", tee.JobAppend, logOf("..", 0, "x"), "no name of an instance"},
	} {
		n = b.give(tt.instance, tt.kind, tt.body)
		if d := <-b.done; d.ID != n || !strings.Contains(d.Error, tt.want) || !bytes.Equal(d.Body, []byte{0xf6}) {
			t.Errorf("%s: %+v", tt.kind, d)
		}
	}
	if err := wait(); err == nil {
		t.Error("it ended without a reason")
	}
}

// Jobs of one instance's log are done in order; neither what waits at the cloud nor
// another instance holds them up.
func TestWorkLanes(t *testing.T) {
	a := newAgent(t, 1<<20)
	questions := make(chan []byte, 100)
	l := a.connect(t, fakeConn(func(_ string, payload []byte) { questions <- bytes.Clone(payload) }))
	b := newBoss(t, a, noKind)
	wait := b.run()
	var slow []uint64
	for range 3 * wide { // of one instance, and more than are asked at a time
		slow = append(slow, b.give("one", tee.JobAsk, tee.Question{Kind: message.AskRecords, Body: cose.MustMarshal(message.AskedRecords{Wait: 20_000})}))
	}
	blob := b.give("one", tee.JobBlob, tee.ReadBlob{ID: make([]byte, 32)})
	put := b.give("one", tee.JobPut, tee.PutPart{Instance: "one", Data: []byte("x"), Last: true})
	key := b.give("one", tee.JobAsk, tee.Question{Kind: message.AskKey, Body: nothing})
	var batch []tee.InstanceJob
	for i := range 100 {
		batch = append(batch, b.job("one", tee.JobAppend, logOf("one", 0, fmt.Sprint(i))), b.job("two", tee.JobAppend, logOf("two", 0, fmt.Sprint(i))))
	}
	batch = append(batch, b.job("", tee.JobDrop, tee.DropLog{Instance: "two"}))
	b.jobs <- batch
	last := map[string]uint64{}
	for range batch {
		d := <-b.done
		j := batch[slices.IndexFunc(batch, func(j tee.InstanceJob) bool { return j.ID == d.ID })]
		if d.Error != "" || d.ID < last[j.Instance] {
			t.Errorf("after %d of %q: %+v", last[j.Instance], j.Instance, d)
		}
		last[j.Instance] = d.ID
		if j.Kind == tee.JobAppend {
			if end := result[tee.LogEnd](t, d, d.ID); end.Next != (d.ID-batch[0].ID)/2+2 {
				t.Errorf("%d: ends at %d", d.ID, end.Next)
			}
		}
	}
	if last[""] < last["two"] {
		t.Error("dropped in the middle")
	}
	wantEntries(t, a.instances, "two", 0, 1)

	// The questions are all asked, a bounded number at a time.
	byKind := map[string]int{}
	type question struct {
		kind string
		raw  []byte
	}
	take := func() question {
		raw := <-questions
		var q message.Ask
		if err := cose.Unmarshal(raw, &q); err != nil {
			t.Error(err)
		}
		byKind[q.Kind]++
		return question{q.Kind, raw}
	}
	var open []question
	for range wide + 3 {
		open = append(open, take())
	}
	if byKind[message.AskRecords] != wide || byKind[message.AskKey] != 1 || byKind[message.AskBlob] != 1 || byKind[message.AskPut] != 1 {
		t.Errorf("%v", byKind)
	}
	if s := a.snapshot(t.Context()); s.Questions != wide+3 {
		t.Errorf("%d questions", s.Questions)
	}
	want := append(slow, blob, put, key)
	for range want {
		answered := open[0]
		open = open[1:]
		l.answer(answered.raw, nil, "no")
		d := <-b.done
		i := slices.Index(want, d.ID)
		if i < 0 || !strings.HasSuffix(d.Error, "the cloud refuses: no") {
			t.Fatalf("%+v", d)
		}
		want[i] = 0
		if answered.kind == message.AskRecords && byKind[message.AskRecords] < len(slow) {
			open = append(open, take())
		}
	}
	if err := wait(); err == nil {
		t.Error("it ended without a reason")
	}
}

// A keep that goes away takes what was under way with it, and the next one gets
// nothing of it.
func TestWorkKeepRestarts(t *testing.T) {
	a := newAgent(t, 1<<20)
	questions := make(chan []byte, 100)
	l := a.connect(t, fakeConn(func(_ string, payload []byte) { questions <- bytes.Clone(payload) }))
	b := newBoss(t, a, noKind)
	wait := b.run()
	for range wide + 5 {
		b.give("one", tee.JobAsk, tee.Question{Kind: message.AskKey, Body: nothing})
	}
	n := b.give("one", tee.JobPut, tee.PutPart{Instance: "one", Data: []byte("begun")})
	if d := <-b.done; d.ID != n || d.Error != "" {
		t.Fatalf("%+v", d)
	}
	raw := <-questions
	if err := wait(); err == nil || errors.Is(err, errSpool) {
		t.Fatal(err)
	}
	if s := a.snapshot(t.Context()); s.Questions != 0 {
		t.Errorf("%d questions wait", s.Questions)
	}
	l.answer(raw, nil, "late")
	b = newBoss(t, a, noKind)
	wait = b.run()
	n = b.give("one", tee.JobAppend, logOf("one", 0, "a"))
	if r := result[tee.LogEnd](t, <-b.done, n); r.Next != 2 {
		t.Error(r)
	}
	if _, err := os.Stat(a.path("put/one.part")); err == nil {
		t.Error("an upload of the old keep goes on")
	}
	if err := wait(); err == nil {
		t.Error("it ended without a reason")
	}
}

// What is durable by the keep's word is so or the agent stops: a step's state that
// cannot be stored ends the work.
func TestWorkDiskFails(t *testing.T) {
	a := newAgent(t, 1<<20)
	if err := os.Mkdir(a.path("state.cbor"), 0o700); err != nil {
		t.Fatal(err)
	}
	b := newBoss(t, a, func(kind int, _ []byte) (any, error) {
		if kind == tee.KindCommit {
			t.Error("committed")
		}
		return tee.Outcome{Commit: []byte("s1")}, nil
	})
	b.give("", tee.JobAdvance, cose.Raw{0xf6})
	if err := a.runWork(t.Context()); !errors.Is(err, errSpool) {
		t.Error(err)
	}
}

// A keep that refuses to have a worker is asked again.
func TestWorkRefused(t *testing.T) {
	a := newAgent(t, 1<<20)
	asked := 0
	ctx, cancel := context.WithCancel(t.Context())
	a.serve(t, func(int, []byte) (any, error) {
		if asked++; asked == 2 {
			cancel()
		}
		return nil, tee.ErrKind
	})
	if err := a.runWork(ctx); !errors.Is(err, context.Canceled) || asked != 2 {
		t.Errorf("asked %d times: %v", asked, err)
	}
}

// Large results come one by one, small ones together.
func TestWorkLargeResults(t *testing.T) {
	a := newAgent(t, 1<<20)
	appendLog(t, a.instances, logOf("one", 0, strings.Repeat("x", maxEntry)))
	b := newBoss(t, a, noKind)
	wait := b.run()
	var batch []tee.InstanceJob
	for i := range 60 {
		name := "one"
		if i%3 == 2 {
			name = "none"
		}
		batch = append(batch, b.job("", tee.JobBlob, 1), b.job(name, tee.JobRead, tee.ReadLog{Instance: name}))
	}
	b.jobs <- batch
	size := 0
	for range batch {
		d := <-b.done
		size += len(d.Body)
	}
	if size < 40*maxEntry {
		t.Errorf("%d bytes", size)
	}
	if err := wait(); err == nil {
		t.Error("it ended without a reason")
	}
}

// The keep is asked for no more jobs while those under way hold as much memory as
// they may, and again when some are done.
func TestWorkBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := assemble(Config{}, discard)
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorker(ctx, a)
		const size = 600 << 10
		job := tee.InstanceJob{Instance: "one", Job: tee.Job{Kind: tee.JobAsk, Body: cose.MustMarshal(tee.Question{Kind: "put", Body: cose.MustMarshal(make([]byte, size))})}}
		var given atomic.Int64
		polling := make(chan struct{})
		go func() {
			defer close(polling)
			for w.awaitRoom() == nil {
				given.Add(1)
				w.add([]tee.InstanceJob{job})
			}
		}()
		synctest.Wait()
		if bytes := given.Load() * size; bytes > maxHeld || bytes < maxHeld-2*tee.MaxFrame {
			t.Errorf("%d bytes are under way", bytes)
		}
		// Without a connection questions fail after a while, and make room.
		before := given.Load()
		for range wide {
			if d := <-w.done; !strings.Contains(d.Error, "no connection") {
				t.Errorf("%+v", d)
			}
		}
		synctest.Wait()
		if n := given.Load(); n-before < wide-1 || n*size > maxHeld+wide*size {
			t.Errorf("%d more", n-before)
		}
		cancel()
		<-polling
		if err := w.group.Wait(); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// BenchmarkAppend is an entry's way from the keep to the disk and back, one at a time.
func BenchmarkAppend(b *testing.B) {
	a := newAgent(b, 1<<20)
	boss := newBoss(b, a, noKind)
	wait := boss.run()
	entry := [][]byte{make([]byte, 4096)}
	next := uint64(1)
	for b.Loop() {
		n := boss.give("one", tee.JobAppend, tee.AppendLog{Instance: "one", Entries: entry, Trim: next / 1000 * 1000})
		next = result[tee.LogEnd](b, <-boss.done, n).Next
	}
	b.StopTimer()
	_ = wait()
}

// BenchmarkPeer is a move's frames through the agent, without a network.
func BenchmarkPeer(b *testing.B) {
	a := newAgent(b, 1<<20)
	boss := newBoss(b, a, noKind)
	a.connect(b, fakeConn(func(string, []byte) {}))
	wait := boss.run()
	frame := message.Routed{Peer: "gw2", Data: make([]byte, 64<<10)}
	const ahead = 9
	b.SetBytes(ahead * 64 << 10)
	for b.Loop() {
		var jobs []tee.InstanceJob
		for range ahead {
			jobs = append(jobs, boss.job("one", tee.JobPeer, frame))
		}
		boss.jobs <- jobs
		for range ahead {
			<-boss.done
		}
	}
	b.StopTimer()
	_ = wait()
}

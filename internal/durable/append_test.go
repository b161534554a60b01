package durable

import (
	"bytes"
	"context"
	"errors"
	"math"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
)

// TestGroupCommit holds the first fdatasync back until 50 Appends wait; they
// then share the second one.
func TestGroupCommit(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, roomy)
		mustAppend(t, l, numbered(0)) // the segment exists
		syncs, hold := 0, make(chan struct{})
		l.sync = func(f *os.File) error {
			syncs++
			<-hold
			return fdatasync(f)
		}
		last := make([]uint64, 51)
		for i := range last {
			go func() { last[i] = mustAppend(t, l, numbered(i), numbered(i)) }()
			if i == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		if l.Next() != 2 || len(readAll(t, l)) != 1 {
			t.Errorf("entries are visible before they are durable")
		}
		close(hold)
		synctest.Wait()
		if syncs != 2 {
			t.Errorf("%d fdatasync calls for %d appends, want 2", syncs, len(last))
		}
		for i, n := range last {
			got, err := l.Read(n-1, 2, math.MaxInt)
			if err != nil || len(got) != 2 || !bytes.Equal(got[0].Data, numbered(i)) || !bytes.Equal(got[1].Data, numbered(i)) {
				t.Fatalf("append %d that ends at %d: read %v, %v", i, n, got, err)
			}
		}
		mustClose(t, l)
	})
}

func TestGroupsAreBounded(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, Options{SegmentBytes: 8 << 20, MaxBytes: 1 << 30})
		mustAppend(t, l, numbered(0))
		syncs, hold := 0, make(chan struct{})
		l.sync = func(*os.File) error { syncs++; <-hold; return nil }
		for range 9 {
			go mustAppend(t, l, make([]byte, 300<<10))
			synctest.Wait()
		}
		close(hold)
		synctest.Wait()
		if syncs != 4 { // 1, then 3 + 3 + 2 of 300 KiB
			t.Errorf("%d fdatasync calls, want 4", syncs)
		}
		mustClose(t, l)
	})
}

func TestFirstFailureIsFinal(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, roomy)
		mustAppend(t, l, numbered(1))
		hold, syncs := make(chan struct{}), 0
		l.sync = func(*os.File) error { syncs++; <-hold; return syscall.EIO }
		errs := make([]error, 20)
		for i := range errs {
			go func() { _, errs[i] = l.Append(context.Background(), numbered(2)) }()
		}
		var waited error
		go func() { waited = l.Wait(context.Background(), 1) }()
		synctest.Wait()
		close(hold)
		synctest.Wait()
		l.sync = fdatasync // the disk is well again, and nothing may go on
		_, again := l.Append(context.Background(), numbered(3))
		for _, err := range append(errs, again, waited, l.Trim(1)) {
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("error %v, want the first cause", err)
			}
		}
		if syncs != 1 {
			t.Errorf("fdatasync was called %d times, want 1", syncs)
		}
		sameEntries(t, l, 1, [][]byte{numbered(1)})
		if err := l.Wait(context.Background(), 0); err != nil {
			t.Errorf("wait for an entry that is there: %v", err)
		}
		mustClose(t, l)
	})
	l := mustOpen(t, dir, roomy)
	defer l.Close()
	if n := mustAppend(t, l, numbered(9)); n < 2 {
		t.Errorf("index %d is used twice", n)
	}
}

func TestContextEnds(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, roomy)
		mustAppend(t, l, numbered(1))
		hold := make(chan struct{})
		l.sync = func(*os.File) error { <-hold; return nil }
		ctx, cancel := context.WithCancel(context.Background())
		var writing, queued, waiting error
		go func() { _, writing = l.Append(ctx, numbered(2)) }()
		synctest.Wait()
		go func() { _, queued = l.Append(ctx, numbered(3)) }()
		go func() { waiting = l.Wait(ctx, 1) }()
		synctest.Wait()
		cancel()
		synctest.Wait()
		if !errors.Is(queued, context.Canceled) || !errors.Is(waiting, context.Canceled) {
			t.Errorf("queued: %v, waiting: %v, want canceled", queued, waiting)
		}
		close(hold)
		synctest.Wait()
		if writing != nil {
			t.Errorf("an append that was being written: %v", writing)
		}
		if _, err := l.Append(ctx, numbered(4)); !errors.Is(err, context.Canceled) {
			t.Errorf("append under an ended context: %v", err)
		}
		sameEntries(t, l, 1, [][]byte{numbered(1), numbered(2)})
		mustClose(t, l)
	})
}

func TestWait(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, roomy)
		mustAppend(t, l, numbered(1), numbered(2))
		if err := l.Trim(2); err != nil {
			t.Fatal(err)
		}
		still := errors.New("still waiting")
		errs := []error{still, still, still, still}
		for after := range errs {
			go func() { errs[after] = l.Wait(context.Background(), uint64(after)) }()
		}
		synctest.Wait()
		for after, err := range errs {
			if err == nil {
				t.Errorf("wait(%d) returned for a trimmed entry", after)
			}
		}
		mustAppend(t, l, numbered(3))
		synctest.Wait()
		for after, err := range errs {
			if (err == nil) != (after < 3) {
				t.Errorf("wait(%d) with entry 3: %v", after, err)
			}
		}
		mustClose(t, l)
		synctest.Wait()
		if !errors.Is(errs[3], os.ErrClosed) {
			t.Errorf("wait at close: %v", errs[3])
		}
	})
}

func TestClose(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, roomy)
		hold := make(chan struct{})
		l.sync = func(f *os.File) error { <-hold; return fdatasync(f) }
		var writing, closing error
		go func() { _, writing = l.Append(context.Background(), numbered(1)) }()
		synctest.Wait()
		go func() { closing = l.Close() }()
		synctest.Wait()
		close(hold)
		synctest.Wait()
		if writing != nil || closing != nil {
			t.Errorf("write in progress: %v, close: %v", writing, closing)
		}
		_, err := l.Append(context.Background(), numbered(2))
		_, err2 := l.Read(1, 1, 1)
		for _, err := range []error{err, err2, l.Trim(1), l.Wait(context.Background(), 0)} {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("after close: %v", err)
			}
		}
		mustClose(t, l)
	})
}

// TestCloseEndsQueue closes while Appends wait behind one another.
func TestCloseEndsQueue(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, roomy)
		l.token <- struct{}{} // somebody writes
		go l.Close()
		synctest.Wait()
		errs := make([]error, 5)
		for i := range errs {
			go func() { _, errs[i] = l.Append(context.Background(), numbered(i)) }()
		}
		synctest.Wait()
		<-l.token
		synctest.Wait()
		for _, err := range errs {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("append behind close: %v", err)
			}
		}
	})
}

func TestFullIsStrict(t *testing.T) {
	dir := t.TempDir()
	const bound = headerLen + 3*(markerLen+entryHead+100)
	l := mustOpen(t, dir, Options{MaxBytes: bound})
	defer l.Close()
	e := make([]byte, 100)
	refused := func(entries ...[]byte) {
		t.Helper()
		before := snapshot(t, dir)
		if _, err := l.Append(context.Background(), entries...); !errors.Is(err, ErrFull) {
			t.Fatalf("append: %v, want ErrFull", err)
		}
		if !snapshot(t, dir).equal(before) {
			t.Fatal("a refused append changed files")
		}
	}
	refused(make([]byte, bound-headerLen-markerLen-entryHead+1))
	mustAppend(t, l, e)
	mustAppend(t, l, e)
	refused(e, e)
	refused(make([]byte, 101))
	mustAppend(t, l, e) // to the last byte
	refused([]byte{1})
	if l.Bytes() != bound || diskBytes(t, dir) != bound {
		t.Fatalf("%d bytes, want %d", l.Bytes(), bound)
	}
	if err := l.Trim(2); err != nil {
		t.Fatal(err)
	}
	refused(e) // entry 3 is in the way
	if err := l.Trim(3); err != nil {
		t.Fatal(err)
	}
	if n := mustAppend(t, l, e, e); n != 5 {
		t.Fatalf("index %d, want 5", n)
	}
	sameEntries(t, l, 4, [][]byte{e, e})
}

// TestFullForOneOfAGroup has a small and a large Append in one group.
func TestFullForOneOfAGroup(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, dir, Options{MaxBytes: 1000})
		var errs [3]error
		l.token <- struct{}{}
		for i, n := range []int{100, 900, 100} {
			go func() { _, errs[i] = l.Append(context.Background(), make([]byte, n)) }()
			synctest.Wait()
		}
		<-l.token
		synctest.Wait()
		if errs[0] != nil || !errors.Is(errs[1], ErrFull) || errs[2] != nil {
			t.Errorf("errors %v, want ErrFull for the second only", errs)
		}
		mustClose(t, l)
	})
}

func TestRefusedArguments(t *testing.T) {
	dir := t.TempDir()
	for _, o := range []Options{{}, {MaxBytes: -1}, {MaxBytes: 1, SegmentBytes: -1}} {
		if _, err := Open(dir, o); err == nil {
			t.Errorf("open with %+v succeeded", o)
		}
	}
	l := mustOpen(t, dir, roomy)
	defer l.Close()
	for _, entries := range [][][]byte{{}, {{}}, {numbered(1), nil}, {make([]byte, maxEntry+1)}} {
		if _, err := l.Append(context.Background(), entries...); err == nil {
			t.Errorf("append of %d entries succeeded", len(entries))
		}
	}
	if err := l.Trim(1); err == nil {
		t.Error("trim beyond the end succeeded")
	}
	if l.Next() != 1 || l.Bytes() != 0 {
		t.Errorf("refused calls left next %d, %d bytes", l.Next(), l.Bytes())
	}
	large := bytes.Repeat([]byte{7}, maxEntry)
	mustAppend(t, l, large)
	sameEntries(t, l, 1, [][]byte{large})
}

func TestLock(t *testing.T) {
	dir := t.TempDir() + "/log"
	l := mustOpen(t, dir, roomy)
	if _, err := Open(dir, roomy); err == nil || !strings.Contains(err.Error(), "already open") {
		t.Fatalf("second open: %v", err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("directory: %v, %v", info.Mode(), err)
	}
	// A program that is started meanwhile inherits neither the lock nor a file.
	mustAppend(t, l, numbered(1))
	out, err := exec.Command("ls", "-l", "/proc/self/fd").Output()
	if err != nil || strings.Contains(string(out), dir) {
		t.Fatalf("inherited: %v\n%s", err, out)
	}
	mustClose(t, l)
	mustClose(t, mustOpen(t, dir, roomy))
}

// TestReadBesideTrim reads from segments while they go away.
func TestReadBesideTrim(t *testing.T) {
	l := mustOpen(t, ramDir(t), Options{SegmentBytes: 64, MaxBytes: 1 << 20})
	defer l.Close()
	stop := make(chan struct{})
	done := make(chan error)
	for range 2 {
		go func() {
			for {
				got, err := l.Read(0, 10, math.MaxInt)
				for i, e := range got {
					if !bytes.Equal(e.Data, numbered(int(e.Index))) || e.Index != got[0].Index+uint64(i) {
						err = errors.Join(err, errors.New("wrong entry"))
					}
				}
				select {
				case <-stop:
					done <- err
					return
				default:
				}
				if err != nil {
					done <- err
					return
				}
			}
		}()
	}
	for n := 1; n <= 1000; n++ {
		mustAppend(t, l, numbered(n))
		if n%2 == 0 {
			if err := l.Trim(uint64(n - 1)); err != nil {
				t.Error(err)
			}
		}
	}
	close(stop)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestIndicesGoOn(t *testing.T) {
	dir := t.TempDir()
	o := Options{SegmentBytes: 100, MaxBytes: 300}
	for i := range 50 {
		l := mustOpen(t, dir, o)
		if n := mustAppend(t, l, make([]byte, 90)); n != uint64(i+1) {
			t.Fatalf("index %d, want %d", n, i+1)
		}
		if err := l.Trim(uint64(i + 1)); err != nil {
			t.Fatal(err)
		}
		if l.First() != l.Next() {
			t.Fatalf("first %d, next %d of an empty log", l.First(), l.Next())
		}
		mustClose(t, l)
	}
}

package durable

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var roomy = Options{MaxBytes: 1 << 30}

// goldenSegment begins at index 7 and holds two groups. Its CRCs, and that of
// the mark, were computed by another implementation.
const goldenSegment = "454b5347" + // magic
	"00000001" + // version
	"0000000000000007" + // index of the first entry
	"8182838485868788" + // marker, top bit set
	"b3371895" + // crc of the 24 bytes before
	"8182838485868788" + // a group begins
	"00000002" + // len
	"2d6864fb" + // crc of len, index and data
	"0000000000000007" + // index
	"6869" + // "hi"
	"8182838485868788" + // another group
	"00000001" + "38cf1024" + "0000000000000008" + "21" + // "!"
	"00000001" + "974bf01b" + "0000000000000009" + "3f" // "?"

const goldenMark = "454b544d" + // magic
	"00000001" + // version
	"0000000000000006" + // entries up to here are no longer needed
	"c77562af" // crc of the 16 bytes before

func TestGoldenBytes(t *testing.T) {
	m := marker{0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88}
	got := encodeHeader(7, m)
	got = appendEntry(append(got, m[:]...), 7, []byte("hi"))
	got = appendEntry(append(got, m[:]...), 8, []byte("!"))
	got = appendEntry(got, 9, []byte("?"))
	if hex.EncodeToString(got) != goldenSegment {
		t.Errorf("segment is\n%x, want\n%s", got, goldenSegment)
	}
	if mark := hex.EncodeToString(encodeMark(6)); mark != goldenMark {
		t.Errorf("mark is %s, want %s", mark, goldenMark)
	}
	dir := ramDir(t)
	b, _ := hex.DecodeString(goldenSegment)
	mark, _ := hex.DecodeString(goldenMark)
	image{segmentName(7): b, "trimmed": mark}.restore(t, dir)
	l := mustOpen(t, dir, roomy)
	defer l.Close()
	sameEntries(t, l, 7, [][]byte{[]byte("hi"), []byte("!"), []byte("?")})
}

// build returns the image of a log whose calls of Append had these entries.
func build(t *testing.T, o Options, calls ...[][]byte) image {
	t.Helper()
	dir := ramDir(t)
	l := mustOpen(t, dir, o)
	for _, c := range calls {
		mustAppend(t, l, c...)
	}
	mustClose(t, l)
	return snapshot(t, dir)
}

func groupLen(entries ...[]byte) int {
	n := markerLen
	for _, e := range entries {
		n += entryHead + len(e)
	}
	return n
}

// TestTornTail cuts the last group at every byte; then again with zeros up to
// the full length, as a file system leaves it whose new length came first.
func TestTornTail(t *testing.T) {
	before := [][]byte{numbered(1), numbered(2)}
	group := [][]byte{numbered(3), bytes.Repeat([]byte("x"), 90), numbered(5)}
	im := build(t, roomy, before[:1], before[1:], group)
	name := im.lastSegment()
	whole := im[name]
	start := len(whole) - groupLen(group...)
	ends := []int{start + groupLen(group[0]), start + groupLen(group[:2]...)}
	dir := ramDir(t)
	for cut := start; cut < len(whole); cut++ {
		want, kept := before, start
		for i, end := range ends {
			if cut >= end {
				want, kept = append(before[:2:2], group[:i+1]...), end
			}
		}
		for _, zeros := range []int{0, len(whole) - cut} {
			torn := append(bytes.Clone(whole[:cut]), make([]byte, zeros)...)
			if bytes.Equal(torn, whole) {
				continue
			}
			im.with(name, torn).restore(t, dir)
			l := mustOpen(t, dir, roomy)
			if l.Recovered() != int64(len(torn)-kept) || l.Bytes() != int64(kept) {
				t.Fatalf("cut at %d, %d zeros: recovered %d bytes, %d left, want %d left", cut, zeros, l.Recovered(), l.Bytes(), kept)
			}
			mustAppend(t, l, []byte("later"))
			mustClose(t, l)
			l = mustOpen(t, dir, roomy)
			sameEntries(t, l, 1, append(want[:len(want):len(want)], []byte("later")))
			mustClose(t, l)
		}
	}
}

// TestFlippedByte damages each byte of a log of two segments in turn. Only in
// the last group of the last segment can that be a torn write.
func TestFlippedByte(t *testing.T) {
	o := Options{SegmentBytes: 130, MaxBytes: 1 << 20}
	var want [][]byte
	var calls [][][]byte
	for i := range 6 {
		want = append(want, numbered(i))
		calls = append(calls, [][]byte{numbered(i)})
	}
	im := build(t, o, calls...)
	dir := ramDir(t)
	for name, b := range im {
		lastGroup := len(b)
		if name == im.lastSegment() {
			lastGroup -= groupLen(want[5])
		}
		for at := range b {
			flipped := bytes.Clone(b)
			flipped[at] ^= 0x40
			im.with(name, flipped).restore(t, dir)
			l, err := Open(dir, o)
			if at >= lastGroup {
				if err != nil {
					t.Fatalf("%s: byte %d of %d: %v", name, at, len(b), err)
				}
				sameEntries(t, l, 1, want[:5])
				if l.Recovered() != int64(len(b)-lastGroup) {
					t.Fatalf("%s: byte %d: recovered %d", name, at, l.Recovered())
				}
				mustClose(t, l)
				continue
			}
			var off int
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: byte %d of %d: %v, want ErrCorrupt", name, at, len(b), err)
			}
			_, rest, _ := strings.Cut(err.Error(), filepath.Join(dir, name)+" at offset ")
			if _, err2 := fmt.Sscanf(rest, "%d:", &off); err2 != nil || off > at {
				t.Fatalf("%s: byte %d: error does not name the place: %v", name, at, err)
			}
			if !snapshot(t, dir).with("lock", nil).equal(im.with(name, flipped)) {
				t.Fatalf("%s: byte %d: a refused open changed files", name, at)
			}
		}
	}
}

// TestPowerCut loses any of the sectors of a group that was not yet synced,
// and any part of its length.
func TestPowerCut(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	before := [][]byte{numbered(1), bytes.Repeat([]byte("b"), 700)}
	var group [][]byte
	for i := range 12 {
		group = append(group, bytes.Repeat([]byte{byte(i + 1)}, 40*(i+3)))
	}
	im := build(t, roomy, before[:1], before[1:], group)
	name := im.lastSegment()
	start := len(im[name]) - groupLen(group...)
	dir := ramDir(t)
	for range 300 {
		b := bytes.Clone(im[name])
		for at := start; at < len(b); at = (at/512 + 1) * 512 {
			if rnd.IntN(4) == 0 {
				clear(b[at:min(len(b), (at/512+1)*512)])
			}
		}
		b = b[:start+rnd.IntN(len(b)-start+1)]
		im.with(name, b).restore(t, dir)
		l := mustOpen(t, dir, roomy)
		n := int(l.Next()) - 1
		if n < len(before) {
			t.Fatalf("%d entries left of %d acknowledged ones", n, len(before))
		}
		sameEntries(t, l, 1, append(before[:2:2], group...)[:n])
		mustClose(t, l)
	}
}

func TestTornCreation(t *testing.T) {
	im := build(t, roomy, [][]byte{numbered(1)})
	dir := ramDir(t)
	for _, b := range [][]byte{{}, []byte("EKS"), make([]byte, headerLen)} {
		im.with(segmentName(2), b).restore(t, dir)
		l := mustOpen(t, dir, Options{MaxBytes: 200})
		if l.Recovered() != int64(len(b)) || len(segments(t, dir)) != 1 {
			t.Fatalf("recovered %d of %d bytes", l.Recovered(), len(b))
		}
		mustAppend(t, l, numbered(2))
		sameEntries(t, l, 1, [][]byte{numbered(1), numbered(2)})
		mustClose(t, l)
	}
	// The log ends in the segment before the torn one, and that has to give way.
	im.with(segmentName(2), nil).restore(t, dir)
	l := mustOpen(t, dir, Options{MaxBytes: 200})
	defer l.Close()
	if err := l.Trim(1); err != nil {
		t.Fatal(err)
	}
	big := make([]byte, 140)
	mustAppend(t, l, big)
	sameEntries(t, l, 2, [][]byte{big})
}

// TestInconsistentFiles has only files that are sound by themselves.
func TestInconsistentFiles(t *testing.T) {
	o := Options{SegmentBytes: 60, MaxBytes: 1 << 20}
	im := build(t, o, [][]byte{numbered(1)}, [][]byte{numbered(2)}, [][]byte{numbered(3)})
	without := func(im image, name string) image {
		out := im.with(name, nil)
		delete(out, name)
		return out
	}
	newer := encodeHeader(1, marker{0x80})
	newer[7] = 2
	newer = resum(newer)
	cases := map[string]struct {
		im   image
		want string
	}{
		"first segment lost":  {without(im, segmentName(1)), "begins at entry 2 where 1 must come"},
		"middle segment lost": {without(im, segmentName(2)), "begins at entry 3 where 2 must come"},
		"renamed":             {without(im.with(segmentName(9), im[segmentName(3)]), segmentName(3)), "begins at entry 9"},
		"swapped":             {im.with(segmentName(2), im[segmentName(1)]), "bad segment header"},
		"mark beyond the end": {im.with("trimmed", encodeMark(7)), "up to 7 were acknowledged"},
		"mark flipped":        {im.with("trimmed", append(encodeMark(1)[:19], 0)), "bad trim mark"},
		"mark short":          {im.with("trimmed", encodeMark(1)[:19]), "bad trim mark"},
		"mark long":           {im.with("trimmed", append(encodeMark(1), 0)), "bad trim mark"},
		"mark of nothing":     {im.with("trimmed", encodeMark(0)), "impossible index"},
		"lost below the mark": {image{segmentName(1): nil, "trimmed": encodeMark(5)}, "bad segment header"},
		"no marker":           {im.with(segmentName(1), appendEntry(bytes.Clone(im[segmentName(1)][:headerLen]), 1, numbered(1))), "no marker in front"},
		"odd name":            {im.with("4.seg", nil), "not the name of a segment"},
		"index zero":          {im.with(segmentName(0), nil), "not the name of a segment"},
		"huge index":          {im.with(strings.Repeat("9", 20)+segSuffix, nil), "not the name of a segment"},
		"newer segment":       {image{segmentName(1): newer}, "version 2 is not supported"},
		"newer mark":          {image{"trimmed": resum(append(append([]byte("EKTM"), 0, 0, 0, 2), make([]byte, 12)...))}, "version 2 is not supported"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			dir := ramDir(t)
			c.im.restore(t, dir)
			_, err := Open(dir, o)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("open: %v, want %q", err, c.want)
			}
			if versions := strings.HasPrefix(name, "newer"); errors.Is(err, ErrCorrupt) == versions {
				t.Errorf("ErrCorrupt is wrong for: %v", err)
			}
		})
	}
}

// TestDamageBelowMark has damage in the last group, but the mark proves that
// the group had been acknowledged.
func TestDamageBelowMark(t *testing.T) {
	im := build(t, roomy, [][]byte{numbered(1), numbered(2)})
	name := im.lastSegment()
	b := bytes.Clone(im[name])
	b[len(b)-1] ^= 1
	dir := ramDir(t)
	im = im.with(name, b).with("trimmed", encodeMark(2))
	im.restore(t, dir)
	if _, err := Open(dir, roomy); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("open: %v, want ErrCorrupt", err)
	}
	if !snapshot(t, dir).equal(im) {
		t.Fatal("a refused open changed files")
	}
}

// TestForgedMarker has a torn entry whose data look like a later group to
// anybody who does not know the marker.
func TestForgedMarker(t *testing.T) {
	forged := appendEntry(append([]byte(nil), 0x80, 0, 0, 0, 0, 0, 0, 0), 3, []byte("forged"))
	im := build(t, roomy, [][]byte{numbered(1)}, [][]byte{append(forged, make([]byte, 50)...)})
	name := im.lastSegment()
	dir := ramDir(t)
	im.with(name, im[name][:len(im[name])-1]).restore(t, dir)
	l := mustOpen(t, dir, roomy)
	defer l.Close()
	sameEntries(t, l, 1, [][]byte{numbered(1)})
}

func TestReadFindsLaterDamage(t *testing.T) {
	dir := ramDir(t)
	l := mustOpen(t, dir, roomy)
	defer l.Close()
	mustAppend(t, l, numbered(1))
	mustAppend(t, l, numbered(2))
	f, err := os.OpenFile(segments(t, dir)[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{'!'}, l.Bytes()-1); err != nil {
		t.Fatal(err)
	}
	got, err := l.Read(1, 10, 1000)
	if err != nil || len(got) != 1 {
		t.Fatalf("read = %d entries, %v; want the good one", len(got), err)
	}
	if _, err := l.Read(2, 10, 1000); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), f.Name()) {
		t.Fatalf("read: %v, want ErrCorrupt", err)
	}
}

func TestHasMarker(t *testing.T) {
	m := marker{0x80, 1, 2, 3, 4, 5, 6, 7}
	b := make([]byte, 64<<10+100)
	for _, at := range []int{40, 64<<10 - 9, 64<<10 - 1, 64 << 10, len(b) - 8} {
		clear(b)
		copy(b[at:], m[:])
		for from, want := range map[int64]bool{0: true, int64(at): true, int64(at) + 1: false} {
			if got, err := hasMarker(bytes.NewReader(b), m, from, int64(len(b))); err != nil || got != want {
				t.Errorf("marker at %d, from %d: %v, %v", at, from, got, err)
			}
		}
	}
}

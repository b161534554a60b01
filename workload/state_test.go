package workload

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

const testInstance = "press-watch"

func count(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func testKeys() []StateKey {
	return []StateKey{{ID: count(0x10, 8), Key: count(0x40, 32)}, {ID: count(0x20, 8), Key: count(0x80, 32)}}
}

func newSealer(t testing.TB, prev []byte, next uint64) *StateSealer {
	t.Helper()
	k := testKeys()[0]
	s, err := NewStateSealer(testInstance, k.ID, k.Key, prev, next, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// collected is a sink that remembers everything.
type collected struct {
	pages map[place]string // of memory by single page
	order []string
	err   error
}

func (c *collected) Begin(d *Delta) error {
	c.order = append(c.order, fmt.Sprint("begin ", d.N))
	if d.Full {
		c.pages = map[place]string{}
	}
	return c.err
}

func (c *collected) Page(p Page) error {
	for p.Space == SpaceMemory && len(p.Data) > MemoryPage {
		first := p
		first.Data = p.Data[:MemoryPage]
		c.pages[first.place()] = string(first.Data)
		p.Data, p.Index = p.Data[MemoryPage:], p.Index+1
	}
	c.pages[p.place()] = string(p.Data)
	return c.err
}

func (c *collected) End() error {
	c.order = append(c.order, "end")
	return c.err
}

func newOpener(t testing.TB, sink StateSink) *StateOpener {
	t.Helper()
	o, err := NewStateOpener(testInstance, testKeys(), sink)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func seal(t testing.TB, s *StateSealer, d Delta, pages ...Page) (parts [][]byte) {
	t.Helper()
	err := s.Seal(d, slices.Values(pages), func(part []byte) error {
		if len(part) > MaxPart {
			t.Fatalf("a part of %d bytes", len(part))
		}
		parts = append(parts, part)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return parts
}

func fullDelta() Delta {
	return Delta{
		Full: true, Line: 7, Memory: 64,
		Cursors: []Cursor{{Gateway: "gw7", Stream: "press-3", Epoch: count(0xe0, 16), Seq: 4, Head: count(0xa0, 32), Skip: 2}, {Gateway: "gw8", Stream: "press-3"}},
		Results: [][]byte{count(1, 5), count(2, 9)},
		Globals: []uint64{0, 1 << 63, 65536}, Tree: count(3, 10), FDs: count(4, 10),
	}
}

func memoryPage(index uint64, pages int, b byte) Page {
	return Page{Index: index, Data: bytes.Repeat([]byte{b}, pages*MemoryPage)}
}

// history is a log: a full delta of several parts, two that follow, and a full one.
func history(t testing.TB) (parts [][]byte) {
	s := newSealer(t, nil, 0)
	next := fullDelta()
	next.Full = false
	parts = seal(t, s, fullDelta(), memoryPage(3, 20, 1), memoryPage(100, 30, 2), Page{SpaceFiles, 5, 0, count(0, FilePage)}, Page{SpaceFiles, 5, 1, count(0, 17)})
	parts = append(parts, seal(t, s, next)...)
	parts = append(parts, seal(t, s, next, memoryPage(4, 1, 3))...)
	return append(parts, seal(t, s, fullDelta(), memoryPage(1, 1, 4))...)
}

func open(o *StateOpener, parts ...[]byte) error {
	for _, p := range parts {
		if _, err := o.Open(p); err != nil {
			return err
		}
	}
	return o.End()
}

func TestStateRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		random := mathrand.New(mathrand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
		bytesOf := func(n int) []byte {
			b := make([]byte, n)
			for i := range b {
				b[i] = byte(random.Uint32())
			}
			return b
		}
		start := rapid.Uint64Range(0, 1<<40).Draw(rt, "first delta")
		prev := bytesOf(32)
		s := newSealer(t, prev, start)
		sink := &collected{}
		o := newOpener(t, sink)
		want := map[place]string{}
		head := prev
		for n := range rapid.IntRange(1, 6).Draw(rt, "deltas") {
			d := Delta{N: start + uint64(n), Full: n == 0 || random.IntN(5) == 0, Line: random.Uint64(), Memory: uint32(random.IntN(1 << 10))}
			for range random.IntN(4) {
				d.Globals = append(d.Globals, random.Uint64())
				d.Results = append(d.Results, bytesOf(1+random.IntN([]int{10, MaxPack}[random.IntN(2)])))
			}
			d.Tree, d.FDs = bytesOf(random.IntN(200_000)), bytesOf(random.IntN(100))
			if d.Full {
				want = map[place]string{}
			}
			var pages []Page
			for i := uint64(0); i < uint64(d.Memory)*16; {
				p := Page{Index: i, Data: bytesOf(MemoryPage * (1 + random.IntN(40)))}
				if i += p.count(); i <= uint64(d.Memory)*16 {
					pages = append(pages, p)
				}
				i += uint64(random.IntN(3000))
			}
			for inode := range uint64(random.IntN(4)) {
				pages = append(pages, Page{SpaceFiles, inode + 1, uint64(random.IntN(3)), bytesOf(1 + random.IntN(FilePage))})
			}
			for _, p := range pages {
				for i := range p.count() {
					size := len(p.Data) / int(p.count())
					want[place{p.Space, p.Inode, p.Index + i}] = string(p.Data[int(i)*size:][:size])
				}
			}
			if s.Next() != d.N || n > 0 && o.Next() != d.N {
				rt.Fatalf("next: %d and %d, want %d", s.Next(), o.Next(), d.N)
			}
			var got *Delta
			for i, part := range seal(t, s, d, pages...) {
				var err error
				if head, err = ChainHead(head, part); err != nil {
					rt.Fatal(err)
				}
				if got != nil {
					rt.Fatalf("delta %d is complete before part %d", n, i)
				}
				if got, err = o.Open(part); err != nil {
					rt.Fatal(err)
				}
			}
			if !same(*got, d) || !reflect.DeepEqual(sink.pages, want) || o.End() != nil {
				rt.Fatalf("delta %d is not what was sealed", n)
			}
		}
		if !bytes.Equal(s.Head(), head) || !bytes.Equal(o.Head(), head) {
			rt.Fatal("the heads differ")
		}
	})
}

// same compares deltas; an empty slice is nil.
func same(a, b Delta) bool {
	for _, d := range []*Delta{&a, &b} {
		d.Cursors, d.Results, d.Globals = append([]Cursor{}, d.Cursors...), append([][]byte{}, d.Results...), append([]uint64{}, d.Globals...)
		d.Tree, d.FDs = append([]byte{}, d.Tree...), append([]byte{}, d.FDs...)
		for i, c := range d.Cursors {
			d.Cursors[i].Epoch, d.Cursors[i].Head = append([]byte{}, c.Epoch...), append([]byte{}, c.Head...)
		}
	}
	return reflect.DeepEqual(a, b)
}

func TestStateRefused(t *testing.T) {
	parts, fork := history(t), history(t)
	if len(parts) != 8 {
		t.Fatalf("%d parts", len(parts))
	}
	flipped := func(i, at int) [][]byte {
		out := slices.Clone(parts)
		out[i] = bytes.Clone(out[i])
		out[i][(at+len(out[i]))%len(out[i])] ^= 1
		return out
	}
	other, err := NewStateSealer("other", testKeys()[0].ID, testKeys()[0].Key, nil, 0, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	renamed := append(bytes.Clone(seal(t, other, fullDelta())[0][:1]), 0x6b)
	renamed = append(append(renamed, testInstance...), seal(t, other, fullDelta())[0][7:]...)
	stranger, err := NewStateSealer(testInstance, count(0x30, 8), count(0, 32), nil, 0, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := NewStateSealer(testInstance, testKeys()[0].ID, count(1, 32), nil, 0, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	restored := newSealer(t, nil, 0) // the same numbers after a rollback, under another salt
	first := seal(t, restored, fullDelta(), memoryPage(3, 60, 1))
	cut := func(n int) [][]byte { return [][]byte{parts[0][:n]} }
	for _, c := range []struct {
		name  string
		parts [][]byte
		want  StateError
	}{
		{"of another instance", seal(t, other, fullDelta()), StateForeign},
		{"of another instance, renamed", [][]byte{renamed}, StateCorrupted},
		{"of another instance, in the middle", append(slices.Clone(parts[:5]), seal(t, other, fullDelta())...), StateForeign},
		{"under a key that was never given", seal(t, stranger, fullDelta()), StateUnknownKey},
		{"under another key of that id", seal(t, wrong, fullDelta()), StateCorrupted},
		{"nothing", nil, StateTruncated},
		{"an empty part", [][]byte{nil}, StateTruncated},
		{"half a part", cut(len(parts[0]) / 2), StateTruncated},
		{"a part without its last byte", cut(len(parts[0]) - 1), StateTruncated},
		{"a part's head", cut(20), StateTruncated},
		{"without the end of a delta", parts[:len(parts)-5], StateTruncated},
		{"without the beginning of a delta", parts[1:], StateTruncated},
		{"without the full delta", parts[5:], StateTruncated},
		{"without a part", slices.Delete(slices.Clone(parts), 1, 2), StateOrder},
		{"without a delta", slices.Delete(slices.Clone(parts), 5, 6), StateOrder},
		{"a part twice", slices.Insert(slices.Clone(parts), 2, parts[1]), StateOrder},
		{"a delta twice", slices.Insert(slices.Clone(parts), 6, parts[5]), StateOrder},
		{"an old delta at the end", append(slices.Clone(parts), parts[5]), StateOrder},
		{"two parts swapped", [][]byte{parts[0], parts[2], parts[1], parts[3]}, StateOrder},
		{"two deltas swapped", append(slices.Clone(parts[:5]), parts[6], parts[5]), StateOrder},
		{"another history's delta", append(slices.Clone(parts[:5]), fork[5]), StateMixed},
		{"another history's full delta", append(slices.Clone(parts[:7]), fork[7]), StateMixed},
		{"another history's part", append(slices.Clone(parts[:1]), fork[1]), StateMixed},
		{"a part from before a rollback", [][]byte{parts[0], first[1]}, StateMixed},
		{"a part of another delta's number", mixedNumber(t), StateMixed},
		{"a changed byte of the box", flipped(1, -30), StateCorrupted},
		{"a changed tag", flipped(0, -1), StateCorrupted},
		{"a changed salt", flipped(0, 30), StateCorrupted},
		{"a changed last", flipped(4, 1+12+9+17+1+1), StateCorrupted},
		{"a changed head before the first", flipped(0, 50), StateCorrupted},
		{"bytes after the end", [][]byte{append(bytes.Clone(parts[0]), 0)}, StateCorrupted},
		{"another type", [][]byte{append([]byte{0x87}, parts[0][1:]...)}, StateCorrupted},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := newOpener(t, &collected{})
			err := open(o, c.parts...)
			for _, reason := range []StateError{StateForeign, StateUnknownKey, StateTruncated, StateOrder, StateMixed, StateCorrupted} {
				if errors.Is(err, reason) != (reason == c.want) {
					t.Errorf("%v, want %q", err, c.want)
				}
			}
			if _, again := o.Open(parts[0]); len(c.parts) > 0 && c.name[:5] != "witho" && !errors.Is(again, c.want) {
				t.Errorf("opened on after an error: %v", again)
			}
		})
	}
	for i := range parts {
		if i != 0 && i != 7 {
			continue
		}
		if err := open(newOpener(t, &collected{}), parts[i:]...); err != nil {
			t.Errorf("from part %d: %v", i, err)
		}
	}
}

// mixedNumber is part 0 of delta 0 and part 1 of delta 1, under one salt.
func mixedNumber(t *testing.T) [][]byte {
	s := newSealer(t, nil, 0)
	first := seal(t, s, fullDelta(), memoryPage(0, 40, 1))
	second := seal(t, s, fullDelta(), memoryPage(0, 40, 1))
	return [][]byte{first[0], second[1]}
}

func TestStateEveryBit(t *testing.T) {
	part := seal(t, newSealer(t, nil, 0), fullDelta())[0]
	for i := range part {
		for bit := range 8 {
			bad := bytes.Clone(part)
			bad[i] ^= 1 << bit
			if d, err := newOpener(t, &collected{}).Open(bad); err == nil || d != nil {
				t.Fatalf("opened with bit %d of byte %d changed", bit, i)
			}
		}
	}
}

func TestStateRefusesMalformedContent(t *testing.T) {
	good, err := new(Delta).encode()
	if err != nil {
		t.Fatal(err)
	}
	full := Delta{Full: true, Memory: 1}
	fullHead, err := full.encode()
	if err != nil {
		t.Fatal(err)
	}
	run := func(items ...uint64) []byte {
		b := []byte{0x84}
		for _, n := range items[:3] {
			b = appendCBOR(b, majorUint, n)
		}
		return append(appendCBOR(b, majorBytes, items[3]), make([]byte, items[3])...)
	}
	cat := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	for name, plain := range map[string][]byte{
		"nothing":                    {},
		"no delta":                   {0},
		"not full":                   good,
		"a head that is too large":   appendCBOR(nil, majorUint, maxHead+1),
		"a head that goes on":        {0x18, 0x80, 1, 2},
		"bytes after the head":       cat([]byte{fullHead[0] + 1}, fullHead[1:], []byte{0}),
		"a run cut short":            cat(fullHead, run(0, 0, 0, 4096)[:4000]),
		"a run of five":              cat(fullHead, []byte{0x85}, run(0, 0, 0, 4096)[1:]),
		"a number spelt long":        cat(fullHead, []byte{0x84, 0x18, 0}, run(0, 0, 0, 4096)[2:]),
		"a page of no space":         cat(fullHead, run(2, 1, 0, 4096)),
		"half a page":                cat(fullHead, run(0, 0, 0, 2048)),
		"no page":                    cat(fullHead, run(0, 0, 0, 0)),
		"memory of an inode":         cat(fullHead, run(0, 1, 0, 4096)),
		"a file without an inode":    cat(fullHead, run(1, 0, 0, 10)),
		"a file's page beyond all":   cat(fullHead, run(1, 1, 1<<32, 10)),
		"memory beyond its size":     cat(fullHead, run(0, 0, 16, 4096)),
		"memory far beyond its size": cat(fullHead, run(0, 0, 1<<64-1, 4096)),
		"a page twice":               cat(fullHead, run(0, 0, 3, 4096), run(0, 0, 3, 4096)),
		"a page inside a run":        cat(fullHead, run(0, 0, 3, 8192), run(0, 0, 4, 4096)),
		"pages backwards":            cat(fullHead, run(0, 0, 3, 4096), run(0, 0, 1, 4096)),
		"spaces backwards":           cat(fullHead, run(1, 1, 3, 10), run(0, 0, 1, 4096)),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newOpener(t, &collected{}).Open(sealPlain(t, plain, true))
			if !errors.Is(err, StateCorrupted) && !(name == "not full" && errors.Is(err, StateTruncated)) {
				t.Errorf("%v", err)
			}
		})
	}
	o := newOpener(t, &collected{})
	if _, err := o.Open(sealPlain(t, fullHead, false)); err != nil {
		t.Fatal(err)
	}
}

// sealPlain seals any plaintext as the first part of a log.
func sealPlain(t testing.TB, plain []byte, last bool) (part []byte) {
	t.Helper()
	s := newSealer(t, nil, 0)
	s.plain = append(s.plain, plain...)
	if err := s.flush(last, func(p []byte) error { part = p; return nil }); err != nil {
		t.Fatal(err)
	}
	return part
}

// TestStateCheck: no altered part passes, and none of them keeps
// the genuine one from being opened.
func TestStateCheck(t *testing.T) {
	parts := history(t)
	o := newOpener(t, &collected{})
	for i, part := range parts {
		for bit := 0; bit < 8*len(part); bit += 1 + bit/2000*97 { // most of the header, some of the rest
			altered := bytes.Clone(part)
			altered[bit/8] ^= 1 << (bit % 8)
			if o.Check(altered) == nil {
				t.Fatalf("part %d with bit %d inverted passes", i, bit)
			}
		}
		if i+1 < len(parts) && o.Check(parts[i+1]) == nil {
			t.Errorf("part %d passes before its time", i+1)
		}
		if err := o.Check(part); err != nil {
			t.Fatalf("part %d: %v", i, err)
		}
		if _, err := o.Open(part); err != nil {
			t.Fatalf("part %d: %v", i, err)
		}
	}
	if err := o.End(); err != nil {
		t.Error(err)
	}
}

func TestSealerRefuses(t *testing.T) {
	large := make([]byte, MaxPack)
	for name, c := range map[string]struct {
		d     Delta
		pages []Page
	}{
		"a page twice":     {fullDelta(), []Page{memoryPage(1, 2, 1), memoryPage(2, 1, 1)}},
		"backwards":        {fullDelta(), []Page{memoryPage(2, 1, 1), memoryPage(1, 1, 1)}},
		"beyond memory":    {fullDelta(), []Page{memoryPage(64*16, 1, 1)}},
		"half a page":      {fullDelta(), []Page{{Data: make([]byte, 100)}}},
		"a large page":     {fullDelta(), []Page{{SpaceFiles, 1, 0, make([]byte, FilePage+1)}}},
		"a large pack":     {Delta{Results: [][]byte{make([]byte, MaxPack+1)}}, nil},
		"an empty pack":    {Delta{Results: [][]byte{nil}}, nil},
		"too many packs":   {Delta{Results: slices.Repeat([][]byte{large}, 40)}, nil},
		"a large tree":     {Delta{Tree: make([]byte, maxTree+1)}, nil},
		"too much memory":  {Delta{Memory: MaxMemory>>16 + 1}, nil},
		"a cursor's epoch": {Delta{Cursors: []Cursor{{Gateway: "a", Stream: "b", Epoch: []byte{1}}}}, nil},
		"a cursor's head":  {Delta{Cursors: []Cursor{{Gateway: "a", Stream: "b", Head: count(0, 32)}}}, nil},
		"a cursor's seq":   {Delta{Cursors: []Cursor{{Gateway: "a", Stream: "b", Epoch: count(0, 16), Seq: 1}}}, nil},
		"a cursor's name":  {Delta{Cursors: []Cursor{{Gateway: "a/b", Stream: "b"}}}, nil},
		"many cursors":     {Delta{Cursors: slices.Repeat([]Cursor{{Gateway: "a", Stream: "b"}}, 17)}, nil},
		"many globals":     {Delta{Globals: make([]uint64, 10_001)}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSealer(t, nil, 0)
			if err := s.Seal(c.d, slices.Values(c.pages), func([]byte) error { return nil }); err == nil {
				t.Fatal("sealed")
			}
			if err := s.Seal(fullDelta(), nil, func([]byte) error { return nil }); err == nil {
				t.Error("sealed on after an error")
			}
		})
	}
	cause := errors.New("disk full")
	if err := newSealer(t, nil, 0).Seal(fullDelta(), nil, func([]byte) error { return cause }); !errors.Is(err, cause) {
		t.Errorf("emit's error became %v", err)
	}
	k := testKeys()[0]
	for _, c := range []struct {
		instance      string
		id, key, prev []byte
	}{{"Bad", k.ID, k.Key, nil}, {"a", k.ID[:7], k.Key, nil}, {"a", k.ID, k.Key[:31], nil}, {"a", k.ID, k.Key, []byte{1}}} {
		if _, err := NewStateSealer(c.instance, c.id, c.key, c.prev, 0, rand.Reader); err == nil {
			t.Errorf("made a sealer of %+v", c)
		}
	}
	if _, err := NewStateSealer("a", k.ID, k.Key, nil, 0, strings.NewReader("short")); err == nil {
		t.Error("made a sealer without a salt")
	}
	if _, err := NewStateOpener("a", []StateKey{{ID: k.ID, Key: k.Key[1:]}}, nil); err == nil {
		t.Error("made an opener with a short key")
	}
}

// TestStateNoncesDiffer: two sealers that go on from the same place, as after a
// rollback, share neither key nor bytes.
func TestStateNoncesDiffer(t *testing.T) {
	a, b := seal(t, newSealer(t, nil, 5), fullDelta())[0], seal(t, newSealer(t, nil, 5), fullDelta())[0]
	ha, boxA, errA := parsePart(a)
	hb, boxB, errB := parsePart(b)
	if errA != nil || errB != nil || bytes.Equal(ha.salt, hb.salt) || bytes.Equal(boxA[:32], boxB[:32]) {
		t.Error("two sealers drew the same key")
	}
}

func TestStateSinkErrors(t *testing.T) {
	cause := errors.New("no room")
	o := newOpener(t, &collected{err: cause, pages: map[place]string{}})
	if _, err := o.Open(history(t)[0]); !errors.Is(err, cause) || !errors.Is(o.End(), cause) {
		t.Errorf("%v", err)
	}
}

func TestStateKeysChange(t *testing.T) {
	s := newSealer(t, nil, 0)
	parts := seal(t, s, fullDelta())
	k := testKeys()[1]
	s, err := NewStateSealer(testInstance, k.ID, k.Key, s.Head(), s.Next(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parts = append(parts, seal(t, s, Delta{})...)
	sink := &collected{}
	if err := open(newOpener(t, sink), parts...); err != nil || strings.Join(sink.order, ", ") != "begin 0, end, begin 1, end" {
		t.Errorf("%v, %v", sink.order, err)
	}
}

func TestChainHead(t *testing.T) {
	parts := history(t)
	if _, err := ChainHead(nil, parts[1]); err != nil {
		t.Error(err)
	}
	if _, err := ChainHead(make([]byte, 32), parts[1]); !errors.Is(err, StateMixed) {
		t.Error(err)
	}
	if _, err := ChainHead(nil, parts[1][:100]); !errors.Is(err, StateTruncated) {
		t.Error(err)
	}
}

// TestStateGolden opens the golden part by its documented construction, and seals
// the same bytes.
func TestStateGolden(t *testing.T) {
	want := golden(t, "state.golden")
	k := testKeys()[0]
	s, err := NewStateSealer(testInstance, k.ID, k.Key, count(0xc0, 32), 300, bytes.NewReader(count(0x50, 16)))
	if err != nil {
		t.Fatal(err)
	}
	parts := seal(t, s, fullDelta(), Page{SpaceFiles, 5, 1, []byte("ab")})
	if len(parts) != 1 || !bytes.Equal(parts[0], want) {
		t.Fatalf("sealed\n%x, want\n%x", parts, want)
	}
	derived, err := hkdf.Key(sha256.New, k.Key, count(0x50, 16), "edgekeep state", 32)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(derived)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	plain := golden(t, "state-plain.golden")
	box := len(want) - len(plain) - 16
	additional := append([]byte{0x87}, want[1:box-2]...)
	got, err := aead.Open(nil, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 44}, want[box:], additional)
	if err != nil || !bytes.Equal(got, plain) {
		t.Errorf("%x, %v", got, err)
	}
	sink := &collected{}
	o := newOpener(t, sink)
	d, err := o.Open(want)
	wantDelta := fullDelta()
	wantDelta.N = 300
	if err != nil || !same(*d, wantDelta) || len(sink.pages) != 1 || sink.pages[place{1, 5, 1}] != "ab" {
		t.Errorf("%+v, %v", d, err)
	}
}

// golden reads testdata/name: bytes in hex, and after each # what they are.
func golden(t testing.TB, name string) (all []byte) {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		digits, _, _ := strings.Cut(line, "#")
		b, err := hex.DecodeString(strings.Join(strings.Fields(digits), ""))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return all
}

func FuzzStatePart(f *testing.F) {
	for _, p := range history(f)[4:] {
		f.Add(p)
	}
	f.Add(golden(f, "state.golden"))
	f.Fuzz(func(t *testing.T, part []byte) {
		h, box, err := parsePart(part)
		if err != nil {
			return
		}
		again := append(appendCBOR(h.append(nil, 8), majorBytes, uint64(len(box))), box...)
		if !bytes.Equal(again, part) {
			t.Errorf("read\n%x, which is\n%x", part, again)
		}
		newOpener(t, &collected{}).Open(part)
	})
}

// FuzzStateContent: what an honest sealer never seals is refused, and what is taken
// is sealed the same again, but for where runs are cut.
func FuzzStateContent(f *testing.F) {
	d := fullDelta()
	head, err := d.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(head)
	f.Add(golden(f, "state-plain.golden"))
	f.Fuzz(func(t *testing.T, plain []byte) {
		if len(plain) == 0 || len(plain) > maxPlain {
			return
		}
		d, err := newOpener(t, &collected{}).Open(sealPlain(t, plain, true))
		if err != nil {
			return
		}
		again, err := d.encode()
		if err != nil || !bytes.HasPrefix(plain, again) {
			t.Errorf("took %x, which is %x, %v", plain, again, err)
		}
	})
}

// counting is a sink that copies pages to memory, as a restore does.
type counting struct{ memory []byte }

func (c *counting) Begin(*Delta) error { return nil }
func (c *counting) End() error         { return nil }
func (c *counting) Page(p Page) error {
	copy(c.memory[p.Index*MemoryPage:], p.Data)
	return nil
}

func BenchmarkState(b *testing.B) {
	for _, mib := range []int{4, 64, 256} {
		memory := make([]byte, mib<<20)
		for i := range memory {
			memory[i] = byte(i * 7)
		}
		d := Delta{Full: true, Memory: uint32(mib << 4)}
		var parts [][]byte
		b.Run(fmt.Sprintf("seal/%dMiB", mib), func(b *testing.B) {
			b.SetBytes(int64(len(memory)))
			for b.Loop() {
				parts = seal(b, newSealer(b, nil, 0), d, Page{Data: memory})
			}
		})
		b.Run(fmt.Sprintf("open/%dMiB", mib), func(b *testing.B) {
			b.SetBytes(int64(len(memory)))
			sink := &counting{memory: make([]byte, len(memory))}
			for b.Loop() {
				if err := open(newOpener(b, sink), parts...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

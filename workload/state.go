package workload

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"slices"

	"edgekeep/internal/cose"
)

// # State
//
// An instance's state is stored and travels as a log of deltas, numbered without
// gaps. A full delta is complete by itself: all before it may be forgotten. A delta
// is one or more parts, small enough for one message each:
//
//	part = [instance: tstr, key: bstr .size 8, salt: bstr .size 16, n: uint,
//	        index: uint, last: bool, prev: bstr .size 32, box: bstr]
//
// key is the id of a 32-byte key; n the delta's number, index the part's in its
// delta; last marks the last part of a delta. prev is the SHA-256 of the part
// before it in the log, 32 zeros in the first of all: so the SHA-256 of a log's
// newest part, its head, stands for all of it, and anyone can compute it
// (ChainHead). box is AES-256-GCM under HKDF-SHA256(key, salt, "edgekeep state")
// with the nonce 4-byte index, 8-byte n, both big-endian, and as additional data
// the array of the seven fields before it. ⚠ Each StateSealer draws a fresh salt:
// a log that a restored disk rolled back never repeats a (key, nonce). Key and salt
// stay the same within a delta.
//
// The plaintexts of a delta's parts are, in order: the size of the head (uint) and
// the head, which fill whole parts of maxPlain bytes if they do not fit one; then
// runs, as many whole ones in a part as fit. The head is a CBOR sequence
//
//	bstr .cbor {1: full, 2: [* cursor], 3: line, 4: [* global],
//	 5: memory pages, 6: number of packs}, tree: bstr, fds: bstr, * pack: bstr
//
// and a run is [space, inode, index, data: bstr]: in space 0 (linear memory, inode
// 0) one or more pages of 4 KiB from index on, in space 1 (files) one page of at
// most 64 KiB. Runs ascend in (space, inode, index).

// Delta is what changed in an instance's state, but for the pages of its memory and
// its files.
type Delta struct {
	N       uint64 // number in its log; the sealer counts
	Full    bool   // complete by itself
	Cursors []Cursor
	Line    uint64   // number of the newest result
	Results [][]byte // results of this delta, the last of which is Line: SenML packs
	Globals []uint64 // bit patterns of the mutable globals, in the order of their indices
	Memory  uint32   // size of linear memory, in pages of 64 KiB
	Tree    []byte   // the private directory without the contents of files
	FDs     []byte   // open descriptors and the guest's clock
}

// Cursor is how far an instance has read one of its inputs.
type Cursor struct {
	_       struct{} `cbor:",toarray"`
	Gateway string
	Stream  string
	Epoch   []byte // 16 bytes; empty: nothing was read yet
	Seq     uint64 // newest record that was consumed whole
	Head    []byte // its SHA-256; empty: none of the epoch was
	Skip    uint64 // readings of the record after it that were consumed
}

// Spaces of pages.
const (
	SpaceMemory = 0 // pages of MemoryPage bytes
	SpaceFiles  = 1 // pages of at most FilePage bytes
)

// Sizes of state, in bytes.
const (
	MemoryPage = 4 << 10
	FilePage   = 64 << 10
	MaxPack    = 1 << 20  // of one of a delta's packs
	MaxPart    = 72 << 10 // of a part
	maxTree    = 1 << 20
	maxHead    = 32 << 20
	// maxPlain lets 64 KiB of pages into a part with their headers, and the part
	// into a message of 96 KiB.
	maxPlain    = FilePage + 4<<10
	maxParts    = 1 << 20
	keyIDSize   = 8
	saltSize    = 16
	tagSize     = 16
	maxRunHead  = 1 + 1 + 9 + 9 + 5
	maxPartHead = 1 + 28 + 9 + 17 + 9 + 9 + 1 + 34 + 5
)

// Page is a page of memory or of a file, or, of memory, several that follow each
// other: Data is a multiple of MemoryPage.
type Page struct {
	Space uint64
	Inode uint64 // of a file; 0 for memory
	Index uint64 // of the first page
	Data  []byte
}

// count is how many pages it is.
func (p Page) count() uint64 {
	if p.Space == SpaceMemory {
		return uint64(len(p.Data)) / MemoryPage
	}
	return 1
}

// holds says why p is no page of a state with this head.
func (d *Delta) holds(p Page) error {
	switch {
	case len(p.Data) == 0,
		p.Space == SpaceMemory && (p.Inode != 0 || len(p.Data)%MemoryPage != 0 || p.Index > math.MaxUint32 || p.Index+p.count() > uint64(d.Memory)<<16/MemoryPage),
		p.Space == SpaceFiles && (p.Inode == 0 || len(p.Data) > FilePage || p.Index > math.MaxUint32),
		p.Space > SpaceFiles:
		return fmt.Errorf("%d bytes for page %d of space %d, inode %d are no page", len(p.Data), p.Index, p.Space, p.Inode)
	}
	return nil
}

// place is where the next page may be at the earliest.
type place struct{ space, inode, index uint64 }

func (p Page) place() place { return place{p.Space, p.Inode, p.Index} }
func (p Page) after() place { return place{p.Space, p.Inode, p.Index + p.count()} }
func (a place) less(b place) bool {
	return slices.Compare([]uint64{a.space, a.inode, a.index}, []uint64{b.space, b.inode, b.index}) < 0
}

// stateHead is the fixed part of a delta's head.
type stateHead struct {
	Full    bool     `cbor:"1,keyasint"`
	Cursors []Cursor `cbor:"2,keyasint"`
	Line    uint64   `cbor:"3,keyasint"`
	Globals []uint64 `cbor:"4,keyasint"`
	Memory  uint32   `cbor:"5,keyasint"`
	Packs   uint64   `cbor:"6,keyasint"`
}

// encode is a delta's head with its size in front.
func (d *Delta) encode() ([]byte, error) {
	if err := d.validate(); err != nil {
		return nil, err
	}
	fixed, err := cose.Marshal(stateHead{
		Full: d.Full, Cursors: d.Cursors, Line: d.Line, Globals: d.Globals, Memory: d.Memory, Packs: uint64(len(d.Results)),
	})
	if err != nil {
		return nil, err
	}
	var head []byte
	for _, b := range append([][]byte{fixed, d.Tree, d.FDs}, d.Results...) {
		head = appendBytes(head, b)
	}
	if len(head) > maxHead {
		return nil, fmt.Errorf("%d bytes besides the pages, at most %d fit", len(head), maxHead)
	}
	return append(cose.MustMarshal(uint64(len(head))), head...), nil
}

func decodeHead(b []byte) (*Delta, error) {
	var h stateHead
	r := stateReader{data: b}
	if fixed := r.bytes(); r.err == nil {
		r.err = cose.Unmarshal(fixed, &h)
	}
	d := &Delta{Full: h.Full, Cursors: h.Cursors, Line: h.Line, Globals: h.Globals, Memory: h.Memory}
	d.Tree, d.FDs = r.bytes(), r.bytes()
	for ; h.Packs > 0 && r.err == nil; h.Packs-- {
		d.Results = append(d.Results, r.bytes())
	}
	if r.err == nil && r.at != len(b) {
		r.err = errors.New("bytes after the end")
	}
	if r.err == nil {
		r.err = d.validate()
	}
	return d, r.err
}

func (d *Delta) validate() error {
	for _, c := range d.Cursors {
		if !nodeName.MatchString(c.Gateway) || !nodeName.MatchString(c.Stream) || len(c.Epoch) != 0 && len(c.Epoch) != 16 ||
			len(c.Head) != 0 && len(c.Head) != sha256.Size || len(c.Epoch) == 0 && (len(c.Head) != 0 || c.Skip != 0) || len(c.Head) == 0 && c.Seq != 0 {
			return fmt.Errorf("cursor of %.32q/%.32q: a field is missing or of the wrong size", c.Gateway, c.Stream)
		}
	}
	switch {
	case len(d.Cursors) > maxStreams:
		return errors.New("more cursors than inputs")
	case len(d.Globals) > 10_000 || d.Memory > MaxMemory>>16:
		return errors.New("more globals or memory than any guest has")
	case len(d.Tree) > maxTree || len(d.FDs) > maxTree:
		return errors.New("the directory or the descriptors are too large")
	}
	for _, pack := range d.Results {
		if len(pack) == 0 || len(pack) > MaxPack {
			return fmt.Errorf("a pack of results has %d bytes, 1 to %d are possible", len(pack), MaxPack)
		}
	}
	return nil
}

// partHeader are the fields of a part before its box.
type partHeader struct {
	instance   string
	key, salt  []byte
	n, index   uint64
	last       bool
	prev       []byte
	additional []byte // the AEAD's additional data
}

// append appends the head of an array of size and the fields.
func (h *partHeader) append(out []byte, size uint64) []byte {
	out = appendCBOR(out, majorArray, size)
	out = append(appendCBOR(out, majorText, uint64(len(h.instance))), h.instance...)
	out = append(appendCBOR(out, majorBytes, keyIDSize), h.key...)
	out = append(appendCBOR(out, majorBytes, saltSize), h.salt...)
	out = appendCBOR(appendCBOR(out, majorUint, h.n), majorUint, h.index)
	last := byte(cborFalse)
	if h.last {
		last = cborTrue
	}
	return append(appendCBOR(append(out, last), majorBytes, sha256.Size), h.prev...)
}

func (h *partHeader) nonce() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(make([]byte, 0, 12), uint32(h.index)), h.n)
}

// stateKey derives the key of a salt.
func stateKey(key, salt []byte) ([]byte, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("a state key of %d bytes, it has %d", len(key), KeySize)
	}
	return hkdf.Key(sha256.New, key, salt, "edgekeep state", KeySize)
}

// Pages are pages in ascending order.
type Pages = iter.Seq[Page]

// drawSalt is the salt of a sealer.
func drawSalt(rand io.Reader) ([]byte, error) {
	salt := make([]byte, saltSize)
	if _, err := io.ReadFull(rand, salt); err != nil {
		return nil, fmt.Errorf("drawing a salt: %w", err)
	}
	return salt, nil
}

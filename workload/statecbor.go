package workload

import (
	"errors"

	"edgekeep/internal/cose"
)

// The parts of state are too many and too large for an encoder that reflects and a
// decoder that encodes again: this reads and writes the few kinds of items that
// they have, in their one spelling.

// CBOR major types (RFC 8949 §3.1).
const (
	majorUint  = 0
	majorBytes = 2
	majorText  = 3
	majorArray = 4

	cborFalse = 0xf4
	cborTrue  = 0xf5
)

// appendCBOR appends the head of an item of a major type.
func appendCBOR(b []byte, major byte, n uint64) []byte { return cose.AppendHead(b, major<<5, n) }

// stateReader takes items off the front of data. After the first failure err is
// set, and all that is read is empty. What it returns aliases data.
type stateReader struct {
	data  []byte
	at    int
	err   error
	short bool // it failed because data ends too soon
}

var (
	errShort = errors.New("cut short")
	errShape = errors.New("not of the shape that belongs there")
)

func (r *stateReader) fail(err error) {
	if r.err == nil {
		r.err, r.short = err, errors.Is(err, errShort)
	}
}

func (r *stateReader) take(n uint64) []byte {
	if r.err == nil && n > uint64(len(r.data)-r.at) {
		r.fail(errShort)
	}
	if r.err != nil {
		return nil
	}
	b := r.data[r.at : r.at+int(n) : r.at+int(n)]
	r.at += int(n)
	return b
}

// literal passes one byte.
func (r *stateReader) literal(want byte) {
	if b := r.take(1); r.err == nil && b[0] != want {
		r.fail(errShape)
	}
}

// head reads the head of an item of a major type in its shortest spelling.
func (r *stateReader) head(major byte) uint64 {
	start := r.at
	first := r.take(1)
	if r.err != nil {
		return 0
	}
	info := first[0] & 0x1f
	n := uint64(info)
	if info >= 24 && info <= 27 {
		n = 0
		for _, b := range r.take(1 << (info - 24)) {
			n = n<<8 | uint64(b)
		}
	}
	if r.err != nil {
		return 0
	}
	var room [9]byte
	if string(appendCBOR(room[:0], major, n)) != string(r.data[start:r.at]) {
		r.fail(errShape)
		return 0
	}
	return n
}

func (r *stateReader) number() uint64 { return r.head(majorUint) }
func (r *stateReader) bytes() []byte  { return r.take(r.head(majorBytes)) }
func (r *stateReader) text() []byte   { return r.take(r.head(majorText)) }

func (r *stateReader) boolean() bool {
	b := r.take(1)
	if r.err == nil && b[0] != cborFalse && b[0] != cborTrue {
		r.fail(errShape)
	}
	return r.err == nil && b[0] == cborTrue
}

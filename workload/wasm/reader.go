package wasm

import (
	"fmt"
	"unicode/utf8"
)

// A reader reads data[pos:end]. After an error all its methods return zero and change
// nothing, so that a caller may check err after several of them, and in every loop.
type reader struct {
	data     []byte
	pos, end int
	err      error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) malformed(at int, format string, args ...any) {
	r.fail(&MalformedError{Detail: fmt.Sprintf(format, args...), Offset: at})
}

func (r *reader) refuse(at int, reason, format string, args ...any) {
	r.fail(&RefusedError{Reason: reason, Detail: fmt.Sprintf(format, args...), Offset: at})
}

func (r *reader) more() bool { return r.err == nil && r.pos < r.end }

func (r *reader) byte() byte {
	if r.err != nil {
		return 0
	}
	if r.pos >= r.end {
		r.malformed(r.pos, "it ends too early")
		return 0
	}
	r.pos++
	return r.data[r.pos-1]
}

// take returns the next n bytes; nil when they are not there.
func (r *reader) take(n uint32) []byte {
	if r.err != nil {
		return nil
	}
	if uint64(n) > uint64(r.end-r.pos) {
		r.malformed(r.pos, "%d bytes are announced, %d are left", n, r.end-r.pos)
		return nil
	}
	r.pos += int(n)
	return r.data[r.pos-int(n) : r.pos : r.pos]
}

// sub returns a reader of the next n bytes, and skips them.
func (r *reader) sub(n uint32) *reader {
	start := r.pos
	r.take(n)
	return &reader{data: r.data, pos: start, end: r.pos, err: r.err}
}

// u32 reads an unsigned LEB128 number of 32 bits.
func (r *reader) u32() uint32 {
	if r.more() && r.data[r.pos] < 0x80 {
		r.pos++
		return uint32(r.data[r.pos-1])
	}
	start := r.pos
	var v uint32
	for shift := 0; r.err == nil; shift += 7 {
		b := r.byte()
		if shift == 28 && b > 0x0f {
			r.malformed(start, "a number has more than 32 bits")
			return 0
		}
		v |= uint32(b&0x7f) << shift
		if b < 0x80 {
			return v
		}
	}
	return 0
}

// signed skips a signed LEB128 number of 32, 33 or 64 bits, and returns it.
func (r *reader) signed(bits int) int64 {
	start := r.pos
	var v int64
	for shift := 0; r.err == nil; shift += 7 {
		b := r.byte()
		v |= int64(b&0x7f) << shift
		if left := bits - shift; left <= 7 && !lastOfSigned(b, left) {
			r.malformed(start, "a number has more than %d bits", bits)
			return 0
		}
		if b < 0x80 {
			if shift < 57 {
				v = v << (57 - shift) >> (57 - shift)
			}
			return v
		}
	}
	return 0
}

// lastOfSigned says whether b can be the last byte that a signed LEB128 number may have,
// where left of its 7 bits belong to the number: no byte follows, and the other bits
// repeat the sign.
func lastOfSigned(b byte, left int) bool {
	top := b >> (left - 1)
	return top == 0 || top == 0x7f>>(left-1)
}

// count reads the length of a vector. It is refused beyond limit, and malformed if even
// with items of one byte the vector did not fit.
func (r *reader) count(limit uint32, what string) int {
	start := r.pos
	n := r.u32()
	if uint64(n) > uint64(r.end-r.pos) {
		r.malformed(start, "%d %s are announced in %d bytes", n, what, r.end-r.pos)
		return 0
	}
	if n > limit {
		r.refuse(start, tooLarge, "%d %s, the limit is %d", n, what, limit)
		return 0
	}
	return int(n)
}

func (r *reader) name() []byte {
	n := r.u32()
	start := r.pos
	b := r.take(n)
	if !utf8.Valid(b) {
		r.malformed(start, "a name is not UTF-8")
		return nil
	}
	return b
}

// done fails when bytes are left.
func (r *reader) done(what string) {
	if r.more() {
		r.malformed(r.pos, "%d bytes follow the %s", r.end-r.pos, what)
	}
}

func appendU32(b []byte, v uint32) []byte {
	for ; v >= 0x80; v >>= 7 {
		b = append(b, byte(v)|0x80)
	}
	return append(b, byte(v))
}

package cose

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/bits"
	"unicode/utf8"
)

// CBOR major types (RFC 8949 §3.1).
const (
	majorUint   = 0
	majorNegint = 1
	majorBytes  = 2
	majorText   = 3
	majorArray  = 4
	majorMap    = 5
	majorTag    = 6
	majorSimple = 7
)

// checkCanonical refuses data that is not in core deterministic encoding, also in the
// places that a decode into Go values and back would copy unseen. The limits on size
// and depth have been checked before.
func checkCanonical(data []byte) error {
	r := reader{data: data}
	r.item()
	return r.end()
}

// item passes one item of any kind and leaves r.err set when it is not canonical.
func (r *reader) item() {
	if r.at < len(r.data) && r.data[r.at]>>5 == majorSimple {
		r.simple()
		return
	}
	start := r.at
	major, arg := r.head()
	switch major {
	case majorBytes:
		r.take(arg)
	case majorText:
		if !utf8.Valid(r.take(arg)) {
			r.fail(start, "text is not utf-8")
		}
	case majorArray:
		for ; arg > 0 && r.err == nil; arg-- {
			r.item()
		}
	case majorMap:
		r.pairs(arg)
	case majorTag:
		r.tagged(arg)
	}
}

// pairs passes n map pairs, whose keys ascend bytewise, and so are all different.
func (r *reader) pairs(n uint64) {
	var last []byte
	for ; n > 0 && r.err == nil; n-- {
		start := r.at
		r.item()
		key := r.data[start:r.at]
		if r.err == nil && last != nil && bytes.Compare(last, key) >= 0 {
			r.fail(start, "map key is not above the one before it")
		}
		last = key
		r.item()
	}
}

// tagged passes the content of a tag. A bignum (RFC 8949 §3.4.3) is canonical when it
// is too large for an integer and has no leading zero.
func (r *reader) tagged(tag uint64) {
	if tag != 2 && tag != 3 {
		r.item()
		return
	}
	start := r.at
	if n := r.bytes(); r.err == nil && (len(n) <= 8 || n[0] == 0) {
		r.fail(start, "bignum is not in its shortest form")
	}
}

// simple passes a simple value or a float. Other than null, true, false, undefined
// and floats, a simple value has no meaning that a standard gives it, but one spelling.
func (r *reader) simple() {
	start, info := r.at, r.data[r.at]&0x1f
	r.at++
	switch {
	case info < 24:
	case info == 24:
		if v := r.take(1); r.err == nil && v[0] < 32 {
			r.fail(start, "simple value is not in its shortest form")
		}
	case info <= 27:
		if raw := r.take(1 << (info - 24)); r.err == nil && !shortestFloat(raw) {
			r.fail(start, "float is not in its shortest form")
		}
	default:
		r.fail(start, "indefinite length or reserved value")
	}
}

// shortestFloat tells whether an IEEE 754 number of 2, 4 or 8 bytes cannot be written
// in fewer without loss. Of all NaNs only 7e00 is.
func shortestFloat(raw []byte) bool {
	switch len(raw) {
	case 2:
		h := binary.BigEndian.Uint16(raw)
		isNaN := h&0x7c00 == 0x7c00 && h&0x03ff != 0
		return !isNaN || h == 0x7e00
	case 4:
		f := binary.BigEndian.Uint32(raw)
		return !math.IsNaN(float64(math.Float32frombits(f))) && !fitsHalf(f)
	default:
		f := math.Float64frombits(binary.BigEndian.Uint64(raw))
		return !math.IsNaN(f) && float64(float32(f)) != f
	}
}

// fitsHalf tells whether the single-precision number f, which is not NaN, is exactly
// a half-precision one: 10 bits of fraction, exponents -14 to 15, below that multiples
// of 2^-24.
func fitsHalf(f uint32) bool {
	exponent, fraction := int(f>>23&0xff)-127, f&0x7fffff
	switch {
	case f&0x7fffffff == 0, exponent == 128: // zero, infinity
		return true
	case exponent >= -14:
		return exponent <= 15 && fraction&0x1fff == 0
	default:
		return exponent >= -24 && bits.TrailingZeros32(fraction|1<<23) >= -1-exponent
	}
}

package cose

import (
	"bytes"
	"encoding/binary"
	"math"
)

// reader takes CBOR of a known shape apart, front to back, in its one spelling. After
// the first failure err is set, and all that is read is empty. What it returns aliases
// data.
type reader struct {
	data []byte
	at   int
	err  error
}

func (r *reader) fail(at int, what string) {
	if r.err == nil {
		r.err = malformed("byte %d: %s", at, what)
	}
}

// take reads the next n bytes.
func (r *reader) take(n uint64) []byte {
	if r.err == nil && n > uint64(len(r.data)-r.at) {
		r.fail(r.at, "cut short")
	}
	if r.err != nil {
		return nil
	}
	taken := r.data[r.at : r.at+int(n) : r.at+int(n)]
	r.at += int(n)
	return taken
}

// head reads the first bytes of an item that is not a simple value or a float: its
// major type and its argument in the shortest form (RFC 8949 §3).
func (r *reader) head() (major byte, arg uint64) {
	start := r.at
	first := r.take(1)
	if r.err != nil {
		return 0, 0
	}
	major, info := first[0]>>5, first[0]&0x1f
	if info < 24 {
		return major, uint64(info)
	}
	if info > 27 {
		r.fail(start, "indefinite length or reserved value")
		return 0, 0
	}
	raw := r.take(1 << (info - 24))
	if r.err != nil {
		return 0, 0
	}
	arg, least := argument(raw)
	if arg < least {
		r.fail(start, "number is not in its shortest form")
		return 0, 0
	}
	return major, arg
}

// argument is the number in the 1, 2, 4 or 8 bytes after a first byte, and the least
// one that needs so many.
func argument(raw []byte) (arg, least uint64) {
	switch len(raw) {
	case 1:
		return uint64(raw[0]), 24
	case 2:
		return uint64(binary.BigEndian.Uint16(raw)), math.MaxUint8 + 1
	case 4:
		return uint64(binary.BigEndian.Uint32(raw)), math.MaxUint16 + 1
	default:
		return binary.BigEndian.Uint64(raw), math.MaxUint32 + 1
	}
}

// bytes reads a byte string.
func (r *reader) bytes() []byte {
	start := r.at
	major, n := r.head()
	if r.err == nil && major != majorBytes {
		r.fail(start, "expected a byte string")
	}
	return r.take(n)
}

// literal passes exactly these bytes, which are the named part of the message.
func (r *reader) literal(what string, want ...byte) {
	start := r.at
	if got := r.take(uint64(len(want))); r.err == nil && !bytes.Equal(got, want) {
		r.fail(start, "expected "+what)
	}
}

// end is the error of the whole reading, also when bytes are left.
func (r *reader) end() error {
	if r.err == nil && r.at != len(r.data) {
		r.fail(r.at, "bytes after the end")
	}
	return r.err
}

// readMessage starts the reading of a whole message with the first bytes of its kind.
func readMessage(msg []byte, kind string, prefix ...byte) *reader {
	r := &reader{data: msg}
	if len(msg) > maxSize {
		r.err = malformed("%d bytes, at most %d are read", len(msg), maxSize)
	}
	r.literal(kind, prefix...)
	return r
}

// appendHead appends the head of an item with argument n.
func appendHead(b []byte, major byte, n int) []byte {
	switch n := uint64(n); {
	case n < 24:
		return append(b, major<<5|byte(n))
	case n <= math.MaxUint8:
		return append(b, major<<5|24, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, major<<5|25), uint16(n))
	case n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, major<<5|26), uint32(n))
	default:
		return binary.BigEndian.AppendUint64(append(b, major<<5|27), n)
	}
}

// appendBytes appends a byte string.
func appendBytes(b, content []byte) []byte {
	return append(appendHead(b, majorBytes, len(content)), content...)
}

// structure encodes [context, parts...], the shape of what COSE authenticates:
// Enc_structure (RFC 9052 §5.3) and MAC_structure (§6.3).
func structure(context string, parts ...[]byte) []byte {
	size := 1 + maxHead + len(context)
	for _, p := range parts {
		size += maxHead + len(p)
	}
	b := appendHead(make([]byte, 0, size), majorArray, 1+len(parts))
	b = append(appendHead(b, majorText, len(context)), context...)
	for _, p := range parts {
		b = appendBytes(b, p)
	}
	return b
}

// maxHead is the most bytes that appendHead writes.
const maxHead = 9

package cose

import (
	"encoding/binary"
	"math"
)

// AppendHead appends the head of a CBOR item, the shortest way (RFC 8949 §3):
// major is its major type in the upper three bits, n its argument. For formats
// whose items are too large, or too many a second, for Marshal.
func AppendHead(b []byte, major byte, n uint64) []byte {
	switch {
	case n < 24:
		return append(b, major|byte(n))
	case n <= math.MaxUint8:
		return append(b, major|24, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(n))
	case n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), n)
}

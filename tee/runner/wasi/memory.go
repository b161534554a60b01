package wasi

import (
	"context"
	"encoding/binary"

	"github.com/tetratelabs/wazero/api"
)

const (
	maxBuffers = 1024
	maxMove    = 0x7ffff000 // bytes in one read or write, as in Linux
)

var le = binary.LittleEndian

// call is one call from the guest.
type call struct {
	ctx    context.Context //nolint:containedctx // it is the call
	module api.Module
	memory api.Memory // nil when the guest exports none
	args   []uint64
}

func (c *call) u32(i int) uint32 { return uint32(c.args[i]) }
func (c *call) u64(i int) uint64 { return c.args[i] }

// view is n bytes of the guest's memory, to read and to write.
func (c *call) view(ptr uint32, n uint64) ([]byte, errno) {
	// The last byte of 4 GiB is out of bounds here: wazero's own check of a range
	// that ends there overflows.
	if c.memory == nil || uint64(ptr)+n >= 1<<32 {
		return nil, eFAULT
	}
	b, ok := c.memory.Read(ptr, uint32(n))
	if !ok {
		return nil, eFAULT
	}
	return b, success
}

// bytes is the memory at args[i], of a length that is args[i+1].
func (c *call) bytes(i int) ([]byte, errno) {
	return c.view(c.u32(i), uint64(c.u32(i+1)))
}

// path is a copy of the string at args[i], of a length that is args[i+1].
func (c *call) path(i int) (string, errno) {
	if c.u32(i+1) > maxPath {
		return "", eNAMETOOLONG
	}
	b, err := c.bytes(i)
	return string(b), err
}

// buffers are those of the iovec array at args[i], of a count that is args[i+1],
// together at most maxMove bytes.
func (c *call) buffers(i int) ([][]byte, errno) {
	n := c.u32(i + 1)
	if n > maxBuffers {
		return nil, eINVAL
	}
	vector, err := c.view(c.u32(i), uint64(n)*8)
	if err != 0 {
		return nil, err
	}
	list := make([][]byte, 0, n)
	room := maxMove
	for ; len(vector) > 0; vector = vector[8:] {
		b, err := c.view(le.Uint32(vector), uint64(le.Uint32(vector[4:])))
		if err != 0 {
			return nil, err
		}
		if b = b[:min(len(b), room)]; len(b) > 0 {
			list = append(list, b)
		}
		room -= len(b)
	}
	return list, success
}

func putU32(b []byte, v int) errno {
	le.PutUint32(b, uint32(v))
	return success
}

func putU64(b []byte, v uint64) errno {
	le.PutUint64(b, v)
	return success
}

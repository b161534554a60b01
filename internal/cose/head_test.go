package cose

import (
	"bytes"
	"math"
	"testing"
)

// An unsigned integer is its head: Marshal says what is right.
func TestAppendHead(t *testing.T) {
	for _, n := range []uint64{0, 23, 24, 255, 256, 65535, 65536, math.MaxUint32, math.MaxUint32 + 1, math.MaxUint64} {
		want := MustMarshal(n)
		if got := AppendHead(nil, 0, n); !bytes.Equal(got, want) {
			t.Errorf("%d: %x, want %x", n, got, want)
		}
		want[0] |= 5 << 5
		if got := AppendHead(nil, 5<<5, n); !bytes.Equal(got, want) {
			t.Errorf("a map of %d: %x, want %x", n, got, want)
		}
	}
}

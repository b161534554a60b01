// A reactor in Go whose state is in its heap, in its goroutines, and so in the mutable
// globals of the Go runtime.
package main

import "unsafe"

var (
	input   [4096]byte
	output  [8]byte
	history [][]byte
	work    = make(chan []byte)
	sums    = make(chan uint64)
)

//go:wasmexport edgekeep_alloc
func alloc(n uint32) uint32 {
	if n > uint32(len(input)) {
		return 0
	}
	return uint32(uintptr(unsafe.Pointer(&input[0])))
}

//go:wasmexport edgekeep_batch
func batch(at, n uint32) uint64 {
	if len(history) == 0 {
		go worker()
	}
	b := append(make([]byte, 0, 1<<16), input[:n]...)
	history = append(history, b)
	work <- b
	return deep(<-sums, 200)
}

// worker stays alive between calls, with its sum on its stack.
func worker() {
	sum := uint64(14695981039346656037)
	for b := range work {
		for _, c := range b {
			sum = (sum ^ uint64(c)) * 1099511628211
		}
		sums <- sum + uint64(len(history))
	}
}

// deep makes the stack grow.
func deep(v uint64, n int) uint64 {
	var pad [64]uint64
	pad[n%64] = v
	if n == 0 {
		return v
	}
	return deep(pad[n%64]+1, n-1) ^ pad[(n+1)%64]
}

func main() {}

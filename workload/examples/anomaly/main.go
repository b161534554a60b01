//go:build wasip1

// Command anomaly is the anomaly workload, a reactor: package detect behind the
// exports that a runner calls. Its one argument names the model under /models.
package main

import (
	"fmt"
	"os"
	"unsafe"

	"edgekeep/workload/examples/anomaly/detect"
)

var (
	detector *detect.Detector
	in, out  []byte // what the host writes and reads, kept from the collector until the next call
)

// init runs in _initialize: a reactor's main never does.
func init() {
	if err := start(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "anomaly:", err)
		os.Exit(2)
	}
}

func start(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%d arguments, want one: the name of the model", len(args)-1)
	}
	raw, err := os.ReadFile("/models/" + args[1])
	if err != nil {
		return err
	}
	model, err := detect.ParseModel(raw)
	if err != nil {
		return err
	}
	detector = detect.NewDetector(model)
	return nil
}

// maxBatch is more than any batch has, in bytes.
const maxBatch = 1 << 20

// alloc returns room for a batch of size bytes, 0 when that is too many.
//
//go:wasmexport edgekeep_alloc
func alloc(size int32) int32 {
	if size < 0 || size > maxBatch {
		return 0
	}
	if int(size) > len(in) {
		in = make([]byte, max(int(size), 1<<16))
	}
	return address(in)
}

// batch returns pointer and length of the output, -1 when the batch failed.
//
//go:wasmexport edgekeep_batch
func batch(ptr, size int32) int64 {
	if size < 0 || int(size) > len(in) || (size > 0 && ptr != address(in)) {
		fmt.Fprintln(os.Stderr, "anomaly: the batch is not where edgekeep_alloc said")
		return -1
	}
	var err error
	if out, err = detector.Batch(in[:size]); err != nil {
		fmt.Fprintln(os.Stderr, "anomaly:", err)
		return -1
	}
	return int64(address(out))<<32 | int64(len(out))
}

// address is that of the first byte in linear memory, 0 for none.
func address(b []byte) int32 { return int32(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

func main() {}

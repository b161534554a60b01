package wasm

import "fmt"

// RefusedError says that a module is not taken although it may be a good module: its state
// could not be captured, or it asks for more than a workload gets.
type RefusedError struct {
	Reason string // one of the words in the package comment
	Detail string // what was found
	Offset int    // where, in bytes from the start of the module
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("wasm: module refused (%s at byte %d): %s: %s", e.Reason, e.Offset, e.Detail, advice[e.Reason])
}

// MalformedError says that the input is not a WebAssembly module.
type MalformedError struct {
	Detail string
	Offset int // in bytes from the start of the module
}

func (e *MalformedError) Error() string {
	return fmt.Sprintf("wasm: malformed module at byte %d: %s", e.Offset, e.Detail)
}

// The reasons of a RefusedError.
const (
	component          = "component"
	version            = "version"
	tooLarge           = "too-large"
	startSection       = "start-section"
	importMemory       = "import-memory"
	importTable        = "import-table"
	importGlobal       = "import-global"
	importTag          = "import-tag"
	importUnknown      = "import-unknown"
	importSignature    = "import-signature"
	memoryCount        = "memory-count"
	memoryShared       = "memory-shared"
	memory64           = "memory-64"
	memoryNotExported  = "memory-not-exported"
	globalType         = "global-type"
	tableWrite         = "table-write"
	tableType          = "table-type"
	passiveSegment     = "passive-segment"
	constantExpression = "constant-expression"
	exceptions         = "exceptions"
	threads            = "threads"
	tailCalls          = "tail-calls"
	unknownOpcode      = "unknown-opcode"
	valueType          = "value-type"
	nameSection        = "name-section"
	reservedExport     = "reserved-export"
	kindReason         = "kind"
	exportSignature    = "export-signature"
)

const wasiOnly = "only functions of wasi_snapshot_preview1 can be imported, build for wasm32-wasi (Go: GOOS=wasip1)"

// advice says, for each reason, what the author of a module can do.
var advice = map[string]string{
	component:          "components are not supported, build a core module for WASI preview 1 (rustc --target wasm32-wasip1, without wasm-tools component new)",
	version:            "only version 1 of the binary format is supported",
	tooLarge:           "see the limits of this package; strip the module, or split the workload",
	startSection:       "move what it does into _start or _initialize (a linker adds it for shared memory: build without threads)",
	importMemory:       "link without --import-memory",
	importTable:        "link without --import-table",
	importGlobal:       "link statically, without -shared and -pie",
	importTag:          "build without exceptions (clang -fno-exceptions, rustc -C panic=abort)",
	importUnknown:      wasiOnly,
	importSignature:    "the function has another type in WASI preview 1, build with a current WASI toolchain",
	memoryCount:        "a module has exactly one memory, build without the multi-memory feature",
	memoryShared:       "threads are not supported, build without -pthread and --shared-memory",
	memory64:           "build for wasm32",
	memoryNotExported:  `export the memory as "memory", as WASI asks (do not link with --no-export-memory)`,
	globalType:         "only numbers can be captured, keep the value in memory or make the global immutable",
	tableWrite:         "tables cannot be captured and must not change, build without reference types (clang -mno-reference-types) and without dynamic linking",
	tableType:          "build for wasm32 without threads; tables have no initial value",
	passiveSegment:     "whether a segment was dropped cannot be captured, build without threads, and with -mno-bulk-memory if it stays",
	constantExpression: "only one constant can initialise a global or place a segment, build without -mextended-const and without -fPIC",
	exceptions:         "build without WebAssembly exceptions (clang -fno-exceptions -mno-exception-handling, rustc -C panic=abort)",
	threads:            "build without threads (clang without -pthread and -matomics, rustc without +atomics)",
	tailCalls:          "build without tail calls (clang -mno-tail-call, rustc -C target-feature=-tail-call)",
	unknownOpcode:      "only WebAssembly 2.0 is supported, build without later features (clang -mcpu=generic)",
	valueType:          "only WebAssembly 2.0 is supported, build without garbage collection and typed references",
	nameSection:        "strip it (wasm-strip, llvm-strip, ld --strip-debug)",
	reservedExport:     "give the module as your compiler made it, not a prepared one, and rename such exports",
	kindReason:         "a command exports _start, a reactor exports edgekeep_alloc and edgekeep_batch, none exports both",
	exportSignature:    "see the package comment for the types of the entry points",
}

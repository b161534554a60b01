// Package wasm makes the state of a WebAssembly module capturable.
//
// A runner takes a snapshot of a guest between two calls: its linear memory and every
// mutable global. A host can read and set only what a module exports, so Prepare exports
// every mutable global under a reserved name and refuses modules that have state elsewhere.
// It is a pure function of the module and Version: whoever has the author's module can
// compute the digest of what runs.
//
// # What is changed
//
// One section. For every mutable global that no export names yet, in the order of their
// indices, an entry is appended to the export section: the name "edgekeep:g" followed by the
// index in decimal, kind 3 (global), the index. The id, the size and the count of that
// section are written anew with the shortest LEB128; all other bytes, custom sections and
// the entries that were there among them, stay as they are and where they are. A module
// that exports all its mutable globals stays as it is. A prepared module with an added entry
// is refused by Prepare, because it uses the reserved prefix "edgekeep:".
//
// # What is accepted
//
// A core module (WebAssembly Core Specification 2.0, binary format) of at most 64 MiB, which
// imports nothing but WASI preview-1 functions with their right types, has one memory of its
// own that it exports as "memory", and is either
//
//   - a command: it exports _start: () -> (), or
//   - a reactor: it exports edgekeep_alloc: (i32) -> (i32) and edgekeep_batch: (i32, i32) ->
//     (i64), and may export _initialize: () -> ().
//
// Both may export edgekeep_reseed: () -> (). Its state after instantiation is in its memory
// and its mutable globals, which are numbers. So its tables never change: code has no
// instruction that writes one, and no segment is passive. Declarative element segments are
// taken: nothing can read them, they are only the list of the functions that ref.func names.
//
// A refusal is a *RefusedError with one of these reasons:
//
//	component, version              not a core module of version 1
//	too-large                       beyond a limit, see below
//	start-section                   runs code before anything can be restored
//	import-memory, import-table, import-global, import-tag, import-unknown, import-signature
//	memory-count, memory-shared, memory-64, memory-not-exported
//	global-type                     a mutable global of type v128 or of a reference type
//	table-write                     table.set, .grow, .fill, .copy, .init, elem.drop
//	table-type                      a shared or 64-bit table, or one with an initial value
//	passive-segment                 passive data or elements, memory.init, data.drop
//	constant-expression             more than one constant
//	exceptions, threads, tail-calls proposals that the runtime does not enable
//	unknown-opcode, value-type      not in the specification's version 2.0
//	name-section                    a custom section "name" that does not decode
//	reserved-export                 an export that begins with "edgekeep:"
//	kind                            neither or both of command and reactor
//	export-signature                an entry point of the wrong type
//
// Everything else that does not decode is a *MalformedError. The first problem in the order
// of the file is reported, and after all of them what is missing.
//
// # How it is read
//
// Prepare decodes every section and every instruction, but it does not validate: types of
// operands and indices in code are left to the runtime, which refuses before it runs
// anything. LEB128 numbers may be padded up to their greatest length, with two exceptions.
// The second byte of an opcode with prefix 0xFC or 0xFD has its shortest form, and so have
// the reserved zero bytes of memory instructions: runtimes differ in how they read a padded
// one, and what they read as an instruction must be what was checked here. Counts are held
// against the bytes that are there before anything is allocated, also those in the "name"
// section, because the runtime trusts them.
//
// # Limits
//
// Module 64 MiB; 10,000 sections; 100,000 types of at most 1,000 parameters and 1,000
// results; 10,000 imports, 10,000 globals, 100,000 exports, 100,000 data segments, 100,000
// element segments; 16 tables of together 1,048,576 initial entries; 1,000,000 functions,
// each with at most 7,654,321 bytes, 50,000 locals and 65,535 nested blocks; 8,388,608
// locals in all functions together.
package wasm

// Version names the rules of this package: which modules are accepted, and which bytes come
// out. It changes when the output of any accepted module changes, or when a module that
// was accepted is refused. Accepting more modules does not change it. For one version
// the output of a module is the same for ever.
const Version = "1"

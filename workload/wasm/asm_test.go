package wasm

import (
	"encoding/binary"
	"slices"
)

// A tiny assembler: a module is its sections, a section the entries of its vector.

type items = [][]byte

type module struct {
	types, imports, funcs, tables, memories, tags, globals, exports items
	start                                                           []byte
	elements                                                        items
	dataCount                                                       []byte
	bodies, data                                                    items
	custom                                                          []byte // in front of every section, already as sections
}

func num(v int) []byte { return binary.AppendUvarint(nil, uint64(v)) }

func str(s string) []byte { return append(num(len(s)), s...) }

func cat(parts ...[]byte) []byte { return slices.Concat(parts...) }

func vec(v items) []byte { return append(num(len(v)), cat(v...)...) }

func section(id byte, content []byte) []byte {
	return cat([]byte{id}, num(len(content)), content)
}

func custom(name string, content ...byte) []byte { return section(0, append(str(name), content...)) }

func (m *module) build() []byte {
	out := []byte("\x00asm\x01\x00\x00\x00")
	add := func(id byte, v items) {
		out = append(out, m.custom...)
		if v != nil {
			out = append(out, section(id, vec(v))...)
		}
	}
	add(1, m.types)
	add(2, m.imports)
	add(3, m.funcs)
	add(4, m.tables)
	add(5, m.memories)
	add(13, m.tags)
	add(6, m.globals)
	add(7, m.exports)
	if m.start != nil {
		out = append(out, section(8, m.start)...)
	}
	add(9, m.elements)
	if m.dataCount != nil {
		out = append(out, section(12, m.dataCount)...)
	}
	add(10, m.bodies)
	add(11, m.data)
	return append(out, m.custom...)
}

func functype(params, results string) []byte {
	return cat([]byte{0x60}, str(params), str(results))
}

func export(name string, kind byte, index int) []byte {
	return cat(str(name), []byte{kind}, num(index))
}

func importFunc(mod, name string, typ int) []byte {
	return cat(str(mod), str(name), []byte{kindFunc}, num(typ))
}

// body is a function without locals; the end is added.
func body(code ...byte) []byte { return rawBody(cat([]byte{0}, code, []byte{0x0b})) }

func rawBody(b []byte) []byte { return append(num(len(b)), b...) }

const (
	i32 = "\x7f"
	i64 = "\x7e"
)

// Types and functions of reactor.
const (
	typeAlloc, typeBatch, typeNone = 0, 1, 2
	funcAlloc, funcBatch, funcNone = 0, 1, 2
)

// reactor is an accepted module with one exported and two hidden mutable globals. Alloc
// returns 1024. Batch adds its second parameter to the hidden i64 global, which it returns.
func reactor() *module {
	return &module{
		types:    items{functype(i32, i32), functype(i32+i32, i64), functype("", "")},
		funcs:    items{num(typeAlloc), num(typeBatch), num(typeNone)},
		tables:   items{{0x70, 0x00, 0x02}},
		memories: items{{0x00, 0x01}},
		globals: items{
			{0x7f, 1, 0x41, 0x2a, 0x0b}, // mutable i32 42
			{0x7f, 0, 0x41, 0x07, 0x0b}, // immutable i32 7
			{0x7e, 1, 0x42, 0x0a, 0x0b}, // mutable i64 10
			{0x7d, 1, 0x43, 0, 0, 0, 0, 0x0b},
		},
		exports: items{
			export("memory", kindMemory, 0), export("shown", kindGlobal, 0),
			export("edgekeep_alloc", kindFunc, funcAlloc), export("edgekeep_batch", kindFunc, funcBatch),
		},
		elements: items{{0x00, 0x41, 0x00, 0x0b, 0x01, funcNone}},
		bodies: items{
			body(0x41, 0x80, 0x08),
			body(0x23, 2, 0x20, 1, 0xad, 0x7c, 0x24, 2, 0x23, 2),
			body(),
		},
		data: items{cat([]byte{0x00, 0x41, 0x10, 0x0b}, str("hello"))},
	}
}

// command is an accepted module that exports _start.
func command() *module {
	m := reactor()
	m.exports = items{export("memory", kindMemory, 0), export("_start", kindFunc, funcNone)}
	return m
}

// with returns a reactor whose third function has the given code.
func with(code ...byte) *module {
	m := reactor()
	m.bodies[funcNone] = body(code...)
	return m
}

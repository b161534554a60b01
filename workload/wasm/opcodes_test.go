package wasm

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
)

// For every opcode: what is taken compiles in wazero, and what is refused as unknown does
// not. The instruction stands in unreachable code, where it finds operands of every type on
// the stack.
func TestEveryOpcode(t *testing.T) {
	operands := map[immediate][]byte{
		index: {0}, indices: {typeNone, 0}, brTable: {1, 0, 0}, selectT: {1, 0x7f}, memarg: {0, 0},
		zero: {0}, zeros: {0, 0}, i32Const: {0xc0, 0x7f}, i64Const: {0xc0, 0x7f},
		bytes4: make([]byte, 4), bytes8: make([]byte, 8), bytes16: make([]byte, 16), lanes: make([]byte, 16),
		refNull: {0x70}, lane: {0}, memlane: {0, 0, 0}, writesTable: {0, 0}, dropsSegment: {0, 0},
	}
	rt := newRuntime(t)
	check := func(what immediate, opcode ...byte) {
		code := cat([]byte{0x00}, opcode, operands[what])
		switch {
		case what == block:
			code = append(code, 0x40, 0x00, 0x0b)
		case what == end:
			code = cat([]byte{0x02, 0x40}, code)
		case opcode[0] == 0x05: // else
			code = cat([]byte{0x00, 0x04, 0x40}, code[1:], []byte{0x0b})
		case opcode[0] == 0xd2: // the function must be declared: it is in an element segment
			code[2] = funcNone
		case opcode[0] == 0x24: // global.set needs a mutable one
			code[2] = 0
		}
		m := reactor()
		m.bodies[funcNone] = rawBody(cat([]byte{1, 1, 0x7f}, code, []byte{0x00, 0x0b}))
		module := m.build()
		_, _, err := Prepare(module)
		_, theirs := rt.CompileModule(t.Context(), module)
		var refused *RefusedError
		switch {
		case err == nil && theirs != nil:
			t.Errorf("%x: taken, but wazero says %v", opcode, theirs)
		case err != nil && !errors.As(err, &refused):
			t.Errorf("%x: %v", opcode, err)
		case err != nil && theirs == nil && refused.Reason != tableWrite:
			t.Errorf("%x: wazero takes it, but %v", opcode, err)
		}
	}
	everyOpcode(check)
}

// everyOpcode calls f with each opcode that the format can express, up to 255 after a prefix.
func everyOpcode(f func(what immediate, opcode ...byte)) {
	for op := range 256 {
		b := byte(op)
		if what := immediates[b]; what != prefixMisc && what != prefixVector {
			f(what, b)
		}
		second := []byte{b}
		if b >= 0x80 {
			second = []byte{b, 1}
		}
		f(miscImmediates[b], append([]byte{0xfc}, second...)...)
		f(vectorImmediates[b], append([]byte{0xfd}, second...)...)
	}
}

// For every opcode: exactly its operands are read. They are bytes that would end the
// function too early if they were taken for instructions, and a byte more would take the
// true end.
func TestEveryOperandIsRead(t *testing.T) {
	ends := func(n int) []byte { return bytes.Repeat([]byte{0x0b}, n) }
	operands := map[immediate][]byte{
		none: {}, index: ends(1), indices: ends(2), brTable: ends(1 + 11 + 1), selectT: {1, 0x7f},
		memarg: {4, 0x0b}, zero: {0}, zeros: {0, 0}, i32Const: ends(1), i64Const: ends(1),
		bytes4: ends(4), bytes8: ends(8), bytes16: ends(16), lanes: ends(16), refNull: {0x70},
		lane: ends(1), memlane: {4, 0x0b, 0x0b},
	}
	everyOpcode(func(what immediate, opcode ...byte) {
		if operands[what] == nil {
			return // a block, an end, or refused
		}
		if _, _, err := Prepare(with(cat(opcode, operands[what])...).build()); err != nil {
			t.Errorf("%x: %v", opcode, err)
		}
	})
}

// The greatest numbers that an operand may have, and padded ones.
func TestOperands(t *testing.T) {
	tests := [][]byte{
		{0x41, 0xff, 0xff, 0xff, 0xff, 0x07, 0x1a},                               // 2^31-1
		{0x41, 0x80, 0x80, 0x80, 0x80, 0x78, 0x1a},                               // -2^31
		{0x41, 0xff, 0xff, 0xff, 0xff, 0x7f, 0x1a},                               // -1
		{0x41, 0x80, 0x00, 0x1a},                                                 // 0
		{0x42, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x1a}, // 2^63-1
		{0x42, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x7f, 0x1a}, // -2^63
		{0x41, 0x00, 0x28, 0x02, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x1a},             // offset 2^32-1
		{0x10, 0x82, 0x80, 0x80, 0x80, 0x00},                                     // call 2
		{0x02, 0x82, 0x80, 0x80, 0x80, 0x00, 0x0b},                               // block of type 2
	}
	for _, code := range tests {
		module := with(code...).build()
		if _, _, err := Prepare(module); err != nil {
			t.Errorf("%x: %v", code, err)
		}
		compile(t, module)
	}
}

func TestSigned(t *testing.T) {
	tests := []struct {
		in   []byte
		bits int
		want string
	}{
		{[]byte{0x3f}, 32, "63"},
		{[]byte{0x40}, 32, "-64"},
		{[]byte{0xc0, 0x00}, 32, "64"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x78}, 32, "-2147483648"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x08}, 32, "error"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x08}, 33, "2147483648"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x70}, 33, "-4294967296"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x10}, 33, "error"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x00}, 33, "error"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x7f}, 64, "-9223372036854775808"},
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01}, 64, "error"},
		{[]byte{0x80}, 64, "error"},
	}
	for _, tt := range tests {
		r := &reader{data: tt.in, end: len(tt.in)}
		got := fmt.Sprint(r.signed(tt.bits))
		if r.err != nil {
			got = "error"
		}
		if got != tt.want || r.err == nil && r.pos != len(tt.in) {
			t.Errorf("%x in %d bits: %s, not %s", tt.in, tt.bits, got, tt.want)
		}
	}
}

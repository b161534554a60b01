package wasm

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestMalformed(t *testing.T) {
	edit := func(f func(*module)) []byte {
		m := reactor()
		f(m)
		return m.build()
	}
	raw := func(b ...byte) []byte { return edit(func(m *module) { m.bodies[2] = rawBody(b) }) }
	header := []byte("\x00asm\x01\x00\x00\x00")
	lie := func(id byte, content ...byte) []byte { return append(bytes.Clone(header), section(id, content)...) }
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0x0f}
	tests := []struct {
		name   string
		module []byte
	}{
		{"empty", nil},
		{"half a header", header[:6]},
		{"another magic number", []byte("\x7fELF\x01\x00\x00\x00")},
		{"section that is cut off", append(bytes.Clone(header), 1, 9, 0)},
		{"section of 4 GiB", append(append(bytes.Clone(header), 1), huge...)},
		{"size of six bytes", append(bytes.Clone(header), 0, 0x80, 0x80, 0x80, 0x80, 0x80, 0)},
		{"size of 33 bits", append(bytes.Clone(header), 0, 0x80, 0x80, 0x80, 0x80, 0x10)},
		{"unknown section", lie(14)},
		{"section twice", append(bytes.Clone(header), cat(section(1, num(0)), section(1, num(0)))...)},
		{"sections in another order", append(bytes.Clone(header), cat(section(3, num(0)), section(1, num(0)))...)},
		{"bytes behind a section", lie(1, 0, 0)},
		{"4 G types", lie(1, huge...)},
		{"4 G exports", lie(7, huge...)},
		{"4 G parameters", lie(1, cat([]byte{1, 0x60}, huge)...)},
		{"custom section without a name", lie(0)},
		{"custom section whose name is not UTF-8", lie(0, 1, 0xff)},
		{"unknown type of a function", edit(func(m *module) { m.funcs[0] = num(3) })},
		{"a body too few", edit(func(m *module) { m.bodies = m.bodies[:2] })},
		{"a body too many", edit(func(m *module) { m.bodies = append(m.bodies, body()) })},
		{"unknown kind of import", edit(func(m *module) { m.imports = items{cat(str("a"), str("b"), []byte{5, 0})} })},
		{"unknown kind of export", edit(func(m *module) { m.exports[1] = export("x", 5, 0) })},
		{"export of an unknown function", edit(func(m *module) { m.exports[1] = export("x", kindFunc, 3) })},
		{"export of an unknown global", edit(func(m *module) { m.exports[1] = export("x", kindGlobal, 4) })},
		{"export of an unknown memory", edit(func(m *module) { m.exports[1] = export("x", kindMemory, 1) })},
		{"export of an unknown table", edit(func(m *module) { m.exports[1] = export("x", kindTable, 1) })},
		{"two exports of one name", edit(func(m *module) { m.exports[1] = m.exports[0] })},
		{"export whose name is not UTF-8", edit(func(m *module) { m.exports[1] = export("\xff", kindFunc, 0) })},
		{"mutability 2", edit(func(m *module) { m.globals[0][1] = 2 })},
		{"i32 of 33 bits", edit(func(m *module) { m.globals[0] = []byte{0x7f, 1, 0x41, 0x80, 0x80, 0x80, 0x80, 0x10, 0x0b} })},
		{"memory of 65537 pages", edit(func(m *module) { m.memories = items{cat([]byte{0}, num(65537))} })},
		{"memory with minimum above maximum", edit(func(m *module) { m.memories = items{{1, 2, 1}} })},
		{"memory flags", edit(func(m *module) { m.memories = items{{8, 1}} })},
		{"table with minimum above maximum", edit(func(m *module) { m.tables = items{{0x70, 1, 2, 1}} })},
		{"elements for an unknown table", edit(func(m *module) { m.elements = items{{2, 1, 0x41, 0, 0x0b, 0, 0}} })},
		{"element flags", edit(func(m *module) { m.elements = items{{8}} })},
		{"element kind", edit(func(m *module) { m.elements = items{{3, 1, 0}} })},
		{"data flags", edit(func(m *module) { m.data = items{{3}} })},
		{"data for another memory", edit(func(m *module) { m.data = items{{2, 1, 0x41, 0, 0x0b, 0}} })},
		{"another data count", edit(func(m *module) { m.dataCount = num(2) })},
		{"function without an end", raw(0, 0x01)},
		{"function that goes on behind its end", raw(0, 0x0b, 0x0b)},
		{"block without an end", raw(0, 0x02, 0x40, 0x0b)},
		{"block of an unknown type", raw(0, 0x02, 3, 0x0b, 0x0b)},
		{"i32.const that is cut off", raw(0, 0x41, 0x80)},
		{"i32.const of 33 bits", raw(0, 0x41, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x1a, 0x0b)},
		{"i64.const of 65 bits", raw(0, 0x42, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01, 0x1a, 0x0b)},
		{"f64.const that is cut off", raw(0, 0x44, 0, 0, 0x0b)},
		{"index of 33 bits", raw(0, 0x20, 0xff, 0xff, 0xff, 0xff, 0x1f, 0x0b)},
		{"labels that are not there", raw(0, 0x0e, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x0b)},
		{"memory index of an instruction", raw(0, 0x41, 0, 0x28, 0x42, 0, 0, 0x1a, 0x0b)},
		{"alignment of 2^32", raw(0, 0x41, 0, 0x28, 0x20, 0, 0x1a, 0x0b)},
		{"alignment of 2^130", raw(0, 0x41, 0, 0x28, 0x82, 0x01, 0, 0x1a, 0x0b)},
		{"memory.size of another memory", raw(0, 0x3f, 1, 0x1a, 0x0b)},
		{"memory.size with a padded zero", raw(0, 0x3f, 0x80, 0, 0x1a, 0x0b)},
		{"memory.copy from another memory", raw(0, 0xfc, 0x0a, 0, 1, 0x0b)},
		{"select of two types", raw(0, 0x00, 0x1c, 2, 0x7f, 0x7f, 0x0b)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, _, err := Prepare(tt.module)
			var malformed *MalformedError
			if !errors.As(err, &malformed) || out != nil {
				t.Fatalf("not malformed: %v", err)
			}
			if malformed.Offset < 0 || malformed.Offset > len(tt.module) ||
				!strings.Contains(err.Error(), fmt.Sprintf("at byte %d: ", malformed.Offset)) {
				t.Errorf("%v, of %d bytes", err, len(tt.module))
			}
		})
	}
}

func TestLimits(t *testing.T) {
	many := func(n int, item []byte) items {
		v := make(items, n)
		for i := range v {
			v[i] = item
		}
		return v
	}
	blocks := func(n int) []byte {
		return cat(bytes.Repeat([]byte{0x02, 0x40}, n), bytes.Repeat([]byte{0x0b}, n))
	}
	locals := func(n int) []byte { return rawBody(cat([]byte{1}, num(n), []byte{0x7f, 0x0b})) }
	var exports items
	for i := range maxExports {
		exports = append(exports, export(fmt.Sprint("e", i), kindFunc, 0))
	}
	tests := []struct {
		name     string
		at, over func(*module)
	}{
		{
			"types", func(m *module) { m.types = append(m.types, many(maxTypes-3, functype("", ""))...) },
			func(m *module) { m.types = append(m.types, many(maxTypes-2, functype("", ""))...) },
		},
		{
			"parameters", func(m *module) {
				m.types = append(m.types, functype(string(bytes.Repeat([]byte{0x7f}, maxValues)), ""))
			},
			func(m *module) {
				m.types = append(m.types, functype(string(bytes.Repeat([]byte{0x7f}, maxValues+1)), ""))
			},
		},
		{
			"globals", func(m *module) { m.globals = append(m.globals, many(maxGlobals-4, m.globals[0])...) },
			func(m *module) { m.globals = append(m.globals, many(maxGlobals-3, m.globals[0])...) },
		},
		{
			"tables", func(m *module) { m.tables = many(maxTables, m.tables[0]) },
			func(m *module) { m.tables = many(maxTables+1, m.tables[0]) },
		},
		{
			"table entries", func(m *module) { m.tables = many(2, cat([]byte{0x70, 0}, num(maxTableEntries/2))) },
			func(m *module) { m.tables = append(m.tables, cat([]byte{0x70, 0}, num(maxTableEntries-1))) },
		},
		{
			"locals", func(m *module) { m.bodies[2] = locals(maxLocals) },
			func(m *module) { m.bodies[2] = locals(maxLocals + 1) },
		},
		{
			"locals together", func(m *module) { addFunctions(m, maxTotalLocals/maxLocals, locals(maxLocals)) },
			func(m *module) { addFunctions(m, maxTotalLocals/maxLocals+1, locals(maxLocals)) },
		},
		{
			"depth", func(m *module) { m.bodies[2] = body(blocks(maxDepth - 1)...) },
			func(m *module) { m.bodies[2] = body(blocks(maxDepth)...) },
		},
		{
			"body", func(m *module) { m.bodies[2] = body(bytes.Repeat([]byte{1}, maxBody-2)...) },
			func(m *module) { m.bodies[2] = body(bytes.Repeat([]byte{1}, maxBody-1)...) },
		},
		{
			"exports", func(m *module) { m.exports = append(m.exports, exports[4:]...) },
			func(m *module) { m.exports = append(m.exports, exports[3:]...) },
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := reactor()
			tt.at(m)
			if _, _, err := Prepare(m.build()); err != nil {
				t.Errorf("at the limit: %v", err)
			}
			m = reactor()
			tt.over(m)
			_, _, err := Prepare(m.build())
			var refused *RefusedError
			if !errors.As(err, &refused) || refused.Reason != tooLarge {
				t.Errorf("beyond the limit: %v", err)
			}
		})
	}
}

func addFunctions(m *module, n int, body []byte) {
	for range n {
		m.funcs = append(m.funcs, num(typeNone))
		m.bodies = append(m.bodies, body)
	}
}

// Whatever is cut off or changed in a module, Prepare returns, with one of its errors or a
// module.
func TestDamaged(t *testing.T) {
	module := full().build()
	for n := range module {
		if _, _, err := Prepare(module[:n]); !known(err) {
			t.Fatalf("the first %d bytes: %v", n, err)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50_000 {
		b := bytes.Clone(module)
		for range 1 + rng.IntN(3) {
			b[8+rng.IntN(len(b)-8)] = byte(rng.Uint32())
		}
		if _, _, err := Prepare(b); !known(err) {
			t.Fatalf("%x: %v", b, err)
		}
	}
}

func known(err error) bool {
	var refused *RefusedError
	var malformed *MalformedError
	return err == nil || errors.As(err, &refused) || errors.As(err, &malformed)
}

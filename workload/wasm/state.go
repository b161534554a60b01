package wasm

import "strings"

// This file reads the sections that declare state, and the exports.

const (
	maxTables       = 16
	maxTableEntries = 1 << 20
	maxGlobals      = 10_000
	maxExports      = 100_000
	maxPages        = 1 << 16
)

func (m *parsed) tableSection(r *reader) {
	n := r.count(maxTables, "tables")
	var entries uint64
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		switch b := r.byte(); {
		case b == 0x40:
			r.refuse(at, tableType, "table %d has an initial value", i)
		case !isRefType(b):
			r.refuse(at, valueType, "table %d has the type 0x%02x", i, b)
		}
		flagsAt := r.pos
		flags := r.byte()
		if flags > 1 {
			r.refuse(flagsAt, tableType, "table %d has the limits flags 0x%02x", i, flags)
		}
		low, high, bounded := limits(r, flags)
		if bounded && high < low {
			r.malformed(flagsAt, "table %d has a maximum below its minimum", i)
		}
		if entries += uint64(low); entries > maxTableEntries {
			r.refuse(flagsAt, tooLarge, "more than %d table entries", maxTableEntries)
		}
	}
	m.tables = n
}

// limits reads the numbers after the flags of a table or memory type (section 5.3.7).
func limits(r *reader, flags byte) (low, high uint32, bounded bool) {
	low = r.u32()
	if bounded = flags&1 != 0; bounded {
		high = r.u32()
	}
	return low, high, bounded
}

func (m *parsed) memorySection(r *reader) {
	at := r.pos
	if n := r.u32(); n != 1 {
		r.refuse(at, memoryCount, "%d memories", n)
	}
	at = r.pos
	flags := r.byte()
	switch {
	case flags > 7:
		r.malformed(at, "unknown memory flags 0x%02x", flags)
	case flags&4 != 0:
		r.refuse(at, memory64, "a memory with 64-bit addresses")
	case flags&2 != 0:
		r.refuse(at, memoryShared, "a shared memory")
	}
	low, high, bounded := limits(r, flags)
	if !bounded {
		high = maxPages
	}
	if low > high || high > maxPages {
		r.malformed(at, "a memory of %d to %d pages", low, high)
	}
	m.hasMemory = true
	m.info.MemoryMin, m.info.MemoryMax = low, high
}

func (m *parsed) globalSection(r *reader) {
	n := r.count(maxGlobals, "globals")
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		typ := readValueType(r)
		mutable := r.byte()
		switch {
		case mutable > 1:
			r.malformed(at+1, "global %d is neither mutable nor constant", i)
		case mutable == 1 && typ < byte(F64):
			r.refuse(at, globalType, "global %d is mutable and has the type 0x%02x", i, typ)
		case mutable == 1:
			m.info.Globals = append(m.info.Globals, Global{Index: uint32(i), Type: ValueType(typ)})
		}
		constant(r)
	}
	m.globals = n
}

// constant reads an expression of one constant (section 5.4.9). A global.get could name an
// imported global only, and there is none.
func constant(r *reader) {
	at := r.pos
	switch op := r.byte(); op {
	case 0x41:
		r.signed(32)
	case 0x42:
		r.signed(64)
	case 0x43:
		r.take(4)
	case 0x44:
		r.take(8)
	case 0xd0:
		if b := r.byte(); !isRefType(b) {
			r.refuse(at, valueType, "ref.null 0x%02x", b)
		}
	case 0xd2:
		r.u32()
	case 0xfd:
		if r.byte() != 0x0c {
			r.refuse(at, constantExpression, "a vector instruction where a constant is due")
		}
		r.take(16)
	default:
		r.refuse(at, constantExpression, "instruction 0x%02x where a constant is due", op)
	}
	if r.byte() != 0x0b {
		r.refuse(at, constantExpression, "more than one instruction where a constant is due")
	}
}

func (m *parsed) exportSection(r *reader) {
	n := r.count(maxExports, "exports")
	m.exports.entries, m.exports.count = r.pos, n
	mutable := make(map[uint32]*Global, len(m.info.Globals))
	for i := range m.info.Globals {
		mutable[m.info.Globals[i].Index] = &m.info.Globals[i]
	}
	seen := make(map[string]struct{})
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		name := string(r.name())
		kind := r.byte()
		index := r.u32()
		if r.err != nil {
			return
		}
		if _, twice := seen[name]; twice {
			r.malformed(at, "two exports have the name %q", name)
		}
		seen[name] = struct{}{}
		if strings.HasPrefix(name, reservedPrefix) {
			r.refuse(at, reservedExport, "the export %q", name)
		}
		m.export(r, at, name, kind, index)
		if g := mutable[index]; kind == kindGlobal && g != nil && g.Name == "" {
			g.Name = name
		}
	}
}

// export checks one export.
func (m *parsed) export(r *reader, at int, name string, kind byte, index uint32) {
	space := map[byte]int{kindFunc: len(m.functions), kindTable: m.tables, kindGlobal: m.globals}
	if m.hasMemory {
		space[kindMemory] = 1
	}
	if kind == kindTag {
		r.refuse(at, exceptions, "the export %q of a tag", name)
	} else if int64(index) >= int64(space[kind]) {
		r.malformed(at, "the export %q has the unknown kind %d or index %d", name, kind, index)
	}
	if r.err != nil {
		return
	}
	if name == "memory" && kind == kindMemory {
		m.memoryExported = true
	}
	want, entry := entryPoints[name]
	if !entry {
		return
	}
	got := "no function"
	if kind == kindFunc {
		got = m.types[m.functions[index]].String()
	}
	if got != want {
		r.refuse(at, exportSignature, "%s is %s, not %s", name, got, want)
	}
	m.entries = append(m.entries, name)
}

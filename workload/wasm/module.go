package wasm

import (
	"bytes"
	"slices"
)

// Section ids, and the kinds of imports and exports (sections 5.5.2, 5.5.5).
const (
	sectionCustom = 0
	sectionExport = 7
	sectionStart  = 8
	sectionTag    = 13

	kindFunc   = 0
	kindTable  = 1
	kindMemory = 2
	kindGlobal = 3
	kindTag    = 4
)

const maxSections = 10_000

// parsed is what is known of a module while it is read from its first to its last byte.
type parsed struct {
	info Info

	types     []signature
	functions []uint32 // type of each function, the imported ones first
	imported  int      // functions
	tables    int
	hasMemory bool
	globals   int
	data      int
	dataCount int // as announced; -1 when it is not
	bodies    int
	locals    uint64 // of all functions
	named     bool   // there was a "name" section

	exports struct {
		start, entries, end int // of the section with its id, of its first entry
		count               int
	}
	entries        []string // the entry points that are exported
	memoryExported bool
}

// sections has the place in the order of a module and the decoder of each section that may
// be there (section 5.5.16).
var sections = map[byte]struct {
	rank   int
	decode func(*parsed, *reader)
}{
	1:             {1, (*parsed).typeSection},
	2:             {2, (*parsed).importSection},
	3:             {3, (*parsed).functionSection},
	4:             {4, (*parsed).tableSection},
	5:             {5, (*parsed).memorySection},
	sectionTag:    {6, (*parsed).tagSection},
	6:             {7, (*parsed).globalSection},
	sectionExport: {8, (*parsed).exportSection},
	sectionStart:  {9, (*parsed).startSection},
	9:             {10, (*parsed).elementSection},
	12:            {11, (*parsed).dataCountSection},
	10:            {12, (*parsed).codeSection},
	11:            {13, (*parsed).dataSection},
}

func (m *parsed) parse(module []byte) error {
	m.dataCount = -1
	r := &reader{data: module, end: len(module)}
	if len(module) > maxModule {
		r.refuse(0, tooLarge, "%d bytes, the limit is %d", len(module), maxModule)
	}
	readHeader(r)
	last, count := 0, 0
	for r.more() {
		if count++; count > maxSections {
			r.refuse(r.pos, tooLarge, "more than %d sections", maxSections)
		}
		last = m.section(r, last)
	}
	m.complete(r)
	return r.err
}

func readHeader(r *reader) {
	b := r.take(8)
	switch {
	case r.err != nil:
	case string(b[:4]) != magic:
		r.malformed(0, "it does not begin with the magic number of WebAssembly")
	case b[6] == 1 && b[7] == 0:
		r.refuse(4, component, "a component")
	case !bytes.Equal(b[4:], []byte{1, 0, 0, 0}):
		r.refuse(4, version, "version %x", b[4:])
	}
}

// section reads one section, and returns its rank, or last for a custom one.
func (m *parsed) section(r *reader, last int) int {
	start := r.pos
	id := r.byte()
	body := r.sub(r.u32())
	if id == sectionCustom {
		m.customSection(body)
		r.fail(body.err)
		return last
	}
	s, known := sections[id]
	switch {
	case body.err != nil:
	case !known:
		body.malformed(start, "unknown section %d", id)
	case s.rank <= last:
		body.malformed(start, "section %d is twice there or at the wrong place", id)
	}
	if body.err == nil {
		if id == sectionExport {
			m.exports.start, m.exports.end = start, body.end
		}
		s.decode(m, body)
		body.done("section")
	}
	r.fail(body.err)
	return s.rank
}

// complete checks what only the whole module shows.
func (m *parsed) complete(r *reader) {
	if defined := len(m.functions) - m.imported; m.bodies != defined {
		r.malformed(r.pos, "%d functions have %d bodies", defined, m.bodies)
	}
	if m.dataCount >= 0 && m.dataCount != m.data {
		r.malformed(r.pos, "%d data segments are announced, there are %d", m.dataCount, m.data)
	}
}

const (
	maxTypes     = 100_000
	maxValues    = 1_000
	maxImports   = 10_000
	maxFunctions = 1_000_000
)

func (m *parsed) typeSection(r *reader) {
	n := r.count(maxTypes, "types")
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		if form := r.byte(); form != 0x60 {
			r.refuse(at, valueType, "type %d has the form 0x%02x", i, form)
		}
		m.types = append(m.types, signature{params: valueTypes(r), results: valueTypes(r)})
	}
}

func valueTypes(r *reader) []byte {
	n := r.count(maxValues, "parameters or results")
	start := r.pos
	for range n {
		readValueType(r)
	}
	return r.data[start:r.pos]
}

func isValueType(b byte) bool { return b >= 0x7b && b <= 0x7f || isRefType(b) }
func isRefType(b byte) bool   { return b == 0x70 || b == 0x6f }

func readValueType(r *reader) byte {
	at := r.pos
	b := r.byte()
	if !isValueType(b) {
		r.refuse(at, valueType, "value type 0x%02x", b)
	}
	return b
}

func (m *parsed) importSection(r *reader) {
	n := r.count(maxImports, "imports")
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		module, name := string(r.name()), string(r.name())
		kind := r.byte()
		if r.err != nil {
			return
		}
		switch kind {
		case kindFunc:
			m.importFunction(r, at, module, name)
		case kindTable:
			r.refuse(at, importTable, "the table %q %q is imported", module, name)
		case kindMemory:
			r.refuse(at, importMemory, "the memory %q %q is imported", module, name)
		case kindGlobal:
			r.refuse(at, importGlobal, "the global %q %q is imported", module, name)
		case kindTag:
			r.refuse(at, importTag, "the tag %q %q is imported", module, name)
		default:
			r.malformed(at, "unknown kind of import 0x%02x", kind)
		}
	}
	m.imported = len(m.functions)
	slices.Sort(m.info.Imports)
	m.info.Imports = slices.Compact(m.info.Imports)
}

func (m *parsed) importFunction(r *reader, at int, module, name string) {
	typ := m.readTypeIndex(r)
	if r.err != nil {
		return
	}
	want, known := wasi[name]
	switch got := m.types[typ].String(); {
	case module != wasiModule || !known:
		r.refuse(at, importUnknown, "the function %q %q is imported", module, name)
	case got != want:
		r.refuse(at, importSignature, "%s is imported as %s, not %s", name, got, want)
	}
	m.functions = append(m.functions, typ)
	m.info.Imports = append(m.info.Imports, module+"."+name)
}

func (m *parsed) readTypeIndex(r *reader) uint32 {
	at := r.pos
	typ := r.u32()
	if int64(typ) >= int64(len(m.types)) {
		r.malformed(at, "type %d of %d", typ, len(m.types))
		return 0
	}
	return typ
}

func (m *parsed) functionSection(r *reader) {
	n := r.count(maxFunctions, "functions")
	m.functions = slices.Grow(m.functions, n)
	for i := 0; i < n && r.err == nil; i++ {
		m.functions = append(m.functions, m.readTypeIndex(r))
	}
}

func (m *parsed) startSection(r *reader) {
	r.refuse(r.pos, startSection, "a start function")
}

func (m *parsed) tagSection(r *reader) {
	r.refuse(r.pos, exceptions, "a tag section")
}

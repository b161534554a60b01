package wasm

// This file reads what is copied into tables and memory at instantiation, and the custom
// sections.

const maxSegments = 100_000

// elementSection reads the element segments (section 5.5.12): bit 0 of the flags is set for
// passive and declarative segments, bit 1 for declarative ones or those with a table index,
// bit 2 when the items are expressions.
func (m *parsed) elementSection(r *reader) {
	n := r.count(maxSegments, "element segments")
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		flags := r.u32()
		switch {
		case flags > 7:
			r.malformed(at, "unknown flags %d of an element segment", flags)
		case flags&3 == 1:
			r.refuse(at, passiveSegment, "element segment %d is passive", i)
		case flags&1 == 0:
			m.activeOffset(r, flags&2 != 0)
		}
		if flags&3 != 0 {
			elementKind(r, flags&4 != 0)
		}
		items := r.count(maxTableEntries, "elements")
		for j := 0; j < items && r.err == nil; j++ {
			if flags&4 != 0 {
				constant(r)
			} else {
				r.u32()
			}
		}
	}
}

func (m *parsed) activeOffset(r *reader, indexed bool) {
	at := r.pos
	table := uint32(0)
	if indexed {
		table = r.u32()
	}
	if int64(table) >= int64(m.tables) {
		r.malformed(at, "an element segment for table %d of %d", table, m.tables)
	}
	constant(r)
}

// elementKind reads the type of the items: a reference type, or 0 for functions.
func elementKind(r *reader, expressions bool) {
	at := r.pos
	switch b := r.byte(); {
	case expressions && !isRefType(b):
		r.refuse(at, valueType, "elements of type 0x%02x", b)
	case !expressions && b != 0:
		r.malformed(at, "elements of kind 0x%02x", b)
	}
}

func (m *parsed) dataCountSection(r *reader) {
	m.dataCount = int(r.u32())
}

func (m *parsed) dataSection(r *reader) {
	n := r.count(maxSegments, "data segments")
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		flags := r.u32()
		switch {
		case flags == 1:
			r.refuse(at, passiveSegment, "data segment %d is passive", i)
		case flags > 2:
			r.malformed(at, "unknown flags %d of a data segment", flags)
		case flags == 2 && r.u32() != 0, !m.hasMemory:
			r.malformed(at, "data segment %d is for a memory that is not there", i)
		}
		constant(r)
		r.take(r.u32())
	}
	m.data = n
}

// customSection skips a custom section, but decodes the names that runtimes decode too:
// they show them in traps, and some trust their counts.
func (m *parsed) customSection(r *reader) {
	at := r.pos
	name := r.name()
	if r.err != nil || string(name) != "name" {
		return
	}
	names := &reader{data: r.data, pos: r.pos, end: r.end}
	for names.more() {
		subsection(names)
	}
	switch {
	case m.named:
		r.refuse(at, nameSection, `a second section "name"`)
	case names.err != nil:
		r.refuse(names.pos, nameSection, `the section "name" does not decode`)
	}
	m.named = true
}

// subsection reads one part of the "name" section (section 7.4.1): the name of the module,
// of functions, of locals. Others are skipped.
func subsection(r *reader) {
	id := r.byte()
	sub := r.sub(r.u32())
	switch {
	case sub.err != nil:
	case id == 0:
		sub.name()
	case id == 1:
		nameMap(sub)
	case id == 2:
		for n := sub.count(maxModule/2, "functions"); n > 0 && sub.err == nil; n-- {
			sub.u32()
			nameMap(sub)
		}
	default:
		sub.pos = sub.end
	}
	sub.done("names")
	r.fail(sub.err)
}

func nameMap(r *reader) {
	for n := r.count(maxModule/2, "names"); n > 0 && r.err == nil; n-- {
		r.u32()
		r.name()
	}
}

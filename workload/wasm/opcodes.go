package wasm

// What follows an opcode (section 5.4). Zero is an opcode that WebAssembly 2.0 does not have.
type immediate byte

const (
	unknown immediate = iota
	none
	end
	block    // a block type
	index    // one index
	indices  // two of them
	brTable  // a vector of indices, and one more
	selectT  // a vector of one value type
	memarg   // an alignment and an offset
	zero     // one reserved zero byte
	zeros    // two of them
	i32Const // a signed number of 32 bits
	i64Const // a signed number of 64 bits
	bytes4
	bytes8
	bytes16
	refNull // a reference type
	lane    // one byte, the index of a lane
	lanes   // sixteen of them
	memlane // memarg and lane
	prefixMisc
	prefixVector

	// refused, with a reason of their own
	writesTable
	dropsSegment
	throws
	atomic
	tailCall
)

// immediates is about the opcodes of one byte.
var immediates = opcodes([]span{
	{0x00, 0x01, none},
	{0x02, 0x04, block},
	{0x05, 0x05, none},
	{0x06, 0x0a, throws},
	{0x0b, 0x0b, end},
	{0x0c, 0x0d, index},
	{0x0e, 0x0e, brTable},
	{0x0f, 0x0f, none},
	{0x10, 0x10, index},
	{0x11, 0x11, indices},
	{0x12, 0x13, tailCall},
	{0x15, 0x15, tailCall},
	{0x18, 0x19, throws},
	{0x1a, 0x1b, none},
	{0x1c, 0x1c, selectT},
	{0x1f, 0x1f, throws},
	{0x20, 0x25, index},
	{0x26, 0x26, writesTable},
	{0x28, 0x3e, memarg},
	{0x3f, 0x40, zero},
	{0x41, 0x41, i32Const},
	{0x42, 0x42, i64Const},
	{0x43, 0x43, bytes4},
	{0x44, 0x44, bytes8},
	{0x45, 0xc4, none},
	{0xd0, 0xd0, refNull},
	{0xd1, 0xd1, none},
	{0xd2, 0xd2, index},
	{0xfc, 0xfc, prefixMisc},
	{0xfd, 0xfd, prefixVector},
	{0xfe, 0xfe, atomic},
})

// miscImmediates is about the opcodes after 0xFC.
var miscImmediates = opcodes([]span{
	{0x00, 0x07, none},         // saturating conversions
	{0x08, 0x09, dropsSegment}, // memory.init, data.drop
	{0x0a, 0x0a, zeros},        // memory.copy
	{0x0b, 0x0b, zero},         // memory.fill
	{0x0c, 0x0f, writesTable},  // table.init, elem.drop, table.copy, table.grow
	{0x10, 0x10, index},        // table.size
	{0x11, 0x11, writesTable},  // table.fill
})

// vectorImmediates is about the opcodes after 0xFD.
var vectorImmediates = opcodes([]span{
	{0x00, 0x0b, memarg},
	{0x0c, 0x0c, bytes16},
	{0x0d, 0x0d, lanes},
	{0x0e, 0x14, none},
	{0x15, 0x22, lane},
	{0x23, 0x53, none},
	{0x54, 0x5b, memlane},
	{0x5c, 0x5d, memarg},
	{0x5e, 0x99, none},
	{0x9b, 0xa1, none},
	{0xa3, 0xa4, none},
	{0xa7, 0xae, none},
	{0xb1, 0xb1, none},
	{0xb5, 0xba, none},
	{0xbc, 0xc1, none},
	{0xc3, 0xc4, none},
	{0xc7, 0xce, none},
	{0xd1, 0xd1, none},
	{0xd5, 0xe1, none},
	{0xe3, 0xed, none},
	{0xef, 0xff, none},
})

type span struct {
	first, last byte
	what        immediate
}

func opcodes(spans []span) (table [256]immediate) {
	for _, s := range spans {
		for op := int(s.first); op <= int(s.last); op++ {
			table[op] = s.what
		}
	}
	return table
}

// rare reads the operands of the instructions that walk does not read itself. It reads on
// where w.r is.
func (w *walker) rare(at int, op byte, what immediate) {
	r := w.r
	switch what {
	case none:
	case index:
		r.u32()
	case indices:
		r.u32()
		r.u32()
	case brTable:
		for n := r.count(maxBody, "labels"); n > 0 && r.err == nil; n-- {
			r.u32()
		}
		r.u32()
	case selectT:
		if r.byte() != 1 {
			r.malformed(at, "select has one type")
		}
		readValueType(r)
	case memarg, memlane:
		pos := w.memarg(r.data[:r.end], r.pos)
		if pos < 0 {
			r.malformed(r.pos, "the alignment or the offset of a memory instruction")
			return
		}
		r.pos = pos
		if what == memlane {
			r.byte()
		}
	case zero, zeros:
		if r.byte() != 0 || what == zeros && r.byte() != 0 {
			r.malformed(at, "there is one memory, memory instructions have the reserved byte zero")
		}
	case bytes4:
		r.take(4)
	case bytes8:
		r.take(8)
	case bytes16, lanes:
		r.take(16)
	case lane:
		r.byte()
	case refNull:
		if b := r.byte(); !isRefType(b) {
			r.refuse(at, valueType, "ref.null 0x%02x in function %d", b, w.function)
		}
	case prefixMisc, prefixVector:
		w.prefixed(at, op, what)
	default:
		w.refuse(at, op, what)
	}
}

// prefixed reads the second part of an opcode, in its shortest form, and the operands.
func (w *walker) prefixed(at int, op byte, prefix immediate) {
	r := w.r
	second := r.byte()
	if second >= 0x80 && r.byte() != 1 {
		r.refuse(at, unknownOpcode, "opcode 0x%02x 0x%02x in function %d is not below 256 in its shortest form", op, second, w.function)
	}
	table := &vectorImmediates
	if prefix == prefixMisc {
		table = &miscImmediates
	}
	if r.err == nil {
		w.rareOrRefused(at, op, second, table[second])
	}
}

func (w *walker) rareOrRefused(at int, op, second byte, what immediate) {
	switch what {
	case unknown:
		w.r.refuse(at, unknownOpcode, "opcode 0x%02x 0x%02x in function %d", op, second, w.function)
	case writesTable, dropsSegment:
		w.refuse(at, second, what)
	default:
		w.rare(at, op, what)
	}
}

// refuse names what the walker does not take. The opcode is that after 0xFC, if there is one.
func (w *walker) refuse(at int, op byte, what immediate) {
	reason := map[immediate]string{
		unknown:      unknownOpcode,
		writesTable:  tableWrite,
		dropsSegment: passiveSegment,
		throws:       exceptions,
		atomic:       threads,
		tailCall:     tailCalls,
	}[what]
	name := map[immediate]map[byte]string{
		writesTable: {
			0x26: "table.set", 0x0c: "table.init", 0x0d: "elem.drop",
			0x0e: "table.copy", 0x0f: "table.grow", 0x11: "table.fill",
		},
		dropsSegment: {0x08: "memory.init", 0x09: "data.drop"},
	}[what][op]
	if name == "" {
		w.r.refuse(at, reason, "opcode 0x%02x in function %d", op, w.function)
		return
	}
	w.r.refuse(at, reason, "%s in function %d", name, w.function)
}

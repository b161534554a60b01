package wasm

const (
	maxBody        = 7_654_321
	maxLocals      = 50_000
	maxTotalLocals = 1 << 23
	maxDepth       = 65_535
)

func (m *parsed) codeSection(r *reader) {
	n := r.count(maxFunctions, "function bodies")
	for i := 0; i < n && r.err == nil; i++ {
		at := r.pos
		size := r.u32()
		if size > maxBody {
			r.refuse(at, tooLarge, "a function body of %d bytes, the limit is %d", size, maxBody)
		}
		body := r.sub(size)
		m.readLocals(body)
		w := walker{r: body, module: m, function: m.imported + i}
		w.walk()
		r.fail(body.err)
	}
	m.bodies = n
}

// readLocals reads the declarations of locals. They are bounded together too, because eight
// bytes of function can declare 50,000 of them.
func (m *parsed) readLocals(r *reader) {
	at := r.pos
	var sum uint64
	for n := r.count(maxLocals, "declarations of locals"); n > 0 && r.err == nil; n-- {
		sum += uint64(r.u32())
		readValueType(r)
	}
	m.locals += sum
	if sum > maxLocals || m.locals > maxTotalLocals {
		r.refuse(at, tooLarge, "%d locals in a function, %d so far, the limits are %d and %d", sum, m.locals, maxLocals, maxTotalLocals)
	}
}

// A walker goes through the instructions of one function.
type walker struct {
	r        *reader
	module   *parsed
	function int
}

// walk reads instructions up to the end that closes the function, which must be its last
// byte. It holds the position in a variable of its own: this is the one loop that has to be
// fast.
func (w *walker) walk() {
	r := w.r
	code := r.data[:r.end]
	pos := r.pos
	for depth := 1; depth > 0 && r.err == nil; {
		if pos >= len(code) {
			r.malformed(pos, "function %d does not end", w.function)
			return
		}
		at := pos
		op := code[pos]
		pos++
		switch immediates[op] {
		case none:
		case end:
			depth--
		case index:
			pos = skipNumber(code, pos)
		case memarg:
			pos = w.memarg(code, pos)
		case i32Const:
			pos = skipSigned(code, pos, 32)
		case i64Const:
			pos = skipSigned(code, pos, 64)
		case block:
			if depth++; depth > maxDepth {
				r.refuse(at, tooLarge, "more than %d nested blocks in function %d", maxDepth, w.function)
			}
			pos = w.blockType(code, pos)
		default:
			r.pos = pos
			w.rare(at, op, immediates[op])
			pos = r.pos
		}
		if pos < 0 {
			r.malformed(at, "the operands of instruction 0x%02x in function %d", op, w.function)
		}
	}
	if r.err == nil {
		r.pos = pos
		r.done("function")
	}
}

// skipNumber returns the position after an unsigned LEB128 number of 32 bits, or -1.
func skipNumber(code []byte, pos int) int {
	if pos < len(code) && code[pos] < 0x80 {
		return pos + 1
	}
	return skipLong(code, pos, 32, false)
}

// skipSigned returns the position after a signed LEB128 number, or -1.
func skipSigned(code []byte, pos, bits int) int {
	if pos < len(code) && code[pos] < 0x80 {
		return pos + 1
	}
	return skipLong(code, pos, bits, true)
}

func skipLong(code []byte, pos, bits int, signed bool) int {
	for left := bits; pos < len(code); left -= 7 {
		b := code[pos]
		pos++
		if left <= 7 {
			if signed && lastOfSigned(b, left) || !signed && b < 1<<left {
				return pos
			}
			return -1
		}
		if b < 0x80 {
			return pos
		}
	}
	return -1
}

// memarg skips an alignment and an offset (section 5.4.6). The alignment is at most that of
// a vector: bit 6 would announce the index of another memory.
func (w *walker) memarg(code []byte, pos int) int {
	start := pos
	if pos = skipNumber(code, pos); pos < 0 {
		return -1
	}
	if code[start]&0x7f > 4 || pos-start > 1 && !padding(code[start+1:pos]) {
		return -1
	}
	return skipNumber(code, pos)
}

// padding says whether the bytes that follow the first one of a number add nothing to it.
func padding(b []byte) bool {
	for _, c := range b {
		if c&0x7f != 0 {
			return false
		}
	}
	return true
}

// blockType skips the type of a block: nothing, a value type, or the index of a type as a
// signed number of 33 bits (section 5.4.1).
func (w *walker) blockType(code []byte, pos int) int {
	if pos < len(code) && (code[pos] == 0x40 || isValueType(code[pos])) {
		return pos + 1
	}
	w.r.pos = pos
	typ := w.r.signed(33)
	switch {
	case w.r.err != nil:
	case typ < 0:
		w.r.refuse(pos, valueType, "a block of type 0x%02x in function %d", code[pos], w.function)
	case typ >= int64(len(w.module.types)):
		w.r.malformed(pos, "a block of type %d of %d", typ, len(w.module.types))
	}
	return w.r.pos
}

package wasm

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestRefused(t *testing.T) {
	edit := func(f func(*module)) []byte {
		m := reactor()
		f(m)
		return m.build()
	}
	code := func(b ...byte) []byte { return with(b...).build() }
	set := func(module []byte, at int, b byte) []byte {
		module[at] = b
		return module
	}
	tests := []struct {
		name, reason string
		module       []byte
	}{
		{"component", component, []byte("\x00asm\x0d\x00\x01\x00")},
		{"version 2", version, set(reactor().build(), 4, 2)},
		{"a byte beyond 64 MiB", tooLarge, append(reactor().build(), make([]byte, maxModule)...)},
		{"sections", tooLarge, append(reactor().build(), bytes.Repeat(custom("x"), maxSections)...)},
		{"start", startSection, edit(func(m *module) { m.start = num(funcNone) })},

		{"imported memory", importMemory, edit(func(m *module) { m.imports = items{cat(str("env"), str("memory"), []byte{kindMemory, 0, 1})} })},
		{"imported table", importTable, edit(func(m *module) { m.imports = items{cat(str("env"), str("t"), []byte{kindTable, 0x70, 0, 1})} })},
		{"imported mutable global", importGlobal, edit(func(m *module) { m.imports = items{cat(str("env"), str("g"), []byte{kindGlobal, 0x7f, 1})} })},
		{"imported constant", importGlobal, edit(func(m *module) { m.imports = items{cat(str("env"), str("g"), []byte{kindGlobal, 0x7f, 0})} })},
		{"imported tag", importTag, edit(func(m *module) { m.imports = items{cat(str("env"), str("e"), []byte{kindTag, 0, 2})} })},
		{"import from elsewhere", importUnknown, edit(func(m *module) { m.imports = items{importFunc("env", "fd_close", typeAlloc)} })},
		{"import from another WASI", importUnknown, edit(func(m *module) { m.imports = items{importFunc("wasi_unstable", "fd_close", typeAlloc)} })},
		{"unknown WASI function", importUnknown, edit(func(m *module) { m.imports = items{importFunc(wasiModule, "thread-spawn", typeAlloc)} })},
		{"WASI function of another type", importSignature, edit(func(m *module) { m.imports = items{importFunc(wasiModule, "fd_close", typeNone)} })},

		{"no memory", memoryCount, edit(func(m *module) { m.memories, m.data, m.exports = nil, nil, m.exports[1:] })},
		{"no memory in the section", memoryCount, edit(func(m *module) { m.memories = items{} })},
		{"two memories", memoryCount, edit(func(m *module) { m.memories = items{{0, 1}, {0, 1}} })},
		{"shared memory", memoryShared, edit(func(m *module) { m.memories = items{{3, 1, 2}} })},
		{"64-bit memory", memory64, edit(func(m *module) { m.memories = items{{4, 1}} })},
		{"memory not exported", memoryNotExported, edit(func(m *module) { m.exports = m.exports[1:] })},
		{"memory is a function", memoryNotExported, edit(func(m *module) { m.exports[0] = export("memory", kindFunc, 0) })},
		{"nothing exported", memoryNotExported, edit(func(m *module) { m.exports = nil })},

		{"mutable funcref", globalType, edit(func(m *module) { m.globals = append(m.globals, []byte{0x70, 1, 0xd0, 0x70, 0x0b}) })},
		{"mutable externref", globalType, edit(func(m *module) { m.globals = append(m.globals, []byte{0x6f, 1, 0xd0, 0x6f, 0x0b}) })},
		{"mutable v128", globalType, edit(func(m *module) {
			m.globals = append(m.globals, cat([]byte{0x7b, 1, 0xfd, 0x0c}, make([]byte, 16), []byte{0x0b}))
		})},

		{"table.set", tableWrite, code(0x41, 0, 0xd0, 0x70, 0x26, 0)},
		{"table.init", tableWrite, code(0x41, 0, 0x41, 0, 0x41, 0, 0xfc, 0x0c, 0, 0)},
		{"elem.drop", tableWrite, code(0xfc, 0x0d, 0)},
		{"table.copy", tableWrite, code(0x41, 0, 0x41, 0, 0x41, 0, 0xfc, 0x0e, 0, 0)},
		{"table.grow", tableWrite, code(0xd0, 0x70, 0x41, 0, 0xfc, 0x0f, 0, 0x1a)},
		{"table.fill", tableWrite, code(0x41, 0, 0xd0, 0x70, 0x41, 0, 0xfc, 0x11, 0)},
		{"table.set that is not reached", tableWrite, code(0x00, 0x26, 0)},
		{"64-bit table", tableType, edit(func(m *module) { m.tables = items{{0x70, 4, 2}} })},
		{"shared table", tableType, edit(func(m *module) { m.tables = items{{0x70, 3, 2, 2}} })},
		{"table with an initial value", tableType, edit(func(m *module) { m.tables = items{{0x40, 0, 0x70, 0, 2, 0xd0, 0x70, 0x0b}} })},

		{"passive data", passiveSegment, edit(func(m *module) { m.data = items{cat([]byte{1}, str("x"))} })},
		{"memory.init", passiveSegment, code(0x41, 0, 0x41, 0, 0x41, 0, 0xfc, 0x08, 0, 0)},
		{"data.drop", passiveSegment, code(0xfc, 0x09, 0)},
		{"passive functions", passiveSegment, edit(func(m *module) { m.elements = items{{1, 0, 1, funcNone}} })},
		{"passive expressions", passiveSegment, edit(func(m *module) { m.elements = items{{5, 0x70, 1, 0xd2, funcNone, 0x0b}} })},

		{"extended constant", constantExpression, edit(func(m *module) { m.globals[0] = []byte{0x7f, 1, 0x41, 1, 0x41, 2, 0x6a, 0x0b} })},
		{"constant from a global", constantExpression, edit(func(m *module) { m.globals[2] = []byte{0x7f, 1, 0x23, 1, 0x0b} })},
		{"constant that is no constant", constantExpression, edit(func(m *module) { m.data = items{cat([]byte{0, 0xfd, 0x0f, 0x0b}, str("x"))} })},

		{"throw", exceptions, code(0x08, 0)},
		{"try", exceptions, code(0x06, 0x40, 0x0b)},
		{"try_table", exceptions, code(0x1f, 0x40, 0, 0x0b)},
		{"tag section", exceptions, edit(func(m *module) { m.tags = items{{0, typeNone}} })},
		{"exported tag", exceptions, edit(func(m *module) { m.exports = append(m.exports, export("e", kindTag, 0)) })},
		{"atomic", threads, code(0xfe, 0x03, 0x00)},
		{"return_call", tailCalls, code(0x12, funcNone)},
		{"return_call_indirect", tailCalls, code(0x41, 0, 0x13, typeNone, 0)},
		{"call_ref", unknownOpcode, code(0x14, 0)},
		{"garbage collection", unknownOpcode, code(0xfb, 0)},
		{"after 0xfc", unknownOpcode, code(0xfc, 0x12)},
		{"relaxed vectors", unknownOpcode, code(0x00, 0xfd, 0x80, 0x02)},
		{"a hole among the vectors", unknownOpcode, code(0x00, 0xfd, 0x9a, 0x01)},
		{"table.init as 0x10c", unknownOpcode, code(0x41, 0, 0x41, 0, 0x41, 0, 0xfc, 0x8c, 0x02, 0, 0)},
		{"a padded opcode", unknownOpcode, code(0x00, 0xfd, 0x8c, 0x00)},
		{"unknown type of a parameter", valueType, edit(func(m *module) { m.types = append(m.types, functype("\x69", "")) })},
		{"a structure", valueType, edit(func(m *module) { m.types = append(m.types, []byte{0x5f, 0}) })},
		{"typed reference as a local", valueType, edit(func(m *module) { m.bodies[2] = rawBody([]byte{1, 1, 0x63, 0x70, 0x0b}) })},
		{"typed reference of a block", valueType, code(0x02, 0x63, 0x70, 0x0b)},
		{"exception reference", valueType, code(0xd0, 0x69, 0x1a)},

		{"names that lie about their count", nameSection, append(reactor().build(), custom("name", 1, 5, 0xff, 0xff, 0xff, 0xff, 0x0f)...)},
		{"two sections of names", nameSection, append(reactor().build(), cat(custom("name"), custom("name"))...)},

		{"reserved name", reservedExport, edit(func(m *module) { m.exports = append(m.exports, export("edgekeep:x", kindFunc, 0)) })},
		{"no entry point", kindReason, edit(func(m *module) { m.exports = m.exports[:2] })},
		{"only alloc", kindReason, edit(func(m *module) { m.exports = m.exports[:3] })},
		{"only batch", kindReason, edit(func(m *module) { m.exports = append(m.exports[:2], m.exports[3]) })},
		{"both kinds", kindReason, edit(func(m *module) { m.exports = append(m.exports, export("_start", kindFunc, funcNone)) })},
		{"_start and _initialize", kindReason, func() []byte {
			m := command()
			m.exports = append(m.exports, export("_initialize", kindFunc, funcNone))
			return m.build()
		}()},
		{"alloc of another type", exportSignature, edit(func(m *module) { m.exports[2] = export("edgekeep_alloc", kindFunc, funcNone) })},
		{"batch of another type", exportSignature, edit(func(m *module) { m.exports[3] = export("edgekeep_batch", kindFunc, funcAlloc) })},
		{"batch is a global", exportSignature, edit(func(m *module) { m.exports[3] = export("edgekeep_batch", kindGlobal, 0) })},
		{"reseed of another type", exportSignature, edit(func(m *module) { m.exports = append(m.exports, export("edgekeep_reseed", kindFunc, funcAlloc)) })},
		{"_initialize of another type", exportSignature, edit(func(m *module) { m.exports = append(m.exports, export("_initialize", kindFunc, funcAlloc)) })},
		{"_start of another type", exportSignature, edit(func(m *module) {
			m.exports = items{export("memory", kindMemory, 0), export("_start", kindFunc, funcAlloc)}
		})},
	}
	tested := map[string]bool{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, info, err := Prepare(tt.module)
			var refused *RefusedError
			if !errors.As(err, &refused) || refused.Reason != tt.reason {
				t.Fatalf("not refused for %s: %v", tt.reason, err)
			}
			if out != nil || info.Kind != 0 {
				t.Error("a module comes with the error")
			}
			if refused.Offset < 0 || refused.Offset > len(tt.module) || advice[tt.reason] == "" ||
				!strings.HasSuffix(err.Error(), ": "+advice[tt.reason]) {
				t.Error(err)
			}
			tested[tt.reason] = true
		})
	}
	for reason := range advice {
		if !tested[reason] {
			t.Errorf("no module is refused for %s", reason)
		}
	}
}

func TestRefusalNamesTheInstruction(t *testing.T) {
	module := with(0x01, 0xfc, 0x0d, 0).build()
	_, _, err := Prepare(module)
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Detail != "elem.drop in function 2" {
		t.Fatal(err)
	}
	if got := module[refused.Offset : refused.Offset+2]; !bytes.Equal(got, []byte{0xfc, 0x0d}) {
		t.Fatalf("the offset is that of %x", got)
	}
}

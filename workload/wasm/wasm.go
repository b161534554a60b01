package wasm

import (
	"bytes"
	"slices"
	"strconv"
)

// Kind says how a module is run.
type Kind int

const (
	Command Kind = iota + 1 // exports _start, which is called once for all input
	Reactor                 // exports edgekeep_alloc and edgekeep_batch, called for every batch
)

func (k Kind) String() string {
	switch k {
	case Command:
		return "command"
	case Reactor:
		return "reactor"
	}
	return "Kind(" + strconv.Itoa(int(k)) + ")"
}

// ValueType is the type of a mutable global, as the byte of the binary format.
type ValueType byte

const (
	I32 ValueType = 0x7f
	I64 ValueType = 0x7e
	F32 ValueType = 0x7d
	F64 ValueType = 0x7c
)

// Global is a mutable global of a module.
type Global struct {
	Index uint32
	Type  ValueType
	Name  string // of the first export that names it in the prepared module
}

// Info describes a module that Prepare took.
type Info struct {
	Kind       Kind
	Globals    []Global // every mutable global, by index
	MemoryMin  uint32   // pages of 64 KiB
	MemoryMax  uint32   // as declared; 65536 when the module declares none
	Imports    []string // "wasi_snapshot_preview1.fd_write", sorted, each once
	Reseed     bool     // exports edgekeep_reseed
	Initialize bool     // exports _initialize
}

const (
	maxModule      = 64 << 20
	reservedPrefix = "edgekeep:"
	magic          = "\x00asm"
)

// Prepare checks that the state of a module can be captured, and returns the module with
// every mutable global exported, as the package comment says. The module is not changed.
// The error is a *RefusedError or a *MalformedError.
func Prepare(module []byte) (rewritten []byte, info Info, err error) {
	m := &parsed{}
	if err := m.parse(module); err != nil {
		return nil, Info{}, err
	}
	if err := m.classify(); err != nil {
		return nil, Info{}, err
	}
	return m.rewrite(module), m.info, nil
}

// rewrite returns the module with the mutable globals exported that are not yet.
func (m *parsed) rewrite(module []byte) []byte {
	var added []byte
	count := m.exports.count
	for i := range m.info.Globals {
		g := &m.info.Globals[i]
		if g.Name != "" {
			continue
		}
		g.Name = reservedPrefix + "g" + strconv.FormatUint(uint64(g.Index), 10)
		added = appendU32(added, uint32(len(g.Name)))
		added = append(added, g.Name...)
		added = append(added, kindGlobal)
		added = appendU32(added, g.Index)
		count++
	}
	if added == nil {
		return bytes.Clone(module)
	}
	// There is an export section: a module without one exports no memory, and is refused.
	entries := module[m.exports.entries:m.exports.end]
	head := appendU32(nil, uint32(count))
	out := make([]byte, 0, len(module)+len(added)+16)
	out = append(out, module[:m.exports.start]...)
	out = append(out, sectionExport)
	out = appendU32(out, uint32(len(head)+len(entries)+len(added)))
	out = append(out, head...)
	out = append(out, entries...)
	out = append(out, added...)
	return append(out, module[m.exports.end:]...)
}

// entryPoints are the exported functions that a runner calls, with their types.
var entryPoints = map[string]string{
	"_start":          ":",
	"_initialize":     ":",
	"edgekeep_alloc":  "i:i",
	"edgekeep_batch":  "ii:I",
	"edgekeep_reseed": ":",
}

// classify decides what kind of module it is from its exports.
func (m *parsed) classify() error {
	refuse := func(reason, detail string) error {
		return &RefusedError{Reason: reason, Detail: detail, Offset: m.exports.start}
	}
	if !m.hasMemory {
		return refuse(memoryCount, "no memory")
	}
	if !m.memoryExported {
		return refuse(memoryNotExported, `no export "memory"`)
	}
	has := func(name string) bool { return slices.Contains(m.entries, name) }
	start, alloc, batch := has("_start"), has("edgekeep_alloc"), has("edgekeep_batch")
	m.info.Reseed, m.info.Initialize = has("edgekeep_reseed"), has("_initialize")
	switch {
	case start && (alloc || batch):
		return refuse(kindReason, "it exports _start, and what a reactor exports")
	case start && m.info.Initialize:
		return refuse(kindReason, "it exports _start and _initialize")
	case start:
		m.info.Kind = Command
	case alloc && batch:
		m.info.Kind = Reactor
	case alloc:
		return refuse(kindReason, "it exports edgekeep_alloc, but not edgekeep_batch")
	case batch:
		return refuse(kindReason, "it exports edgekeep_batch, but not edgekeep_alloc")
	default:
		return refuse(kindReason, "it exports neither _start nor edgekeep_alloc and edgekeep_batch")
	}
	return nil
}

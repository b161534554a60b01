package wasm

import (
	"bytes"
	"testing"

	"github.com/tetratelabs/wazero"
)

// Prepare does not panic, always says the same, does not take its own output for a module
// without reserved names, and what it takes compiles in wazero if the input did.
func FuzzPrepare(f *testing.F) {
	f.Add(reactor().build())
	f.Add(command().build())
	f.Add(full().build())
	f.Add(append(reactor().build(), custom("name", 0, 2, 1, 'm', 1, 4, 1, 0, 1, 'f', 2, 6, 1, 0, 1, 0, 1, 'l')...))
	f.Add(with(0x00, 0xfd, 0x0c, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 0x1a).build())
	f.Add(with(0x26, 0).build())
	rt := newRuntime(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		out, info, err := Prepare(in)
		if !known(err) {
			t.Fatal(err)
		}
		if err != nil {
			return
		}
		again, _, _ := Prepare(in)
		if !bytes.Equal(out, again) {
			t.Fatal("prepared twice, two results")
		}
		if _, _, err := Prepare(out); (err == nil) != bytes.Equal(in, out) {
			t.Fatalf("the output is taken again: %v", err)
		}
		ctx := t.Context()
		if theirs, err := rt.CompileModule(ctx, in); err == nil {
			_ = theirs.Close(ctx)
			checkCompiles(t, rt, out, info)
		}
	})
}

func checkCompiles(t *testing.T, rt wazero.Runtime, out []byte, info Info) {
	t.Helper()
	m, err := rt.CompileModule(t.Context(), out)
	if err != nil {
		t.Fatalf("only the input compiles: %v", err)
	}
	defer m.Close(t.Context())
	if got := len(m.ImportedFunctions()); got < len(info.Imports) {
		t.Fatalf("%d imports for %v", got, info.Imports)
	}
	memory := m.ExportedMemories()["memory"]
	if memory == nil || memory.Min() != info.MemoryMin {
		t.Fatalf("memory %v, %+v", memory, info)
	}
	if top, bounded := memory.Max(); bounded && top != info.MemoryMax || !bounded && info.MemoryMax != maxPages {
		t.Fatalf("memory up to %d, %+v", top, info)
	}
}

package durable

import (
	"bytes"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"
)

// resum writes a right CRC at the end of a header or a mark.
func resum(b []byte) []byte {
	n := len(b) - 4
	crc := crc32.Checksum(b[:n], crc32.MakeTable(crc32.Castagnoli))
	return append(b[:n:n], byte(crc>>24), byte(crc>>16), byte(crc>>8), byte(crc))
}

// FuzzRecovery opens arbitrary bytes as the first and the last segment, with a
// right checksum in the header if asked. Whatever comes back must stand in the
// file, as an entry with a right CRC, and stay there.
func FuzzRecovery(f *testing.F) {
	sound, _ := hex.DecodeString(goldenSegment)
	sound[15] = 1 // first index
	entries := append(resum(sound[:headerLen]), sound[headerLen:headerLen+markerLen]...)
	entries = appendEntry(entries, 1, []byte("one"))
	entries = appendEntry(append(entries, sound[16:24]...), 2, []byte("two"))
	entries = appendEntry(entries, 3, []byte("three"))
	for _, cut := range []int{0, 5, headerLen, headerLen + 8, len(entries) - 30, len(entries) - 1, len(entries)} {
		f.Add(entries[:cut], []byte{}, false)
	}
	second := appendEntry(append(encodeHeader(4, marker{0xff}), 0xff, 0, 0, 0, 0, 0, 0, 0), 4, []byte("four"))
	f.Add(entries, second, true)
	f.Add(entries, second[:40], true)
	f.Add(append(bytes.Clone(entries), make([]byte, 100)...), []byte{}, true)

	f.Fuzz(func(t *testing.T, a, b []byte, fix bool) {
		if fix {
			for _, b := range [][]byte{a, b} {
				if len(b) >= headerLen {
					copy(b, resum(b[:headerLen]))
				}
			}
		}
		dir := ramDir(t)
		image{segmentName(1): a}.restore(t, dir)
		if len(b) > 0 {
			if err := os.WriteFile(filepath.Join(dir, segmentName(4)), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		l, err := Open(dir, roomy)
		if err != nil {
			return
		}
		entries := readAll(t, l)
		for i, e := range entries {
			encoded := appendEntry(nil, e.Index, e.Data)
			if e.Index != uint64(i+1) || !bytes.Contains(a, encoded) && !bytes.Contains(b, encoded) {
				t.Fatalf("entry (%d, %q) is not in the file", e.Index, e.Data)
			}
		}
		var all [][]byte
		for _, e := range entries {
			all = append(all, e.Data)
		}
		mustAppend(t, l, []byte("next"))
		mustClose(t, l)
		l = mustOpen(t, dir, roomy)
		sameEntries(t, l, 1, append(all, []byte("next")))
		if l.Recovered() != 0 {
			t.Fatalf("a recovered log was torn again")
		}
		mustClose(t, l)
	})
}

func FuzzMark(f *testing.F) {
	mark, _ := hex.DecodeString(goldenMark)
	f.Add(mark)
	f.Add(mark[:7])
	f.Add(resum(append([]byte("EKTM"), make([]byte, 16)...)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := decodeMark("mark", b); err == nil && !bytes.Equal(encodeMark(n), b) {
			t.Fatalf("%x has a second spelling", b)
		}
		if len(b) >= 4 {
			if _, err := decodeMark("mark", resum(bytes.Clone(b))); err != nil && len(b) == markLen &&
				bytes.HasPrefix(b, []byte("EKTM\x00\x00\x00\x01\x00")) && !bytes.Equal(b[8:16], make([]byte, 8)) {
				t.Fatalf("a sound mark is refused: %v", err)
			}
		}
		if _, err := decodeHeader(b, 1); err != nil && len(b) != headerLen && !errors.Is(err, errBadHeader) {
			t.Fatalf("header of %d bytes: %v", len(b), err)
		}
	})
}

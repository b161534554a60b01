package durable

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"strings"
)

const (
	headerLen = 28
	markerLen = 8
	entryHead = 16
	markLen   = 20
	maxEntry  = 1 << 20
	maxIndex  = 1 << 62 // far from overflow, whatever a file claims
	version   = 1
	segSuffix = ".seg"
)

// ErrCorrupt is wrapped by errors about files that hold something else than
// what was acknowledged. The text names the file and the offset.
var ErrCorrupt = errors.New("durable: log is corrupt")

// errBadHeader says that the header of a segment is not one.
var errBadHeader = errors.New("bad segment header")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type marker [markerLen]byte

// damage is the place and the kind of the first bad byte that a scan met.
type damage struct {
	off    int64
	reason string
}

func (d *damage) Error() string { return fmt.Sprintf("offset %d: %s", d.off, d.reason) }

func corrupt(path string, off int64, reason string) error {
	return fmt.Errorf("%w: %s at offset %d: %s", ErrCorrupt, path, off, reason)
}

func segmentName(first uint64) string { return fmt.Sprintf("%020d%s", first, segSuffix) }

// parseSegmentName accepts only what segmentName produces.
func parseSegmentName(name string) (first uint64, ok bool) {
	digits := strings.TrimSuffix(name, segSuffix)
	if len(digits) != 20 {
		return 0, false
	}
	for _, c := range []byte(digits) {
		if c < '0' || c > '9' || first > maxIndex/10 {
			return 0, false
		}
		first = first*10 + uint64(c-'0')
	}
	return first, first >= 1 && first <= maxIndex && name == segmentName(first)
}

func encodeHeader(first uint64, m marker) []byte {
	b := append(make([]byte, 0, headerLen), "EKSG"...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint64(b, first)
	b = append(b, m[:]...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// decodeHeader returns errBadHeader, or another error for a sound header that
// this version of the program cannot use.
func decodeHeader(b []byte, first uint64) (m marker, err error) {
	if len(b) != headerLen || !sound(b, "EKSG") {
		return m, errBadHeader
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != version {
		return m, fmt.Errorf("format version %d is not supported, only %d", v, version)
	}
	copy(m[:], b[16:])
	if binary.BigEndian.Uint64(b[8:]) != first || m[0]&0x80 == 0 {
		return m, errBadHeader
	}
	return m, nil
}

func encodeMark(trimmed uint64) []byte {
	b := append(make([]byte, 0, markLen), "EKTM"...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint64(b, trimmed)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeMark(path string, b []byte) (trimmed uint64, err error) {
	if len(b) != markLen || !sound(b, "EKTM") {
		return 0, corrupt(path, 0, "bad trim mark")
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != version {
		return 0, fmt.Errorf("durable: %s: format version %d is not supported, only %d", path, v, version)
	}
	trimmed = binary.BigEndian.Uint64(b[8:])
	if trimmed == 0 || trimmed > maxIndex {
		return 0, corrupt(path, 8, "impossible index in the trim mark")
	}
	return trimmed, nil
}

// sound checks the magic and the CRC at the end of b.
func sound(b []byte, magic string) bool {
	body := b[:len(b)-4]
	return string(b[:4]) == magic &&
		binary.BigEndian.Uint32(b[len(body):]) == crc32.Checksum(body, castagnoli)
}

func appendEntry(b []byte, index uint64, data []byte) []byte {
	var head [entryHead]byte
	binary.BigEndian.PutUint32(head[0:], uint32(len(data)))
	binary.BigEndian.PutUint64(head[8:], index)
	binary.BigEndian.PutUint32(head[4:], entryCRC(&head, data))
	return append(append(b, head[:]...), data...)
}

func entryCRC(head *[entryHead]byte, data []byte) uint32 {
	crc := crc32.Update(0, castagnoli, head[:4])
	crc = crc32.Update(crc, castagnoli, head[8:])
	return crc32.Update(crc, castagnoli, data)
}

// segment is what is known of one file; all of it is durable.
type segment struct {
	path   string
	first  uint64 // index of its first entry, or of the one to come
	next   uint64 // index after its last entry
	size   int64  // bytes up to the end of its last entry
	marker marker
	sparse []place // about one per sparseStep bytes, ascending
}

// place says where the entry with an index begins (its marker, if it has one).
type place struct {
	index uint64
	off   int64
}

const sparseStep = 32 << 10

func (s *segment) note(index uint64, off int64) {
	if n := len(s.sparse); n == 0 || off-s.sparse[n-1].off >= sparseStep {
		s.sparse = append(s.sparse, place{index, off})
	}
}

// scanner reads the entries of one segment in order and believes nothing.
type scanner struct {
	r      *bufio.Reader
	off    int64  // of the next byte
	end    int64  // of the bytes that may be read
	next   uint64 // the index that must come
	marker marker
	group  int64 // offset of the marker met last, 0 if none
}

func newScanner(r io.ReaderAt, from place, end int64, m marker) *scanner {
	section := io.NewSectionReader(r, from.off, end-from.off)
	return &scanner{r: bufio.NewReaderSize(section, 64<<10), off: from.off, end: end, next: from.index, marker: m}
}

// entry returns the data of the next entry, in buf if that is large enough,
// and io.EOF at the end. A *damage error tells where the bad entry begins; any
// other error is one of reading.
func (s *scanner) entry(buf []byte) ([]byte, error) {
	if s.off == s.end {
		return nil, io.EOF
	}
	if err := s.skipMarker(); err != nil {
		return nil, err
	}
	start := s.off
	if s.end-start < entryHead {
		return nil, &damage{start, "the file ends within an entry header"}
	}
	var head [entryHead]byte
	if err := s.fill(head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[0:])
	switch {
	case n == 0 || n > maxEntry:
		return nil, &damage{start, fmt.Sprintf("impossible entry length %d", n)}
	case binary.BigEndian.Uint64(head[8:]) != s.next:
		return nil, &damage{start, fmt.Sprintf("index %d where %d must be", binary.BigEndian.Uint64(head[8:]), s.next)}
	case int64(n) > s.end-s.off:
		return nil, &damage{start, fmt.Sprintf("the file ends within entry %d", s.next)}
	}
	if uint32(cap(buf)) < n {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if err := s.fill(buf); err != nil {
		return nil, err
	}
	if entryCRC(&head, buf) != binary.BigEndian.Uint32(head[4:]) {
		return nil, &damage{start, fmt.Sprintf("entry %d does not match its checksum", s.next)}
	}
	s.next++
	return buf, nil
}

// skipMarker steps over the marker that begins a group, if there is one here;
// the first group of a segment must have one.
func (s *scanner) skipMarker() error {
	peek, err := s.r.Peek(int(min(markerLen, s.end-s.off)))
	if err != nil {
		return s.readError(err)
	}
	if !bytes.Equal(peek, s.marker[:]) {
		if s.off == headerLen {
			return &damage{s.off, "no marker in front of the first group"}
		}
		return nil
	}
	s.group = s.off
	s.off += markerLen
	_, err = s.r.Discard(markerLen)
	return err
}

func (s *scanner) fill(b []byte) error {
	if _, err := io.ReadFull(s.r, b); err != nil {
		return s.readError(err)
	}
	s.off += int64(len(b))
	return nil
}

func (s *scanner) readError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return &damage{s.off, "the file became shorter while it was read"}
	}
	return err
}

// hasMarker reports whether m occurs in r within [from, end).
func hasMarker(r io.ReaderAt, m marker, from, end int64) (bool, error) {
	const step = 64 << 10
	buf := make([]byte, step+markerLen-1) // windows overlap by less than a marker
	for ; end-from >= markerLen; from += step {
		b := buf[:min(int64(len(buf)), end-from)]
		if _, err := r.ReadAt(b, from); err != nil {
			return false, err
		}
		if bytes.Contains(b, m[:]) {
			return true, nil
		}
	}
	return false, nil
}

func segmentPath(dir string, first uint64) string { return filepath.Join(dir, segmentName(first)) }

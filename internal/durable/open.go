package durable

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Options bound a Log.
type Options struct {
	// SegmentBytes is the length at which a new segment is begun; 0 means
	// 8 MiB. A segment is longer only if a single Append is.
	SegmentBytes int64
	// MaxBytes is the bound of all segments together; required. A log that is
	// larger already (the bound was lowered) opens, and is full.
	MaxBytes int64
}

// maxGroup bounds the bytes that Appends share one write for.
const maxGroup = 1 << 20

func (o *Options) validate() error {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = 8 << 20
	}
	if o.SegmentBytes < 0 || o.MaxBytes <= 0 {
		return fmt.Errorf("segment size %d and bound %d must be positive byte counts", o.SegmentBytes, o.MaxBytes)
	}
	return nil
}

// Open opens the log in the directory dir, or creates it there (mode 0700,
// parents must exist), and takes its lock: a second Open fails until Close or
// the end of the process. It reads all that is kept once, and recovers as the
// package comment says; errors wrap ErrCorrupt where acknowledged entries are
// damaged or missing.
//
//	mkdirat(dir); fsync(parent)                    if it is new
//	openat(lock); flock
//	unlinkat(segment) for those wholly trimmed, and for one torn at creation
//	ftruncate; pwrite(last group); fsync           of the last segment
//	fsync(dir)
func Open(dir string, o Options) (*Log, error) {
	l := &Log{dir: dir, sync: fdatasync, token: make(chan struct{}, 1), grown: make(chan struct{})}
	if err := l.open(o); err != nil {
		_ = l.closeFiles() // nothing was written
		if errors.Is(err, ErrCorrupt) {
			return nil, err
		}
		return nil, fmt.Errorf("durable: open log %s: %w", dir, err)
	}
	return l, nil
}

func (l *Log) open(o Options) (err error) {
	if err := o.validate(); err != nil {
		return err
	}
	l.maxBytes, l.segmentBytes = o.MaxBytes, o.SegmentBytes
	if err := makeDir(l.dir); err != nil {
		return err
	}
	if l.lock, err = lockFile(filepath.Join(l.dir, "lock")); err != nil {
		return err
	}
	if err := l.loadMark(); err != nil {
		return err
	}
	firsts, err := l.list()
	if err != nil {
		return err
	}
	if firsts, err = l.removeTrimmed(firsts); err != nil {
		return err
	}
	if err := l.recover(firsts); err != nil {
		return err
	}
	return syncDir(l.dir)
}

func (l *Log) markPath() string { return filepath.Join(l.dir, "trimmed") }

func (l *Log) loadMark() error {
	f, err := os.Open(l.markPath())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, markLen+1))
	if err != nil {
		return err
	}
	l.trimmed, err = decodeMark(l.markPath(), b)
	return err
}

// list returns the first indices of the segments, ascending, and removes what
// interrupted replacements of the mark left behind.
func (l *Log) list() (firsts []uint64, err error) {
	files, err := os.ReadDir(l.dir) // sorted by name, which is by index
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		name := f.Name()
		switch {
		case strings.HasPrefix(name, ".trimmed.") && strings.HasSuffix(name, ".tmp"):
			if err := os.Remove(filepath.Join(l.dir, name)); err != nil {
				return nil, err
			}
		case strings.HasSuffix(name, segSuffix):
			first, ok := parseSegmentName(name)
			if !ok {
				return nil, corrupt(filepath.Join(l.dir, name), 0, "not the name of a segment")
			}
			firsts = append(firsts, first)
		}
	}
	return firsts, nil
}

// removeTrimmed deletes, unread, the segments that hold only trimmed entries:
// those that are followed by one that begins at or before the first kept index.
func (l *Log) removeTrimmed(firsts []uint64) ([]uint64, error) {
	for len(firsts) > 1 && firsts[1] <= l.trimmed+1 {
		if err := os.Remove(segmentPath(l.dir, firsts[0])); err != nil {
			return nil, err
		}
		firsts = firsts[1:]
	}
	return firsts, nil
}

// recover fills in the segments and the next index.
func (l *Log) recover(firsts []uint64) error {
	l.next = l.trimmed + 1
	for i, first := range firsts {
		path := segmentPath(l.dir, first)
		if i == 0 && first > l.next || i > 0 && first != l.next {
			return corrupt(path, 0, fmt.Sprintf("the segment begins at entry %d where %d must come", first, l.next))
		}
		seg, err := l.recoverSegment(path, first, i == len(firsts)-1)
		if err != nil {
			return err
		}
		if seg != nil {
			l.segs = append(l.segs, seg)
			l.total += seg.size
			l.next = seg.next
		}
	}
	if len(firsts) > 0 && l.next <= l.trimmed {
		last := segmentPath(l.dir, firsts[len(firsts)-1])
		return corrupt(last, 0, fmt.Sprintf("ends before entry %d, but entries up to %d were acknowledged", l.next, l.trimmed))
	}
	return nil
}

// recoverSegment checks one file. The last one is cut where it is torn, synced,
// and kept open for appending; it is nil if it had not even got a header.
func (l *Log) recoverSegment(path string, first uint64, last bool) (*segment, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if last {
		l.f = f // closeFiles closes it
	} else {
		defer f.Close()
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	seg, group, err := scanSegment(f, path, first, info.Size())
	var bad *damage
	switch {
	case errors.Is(err, errBadHeader) && last && info.Size() <= headerLen && first > l.trimmed:
		return nil, l.removeTorn(path, info.Size())
	case errors.Is(err, errBadHeader):
		return nil, corrupt(path, 0, err.Error())
	case errors.As(err, &bad) && !last:
		return nil, corrupt(path, bad.off, bad.reason)
	case err != nil && bad == nil:
		return nil, fmt.Errorf("read %s: %w", path, err)
	case !last:
		return seg, nil
	}
	if bad != nil {
		if err := l.checkTorn(seg, bad, info.Size()); err != nil {
			return nil, err
		}
		l.recovered = info.Size() - seg.size
	}
	return seg, settle(f, group, seg.size)
}

func (l *Log) removeTorn(path string, size int64) error {
	err := l.f.Close()
	l.f = nil
	l.recovered = size
	return errors.Join(err, os.Remove(path))
}

// checkTorn is the rule of the package comment.
func (l *Log) checkTorn(seg *segment, bad *damage, size int64) error {
	synced, err := hasMarker(l.f, seg.marker, bad.off, size)
	if err != nil {
		return fmt.Errorf("read %s: %w", seg.path, err)
	}
	if synced || seg.next <= l.trimmed {
		return corrupt(seg.path, bad.off, bad.reason)
	}
	return nil
}

// scanSegment reads all entries of f. With a *damage error, seg is what is good
// before it. Group is the offset of the last marker before seg.size, or 0.
func scanSegment(f io.ReaderAt, path string, first uint64, size int64) (seg *segment, group int64, err error) {
	head := make([]byte, min(headerLen, size))
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, err
	}
	m, err := decodeHeader(head, first)
	if err != nil {
		return nil, 0, err
	}
	seg = &segment{path: path, first: first, next: first, size: headerLen, marker: m}
	s := newScanner(f, place{first, headerLen}, size, m)
	var buf []byte
	for {
		buf, err = s.entry(buf)
		if errors.Is(err, io.EOF) {
			return seg, group, nil
		}
		if err != nil {
			return seg, group, err
		}
		seg.note(seg.next, seg.size)
		seg.next, seg.size, group = s.next, s.off, s.group
	}
}

// settle makes durable what recovery found in f up to size, and cuts off the
// rest. The bytes from group on may never have been synced, or in vain.
//
//	ftruncate(size); pwrite(the same bytes again); fsync
func settle(f *os.File, group, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for off := group; off < size; {
		b := buf[:min(int64(len(buf)), size-off)]
		if _, err := f.ReadAt(b, off); err != nil {
			return err
		}
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	return f.Sync()
}

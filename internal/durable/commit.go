package durable

import (
	"crypto/rand"
	"fmt"
	"os"
)

// lead writes groups until r is done. The caller holds the token.
func (l *Log) lead(r *request) {
	for {
		select {
		case <-r.done:
			return
		default:
		}
		batch := l.take()
		in, size, err := l.admit(batch)
		if err == nil && len(in) > 0 {
			err = l.write(in, size)
		}
		if err != nil {
			err = l.poison(err)
			for _, r := range in {
				r.last, r.err = 0, err
			}
		}
		for _, r := range batch {
			close(r.done)
		}
	}
}

// take removes from the queue what shares the next write: at least one request,
// and together no more than maxGroup and a segment.
func (l *Log) take() []*request {
	l.mu.Lock()
	defer l.mu.Unlock()
	limit := min(maxGroup, l.segmentBytes-headerLen-markerLen)
	n, size := 0, int64(0)
	for n < len(l.queue) && (n == 0 || size+l.queue[n].size <= limit) {
		size += l.queue[n].size
		n++
	}
	batch := l.queue[:n:n]
	if l.queue = l.queue[n:]; len(l.queue) == 0 {
		l.queue = nil
	}
	return batch
}

// admit returns the requests that fit within MaxBytes and the bytes of their
// group; the others get ErrFull. Segments in which every entry is trimmed,
// also the last one, give way first.
func (l *Log) admit(batch []*request) (in []*request, size int64, err error) {
	size = markerLen
	for _, r := range batch {
		grown := size + r.size
		if !l.fits(grown) && len(in) == 0 && l.trimmed+1 == l.next && len(l.segs) > 0 {
			if err := l.drop(len(l.segs)); err != nil {
				return batch, 0, err
			}
		}
		if !l.fits(grown) {
			r.err = fmt.Errorf("%w: %s holds %d of at most %d bytes, this append needs up to %d: trim first",
				ErrFull, l.dir, l.total, l.maxBytes, headerLen+grown)
			continue
		}
		in, size = append(in, r), grown
	}
	return in, size, nil
}

func (l *Log) fits(group int64) bool {
	if l.needsSegment(group) {
		group += headerLen
	}
	return l.total+group <= l.maxBytes
}

func (l *Log) needsSegment(group int64) bool {
	if l.f == nil {
		return true
	}
	last := l.segs[len(l.segs)-1]
	return last.next > last.first && last.size+group > l.segmentBytes
}

// write makes one group durable and then visible.
func (l *Log) write(in []*request, size int64) error {
	if l.needsSegment(size) {
		if err := l.addSegment(); err != nil {
			return err
		}
		if err := l.dropTrimmed(); err != nil { // the one that was the last
			return err
		}
	}
	seg := l.segs[len(l.segs)-1]
	b := append(l.buf[:0], seg.marker[:]...)
	next := l.next
	for _, r := range in {
		for _, e := range r.entries {
			b = appendEntry(b, next, e)
			next++
		}
		r.last = next - 1
	}
	if cap(b) <= 2*maxGroup { // do not keep what one huge call needed
		l.buf = b
	}
	if _, err := l.f.WriteAt(b, seg.size); err != nil {
		return err
	}
	if err := l.sync(l.f); err != nil {
		return err
	}
	l.publish(seg, in, size)
	return nil
}

func (l *Log) publish(seg *segment, in []*request, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	off := seg.size
	seg.note(l.next, off)
	off += markerLen
	for _, r := range in {
		for _, e := range r.entries {
			seg.note(l.next, off)
			l.next++
			off += entryHead + int64(len(e))
		}
	}
	seg.next, seg.size = l.next, off
	l.total += size
	l.wake()
}

// addSegment begins a segment at the next index. Its header is durable before
// anything follows it.
//
//	openat(segment, O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0600)
//	pwrite(header); fdatasync
//	fsync(dir)
//	close(the segment before)
func (l *Log) addSegment() error {
	var m marker
	if _, err := rand.Read(m[:]); err != nil {
		return err
	}
	m[0] |= 0x80
	seg := &segment{path: segmentPath(l.dir, l.next), first: l.next, next: l.next, size: headerLen, marker: m}
	f, err := os.OpenFile(seg.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	old := l.f
	l.f = f
	if old != nil {
		if err := old.Close(); err != nil {
			return err
		}
	}
	if _, err := f.WriteAt(encodeHeader(seg.first, m), 0); err != nil {
		return err
	}
	if err := l.sync(f); err != nil {
		return err
	}
	if err := syncDir(l.dir); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.segs = append(l.segs, seg)
	l.total += headerLen
	return nil
}

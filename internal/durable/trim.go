package durable

import (
	"fmt"
	"os"
)

// Trim says that entries up to and including upTo are no longer needed. This is
// remembered across restarts, and indices are not used again. Files go away by
// whole segments; the last one stays until it is followed by another one, or
// until an Append needs its room. UpTo at or below an earlier one changes
// nothing; at or above Next it is an error.
//
//	WriteFile(trimmed)
//	unlinkat(segment) for each that is wholly trimmed, oldest first
//	fsync(dir)
//
// The mark is durable before anything is deleted, so a crash in between leaves
// deletions for the next Open to do. An error before the rename of the mark (a
// full disk) leaves all as it was, and Trim may be called again; one after it
// stops the log, see Append.
func (l *Log) Trim(upTo uint64) error {
	l.token <- struct{}{}
	defer func() { <-l.token }()
	if err := l.checkTrim(upTo); err != nil {
		return err
	}
	if upTo <= l.trimmed {
		return nil
	}
	renamed, err := replaceFile(l.markPath(), encodeMark(upTo), 0o600)
	if renamed && err != nil {
		return l.poison(err)
	}
	if err != nil {
		return fmt.Errorf("durable: trim up to entry %d: %w", upTo, err)
	}
	l.mu.Lock()
	l.trimmed = upTo
	l.mu.Unlock()
	if err := l.dropTrimmed(); err != nil {
		return l.poison(err)
	}
	return nil
}

// dropTrimmed drops the segments, but for the last, that hold nothing kept.
func (l *Log) dropTrimmed() error {
	n := 0
	for n+1 < len(l.segs) && l.segs[n].next <= l.trimmed+1 {
		n++
	}
	return l.drop(n)
}

func (l *Log) checkTrim(upTo uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	if upTo >= l.next {
		return fmt.Errorf("durable: trim up to entry %d: the last one is %d", upTo, l.next-1)
	}
	return nil
}

// drop deletes the first n segments. The caller holds the token.
//
//	unlinkat(segment), oldest first; fsync(dir)
func (l *Log) drop(n int) error {
	if n == 0 {
		return nil
	}
	var size int64
	for _, seg := range l.segs[:n] {
		if err := os.Remove(seg.path); err != nil {
			return err
		}
		size += seg.size
	}
	if err := syncDir(l.dir); err != nil {
		return err
	}
	l.mu.Lock()
	l.segs = l.segs[n:]
	l.total -= size
	empty := len(l.segs) == 0
	l.mu.Unlock()
	if !empty {
		return nil
	}
	f := l.f
	if l.f = nil; f == nil { // Open removed a torn segment, and this was the one before it
		return nil
	}
	return f.Close()
}

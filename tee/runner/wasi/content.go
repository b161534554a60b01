package wasi

import (
	"cmp"
	"maps"
	"math"
	"slices"
)

// PageSize is the unit in which file contents are tracked and moved.
const PageSize = 64 << 10

// PageID names one page of a file's content: bytes Index·PageSize and after it. The
// last page of a file ends with it and may be short.
type PageID struct {
	Inode uint64
	Index uint32
}

func (p PageID) compare(q PageID) int {
	return cmp.Or(cmp.Compare(p.Inode, q.Inode), cmp.Compare(p.Index, q.Index))
}

func pageCount(size int64) uint32 {
	return uint32((size + PageSize - 1) / PageSize)
}

// Dirty returns the pages of file contents that changed since the last call of
// Dirty, or since the Dir was made or restored, in ascending order. A page whose
// length changed counts, one that is gone does not.
func (d *Dir) Dirty() []PageID {
	ids := slices.SortedFunc(maps.Keys(d.dirty), PageID.compare)
	clear(d.dirty)
	return ids
}

// Pages returns all pages of all files in ascending order.
func (d *Dir) Pages() []PageID {
	var ids []PageID
	for _, number := range slices.Sorted(maps.Keys(d.nodes)) {
		for i := range pageCount(d.nodes[number].size) {
			ids = append(ids, PageID{Inode: number, Index: i})
		}
	}
	return ids
}

// Page returns a copy of one page, or nil when there is none of that id.
func (d *Dir) Page(id PageID) []byte {
	n := d.nodes[id.Inode]
	if n == nil || id.Index >= pageCount(n.size) {
		return nil
	}
	off := int64(id.Index) * PageSize
	page := make([]byte, min(PageSize, n.size-off))
	n.readAt(page, off)
	return page
}

// A page in memory may be shorter than it is, or nil: the rest is zeros. What a page
// has beyond its length in the spare capacity is zeros too.

// readAt fills p from off and returns how much there was.
func (n *inode) readAt(p []byte, off int64) int {
	if off >= n.size {
		return 0
	}
	p = p[:min(int64(len(p)), n.size-off)]
	for rest := p; len(rest) > 0; {
		index, within := off/PageSize, off%PageSize
		part := rest[:min(int64(len(rest)), PageSize-within)]
		copied := 0
		if index < int64(len(n.pages)) && within < int64(len(n.pages[index])) {
			copied = copy(part, n.pages[index][within:])
		}
		clear(part[copied:])
		rest, off = rest[len(part):], off+int64(len(part))
	}
	return len(p)
}

// writeAt writes p at off, or as much of it as there is room for.
func (d *Dir) writeAt(n *inode, p []byte, off int64) (int, errno) {
	if len(p) == 0 {
		return 0, success
	}
	if off > math.MaxInt64-int64(len(p)) {
		return 0, eFBIG
	}
	if end := off + int64(len(p)); end > n.size {
		most := n.size + d.limits.Bytes - d.bytes
		if off >= most {
			return 0, eNOSPC
		}
		p = p[:min(end, most)-off]
		if err := d.resize(n, off+int64(len(p))); err != 0 {
			return 0, err
		}
	}
	for rest := p; len(rest) > 0; {
		index, within := off/PageSize, off%PageSize
		part := rest[:min(int64(len(rest)), PageSize-within)]
		copy(n.grown(index, within+int64(len(part)))[within:], part)
		d.dirty[PageID{Inode: n.number, Index: uint32(index)}] = struct{}{}
		rest, off = rest[len(part):], off+int64(len(part))
	}
	d.touch(n)
	return len(p), success
}

// grown returns a page with at least size bytes in memory.
func (n *inode) grown(index, size int64) []byte {
	if missing := index + 1 - int64(len(n.pages)); missing > 0 {
		n.pages = append(n.pages, make([][]byte, missing)...)
	}
	page := n.pages[index]
	if size > int64(cap(page)) {
		bigger := make([]byte, size, min(PageSize, max(size, 2*int64(cap(page)), 256)))
		copy(bigger, page)
		page = bigger
	}
	n.pages[index] = page[:max(size, int64(len(page)))]
	return n.pages[index]
}

// resize sets the size of a file. New bytes are zeros.
func (d *Dir) resize(n *inode, size int64) errno {
	if size > d.limits.Bytes || size-n.size > d.limits.Bytes-d.bytes {
		return eNOSPC
	}
	if size > n.size {
		d.mark(n, uint32(n.size/PageSize), pageCount(size))
	} else if size < n.size {
		d.cut(n, size)
	}
	d.bytes += size - n.size
	n.size = size
	d.touch(n)
	return success
}

// cut drops what a file has in memory beyond size.
func (d *Dir) cut(n *inode, size int64) {
	for i := pageCount(size); i < pageCount(n.size); i++ {
		delete(d.dirty, PageID{Inode: n.number, Index: i})
	}
	n.pages = slices.Delete(n.pages, min(int(pageCount(size)), len(n.pages)), len(n.pages))
	within := size % PageSize
	if within == 0 {
		return
	}
	last := pageCount(size) - 1
	d.mark(n, last, last+1)
	if int(last) < len(n.pages) && within < int64(len(n.pages[last])) {
		n.pages[last] = n.pages[last][:within:within] // no capacity: it is not zeros
	}
}

func (d *Dir) mark(n *inode, from, to uint32) {
	for i := from; i < to; i++ {
		d.dirty[PageID{Inode: n.number, Index: i}] = struct{}{}
	}
}

package wasi

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"edgekeep/internal/cose"
)

const (
	treeVersion = 1
	maxCount    = 1 << 62 // of inode numbers and cookies: they never start over
)

type treeRecord struct {
	_       struct{} `cbor:",toarray"`
	Version uint64
	Next    uint64
	Nodes   []nodeRecord
}

type nodeRecord struct {
	_          struct{} `cbor:",toarray"`
	Number     uint64
	Kind       uint64
	Atime      uint64
	Mtime      uint64
	Ctime      uint64
	Size       uint64
	Target     string
	NextCookie uint64
	Names      []nameRecord
}

type nameRecord struct {
	_      struct{} `cbor:",toarray"`
	Name   string
	Cookie uint64
	Number uint64
}

// Tree returns all of the directory but the contents of its files, in the form that
// the package comment gives. The same directory always gives the same bytes.
func (d *Dir) Tree() []byte {
	t := treeRecord{Version: treeVersion, Next: d.next}
	for _, number := range slices.Sorted(maps.Keys(d.nodes)) {
		n := d.nodes[number]
		r := nodeRecord{
			Number: number, Kind: uint64(n.kind), Atime: n.atime, Mtime: n.mtime, Ctime: n.ctime,
			Size: uint64(n.size), Target: n.target, NextCookie: n.nextCookie,
		}
		for _, e := range n.order {
			r.Names = append(r.Names, nameRecord{Name: e.name, Cookie: e.cookie, Number: e.node.number})
		}
		t.Nodes = append(t.Nodes, r)
	}
	return cose.MustMarshal(t)
}

// RestoreDir rebuilds a directory from its Tree and its pages. It asks page once for
// each page of each file and keeps the bytes it gets. Files that were open without a
// name are there until [System.RestoreState] has taken them up, or System.Close drops
// them. The error says what is inconsistent, or is that of page.
func RestoreDir(limits Limits, tree []byte, page func(PageID) ([]byte, error)) (*Dir, error) {
	var t treeRecord
	if err := cose.Unmarshal(tree, &t); err != nil {
		return nil, fmt.Errorf("restore directory: %w", err)
	}
	d, err := t.build(limits)
	if err != nil {
		return nil, fmt.Errorf("restore directory: %w", err)
	}
	for _, id := range d.Pages() {
		if err := d.fill(id, page); err != nil {
			return nil, fmt.Errorf("restore directory: page %d of inode %d: %w", id.Index, id.Inode, err)
		}
	}
	return d, nil
}

func (d *Dir) fill(id PageID, page func(PageID) ([]byte, error)) error {
	content, err := page(id)
	if err != nil {
		return err
	}
	n := d.nodes[id.Inode]
	want := min(PageSize, n.size-int64(id.Index)*PageSize)
	if int64(len(content)) != want {
		return fmt.Errorf("%d bytes, its file has %d there", len(content), want)
	}
	n.pages = append(n.pages, slices.Clip(content))
	return nil
}

// build makes the inodes and links them, and checks that they are one tree.
func (t *treeRecord) build(limits Limits) (*Dir, error) {
	if t.Version != treeVersion {
		return nil, fmt.Errorf("tree version %d, this is %d", t.Version, treeVersion)
	}
	if t.Next > maxCount {
		return nil, fmt.Errorf("next inode %d", t.Next)
	}
	d := emptyDir(limits)
	d.next = t.Next
	last := uint64(0)
	for i := range t.Nodes {
		r := &t.Nodes[i]
		if r.Number <= last || r.Number >= t.Next {
			return nil, fmt.Errorf("inode %d after inode %d, with %d the next to be made", r.Number, last, t.Next)
		}
		last = r.Number
		if err := d.restoreNode(r); err != nil {
			return nil, fmt.Errorf("inode %d: %w", r.Number, err)
		}
	}
	d.root = d.nodes[rootNumber]
	if d.root == nil || d.root.kind != kindDir {
		return nil, errors.New("no root directory")
	}
	d.root.names, d.root.parent = 1, d.root
	for i := range t.Nodes {
		if err := d.restoreNames(&t.Nodes[i]); err != nil {
			return nil, fmt.Errorf("directory %d: %w", t.Nodes[i].Number, err)
		}
	}
	if err := d.checkShape(); err != nil {
		return nil, err
	}
	switch {
	case d.names > d.limits.Entries:
		return nil, fmt.Errorf("%d names, at most %d are allowed", d.names, d.limits.Entries)
	case d.cost > maxTree:
		return nil, errors.New("names and metadata are more than any directory can have")
	}
	return d, nil
}

func (d *Dir) restoreNode(r *nodeRecord) error {
	n := &inode{
		number: r.Number, kind: kind(r.Kind), atime: r.Atime, mtime: r.Mtime, ctime: r.Ctime,
		target: r.Target, nextCookie: r.NextCookie,
	}
	isDir, isFile, isLink := r.Kind == uint64(kindDir), r.Kind == uint64(kindFile), r.Kind == uint64(kindLink)
	switch {
	case !isDir && !isFile && !isLink:
		return fmt.Errorf("kind %d is none", r.Kind)
	case !isFile && r.Size != 0, !isLink && r.Target != "", !isDir && (r.NextCookie != 0 || len(r.Names) != 0):
		return fmt.Errorf("has what kind %d has not", r.Kind)
	case isDir && (r.NextCookie < firstCookie || r.NextCookie > maxCount):
		return fmt.Errorf("next cookie %d", r.NextCookie)
	case isLink && checkPath(r.Target) != 0:
		return fmt.Errorf("link target %q", r.Target)
	case r.Size > math.MaxInt64 || int64(r.Size) > d.limits.Bytes-d.bytes-int64(len(r.Target)):
		return fmt.Errorf("%d bytes, together more than the %d allowed", r.Size, d.limits.Bytes)
	}
	if isDir {
		n.entries = make(map[string]*entry, len(r.Names))
	}
	n.size = int64(r.Size)
	d.bytes += n.size + int64(len(n.target))
	d.cost += nodeCost + len(n.target)
	d.nodes[n.number] = n
	return nil
}

func (d *Dir) restoreNames(r *nodeRecord) error {
	parent := d.nodes[r.Number]
	last := uint64(firstCookie - 1)
	for _, nr := range r.Names {
		child := d.nodes[nr.Number]
		switch {
		case !validName(nr.Name):
			return fmt.Errorf("%q is no name", nr.Name)
		case parent.entries[nr.Name] != nil:
			return fmt.Errorf("name %q twice", nr.Name)
		case nr.Cookie <= last || nr.Cookie >= r.NextCookie:
			return fmt.Errorf("name %q: cookie %d after %d, with %d the next to be given", nr.Name, nr.Cookie, last, r.NextCookie)
		case child == nil:
			return fmt.Errorf("name %q: no inode %d", nr.Name, nr.Number)
		case child.kind == kindDir && child.names > 0:
			return fmt.Errorf("name %q: directory %d has another name", nr.Name, nr.Number)
		}
		last = nr.Cookie
		e := &entry{name: nr.Name, cookie: nr.Cookie, node: child}
		parent.entries[nr.Name] = e
		parent.order = append(parent.order, e)
		d.names++
		d.cost += nameCost + len(nr.Name)
		child.names++
		if child.kind == kindDir {
			child.parent = parent
		}
	}
	return nil
}

// checkShape refuses directories that do not hang below the root, and what cannot
// be open without a name.
func (d *Dir) checkShape() error {
	reached := 1
	for queue := []*inode{d.root}; len(queue) > 0; queue = queue[1:] {
		for _, e := range queue[0].order {
			if e.node.kind == kindDir {
				queue = append(queue, e.node)
				reached++
			}
		}
	}
	for _, number := range slices.Sorted(maps.Keys(d.nodes)) {
		n := d.nodes[number]
		switch {
		case n.names == 0 && n.kind == kindLink:
			return fmt.Errorf("symbolic link %d has no name, and cannot be open", number)
		case n.names == 0 && len(n.order) > 0:
			return fmt.Errorf("directory %d has no name, and is not empty", number)
		case n.names > 0 && n.kind == kindDir:
			reached--
		}
	}
	if reached != 0 {
		return errors.New("directories that are not below the root")
	}
	return nil
}

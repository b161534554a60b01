package wasi

import (
	"slices"
	"strings"
)

// kind is the type of an inode.
type kind uint8

const (
	kindDir  kind = 1
	kindFile kind = 2
	kindLink kind = 3
)

// filetype is what preview 1 calls it.
func (k kind) filetype() byte {
	return [...]byte{kindDir: 3, kindFile: 4, kindLink: 7}[k]
}

// inode is a directory, a file or a symbolic link.
type inode struct {
	number uint64
	kind   kind
	names  int // directory entries that lead here; 1 for the root
	open   int // descriptors that hold it

	atime, mtime, ctime uint64 // ns since 1970

	size  int64    // of a file
	pages [][]byte // of a file, see content.go

	target string // of a symbolic link, relative

	parent     *inode // of a directory with a name; the root is its own
	entries    map[string]*entry
	order      []*entry // by cookie
	nextCookie uint64
}

// entry is one name in a directory.
type entry struct {
	name   string
	cookie uint64
	node   *inode
}

const (
	firstCookie = 3 // 1 and 2 are those of "." and ".."
	rootNumber  = 1

	maxName = 255
	maxPath = 4096

	// Bounds on what an inode and a name take in Tree, less their strings, and what
	// all of it may take.
	nodeCost = 64
	nameCost = 24
	maxTree  = 1<<20 - 128
)

// Dir is a private directory: a tree of directories, files, symbolic and hard links
// in memory. Dir methods are not called while a guest runs.
type Dir struct {
	limits   Limits
	now      func() uint64 // ns since 1970
	device   uint64
	readOnly bool

	root  *inode
	nodes map[uint64]*inode // that have a name or are open
	next  uint64            // inode number
	names int
	bytes int64 // of contents and link targets
	cost  int   // of Tree
	dirty map[PageID]struct{}
}

// NewDir returns an empty directory within the Bytes and Entries of limits.
func NewDir(limits Limits) *Dir {
	d := emptyDir(limits)
	d.root = d.newNode(kindDir)
	d.root.names, d.root.parent = 1, d.root
	return d
}

func emptyDir(limits Limits) *Dir {
	limits.Bytes = min(limits.Bytes, maxBytes)
	limits.Entries = min(limits.Entries, maxEntries)
	return &Dir{
		limits: limits,
		now:    func() uint64 { return 0 },
		device: 1,
		nodes:  map[uint64]*inode{},
		next:   rootNumber,
		dirty:  map[PageID]struct{}{},
	}
}

func (d *Dir) newNode(k kind) *inode {
	now := d.now()
	n := &inode{number: d.next, kind: k, atime: now, mtime: now, ctime: now}
	if k == kindDir {
		n.entries, n.nextCookie = map[string]*entry{}, firstCookie
	}
	d.next++
	d.nodes[n.number] = n
	d.cost += nodeCost
	return n
}

// links is the link count: of a directory its name, its "." and the ".." of those
// below it.
func (n *inode) links() uint64 {
	if n.kind != kindDir {
		return uint64(n.names)
	}
	if n.names == 0 {
		return 0
	}
	count := uint64(2)
	for _, e := range n.order {
		if e.node.kind == kindDir {
			count++
		}
	}
	return count
}

// length is the size that the guest sees.
func (n *inode) length() uint64 {
	if n.kind == kindLink {
		return uint64(len(n.target))
	}
	return uint64(n.size)
}

func (n *inode) lookup(name string) *inode {
	if e := n.entries[name]; e != nil {
		return e.node
	}
	return nil
}

// room tells whether a name can be added to a directory, with an inode that costs
// nodes·nodeCost and has a link target.
func (d *Dir) room(parent *inode, name, target string, nodes int) errno {
	switch {
	case d.readOnly:
		return eROFS
	case parent.names == 0:
		return eNOENT // removed, and only held open
	case d.names >= d.limits.Entries,
		int64(len(target)) > d.limits.Bytes-d.bytes,
		d.cost+nodes*nodeCost+nameCost+len(name)+len(target) > maxTree:
		return eNOSPC
	}
	return success
}

// create makes a node of kind k under a name that room has been found for.
func (d *Dir) create(parent *inode, name string, k kind, target string) *inode {
	n := d.newNode(k)
	n.target = strings.Clone(target)
	d.bytes += int64(len(target))
	d.cost += len(target)
	d.insert(parent, name, n)
	return n
}

func (d *Dir) insert(parent *inode, name string, n *inode) {
	e := &entry{name: strings.Clone(name), cookie: parent.nextCookie, node: n}
	parent.nextCookie++
	parent.entries[e.name] = e
	parent.order = append(parent.order, e)
	d.names++
	d.cost += nameCost + len(name)
	n.names++
	if n.kind == kindDir {
		n.parent = parent
	}
	n.ctime = d.now()
	d.touch(parent)
}

// remove takes a name out of a directory, and its node with its last name unless it
// is open.
func (d *Dir) remove(parent *inode, name string) {
	e := parent.entries[name]
	delete(parent.entries, name)
	at, _ := slices.BinarySearchFunc(parent.order, e.cookie, (*entry).compare)
	parent.order = slices.Delete(parent.order, at, at+1)
	d.names--
	d.cost -= nameCost + len(name)
	e.node.names--
	e.node.ctime = d.now()
	d.touch(parent)
	d.reap(e.node)
}

// compare orders entries by cookie.
func (e *entry) compare(cookie uint64) int {
	switch {
	case e.cookie < cookie:
		return -1
	case e.cookie > cookie:
		return 1
	}
	return 0
}

// reap forgets a node that nothing leads to any more.
func (d *Dir) reap(n *inode) {
	if n.names > 0 || n.open > 0 {
		return
	}
	delete(d.nodes, n.number)
	for i := range pageCount(n.size) {
		delete(d.dirty, PageID{Inode: n.number, Index: i})
	}
	d.bytes -= n.size + int64(len(n.target))
	d.cost -= nodeCost + len(n.target)
}

func (d *Dir) touch(n *inode) {
	n.mtime = d.now()
	n.ctime = n.mtime
}

// addModel puts a file into the read-only tree while it is built.
func (d *Dir) addModel(path string, content []byte) errno {
	if err := checkPath(path); err != 0 {
		return err
	}
	at := d.root
	parts := strings.Split(path, "/")
	for i, name := range parts {
		if !validName(name) {
			return eINVAL
		}
		k := kindDir
		if i == len(parts)-1 {
			k = kindFile
		}
		child := at.lookup(name)
		if child == nil {
			if err := d.room(at, name, "", 1); err != 0 {
				return err
			}
			child = d.create(at, name, k, "")
		} else if k == kindFile || child.kind != kindDir {
			return eEXIST
		}
		at = child
	}
	at.size = int64(len(content))
	at.pages = slices.Collect(slices.Chunk(content, PageSize))
	return success
}

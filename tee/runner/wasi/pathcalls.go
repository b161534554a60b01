package wasi

import "sort"

// dir returns an open directory that has a right.
func (s *System) dir(fd uint32, right rights) (*descriptor, errno) {
	d, err := s.descriptor(fd)
	if err != 0 {
		return nil, err
	}
	if !d.isDir() {
		return nil, eNOTDIR
	}
	return s.use(fd, right)
}

// dirPath takes a descriptor at args[i] and a path at args[i+1] and args[i+2].
func (s *System) dirPath(c *call, i int, right rights) (*descriptor, string, errno) {
	d, err := s.dir(c.u32(i), right)
	if err != 0 {
		return nil, "", err
	}
	path, err := c.path(i + 1)
	return d, path, err
}

func (s *System) pathCreateDirectory(c *call) errno {
	d, path, err := s.dirPath(c, 0, rightPathCreateDirectory)
	if err != 0 {
		return err
	}
	return s.tree(d.kind).mkdir(d.node, path)
}

func (s *System) pathRemoveDirectory(c *call) errno {
	d, path, err := s.dirPath(c, 0, rightPathRemoveDirectory)
	if err != 0 {
		return err
	}
	return s.tree(d.kind).rmdir(d.node, path)
}

func (s *System) pathUnlinkFile(c *call) errno {
	d, path, err := s.dirPath(c, 0, rightPathUnlinkFile)
	if err != 0 {
		return err
	}
	return s.tree(d.kind).unlink(d.node, path)
}

func (s *System) pathSymlink(c *call) errno {
	target, err := c.path(0)
	if err != 0 {
		return err
	}
	d, path, err := s.dirPath(c, 2, rightPathSymlink)
	if err != 0 {
		return err
	}
	return s.tree(d.kind).symlink(d.node, target, path)
}

func (s *System) pathLink(c *call) errno {
	from, err := s.dir(c.u32(0), rightPathLinkSource)
	if err != 0 {
		return err
	}
	mode, err := lookup(c.u32(1))
	if err != 0 {
		return err
	}
	oldPath, err := c.path(2)
	if err != 0 {
		return err
	}
	to, newPath, err := s.dirPath(c, 4, rightPathLinkTarget)
	if err != 0 {
		return err
	}
	if from.kind != to.kind {
		return eXDEV
	}
	return s.tree(to.kind).link(from.node, oldPath, mode == followLast, to.node, newPath)
}

func (s *System) pathRename(c *call) errno {
	from, oldPath, err := s.dirPath(c, 0, rightPathRenameSource)
	if err != 0 {
		return err
	}
	to, newPath, err := s.dirPath(c, 3, rightPathRenameTarget)
	if err != 0 {
		return err
	}
	if from.kind != to.kind {
		return eXDEV
	}
	return s.tree(to.kind).rename(from.node, oldPath, to.node, newPath)
}

// lookup takes lookupflags.
func lookup(flags uint32) (last, errno) {
	switch flags {
	case 0:
		return noFollow, success
	case 1:
		return followLast, success
	}
	return 0, eINVAL
}

// existing takes a descriptor, lookupflags and a path at args[0] and what follows,
// and finds what they lead to.
func (s *System) existing(c *call, right rights) (*Dir, *inode, errno) {
	d, err := s.dir(c.u32(0), right)
	if err != 0 {
		return nil, nil, err
	}
	mode, err := lookup(c.u32(1))
	if err != 0 {
		return nil, nil, err
	}
	path, err := c.path(2)
	if err != 0 {
		return nil, nil, err
	}
	p, err := find(d.node, path, mode)
	if err == 0 && p.node == nil {
		err = eNOENT
	}
	return s.tree(d.kind), p.node, err
}

func (s *System) pathFilestatGet(c *call) errno {
	tree, n, err := s.existing(c, rightPathFilestatGet)
	if err != 0 {
		return err
	}
	return c.putStat(4, tree.device, n, n.kind.filetype())
}

func (s *System) pathFilestatSetTimes(c *call) errno {
	tree, n, err := s.existing(c, rightPathSetTimes)
	if err != 0 {
		return err
	}
	return tree.setTimes(n, c.u64(4), c.u64(5), c.u32(6))
}

func (s *System) pathReadlink(c *call) errno {
	d, path, err := s.dirPath(c, 0, rightPathReadlink)
	if err != 0 {
		return err
	}
	p, err := find(d.node, path, noFollow)
	switch {
	case err != 0:
		return err
	case p.node == nil:
		return eNOENT
	case p.node.kind != kindLink:
		return eINVAL
	}
	b, err := c.bytes(3)
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(5), 4)
	if err != 0 {
		return err
	}
	return putU32(out, copy(b, p.node.target))
}

// fdReaddir fills a buffer with entries after a cookie, the last one cut short when
// there is no room for all of it.
func (s *System) fdReaddir(c *call) errno {
	d, err := s.dir(c.u32(0), rightFDReaddir)
	if err != 0 {
		return err
	}
	buf, err := c.bytes(1)
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(4), 4)
	if err != 0 {
		return err
	}
	n := d.node
	if n.names == 0 {
		return eNOENT // removed
	}
	cookie, rest := c.u64(3), buf
	dots := []entry{{name: ".", cookie: 1, node: n}, {name: "..", cookie: 2, node: n.parent}}
	for i := range dots {
		if dots[i].cookie > cookie {
			rest = rest[dots[i].put(rest):]
		}
	}
	at := sort.Search(len(n.order), func(i int) bool { return n.order[i].cookie > cookie })
	for ; at < len(n.order) && len(rest) > 0; at++ {
		rest = rest[n.order[at].put(rest):]
	}
	return putU32(out, len(buf)-len(rest))
}

// put writes a dirent, or the part of it that has room, and returns its size.
func (e *entry) put(b []byte) int {
	var head [24]byte
	le.PutUint64(head[:], e.cookie)
	le.PutUint64(head[8:], e.node.number)
	le.PutUint32(head[16:], uint32(len(e.name)))
	head[20] = e.node.kind.filetype()
	n := copy(b, head[:])
	return n + copy(b[n:], e.name)
}

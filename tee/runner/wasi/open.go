package wasi

// oflags.
const (
	openCreate = 1 << iota
	openDirectory
	openExclusive
	openTruncate
	allOpenFlags = openTruncate<<1 - 1
)

// opening is a call of path_open.
type opening struct {
	oflags           uint32
	base, inheriting rights
	flags            uint32
}

func (s *System) pathOpen(c *call) errno {
	o := opening{oflags: c.u32(4), base: rights(c.u64(5)), inheriting: rights(c.u64(6)), flags: c.u32(7)}
	d, path, mode, err := s.openArgs(c, &o)
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(8), 4)
	if err != 0 {
		return err
	}
	fd, err := s.free()
	if err != 0 {
		return err
	}
	n, err := s.tree(d.kind).open(d.node, path, mode, &o)
	if err != 0 {
		return err
	}
	opened := &descriptor{kind: d.kind, node: n, flags: uint16(o.flags), base: o.base & fileRights}
	if n.kind == kindDir {
		opened.base, opened.inheriting = o.base&dirRights, o.inheriting
	}
	n.open++
	s.fds[fd] = opened
	return putU32(out, fd)
}

// openArgs checks what can be checked before the path is looked at.
func (s *System) openArgs(c *call, o *opening) (*descriptor, string, last, errno) {
	d, err := s.descriptor(c.u32(0))
	if err != 0 {
		return nil, "", 0, err
	}
	if !d.isDir() {
		return nil, "", 0, eNOTDIR
	}
	mode, err := lookup(c.u32(1))
	if err != 0 {
		return nil, "", 0, err
	}
	if o.oflags&^allOpenFlags != 0 || o.flags&^allFlags != 0 ||
		o.oflags&openCreate != 0 && o.oflags&openDirectory != 0 {
		return nil, "", 0, eINVAL
	}
	o.inheriting &= allRights // toolchains ask for all 64 bits
	base, inheriting := o.needs()
	if d.base&base != base || d.inheriting&inheriting != inheriting {
		return nil, "", 0, eNOTCAPABLE
	}
	path, err := c.path(2)
	return d, path, mode, err
}

// needs are the rights that the directory must have, and let inherit.
func (o *opening) needs() (base, inheriting rights) {
	base, inheriting = rightPathOpen, o.base|o.inheriting
	if o.oflags&openCreate != 0 {
		base |= rightPathCreateFile
	}
	if o.oflags&openTruncate != 0 {
		base |= rightPathSetSize
	}
	if o.flags&flagDsync != 0 {
		inheriting |= rightFDDatasync
	}
	if o.flags&(flagRsync|flagSync) != 0 {
		inheriting |= rightFDSync
	}
	return base, inheriting
}

// open finds or makes what is to be opened.
func (d *Dir) open(base *inode, path string, mode last, o *opening) (*inode, errno) {
	create := o.oflags&openCreate != 0
	exclusive := create && o.oflags&openExclusive != 0
	if exclusive || create && mode == noFollow {
		mode = keepLast
	} else if create {
		mode = createLast
	}
	p, err := find(base, path, mode)
	if err != 0 {
		return nil, err
	}
	if create && p.slash {
		return nil, eISDIR // only a file can be made, and a file has no such name
	}
	if p.node == nil {
		return d.openNew(p, create)
	}
	if exclusive {
		return nil, eEXIST
	}
	if err := d.checkOpen(p.node, o); err != 0 {
		return nil, err
	}
	if o.oflags&openTruncate != 0 {
		return p.node, d.resize(p.node, 0)
	}
	return p.node, success
}

func (d *Dir) openNew(p place, create bool) (*inode, errno) {
	if !create {
		return nil, eNOENT
	}
	if err := d.room(p.parent, p.name, "", 1); err != 0 {
		return nil, err
	}
	return d.create(p.parent, p.name, kindFile, ""), success
}

// checkOpen refuses what cannot be opened in that way.
func (d *Dir) checkOpen(n *inode, o *opening) errno {
	const changes = rightFDWrite | rightFDAllocate | rightFDSetSize
	switch n.kind {
	case kindLink:
		return eLOOP
	case kindDir:
		if o.oflags&(openCreate|openTruncate) != 0 || o.base&rightFDWrite != 0 {
			return eISDIR
		}
		return success
	}
	switch {
	case o.oflags&openDirectory != 0:
		return eNOTDIR
	case d.readOnly && (o.oflags&openTruncate != 0 || o.base&rightFDWrite != 0):
		return eROFS
	case d.readOnly:
		o.base &^= changes
	}
	return success
}

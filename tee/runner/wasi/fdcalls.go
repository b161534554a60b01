package wasi

// The calls on a descriptor itself; those on its content are in filecalls.go.

// use returns an open descriptor that has a right.
func (s *System) use(fd uint32, right rights) (*descriptor, errno) {
	d, err := s.descriptor(fd)
	if err != 0 {
		return nil, err
	}
	if d.base&right != right {
		return nil, eNOTCAPABLE
	}
	return d, success
}

func (s *System) fdClose(c *call) errno {
	d, err := s.descriptor(c.u32(0))
	if err != 0 {
		return err
	}
	s.fds[c.u32(0)] = nil
	s.release(d)
	return success
}

func (s *System) fdRenumber(c *call) errno {
	from, err := s.descriptor(c.u32(0))
	if err != 0 {
		return err
	}
	to, err := s.descriptor(c.u32(1))
	if err != 0 {
		return err
	}
	if from == to {
		return success
	}
	s.fds[c.u32(0)], s.fds[c.u32(1)] = nil, from
	s.release(to)
	return success
}

func (s *System) fdSync(c *call) errno     { return s.sync(c, rightFDSync) }
func (s *System) fdDatasync(c *call) errno { return s.sync(c, rightFDDatasync) }

func (s *System) sync(c *call, right rights) errno {
	d, err := s.descriptor(c.u32(0))
	if err != 0 {
		return err
	}
	if d.kind.stream() {
		return eINVAL
	}
	_, err = s.use(c.u32(0), right)
	return err
}

func (s *System) fdFdstatGet(c *call) errno {
	d, err := s.descriptor(c.u32(0))
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(1), 24)
	if err != 0 {
		return err
	}
	clear(out)
	out[0] = d.filetype()
	le.PutUint16(out[2:], d.flags)
	le.PutUint64(out[8:], uint64(d.base))
	return putU64(out[16:], uint64(d.inheriting))
}

func (s *System) fdFdstatSetFlags(c *call) errno {
	d, err := s.use(c.u32(0), rightFDSetFlags)
	if err != 0 {
		return err
	}
	if c.u32(1)&^allFlags != 0 {
		return eINVAL
	}
	d.flags = uint16(c.u32(1))
	return success
}

func (s *System) fdFdstatSetRights(c *call) errno {
	d, err := s.descriptor(c.u32(0))
	if err != 0 {
		return err
	}
	base, inheriting := rights(c.u64(1)), rights(c.u64(2))
	if base&^d.base != 0 || inheriting&^d.inheriting != 0 {
		return eNOTCAPABLE
	}
	d.base, d.inheriting = base, inheriting
	return success
}

func (s *System) fdFilestatGet(c *call) errno {
	d, err := s.use(c.u32(0), rightFDFilestatGet)
	if err != 0 {
		return err
	}
	if d.kind.stream() {
		return c.putStat(1, 0, &inode{number: uint64(d.kind), names: 1}, 0)
	}
	return c.putStat(1, s.tree(d.kind).device, d.node, d.filetype())
}

// putStat writes a filestat to args[i].
func (c *call) putStat(i int, device uint64, n *inode, filetype byte) errno {
	out, err := c.view(c.u32(i), 64)
	if err != 0 {
		return err
	}
	clear(out)
	le.PutUint64(out, device)
	le.PutUint64(out[8:], n.number)
	out[16] = filetype
	le.PutUint64(out[24:], n.links())
	le.PutUint64(out[32:], n.length())
	le.PutUint64(out[40:], n.atime)
	le.PutUint64(out[48:], n.mtime)
	return putU64(out[56:], n.ctime)
}

func (s *System) fdFilestatSetTimes(c *call) errno {
	d, err := s.use(c.u32(0), rightFDSetTimes)
	if err != 0 {
		return err
	}
	return s.tree(d.kind).setTimes(d.node, c.u64(1), c.u64(2), c.u32(3))
}

// fstflags.
const (
	setAtime = 1 << iota
	setAtimeNow
	setMtime
	setMtimeNow
	allSetFlags = setMtimeNow<<1 - 1
)

func (d *Dir) setTimes(n *inode, atime, mtime uint64, flags uint32) errno {
	both := func(a, b uint32) bool { return flags&a != 0 && flags&b != 0 }
	if flags&^allSetFlags != 0 || both(setAtime, setAtimeNow) || both(setMtime, setMtimeNow) {
		return eINVAL
	}
	if d.readOnly {
		return eROFS
	}
	now := d.now()
	if flags&setAtimeNow != 0 {
		atime = now
	}
	if flags&(setAtime|setAtimeNow) != 0 {
		n.atime = atime
	}
	if flags&setMtimeNow != 0 {
		mtime = now
	}
	if flags&(setMtime|setMtimeNow) != 0 {
		n.mtime = mtime
	}
	n.ctime = now
	return success
}

// preopened returns the name of a preopened directory.
func (s *System) preopened(fd uint32) (string, errno) {
	d, err := s.descriptor(fd)
	switch {
	case err != 0 || !d.preopen:
		return "", eBADF
	case d.kind == kindModels:
		return "/models", success
	}
	return "/", success
}

func (s *System) fdPrestatGet(c *call) errno {
	name, err := s.preopened(c.u32(0))
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(1), 8)
	if err != 0 {
		return err
	}
	clear(out) // tag 0: a directory
	return putU32(out[4:], len(name))
}

func (s *System) fdPrestatDirName(c *call) errno {
	name, err := s.preopened(c.u32(0))
	if err != 0 {
		return err
	}
	if uint64(c.u32(2)) < uint64(len(name)) {
		return eNAMETOOLONG
	}
	out, err := c.bytes(1)
	copy(out, name)
	return err
}

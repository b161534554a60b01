package wasi

// The operations on names. All of them mean the last name of a path itself, also
// when that is a symbolic link.

func (d *Dir) mkdir(base *inode, path string) errno {
	p, err := find(base, path, keepLast)
	if err != 0 {
		return err
	}
	if p.node != nil {
		return eEXIST
	}
	if err := d.room(p.parent, p.name, "", 1); err != 0 {
		return err
	}
	d.create(p.parent, p.name, kindDir, "")
	return success
}

func (d *Dir) symlink(base *inode, target, path string) errno {
	if err := checkPath(target); err != 0 { // an absolute one too
		return err
	}
	p, err := vacant(base, path)
	if err != 0 {
		return err
	}
	if err := d.room(p.parent, p.name, target, 1); err != 0 {
		return err
	}
	d.create(p.parent, p.name, kindLink, target)
	return success
}

// vacant finds the place of a name to make that is not a directory.
func vacant(base *inode, path string) (place, errno) {
	p, err := find(base, path, keepLast)
	switch {
	case err != 0:
		return p, err
	case p.node != nil && p.slash && p.node.kind != kindDir:
		return p, eNOTDIR
	case p.node != nil:
		return p, eEXIST
	case p.slash:
		return p, eNOENT
	}
	return p, success
}

// link gives the node at oldPath another name. A symbolic link at its end is
// followed when the flag says so.
func (d *Dir) link(oldBase *inode, oldPath string, follow bool, newBase *inode, newPath string) errno {
	mode := noFollow
	if follow {
		mode = followLast
	}
	from, err := find(oldBase, oldPath, mode)
	if err != 0 {
		return err
	}
	if from.node == nil {
		return eNOENT
	}
	to, err := vacant(newBase, newPath)
	if err != 0 {
		return err
	}
	if from.node.kind == kindDir {
		return ePERM
	}
	if err := d.room(to.parent, to.name, "", 0); err != 0 {
		return err
	}
	d.insert(to.parent, to.name, from.node)
	return success
}

func (d *Dir) unlink(base *inode, path string) errno {
	p, err := find(base, path, keepLast)
	switch {
	case err != 0:
		return err
	case p.node == nil:
		return eNOENT
	case p.node.kind == kindDir:
		return eISDIR
	case p.slash:
		return eNOTDIR
	case d.readOnly:
		return eROFS
	}
	d.remove(p.parent, p.name)
	return success
}

func (d *Dir) rmdir(base *inode, path string) errno {
	p, err := find(base, path, keepLast)
	switch {
	case err != 0:
		return err
	case p.dots == ".":
		return eINVAL
	case p.dots == "..":
		return eNOTEMPTY
	case p.node == nil:
		return eNOENT
	case p.node.kind != kindDir:
		return eNOTDIR
	case d.readOnly:
		return eROFS
	case len(p.node.entries) > 0:
		return eNOTEMPTY
	}
	d.remove(p.parent, p.name)
	return success
}

func (d *Dir) rename(oldBase *inode, oldPath string, newBase *inode, newPath string) errno {
	from, err := find(oldBase, oldPath, keepLast)
	if err != 0 {
		return err
	}
	to, err := find(newBase, newPath, keepLast)
	if err != 0 {
		return err
	}
	if err := checkRename(from, to); err != 0 {
		return err
	}
	if from.node == to.node {
		return success
	}
	if d.readOnly {
		return eROFS
	}
	if to.parent.names == 0 {
		return eNOENT
	}
	if to.node == nil && d.cost-len(from.name)+len(to.name) > maxTree {
		return eNOSPC
	}
	d.move(from, to)
	return success
}

// checkRename refuses what POSIX rename does, in the order that Linux does.
func checkRename(from, to place) errno {
	switch {
	case from.dots != "" || to.dots != "":
		return eBUSY
	case from.node == nil:
		return eNOENT
	}
	if from.node.kind != kindDir && (from.slash || to.slash) {
		return eNOTDIR
	}
	if from.node.kind == kindDir && below(to.parent, from.node) {
		return eINVAL
	}
	if to.node == nil || to.node == from.node {
		return success
	}
	switch {
	case to.node.kind == kindDir && below(from.parent, to.node):
		return eNOTEMPTY
	case from.node.kind == kindDir && to.node.kind != kindDir:
		return eNOTDIR
	case from.node.kind != kindDir && to.node.kind == kindDir:
		return eISDIR
	case to.node.kind == kindDir && len(to.node.entries) > 0:
		return eNOTEMPTY
	}
	return success
}

// below tells whether a directory is top or under it.
func below(n, top *inode) bool {
	for ; n != top; n = n.parent {
		if n.parent == n || n.parent == nil {
			return false
		}
	}
	return true
}

// move takes a checked rename through. A name that is replaced keeps its place in
// its directory.
func (d *Dir) move(from, to place) {
	moved, replaced := from.node, to.node
	moved.names++ // it is not to be reaped on the way
	d.remove(from.parent, from.name)
	moved.names--
	if replaced == nil {
		d.insert(to.parent, to.name, moved)
		return
	}
	to.parent.entries[to.name].node = moved
	moved.names++
	if moved.kind == kindDir {
		moved.parent = to.parent
	}
	replaced.names--
	replaced.ctime = d.now()
	d.touch(to.parent)
	d.reap(replaced)
}

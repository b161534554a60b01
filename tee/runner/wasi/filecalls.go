package wasi

import (
	"io"
	"math"
)

// file returns an open regular file that has all of the rights.
func (s *System) file(fd uint32, right rights) (*descriptor, errno) {
	d, err := s.descriptor(fd)
	switch {
	case err != 0:
		return nil, err
	case d.kind.stream():
		return nil, eSPIPE
	case d.isDir():
		return nil, eISDIR
	case right&(rightFDRead|rightFDWrite)&^d.base != 0:
		return nil, eBADF
	}
	return s.use(fd, right)
}

func (s *System) fdRead(c *call) errno {
	buffers, err := c.buffers(1)
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(3), 4)
	if err != 0 {
		return err
	}
	d, err := s.descriptor(c.u32(0))
	if err != 0 {
		return err
	}
	if d.kind.stream() {
		n, err := s.readStream(d, buffers)
		return finish(out, n, err)
	}
	if d, err = s.file(c.u32(0), rightFDRead); err != 0 {
		return err
	}
	n := d.node.readAll(buffers, d.offset)
	d.offset += int64(n)
	return putU32(out, n)
}

// finish writes how much was moved, unless nothing was because of err.
func finish(out []byte, n int, err errno) errno {
	if err != 0 && n == 0 {
		return err
	}
	return putU32(out, n)
}

func (n *inode) readAll(buffers [][]byte, off int64) int {
	total := 0
	for _, b := range buffers {
		total += n.readAt(b, off+int64(total))
	}
	return total
}

// readStream does one read of standard input: a second one could wait for what
// the guest did not ask for.
func (s *System) readStream(d *descriptor, buffers [][]byte) (int, errno) {
	if d.base&rightFDRead == 0 {
		return 0, eBADF
	}
	if len(buffers) == 0 || s.cfg.Stdin == nil {
		return 0, success
	}
	const patience = 100
	for range patience {
		n, err := s.cfg.Stdin.Read(buffers[0])
		switch {
		case n > 0 || err == io.EOF:
			return n, success
		case err != nil:
			return 0, eIO
		}
	}
	return 0, eIO
}

func (s *System) fdPread(c *call) errno {
	d, buffers, out, err := s.positioned(c, rightFDRead)
	if err != 0 {
		return err
	}
	return putU32(out, d.node.readAll(buffers, int64(c.u64(3))))
}

// positioned takes the arguments of pread and pwrite.
func (s *System) positioned(c *call, right rights) (*descriptor, [][]byte, []byte, errno) {
	buffers, err := c.buffers(1)
	if err != 0 {
		return nil, nil, nil, err
	}
	out, err := c.view(c.u32(4), 4)
	if err != 0 {
		return nil, nil, nil, err
	}
	d, err := s.file(c.u32(0), right|rightFDSeek)
	if err == 0 && c.u64(3) > math.MaxInt64-maxMove {
		err = eINVAL
	}
	return d, buffers, out, err
}

func (s *System) fdWrite(c *call) errno {
	buffers, err := c.buffers(1)
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(3), 4)
	if err != 0 {
		return err
	}
	d, err := s.descriptor(c.u32(0))
	if err != 0 {
		return err
	}
	if d.kind.stream() {
		n, err := s.writeStream(d, buffers)
		return finish(out, n, err)
	}
	if d, err = s.file(c.u32(0), rightFDWrite); err != 0 {
		return err
	}
	off := d.offset
	if d.flags&flagAppend != 0 {
		off = d.node.size
	}
	n, err := s.tree(d.kind).writeAll(d.node, buffers, off)
	if n > 0 {
		d.offset = off + int64(n)
	}
	return finish(out, n, err)
}

func (d *Dir) writeAll(n *inode, buffers [][]byte, off int64) (int, errno) {
	if d.readOnly {
		return 0, eROFS
	}
	total := 0
	for _, b := range buffers {
		written, err := d.writeAt(n, b, off+int64(total))
		total += written
		if err != 0 || written < len(b) {
			return total, err
		}
	}
	return total, success
}

func (s *System) writeStream(d *descriptor, buffers [][]byte) (int, errno) {
	if d.base&rightFDWrite == 0 {
		return 0, eBADF
	}
	total := 0
	for _, b := range buffers {
		total += len(b)
	}
	if s.flooded = s.flooded || int64(total) > s.cfg.Limits.Output-s.output; s.flooded {
		return 0, eNOSPC
	}
	w := s.cfg.Stdout
	if d.kind == kindStderr {
		w = s.cfg.Stderr
	}
	s.output += int64(total)
	if w == nil {
		return total, success
	}
	written := 0
	for _, b := range buffers {
		n, err := w.Write(b)
		written += min(max(n, 0), len(b))
		if err != nil {
			return written, eIO
		}
	}
	return written, success
}

func (s *System) fdPwrite(c *call) errno {
	d, buffers, out, err := s.positioned(c, rightFDWrite)
	if err != 0 {
		return err
	}
	n, err := s.tree(d.kind).writeAll(d.node, buffers, int64(c.u64(3)))
	return finish(out, n, err)
}

func (s *System) fdSeek(c *call) errno {
	move, whence := int64(c.u64(1)), c.u32(2)
	right := rightFDSeek
	if move == 0 && whence == 1 {
		right = rightFDTell
	}
	d, err := s.seekable(c.u32(0), right)
	if err != 0 {
		return err
	}
	var from int64
	switch whence {
	case 0:
	case 1:
		from = d.offset
	case 2:
		from = d.node.size
	default:
		return eINVAL
	}
	if move > math.MaxInt64-from || from+move < 0 {
		return eINVAL
	}
	out, err := c.view(c.u32(3), 8)
	if err != 0 {
		return err
	}
	d.offset = from + move
	return putU64(out, uint64(d.offset))
}

// seekable is file, with the right to seek implying that to tell.
func (s *System) seekable(fd uint32, right rights) (*descriptor, errno) {
	d, err := s.file(fd, 0)
	if err == 0 && d.base&(right|rightFDSeek) == 0 {
		err = eNOTCAPABLE
	}
	return d, err
}

func (s *System) fdTell(c *call) errno {
	d, err := s.seekable(c.u32(0), rightFDTell)
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(1), 8)
	if err != 0 {
		return err
	}
	return putU64(out, uint64(d.offset))
}

func (s *System) fdAdvise(c *call) errno {
	const advices = 6
	if _, err := s.file(c.u32(0), rightFDAdvise); err != 0 {
		return err
	}
	if c.u32(3) >= advices || c.u64(1) > math.MaxInt64 || c.u64(2) > math.MaxInt64 {
		return eINVAL
	}
	return success
}

func (s *System) fdAllocate(c *call) errno {
	d, err := s.file(c.u32(0), rightFDAllocate)
	if err != 0 {
		return err
	}
	off, length := c.u64(1), c.u64(2)
	switch {
	case length == 0 || off > math.MaxInt64 || length > math.MaxInt64:
		return eINVAL
	case off+length > math.MaxInt64:
		return eFBIG
	}
	return s.setSize(d, max(d.node.size, int64(off+length)))
}

func (s *System) fdFilestatSetSize(c *call) errno {
	d, err := s.file(c.u32(0), rightFDSetSize)
	if err != 0 {
		return err
	}
	if c.u64(1) > math.MaxInt64 {
		return eINVAL
	}
	return s.setSize(d, int64(c.u64(1)))
}

func (s *System) setSize(d *descriptor, size int64) errno {
	tree := s.tree(d.kind)
	if tree.readOnly {
		return eROFS
	}
	return tree.resize(d.node, size)
}

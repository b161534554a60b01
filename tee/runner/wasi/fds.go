package wasi

import (
	"crypto/sha256"
	"fmt"
	"math"

	"edgekeep/internal/cose"
)

// fdKind is what a descriptor leads to.
type fdKind uint8

const (
	kindStdin fdKind = iota
	kindStdout
	kindStderr
	kindPrivate
	kindModels
)

func (k fdKind) stream() bool { return k < kindPrivate }

func (k fdKind) streamRights() rights {
	if k == kindStdin {
		return streamRights | rightFDRead
	}
	return streamRights | rightFDWrite
}

// descriptor is one open file descriptor.
type descriptor struct {
	kind             fdKind
	node             *inode // nil for a stream
	offset           int64
	flags            uint16
	base, inheriting rights
	preopen          bool
}

// filetype is what preview 1 calls it.
func (d *descriptor) filetype() byte {
	if d.kind.stream() {
		return 0
	}
	return d.node.kind.filetype()
}

func (d *descriptor) isDir() bool { return d.node != nil && d.node.kind == kindDir }

// tree is the Dir that a kind of descriptor is in.
func (s *System) tree(k fdKind) *Dir {
	switch k {
	case kindPrivate:
		return s.cfg.Dir
	case kindModels:
		return s.models
	}
	return nil
}

func (s *System) descriptor(fd uint32) (*descriptor, errno) {
	if uint64(fd) >= uint64(len(s.fds)) || s.fds[fd] == nil {
		return nil, eBADF
	}
	return s.fds[fd], success
}

// free returns the lowest number that is not open.
func (s *System) free() (int, errno) {
	for i, d := range s.fds {
		if d == nil {
			return i, success
		}
	}
	if len(s.fds) >= s.cfg.Limits.FDs {
		return 0, eMFILE
	}
	s.fds = append(s.fds, nil)
	return len(s.fds) - 1, success
}

// release lets go of what a descriptor holds.
func (s *System) release(d *descriptor) {
	if d == nil || d.node == nil {
		return
	}
	d.node.open--
	s.tree(d.kind).reap(d.node)
}

const stateVersion = 1

type stateRecord struct {
	_         struct{} `cbor:",toarray"`
	Version   uint64
	Monotonic uint64
	Models    []byte
	FDs       []fdRecord
}

type fdRecord struct {
	_          struct{} `cbor:",toarray"`
	Number     uint64
	Kind       uint64
	Inode      uint64
	Offset     uint64
	Flags      uint64
	Base       uint64
	Inheriting uint64
	Preopen    bool
}

// State returns the open descriptors and the clock in the form that the package
// comment gives. It belongs to the Tree and the pages of the same moment.
func (s *System) State() []byte {
	r := stateRecord{Version: stateVersion, Monotonic: s.monotonic(), Models: s.listing[:]}
	for i, d := range s.fds {
		if d == nil {
			continue
		}
		fr := fdRecord{
			Number: uint64(i), Kind: uint64(d.kind), Offset: uint64(d.offset), Flags: uint64(d.flags),
			Base: uint64(d.base), Inheriting: uint64(d.inheriting), Preopen: d.preopen,
		}
		if d.node != nil {
			fr.Inode = d.node.number
		}
		r.FDs = append(r.FDs, fr)
	}
	return cose.MustMarshal(r)
}

// RestoreState puts the descriptors and the clock of an earlier State in place of
// those that s has. The Dir must be restored from the Tree of the same moment, and
// the read-only files must be the same. On an error s is as it was.
func (s *System) RestoreState(state []byte) error {
	var r stateRecord
	if err := cose.Unmarshal(state, &r); err != nil {
		return fmt.Errorf("restore wasi state: %w", err)
	}
	fds, err := s.restoreFDs(&r)
	if err != nil {
		return fmt.Errorf("restore wasi state: %w", err)
	}
	for _, d := range fds {
		if d != nil && d.node != nil {
			d.node.open++
		}
	}
	for _, d := range s.fds {
		s.release(d)
	}
	s.fds = fds
	s.monoBase, s.monoLast, s.monoStart = r.Monotonic, r.Monotonic, s.cfg.Monotonic()
	return nil
}

func (s *System) restoreFDs(r *stateRecord) ([]*descriptor, error) {
	switch {
	case r.Version != stateVersion:
		return nil, fmt.Errorf("version %d, this is %d", r.Version, stateVersion)
	case r.Monotonic > math.MaxInt64:
		return nil, fmt.Errorf("clock at %d", r.Monotonic)
	case len(r.Models) != sha256.Size || [sha256.Size]byte(r.Models) != s.listing:
		return nil, fmt.Errorf("other read-only files than the %d here: give the same", len(s.cfg.ReadOnly))
	}
	var fds []*descriptor
	held := map[*inode]bool{}
	for i := range r.FDs {
		fr := &r.FDs[i]
		if fr.Number < uint64(len(fds)) || fr.Number >= uint64(s.cfg.Limits.FDs) {
			return nil, fmt.Errorf("descriptor %d, it must be at least %d and less than %d", fr.Number, len(fds), s.cfg.Limits.FDs)
		}
		d, err := s.restoreFD(fr)
		if err != nil {
			return nil, fmt.Errorf("descriptor %d: %w", fr.Number, err)
		}
		fds = append(fds, make([]*descriptor, fr.Number-uint64(len(fds)))...)
		fds = append(fds, d)
		held[d.node] = true
	}
	if s.cfg.Dir != nil {
		for number, n := range s.cfg.Dir.nodes {
			if n.names == 0 && !held[n] {
				return nil, fmt.Errorf("file %d of the directory has no name and is not open", number)
			}
		}
	}
	return fds, nil
}

func (s *System) restoreFD(r *fdRecord) (*descriptor, error) {
	if r.Kind > uint64(kindModels) {
		return nil, fmt.Errorf("kind %d is none", r.Kind)
	}
	d := &descriptor{
		kind: fdKind(r.Kind), offset: int64(r.Offset), flags: uint16(r.Flags),
		base: rights(r.Base), inheriting: rights(r.Inheriting), preopen: r.Preopen,
	}
	possible, inheritable := d.kind.streamRights(), rights(0)
	if !d.kind.stream() {
		tree := s.tree(d.kind)
		if tree == nil {
			return nil, fmt.Errorf("kind %d, and there is no such directory", r.Kind)
		}
		d.node = tree.nodes[r.Inode]
		if d.node == nil || d.node.kind == kindLink {
			return nil, fmt.Errorf("inode %d cannot be open", r.Inode)
		}
		possible = fileRights
		if d.isDir() {
			possible, inheritable = dirRights, allRights
		}
	} else if r.Inode != 0 {
		return nil, fmt.Errorf("inode %d of a stream", r.Inode)
	}
	isFile := d.node != nil && !d.isDir()
	switch {
	case d.base&^possible != 0 || d.inheriting&^inheritable != 0:
		return nil, fmt.Errorf("rights %#x, inheriting %#x are more than it can have", r.Base, r.Inheriting)
	case r.Flags&^allFlags != 0:
		return nil, fmt.Errorf("flags %#x", r.Flags)
	case r.Offset > math.MaxInt64, r.Offset != 0 && !isFile:
		return nil, fmt.Errorf("offset %d", r.Offset)
	case d.preopen && (d.node == nil || d.node.number != rootNumber):
		return nil, fmt.Errorf("preopened, and not a root")
	case d.kind == kindModels && isFile && d.base&rightFDWrite != 0:
		return nil, fmt.Errorf("writes to a read-only file")
	}
	return d, nil
}

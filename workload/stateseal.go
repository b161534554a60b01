package workload

import (
	"bytes"
	"crypto/cipher"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
)

// StateSealer seals deltas as the parts of one instance's log. It is for one
// goroutine.
type StateSealer struct {
	header partHeader // of the next part
	aead   cipher.AEAD
	plain  []byte // of the next part; its capacity is maxPlain
	next   place  // of the next page of this delta, at the earliest
	broken bool   // a delta was not sealed whole
}

// NewStateSealer goes on with a log: key seals, and has this id of 8 bytes, prev is
// the log's head (nil: 32 zeros, there is none), next the number of the next delta.
func NewStateSealer(instance string, keyID, key, prev []byte, next uint64, rand io.Reader) (*StateSealer, error) {
	if prev == nil {
		prev = make([]byte, sha256.Size)
	}
	if !ValidInstance(instance) || len(keyID) != keyIDSize || len(prev) != sha256.Size {
		return nil, errors.New("sealing state: the instance's name, the key's id or the head of the log is of the wrong size")
	}
	salt, err := drawSalt(rand)
	if err != nil {
		return nil, fmt.Errorf("sealing state: %w", err)
	}
	derived, err := stateKey(key, salt)
	if err != nil {
		return nil, fmt.Errorf("sealing state: %w", err)
	}
	aead, err := NewAEAD(derived)
	if err != nil {
		return nil, fmt.Errorf("sealing state: %w", err)
	}
	return &StateSealer{
		header: partHeader{instance: instance, key: bytes.Clone(keyID), salt: salt, n: next, prev: bytes.Clone(prev)},
		aead:   aead, plain: make([]byte, 0, maxPlain),
	}, nil
}

// Head is the head of the log with all parts so far.
func (s *StateSealer) Head() []byte { return bytes.Clone(s.header.prev) }

// Next is the number of the next delta.
func (s *StateSealer) Next() uint64 { return s.header.n }

// Seal seals a delta with its pages (nil: none) and calls emit with each part, in
// order; a part is at most MaxPart bytes, and emit may keep it. Pages are read as
// they are needed, between two calls of emit. d.N is ignored. After an error the
// sealer is of no more use, and neither are the parts of this delta.
func (s *StateSealer) Seal(d Delta, pages Pages, emit func(part []byte) error) error {
	defer func() { clear(s.plain[:cap(s.plain)]) }()
	if s.broken {
		return errors.New("sealing state: an earlier delta could not be sealed whole")
	}
	s.broken, s.next, s.plain = true, place{}, s.plain[:0]
	s.header.index = 0
	if err := s.seal(d, pages, emit); err != nil {
		return fmt.Errorf("sealing state: delta %d: %w", s.header.n, err)
	}
	s.header.n++
	s.broken = false
	return nil
}

func (s *StateSealer) seal(d Delta, pages Pages, emit func([]byte) error) error {
	head, err := d.encode()
	if err != nil {
		return err
	}
	for len(head) > maxPlain {
		s.plain = append(s.plain[:0], head[:maxPlain]...)
		if err := s.flush(false, emit); err != nil {
			return err
		}
		head = head[maxPlain:]
	}
	s.plain = append(s.plain, head...)
	if pages != nil {
		for p := range pages {
			if err := s.add(&d, p, emit); err != nil {
				return err
			}
		}
	}
	return s.flush(true, emit)
}

// add puts pages into parts.
func (s *StateSealer) add(d *Delta, p Page, emit func([]byte) error) error {
	if err := d.holds(p); err != nil {
		return err
	}
	if p.place().less(s.next) {
		return fmt.Errorf("page %d of space %d, inode %d comes too late", p.Index, p.Space, p.Inode)
	}
	for {
		n := s.room(p)
		if n == 0 {
			if err := s.flush(false, emit); err != nil {
				return err
			}
			continue
		}
		s.run(p, p.Data[:n])
		p.Data, p.Index = p.Data[n:], s.next.index
		if len(p.Data) == 0 {
			return nil
		}
	}
}

// room is how many bytes of p the part has room for.
func (s *StateSealer) room(p Page) int {
	room := maxPlain - len(s.plain) - maxRunHead
	if p.Space == SpaceFiles {
		if room < len(p.Data) {
			return 0
		}
		return len(p.Data)
	}
	return max(0, min(room, len(p.Data))/MemoryPage*MemoryPage)
}

func (s *StateSealer) run(p Page, data []byte) {
	b := appendCBOR(s.plain, majorArray, 4)
	for _, n := range []uint64{p.Space, p.Inode, p.Index} {
		b = appendCBOR(b, majorUint, n)
	}
	s.plain = append(appendCBOR(b, majorBytes, uint64(len(data))), data...)
	p.Data = data
	s.next = p.after()
}

// flush seals the part.
func (s *StateSealer) flush(last bool, emit func([]byte) error) error {
	if s.header.index >= maxParts {
		return errors.New("too many parts")
	}
	s.header.last = last
	part := make([]byte, 0, maxPartHead+len(s.plain)+tagSize)
	part = s.header.append(part, 8)
	s.header.additional = append(append(s.header.additional[:0], 0x87), part[1:]...)
	part = appendCBOR(part, majorBytes, uint64(len(s.plain)+tagSize))
	part = s.aead.Seal(part, s.header.nonce(), s.plain, s.header.additional)
	sum := sha256.Sum256(part)
	copy(s.header.prev, sum[:])
	s.header.index++
	s.plain = s.plain[:0]
	return emit(part)
}

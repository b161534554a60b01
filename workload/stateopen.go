package workload

import (
	"bytes"
	"crypto/cipher"
	"crypto/sha256"
	"errors"
	"fmt"
)

// StateError is why a part of a log was refused.
type StateError string

// Reasons. Errors of the opener wrap exactly one of them, or the sink's error.
const (
	StateForeign    StateError = "it is the state of another instance"
	StateUnknownKey StateError = "it is sealed under a key that is not among the instance's"
	StateTruncated  StateError = "it was cut off"
	StateOrder      StateError = "it is out of order or was played twice"
	StateMixed      StateError = "it was put together from different histories"
	StateCorrupted  StateError = "it was changed or damaged"
)

func (e StateError) Error() string { return string(e) }

// StateSink takes in the deltas of a log. An error ends the opening.
type StateSink interface {
	// Begin comes first in a delta: all of it but the pages.
	Begin(*Delta) error
	// Page brings pages, in ascending order; the data is good during the call only.
	Page(Page) error
	// End says that the delta was complete.
	End() error
}

// StateKey is a key of a log and its id.
type StateKey struct{ ID, Key []byte }

// StateOpener opens the parts of one instance's log. It is for one goroutine.
type StateOpener struct {
	instance string
	keys     []StateKey
	sink     StateSink

	begun bool       // a part was opened
	whole bool       // a delta was
	last  partHeader // of the newest part; prev is the head
	aead  cipher.AEAD

	delta   *Delta // that is being opened, once its head is complete
	head    []byte // of that delta, as far as it came
	size    uint64 // of all of the head
	next    place  // of that delta's next page, at the earliest
	plain   []byte // of the part, reused
	failure error
}

// NewStateOpener opens a log from a full delta on, whose first part may name any
// head before it. Keys have 32 bytes, their ids 8.
func NewStateOpener(instance string, keys []StateKey, sink StateSink) (*StateOpener, error) {
	for _, k := range keys {
		if len(k.ID) != keyIDSize || len(k.Key) != KeySize {
			return nil, errors.New("opening state: a key or its id is of the wrong size")
		}
	}
	return &StateOpener{
		instance: instance, keys: keys, sink: sink,
		last: partHeader{last: true, prev: make([]byte, sha256.Size)}, plain: make([]byte, 0, maxPlain),
	}, nil
}

// AddKey lets the opener open what is sealed under one more key.
func (o *StateOpener) AddKey(k StateKey) { o.keys = append(o.keys, k) }

// Head is the head of what was opened: 32 zeros if nothing was.
func (o *StateOpener) Head() []byte { return bytes.Clone(o.last.prev) }

// Next is the number of the next delta.
func (o *StateOpener) Next() uint64 {
	if o.begun && o.last.last {
		return o.last.n + 1
	}
	return o.last.n
}

// End is an error, StateTruncated, unless what was opened is one or more whole
// deltas.
func (o *StateOpener) End() error {
	clear(o.plain[:cap(o.plain)])
	if o.failure == nil && (!o.begun || !o.last.last) {
		return fmt.Errorf("opening state: delta %d: its end is missing: %w", o.last.n, StateTruncated)
	}
	return o.failure
}

// Open opens the log's next part and gives what is in it to the sink. It returns
// the delta that is complete with this part, or nil. After an error the opener, and
// what the sink has made of it, are of no more use.
func (o *StateOpener) Open(part []byte) (*Delta, error) {
	if o.failure != nil {
		return nil, o.failure
	}
	d, err := o.open(part)
	if err != nil {
		o.failure = fmt.Errorf("opening state: %w", err)
		return nil, o.failure
	}
	return d, nil
}

// Check says whether Open would find the part to be the next one and genuine. It
// changes nothing: a part that somebody altered on its way can come again.
func (o *StateOpener) Check(part []byte) error {
	if o.failure != nil {
		return o.failure
	}
	if _, _, _, err := o.decrypt(part); err != nil {
		return fmt.Errorf("opening state: %w", err)
	}
	return nil
}

// decrypt opens a part that is the next one.
func (o *StateOpener) decrypt(part []byte) (h partHeader, aead cipher.AEAD, plain []byte, err error) {
	h, box, err := parsePart(part)
	if err != nil {
		return h, nil, nil, err
	}
	if aead, err = o.follow(&h); err != nil {
		return h, nil, nil, fmt.Errorf("part %d of delta %d: %w", h.index, h.n, err)
	}
	if plain, err = aead.Open(o.plain[:0], h.nonce(), box, h.additional); err != nil {
		return h, nil, nil, fmt.Errorf("part %d of delta %d: %w", h.index, h.n, StateCorrupted)
	}
	return h, aead, plain, nil
}

func (o *StateOpener) open(part []byte) (*Delta, error) {
	h, aead, plain, err := o.decrypt(part)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(part)
	h.prev = sum[:]
	o.begun, o.last, o.aead = true, h, aead
	d, err := o.take(plain, h)
	if err != nil {
		return nil, fmt.Errorf("part %d of delta %d: %w", h.index, h.n, err)
	}
	return d, nil
}

// follow checks that a part is the next one, and returns its key.
func (o *StateOpener) follow(h *partHeader) (cipher.AEAD, error) {
	n, index := o.last.n, o.last.index+1
	if o.last.last {
		n, index = o.Next(), 0
	}
	switch {
	case h.instance != o.instance:
		return nil, fmt.Errorf("instance %q instead of %q: %w", h.instance, o.instance, StateForeign)
	case !o.begun && h.index != 0:
		return nil, fmt.Errorf("the beginning of the delta is missing: %w", StateTruncated)
	case h.index != index, o.begun && index == 0 && h.n != n:
		return nil, fmt.Errorf("expected part %d of delta %d: %w", index, n, StateOrder)
	case index > 0 && (h.n != n || !bytes.Equal(h.key, o.last.key) || !bytes.Equal(h.salt, o.last.salt)):
		return nil, fmt.Errorf("the part before is of another delta: %w", StateMixed)
	case o.begun && !bytes.Equal(h.prev, o.last.prev):
		return nil, fmt.Errorf("it follows another part than the one before: %w", StateMixed)
	}
	if o.begun && bytes.Equal(h.key, o.last.key) && bytes.Equal(h.salt, o.last.salt) {
		return o.aead, nil
	}
	for _, k := range o.keys {
		if bytes.Equal(k.ID, h.key) {
			key, err := stateKey(k.Key, h.salt)
			if err != nil {
				return nil, err
			}
			return NewAEAD(key)
		}
	}
	return nil, fmt.Errorf("key %x: %w", h.key, StateUnknownKey)
}

// take reads the plaintext of a part.
func (o *StateOpener) take(plain []byte, h partHeader) (*Delta, error) {
	rest := plain
	if h.index == 0 {
		o.delta, o.head, o.next = nil, nil, place{}
		r := stateReader{data: plain}
		if o.size = r.number(); r.err != nil || o.size > maxHead {
			return nil, malformedState(errors.New("the size of the head"))
		}
		rest = plain[r.at:]
	}
	if o.delta == nil {
		n := min(uint64(len(rest)), o.size-uint64(len(o.head)))
		o.head = append(o.head, rest[:n]...)
		if rest = rest[n:]; uint64(len(o.head)) < o.size {
			if len(plain) != maxPlain || h.last {
				return nil, malformedState(errors.New("the head is not complete"))
			}
			return nil, nil
		}
		if err := o.begin(h.n); err != nil {
			return nil, err
		}
	} else if len(rest) == 0 {
		return nil, malformedState(errors.New("an empty part"))
	}
	if err := o.runs(rest); err != nil || !h.last {
		return nil, err
	}
	d := o.delta
	o.delta, o.head, o.whole = nil, nil, true
	return d, o.sink.End()
}

// begin reads the head of delta n.
func (o *StateOpener) begin(n uint64) error {
	d, err := decodeHead(o.head)
	if err != nil {
		return malformedState(err)
	}
	if !d.Full && !o.whole {
		return fmt.Errorf("the log begins with a delta that needs an earlier one: %w", StateTruncated)
	}
	d.N, o.delta = n, d
	return o.sink.Begin(d)
}

// runs gives the pages to the sink.
func (o *StateOpener) runs(b []byte) error {
	r := stateReader{data: b}
	for r.at < len(b) {
		r.literal(0x84)
		p := Page{Space: r.number(), Inode: r.number(), Index: r.number(), Data: r.bytes()}
		if r.err == nil {
			r.err = o.delta.holds(p)
		}
		if r.err == nil && p.place().less(o.next) {
			r.err = fmt.Errorf("page %d of space %d, inode %d comes too late", p.Index, p.Space, p.Inode)
		}
		if r.err != nil {
			return malformedState(r.err)
		}
		o.next = p.after()
		if err := o.sink.Page(p); err != nil {
			return err
		}
	}
	return nil
}

// malformedState is about what no sealer of this format seals.
func malformedState(err error) error { return fmt.Errorf("%w: %w", err, StateCorrupted) }

// parsePart reads a part without opening it.
func parsePart(part []byte) (h partHeader, box []byte, err error) {
	r := stateReader{data: part}
	r.literal(0x88)
	h.instance = string(r.text())
	h.key, h.salt = bytes.Clone(r.bytes()), bytes.Clone(r.bytes())
	h.n, h.index = r.number(), r.number()
	h.last = r.boolean()
	h.prev = r.bytes()
	end := r.at
	box = r.bytes()
	switch {
	case r.short:
		return h, nil, fmt.Errorf("a part: %w", StateTruncated)
	case r.err != nil:
		return h, nil, fmt.Errorf("a part: %w: %w", r.err, StateCorrupted)
	case r.at != len(part), !ValidInstance(h.instance), len(h.key) != keyIDSize, len(h.salt) != saltSize,
		h.index >= maxParts, len(h.prev) != sha256.Size, len(box) <= tagSize, len(box) > maxPlain+tagSize:
		return h, nil, fmt.Errorf("a part: a field is missing or of the wrong size: %w", StateCorrupted)
	}
	h.additional = append(append(make([]byte, 0, end), 0x87), part[1:end]...)
	return h, box, nil
}

// PeekPart reads the id of the key that a part is sealed under, and whether it is
// the last of its delta, without opening it.
func PeekPart(part []byte) (key []byte, last bool, err error) {
	h, _, err := parsePart(part)
	return h.key, h.last, err
}

// ChainHead is the head of a log with this part after all that has the head prev
// (nil: do not check that it follows). It takes no key, and only says that the part
// belongs there: not that it opens.
func ChainHead(prev, part []byte) ([]byte, error) {
	h, _, err := parsePart(part)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if prev != nil && !bytes.Equal(prev, h.prev) {
		return nil, fmt.Errorf("state: part %d of delta %d: it follows another part than the one before: %w", h.index, h.n, StateMixed)
	}
	sum := sha256.Sum256(part)
	return sum[:], nil
}

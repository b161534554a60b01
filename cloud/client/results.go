package client

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"edgekeep/cloud/fleet"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/workload"
)

// Result is one result of an instance.
type Result struct {
	sealing.Reading
	Instance string
	Gateway  string // that sealed it
	Epoch    uint64 // of the instance
	Line     uint64 // counts on from epoch to epoch
	// Gap says what is missing before this result, if something is.
	Gap string
	// Conflict says that another result came under this line before. A keep that
	// works never signs two.
	Conflict string
}

// Results reads an instance's results, on whichever gateways it ran: each line
// once, and none that the ledger does not accept.
type Results struct {
	reader   *Reader
	instance string
	inspect  func(ctx context.Context, instance string) (fleet.Record, error)
	held     []Opened // that wait for the ledger's word

	next   map[uint64]uint64   // by epoch: the line after the newest that was returned
	hashes map[uint64][32]byte // of the newest lines
	order  []uint64            // of hashes, the oldest first
	fenced uint64
}

// maxHashes bounds what conflicts are found by: a line that comes again after so
// many others is left out unseen.
const maxHashes = 1 << 16

// Results starts at the beginning of what is stored of an instance.
func (c *Client) Results(instance string) (*Results, error) {
	if !workload.ValidInstance(instance) {
		return nil, fmt.Errorf("%.64q cannot be an instance's name", instance)
	}
	r, err := c.Reader("", instance)
	if err != nil {
		return nil, err
	}
	return &Results{
		reader: r, instance: instance, inspect: c.Inspect, next: map[uint64]uint64{}, hashes: map[uint64][32]byte{},
	}, nil
}

// Fenced is how many results were left out because the ledger does not accept
// them.
func (r *Results) Fenced() uint64 { return r.fenced }

// Next returns the next results, waiting up to wait for them; none is no error.
// After an error it can be called again.
func (r *Results) Next(ctx context.Context, wait time.Duration) ([]Result, error) {
	for {
		out, more, err := r.page(ctx, wait)
		if err != nil || len(out) > 0 || !more {
			return out, err
		}
	}
}

// page returns what counts of the next records, and whether there were any.
func (r *Results) page(ctx context.Context, wait time.Duration) (out []Result, more bool, err error) {
	if len(r.held) == 0 {
		got, err := r.reader.Next(ctx, wait)
		if err != nil {
			return nil, false, err
		}
		r.held = got
	}
	if len(r.held) == 0 {
		return nil, false, nil
	}
	// Asked after the results were read: what the ledger accepts then it accepts for
	// ever, because an entry takes over the lines that are stored when it is made.
	rec, err := r.inspect(ctx, r.instance)
	if err != nil {
		return nil, false, err
	}
	held := r.held
	r.held = nil
	for len(held) > 0 { // records of one chunk share its cursor
		n := 1
		for n < len(held) && held[n].Cursor == held[0].Cursor && held[0].Cursor != nil {
			n++
		}
		out = append(out, r.chunk(rec, held[:n])...)
		held = held[n:]
	}
	return out, true, nil
}

// chunk numbers the readings of a chunk's records: they are its cursor's line and
// those before.
func (r *Results) chunk(rec fleet.Record, records []Opened) []Result {
	cursor := records[0].Cursor
	epoch, err := r.epoch(cursor)
	if err != nil { // a source of another gateway has the instance's name
		return nil
	}
	n := uint64(0)
	for _, o := range records {
		n += uint64(len(o.Readings))
	}
	if n > cursor.Line {
		r.fenced += n // no keep numbers from below 1
		return nil
	}
	var out []Result
	line := cursor.Line - n
	for _, o := range records {
		for _, reading := range o.Readings {
			line++
			if !rec.Accepts(o.Gateway, epoch, line) {
				r.fenced++
				continue
			}
			if res, ok := r.once(Result{Reading: reading, Instance: r.instance, Gateway: o.Gateway, Epoch: epoch, Line: line}, rec); ok {
				out = append(out, res)
			}
		}
	}
	return out
}

// epoch reads it off a cursor's session: see workload.Session.
func (r *Results) epoch(c *sealing.Cursor) (uint64, error) {
	if c == nil {
		return 0, errors.New("no cursor")
	}
	text, ok := strings.CutPrefix(c.Session, r.instance+"#")
	epoch, err := strconv.ParseUint(text, 10, 64)
	if !ok || err != nil || workload.Session(r.instance, epoch) != c.Session {
		return 0, errors.New("not a session of this instance")
	}
	return epoch, nil
}

// once says whether a result is to be returned: it is new, or it contradicts what
// was returned. Lines of an epoch come in order, from one gateway.
func (r *Results) once(res Result, rec fleet.Record) (Result, bool) {
	hash := sha256.Sum256(cose.MustMarshal([]any{res.Name, res.Unit, res.Time, res.Value}))
	next, seen := r.next[res.Epoch]
	if !seen {
		next = res.Line
		if after, ok := rec.After(res.Epoch); ok {
			next = after + 1
		}
	}
	if old, ok := r.hashes[res.Line]; res.Line < next || ok {
		if !ok || old == hash {
			return res, false
		}
		res.Conflict = fmt.Sprintf("line %d came before with other content", res.Line)
		return res, true
	}
	if res.Line > next {
		res.Gap = fmt.Sprintf("%d lines before line %d are missing", res.Line-next, res.Line)
	}
	r.next[res.Epoch] = res.Line + 1
	if len(r.order) >= maxHashes {
		delete(r.hashes, r.order[0])
		r.order = r.order[1:]
	}
	r.hashes[res.Line] = hash
	r.order = append(r.order, res.Line)
	return res, true
}

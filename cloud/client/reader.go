package client

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hpke"
	"errors"
	"fmt"
	"maps"
	"time"

	"edgekeep/cloud/fleet"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// Reader opens a tenant's data in the order in which it was stored. It trusts
// the cloud with nothing but availability: it verifies every key, checkpoint and
// hash itself.
type Reader struct {
	c       *Client
	key     hpke.PrivateKey
	gateway string
	stream  string
	after   uint64
	keys    map[keyID]streamKey
	heads   map[string]sealing.Checkpoint
}

type keyID struct {
	gateway, stream string
	epoch           sealing.Epoch
}

type streamKey struct {
	aead  cipher.AEAD
	epoch *ecdsa.PublicKey
}

// Opened is one opened and checked record.
type Opened struct {
	Gateway  string
	Stream   string
	Epoch    sealing.Epoch
	Seq      uint64
	Bytes    int // of the sealed record
	Readings []sealing.Reading
	// Cursor is that of the record's chunk, which all records of a chunk share: how
	// far the numbered lines are in it. It may be nil.
	Cursor *sealing.Cursor
	// Gap says what is missing before this record, if something is.
	Gap string
}

// Reader starts at the beginning of what is stored. gateway and stream may be
// empty: all.
func (c *Client) Reader(gateway, stream string) (*Reader, error) {
	if c.Consumer == "" {
		return nil, errors.New("this kit is no consumer's: data opens with a key that the data owner has granted reading")
	}
	key, err := c.ConsumerKey()
	if err != nil {
		return nil, err
	}
	return &Reader{
		c: c, key: key, gateway: gateway, stream: stream,
		keys: map[keyID]streamKey{}, heads: map[string]sealing.Checkpoint{},
	}, nil
}

// Next returns the next records, waiting up to wait for them; none is no error.
// After an error it can be called again.
func (r *Reader) Next(ctx context.Context, wait time.Duration) ([]Opened, error) {
	got, err := r.c.Chunks(ctx, r.gateway, r.stream, r.after, wait)
	if err != nil {
		return nil, err
	}
	var out []Opened
	before := maps.Clone(r.heads)
	for _, s := range got.Chunks {
		o, err := r.open(ctx, s)
		if err != nil {
			r.heads = before // all of it comes again
			return nil, fmt.Errorf("gateway %s: %w", s.Gateway, err)
		}
		out = append(out, o...)
	}
	r.after = got.Next
	return out, nil
}

func (r *Reader) open(ctx context.Context, s fleet.Stored) ([]Opened, error) {
	chunk, pos, err := sealing.ParseChunk(s.Data)
	if err != nil {
		return nil, err
	}
	cp := pos.Checkpoint
	if cp.Subject != r.c.Tenant+"/"+s.Gateway {
		return nil, fmt.Errorf("a chunk of %s was filed here", cp.Subject)
	}
	k, err := r.streamKey(ctx, keyID{s.Gateway, cp.Stream, cp.Epoch})
	if err != nil {
		return nil, err
	}
	if err := sealing.VerifyChunk(chunk, k.epoch); err != nil {
		return nil, err
	}
	name := s.Gateway + "/" + cp.Stream
	gap := missing(r.heads[name], pos)
	var out []Opened
	for _, rec := range chunk.Records {
		h, readings, err := sealing.OpenRecord(k.aead, rec)
		if err != nil {
			return nil, err
		}
		out = append(out, Opened{
			Gateway: s.Gateway, Stream: h.Stream, Epoch: h.Epoch, Seq: h.Seq, Bytes: len(rec), Readings: readings, Cursor: cp.Cursor, Gap: gap,
		})
		gap = ""
	}
	r.heads[name] = cp
	return out, nil
}

// missing says what a chunk does not follow.
func missing(head sealing.Checkpoint, pos sealing.Position) string {
	first := pos.First
	switch {
	case head.Head == nil: // the first one we see: the reader may have started in the middle
		return ""
	case head.Epoch == first.Epoch && first.Seq == head.Seq+1 && bytes.Equal(first.Prev, head.Head):
		return ""
	case head.Epoch == first.Epoch:
		return fmt.Sprintf("record %d does not follow record %d", first.Seq, head.Seq)
	case first.Before == nil:
		return "a new epoch that names none before it"
	case first.Before.Epoch == head.Epoch && first.Before.Count == head.Seq+1 && bytes.Equal(first.Before.Head, head.Head):
		return ""
	}
	return fmt.Sprintf("epoch %s follows record %d of epoch %s, but says that %d records of epoch %s came before", first.Epoch, head.Seq, head.Epoch, first.Before.Count, first.Before.Epoch)
}

// streamKey gets a stream key from the key broker and checks who vouches for it.
func (r *Reader) streamKey(ctx context.Context, id keyID) (streamKey, error) {
	if k, ok := r.keys[id]; ok {
		return k, nil
	}
	rel, err := r.c.Release(ctx, id.gateway, id.stream, id.epoch)
	if err != nil {
		return streamKey{}, err
	}
	h, secret, err := sealing.OpenStreamKey(r.c.Roots.Broker, sealing.TypRelease, rel.Message, r.key)
	if err != nil {
		return streamKey{}, err
	}
	subject := r.c.Tenant + "/" + id.gateway
	if h.Subject != subject || h.Stream != id.stream || h.Epoch != id.epoch {
		return streamKey{}, errors.New("the key broker sent the key of another stream")
	}
	k := streamKey{}
	if k.epoch, err = vouched(r.c.Roots, subject, rel); err != nil {
		return streamKey{}, err
	}
	if k.aead, err = sealing.NewAEAD(secret); err != nil {
		return streamKey{}, err
	}
	r.keys[id] = k
	return k, nil
}

// vouched returns the epoch key, if an affirming verdict vouches for it.
func vouched(roots attest.Trusted, subject string, rel message.Release) (*ecdsa.PublicKey, error) {
	v, err := attest.VerifyVerdict(roots.Verifier, rel.Verdict)
	if err != nil {
		return nil, err
	}
	if v.Subject != subject || !v.Affirming() {
		return nil, fmt.Errorf("the verdict on the producer is about %s: %s", v.Subject, attest.Tier(v.Appraisal().Status))
	}
	key, err := cose.UnmarshalKey(rel.EpochKey)
	if err != nil {
		return nil, err
	}
	return v.DataKey(cose.Thumbprint(key))
}

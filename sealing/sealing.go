// Package sealing is the format of sealed readings: what the keep makes, the
// agent and the broker carry without being able to read it, the fleet stores,
// and a consumer opens. It is pure: bytes in, bytes out.
//
// # Streams and epochs
//
// A gateway's readings come in streams, one for each source. Time on a gateway
// is cut into epochs: every start of the keep and every rotation of stream keys
// opens one. An epoch's id is 16 bytes, the big-endian value of a counter in the
// TPM that only goes up, and 8 random bytes. In an epoch each stream has a fresh
// random key, so that restoring an old disk can never repeat a (key, nonce).
//
// # Messages
//
// All are COSE (RFC 9052) in deterministic CBOR (RFC 8949 §4.2.1). Private
// labels:
//
//	-70300 subject  tstr  "tenant/gateway"
//	-70301 stream   tstr
//	-70302 epoch    bstr .size 16
//	-70303 seq      uint  position of the record in its epoch, from 0
//	-70304 prev     bstr .size 32  SHA-256 of the record before; zeros at seq 0
//	-70305 before   [epoch: bstr, count: uint, head: bstr]  in seq 0 only: where
//	                the stream ended in the epoch before: how many records, and
//	                the SHA-256 of the last. The keep could not know: count is 0 and
//	                head empty, or the 16-byte id of an earlier epoch, whose end is
//	                all that the agent showed it
//	-70306 encoding "zstd", absent if the content is not compressed
//
// A stream key is a COSE_Sign1 by the epoch key (typ TypStreamKey) over a
// COSE_Encrypt {1: 3 (A256GCM), subject, stream, epoch} whose plaintext is a
// symmetric COSE_Key {1: 4, 3: 3, -1: key} and whose recipients are COSE-HPKE
// (Key Encryption).
//
// A record is a COSE_Encrypt0 under the stream key with the protected header
// {1: 3, 3: 112 (application/senml+cbor), 5: iv, stream, epoch, seq, prev,
// ? before, ? encoding}; iv is 4 zero bytes and the big-endian seq. The
// plaintext is a SenML pack (RFC 8428) in CBOR.
//
// A checkpoint is a COSE_Sign1 by the epoch key (typ TypCheckpoint) over
//
//	{1: subject, 2: stream, 3: epoch, 4: seq of the newest record it covers,
//	 5: SHA-256 of that record, ? 6: [session, line]}
//
// where 6 is the last numbered line that the records up to here hold (see
// package sensors): how a keep that was killed knows where a driver must resume.
//
// A watermark is a COSE_Sign1 by the fleet (typ TypWatermark) over the map of a
// checkpoint without 6: the cloud has stored everything up to here.
//
// An oldest is a COSE_Sign1 by the epoch key (typ TypOldest) over the map of a
// checkpoint without 6: the gateway has nothing of the stream from before the
// chunk that ends here.
//
// A chunk is what travels and is stored as one: [stream key, [+ record],
// checkpoint], where the checkpoint covers exactly the last record. A chunk that
// begins with a record whose seq is a multiple of KeyEvery carries the stream key,
// so that a spool that lost its beginning can still be read; in others it is empty. A chunk is at most MaxChunk bytes.
package sealing

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
)

// Types of the signed messages (COSE header 16, RFC 9596).
const (
	TypStreamKey  = "application/edgekeep-stream-key+cose"
	TypCheckpoint = "application/edgekeep-checkpoint+cbor"
	TypWatermark  = "application/edgekeep-watermark+cbor"
	TypOldest     = "application/edgekeep-oldest+cbor"
	TypRelease    = "application/edgekeep-release+cose"
)

// Bounds.
const (
	MaxChunk   = 120 << 10 // bytes of an encoded chunk: fits an MQTT payload of 128 KiB
	MaxContent = 1 << 20   // bytes of a record's content after decompression
	KeyEvery   = 64        // the stream key comes with record 0 of an epoch, 64, 128, …
	KeySize    = 32
	hashSize   = sha256.Size
	epochSize  = 16
)

// Epoch is an epoch's id.
type Epoch [epochSize]byte

// NewEpoch makes an id from a counter value and 8 random bytes.
func NewEpoch(counter uint64, random [8]byte) Epoch {
	var e Epoch
	binary.BigEndian.PutUint64(e[:8], counter)
	copy(e[8:], random[:])
	return e
}

// Counter is the TPM counter's value in the id: a later epoch has a higher one.
func (e Epoch) Counter() uint64 { return binary.BigEndian.Uint64(e[:8]) }

// String is the id in hexadecimal.
func (e Epoch) String() string { return fmt.Sprintf("%x", e[:]) }

// MarshalCBOR encodes the id as a byte string.
func (e Epoch) MarshalCBOR() ([]byte, error) { return cose.Marshal(e[:]) }

// UnmarshalCBOR decodes a byte string of 16 bytes.
func (e *Epoch) UnmarshalCBOR(b []byte) error {
	var raw []byte
	if err := cose.Unmarshal(b, &raw); err != nil {
		return err
	}
	if len(raw) != epochSize {
		return errors.New("an epoch id has 16 bytes")
	}
	copy(e[:], raw)
	return nil
}

// Before says where a stream ended in the epoch before.
type Before struct {
	_     struct{} `cbor:",toarray"`
	Epoch Epoch
	Count uint64 // records in that epoch
	Head  []byte // SHA-256 of the last one; or see Known
}

// Known reports whether the keep knew where that epoch ended. If not, Head is
// empty, or the id of the earlier epoch whose end the agent showed instead.
func (b Before) Known() bool { return len(b.Head) == hashSize }

// Header is a record's protected header.
type Header struct {
	Alg      int     `cbor:"1,keyasint"`
	Content  int     `cbor:"3,keyasint"`
	IV       []byte  `cbor:"5,keyasint"`
	Stream   string  `cbor:"-70301,keyasint"`
	Epoch    Epoch   `cbor:"-70302,keyasint"`
	Seq      uint64  `cbor:"-70303,keyasint"`
	Prev     []byte  `cbor:"-70304,keyasint"`
	Before   *Before `cbor:"-70305,keyasint,omitempty"`
	Encoding string  `cbor:"-70306,keyasint,omitempty"`
}

const (
	algA256GCM    = 3
	contentSenML  = 112 // CoAP content format of application/senml+cbor
	encodingZstd  = "zstd"
	maxNameLength = 64
)

func nonce(seq uint64) []byte {
	iv := make([]byte, 12)
	binary.BigEndian.PutUint64(iv[4:], seq)
	return iv
}

// NewAEAD makes the AEAD of a stream key.
func NewAEAD(key []byte) (cipher.AEAD, error) {
	if len(key) != KeySize {
		return nil, errors.New("a stream key has 32 bytes")
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// SealRecord seals a SenML pack. prev is the hash of the record before (zeros at
// seq 0), before where the stream ended in the epoch before (seq 0 only, may be
// nil). content is compressed already if compressed says so.
func SealRecord(aead cipher.AEAD, stream string, epoch Epoch, seq uint64, prev []byte, before *Before, content []byte, compressed bool) ([]byte, error) {
	h := Header{
		Alg: algA256GCM, Content: contentSenML, IV: nonce(seq),
		Stream: stream, Epoch: epoch, Seq: seq, Prev: prev, Before: before,
	}
	if compressed {
		h.Encoding = encodingZstd
	}
	return cose.SealEncrypt0(aead, h.IV, h, content, nil)
}

// ParseRecord reads a record's header and checks it; nothing is opened.
func ParseRecord(record []byte) (Header, error) {
	h, _, err := parseRecord(record)
	return h, err
}

func parseRecord(record []byte) (Header, cose.Encrypt0, error) {
	m, err := cose.ParseEncrypt0(record)
	if err != nil {
		return Header{}, m, fmt.Errorf("record: %w", err)
	}
	var h Header
	if err := cose.Unmarshal(m.Protected, &h); err != nil {
		return Header{}, m, fmt.Errorf("record header: %w", err)
	}
	switch {
	case h.Alg != algA256GCM || h.Content != contentSenML:
		err = errors.New("algorithm or content format not of this profile")
	case !bytes.Equal(h.IV, nonce(h.Seq)):
		err = errors.New("the IV does not follow from the sequence number")
	case len(h.Prev) != hashSize:
		err = errors.New("the hash of the record before is not of 32 bytes")
	case h.Stream == "" || len(h.Stream) > maxNameLength:
		err = errors.New("stream name empty or too long")
	case h.Encoding != "" && h.Encoding != encodingZstd:
		err = fmt.Errorf("unknown content encoding %.32q", h.Encoding)
	case h.Seq > 0 && h.Before != nil:
		err = errors.New("only an epoch's first record says what was before")
	case h.Seq == 0 && !bytes.Equal(h.Prev, make([]byte, hashSize)):
		err = errors.New("an epoch's first record names a record before it")
	case h.Before != nil && !h.Before.Known() && (len(h.Before.Head) != 0 && len(h.Before.Head) != epochSize || h.Before.Count != 0):
		err = errors.New("the head of the epoch before is not of 32 bytes")
	}
	if err != nil {
		return Header{}, m, fmt.Errorf("record header: %w", err)
	}
	return h, m, nil
}

// OpenRecord opens a record and returns its header and its readings.
func OpenRecord(aead cipher.AEAD, record []byte) (Header, []Reading, error) {
	h, m, err := parseRecord(record)
	if err != nil {
		return h, nil, err
	}
	content, err := m.Open(aead, h.IV, nil)
	if err != nil {
		return h, nil, fmt.Errorf("record %s/%s/%d: %w", h.Stream, h.Epoch, h.Seq, err)
	}
	if h.Encoding == encodingZstd {
		if content, err = decompress(content); err != nil {
			return h, nil, fmt.Errorf("record %s/%s/%d: %w", h.Stream, h.Epoch, h.Seq, err)
		}
	}
	readings, err := ParsePack(content)
	if err != nil {
		return h, nil, fmt.Errorf("record %s/%s/%d: %w", h.Stream, h.Epoch, h.Seq, err)
	}
	return h, readings, nil
}

// Hash is a record's place in the chain: SHA-256 of its bytes.
func Hash(record []byte) []byte {
	sum := sha256.Sum256(record)
	return sum[:]
}

// Cursor is the last numbered ingest line that is in the records.
type Cursor struct {
	_       struct{} `cbor:",toarray"`
	Session string
	Line    uint64
}

// Checkpoint is a signed position in a stream.
type Checkpoint struct {
	Subject string  `cbor:"1,keyasint"`
	Stream  string  `cbor:"2,keyasint"`
	Epoch   Epoch   `cbor:"3,keyasint"`
	Seq     uint64  `cbor:"4,keyasint"`
	Head    []byte  `cbor:"5,keyasint"`
	Cursor  *Cursor `cbor:"6,keyasint,omitempty"`
}

func (c Checkpoint) validate() error {
	if len(c.Head) != hashSize || c.Stream == "" || len(c.Stream) > maxNameLength || c.Subject == "" || len(c.Subject) > 2*maxNameLength+1 {
		return errors.New("a field is missing or of the wrong size")
	}
	return nil
}

// Sign signs a checkpoint with the epoch key, or a watermark with the fleet's.
func (c Checkpoint) Sign(key crypto.Signer, typ string) ([]byte, error) {
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("signing a checkpoint: %w", err)
	}
	return cose.Sign1(key, typ, cose.MustMarshal(c))
}

// VerifyCheckpoint verifies a checkpoint (TypCheckpoint), a watermark
// (TypWatermark) or an oldest (TypOldest).
func VerifyCheckpoint(pub *ecdsa.PublicKey, typ string, msg []byte) (Checkpoint, error) {
	payload, err := cose.Verify1(pub, typ, msg)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	return parseCheckpoint(payload)
}

// PeekCheckpoint reads a checkpoint and the id of the key that claims to have
// signed it, without verifying: to look the key up.
func PeekCheckpoint(msg []byte) (Checkpoint, []byte, error) {
	h, payload, err := cose.Peek1(msg)
	if err != nil {
		return Checkpoint{}, nil, fmt.Errorf("checkpoint: %w", err)
	}
	c, err := parseCheckpoint(payload)
	return c, h.KID, err
}

func parseCheckpoint(payload []byte) (Checkpoint, error) {
	var c Checkpoint
	err := cose.Unmarshal(payload, &c)
	if err == nil {
		err = c.validate()
	}
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	return c, nil
}

// Chunk is the unit that travels and is stored.
type Chunk struct {
	_          struct{} `cbor:",toarray"`
	StreamKey  []byte   // only in chunks that begin with every KeyEvery-th record
	Records    [][]byte
	Checkpoint []byte
}

// Marshal encodes a chunk.
func (c Chunk) Marshal() []byte { return cose.MustMarshal(c) }

// ParseChunk decodes a chunk and checks that it is consistent in itself: records
// follow each other by sequence number and hash, in one stream and epoch, the
// stream key (when there is one) is of that stream and epoch, and the checkpoint
// covers exactly the last record. Nothing is verified with a key: see
// VerifyChunk.
func ParseChunk(b []byte) (Chunk, Position, error) {
	var c Chunk
	if len(b) > MaxChunk {
		return c, Position{}, fmt.Errorf("chunk: %d bytes, at most %d", len(b), MaxChunk)
	}
	if err := cose.Unmarshal(b, &c); err != nil {
		return c, Position{}, fmt.Errorf("chunk: %w", err)
	}
	pos, err := c.position()
	if err != nil {
		return c, Position{}, fmt.Errorf("chunk: %w", err)
	}
	return c, pos, nil
}

// Position is what a chunk says about where it belongs.
type Position struct {
	First      Header     // header of the first record
	Checkpoint Checkpoint // not verified
	Signer     []byte     // key id of the checkpoint's signer
}

func (c Chunk) position() (Position, error) {
	if len(c.Records) == 0 {
		return Position{}, errors.New("it has no records")
	}
	cp, signer, err := PeekCheckpoint(c.Checkpoint)
	if err != nil {
		return Position{}, err
	}
	pos := Position{Checkpoint: cp, Signer: signer}
	var prev Header
	for i, r := range c.Records {
		h, err := ParseRecord(r)
		if err != nil {
			return Position{}, err
		}
		if i == 0 {
			pos.First = h
		} else if h.Seq != prev.Seq+1 || !bytes.Equal(h.Prev, Hash(c.Records[i-1])) {
			return Position{}, fmt.Errorf("record %d does not follow the one before it", h.Seq)
		}
		if h.Stream != cp.Stream || h.Epoch != cp.Epoch {
			return Position{}, errors.New("records and checkpoint are of different streams or epochs")
		}
		prev = h
	}
	if prev.Seq != cp.Seq || !bytes.Equal(cp.Head, Hash(c.Records[len(c.Records)-1])) {
		return Position{}, errors.New("the checkpoint does not cover the last record")
	}
	if (len(c.StreamKey) > 0) != (pos.First.Seq%KeyEvery == 0) {
		return Position{}, fmt.Errorf("the stream key comes with every %dth record, and only there", KeyEvery)
	}
	if len(c.StreamKey) == 0 {
		return pos, nil
	}
	k, err := PeekStreamKey(c.StreamKey)
	if err != nil {
		return Position{}, err
	}
	if k.Subject != cp.Subject || k.Stream != cp.Stream || k.Epoch != cp.Epoch {
		return Position{}, errors.New("the stream key is of another stream or epoch")
	}
	return pos, nil
}

// VerifyChunk verifies the signatures of a parsed chunk with the epoch key. With
// the checks of ParseChunk this authenticates every record in it: the checkpoint
// signs the last hash, and each record names the hash of the one before.
func VerifyChunk(c Chunk, epochKey *ecdsa.PublicKey) error {
	if _, err := VerifyCheckpoint(epochKey, TypCheckpoint, c.Checkpoint); err != nil {
		return err
	}
	if len(c.StreamKey) == 0 {
		return nil
	}
	if _, err := cose.Verify1(epochKey, TypStreamKey, c.StreamKey); err != nil {
		return fmt.Errorf("stream key: %w", err)
	}
	return nil
}

// KeyHeader is the protected header of a stream key's COSE_Encrypt.
type KeyHeader struct {
	Alg     int    `cbor:"1,keyasint"`
	Subject string `cbor:"-70300,keyasint"`
	Stream  string `cbor:"-70301,keyasint"`
	Epoch   Epoch  `cbor:"-70302,keyasint"`
}

type symmetricKey struct {
	Type int    `cbor:"1,keyasint"`
	Alg  int    `cbor:"3,keyasint"`
	Key  []byte `cbor:"-1,keyasint"`
}

// SealStreamKey encrypts a stream key to its recipients and signs it: with the
// epoch key as TypStreamKey, or with the key broker's as TypRelease.
func SealStreamKey(signer crypto.Signer, typ, subject, stream string, epoch Epoch, key []byte, to ...hpke.PublicKey) ([]byte, error) {
	if len(key) != KeySize {
		return nil, errors.New("a stream key has 32 bytes")
	}
	plain := cose.MustMarshal(symmetricKey{Type: 4, Alg: algA256GCM, Key: key})
	h := KeyHeader{Alg: algA256GCM, Subject: subject, Stream: stream, Epoch: epoch}
	enc, err := cose.SealEncrypt(h, plain, nil, to...)
	if err != nil {
		return nil, fmt.Errorf("sealing a stream key: %w", err)
	}
	return cose.Sign1(signer, typ, enc)
}

// PeekStreamKey reads for what a stream key is, without verifying.
func PeekStreamKey(msg []byte) (KeyHeader, error) {
	_, payload, err := cose.Peek1(msg)
	if err != nil {
		return KeyHeader{}, fmt.Errorf("stream key: %w", err)
	}
	_, h, err := parseKey(payload)
	return h, err
}

func parseKey(payload []byte) (cose.Encrypt, KeyHeader, error) {
	m, err := cose.ParseEncrypt(payload)
	if err != nil {
		return m, KeyHeader{}, fmt.Errorf("stream key: %w", err)
	}
	var h KeyHeader
	if err := cose.Unmarshal(m.Protected, &h); err != nil {
		return m, KeyHeader{}, fmt.Errorf("stream key header: %w", err)
	}
	if h.Alg != algA256GCM || h.Stream == "" || h.Subject == "" {
		return m, KeyHeader{}, errors.New("stream key header: not of this profile")
	}
	return m, h, nil
}

// OpenStreamKey verifies a stream key or a release and opens it.
func OpenStreamKey(pub *ecdsa.PublicKey, typ string, msg []byte, key hpke.PrivateKey) (KeyHeader, []byte, error) {
	payload, err := cose.Verify1(pub, typ, msg)
	if err != nil {
		return KeyHeader{}, nil, fmt.Errorf("stream key: %w", err)
	}
	m, h, err := parseKey(payload)
	if err != nil {
		return KeyHeader{}, nil, err
	}
	plain, err := m.Open(key, nil)
	if err != nil {
		return h, nil, fmt.Errorf("stream key: %w", err)
	}
	var k symmetricKey
	if err := cose.Unmarshal(plain, &k); err != nil {
		return h, nil, fmt.Errorf("stream key: %w", err)
	}
	if k.Type != 4 || k.Alg != algA256GCM || len(k.Key) != KeySize {
		return h, nil, errors.New("stream key: the content is not an A256GCM key")
	}
	return h, k.Key, nil
}

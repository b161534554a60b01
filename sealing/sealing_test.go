package sealing

import (
	"bytes"
	"crypto/hpke"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"edgekeep/internal/cose"
)

func wantReason(t *testing.T, name string, err error, reason string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s: %v; want %q", name, err, reason)
	}
}

func TestEpoch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		counter := rapid.Uint64().Draw(t, "counter")
		random := [8]byte(rapid.SliceOfN(rapid.Byte(), 8, 8).Draw(t, "random"))
		e := NewEpoch(counter, random)
		if e.Counter() != counter || e.String() != fmt.Sprintf("%016x%x", counter, random) {
			t.Fatalf("%s is not %d, %x", e, counter, random)
		}
		var back Epoch
		if err := cose.Unmarshal(cose.MustMarshal(e), &back); err != nil || back != e {
			t.Fatalf("%s became %s, %v", e, back, err)
		}
	})
	for _, n := range []int{0, 15, 17} {
		var e Epoch
		if err := cose.Unmarshal(cose.MustMarshal(make([]byte, n)), &e); err == nil {
			t.Errorf("an epoch id of %d bytes", n)
		}
	}
}

// The nonce of a record is 4 zero bytes and its sequence number, and never another one.
func TestIVRule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seq := rapid.Uint64().Draw(t, "seq")
		prev := bytes.Repeat([]byte{byte(min(seq, 1))}, 32)
		aead, err := NewAEAD(count(1, 32))
		if err != nil {
			t.Fatal(err)
		}
		r, err := SealRecord(aead, testStream, testEpoch, seq, prev, nil, []byte{0x80}, false)
		if err != nil {
			t.Fatal(err)
		}
		h, err := ParseRecord(r)
		if err != nil {
			t.Fatal(err)
		}
		if want := binary.BigEndian.AppendUint64(make([]byte, 4), seq); !bytes.Equal(h.IV, want) || h.Seq != seq {
			t.Fatalf("seq %d: IV %x", h.Seq, h.IV)
		}
	})
}

// withHeader is a record with this protected header, well sealed.
func withHeader(t *testing.T, change func(*Header)) []byte {
	t.Helper()
	h := Header{Alg: 3, Content: 112, IV: nonce(0), Stream: testStream, Epoch: testEpoch, Prev: make([]byte, 32)}
	change(&h)
	return must(cose.SealEncrypt0(testAEAD(t), nonce(h.Seq), h, pack(t, testReadings()...), nil))(t)
}

func TestParseRecordRefuses(t *testing.T) {
	if _, _, err := OpenRecord(testAEAD(t), withHeader(t, func(*Header) {})); err != nil {
		t.Fatalf("the record itself: %v", err)
	}
	before := &Before{Epoch: testEpoch, Count: 1, Head: make([]byte, 32)}
	for name, tt := range map[string]struct {
		change func(*Header)
		reason string
	}{
		"content format":   {func(h *Header) { h.Content = 60 }, "content format"},
		"IV of another":    {func(h *Header) { h.IV = nonce(1) }, "IV does not follow"},
		"IV too long":      {func(h *Header) { h.IV = make([]byte, 13) }, "IV does not follow"},
		"no IV":            {func(h *Header) { h.IV = nil }, "IV does not follow"},
		"short prev":       {func(h *Header) { h.Prev = make([]byte, 31) }, "hash of the record before"},
		"no prev":          {func(h *Header) { h.Prev = nil }, "hash of the record before"},
		"no stream":        {func(h *Header) { h.Stream = "" }, "stream name"},
		"long stream":      {func(h *Header) { h.Stream = strings.Repeat("x", 65) }, "stream name"},
		"unknown encoding": {func(h *Header) { h.Encoding = "gzip" }, `unknown content encoding "gzip"`},
		"late before":      {func(h *Header) { h.Seq, h.IV, h.Before = 1, nonce(1), before }, "only an epoch's first record"},
		"prev at 0":        {func(h *Header) { h.Prev[31] = 1 }, "names a record before it"},
		"short head":       {func(h *Header) { h.Before = &Before{Head: make([]byte, 31)} }, "head of the epoch before"},
	} {
		_, err := ParseRecord(withHeader(t, tt.change))
		wantReason(t, name, err, tt.reason)
	}
	if _, err := ParseRecord(withHeader(t, func(h *Header) { h.Before = &Before{Epoch: testEpoch} })); err != nil {
		t.Errorf("a head that is not known: %v", err)
	}
	unknown := must(cose.SealEncrypt0(testAEAD(t), nonce(0), map[int]any{1: 3, 2: []int{99}, 3: 112}, nil, nil))(t)
	_, err := ParseRecord(unknown)
	wantReason(t, "crit", err, "record header")
	_, err = ParseRecord([]byte{0xd0, 0x83})
	wantReason(t, "cut", err, "record: ")
}

func TestParseCheckpointRefuses(t *testing.T) {
	good := checkpointOf(chain(t, 1), 0)
	for name, change := range map[string]func(*Checkpoint){
		"no subject":    func(c *Checkpoint) { c.Subject = "" },
		"long subject":  func(c *Checkpoint) { c.Subject = strings.Repeat("x", 130) },
		"no stream":     func(c *Checkpoint) { c.Stream = "" },
		"long stream":   func(c *Checkpoint) { c.Stream = strings.Repeat("x", 65) },
		"short head":    func(c *Checkpoint) { c.Head = c.Head[:31] },
		"no head":       func(c *Checkpoint) { c.Head = nil },
		"longer a head": func(c *Checkpoint) { c.Head = make([]byte, 33) },
	} {
		c := good
		change(&c)
		if _, err := c.Sign(testKey(t, epochSigner), TypCheckpoint); err == nil {
			t.Errorf("%s: signed", name)
		}
		msg := must(cose.Sign1(testKey(t, epochSigner), TypCheckpoint, cose.MustMarshal(c)))(t)
		_, err := VerifyCheckpoint(&testKey(t, epochSigner).PublicKey, TypCheckpoint, msg)
		wantReason(t, name, err, "missing or of the wrong size")
		_, _, err = PeekCheckpoint(msg)
		wantReason(t, name, err, "missing or of the wrong size")
	}
	for name, payload := range map[string]any{"not a map": []int{1}, "unknown field": map[int]any{1: "a/b", 9: 1}} {
		msg := must(cose.Sign1(testKey(t, epochSigner), TypCheckpoint, cose.MustMarshal(payload)))(t)
		_, _, err := PeekCheckpoint(msg)
		wantReason(t, name, err, "checkpoint: ")
	}
}

// parts of a good chunk of three records from seq 0 on.
func goodChunk(t *testing.T) Chunk {
	t.Helper()
	records := chain(t, 3)
	return Chunk{
		StreamKey:  streamKey(t, testSubject, testStream, testEpoch),
		Records:    records,
		Checkpoint: sign(t, checkpointOf(records, 2), TypCheckpoint),
	}
}

func streamKey(t *testing.T, subject, stream string, epoch Epoch) []byte {
	t.Helper()
	return must(SealStreamKey(testKey(t, epochSigner), TypStreamKey, subject, stream, epoch, count(0x40, 32), testHPKEKey(t, p256(), 0x60).PublicKey()))(t)
}

func TestParseChunkRefuses(t *testing.T) {
	other := NewEpoch(6, [8]byte{})
	foreign := func(t *testing.T, stream string, epoch Epoch, c *Chunk) {
		c.Records[2] = must(SealRecord(testAEAD(t), stream, epoch, 2, Hash(c.Records[1]), nil, pack(t), false))(t)
		cp := checkpointOf(c.Records, 2)
		c.Checkpoint = sign(t, cp, TypCheckpoint)
	}
	covering := func(t *testing.T, c *Chunk, change func(*Checkpoint)) {
		cp := checkpointOf(c.Records, 2)
		change(&cp)
		c.Checkpoint = sign(t, cp, TypCheckpoint)
	}
	for name, tt := range map[string]struct {
		change func(*testing.T, *Chunk)
		reason string
	}{
		"no records":           {func(_ *testing.T, c *Chunk) { c.Records = nil }, "it has no records"},
		"no checkpoint":        {func(_ *testing.T, c *Chunk) { c.Checkpoint = nil }, "checkpoint: "},
		"a record is none":     {func(_ *testing.T, c *Chunk) { c.Records[1] = []byte{1} }, "record: "},
		"a record is missing":  {func(_ *testing.T, c *Chunk) { c.Records = append(c.Records[:1:1], c.Records[2]) }, "record 2 does not follow"},
		"records are swapped":  {func(_ *testing.T, c *Chunk) { c.Records[0], c.Records[1] = c.Records[1], c.Records[0] }, "record 0 does not follow"},
		"a record is repeated": {func(_ *testing.T, c *Chunk) { c.Records = append(c.Records[:2:2], c.Records[1:]...) }, "record 1 does not follow"},
		"another chain": {func(t *testing.T, c *Chunk) {
			c.Records[1] = must(SealRecord(testAEAD(t), testStream, testEpoch, 1, make([]byte, 32), nil, pack(t), false))(t)
		}, "record 1 does not follow"},
		"a record of another":   {func(t *testing.T, c *Chunk) { foreign(t, "other", testEpoch, c) }, "different streams or epochs"},
		"a record of an epoch":  {func(t *testing.T, c *Chunk) { foreign(t, testStream, other, c) }, "different streams or epochs"},
		"checkpoint of another": {func(t *testing.T, c *Chunk) { covering(t, c, func(p *Checkpoint) { p.Stream = "other" }) }, "different streams or epochs"},
		"checkpoint elsewhere":  {func(t *testing.T, c *Chunk) { covering(t, c, func(p *Checkpoint) { p.Epoch = other }) }, "different streams or epochs"},
		"checkpoint too far":    {func(t *testing.T, c *Chunk) { covering(t, c, func(p *Checkpoint) { p.Seq = 3 }) }, "does not cover the last record"},
		"checkpoint too early": {func(t *testing.T, c *Chunk) {
			covering(t, c, func(p *Checkpoint) { p.Seq, p.Head = 1, Hash(c.Records[1]) })
		}, "does not cover the last record"},
		"checkpoint's head":     {func(t *testing.T, c *Chunk) { covering(t, c, func(p *Checkpoint) { p.Head[0] ^= 1 }) }, "does not cover the last record"},
		"no stream key":         {func(_ *testing.T, c *Chunk) { c.StreamKey = nil }, "the stream key comes with"},
		"stream key too late":   {func(_ *testing.T, c *Chunk) { c.Records = c.Records[1:] }, "the stream key comes with"},
		"stream key is none":    {func(_ *testing.T, c *Chunk) { c.StreamKey = []byte{1} }, "stream key: "},
		"key of another box":    {func(t *testing.T, c *Chunk) { c.StreamKey = streamKey(t, "acme/gw8", testStream, testEpoch) }, "stream key is of another"},
		"key of another stream": {func(t *testing.T, c *Chunk) { c.StreamKey = streamKey(t, testSubject, "other", testEpoch) }, "stream key is of another"},
		"key of another epoch":  {func(t *testing.T, c *Chunk) { c.StreamKey = streamKey(t, testSubject, testStream, other) }, "stream key is of another"},
	} {
		c := goodChunk(t)
		if _, _, err := ParseChunk(c.Marshal()); err != nil {
			t.Fatalf("the chunk itself: %v", err)
		}
		tt.change(t, &c)
		_, _, err := ParseChunk(c.Marshal())
		wantReason(t, name, err, tt.reason)
	}
	later := goodChunk(t)
	later.StreamKey, later.Records = nil, later.Records[1:]
	if _, pos, err := ParseChunk(later.Marshal()); err != nil || pos.First.Seq != 1 {
		t.Errorf("a later chunk: %+v, %v", pos.First, err)
	}
	_, _, err := ParseChunk(append(later.Marshal(), 0))
	wantReason(t, "a byte more", err, "chunk: ")
}

func TestChunkBound(t *testing.T) {
	_, _, err := ParseChunk(make([]byte, MaxChunk+1))
	wantReason(t, "one byte too long", err, "at most 122880")
	// A chunk of exactly the bound, filled by the content of its one record.
	build := func(size int) []byte {
		r := must(SealRecord(testAEAD(t), testStream, testEpoch, 0, make([]byte, 32), nil, make([]byte, size), false))(t)
		return Chunk{
			StreamKey: streamKey(t, testSubject, testStream, testEpoch), Records: [][]byte{r},
			Checkpoint: sign(t, checkpointOf([][]byte{r}, 0), TypCheckpoint),
		}.Marshal()
	}
	fill := 110 << 10
	fill += MaxChunk - len(build(fill))
	full := build(fill)
	if _, _, err := ParseChunk(full); err != nil || len(full) != MaxChunk {
		t.Errorf("%d bytes: %v", len(full), err)
	}
	_, _, err = ParseChunk(build(fill + 1))
	wantReason(t, "one byte more", err, "at most 122880")
}

// The signatures of a chunk are of their own types: what was signed for something else
// does not pass.
func TestVerifyChunkRefuses(t *testing.T) {
	key := testKey(t, epochSigner)
	good := goodChunk(t)
	records := good.Records
	to := testHPKEKey(t, p256(), 0x60).PublicKey()
	release := must(SealStreamKey(key, TypRelease, testSubject, testStream, testEpoch, count(0x40, 32), to))(t)
	byOther := must(SealStreamKey(testKey(t, 9), TypStreamKey, testSubject, testStream, testEpoch, count(0x40, 32), to))(t)
	for name, tt := range map[string]struct {
		change func(*Chunk)
		reason string
	}{
		"a watermark":       {func(c *Chunk) { c.Checkpoint = sign(t, checkpointOf(records, 2), TypWatermark) }, "checkpoint: "},
		"an oldest":         {func(c *Chunk) { c.Checkpoint = sign(t, checkpointOf(records, 2), TypOldest) }, "checkpoint: "},
		"another signer":    {func(c *Chunk) { c.Checkpoint = must(checkpointOf(records, 2).Sign(testKey(t, 9), TypCheckpoint))(t) }, "checkpoint: "},
		"a release":         {func(c *Chunk) { c.StreamKey = release }, "stream key: "},
		"key of a stranger": {func(c *Chunk) { c.StreamKey = byOther }, "stream key: "},
	} {
		c := good
		tt.change(&c)
		parsed, _, err := ParseChunk(c.Marshal())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		wantReason(t, name, VerifyChunk(parsed, &key.PublicKey), tt.reason)
	}
}

func TestStreamKey(t *testing.T) {
	signer := testKey(t, epochSigner)
	p, h := testHPKEKey(t, p256(), 0x60), testHPKEKey(t, hpke.MLKEM768P256(), 0x80)
	stranger := testHPKEKey(t, p256(), 0x70)
	key := count(3, 32)
	for name, to := range map[string][]hpke.PrivateKey{"P-256": {p}, "hybrid": {h}, "both": {p, h}} {
		var pubs []hpke.PublicKey
		for _, k := range to {
			pubs = append(pubs, k.PublicKey())
		}
		msg := must(SealStreamKey(signer, TypRelease, testSubject, testStream, testEpoch, key, pubs...))(t)
		for _, k := range to {
			header, got, err := OpenStreamKey(&signer.PublicKey, TypRelease, msg, k)
			if err != nil || !bytes.Equal(got, key) || header.Stream != testStream || header.Subject != testSubject || header.Epoch != testEpoch {
				t.Errorf("%s: %+v, %v", name, header, err)
			}
		}
		peeked, err := PeekStreamKey(msg)
		if err != nil || peeked.Epoch != testEpoch {
			t.Errorf("%s: %+v, %v", name, peeked, err)
		}
		_, _, err = OpenStreamKey(&signer.PublicKey, TypRelease, msg, stranger)
		wantReason(t, name+" by a stranger", err, "not among its")
		_, _, err = OpenStreamKey(&signer.PublicKey, TypStreamKey, msg, to[0])
		wantReason(t, name+" as another type", err, "the message is a "+TypRelease)
		_, _, err = OpenStreamKey(&testKey(t, 9).PublicKey, TypRelease, msg, to[0])
		wantReason(t, name+" by another signer", err, "names key")
	}
	for _, size := range []int{0, 16, 31, 33} {
		if _, err := SealStreamKey(signer, TypRelease, testSubject, testStream, testEpoch, make([]byte, size), p.PublicKey()); err == nil {
			t.Errorf("sealed a key of %d bytes", size)
		}
		if _, err := NewAEAD(make([]byte, size)); err == nil {
			t.Errorf("an AEAD with a key of %d bytes", size)
		}
	}
	if _, err := SealStreamKey(signer, TypRelease, testSubject, testStream, testEpoch, key); err == nil {
		t.Error("sealed to nobody")
	}
}

func TestOpenStreamKeyContent(t *testing.T) {
	signer, to := testKey(t, epochSigner), testHPKEKey(t, p256(), 0x60)
	good := KeyHeader{Alg: 3, Subject: testSubject, Stream: testStream, Epoch: testEpoch}
	noSubject, noStream := good, good
	noSubject.Subject, noStream.Stream = "", ""
	key := func(typ, alg, size int) []byte {
		return cose.MustMarshal(symmetricKey{Type: typ, Alg: alg, Key: make([]byte, size)})
	}
	for name, tt := range map[string]struct {
		header KeyHeader
		plain  []byte
		reason string
	}{
		"no subject":  {noSubject, key(4, 3, 32), "not of this profile"},
		"no stream":   {noStream, key(4, 3, 32), "not of this profile"},
		"kty":         {good, key(2, 3, 32), "not an A256GCM key"},
		"alg":         {good, key(4, 1, 32), "not an A256GCM key"},
		"size":        {good, key(4, 3, 16), "not an A256GCM key"},
		"no COSE_Key": {good, count(0, 32), "stream key: "},
	} {
		enc := must(cose.SealEncrypt(tt.header, tt.plain, nil, to.PublicKey()))(t)
		msg := must(cose.Sign1(signer, TypRelease, enc))(t)
		_, _, err := OpenStreamKey(&signer.PublicKey, TypRelease, msg, to)
		wantReason(t, name, err, tt.reason)
	}
}

package sealing

import (
	"bytes"
	"crypto/hpke"
	"reflect"
	"testing"

	"edgekeep/internal/cose"
)

func TestStreamKeyGolden(t *testing.T) {
	msg := golden(t, "streamkey.golden")
	want := KeyHeader{Alg: 3, Subject: testSubject, Stream: testStream, Epoch: testEpoch}
	for name, key := range map[string]hpke.PrivateKey{
		"P-256":  testHPKEKey(t, p256(), 0x60),
		"hybrid": testHPKEKey(t, hpke.MLKEM768P256(), 0x80),
	} {
		h, got, err := OpenStreamKey(&testKey(t, epochSigner).PublicKey, TypStreamKey, msg, key)
		if err != nil || h != want || !bytes.Equal(got, count(0x40, 32)) {
			t.Errorf("%s: %+v, %x, %v", name, h, got, err)
		}
	}
	// HPKE is randomised: the signature, over the same content, is not.
	_, payload, err := cose.Peek1(msg)
	if err != nil {
		t.Fatal(err)
	}
	if again := must(cose.Sign1(detSigner{testKey(t, epochSigner)}, TypStreamKey, payload))(t); !bytes.Equal(again, msg) {
		t.Errorf("signed again: %x", again)
	}
}

func TestRecordGolden(t *testing.T) {
	first, second := golden(t, "record0.golden"), golden(t, "record1.golden")
	want := Header{
		Alg: 3, Content: 112, IV: make([]byte, 12), Stream: testStream, Epoch: testEpoch, Prev: make([]byte, 32),
		Before: &Before{Epoch: NewEpoch(4, [8]byte(count(0xd0, 8))), Count: 17, Head: count(0x10, 32)},
	}
	check := func(msg []byte, want Header) {
		t.Helper()
		h, readings, err := OpenRecord(testAEAD(t), msg)
		if err != nil || !reflect.DeepEqual(h, want) || !reflect.DeepEqual(readings, testReadings()) {
			t.Errorf("%+v, %v, %v", h, readings, err)
		}
		// Sealed again from what is in it; what zstd makes of it may change with zstd.
		h, m, err := parseRecord(msg)
		if err != nil {
			t.Fatal(err)
		}
		content := must(m.Open(testAEAD(t), h.IV, nil))(t)
		again := must(SealRecord(testAEAD(t), h.Stream, h.Epoch, h.Seq, h.Prev, h.Before, content, h.Encoding != ""))(t)
		if !bytes.Equal(again, msg) {
			t.Errorf("sealed again: %x", again)
		}
	}
	check(first, want)
	want.IV, want.Seq, want.Prev, want.Before, want.Encoding = append(make([]byte, 11), 1), 1, Hash(first), nil, "zstd"
	check(second, want)
}

func TestPackGolden(t *testing.T) {
	want := golden(t, "pack.golden")
	if got := pack(t, testReadings()...); !bytes.Equal(got, want) {
		t.Errorf("got %x", got)
	}
	if got := must(ParsePack(want))(t); !reflect.DeepEqual(got, testReadings()) {
		t.Errorf("got %v", got)
	}
}

func TestCheckpointGolden(t *testing.T) {
	c := Checkpoint{Subject: testSubject, Stream: testStream, Epoch: testEpoch, Seq: 1, Head: Hash(golden(t, "record1.golden"))}
	withCursor := c
	withCursor.Cursor = &Cursor{Session: "s1", Line: 99}
	for _, tt := range []struct {
		name   string
		c      Checkpoint
		typ    string
		signer byte
	}{
		{"checkpoint.golden", withCursor, TypCheckpoint, epochSigner},
		{"oldest.golden", c, TypOldest, epochSigner},
		{"watermark.golden", c, TypWatermark, fleetSigner},
	} {
		want, key := golden(t, tt.name), testKey(t, tt.signer)
		if got := must(tt.c.Sign(detSigner{key}, tt.typ))(t); !bytes.Equal(got, want) {
			t.Errorf("%s: got %x", tt.name, got)
		}
		if got, err := VerifyCheckpoint(&key.PublicKey, tt.typ, want); err != nil || !reflect.DeepEqual(got, tt.c) {
			t.Errorf("%s: %+v, %v", tt.name, got, err)
		}
		got, signer, err := PeekCheckpoint(want)
		if err != nil || !reflect.DeepEqual(got, tt.c) || !bytes.Equal(signer, cose.Thumbprint(&key.PublicKey)) {
			t.Errorf("%s: %+v by %x, %v", tt.name, got, signer, err)
		}
		for _, typ := range []string{TypCheckpoint, TypOldest, TypWatermark} {
			if _, err := VerifyCheckpoint(&key.PublicKey, typ, want); (err == nil) != (typ == tt.typ) {
				t.Errorf("%s as %s: %v", tt.name, typ, err)
			}
		}
		if _, err := VerifyCheckpoint(&testKey(t, 7).PublicKey, tt.typ, want); err == nil {
			t.Errorf("%s verifies with another key", tt.name)
		}
	}
}

func TestChunkGolden(t *testing.T) {
	want := golden(t, "chunk.golden")
	records := [][]byte{golden(t, "record0.golden"), golden(t, "record1.golden")}
	parts := Chunk{StreamKey: golden(t, "streamkey.golden"), Records: records, Checkpoint: golden(t, "checkpoint.golden")}
	if got := parts.Marshal(); !bytes.Equal(got, want) {
		t.Errorf("got %x", got)
	}
	c, pos, err := ParseChunk(want)
	if err != nil || !reflect.DeepEqual(c, parts) {
		t.Fatalf("%v", err)
	}
	if pos.First.Seq != 0 || pos.First.Before.Count != 17 || pos.Checkpoint.Seq != 1 || pos.Checkpoint.Cursor.Line != 99 ||
		!bytes.Equal(pos.Signer, cose.Thumbprint(&testKey(t, epochSigner).PublicKey)) {
		t.Errorf("%+v", pos)
	}
	if err := VerifyChunk(c, &testKey(t, epochSigner).PublicKey); err != nil {
		t.Error(err)
	}
	if err := VerifyChunk(c, &testKey(t, fleetSigner).PublicKey); err == nil {
		t.Error("verifies with another key")
	}
}

// TestChunkFlips flips each bit of a chunk in turn. What the epoch key signed covers all
// of it: the records by their hashes, the stream key by its own signature.
func TestChunkFlips(t *testing.T) {
	msg, key := golden(t, "chunk.golden"), &testKey(t, epochSigner).PublicKey
	accepted := func(b []byte) bool {
		c, _, err := ParseChunk(b)
		return err == nil && VerifyChunk(c, key) == nil
	}
	if !accepted(msg) {
		t.Fatal("the chunk itself is refused")
	}
	for i := range msg {
		for bit := range 8 {
			changed := bytes.Clone(msg)
			changed[i] ^= 1 << bit
			if accepted(changed) {
				t.Errorf("accepted with bit %d of byte %d flipped", bit, i)
			}
		}
	}
	for i := range msg {
		if _, _, err := ParseChunk(msg[:i]); err == nil {
			t.Errorf("the first %d bytes are a chunk", i)
		}
	}
}

// A record alone is protected by its AEAD, header and content.
func TestRecordFlips(t *testing.T) {
	for _, name := range []string{"record0.golden", "record1.golden"} {
		msg := golden(t, name)
		for i := range msg {
			for bit := range 8 {
				changed := bytes.Clone(msg)
				changed[i] ^= 1 << bit
				if _, _, err := OpenRecord(testAEAD(t), changed); err == nil {
					t.Errorf("%s: opened with bit %d of byte %d flipped", name, bit, i)
				}
			}
		}
	}
	other := must(NewAEAD(count(0x41, 32)))(t)
	if _, _, err := OpenRecord(other, golden(t, "record0.golden")); err == nil {
		t.Error("opened with another key")
	}
}

package sealing

import (
	"bytes"
	"reflect"
	"testing"

	"edgekeep/internal/cose"
)

// Each target holds a decoder to two promises: it does not panic, and what it takes is
// spelled in the one way that the encoder writes.

func FuzzParseChunk(f *testing.F) {
	key := &testKey(f, epochSigner).PublicKey
	want := golden(f, "chunk.golden")
	f.Add(want)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, pos, err := ParseChunk(b)
		if err != nil {
			return
		}
		if !bytes.Equal(c.Marshal(), b) {
			t.Fatalf("written as %x", c.Marshal())
		}
		if pos.Checkpoint.Seq-pos.First.Seq != uint64(len(c.Records)-1) {
			t.Fatalf("%d records from %d to %d", len(c.Records), pos.First.Seq, pos.Checkpoint.Seq)
		}
		if VerifyChunk(c, key) == nil && !bytes.Equal(b, want) {
			notForged(t, b)
		}
	})
}

// notForged fails unless the signatures are the known ones with s replaced by n-s, which
// anybody can do.
func notForged(t *testing.T, b []byte) {
	t.Helper()
	known, _, _ := ParseChunk(golden(t, "chunk.golden"))
	c, _, _ := ParseChunk(b)
	for _, m := range [][2][]byte{{known.StreamKey, c.StreamKey}, {known.Checkpoint, c.Checkpoint}} {
		_, a, _ := cose.Peek1(m[0])
		_, b, _ := cose.Peek1(m[1])
		if !bytes.Equal(a, b) {
			t.Fatalf("forged: %x", m[1])
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	for _, name := range []string{"record0.golden", "record1.golden"} {
		f.Add(golden(f, name))
	}
	aead := testAEAD(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseRecord(b)
		if err == nil && (len(h.Prev) != 32 || h.Stream == "" || !bytes.Equal(h.IV, nonce(h.Seq))) {
			t.Fatalf("%+v", h)
		}
		if _, _, openErr := OpenRecord(aead, b); err != nil && openErr == nil {
			t.Fatalf("opened, but not parsed: %v", err)
		}
	})
}

func FuzzParsePack(f *testing.F) {
	f.Add(golden(f, "pack.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		readings, err := ParsePack(b)
		if err != nil {
			return
		}
		again, err := ParsePack(pack(t, readings...))
		if err != nil || !reflect.DeepEqual(again, readings) {
			t.Fatalf("%v became %v, %v", readings, again, err)
		}
		_, _ = decompress(b)
	})
}

func FuzzPeekCheckpoint(f *testing.F) {
	for _, name := range []string{"checkpoint.golden", "oldest.golden", "watermark.golden"} {
		f.Add(golden(f, name))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, signer, err := PeekCheckpoint(b)
		if err != nil {
			return
		}
		_, payload, _ := cose.Peek1(b)
		if !bytes.Equal(cose.MustMarshal(c), payload) || len(signer) != 32 || len(c.Head) != 32 {
			t.Fatalf("%+v by %x", c, signer)
		}
	})
}

func FuzzPeekStreamKey(f *testing.F) {
	f.Add(golden(f, "streamkey.golden"))
	to := testHPKEKey(f, p256(), 0x60)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := PeekStreamKey(b)
		if err == nil && (h.Subject == "" || h.Stream == "") {
			t.Fatalf("%+v", h)
		}
		if _, payload, err := cose.Peek1(b); err == nil {
			if m, _, err := parseKey(payload); err == nil {
				_, _ = m.Open(to, nil)
			}
		}
	})
}

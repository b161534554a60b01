package message

import (
	"bytes"
	"crypto/sha256"
	"testing"

	"pgregory.net/rapid"

	"edgekeep/internal/cose"
)

// The bodies of questions and answers whose bytes are in testdata.
func TestAskGolden(t *testing.T) {
	unsigned(t, "ask.golden", Ask{ID: count(1, 8), Kind: AskBlob, Body: cose.Raw{0xa0}})
	unsigned(t, "answer.golden", Answer{ID: count(1, 8), Error: "not here", Body: cose.Raw{0xf6}})
	unsigned(t, "askedrecords.golden", AskedRecords{Gateway: "gw7", Stream: "press-3", Epoch: count(2, 16), Seq: 4, Wait: 20000})
	unsigned(t, "records.golden", Records{Chunks: [][]byte{[]byte("chunk"), []byte("next")}})
	unsigned(t, "askedkey.golden", AskedKey{Gateway: "gw7", Stream: "press-3", Epoch: count(2, 16), Verdict: []byte("verdict")})
	unsigned(t, "release.golden", Release{Message: []byte("release"), EpochKey: []byte("key"), Verdict: []byte("verdict")})
	unsigned(t, "askedblob.golden", AskedBlob{ID: count(3, 32), Block: -1})
	unsigned(t, "blob.golden", Blob{Data: []byte("block")})
	unsigned(t, "putblob.golden", PutBlob{ID: count(3, 32), Block: 2, Data: []byte("block"), Instance: "press-watch"})
	unsigned(t, "have.golden", Have{Next: 3})
	unsigned(t, "reply.golden", Reply{ID: count(1, 8), Data: []byte("response")})
	unsigned(t, "signed.golden", Signed{Message: []byte("claim")})
}

func TestRoutedGolden(t *testing.T) {
	want, m := golden(t, "routed.golden"), Routed{Peer: "gw8", Data: []byte("sealed")}
	if got := Encode(m); !bytes.Equal(got, want) {
		t.Errorf("got %x", got)
	}
	if got, err := Decode[Routed](want); err != nil || got.Peer != m.Peer || !bytes.Equal(got.Data, m.Data) {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range want {
		if _, err := Decode[Routed](want[:i]); err == nil {
			t.Errorf("the first %d bytes are taken", i)
		}
	}
}

func TestBlob(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.OneOf(rapid.IntRange(1, 3*BlockSize), rapid.SampledFrom([]int{BlockSize - 1, BlockSize, BlockSize + 1, 2 * BlockSize})).Draw(t, "size")
		content := bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7}, size/7+1)[:size]
		list, err := BlobList(content)
		if err != nil {
			t.Fatal(err)
		}
		n, err := CheckList(BlobID(list), list)
		if err != nil || n != Blocks(size) {
			t.Fatalf("%d blocks, %v", n, err)
		}
		var all []byte
		for i := range n {
			block := Block(content, i)
			if err := CheckBlock(list, i, block); err != nil {
				t.Fatal(err)
			}
			bad := bytes.Clone(block)
			bad[rapid.IntRange(0, len(bad)-1).Draw(t, "where")] ^= 1
			if CheckBlock(list, i, bad) == nil || CheckBlock(list, i, block[:len(block)-1]) == nil {
				t.Fatalf("block %d is taken when it is another", i)
			}
			all = append(all, block...)
		}
		if !bytes.Equal(all, content) {
			t.Fatal("the blocks are not the content")
		}
		for _, i := range []int{-1, n} {
			if CheckBlock(list, i, content[:1]) == nil {
				t.Fatalf("block %d is taken", i)
			}
		}
	})
}

func TestBlobBounds(t *testing.T) {
	for _, size := range []int{0, MaxBlocks*BlockSize + 1} {
		if _, err := BlobList(make([]byte, size)); err == nil {
			t.Errorf("a blob of %d bytes", size)
		}
	}
	good := count(1, 64)
	for name, list := range map[string][]byte{
		"empty": {}, "cut off": good[:63], "another": count(2, 64), "too long": make([]byte, (MaxBlocks+1)*sha256.Size),
	} {
		id := BlobID(good)
		if name == "too long" || name == "cut off" || name == "empty" {
			id = BlobID(list)
		}
		if _, err := CheckList(id, list); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func FuzzDecodeAsk(f *testing.F) {
	f.Add(golden(f, "ask.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := Decode[Ask](b); err == nil && !bytes.Equal(Encode(m), b) {
			t.Fatalf("written as %x", Encode(m))
		}
	})
}

func FuzzDecodeRouted(f *testing.F) {
	f.Add(golden(f, "routed.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := Decode[Routed](b); err == nil && !bytes.Equal(Encode(m), b) {
			t.Fatalf("written as %x", Encode(m))
		}
	})
}

func FuzzDecodePutBlob(f *testing.F) {
	f.Add(golden(f, "putblob.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := Decode[PutBlob](b); err == nil && !bytes.Equal(Encode(m), b) {
			t.Fatalf("written as %x", Encode(m))
		}
	})
}

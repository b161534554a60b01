package agent

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

// shelf is a cloud that takes one blob.
type shelf struct {
	list   []byte
	blocks map[int][]byte
	sent   []int
	next   func(honest int) int // what it claims to miss; nil: the truth
}

func (s *shelf) answer(q message.Ask) any {
	var p message.PutBlob
	if err := cose.Unmarshal(q.Body, &p); err != nil || q.Kind != message.AskPut {
		panic(q.Kind)
	}
	s.sent = append(s.sent, p.Block)
	if p.Block == -1 {
		s.list = p.Data
	} else if message.CheckBlock(s.list, p.Block, p.Data) == nil {
		s.blocks[p.Block] = bytes.Clone(p.Data)
	}
	if !bytes.Equal(p.ID, message.BlobID(s.list)) {
		return nil
	}
	n := 0
	for s.blocks[n] != nil {
		n++
	}
	if s.next != nil {
		n = s.next(n)
	}
	return message.Have{Next: n}
}

func put(t testing.TB, u *uploads, data []byte, last bool) (any, error) {
	t.Helper()
	return u.put(t.Context(), tee.PutPart{Instance: "one", Data: data, Last: last})
}

func TestUpload(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := &shelf{blocks: map[int][]byte{}}
	a.cloud(t, s.answer)
	st := newStore()
	id, content := st.add(t, 1, 5*message.BlockSize+9)
	upload := func() {
		t.Helper()
		for at := 0; at < len(content); at += 100_000 {
			end := min(at+100_000, len(content))
			v, err := put(t, a.uploads, content[at:end], end == len(content))
			if err != nil {
				t.Fatal(err)
			}
			if done, ok := v.(tee.PutDone); ok != (end == len(content)) || ok && !bytes.Equal(done.ID, id) {
				t.Errorf("at %d: %v", at, v)
			}
		}
		if e := must(os.ReadDir(a.uploads.dir))(t); len(e) != 0 {
			t.Errorf("left behind: %v", e)
		}
		for i := range message.Blocks(len(content)) {
			if !bytes.Equal(s.blocks[i], message.Block(content, i)) {
				t.Errorf("block %d differs", i)
			}
		}
	}
	upload()
	if !slices.Equal(s.sent, []int{-1, 0, 1, 2, 3, 4, 5}) {
		t.Errorf("sent %v", s.sent)
	}
	// What the cloud has is not sent again; parts begun before do not count.
	delete(s.blocks, 2)
	delete(s.blocks, 4)
	s.sent = nil
	must(put(t, a.uploads, []byte("of a runner that was killed"), false))(t)
	must(put(t, a.uploads, nil, false))(t)
	upload()
	if !slices.Equal(s.sent, []int{-1, 2, 4}) {
		t.Errorf("sent %v", s.sent)
	}
	must(put(t, a.uploads, []byte("of a keep that was restarted"), false))(t)
	if err := a.uploads.reset(); err != nil {
		t.Fatal(err)
	}
	upload()
}

func TestUploadRefused(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := &shelf{blocks: map[int][]byte{}}
	a.cloud(t, s.answer)
	content := make([]byte, 2*message.BlockSize)
	for want, next := range map[string]func(int) int{
		"does not take block 0":   func(int) int { return 0 },
		"block -1 is missing":     func(int) int { return -1 },
		"block 3 is missing, of ": func(int) int { return 3 },
	} {
		s.next, s.blocks = next, map[int][]byte{}
		if _, err := put(t, a.uploads, content, true); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "instance one") {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := put(t, a.uploads, nil, true); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Error(err)
	}
	if _, err := a.uploads.put(t.Context(), tee.PutPart{Instance: "../x", Data: content}); err == nil {
		t.Error("a name that is none")
	}
	var err error
	n := 0
	for ; err == nil; n += 1 << 20 {
		_, err = put(t, a.uploads, make([]byte, 1<<20), false)
	}
	if n != maxBlob+1<<20 || !strings.Contains(err.Error(), "at most") {
		t.Errorf("%d bytes: %v", n, err)
	}
	if e := must(os.ReadDir(a.uploads.dir))(t); len(e) != 0 {
		t.Errorf("left behind: %v", e)
	}
}

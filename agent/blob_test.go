package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

// store is the cloud's blobs, and counts which blocks were asked for.
type store struct {
	mu    sync.Mutex
	lists map[string][]byte
	blobs map[string][]byte
	asked []int
	// change may change an answer, or break the connection with nil.
	change func(block int, data []byte) []byte
}

func newStore() *store { return &store{lists: map[string][]byte{}, blobs: map[string][]byte{}} }

func (s *store) add(t testing.TB, seed uint64, size int) (id, content []byte) {
	t.Helper()
	content = make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 0))
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	list := must(message.BlobList(content))(t)
	id = message.BlobID(list)
	s.lists[string(id)], s.blobs[string(id)] = list, content
	return id, content
}

func (s *store) answer(q message.Ask) any {
	var r message.AskedBlob
	if err := cose.Unmarshal(q.Body, &r); err != nil || q.Kind != message.AskBlob {
		panic(q.Kind)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, r.Block)
	data := s.lists[string(r.ID)]
	if r.Block >= 0 {
		data = message.Block(s.blobs[string(r.ID)], r.Block)
	}
	if s.change != nil {
		if data = s.change(r.Block, data); data == nil {
			return nil
		}
	}
	return message.Blob{Data: data}
}

// take is what was asked for since the last take.
func (s *store) take() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	slices.Sort(asked)
	return asked
}

func upTo(n int) (out []int) {
	for i := range n {
		out = append(out, i)
	}
	return out
}

func (b *blobs) all(t testing.TB, id []byte) []byte {
	t.Helper()
	var out []byte
	for {
		p := must(b.read(t.Context(), tee.ReadBlob{ID: id, Offset: int64(len(out))}))(t)
		if out = append(out, p.Data...); int64(len(out)) == p.Size {
			return out
		}
		if len(p.Data) == 0 || len(p.Data) > partSize {
			t.Fatalf("a part of %d bytes at %d of %d", len(p.Data), len(out), p.Size)
		}
	}
}

func TestBlob(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := newStore()
	a.cloud(t, s.answer)
	for i, size := range []int{1, message.BlockSize, message.BlockSize + 1, 20*message.BlockSize + 5} {
		id, content := s.add(t, uint64(i), size)
		if !bytes.Equal(a.blobs.all(t, id), content) {
			t.Errorf("%d bytes differ", size)
		}
		if got := s.take(); !slices.Equal(got, append([]int{-1}, upTo(message.Blocks(size))...)) {
			t.Errorf("%d bytes: asked for %v", size, got)
		}
		p := must(a.blobs.read(t.Context(), tee.ReadBlob{ID: id, Offset: int64(size)}))(t)
		if p.Size != int64(size) || len(p.Data) != 0 {
			t.Errorf("at the end: %+v", p)
		}
		if _, err := a.blobs.read(t.Context(), tee.ReadBlob{ID: id, Offset: int64(size) + 1}); err == nil {
			t.Error("read behind the end")
		}
		if got := s.take(); got != nil {
			t.Errorf("asked again for %v", got)
		}
	}
	if left := must(filepath.Glob(filepath.Join(a.blobs.dir, "*.*")))(t); left != nil {
		t.Errorf("left behind: %v", left)
	}
	for _, bad := range []tee.ReadBlob{{}, {ID: []byte("../../../../../../../../etc/passwd")}, {ID: make([]byte, 32), Offset: -1}} {
		if _, err := a.blobs.read(t.Context(), bad); err == nil {
			t.Errorf("%+v was read", bad)
		}
	}
}

// Many who want a blob have it fetched once.
func TestBlobTogether(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := newStore()
	id, content := s.add(t, 1, 30*message.BlockSize)
	a.cloud(t, s.answer)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if p, err := a.blobs.read(t.Context(), tee.ReadBlob{ID: id}); err != nil || !bytes.Equal(p.Data, content[:partSize]) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := s.take(); !slices.Equal(got, append([]int{-1}, upTo(30)...)) {
		t.Errorf("asked for %v", got)
	}
}

// A download that broke off, with the agent, goes on where it was: what is there
// and right is not asked for again.
func TestBlobResumes(t *testing.T) {
	const blocks = 40
	a := newAgent(t, 1<<20)
	s := newStore()
	id, content := s.add(t, 1, blocks*message.BlockSize-7)
	ctx, kill := context.WithCancel(t.Context())
	answered := 0
	s.change = func(_ int, data []byte) []byte {
		if answered++; answered > 20 {
			kill()
			return nil
		}
		return data
	}
	l := a.cloud(t, s.answer)
	if _, err := a.blobs.read(ctx, tee.ReadBlob{ID: id}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	l.cancel()
	first := s.take()
	if len(first) < 21 || len(first) > 20+parallel {
		t.Errorf("asked for %v", first)
	}
	// A write that was torn with the crash: one block of those that came is wrong.
	path := filepath.Join(a.blobs.dir, hex.EncodeToString(id)+".part")
	f := must(os.OpenFile(path, os.O_RDWR, 0))(t)
	must(f.WriteAt([]byte("torn"), 3*message.BlockSize+100))(t)
	f.Close()
	have := 0
	raw := must(os.ReadFile(path))(t)
	want := []int{}
	for i := range blocks {
		if at := i * message.BlockSize; at+message.BlockSize <= len(raw) && bytes.Equal(raw[at:at+message.BlockSize], message.Block(content, i)) {
			have++
		} else {
			want = append(want, i)
		}
	}
	if have < 10 || !slices.Contains(want, 3) {
		t.Fatalf("%d blocks are there", have)
	}

	b := assemble(a.cfg, discard) // as after a restart
	s.change = nil
	b.cloud(t, s.answer)
	if !bytes.Equal(b.blobs.all(t, id), content) {
		t.Error("the content differs")
	}
	if got := s.take(); !slices.Equal(got, want) {
		t.Errorf("asked for %v, missing were %v", got, want)
	}
	if _, fetched, _ := b.blobs.status(); fetched != len(want) {
		t.Errorf("%d were counted", fetched)
	}
}

// When the connection is lost the questions are asked on the next one, and no
// other blocks than those.
func TestBlobLinkLoss(t *testing.T) {
	const blocks = 40
	a := newAgent(t, 1<<20)
	s := newStore()
	id, content := s.add(t, 1, blocks*message.BlockSize)
	lost := make(chan struct{})
	answered := 0
	s.change = func(_ int, data []byte) []byte {
		if answered++; answered == 20 {
			close(lost)
		}
		if answered >= 20 {
			return nil
		}
		return data
	}
	l := a.cloud(t, s.answer)
	go func() {
		<-lost
		status, _, _ := a.blobs.status()
		if len(status) != 1 || status[0].Blocks != blocks || status[0].Have > 18 || status[0].Blob != hex.EncodeToString(id) {
			t.Errorf("%+v", status)
		}
		l.cancel()
		s.mu.Lock()
		s.change = nil
		s.mu.Unlock()
		a.cloud(t, s.answer)
	}()
	if !bytes.Equal(a.blobs.all(t, id), content) {
		t.Error("the content differs")
	}
	asked := s.take()
	if n := len(asked); n > 1+blocks+parallel {
		t.Errorf("asked for %v", asked)
	}
	if _, fetched, _ := a.blobs.status(); fetched != blocks {
		t.Errorf("%d were counted", fetched)
	}
}

// What is not the blob's is not stored. What is right after something wrong is.
func TestBlobPoisoned(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := newStore()
	id, content := s.add(t, 1, 5*message.BlockSize-1)
	other, _ := s.add(t, 2, 5*message.BlockSize)
	wrong := map[int]int{-1: wrongTimes}
	s.change = func(block int, data []byte) []byte {
		if wrong[block]--; wrong[block] >= 0 {
			switch wrong[block] % 3 {
			case 0:
				return append([]byte{data[0] ^ 1}, data[1:]...)
			case 1:
				return data[:len(data)-1]
			}
			return s.lists[string(other)]
		}
		return data
	}
	a.cloud(t, s.answer)
	refused := func() error {
		t.Helper()
		_, err := a.blobs.read(t.Context(), tee.ReadBlob{ID: id})
		if err == nil || !strings.Contains(err.Error(), "what the cloud sends is wrong, 3 times") {
			t.Errorf("%v", err)
		}
		return err
	}
	refused()
	s.mu.Lock()
	wrong = map[int]int{-1: wrongTimes - 1, 4: 100}
	s.mu.Unlock()
	refused()
	if _, err := os.Stat(filepath.Join(a.blobs.dir, hex.EncodeToString(id))); err == nil {
		t.Error("it is there")
	}
	s.mu.Lock()
	wrong = map[int]int{4: wrongTimes - 1}
	s.mu.Unlock()
	s.take()
	if !bytes.Equal(a.blobs.all(t, id), content) {
		t.Error("the content differs")
	}
	if got := s.take(); len(got)-len(slices.DeleteFunc(got, func(i int) bool { return i == 4 })) != wrongTimes {
		t.Errorf("asked for %v beside the last block", got)
	}
	if _, _, n := a.blobs.status(); n < 3*wrongTimes-2 {
		t.Errorf("%d were counted", n)
	}
}

// The cache is bounded: what was not used for longest goes, and nothing of what is
// being fetched.
func TestBlobBound(t *testing.T) {
	a := newAgent(t, 1<<20)
	a.blobs.maxBytes = 10 * message.BlockSize
	s := newStore()
	a.cloud(t, s.answer)
	var ids [][]byte
	long := time.Now().Add(-time.Hour)
	for i := range 4 {
		id, _ := s.add(t, uint64(i), 3*message.BlockSize)
		ids = append(ids, id)
	}
	for i, id := range ids[:3] {
		a.blobs.all(t, id)
		at := long.Add(time.Duration(i) * time.Second)
		if err := os.Chtimes(filepath.Join(a.blobs.dir, hex.EncodeToString(id)), at, at); err != nil {
			t.Fatal(err)
		}
	}
	a.blobs.all(t, ids[0]) // used: so the second is the oldest
	s.take()
	a.blobs.all(t, ids[3])
	s.take()
	for i, want := range []int{0, 4, 0, 0} {
		a.blobs.maxBytes = 100 * message.BlockSize
		a.blobs.all(t, ids[i])
		if got := len(s.take()); got != want {
			t.Errorf("blob %d: %d questions", i, got)
		}
	}
	a.blobs.maxBytes = 10 * message.BlockSize
	big, _ := s.add(t, 9, 11*message.BlockSize)
	if _, err := a.blobs.read(t.Context(), tee.ReadBlob{ID: big}); err == nil || !strings.Contains(err.Error(), "raise blobs.bytes") {
		t.Error(err)
	}
	// Two at a time that do not fit together: the second is refused, not the first harmed.
	one, content := s.add(t, 10, 6*message.BlockSize)
	two, _ := s.add(t, 11, 6*message.BlockSize)
	begun, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.change = func(block int, data []byte) []byte {
		if block == 0 {
			once.Do(func() {
				s.mu.Unlock()
				close(begun)
				<-goOn
				s.mu.Lock()
			})
		}
		return data
	}
	done := make(chan []byte)
	go func() { done <- a.blobs.all(t, one) }()
	<-begun
	if _, err := a.blobs.read(t.Context(), tee.ReadBlob{ID: two}); err == nil || !strings.Contains(err.Error(), "raise blobs.bytes") {
		t.Error(err)
	}
	close(goOn)
	if !bytes.Equal(<-done, content) {
		t.Error("the content differs")
	}
}

// Whatever a file holds, what is missing is found, and its end cannot hide.
func TestMissingBlocks(t *testing.T) {
	s := newStore()
	id, content := s.add(t, 1, 3*message.BlockSize-10)
	list := s.lists[string(id)]
	long := append(bytes.Clone(content), make([]byte, message.BlockSize)...)
	for _, tt := range []struct {
		name    string
		file    []byte
		missing []int
		size    int
	}{
		{"empty", nil, []int{0, 1, 2}, 0},
		{"whole", content, nil, len(content)},
		{"cut", content[:message.BlockSize+5], []int{1, 2}, message.BlockSize + 5},
		{"end cut", content[:len(content)-1], []int{2}, 2 * message.BlockSize},
		{"end too long", long, []int{2}, 2 * message.BlockSize},
		{"hole", append(make([]byte, message.BlockSize), content[message.BlockSize:]...), []int{0}, len(content)},
	} {
		path := filepath.Join(t.TempDir(), "part")
		if err := os.WriteFile(path, tt.file, 0o600); err != nil {
			t.Fatal(err)
		}
		f := must(os.OpenFile(path, os.O_RDWR, 0))(t)
		missing, err := missingBlocks(f, list)
		info := must(f.Stat())(t)
		if f.Close(); err != nil || !slices.Equal(missing, tt.missing) || info.Size() != int64(tt.size) {
			t.Errorf("%s: %v, %d bytes, %v", tt.name, missing, info.Size(), err)
		}
	}
}

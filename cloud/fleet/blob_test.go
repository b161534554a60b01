package fleet_test

import (
	"bytes"
	"crypto/rand"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// blob is random content, cut.
type blob struct {
	content, list, id []byte
	blocks            int
}

func newBlob(size int) blob {
	b := blob{content: make([]byte, size), blocks: message.Blocks(size)}
	rand.Read(b.content)
	b.list = must(message.BlobList(b.content))
	b.id = message.BlobID(b.list)
	return b
}

func (b blob) part(i int) message.PutBlob {
	p := message.PutBlob{ID: b.id, Block: i, Data: b.list}
	if i >= 0 {
		p.Data = message.Block(b.content, i)
	}
	return p
}

// put sends a block as a gateway.
func (g *gateway) put(p message.PutBlob) (int, string) {
	g.t.Helper()
	have, reason := ask[message.Have](g, message.AskPut, p)
	return have.Next, reason
}

// upload sends all of a blob as an instance's checkpoint.
func (g *gateway) upload(b blob, instance string) {
	g.t.Helper()
	p := b.part(-1)
	p.Instance = instance
	next, reason := g.put(p)
	for next < b.blocks && reason == "" {
		next, reason = g.put(b.part(next))
	}
	if reason != "" {
		g.t.Fatal(reason)
	}
}

// stored reads a blob back as another gateway does.
func (b blob) check(t testing.TB, g *gateway) {
	t.Helper()
	list, reason := ask[message.Blob](g, message.AskBlob, message.AskedBlob{ID: b.id, Block: -1})
	if reason != "" || !bytes.Equal(list.Data, b.list) {
		t.Fatalf("the list: %s", reason)
	}
	for i := range b.blocks {
		got, reason := ask[message.Blob](g, message.AskBlob, message.AskedBlob{ID: b.id, Block: i})
		if reason != "" || !bytes.Equal(got.Data, message.Block(b.content, i)) {
			t.Fatalf("block %d: %s", i, reason)
		}
	}
}

func blobsOf(t testing.TB, tenant string) map[string]fleet.BlobInfo {
	t.Helper()
	got := must(cloud.Ask[fleet.BlobNames](deadline(t), bus.NC, "api."+tenant+".blob.ls", fleet.None{}))
	out := map[string]fleet.BlobInfo{}
	for _, b := range got.Blobs {
		out[string(b.ID)] = b
	}
	return out
}

func TestBlobUpload(t *testing.T) {
	startFleet(t)
	g, reader := runner(t, "up1"), runner(t, "up2")
	b := newBlob(3*message.BlockSize + 17)
	if _, reason := g.put(b.part(0)); !strings.Contains(reason, "the list comes first") {
		t.Errorf("a block without a list: %q", reason)
	}
	for _, x := range []struct{ block, next int }{
		{-1, 0}, {2, 0}, {0, 1}, {0, 1}, {-1, 1}, {1, 3}, // in any order, again and again
	} {
		if next, reason := g.put(b.part(x.block)); reason != "" || next != x.next {
			t.Fatalf("after block %d: %d is next, want %d: %s", x.block, next, x.next, reason)
		}
	}
	if blobsOf(t, "acme")[string(b.id)].Done != 0 {
		t.Error("it counts as complete")
	}
	if next, reason := reader.put(b.part(3)); reason != "" || next != 4 { // anyone may go on with it
		t.Fatalf("%d is next: %s", next, reason)
	}
	if info := blobsOf(t, "acme")[string(b.id)]; info.Done == 0 || info.By != "up1" {
		t.Errorf("it is %+v", info)
	}
	b.check(t, reader)
	for i := -1; i < 4; i++ {
		if next, reason := g.put(b.part(i)); reason != "" || next != 4 {
			t.Errorf("block %d of what is complete: %d, %s", i, next, reason)
		}
	}
	other := enrolled(t, "globex", "up3")
	if _, reason := ask[message.Blob](other, message.AskBlob, message.AskedBlob{ID: b.id, Block: 0}); !strings.Contains(reason, "not here") {
		t.Errorf("another tenant reads it: %q", reason)
	}
}

func TestBlobPoison(t *testing.T) {
	startFleet(t)
	g := runner(t, "poison")
	b, other := newBlob(2*message.BlockSize), newBlob(2*message.BlockSize)
	for what, p := range map[string]message.PutBlob{
		"another blob's list": {ID: b.id, Block: -1, Data: other.list},
		"an empty list":       {ID: b.id, Block: -1},
		"half an id":          {ID: b.id[:16], Block: -1, Data: b.list},
		"no block":            {ID: b.id, Block: -2, Data: b.list},
	} {
		if _, reason := g.put(p); reason == "" {
			t.Errorf("%s: taken", what)
		}
	}
	if next, reason := g.put(b.part(-1)); next != 0 || reason != "" {
		t.Fatal(next, reason)
	}
	flipped := bytes.Clone(message.Block(b.content, 0))
	flipped[100] ^= 1
	for what, p := range map[string]message.PutBlob{
		"one bit":             {ID: b.id, Block: 0, Data: flipped},
		"another place":       {ID: b.id, Block: 1, Data: message.Block(b.content, 0)},
		"cut off":             {ID: b.id, Block: 0, Data: message.Block(b.content, 0)[:100]},
		"nothing":             {ID: b.id, Block: 0},
		"after the end":       {ID: b.id, Block: 2, Data: message.Block(b.content, 0)},
		"another blob's":      {ID: b.id, Block: 0, Data: message.Block(other.content, 0)},
		"a blob of its own":   {ID: other.id, Block: 0, Data: message.Block(other.content, 0)},
		"an instance of none": {ID: other.id, Block: -1, Data: other.list, Instance: "nobodys"},
		"a subject":           {ID: other.id, Block: -1, Data: other.list, Instance: "a.>"},
	} {
		if _, reason := g.put(p); reason == "" {
			t.Errorf("%s: taken", what)
		}
	}
	g.upload(b, "")
	b.check(t, g)
}

// An instance's newest three checkpoints are kept, wherever it ran; what an
// operator has stored is kept until the operator removes it.
func TestCheckpointsAreDropped(t *testing.T) {
	startFleet(t)
	a, b := runner(t, "chka"), runner(t, "chkb")
	manifest, inst, same := bundle(t, nil), instanceName(), instanceName()
	a.deploy(inst, manifest)
	a.deploy(same, manifest)
	var all []blob
	for range 5 {
		all = append(all, newBlob(100))
	}
	p := all[0].part(-1)
	p.Instance = inst
	if _, reason := b.put(p); !strings.Contains(reason, "does not hold") {
		t.Errorf("another's checkpoint: %q", reason)
	}
	elsewhere := newBlob(100)
	a.upload(elsewhere, same)
	for i, c := range all {
		if i == 3 { // it moves
			receive := b.mayRun(nil)
			e := workload.Entry{Instance: inst, Holder: "chkb", Bundle: workload.ID(manifest), Attempt: nonce(1)[:16], Head: nonce(2), Receive: receive}
			if _, reason := a.claimed(a.claim(1, e)); reason != "" {
				t.Fatal(reason)
			}
		}
		if i < 3 {
			a.upload(c, inst)
		} else {
			b.upload(c, inst)
		}
	}
	have := blobsOf(t, "acme")
	for i, c := range all {
		if _, ok := have[string(c.id)]; ok != (i >= 2) {
			t.Errorf("checkpoint %d is there: %v", i, ok)
		}
	}
	for _, c := range append(all[2:], elsewhere) {
		c.check(t, b)
	}
	if n := len(stored(t, bus.Blob, "blob.acme."+hexID(all[0].id)+".*")); n != 0 {
		t.Errorf("%d blocks of a dropped checkpoint are left", n)
	}
	// An operator makes one its own: nothing drops it.
	if _, err := api[message.Have](t, "blob.put", all[2].part(-1)); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		b.upload(newBlob(100), inst)
	}
	all[2].check(t, b)
	// Content of an instance is not removed under it.
	content := must(workload.PeekManifest(manifest)).Content
	drop := func(id []byte) error {
		_, err := api[fleet.None](t, "blob.rm", fleet.BlobName{ID: id})
		return err
	}
	if err := drop(content); err == nil || !strings.Contains(err.Error(), "is made of it") {
		t.Errorf("removed under an instance: %v", err)
	}
	if err := drop(all[2].id); err != nil {
		t.Error(err)
	}
	if drop(all[2].id) == nil || drop([]byte("*")) == nil {
		t.Error("removed what is not there")
	}
	a.upload(all[2], same) // and it may come again
	all[2].check(t, b)
}

func hexID(id []byte) string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, b := range id {
		s.WriteByte(digits[b>>4])
		s.WriteByte(digits[b&15])
	}
	return s.String()
}

func TestBlobQuotas(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "globex", "quota")
	for _, b := range blobsOf(t, "globex") {
		if err := bus.Blobs.Purge(deadline(t), "globex."+hexID(b.ID)); err != nil {
			t.Fatal(err)
		}
	}
	var uploads []blob
	for range 17 {
		uploads = append(uploads, newBlob(10))
	}
	for _, b := range uploads[:16] {
		if _, reason := g.put(b.part(-1)); reason != "" {
			t.Fatal(reason)
		}
	}
	if _, reason := g.put(uploads[16].part(-1)); !strings.Contains(reason, "16 uploads") {
		t.Errorf("an upload too many: %q", reason)
	}
	if _, reason := g.put(uploads[3].part(0)); reason != "" { // one ends, another may begin
		t.Fatal(reason)
	}
	if _, reason := g.put(uploads[16].part(-1)); reason != "" {
		t.Error(reason)
	}
	// A day later they are gone, but for what is complete.
	f.Now = func() time.Time { return time.Now().Add(25 * time.Hour) }
	late := newBlob(10)
	v := g.verdict()
	v.Expires += 100_000
	g.setVerdict(v)
	if _, reason := g.put(late.part(-1)); reason != "" {
		t.Fatal(reason)
	}
	if have := blobsOf(t, "globex"); len(have) != 2 || have[string(uploads[3].id)].Done == 0 {
		t.Errorf("%d blobs are left", len(have))
	}
	f.BlobBytes = 3 * 98304
	big := newBlob(2 * message.BlockSize)
	for _, ask := range []func() string{
		func() string { _, reason := g.put(big.part(-1)); return reason },
		func() string {
			_, err := cloud.Ask[message.Have](deadline(t), bus.NC, "api.globex.blob.put", big.part(-1))
			if err == nil {
				return ""
			}
			return err.Error()
		},
	} {
		if reason := ask(); !strings.Contains(reason, "no room") {
			t.Errorf("more than a tenant may have: %q", reason)
		}
	}
}

// Whatever part comes when, in whatever order and by whomever, a blob is complete
// exactly when every block of it came, and is then what it was.
func TestBlobModel(t *testing.T) {
	startFleet(t)
	startFleet(t)
	gs := []*gateway{runner(t, "blobm1"), runner(t, "blobm2")}
	rapid.Check(t, func(rt *rapid.T) {
		b := newBlob(rapid.IntRange(1, 4).Draw(rt, "blocks")*message.BlockSize - rapid.IntRange(0, 9).Draw(rt, "less"))
		defer func() { _, _ = api[fleet.None](t, "blob.rm", fleet.BlobName{ID: b.id}) }() // if it began
		began, came := false, make([]bool, b.blocks)
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			g, i := rapid.SampledFrom(gs).Draw(rt, "who"), rapid.IntRange(-1, b.blocks-1).Draw(rt, "block")
			p := b.part(i)
			spoiled := rapid.IntRange(0, 4).Draw(rt, "spoil") == 0
			if spoiled {
				p.Data = bytes.Clone(p.Data)
				p.Data[rapid.IntRange(0, len(p.Data)-1).Draw(rt, "where")] ^= 1
			}
			next, reason := g.put(p)
			missing := 0
			if !spoiled && (i < 0 || began) {
				began = true
				if i >= 0 {
					came[i] = true
				}
			}
			for missing < b.blocks && came[missing] {
				missing++
			}
			complete := missing == b.blocks
			if refused := spoiled && (!complete || i < 0) || i >= 0 && !began; refused != (reason != "") {
				rt.Fatalf("block %d, spoiled %v: %q", i, spoiled, reason)
			}
			if reason == "" && next != missing {
				rt.Fatalf("%d is next, want %d", next, missing)
			}
			if info := blobsOf(t, "acme")[string(b.id)]; (info.Done != 0) != complete {
				rt.Fatalf("complete: %v, %d of %d came", info.Done != 0, missing, b.blocks)
			}
			if complete {
				b.check(t, gs[0])
			}
		}
	})
}

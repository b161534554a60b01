package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/internal/cose"
	"edgekeep/internal/durable"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

const (
	partSize   = 512 << 10 // bytes of a blob in one answer
	parallel   = 8         // blocks asked for at a time
	wrongTimes = 3         // that a block may come wrong
)

// blobs is a bounded cache of what the cloud holds under its own hash: HEX is a
// whole blob, every block of which was checked; HEX.part and HEX.list are a
// download that goes on where it broke off, whatever broke it.
type blobs struct {
	dir      string
	maxBytes int64
	ask      asker

	mu      sync.Mutex // protects what follows, and what is removed from dir
	active  map[string]*download
	fetched int // blocks asked for
	refused int // lists and blocks that were not the blob's
}

// download is one under way.
type download struct {
	done chan struct{} // closed once err is set
	err  error

	have, blocks int   // protected by mu of blobs
	reserved     int64 // bytes, too
}

func (b *blobs) open() error {
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return fmt.Errorf("making the directory of the blobs: %w", err)
	}
	return nil
}

// read implements tee.JobBlob.
func (b *blobs) read(ctx context.Context, r tee.ReadBlob) (part tee.BlobPart, err error) {
	if len(r.ID) != sha256.Size || r.Offset < 0 {
		return part, errors.New("malformed request for a blob")
	}
	path := filepath.Join(b.dir, hex.EncodeToString(r.ID))
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		if err = b.fetch(ctx, r.ID); err == nil {
			f, err = os.Open(path)
		}
	}
	if err != nil {
		return part, fmt.Errorf("blob %x: %w", r.ID, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return part, fmt.Errorf("blob %x: %w", r.ID, err)
	}
	if part.Size = info.Size(); r.Offset > part.Size {
		return part, fmt.Errorf("blob %x has %d bytes: none at %d", r.ID, part.Size, r.Offset)
	}
	part.Data = make([]byte, min(partSize, part.Size-r.Offset))
	if _, err := f.ReadAt(part.Data, r.Offset); err != nil && !errors.Is(err, io.EOF) {
		return part, fmt.Errorf("blob %x: %w", r.ID, err)
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // of its use: it is only about what is removed first
	return part, nil
}

// fetch downloads a blob, once however many want it.
func (b *blobs) fetch(ctx context.Context, id []byte) error {
	name := hex.EncodeToString(id)
	b.mu.Lock()
	d, ok := b.active[name]
	if !ok {
		d = &download{done: make(chan struct{})}
		b.active[name] = d
	}
	b.mu.Unlock()
	if ok {
		select {
		case <-d.done:
			return d.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	d.err = b.download(ctx, id, d)
	b.mu.Lock()
	delete(b.active, name)
	b.mu.Unlock()
	close(d.done)
	return d.err
}

// download asks for what is missing of a blob.
//
//	pwrite(HEX.part) for each block; fsync
//	renameat(HEX.part, HEX); unlinkat(HEX.list); fsync(dir)
func (b *blobs) download(ctx context.Context, id []byte, d *download) error {
	path := filepath.Join(b.dir, hex.EncodeToString(id))
	list, err := b.list(ctx, id, path+".list")
	if err != nil {
		return err
	}
	n := len(list) / sha256.Size
	if err := b.reserve(d, int64(n)*message.BlockSize); err != nil {
		return err
	}
	f, err := os.OpenFile(path+".part", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	missing, err := missingBlocks(f, list)
	if err != nil {
		return err
	}
	b.note(func() { d.blocks, d.have = n, n-len(missing) })
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, i := range missing {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			block, err := b.block(gctx, id, list, i)
			if err != nil {
				return err
			}
			if _, err := f.WriteAt(block, int64(i)*message.BlockSize); err != nil {
				return err
			}
			b.note(func() { d.have++ })
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := errors.Join(ctx.Err(), f.Sync()); err != nil {
		return err
	}
	if err := os.Rename(path+".part", path); err != nil {
		return err
	}
	return errors.Join(os.Remove(path+".list"), syncPath(b.dir))
}

func (b *blobs) note(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
}

// list returns the hashes of a blob's blocks, from an earlier download or from the
// cloud.
func (b *blobs) list(ctx context.Context, id []byte, path string) ([]byte, error) {
	if list, err := os.ReadFile(path); err == nil {
		if _, err := message.CheckList(id, list); err == nil {
			return list, nil
		}
	}
	list, err := b.right(ctx, message.AskedBlob{ID: id, Block: -1}, func(list []byte) error {
		_, err := message.CheckList(id, list)
		return err
	})
	if err != nil {
		return nil, err
	}
	return list, durable.WriteFile(path, list, 0o600)
}

func (b *blobs) block(ctx context.Context, id, list []byte, i int) ([]byte, error) {
	b.note(func() { b.fetched++ })
	return b.right(ctx, message.AskedBlob{ID: id, Block: i}, func(block []byte) error { return message.CheckBlock(list, i, block) })
}

// right asks until what comes passes the check: answers are not signed, and one
// that is not the cloud's may come first.
func (b *blobs) right(ctx context.Context, what message.AskedBlob, check func([]byte) error) ([]byte, error) {
	var wrong error
	for range wrongTimes {
		raw, err := b.ask(ctx, message.AskBlob, cose.MustMarshal(what))
		if err != nil {
			return nil, err
		}
		var m message.Blob
		if wrong = cose.Unmarshal(raw, &m); wrong == nil {
			wrong = check(m.Data)
		}
		if wrong == nil {
			return m.Data, nil
		}
		b.note(func() { b.refused++ })
	}
	return nil, fmt.Errorf("what the cloud sends is wrong, %d times: %w", wrongTimes, wrong)
}

// missingBlocks says which blocks of a blob are not in a file. Nothing is taken on
// trust: what was written before a crash may be there in part.
func missingBlocks(f *os.File, list []byte) (missing []int, err error) {
	n := len(list) / sha256.Size
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	buf := make([]byte, message.BlockSize)
	for i := range n {
		at := int64(i) * message.BlockSize
		block := buf[:max(0, min(message.BlockSize, info.Size()-at))]
		if _, err := f.ReadAt(block, at); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if message.CheckBlock(list, i, block) != nil {
			missing = append(missing, i)
		}
	}
	end := int64(n) * message.BlockSize
	if len(missing) > 0 && missing[len(missing)-1] == n-1 { // its length is not known: none of it may stay
		end -= message.BlockSize
	}
	if info.Size() > end {
		err = f.Truncate(end)
	}
	return missing, err
}

// reserve makes room for a download: what was not used for longest goes first.
func (b *blobs) reserve(d *download, size int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return err
	}
	total := size
	for _, o := range b.active {
		total += o.reserved
	}
	var idle []os.FileInfo
	for _, e := range entries {
		stem, _, _ := strings.Cut(e.Name(), ".")
		info, err := e.Info()
		if b.active[stem] != nil || err != nil {
			continue
		}
		idle = append(idle, info)
		total += info.Size()
	}
	slices.SortFunc(idle, func(a, b os.FileInfo) int {
		return cmp.Or(a.ModTime().Compare(b.ModTime()), strings.Compare(a.Name(), b.Name()))
	})
	for _, info := range idle {
		if total <= b.maxBytes {
			break
		}
		if err := os.Remove(filepath.Join(b.dir, info.Name())); err != nil {
			return err
		}
		total -= info.Size()
	}
	if total > b.maxBytes {
		return fmt.Errorf("it has up to %d bytes, and with what else is being fetched that is more than %d: raise blobs.bytes in agent.toml", size, b.maxBytes)
	}
	d.reserved = size
	return nil
}

func (b *blobs) status() (downloads []Download, fetched, refused int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := []Download{}
	for name, d := range b.active {
		out = append(out, Download{Blob: name, Have: d.have, Blocks: d.blocks})
	}
	slices.SortFunc(out, func(a, b Download) int { return strings.Compare(a.Blob, b.Blob) })
	return out, b.fetched, b.refused
}

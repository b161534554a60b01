package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

const maxBlob = message.MaxBlocks * message.BlockSize

// uploads are checkpoints on their way to the cloud, in INSTANCE.part until the
// last part is there. They do not outlive what sends them: it sends all again, and
// the cloud then says which blocks it has.
type uploads struct {
	dir string
	ask asker
}

// reset forgets what was begun.
func (u *uploads) reset() error {
	err := os.RemoveAll(u.dir)
	if err == nil {
		err = os.Mkdir(u.dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("making the directory of uploads: %w", err)
	}
	return nil
}

// put implements tee.JobPut. A part without data that is not the last begins anew.
// The answer to the last one comes when the cloud has the blob; with an answer that
// is an error, all parts are forgotten.
func (u *uploads) put(ctx context.Context, r tee.PutPart) (any, error) {
	if !validInstance(r.Instance) {
		return nil, errName(r.Instance)
	}
	path := filepath.Join(u.dir, r.Instance+".part")
	if len(r.Data) == 0 && !r.Last {
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		return nil, nil
	}
	done, err := u.collect(ctx, path, r)
	if err != nil || r.Last {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return nil, fmt.Errorf("a checkpoint of instance %s: %w", r.Instance, err)
	}
	if !r.Last {
		return nil, nil
	}
	return done, nil
}

func (u *uploads) collect(ctx context.Context, path string, r tee.PutPart) (done tee.PutDone, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return done, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return done, err
	}
	if size += int64(len(r.Data)); size > maxBlob {
		return done, fmt.Errorf("it has %d bytes or more, at most %d", size, maxBlob)
	}
	if _, err := f.Write(r.Data); err != nil || !r.Last {
		return done, err
	}
	return u.send(ctx, r.Instance, f, size)
}

// send brings the cloud a blob: the list, then what it says it does not have.
func (u *uploads) send(ctx context.Context, instance string, f io.ReaderAt, size int64) (done tee.PutDone, err error) {
	if size == 0 {
		return done, errors.New("it is empty")
	}
	buf := make([]byte, message.BlockSize)
	block := func(i int) ([]byte, error) {
		at := int64(i) * message.BlockSize
		b := buf[:min(message.BlockSize, size-at)]
		_, err := io.ReadFull(io.NewSectionReader(f, at, int64(len(b))), b)
		return b, err
	}
	var list []byte
	for i := range message.Blocks(int(size)) {
		b, err := block(i)
		if err != nil {
			return done, err
		}
		sum := sha256.Sum256(b)
		list = append(list, sum[:]...)
	}
	done.ID = message.BlobID(list)
	n := len(list) / sha256.Size
	next, err := u.ship(ctx, message.PutBlob{ID: done.ID, Block: -1, Data: list, Instance: instance}, n)
	for err == nil && next < n {
		at := next
		var b []byte
		if b, err = block(at); err != nil {
			break
		}
		if next, err = u.ship(ctx, message.PutBlob{ID: done.ID, Block: at, Data: b}, n); err == nil && next <= at {
			err = fmt.Errorf("the cloud does not take block %d of blob %x", at, done.ID)
		}
	}
	return done, err
}

// ship sends one block, or the list, and returns which block is missing next.
func (u *uploads) ship(ctx context.Context, p message.PutBlob, n int) (next int, err error) {
	raw, err := u.ask(ctx, message.AskPut, cose.MustMarshal(p))
	if err != nil {
		return 0, err
	}
	var have message.Have
	if err := cose.Unmarshal(raw, &have); err != nil {
		return 0, fmt.Errorf("the cloud's answer: %w", err)
	}
	if have.Next < 0 || have.Next > n {
		return 0, fmt.Errorf("the cloud's answer: block %d is missing, of %d", have.Next, n)
	}
	return have.Next, nil
}

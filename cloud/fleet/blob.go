package fleet

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"edgekeep/cloud"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// BlobInfo is an entry of the bucket "blobs", by "tenant.id": an upload, or a
// blob that is complete. The blocks are in the stream BLOB, each under a subject
// of its own, "list" being their hashes; none is stored before it was checked
// against the list, and none is ever replaced.
type BlobInfo struct {
	ID     []byte `cbor:"1,keyasint"`
	Blocks int    `cbor:"2,keyasint"`
	By     string `cbor:"3,keyasint"` // gateway; empty: an operator, who alone removes it
	// Instance is whose checkpoint it is, if a gateway said so.
	Instance string `cbor:"4,keyasint"`
	Began    int64  `cbor:"5,keyasint"` // ns since the Unix epoch
	Done     int64  `cbor:"6,keyasint"` // 0: blocks are missing
	Removing bool   `cbor:"7,keyasint"`
}

const (
	blobBytes   = 16 << 30       // for each tenant
	maxUploads  = 16             // of a gateway that are not complete
	uploadLife  = 24 * time.Hour // of one that is not complete
	keptOfEach  = 3              // checkpoints of an instance
	blobList    = -1             // block number of the list
	maxBlobList = 10_000         // blobs of a tenant
)

func blobKey(tenant string, id []byte) string { return tenant + "." + hex.EncodeToString(id) }

func blobSubject(tenant string, id []byte, block int) string {
	name := "list"
	if block != blobList {
		name = strconv.Itoa(block)
	}
	return "blob." + blobKey(tenant, id) + "." + name
}

// size is what a blob may take up.
func (b BlobInfo) size() int64 { return int64(b.Blocks) * (message.BlockSize + sha256.Size) }

// family are the checkpoints of which only the newest are kept.
func (b BlobInfo) family(of BlobInfo) bool {
	if b.By == "" || of.By == "" || b.Instance != of.Instance {
		return false
	}
	return b.Instance != "" || b.By == of.By
}

// blob returns a block or the list.
func (f *Fleet) blob(ctx context.Context, tenant string, r message.AskedBlob) (message.Blob, error) {
	if len(r.ID) != sha256.Size || r.Block < blobList || r.Block >= message.MaxBlocks {
		return message.Blob{}, errors.New("which blob? an id of 32 bytes and a block are needed")
	}
	m, err := f.Bus.Blob.GetLastMsgForSubject(ctx, blobSubject(tenant, r.ID, r.Block))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return message.Blob{}, fmt.Errorf("block %d of blob %x is not here", r.Block, r.ID)
	}
	if err != nil {
		return message.Blob{}, fmt.Errorf("reading a blob: %w", err)
	}
	return message.Blob{Data: m.Data}, nil
}

// put takes a block, or the list with which an upload begins or goes on.
// Blocks may come in any order and any number of times. by is the gateway that
// sends it, or empty for an operator.
func (f *Fleet) put(ctx context.Context, tenant, by string, r message.PutBlob) (message.Have, error) {
	if len(r.ID) != sha256.Size {
		return message.Have{}, errors.New("a blob's id has 32 bytes")
	}
	if r.Block == blobList {
		return f.beginBlob(ctx, tenant, by, r)
	}
	b, _, found, err := cloud.Get[BlobInfo](ctx, f.Bus.Blobs, blobKey(tenant, r.ID))
	if err != nil {
		return message.Have{}, err
	}
	if !found || b.Removing {
		return message.Have{}, errors.New("no such upload has begun: the list comes first, as block -1")
	}
	if b.Done != 0 {
		return message.Have{Next: b.Blocks}, nil
	}
	list, err := f.blob(ctx, tenant, message.AskedBlob{ID: r.ID, Block: blobList})
	if err != nil {
		return message.Have{}, err
	}
	if err := message.CheckBlock(list.Data, r.Block, r.Data); err != nil {
		return message.Have{}, err
	}
	if err := f.storeBlock(ctx, tenant, r.ID, r.Block, r.Data); err != nil {
		return message.Have{}, err
	}
	return f.haveBlob(ctx, tenant, b)
}

// storeBlock stores a block that was checked. One that is there is the same.
func (f *Fleet) storeBlock(ctx context.Context, tenant string, id []byte, block int, data []byte) error {
	_, err := f.Bus.JS.PublishMsg(ctx, &nats.Msg{Subject: blobSubject(tenant, id, block), Data: data},
		jetstream.WithExpectLastSequencePerSubject(0), jetstream.WithExpectStream("BLOB"))
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		return nil
	}
	if err != nil {
		return fmt.Errorf("storing a block: %w", err)
	}
	return nil
}

// haveBlob says which block is the first that is missing, and ends the upload
// when none is.
func (f *Fleet) haveBlob(ctx context.Context, tenant string, b BlobInfo) (message.Have, error) {
	prefix := "blob." + blobKey(tenant, b.ID) + "."
	info, err := f.Bus.Blob.Info(ctx, jetstream.WithSubjectFilter(prefix+"*"))
	if err != nil {
		return message.Have{}, fmt.Errorf("looking for a blob's blocks: %w", err)
	}
	next := 0
	for next < b.Blocks && info.State.Subjects[prefix+strconv.Itoa(next)] > 0 {
		next++
	}
	if next < b.Blocks {
		return message.Have{Next: next}, nil
	}
	b, err = cloud.Change(ctx, f.Bus.Blobs, blobKey(tenant, b.ID), func(b *BlobInfo, found bool) error {
		if !found || b.Removing {
			return errors.New("the upload was removed")
		}
		if b.Done == 0 {
			b.Done = f.Now().UnixNano()
		}
		return nil
	})
	if err == nil && b.By != "" {
		err = f.dropOldCheckpoints(ctx, tenant, b)
	}
	return message.Have{Next: next}, err
}

// beginBlob begins an upload, or goes on with one.
func (f *Fleet) beginBlob(ctx context.Context, tenant, by string, r message.PutBlob) (message.Have, error) {
	blocks, err := message.CheckList(r.ID, r.Data)
	if err != nil {
		return message.Have{}, err
	}
	if by != "" && r.Instance != "" {
		if err := f.holds(ctx, tenant, by, r.Instance); err != nil {
			return message.Have{}, err
		}
	}
	now := BlobInfo{ID: r.ID, Blocks: blocks, By: by, Began: f.Now().UnixNano()}
	if by != "" {
		now.Instance = r.Instance
	}
	f.uploads.Lock() // quotas are counted; a second replica may count at the same time, and so exceed them by one blob
	defer f.uploads.Unlock()
	b, revision, found, err := cloud.Get[BlobInfo](ctx, f.Bus.Blobs, blobKey(tenant, r.ID))
	switch {
	case err != nil:
		return message.Have{}, err
	case found && b.Removing:
		return message.Have{}, errors.Join(errors.New("the blob is being removed: try again"), f.removeBlob(ctx, tenant, b))
	case found && by == "" && b.By != "": // an operator's from now on
		b.By, b.Instance = "", ""
		err = cloud.Put(ctx, f.Bus.Blobs, blobKey(tenant, r.ID), b, revision)
	case !found:
		if err = f.room(ctx, tenant, now); err == nil {
			b, err = now, cloud.Put(ctx, f.Bus.Blobs, blobKey(tenant, r.ID), now, 0)
		}
	}
	if err != nil {
		return message.Have{}, err
	}
	if b.Done != 0 {
		return message.Have{Next: b.Blocks}, nil
	}
	if err := f.storeBlock(ctx, tenant, r.ID, blobList, r.Data); err != nil {
		return message.Have{}, err
	}
	return f.haveBlob(ctx, tenant, b)
}

// room says whether there is room for another upload, after removing what has
// expired and what it takes the place of.
func (f *Fleet) room(ctx context.Context, tenant string, b BlobInfo) error {
	all, err := f.blobsOf(ctx, tenant)
	if err != nil {
		return err
	}
	limit := f.BlobBytes
	if limit == 0 {
		limit = blobBytes
	}
	expired := f.Now().Add(-uploadLife).UnixNano()
	total, count, open := b.size(), 1, 1
	for _, o := range all {
		superseded := b.Instance != "" && o.By == b.By && o.Instance == b.Instance
		if o.Removing || o.Done == 0 && (o.Began < expired || superseded) {
			if err := f.removeBlob(ctx, tenant, o); err != nil {
				return err
			}
			continue
		}
		total, count = total+o.size(), count+1
		if o.Done == 0 && o.By == b.By {
			open++
		}
	}
	switch {
	case total > limit || count > maxBlobList:
		return fmt.Errorf("there is no room for %d bytes more: the blobs of %s may have %d bytes; remove bundles that are not needed", b.size(), tenant, limit)
	case b.By != "" && open > maxUploads:
		return fmt.Errorf("%s has %d uploads that are not complete: go on with one of them", b.By, maxUploads)
	}
	return nil
}

func (f *Fleet) blobsOf(ctx context.Context, tenant string) ([]BlobInfo, error) {
	var out []BlobInfo
	err := cloud.All(ctx, f.Bus.Blobs, tenant+".*", func(_ string, b BlobInfo, _ uint64) { out = append(out, b) })
	return out, err
}

// dropOldCheckpoints keeps the newest checkpoints of b's instance.
func (f *Fleet) dropOldCheckpoints(ctx context.Context, tenant string, b BlobInfo) error {
	all, err := f.blobsOf(ctx, tenant)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(o BlobInfo) bool { return o.Done == 0 || !o.family(b) })
	slices.SortFunc(all, func(x, y BlobInfo) int {
		switch { // the one just completed is the newest, whatever the clock says
		case string(x.ID) == string(b.ID):
			return -1
		case string(y.ID) == string(b.ID):
			return 1
		case x.Done != y.Done:
			return int(y.Done - x.Done)
		}
		return int(y.Began - x.Began)
	})
	for _, o := range all[min(len(all), keptOfEach):] {
		if err := f.removeBlob(ctx, tenant, o); err != nil {
			return err
		}
	}
	return nil
}

// removeBlob removes a blob: marked first, so that it is not taken for complete
// while blocks go, and that what was begun is ended.
func (f *Fleet) removeBlob(ctx context.Context, tenant string, b BlobInfo) error {
	key := blobKey(tenant, b.ID)
	gone := errors.New("gone")
	_, err := cloud.Change(ctx, f.Bus.Blobs, key, func(b *BlobInfo, found bool) error {
		if !found {
			return gone
		}
		b.Removing = true
		return nil
	})
	if errors.Is(err, gone) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := f.Bus.Blob.Purge(ctx, jetstream.WithPurgeSubject("blob."+key+".*")); err != nil {
		return fmt.Errorf("removing a blob: %w", err)
	}
	if err := f.Bus.Blobs.Purge(ctx, key); err != nil {
		return fmt.Errorf("removing a blob: %w", err)
	}
	return nil
}

// BlobName names a blob.
type BlobName struct {
	ID []byte `cbor:"1,keyasint"`
}

// BlobNames answers api.*.blob.ls.
type BlobNames struct {
	Blobs []BlobInfo `cbor:"1,keyasint"`
}

func (f *Fleet) putByOperator(ctx context.Context, subject string, r message.PutBlob) (message.Have, error) {
	return f.put(ctx, tenantOf(subject), "", r)
}

func (f *Fleet) getBlob(ctx context.Context, subject string, r message.AskedBlob) (message.Blob, error) {
	return f.blob(ctx, tenantOf(subject), r)
}

// listBlobs returns the newest blobs, at most 5000.
func (f *Fleet) listBlobs(ctx context.Context, subject string, _ None) (BlobNames, error) {
	all, err := f.blobsOf(ctx, tenantOf(subject))
	slices.SortFunc(all, func(a, b BlobInfo) int { return int(b.Began - a.Began) })
	return BlobNames{Blobs: all[:min(len(all), 5000)]}, err
}

// dropBlob removes a blob that no instance may need.
func (f *Fleet) dropBlob(ctx context.Context, subject string, r BlobName) (None, error) {
	tenant, user := tenantOf(subject), ""
	if len(r.ID) != sha256.Size {
		return None{}, errors.New("a blob's id has 32 bytes")
	}
	err := cloud.All(ctx, f.Bus.Ledger, tenant+".*", func(key string, rec Record, _ uint64) {
		if m, err := workload.PeekManifest(rec.Manifest); err == nil && rec.Entry.Holder != "" && string(m.Content) == string(r.ID) {
			user = strings.TrimPrefix(key, tenant+".")
		}
	})
	if err != nil {
		return None{}, err
	}
	if user != "" {
		return None{}, fmt.Errorf("instance %s is made of it: stop it first", user)
	}
	b, _, found, err := cloud.Get[BlobInfo](ctx, f.Bus.Blobs, blobKey(tenant, r.ID))
	if err != nil || !found {
		return None{}, errors.Join(err, fmt.Errorf("there is no blob %x", r.ID))
	}
	return None{}, f.removeBlob(ctx, tenant, b)
}

// complete says whether all of a blob is here.
func (f *Fleet) complete(ctx context.Context, tenant string, id []byte) error {
	b, _, found, err := cloud.Get[BlobInfo](ctx, f.Bus.Blobs, blobKey(tenant, id))
	if err == nil && (!found || b.Removing || b.Done == 0) {
		err = fmt.Errorf("blob %x is not here, or not complete", id)
	}
	return err
}

// holds says whether a gateway may run an instance, by the ledger.
func (f *Fleet) holds(ctx context.Context, tenant, gateway, instance string) error {
	if !workload.ValidInstance(instance) || !attest.ValidName(gateway) {
		return fmt.Errorf("not an instance's name: %.64q", instance)
	}
	rec, _, found, err := cloud.Get[Record](ctx, f.Bus.Ledger, cloud.Key(tenant, instance))
	if err == nil && (!found || rec.Entry.Holder != gateway) {
		err = fmt.Errorf("%s does not hold instance %s", gateway, instance)
	}
	return err
}

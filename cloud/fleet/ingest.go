package fleet

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"edgekeep/cloud"
	"edgekeep/cloud/keybroker"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
)

// ingest takes chunks in. A chunk is stored when an affirming verdict vouches
// for the key that signed its checkpoint and when it is what comes next in its
// stream; then, and not before, its watermark is signed. What is authentic but
// fits nowhere is kept aside, with a finding; what is not authentic is counted
// and forgotten, so that garbage displaces nothing.
type ingest struct {
	*Fleet
	work []chan *nats.Msg

	mu       sync.Mutex // protects what follows
	verdicts map[string]vouched
}

// vouched are the keys that a gateway's newest verdict vouches for.
type vouched struct {
	verdict []byte
	keys    map[string]*ecdsa.PublicKey // by key id
	read    time.Time
}

const (
	workers     = 4
	queueLength = 256
	verdictAge  = 2 * time.Second // how long a verdict is used without looking for a newer one
)

func (f *Fleet) runIngest(ctx context.Context) error {
	in := &ingest{Fleet: f, verdicts: map[string]vouched{}}
	var wg sync.WaitGroup
	for range workers {
		c := make(chan *nats.Msg, queueLength)
		in.work = append(in.work, c)
		wg.Go(func() { in.worker(ctx, c) })
	}
	for _, kind := range []string{"sealed", "hello"} {
		sub, err := f.Bus.NC.QueueSubscribe("ek1.*.*.up."+kind, "fleet", in.receive)
		if err != nil {
			return fmt.Errorf("subscribing to sealed data: %w", err)
		}
		defer func() { _ = sub.Unsubscribe() }()
	}
	<-ctx.Done()
	wg.Wait()
	return ctx.Err()
}

// receive hands a message to its gateway's worker. When that is full the message
// is dropped: the gateway sends it again.
func (in *ingest) receive(m *nats.Msg) {
	h := fnv.New32a()
	if l := strings.Split(m.Subject, "."); len(l) == 5 {
		fmt.Fprint(h, l[1], ".", l[2])
	}
	select {
	case in.work[h.Sum32()%workers] <- m:
	default:
		in.Count("", "dropped", "queue full")
	}
}

func (in *ingest) worker(ctx context.Context, c <-chan *nats.Msg) {
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-c:
			t, err := mqtt.ParseSubject(m.Subject)
			if err == nil && t.Tenant != mqtt.Boot {
				err = in.message(ctx, t, m.Data)
			}
			if err != nil && ctx.Err() == nil {
				in.Count(t.Tenant, "refused", err.Error())
				in.Log.Debug("sealed data refused", "gateway", t.Tenant+"/"+t.Gateway, "reason", err)
			}
		}
	}
}

func (in *ingest) message(ctx context.Context, t mqtt.Topic, data []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if t.Kind == "hello" {
		return in.hello(ctx, t, data)
	}
	c, pos, err := sealing.ParseChunk(data)
	if err != nil {
		return err
	}
	if pos.Checkpoint.Subject != t.Tenant+"/"+t.Gateway {
		return fmt.Errorf("the chunk is of %s", pos.Checkpoint.Subject)
	}
	v, key, err := in.voucher(ctx, t, pos.Signer)
	if err != nil {
		return err
	}
	if err := sealing.VerifyChunk(c, key); err != nil {
		return err
	}
	for range 3 { // another replica may store at the same time
		err = in.place(ctx, t, c, pos, v, data)
		if !errors.Is(err, cloud.ErrConflict) {
			return err
		}
	}
	return err
}

// voucher returns the key with this id, if the gateway's newest verdict is
// usable and vouches for it. If not, the gateway is asked to attest.
func (in *ingest) voucher(ctx context.Context, t mqtt.Topic, kid []byte) ([]byte, *ecdsa.PublicKey, error) {
	id := cloud.Key(t.Tenant, t.Gateway)
	in.mu.Lock()
	v := in.verdicts[id]
	in.mu.Unlock()
	if key, ok := v.keys[string(kid)]; ok && time.Since(v.read) < verdictAge {
		return v.verdict, key, nil
	}
	if _, err := in.gateway(ctx, t.Tenant, t.Gateway); err != nil {
		return nil, nil, err
	}
	v, err := in.loadVerdict(ctx, t)
	if err == nil {
		in.mu.Lock()
		in.verdicts[id] = v
		in.mu.Unlock()
		if key, ok := v.keys[string(kid)]; ok {
			return v.verdict, key, nil
		}
		err = errors.New("no verdict vouches for the key that signed it")
	}
	return nil, nil, errors.Join(err, in.askToAttest(ctx, t))
}

func (in *ingest) loadVerdict(ctx context.Context, t mqtt.Topic) (vouched, error) {
	tenant, err := in.Tenants.Tenant(t.Tenant)
	if err != nil {
		return vouched{}, err
	}
	msg, v, err := in.latest(ctx, tenant, t.Gateway)
	if err != nil {
		return vouched{}, err
	}
	if err := v.Usable(t.Tenant+"/"+t.Gateway, t.Tenant, in.Now()); err != nil {
		return vouched{}, err
	}
	keys, err := v.DataKeys()
	if err != nil {
		return vouched{}, err
	}
	out := vouched{verdict: msg, keys: map[string]*ecdsa.PublicKey{}, read: time.Now()}
	for _, k := range keys {
		out.keys[string(cose.Thumbprint(k))] = k
	}
	return out, nil
}

// hello keeps a gateway's word of what the oldest chunk is that it has.
func (in *ingest) hello(ctx context.Context, t mqtt.Topic, data []byte) error {
	_, kid, err := sealing.PeekCheckpoint(data)
	if err != nil {
		return err
	}
	_, key, err := in.voucher(ctx, t, kid)
	if err != nil {
		return err
	}
	o, err := sealing.VerifyCheckpoint(key, sealing.TypOldest, data)
	if err != nil {
		return err
	}
	if o.Subject != t.Tenant+"/"+t.Gateway || !attest.ValidName(o.Stream) {
		return fmt.Errorf("the message is of %s", o.Subject)
	}
	_, err = in.Bus.Hellos.Put(ctx, cloud.Key(t.Tenant, t.Gateway)+"."+o.Stream, cose.MustMarshal(o))
	return err
}

// head is where a stream stands in the store.
type head struct {
	found bool
	last  sealing.Checkpoint
	seq   uint64 // of the message in REC
}

func (in *ingest) head(ctx context.Context, subject string) (head, error) {
	m, err := in.Bus.Rec.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return head{}, nil
	}
	if err != nil {
		return head{}, fmt.Errorf("reading where %s stands: %w", subject, err)
	}
	_, pos, err := sealing.ParseChunk(m.Data)
	if err != nil {
		return head{}, fmt.Errorf("reading where %s stands: %w", subject, err)
	}
	return head{found: true, last: pos.Checkpoint, seq: m.Sequence}, nil
}

func (in *ingest) place(ctx context.Context, t mqtt.Topic, c sealing.Chunk, pos sealing.Position, verdict, data []byte) error {
	cp := pos.Checkpoint
	if !attest.ValidName(cp.Stream) {
		return fmt.Errorf("not a stream's name: %.64q", cp.Stream)
	}
	name := cloud.Key(t.Tenant, t.Gateway) + "." + cp.Stream
	h, err := in.head(ctx, "rec."+name)
	if err != nil {
		return err
	}
	oldest, _, _, err := cloud.Get[sealing.Checkpoint](ctx, in.Bus.Hellos, name)
	if err != nil {
		return err
	}
	switch p := assess(h, pos, oldest); p.verdict {
	case next:
		if p.finding != "" { // before it is stored: a finding is rather reported twice than never
			in.report(ctx, t, cp, p)
		}
		if err := in.store(ctx, name, c, pos, verdict, data, h); err != nil {
			return err
		}
		return in.watermark(t, cp)
	case stored:
		below, above, err := in.neighbours(ctx, "rec."+name, pos)
		if err != nil {
			return err
		}
		if p = assessOld(below, above, pos); p.verdict != stored {
			return in.keepAside(ctx, t, name, cp, p, data)
		}
		return in.watermark(t, h.last)
	case wait:
		in.Count(t.Tenant, "waiting", p.detail)
		if h.found {
			return in.watermark(t, h.last)
		}
		return nil
	default:
		return in.keepAside(ctx, t, name, cp, p, data)
	}
}

func (in *ingest) store(ctx context.Context, name string, c sealing.Chunk, pos sealing.Position, verdict, data []byte, h head) error {
	if len(c.StreamKey) > 0 {
		key := name + "." + pos.Checkpoint.Epoch.String()
		err := cloud.Put(ctx, in.Bus.Keys, key, keybroker.StreamKey{Message: c.StreamKey, Verdict: verdict}, 0)
		if err != nil && !errors.Is(err, cloud.ErrConflict) { // conflict: stored by a try that went no further
			return err
		}
	}
	_, err := in.Bus.JS.PublishMsg(ctx, &nats.Msg{Subject: "rec." + name, Data: data},
		jetstream.WithExpectLastSequencePerSubject(h.seq), jetstream.WithExpectStream("REC"))
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		return cloud.ErrConflict
	}
	if err != nil {
		return fmt.Errorf("storing a chunk: %w", err)
	}
	in.Count(tenantOf("."+name), "stored", "")
	return nil
}

// watermark tells the gateway what is stored.
func (in *ingest) watermark(t mqtt.Topic, cp sealing.Checkpoint) error {
	cp.Cursor = nil
	msg, err := cp.Sign(in.Key, sealing.TypWatermark)
	if err != nil {
		return fmt.Errorf("signing a watermark: %w", err)
	}
	return in.Bus.NC.Publish(mqtt.Topic{Tenant: t.Tenant, Gateway: t.Gateway, Kind: "ack"}.Subject(), msg)
}

func (in *ingest) report(ctx context.Context, t mqtt.Topic, cp sealing.Checkpoint, p placement) {
	f := cloud.Finding{Kind: p.finding, Stream: cp.Stream, Detail: fmt.Sprintf("epoch %s record %d: %s", cp.Epoch, cp.Seq, p.detail)}
	in.Log.Warn("finding", "gateway", t.Tenant+"/"+t.Gateway, "kind", f.Kind, "stream", f.Stream, "detail", f.Detail)
	if err := in.Bus.Report(ctx, t.Tenant, t.Gateway, f); err != nil {
		in.Log.Error("a finding could not be recorded", "err", err)
	}
}

// keepAside stores a chunk that fits nowhere, once, with a finding.
func (in *ingest) keepAside(ctx context.Context, t mqtt.Topic, name string, cp sealing.Checkpoint, p placement, data []byte) error {
	id := hex.EncodeToString(cp.Head)
	ack, err := in.Bus.JS.PublishMsg(ctx, &nats.Msg{Subject: "fork." + name, Data: data}, jetstream.WithMsgID(name+id))
	if err != nil {
		return fmt.Errorf("keeping a chunk aside: %w", err)
	}
	if !ack.Duplicate {
		in.report(ctx, t, cp, p)
	}
	return nil
}

// located is a stored chunk and where it is in REC.
type located struct {
	pos  sealing.Position
	seq  uint64
	data []byte
}

// neighbours looks up where a chunk that is not newer than the newest stored one
// would be in the store: after below, which may be nil, and at above or before
// it.
func (f *Fleet) neighbours(ctx context.Context, subject string, pos sealing.Position) (below *sealing.Position, above sealing.Position, err error) {
	lo, hi, err := f.search(ctx, subject, func(c sealing.Checkpoint) bool { return compare(c, pos.Checkpoint) < 0 })
	if err != nil {
		return nil, above, err
	}
	if hi == nil {
		return nil, above, errors.New("looking for a chunk: the store ends before it, though it stands behind it")
	}
	if lo != nil {
		below = &lo.pos
	}
	return below, hi.pos, nil
}

// search finds the last chunk of a subject that is before a place and the first
// that is not; either is nil if there is none. Messages of a stream are ordered by
// epoch and sequence, so a binary search finds them.
func (f *Fleet) search(ctx context.Context, subject string, before func(sealing.Checkpoint) bool) (below, above *located, err error) {
	info, err := f.Bus.Rec.Info(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("looking for a chunk: %w", err)
	}
	lo, hi := info.State.FirstSeq, info.State.LastSeq
	for lo <= hi {
		mid := lo + (hi-lo)/2
		m, err := f.Bus.Rec.GetMsg(ctx, mid, jetstream.WithGetMsgSubject(subject))
		if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, nil, fmt.Errorf("looking for a chunk: %w", err)
		}
		if err != nil || m.Sequence > hi { // none of this stream from mid to hi
			hi = mid - 1
			continue
		}
		_, at, err := sealing.ParseChunk(m.Data)
		if err != nil {
			return nil, nil, fmt.Errorf("looking for a chunk: %w", err)
		}
		if here := (&located{at, m.Sequence, m.Data}); before(at.Checkpoint) {
			below, lo = here, m.Sequence+1
		} else {
			above, hi = here, mid-1
		}
	}
	return below, above, nil
}

func compare(a, b sealing.Checkpoint) int {
	if c := bytes.Compare(a.Epoch[:], b.Epoch[:]); c != 0 {
		return c
	}
	switch {
	case a.Seq < b.Seq:
		return -1
	case a.Seq > b.Seq:
		return 1
	}
	return 0
}

package fleet

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"edgekeep/cloud"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// Requests of operators and consumers. The tenant is a level of the subject,
// "api.{tenant}.{…}", which the server's permissions tie to the certificate.
type (
	// None is a request or an answer without content.
	None struct{}
	// Name names a gateway.
	Name struct {
		Gateway string `cbor:"1,keyasint"`
	}
	// List answers api.*.gateway.ls.
	List struct {
		Gateways []Summary  `cbor:"1,keyasint"`
		Pending  []cloud.EK `cbor:"2,keyasint"`
	}
	// Summary is one line of a list.
	Summary struct {
		Gateway cloud.Gateway `cbor:"1,keyasint"`
		Verdict []byte        `cbor:"2,keyasint"` // newest; empty if there is none
	}
	// Details answers api.*.gateway.show.
	Details struct {
		Summary  Summary              `cbor:"1,keyasint"`
		Streams  []sealing.Checkpoint `cbor:"2,keyasint"` // where each stands
		Findings []cloud.Finding      `cbor:"3,keyasint"` // newest last
		Results  []Outcome            `cbor:"4,keyasint"`
		Pending  int                  `cbor:"5,keyasint"`
		Counts   map[string]uint64    `cbor:"6,keyasint"` // of this replica, since it started
	}
	// Signed carries a signed message: an admission or a command.
	Signed struct {
		Message []byte `cbor:"1,keyasint"`
	}
	// NextSequence answers api.*.command.next.
	NextSequence struct {
		Sequence uint64 `cbor:"1,keyasint"`
	}
	// Saved answers api.*.evidence: the newest evidence and verdict.
	Saved struct {
		Evidence []byte `cbor:"1,keyasint"`
		Verdict  []byte `cbor:"2,keyasint"`
	}
	// Fetch asks for stored chunks of a tenant after a position in the store.
	Fetch struct {
		Gateway string `cbor:"1,keyasint,omitempty"` // empty: of all
		Stream  string `cbor:"2,keyasint,omitempty"` // empty: all
		After   uint64 `cbor:"3,keyasint"`
		Wait    int64  `cbor:"4,keyasint"` // ms to wait when there is none, at most 20000
	}
	// Fetched answers api.*.data.fetch.
	Fetched struct {
		Chunks []Stored `cbor:"1,keyasint"`
		Next   uint64   `cbor:"2,keyasint"` // After of the next Fetch
	}
	// Stored is one stored chunk.
	Stored struct {
		Gateway string `cbor:"1,keyasint"`
		Data    []byte `cbor:"2,keyasint"`
	}
)

func (f *Fleet) answers(ctx context.Context) error {
	return errors.Join(
		cloud.Answer(ctx, f.Bus, "api.*.gateway.ls", "fleet", f.list),
		cloud.Answer(ctx, f.Bus, "api.*.gateway.show", "fleet", f.show),
		cloud.Answer(ctx, f.Bus, "api.*.gateway.approve", "fleet", f.approve),
		cloud.Answer(ctx, f.Bus, "api.*.gateway.revoke", "fleet", f.revoke),
		cloud.Answer(ctx, f.Bus, "api.*.gateway.attest", "fleet", f.attest),
		cloud.Answer(ctx, f.Bus, "api.*.evidence", "fleet", f.saved),
		cloud.Answer(ctx, f.Bus, "api.*.command.next", "fleet", f.nextSequence),
		cloud.Answer(ctx, f.Bus, "api.*.command.send", "fleet", f.sendCommand),
		cloud.Answer(ctx, f.Bus, "api.*.data.fetch", "fleet", f.fetch),
		cloud.Answer(ctx, f.Bus, "api.*.data.infer", "fleet", f.infer),
		cloud.Answer(ctx, f.Bus, "api.*.data.attest", "fleet", f.vouch),
		cloud.Answer(ctx, f.Bus, "api.*.data.ledger", "fleet", f.inspect),
		cloud.Answer(ctx, f.Bus, "api.*.workload.ls", "fleet", f.instances),
		cloud.Answer(ctx, f.Bus, "api.*.workload.stop", "fleet", f.stopLost),
		cloud.Answer(ctx, f.Bus, "api.*.workload.recover", "fleet", f.recover),
		cloud.Answer(ctx, f.Bus, "api.*.workload.snapshots", "fleet", f.snapshots),
		cloud.Answer(ctx, f.Bus, "api.*.blob.put", "fleet", f.putByOperator),
		cloud.Answer(ctx, f.Bus, "api.*.blob.get", "fleet", f.getBlob),
		cloud.Answer(ctx, f.Bus, "api.*.blob.ls", "fleet", f.listBlobs),
		cloud.Answer(ctx, f.Bus, "api.*.blob.rm", "fleet", f.dropBlob),
	)
}

func tenantOf(subject string) string { return strings.Split(subject, ".")[1] }

func (f *Fleet) list(ctx context.Context, subject string, _ None) (List, error) {
	var out List
	tenant := tenantOf(subject)
	lister, err := f.Bus.Gateways.ListKeysFiltered(ctx, tenant+".*")
	if err != nil {
		return out, fmt.Errorf("listing gateways: %w", err)
	}
	for key := range lister.Keys() {
		g, _, ok, err := cloud.Get[cloud.Gateway](ctx, f.Bus.Gateways, key)
		if err != nil || !ok {
			continue
		}
		out.Gateways = append(out.Gateways, f.summary(ctx, g))
	}
	slices.SortFunc(out.Gateways, func(a, b Summary) int { return strings.Compare(a.Gateway.Name, b.Gateway.Name) })
	eks, err := f.Bus.EKs.ListKeys(ctx)
	if err != nil {
		return out, fmt.Errorf("listing TPMs: %w", err)
	}
	for key := range eks.Keys() {
		e, _, ok, err := cloud.Get[cloud.EK](ctx, f.Bus.EKs, key)
		if err != nil || !ok {
			continue
		}
		a, admitted := message.Admission{}, false
		if len(e.Admission) > 0 {
			a, err = f.admission(e.Admission)
			admitted = err == nil
		}
		// Nobody knows whose a box is that waits for the first time: every operator
		// sees it. Afterwards only its own.
		if admitted && a.Tenant != tenant || e.State == cloud.Enrolled && e.Reason == "" {
			continue
		}
		if len(out.Pending) < 1000 {
			out.Pending = append(out.Pending, e)
		}
	}
	slices.SortFunc(out.Pending, func(a, b cloud.EK) int { return int(a.Seen - b.Seen) })
	return out, nil
}

func (f *Fleet) summary(ctx context.Context, g cloud.Gateway) Summary {
	s := Summary{Gateway: g}
	if t, err := f.Tenants.Tenant(g.Tenant); err == nil {
		if msg, _, err := f.latest(ctx, t, g.Name); err == nil {
			s.Verdict = msg
		}
	}
	return s
}

func (f *Fleet) lookup(ctx context.Context, subject, name string) (cloud.Gateway, error) {
	if !attest.ValidName(name) {
		return cloud.Gateway{}, fmt.Errorf("not a gateway's name: %.64q", name)
	}
	g, _, ok, err := cloud.Get[cloud.Gateway](ctx, f.Bus.Gateways, cloud.Key(tenantOf(subject), name))
	if err == nil && !ok {
		err = fmt.Errorf("no gateway %s: `edgekeep gateway ls` shows which there are", name)
	}
	return g, err
}

func (f *Fleet) show(ctx context.Context, subject string, r Name) (Details, error) {
	g, err := f.lookup(ctx, subject, r.Gateway)
	if err != nil {
		return Details{}, err
	}
	out := Details{Summary: f.summary(ctx, g), Counts: f.Metrics.Of(g.Tenant)}
	key := cloud.Key(g.Tenant, g.Name)
	info, err := f.Bus.Rec.Info(ctx, jetstream.WithSubjectFilter("rec."+key+".*"))
	if err != nil {
		return out, fmt.Errorf("looking for streams: %w", err)
	}
	for s := range info.State.Subjects {
		m, err := f.Bus.Rec.GetLastMsgForSubject(ctx, s)
		if err != nil {
			continue
		}
		if _, pos, err := sealing.ParseChunk(m.Data); err == nil {
			pos.Checkpoint.Cursor = nil
			out.Streams = append(out.Streams, pos.Checkpoint)
		}
	}
	slices.SortFunc(out.Streams, func(a, b sealing.Checkpoint) int { return strings.Compare(a.Stream, b.Stream) })
	if out.Findings, err = f.findings(ctx, key); err != nil {
		return out, err
	}
	q, err := f.queue(ctx, g.Tenant, g.Name)
	out.Results, out.Pending = q.Results, len(q.Pending)
	return out, err
}

// findings returns the newest twenty.
func (f *Fleet) findings(ctx context.Context, key string) ([]cloud.Finding, error) {
	var out []cloud.Finding
	for seq := uint64(1); len(out) < 1000; {
		m, err := f.Bus.Findings.GetMsg(ctx, seq, jetstream.WithGetMsgSubject("find."+key))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("reading findings: %w", err)
		}
		var x cloud.Finding
		if err := cose.Unmarshal(m.Data, &x); err == nil {
			out = append(out, x)
		}
		seq = m.Sequence + 1
	}
	return out[max(0, len(out)-20):], nil
}

// errOtherTPM: epochs are ordered by a counter in the TPM, so a stream cannot go
// on with another one.
var errOtherTPM = errors.New("this name is another TPM's, whose streams are stored under it: approve this one under a name of its own")

// approve files the operator's signed word that an EK may enrol.
func (f *Fleet) approve(ctx context.Context, subject string, r Signed) (None, error) {
	a, err := f.admission(r.Message)
	if err != nil {
		return None{}, err
	}
	if a.Tenant != tenantOf(subject) {
		return None{}, fmt.Errorf("the admission is for tenant %s", a.Tenant)
	}
	g, _, found, err := cloud.Get[cloud.Gateway](ctx, f.Bus.Gateways, cloud.Key(a.Tenant, a.Gateway))
	if err != nil {
		return None{}, err
	}
	if found && string(g.EKHash) != string(a.EKHash) {
		return None{}, errOtherTPM
	}
	if found && g.Used(a.ID) {
		return None{}, errors.New("this approval was used before")
	}
	key := hex.EncodeToString(a.EKHash)
	_, err = cloud.Change(ctx, f.Bus.EKs, key, func(e *cloud.EK, found bool) error {
		if !found {
			*e = cloud.EK{Hash: a.EKHash, Seen: f.Now().Unix()}
		}
		if old, err := f.admission(e.Admission); err == nil && old.Tenant != a.Tenant && e.State != cloud.Revoked {
			return errors.New("this TPM is approved or enrolled by another tenant, which has to revoke it first")
		}
		e.State, e.Admission, e.Reason = cloud.Approved, r.Message, ""
		return nil
	})
	if err != nil {
		return None{}, err
	}
	f.Log.Info("approved", "gateway", a.Tenant+"/"+a.Gateway, "ek-hash", key)
	f.Notify("boot", key)
	return None{}, nil
}

// revoke ends a gateway: its data, its requests and its certificate are refused
// from now on.
func (f *Fleet) revoke(ctx context.Context, subject string, r Name) (None, error) {
	g, err := f.lookup(ctx, subject, r.Gateway)
	if err != nil {
		return None{}, err
	}
	if _, err := cloud.Change(ctx, f.Bus.Gateways, cloud.Key(g.Tenant, g.Name), func(g *cloud.Gateway, _ bool) error {
		g.Revoked = true
		return nil
	}); err != nil {
		return None{}, err
	}
	if _, err := cloud.Change(ctx, f.Bus.EKs, hex.EncodeToString(g.EKHash), func(e *cloud.EK, _ bool) error {
		if a, err := f.admission(e.Admission); err == nil && a.Tenant == g.Tenant && a.Gateway == g.Name {
			e.State = cloud.Revoked // and not if the TPM is another gateway's by now
		}
		return nil
	}); err != nil {
		return None{}, err
	}
	if f.Disconnect != nil {
		f.Disconnect(g.Tenant, g.Name)
	}
	f.Log.Info("revoked", "gateway", g.Tenant+"/"+g.Name)
	return None{}, nil
}

// attest asks a gateway for evidence now and waits for the verdict.
func (f *Fleet) attest(ctx context.Context, subject string, r Name) (Saved, error) {
	g, err := f.lookup(ctx, subject, r.Gateway)
	if err != nil {
		return Saved{}, err
	}
	if g.Revoked {
		return Saved{}, fmt.Errorf("gateway %s is revoked", g.Name)
	}
	key, asked := cloud.Key(g.Tenant, g.Name), f.Now().Unix()
	sub, err := f.Bus.NC.SubscribeSync("verdict." + key)
	if err != nil {
		return Saved{}, fmt.Errorf("waiting for a verdict: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := f.changeQueue(ctx, g.Tenant, g.Name, func(q *Queue) error { q.Attest = true; return nil }); err != nil {
		return Saved{}, err
	}
	f.Notify(g.Tenant, g.Name)
	ctx, cancel := context.WithTimeout(ctx, 25*time.Second)
	defer cancel()
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return Saved{}, fmt.Errorf("gateway %s did not attest in 25 s: is it connected? `edgekeep gateway show %s` tells what was seen of it last", g.Name, g.Name)
		}
		v, err := attest.PeekVerdict(m.Data)
		if err != nil || v.NotBefore < asked {
			continue // on an earlier challenge: evidence that was held back, perhaps
		}
		out, err := f.savedOf(ctx, key)
		out.Verdict = m.Data
		return out, err
	}
}

func (f *Fleet) saved(ctx context.Context, subject string, r Name) (Saved, error) {
	g, err := f.lookup(ctx, subject, r.Gateway)
	if err != nil {
		return Saved{}, err
	}
	out, err := f.savedOf(ctx, cloud.Key(g.Tenant, g.Name))
	if err == nil {
		out.Verdict = f.summary(ctx, g).Verdict
	}
	return out, err
}

func (f *Fleet) savedOf(ctx context.Context, key string) (Saved, error) {
	m, err := f.Bus.Evidence.GetLastMsgForSubject(ctx, "ev."+key)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return Saved{}, errors.New("there is no evidence yet")
	}
	if err != nil {
		return Saved{}, fmt.Errorf("reading evidence: %w", err)
	}
	return Saved{Evidence: m.Data}, nil
}

func (f *Fleet) nextSequence(ctx context.Context, subject string, r Name) (NextSequence, error) {
	g, err := f.lookup(ctx, subject, r.Gateway)
	if err != nil {
		return NextSequence{}, err
	}
	q, err := f.queue(ctx, g.Tenant, g.Name)
	return NextSequence{Sequence: max(q.Last, g.Command) + 1}, err
}

func (f *Fleet) sendCommand(ctx context.Context, subject string, r Signed) (None, error) {
	_, err := f.enqueue(ctx, tenantOf(subject), r.Message)
	return None{}, err
}

const maxFetch = 700 << 10

// fetch returns stored chunks in the order in which they were stored. They are
// sealed: who has no key has nothing.
func (f *Fleet) fetch(ctx context.Context, subject string, r Fetch) (Fetched, error) {
	for _, n := range []string{r.Gateway, r.Stream} {
		if n != "" && !attest.ValidName(n) {
			return Fetched{}, fmt.Errorf("not a name: %.64q", n)
		}
	}
	filter := "rec." + tenantOf(subject) + "." + orAny(r.Gateway) + "." + orAny(r.Stream)
	out := Fetched{Next: r.After}
	deadline := time.Now().Add(time.Duration(min(max(r.Wait, 0), 20_000)) * time.Millisecond)
	for size := 0; size < maxFetch; {
		m, err := f.Bus.Rec.GetMsg(ctx, out.Next+1, jetstream.WithGetMsgSubject(filter))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			if len(out.Chunks) > 0 || time.Now().After(deadline) {
				break
			}
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-ctx.Done():
				return out, ctx.Err()
			}
		}
		if err != nil {
			return out, fmt.Errorf("reading the store: %w", err)
		}
		if size += len(m.Data) + 64; size > maxFetch && len(out.Chunks) > 0 {
			break
		}
		out.Chunks = append(out.Chunks, Stored{Gateway: strings.Split(m.Subject, ".")[2], Data: m.Data})
		out.Next = m.Sequence
	}
	return out, nil
}

func orAny(s string) string {
	if s == "" {
		return "*"
	}
	return s
}

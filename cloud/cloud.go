// Package cloud is what the roles of the cloud side share: the message bus that
// is also the store (NATS with JetStream), its buckets and streams, the records
// in them, and questions and answers between processes.
//
// Streams, all on disk:
//
//	REC   rec.{tenant}.{gateway}.{stream}   accepted chunks, in order; the last
//	                                        message of a subject is where the
//	                                        stream stands
//	FORK  fork.{tenant}.{gateway}.{stream}  authentic chunks that fit nowhere
//	EVID  ev.{tenant}.{gateway}             the newest 64 pieces of evidence
//	FIND  find.{tenant}.{gateway}           the newest 1000 findings
//	BLOB  blob.{tenant}.{id}.{block}        blocks of bundles and checkpoints;
//	                                        "list" is their hashes
//
// Buckets: eks (by EK hash), gateways, latest (verdicts), hellos, commands (by
// "tenant.gateway"), verdicts (by SHA-256 of the challenge), keys (by
// "tenant.gateway.stream.epoch"), ledger (by "tenant.instance"), blobs (by
// "tenant.id").
package cloud

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"edgekeep/internal/cose"
	"edgekeep/tee/tpm"
)

// Bus is a connection to the message bus and its stores.
type Bus struct {
	NC *nats.Conn
	JS jetstream.JetStream

	Rec, Fork, Evidence, Findings, Blob                                               jetstream.Stream
	EKs, Gateways, Latest, Hellos, Commands, Verdicts, Keys, Ledger, Blobs, Snapshots jetstream.KeyValue
}

// Open makes sure that streams and buckets are there. replicas is 1 for one
// server, 3 or 5 for a cluster.
func Open(ctx context.Context, nc *nats.Conn, replicas int) (*Bus, error) {
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("opening JetStream: %w", err)
	}
	b := &Bus{NC: nc, JS: js}
	for _, s := range []struct {
		to   *jetstream.Stream
		name string
		subj string
		per  int64
	}{
		{&b.Rec, "REC", "rec.>", -1},
		{&b.Fork, "FORK", "fork.>", 10_000},
		{&b.Evidence, "EVID", "ev.>", 64},
		{&b.Findings, "FIND", "find.>", 1000},
		{&b.Blob, "BLOB", "blob.>", 1},
	} {
		if *s.to, err = js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
			Name: s.name, Subjects: []string{s.subj}, Storage: jetstream.FileStorage, Replicas: replicas,
			Duplicates:        24 * time.Hour, // what a gateway sends again for a day is kept aside once
			MaxMsgsPerSubject: s.per, DenyDelete: s.name == "REC", MaxMsgSize: 256 << 10,
		}); err != nil {
			return nil, fmt.Errorf("stream %s: %w", s.name, err)
		}
	}
	for _, k := range []struct {
		to   *jetstream.KeyValue
		name string
		ttl  time.Duration
	}{
		{&b.EKs, "eks", 0},
		{&b.Gateways, "gateways", 0},
		{&b.Latest, "latest", 0},
		{&b.Hellos, "hellos", 0},
		{&b.Commands, "commands", 0},
		{&b.Verdicts, "verdicts", time.Hour},
		{&b.Keys, "keys", 0},
		{&b.Ledger, "ledger", 0},
		{&b.Snapshots, "snapshots", 0},
		{&b.Blobs, "blobs", 0},
	} {
		if *k.to, err = js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: k.name, Storage: jetstream.FileStorage, Replicas: replicas, TTL: k.ttl, History: 1,
		}); err != nil {
			return nil, fmt.Errorf("bucket %s: %w", k.name, err)
		}
	}
	return b, nil
}

// EK is what is known of a TPM that asked to enrol.
type EK struct {
	Hash      []byte `cbor:"1,keyasint"`
	State     string `cbor:"2,keyasint"`
	Maker     string `cbor:"3,keyasint"` // issuer of its certificate
	Seen      int64  `cbor:"4,keyasint"` // Unix seconds, first
	Admission []byte `cbor:"5,keyasint"` // the operator's word, if approved
	Reason    string `cbor:"6,keyasint"` // why it is pending
}

// States of an EK.
const (
	Pending  = "pending"
	Approved = "approved" // may enrol, once
	Enrolled = "enrolled"
	Revoked  = "revoked"
)

// Gateway is an enrolled gateway.
type Gateway struct {
	Tenant      string    `cbor:"1,keyasint"`
	Name        string    `cbor:"2,keyasint"`
	EKHash      []byte    `cbor:"3,keyasint"`
	AKName      []byte    `cbor:"4,keyasint"`
	AdmissionID []byte    `cbor:"5,keyasint"`
	Enrolled    int64     `cbor:"6,keyasint"`
	CertExpires int64     `cbor:"7,keyasint"`
	Revoked     bool      `cbor:"8,keyasint"`
	Clock       tpm.Clock `cbor:"9,keyasint"`  // newest seen in a quote
	Command     uint64    `cbor:"10,keyasint"` // newest accepted, as seen in a result or in evidence
	Epoch       []byte    `cbor:"11,keyasint"` // newest seen in evidence
	CertSerial  []byte    `cbor:"12,keyasint"`
	Former      [][]byte  `cbor:"13,keyasint,omitempty"` // admissions used before AdmissionID; operators alone make it grow
}

// Used reports whether an admission was used to enrol this gateway.
func (g Gateway) Used(id []byte) bool {
	return bytes.Equal(g.AdmissionID, id) || slices.ContainsFunc(g.Former, func(f []byte) bool { return bytes.Equal(f, id) })
}

// Key is the key of a gateway's entries.
func Key(tenant, gateway string) string { return tenant + "." + gateway }

// Finding is something an operator should know of a gateway.
type Finding struct {
	Time   int64  `cbor:"1,keyasint" json:"time"`
	Kind   string `cbor:"2,keyasint" json:"kind"` // gap, rollback or fork: what a gateway itself has signed
	Stream string `cbor:"3,keyasint" json:"stream,omitempty"`
	Detail string `cbor:"4,keyasint" json:"detail"`
}

// Report records a finding.
func (b *Bus) Report(ctx context.Context, tenant, gateway string, f Finding) error {
	f.Time = time.Now().Unix()
	raw, err := cose.Marshal(f)
	if err != nil {
		return err
	}
	if _, err := b.JS.Publish(ctx, "find."+Key(tenant, gateway), raw); err != nil {
		return fmt.Errorf("recording a finding: %w", err)
	}
	return nil
}

// Get reads an entry of a bucket. ok is false when there is none.
func Get[V any](ctx context.Context, kv jetstream.KeyValue, key string) (v V, revision uint64, ok bool, err error) {
	e, err := kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return v, 0, false, nil
	}
	if err != nil {
		return v, 0, false, fmt.Errorf("reading %s/%s: %w", kv.Bucket(), key, err)
	}
	if err := cose.Unmarshal(e.Value(), &v); err != nil {
		return v, 0, false, fmt.Errorf("reading %s/%s: %w", kv.Bucket(), key, err)
	}
	return v, e.Revision(), true, nil
}

// All reads the entries of a bucket whose keys match a filter, in no order, and
// hands each to f. What cannot be read is left out.
func All[V any](ctx context.Context, kv jetstream.KeyValue, filter string, f func(key string, v V, revision uint64)) error {
	w, err := kv.WatchFiltered(ctx, []string{filter}, jetstream.IgnoreDeletes())
	if err != nil {
		return fmt.Errorf("reading %s/%s: %w", kv.Bucket(), filter, err)
	}
	defer func() { _ = w.Stop() }()
	for {
		select {
		case e, open := <-w.Updates():
			if !open {
				return fmt.Errorf("reading %s/%s: it was cut off", kv.Bucket(), filter)
			}
			if e == nil { // that was all
				return nil
			}
			var v V
			if err := cose.Unmarshal(e.Value(), &v); err == nil {
				f(e.Key(), v, e.Revision())
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ErrConflict means that somebody else changed an entry in between.
var ErrConflict = errors.New("changed by somebody else in between")

// Put writes an entry if its revision is still the given one (0: if there is
// none).
func Put(ctx context.Context, kv jetstream.KeyValue, key string, v any, revision uint64) error {
	raw, err := cose.Marshal(v)
	if err != nil {
		return err
	}
	if revision == 0 {
		_, err = kv.Create(ctx, key, raw)
	} else {
		_, err = kv.Update(ctx, key, raw, revision)
	}
	var api *jetstream.APIError
	if errors.Is(err, jetstream.ErrKeyExists) || errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		return fmt.Errorf("writing %s/%s: %w", kv.Bucket(), key, ErrConflict)
	}
	if err != nil {
		return fmt.Errorf("writing %s/%s: %w", kv.Bucket(), key, err)
	}
	return nil
}

// Change reads, changes and writes an entry until nobody came in between, at
// most 20 times. f gets the zero value when there is none, and may refuse.
func Change[V any](ctx context.Context, kv jetstream.KeyValue, key string, f func(v *V, found bool) error) (V, error) {
	for range 20 {
		v, rev, ok, err := Get[V](ctx, kv, key)
		if err != nil {
			return v, err
		}
		if err := f(&v, ok); err != nil {
			return v, err
		}
		if err := Put(ctx, kv, key, v, rev); !errors.Is(err, ErrConflict) {
			return v, err
		}
	}
	var zero V
	return zero, fmt.Errorf("writing %s/%s: %w, again and again", kv.Bucket(), key, ErrConflict)
}

type reply struct {
	_     struct{} `cbor:",toarray"`
	Error string
	Body  cose.Raw
}

// Answer answers requests on a subject, in a queue group, with at most 64 under
// way. The second level of an "api" subject is the tenant on whose behalf the
// caller may speak: the server's permissions see to that. They do not see where a
// caller wants its answer, which we may publish anywhere: it goes to an inbox or
// nowhere.
func Answer[Req, Rep any](ctx context.Context, b *Bus, subject, queue string, f func(ctx context.Context, subject string, r Req) (Rep, error)) error {
	slots := make(chan struct{}, 64)
	sub, err := b.NC.QueueSubscribe(subject, queue, func(m *nats.Msg) {
		if !strings.HasPrefix(m.Reply, inbox) {
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = m.Respond(busy)
			return
		}
		go func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			_ = m.Respond(answer(ctx, m, f)) // a caller that has gone needs no answer
		}()
	})
	if err != nil {
		return fmt.Errorf("subscribing to %s: %w", subject, err)
	}
	context.AfterFunc(ctx, func() { _ = sub.Unsubscribe() })
	return nil
}

// busy is the answer when no more requests are taken.
var busy = cose.MustMarshal(reply{Error: "too many requests are under way: try again in a moment", Body: cose.Raw{0xf6}})

// answer runs one request. A bug of ours that one caller has found must not stop
// the others: it becomes an error of this answer.
func answer[Req, Rep any](ctx context.Context, m *nats.Msg, f func(context.Context, string, Req) (Rep, error)) (out []byte) {
	defer func() {
		if p := recover(); p != nil {
			out = cose.MustMarshal(reply{Error: Cut(fmt.Sprintf("internal error: %v", p), 200), Body: cose.Raw{0xf6}})
		}
	}()
	var req Req
	err := cose.Unmarshal(m.Data, &req)
	var rep Rep
	if err == nil {
		rep, err = f(ctx, m.Subject, req)
	}
	var body []byte
	if err == nil {
		body, err = cose.Marshal(rep)
	}
	if err == nil {
		out, err = cose.Marshal(reply{Body: body}) // too large, perhaps
	}
	if err != nil {
		return cose.MustMarshal(reply{Error: Cut(err.Error(), 2048), Body: cose.Raw{0xf6}})
	}
	return out
}

// Refused is an error that the other side answered with.
type Refused struct{ Reason string }

func (r *Refused) Error() string { return r.Reason }

// Ask sends a request and waits for its answer.
func Ask[Rep any](ctx context.Context, nc *nats.Conn, subject string, req any) (Rep, error) {
	var rep Rep
	raw, err := cose.Marshal(req)
	if err != nil {
		return rep, err
	}
	ctx, cancel := context.WithTimeout(ctx, 35*time.Second)
	defer cancel()
	m, err := nc.RequestWithContext(ctx, subject, raw)
	if errors.Is(err, nats.ErrNoResponders) {
		return rep, fmt.Errorf("nobody answers %s: is that role of edgekeep-cloud running, and may you ask it?", subject)
	}
	if err != nil {
		return rep, fmt.Errorf("asking %s: %w", subject, err)
	}
	var a reply
	if err := cose.Unmarshal(m.Data, &a); err != nil {
		return rep, fmt.Errorf("asking %s: %w", subject, err)
	}
	if a.Error != "" {
		return rep, &Refused{Reason: a.Error}
	}
	if err := cose.Unmarshal(a.Body, &rep); err != nil {
		return rep, fmt.Errorf("asking %s: %w", subject, err)
	}
	return rep, nil
}

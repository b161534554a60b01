package fleet

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"edgekeep/cloud"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// Requests about workloads.
type (
	// Instance names an instance.
	Instance struct {
		Instance string `cbor:"1,keyasint"`
	}
	// Page asks for instances whose names come after After.
	Page struct {
		After string `cbor:"1,keyasint"`
	}
	// Instances answers api.*.workload.ls, ordered by name.
	Instances struct {
		Views []View `cbor:"1,keyasint"`
		More  bool   `cbor:"2,keyasint"` // there are more after the last one
	}
	// View is one line of a list of instances.
	View struct {
		Entry   workload.Entry `cbor:"1,keyasint"`
		Name    string         `cbor:"2,keyasint"` // of the workload
		Version string         `cbor:"3,keyasint"`
		Moves   uint64         `cbor:"4,keyasint"`
		Since   int64          `cbor:"5,keyasint"` // of the entry, Unix seconds
		By      string         `cbor:"6,keyasint"` // who made it: see Event
	}
	// Infer asks api.*.data.infer; the answer is what the gateway replied.
	Infer struct {
		Gateway string         `cbor:"1,keyasint"`
		Asked   workload.Asked `cbor:"2,keyasint"` // without ID
	}
	// Inferred answers it.
	Inferred struct {
		Data []byte `cbor:"1,keyasint"` // workload.Response, signed
	}
	// Vouch asks api.*.data.attest for a verdict that is not older than this. The
	// answer is Saved, without evidence.
	Vouch struct {
		Gateway string `cbor:"1,keyasint"`
		Age     int64  `cbor:"2,keyasint"` // seconds
	}
)

const (
	maxPage      = 700 << 10
	recoverLife  = time.Hour // of the data owner's word
	inferWait    = 25 * time.Second
	inferTenant  = 32 // under way of each kind: fewer than Answer has places for
	inferGateway = 16
	inferID      = 16
	maxRouted    = mqtt.MaxPayload - 1024
)

var errTooMany = errors.New("too many requests are under way: try again in a moment")

func (f *Fleet) instances(ctx context.Context, subject string, r Page) (Instances, error) {
	var all []View
	err := cloud.All(ctx, f.Bus.Ledger, tenantOf(subject)+".*", func(_ string, rec Record, _ uint64) {
		if rec.Entry.Instance <= r.After || len(rec.History) == 0 {
			return
		}
		v := View{Entry: rec.Entry, Moves: rec.Moves}
		if m, err := workload.PeekManifest(rec.Manifest); err == nil {
			v.Name, v.Version = m.Name, m.Version
		}
		last := rec.History[len(rec.History)-1]
		v.Since, v.By = last.Time, last.By
		all = append(all, v)
	})
	if err != nil {
		return Instances{}, err
	}
	slices.SortFunc(all, func(a, b View) int { return cmp.Compare(a.Entry.Instance, b.Entry.Instance) })
	out := Instances{Views: all}
	for i, size := 0, 0; i < len(all); i++ {
		if size += len(cose.MustMarshal(all[i])); size > maxPage {
			return Instances{Views: all[:i], More: true}, nil
		}
	}
	return out, nil
}

// inspect returns an instance's record, signed by the fleet: who reads results
// need not believe who passes it on.
func (f *Fleet) inspect(ctx context.Context, subject string, r Instance) (Signed, error) {
	rec, _, err := f.record(ctx, tenantOf(subject), r.Instance)
	if err != nil {
		return Signed{}, err
	}
	msg, err := cose.Sign1(f.Key, TypLedger, cose.MustMarshal(rec))
	return Signed{Message: msg}, err
}

// stopLost stops an instance whose holder cannot: it was revoked, or never got
// the command.
func (f *Fleet) stopLost(ctx context.Context, subject string, r Instance) (None, error) {
	tenant := tenantOf(subject)
	if _, _, err := f.record(ctx, tenant, r.Instance); err != nil {
		return None{}, err
	}
	_, err := cloud.Change(ctx, f.Bus.Ledger, cloud.Key(tenant, r.Instance), func(rec *Record, found bool) error {
		e := rec.Entry
		if !found || e.Holder == "" {
			return nil // stopped
		}
		void, err := f.void(ctx, tenant, *rec)
		if err != nil {
			return err
		}
		g, _, enrolled, err := cloud.Get[cloud.Gateway](ctx, f.Bus.Gateways, cloud.Key(tenant, e.Holder))
		if err != nil {
			return err
		}
		if !void && enrolled && !g.Revoked {
			return fmt.Errorf("gateway %s holds instance %s: only it can stop it without losing anything; revoke the gateway if it is lost", e.Holder, r.Instance)
		}
		line, err := f.storedLine(ctx, tenant, e.Holder, r.Instance, e.Epoch)
		if err != nil {
			return err
		}
		rec.stop(line, "operator", f.Now())
		return nil
	})
	return None{}, err
}

// recover takes the data owner's word that a lost instance goes on elsewhere. What
// results are stored by now count; later ones of the lost one do not.
func (f *Fleet) recover(ctx context.Context, subject string, r Signed) (None, error) {
	t, err := f.Tenants.Tenant(tenantOf(subject))
	if err != nil {
		return None{}, err
	}
	w, err := message.VerifyRecover(t.Owner, r.Message)
	if err != nil {
		return None{}, err
	}
	if age := f.Now().Sub(time.Unix(w.Issued, 0)); w.Tenant != t.Tenant || age > recoverLife || age < -recoverLife {
		return None{}, errors.New("recovery: the data owner's word is for another tenant, or more than an hour old")
	}
	if err := f.complete(ctx, t.Tenant, w.Checkpoint); err != nil {
		return None{}, err
	}
	_, err = cloud.Change(ctx, f.Bus.Ledger, cloud.Key(t.Tenant, w.Instance), func(rec *Record, found bool) error {
		e := rec.Entry
		if !found {
			return fmt.Errorf("there is no instance %s", w.Instance)
		}
		if e.Epoch == w.From+1 && string(rec.Recovery) == string(r.Message) {
			return nil // taken before
		}
		if e.Epoch != w.From {
			return fmt.Errorf("instance %s is at epoch %d by now, the data owner's word is about epoch %d", w.Instance, e.Epoch, w.From)
		}
		m, err := workload.PeekManifest(rec.Manifest)
		if err != nil {
			return err
		}
		receive, err := f.target(ctx, t, m, w.To)
		if err != nil {
			return err
		}
		line, err := f.storedLine(ctx, t.Tenant, e.Holder, w.Instance, e.Epoch)
		if err != nil {
			return err
		}
		rec.Recovery = r.Message
		rec.advance(workload.Entry{
			Instance: w.Instance, Epoch: e.Epoch + 1, Holder: w.To, Bundle: e.Bundle, Head: w.Head,
			Line: max(e.Line, line), Receive: receive, Owner: true,
		}, "owner", f.Now())
		return nil
	})
	if err == nil {
		f.Log.Warn("ledger: the data owner recovers an instance", "instance", t.Tenant+"/"+w.Instance, "from", w.From, "to", w.To)
	}
	return None{}, err
}

// infer passes a request on to a gateway's keep and waits for the reply. It is
// sealed to that keep, and so is the reply to whoever asked.
func (f *Fleet) infer(ctx context.Context, subject string, r Infer) (Inferred, error) {
	tenant := tenantOf(subject)
	g, err := f.lookup(ctx, subject, r.Gateway)
	if err != nil {
		return Inferred{}, err
	}
	switch {
	case g.Revoked:
		return Inferred{}, fmt.Errorf("gateway %s is revoked", g.Name)
	case !workload.ValidInstance(r.Asked.Instance):
		return Inferred{}, fmt.Errorf("not an instance's name: %.64q", r.Asked.Instance)
	}
	leave, ok := f.inferring.enter(tenant, r.Gateway)
	if !ok {
		return Inferred{}, errTooMany
	}
	defer leave()
	r.Asked.ID = make([]byte, inferID)
	rand.Read(r.Asked.ID) // never fails
	msg := cose.MustMarshal(message.Routed{Data: workload.Wrap(workload.KindRequest, r.Asked)})
	if len(msg) > maxRouted {
		return Inferred{}, fmt.Errorf("the request has %d bytes, at most %d are passed on", len(msg), maxRouted)
	}
	sub, err := f.Bus.NC.SubscribeSync(replySubject(tenant, r.Gateway, r.Asked.ID))
	if err != nil {
		return Inferred{}, fmt.Errorf("waiting for a reply: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	down := mqtt.Topic{Tenant: tenant, Gateway: r.Gateway, Kind: "peer"}.Subject()
	if err := f.Bus.NC.Publish(down, msg); err != nil {
		return Inferred{}, fmt.Errorf("passing a request on: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, inferWait)
	defer cancel()
	m, err := sub.NextMsgWithContext(ctx)
	if err != nil {
		return Inferred{}, fmt.Errorf("gateway %s did not answer in %s: is it connected, and does it run %s?", r.Gateway, inferWait, r.Asked.Instance)
	}
	return Inferred{Data: m.Data}, nil
}

// replySubject is where a reply comes, whichever replica takes it in.
func replySubject(tenant, gateway string, id []byte) string {
	return "reply." + cloud.Key(tenant, gateway) + "." + hex.EncodeToString(id)
}

// reply takes a keep's answer to a request. Nobody may wait for it any more.
func (f *Fleet) reply(t mqtt.Topic, r message.Reply) error {
	if len(r.ID) != inferID {
		return errors.New("a reply has the id of its request")
	}
	return f.Bus.NC.Publish(replySubject(t.Tenant, t.Gateway, r.ID), r.Data)
}

// vouch returns a verdict that is young enough for somebody who is about to seal
// something to the gateway, and has it attest if there is none.
func (f *Fleet) vouch(ctx context.Context, subject string, r Vouch) (Saved, error) {
	t, err := f.Tenants.Tenant(tenantOf(subject))
	if err != nil {
		return Saved{}, err
	}
	if !attest.ValidName(r.Gateway) {
		return Saved{}, fmt.Errorf("not a gateway's name: %.64q", r.Gateway)
	}
	if _, err := f.gateway(ctx, t.Tenant, r.Gateway); err != nil {
		return Saved{}, err
	}
	msg, v, err := f.latest(ctx, t, r.Gateway)
	if err == nil && v.Usable(t.Tenant+"/"+r.Gateway, t.Tenant, f.Now()) == nil && f.Now().Unix()-v.IssuedAt <= max(r.Age, 1) {
		return Saved{Verdict: msg}, nil
	}
	leave, ok := f.inferring.enter(t.Tenant+" attest", r.Gateway)
	if !ok {
		return Saved{}, errTooMany
	}
	defer leave()
	s, err := f.attest(ctx, subject, Name{Gateway: r.Gateway})
	return Saved{Verdict: s.Verdict}, err
}

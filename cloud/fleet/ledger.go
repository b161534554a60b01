package fleet

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"edgekeep/cloud"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// TypLedger is the type (COSE header 16) under which the fleet signs a Record.
const TypLedger = "application/edgekeep-ledger+cbor"

// Record is an entry of the bucket "ledger", by "tenant.instance": who may run an
// instance, and who might before. It changes by compare-and-set only, and with
// every change the entry's epoch goes up by one.
type Record struct {
	Entry    workload.Entry `cbor:"1,keyasint"` // its Nonce is empty
	Manifest []byte         `cbor:"2,keyasint"` // signed, of Entry.Bundle
	Moves    uint64         `cbor:"3,keyasint"` // since it was deployed
	Deploy   Order          `cbor:"4,keyasint"` // newest
	Recovery []byte         `cbor:"5,keyasint"` // the data owner's newest word, if there was any
	History  []Event        `cbor:"6,keyasint"` // one for each epoch, the current one last; at most 4096
}

// Order is the command that is to start an instance.
type Order struct {
	Gateway  string `cbor:"1,keyasint"`
	Sequence uint64 `cbor:"2,keyasint"`
	Command  []byte `cbor:"3,keyasint"` // SHA-256 of its message
	Epoch    uint64 `cbor:"4,keyasint"` // that it starts at
	Time     int64  `cbor:"5,keyasint"` // Unix seconds
}

// Event is what is remembered of an entry.
type Event struct {
	_       struct{} `cbor:",toarray"`
	Epoch   uint64
	Holder  string
	Line    uint64
	Owner   bool
	Attempt []byte
	By      string // gateway, "operator", "owner"
	Time    int64  // Unix seconds
}

const maxHistory = 4096

// Accepts reports whether a result counts that a gateway sealed under this epoch
// as this line: that it held the instance then, and that the line is after those
// of the epochs before and not after the last that the next epoch has taken over.
// What is older than the history does not count any more.
func (r Record) Accepts(gateway string, epoch, line uint64) bool {
	if len(r.History) == 0 || epoch == 0 || epoch > r.Entry.Epoch {
		return false
	}
	first := r.History[0]
	if epoch < first.Epoch {
		return false // nobody remembers who held it then
	}
	i := epoch - first.Epoch
	at := r.History[i]
	return at.Holder == gateway && line > at.Line && (i+1 == uint64(len(r.History)) || line <= r.History[i+1].Line)
}

// After is the last line of the epochs before this one; ok is false if that is not
// known any more.
func (r Record) After(epoch uint64) (line uint64, ok bool) {
	for _, e := range r.History {
		if e.Epoch == epoch {
			return e.Line, true
		}
	}
	return 0, false
}

// VerifyRecord verifies and decodes a record that the fleet signed.
func VerifyRecord(pub *ecdsa.PublicKey, msg []byte) (Record, error) {
	var r Record
	payload, err := cose.Verify1(pub, TypLedger, msg)
	if err == nil {
		err = cose.Unmarshal(payload, &r)
	}
	if err == nil && (len(r.History) == 0 || r.History[len(r.History)-1].Epoch != r.Entry.Epoch ||
		r.Entry.Epoch-r.History[0].Epoch != uint64(len(r.History)-1)) {
		err = errors.New("its history is not one")
	}
	if err != nil {
		return r, fmt.Errorf("ledger record: %w", err)
	}
	return r, nil
}

// advance makes e the current entry.
func (r *Record) advance(e workload.Entry, by string, now time.Time) {
	e.Nonce = nil
	if r.Entry.Epoch > 0 && e.Inputs == nil {
		e.Inputs = r.Entry.Inputs
	}
	if r.Entry.Epoch > 0 {
		e.Tenant = r.Entry.Tenant
	}
	r.Entry = e
	r.History = append(r.History, Event{
		Epoch: e.Epoch, Holder: e.Holder, Line: e.Line, Owner: e.Owner, Attempt: e.Attempt, By: by, Time: now.Unix(),
	})
	if n := len(r.History) - maxHistory; n > 0 {
		r.History = r.History[n:]
	}
}

// stop makes an entry after which nobody may run the instance. line is the last
// result that counts.
func (r *Record) stop(line uint64, by string, now time.Time) {
	r.advance(workload.Entry{
		Instance: r.Entry.Instance, Epoch: r.Entry.Epoch + 1, Bundle: r.Entry.Bundle, Line: max(line, r.Entry.Line),
	}, by, now)
}

func (f *Fleet) record(ctx context.Context, tenant, instance string) (Record, uint64, error) {
	if !workload.ValidInstance(instance) {
		return Record{}, 0, fmt.Errorf("not an instance's name: %.64q", instance)
	}
	r, revision, found, err := cloud.Get[Record](ctx, f.Bus.Ledger, cloud.Key(tenant, instance))
	if err == nil && !found {
		err = fmt.Errorf("there is no instance %s: `edgekeep workload ls` shows which there are", instance)
	}
	return r, revision, err
}

// claim answers a holder's compare-and-set. The answer is the entry that stands
// when it is done, signed over the claim: whoever asks knows by it whether it won,
// or had won before. A claim that is not allowed is refused, and changes nothing.
func (f *Fleet) claim(ctx context.Context, t mqtt.Topic, msg []byte) ([]byte, error) {
	tenant, err := f.Tenants.Tenant(t.Tenant)
	if err != nil {
		return nil, err
	}
	c, err := f.verifyClaim(ctx, tenant, t, msg)
	if err != nil {
		return nil, err
	}
	for range 20 {
		r, revision, err := f.record(ctx, t.Tenant, c.Instance)
		if err != nil {
			return nil, err
		}
		if r.Entry.Epoch != c.From || r.Entry.Holder != t.Gateway {
			return r.Entry.Sign(f.Key, msg) // it lost, or won before
		}
		moved, err := f.allowed(ctx, tenant, t.Gateway, r, c.Entry)
		if err != nil {
			return nil, err
		}
		stored, err := f.storedLine(ctx, t.Tenant, t.Gateway, c.Instance, c.From)
		if err != nil {
			return nil, err
		}
		if moved && c.Entry.Line < stored { // somebody may have acted on them
			return nil, fmt.Errorf("claim: it takes over line %d, but results up to line %d are stored", c.Entry.Line, stored)
		}
		c.Entry.Line = max(c.Entry.Line, stored)
		if c.Entry.Tenant != t.Tenant || !bytes.Equal(c.Entry.Inputs, r.Entry.Inputs) {
			return nil, errors.New("claim: it is about another tenant's instance, or other inputs")
		}
		if moved {
			r.Moves++
		}
		c.Entry.Line = max(c.Entry.Line, r.Entry.Line)
		r.advance(c.Entry, t.Gateway, f.Now())
		err = cloud.Put(ctx, f.Bus.Ledger, cloud.Key(t.Tenant, c.Instance), r, revision)
		if err == nil {
			f.Log.Info("ledger", "instance", t.Tenant+"/"+c.Instance, "epoch", r.Entry.Epoch, "holder", r.Entry.Holder, "by", t.Gateway)
			return r.Entry.Sign(f.Key, msg)
		}
		if !errors.Is(err, cloud.ErrConflict) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("instance %s: %w, again and again", c.Instance, cloud.ErrConflict)
}

// verifyClaim checks that a usable verdict vouches for the key that signed it.
func (f *Fleet) verifyClaim(ctx context.Context, tenant cloud.Tenant, t mqtt.Topic, msg []byte) (workload.Claim, error) {
	_, kid, err := workload.PeekClaim(msg)
	if err != nil {
		return workload.Claim{}, err
	}
	v, err := f.usable(ctx, tenant, t.Gateway)
	if err != nil {
		return workload.Claim{}, errors.Join(err, f.askToAttest(ctx, t))
	}
	key, err := v.DataKey(kid)
	if err != nil {
		return workload.Claim{}, errors.Join(fmt.Errorf("claim: %w", err), f.askToAttest(ctx, t))
	}
	return workload.VerifyClaim(key, msg)
}

// usable returns a gateway's newest verdict, if it may be relied on.
func (f *Fleet) usable(ctx context.Context, tenant cloud.Tenant, gateway string) (attest.Verdict, error) {
	_, v, err := f.latest(ctx, tenant, gateway)
	if err == nil {
		err = v.Usable(tenant.Tenant+"/"+gateway, tenant.Tenant, f.Now())
	}
	return v, err
}

// allowed says whether a holder may replace its entry by this one, and whether
// that is a move.
func (f *Fleet) allowed(ctx context.Context, t cloud.Tenant, holder string, r Record, n workload.Entry) (moved bool, err error) {
	switch {
	case !bytes.Equal(n.Bundle, r.Entry.Bundle):
		return false, errors.New("claim: an instance's bundle does not change")
	case n.Holder != "" && n.Line < r.Entry.Line: // who stops may have written nothing yet
		return false, fmt.Errorf("claim: line %d is before %d, which the entry has taken over", n.Line, r.Entry.Line)
	case n.Owner:
		return false, errors.New("claim: it is not the data owner's word")
	case n.Holder == "" || n.Holder == holder:
		return false, nil
	case len(n.Attempt) == 0 || len(n.Head) == 0:
		return false, errors.New("claim: a move has an attempt and a head")
	}
	m, err := workload.PeekManifest(r.Manifest)
	if err != nil {
		return false, err
	}
	if r.Moves >= m.Moves {
		return false, fmt.Errorf("claim: the instance has moved %d times, its manifest allows no more", r.Moves)
	}
	receive, err := f.target(ctx, t, m, n.Holder)
	if err != nil {
		return false, err
	}
	if !bytes.Equal(n.Receive, receive) {
		return false, fmt.Errorf("claim: the verdict on %s names another receiving key", n.Holder)
	}
	return true, nil
}

// target checks that an instance may go to a gateway, and returns the id of its
// receiving key.
func (f *Fleet) target(ctx context.Context, t cloud.Tenant, m workload.Manifest, gateway string) ([]byte, error) {
	if !attest.ValidName(gateway) || !m.Allows(gateway) {
		return nil, fmt.Errorf("the manifest does not allow %.64q", gateway)
	}
	if _, err := f.gateway(ctx, t.Tenant, gateway); err != nil {
		return nil, err
	}
	v, err := f.usable(ctx, t, gateway)
	if err != nil {
		return nil, fmt.Errorf("gateway %s: %w", gateway, err)
	}
	if err := m.Assured(v.Assurance); err != nil {
		return nil, fmt.Errorf("gateway %s: %w", gateway, err)
	}
	key, err := cose.UnmarshalHPKEKey(v.Keys[attest.PurposeReceive])
	if err != nil {
		return nil, fmt.Errorf("gateway %s: its verdict names no receiving key: %w", gateway, err)
	}
	return cose.HPKEKeyID(key), nil
}

// deployment is a command workload-deploy, checked.
type deployment struct {
	gateway  string
	body     workload.Deploy
	manifest workload.Manifest
	order    Order
}

// checkDeploy checks what the operator sends. The keep checks it again.
func (f *Fleet) checkDeploy(ctx context.Context, t cloud.Tenant, gateway string, c message.Command, msg []byte) (deployment, error) {
	d := deployment{gateway: gateway}
	if err := cose.Unmarshal(c.Body, &d.body); err != nil {
		return d, fmt.Errorf("the command's body: %w", err)
	}
	var err error
	if d.manifest, err = workload.VerifyManifest(t.Operator, d.body.Manifest); err != nil {
		return d, err
	}
	sum := sha256.Sum256(msg)
	d.order = Order{Gateway: gateway, Sequence: c.Sequence, Command: sum[:], Time: f.Now().Unix()}
	switch {
	case d.body.Instance != c.Args["instance"] || !workload.ValidInstance(d.body.Instance):
		return d, errors.New("the command's body is about another instance")
	case !d.manifest.Allows(gateway):
		return d, fmt.Errorf("the manifest does not allow %s: its nodes are %v", gateway, d.manifest.Nodes)
	case len(d.body.Inputs) != len(d.manifest.Input.Streams):
		return d, fmt.Errorf("the manifest has %d input streams, the command %d", len(d.manifest.Input.Streams), len(d.body.Inputs))
	}
	for _, s := range d.body.Inputs {
		if !attest.ValidName(s.Gateway) || !attest.ValidName(s.Stream) {
			return d, fmt.Errorf("not a stream: %.64q of %.64q", s.Stream, s.Gateway)
		}
	}
	return d, f.complete(ctx, t.Tenant, d.manifest.Content)
}

// enter makes the entry that a deployment starts at, once for each command.
func (f *Fleet) enter(ctx context.Context, tenant string, d deployment) error {
	_, err := cloud.Change(ctx, f.Bus.Ledger, cloud.Key(tenant, d.body.Instance), func(r *Record, found bool) error {
		bundle := workload.ID(d.body.Manifest)
		if found && r.Entry.Holder != "" {
			switch {
			case r.Entry.Holder == d.gateway && bytes.Equal(r.Deploy.Command, d.order.Command):
				return nil // entered before
			case r.Entry.Owner && r.Entry.Holder == d.gateway && bytes.Equal(r.Entry.Bundle, bundle) && r.Deploy.Epoch < r.Entry.Epoch:
				d.order.Epoch = r.Entry.Epoch // what the data owner's word was for
				r.Deploy = d.order
				return nil
			}
			if void, err := f.void(ctx, tenant, *r); err != nil || !void {
				return errors.Join(err, fmt.Errorf("instance %s is run by %s: stop it first", d.body.Instance, r.Entry.Holder))
			}
		}
		d.order.Epoch = r.Entry.Epoch + 1
		r.Manifest, r.Moves, r.Deploy = d.body.Manifest, 0, d.order
		r.advance(workload.Entry{
			Instance: d.body.Instance, Epoch: d.order.Epoch, Holder: d.gateway, Bundle: bundle, Line: r.Entry.Line,
			Tenant: tenant, Inputs: workload.InputsHash(d.body.Inputs),
		}, "operator", f.Now())
		return nil
	})
	return err
}

// void reports whether the current entry was made for a command that never
// reached its keep, or that it refused: it runs nothing.
func (f *Fleet) void(ctx context.Context, tenant string, r Record) (bool, error) {
	o := r.Deploy
	if o.Epoch != r.Entry.Epoch || r.Entry.Owner {
		return false, nil
	}
	q, err := f.queue(ctx, tenant, o.Gateway)
	if err != nil {
		return false, err
	}
	for _, p := range q.Pending {
		if sum := sha256.Sum256(p.Message); bytes.Equal(sum[:], o.Command) {
			return false, nil
		}
	}
	for _, res := range q.Results {
		if bytes.Equal(res.Result.Command, o.Command) {
			return !res.Result.Done, nil
		}
	}
	if len(q.Results) == maxResults && q.Results[0].Sequence > o.Sequence {
		return false, nil // its result may be forgotten
	}
	// It may be on its way into the queue.
	return f.Now().Unix() > o.Time+60, nil
}

// undo stops an instance whose command was not queued, or was refused by the
// keep.
func (f *Fleet) undo(ctx context.Context, tenant, instance string, command []byte) error {
	other := errors.New("another command's")
	_, err := cloud.Change(ctx, f.Bus.Ledger, cloud.Key(tenant, instance), func(r *Record, found bool) error {
		if !found || !bytes.Equal(r.Deploy.Command, command) || r.Deploy.Epoch != r.Entry.Epoch || r.Entry.Holder == "" {
			return other
		}
		if r.Entry.Owner { // the word still stands: another command may follow it
			r.Deploy = Order{}
			return nil
		}
		r.stop(r.Entry.Line, "operator", f.Now())
		return nil
	})
	if errors.Is(err, other) {
		return nil
	}
	return err
}

package fleet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"edgekeep/cloud"
	"edgekeep/mqtt"
	"edgekeep/tee/message"
)

// Queue is an entry of the bucket "commands": what waits for one gateway, and
// the newest results.
type Queue struct {
	Last    uint64    `cbor:"1,keyasint"` // newest sequence ever queued
	Pending []Pending `cbor:"2,keyasint"`
	Results []Outcome `cbor:"3,keyasint"`
	Attest  bool      `cbor:"4,keyasint"` // challenge at the next pull
}

// Pending is a command on its way.
type Pending struct {
	Sequence uint64 `cbor:"1,keyasint"`
	Message  []byte `cbor:"2,keyasint"`
	Attest   bool   `cbor:"3,keyasint"`
	Instance string `cbor:"4,keyasint,omitempty"` // that is to be deployed
}

// Outcome is a signed result and what it was about.
type Outcome struct {
	Sequence uint64         `cbor:"1,keyasint"`
	Message  []byte         `cbor:"2,keyasint"` // COSE_Sign1 by the epoch key
	Result   message.Result `cbor:"3,keyasint"`
}

const (
	maxQueue      = 64
	maxQueueBytes = 512 << 10 // of commands that wait: they are one entry of a bucket
	maxResults    = 32
)

func (f *Fleet) queue(ctx context.Context, tenant, gateway string) (Queue, error) {
	q, _, _, err := cloud.Get[Queue](ctx, f.Bus.Commands, cloud.Key(tenant, gateway))
	return q, err
}

func (f *Fleet) changeQueue(ctx context.Context, tenant, gateway string, change func(*Queue) error) error {
	_, err := cloud.Change(ctx, f.Bus.Commands, cloud.Key(tenant, gateway), func(q *Queue, _ bool) error { return change(q) })
	return err
}

// enqueue takes an operator's command. The keep checks it again.
func (f *Fleet) enqueue(ctx context.Context, tenant string, msg []byte) (message.Command, error) {
	t, err := f.Tenants.Tenant(tenant)
	if err != nil {
		return message.Command{}, err
	}
	c, err := message.VerifyCommand(t.Operator, msg)
	if err != nil {
		return c, err
	}
	top, err := mqtt.ParseSubject("ek1." + dotted(c.Audience) + ".down.item")
	if err != nil || top.Tenant != tenant {
		return c, fmt.Errorf("the command is for %.64q, not for a gateway of %s", c.Audience, tenant)
	}
	if _, err := f.gateway(ctx, tenant, top.Gateway); err != nil {
		return c, err
	}
	pending := Pending{Sequence: c.Sequence, Message: msg, Attest: c.Name == message.AttestNow}
	var d deployment
	if c.Name == message.WorkloadDeploy {
		if d, err = f.checkDeploy(ctx, t, top.Gateway, c, msg); err != nil {
			return c, err
		}
		pending.Instance = d.body.Instance
	}
	err = f.changeQueue(ctx, tenant, top.Gateway, func(q *Queue) error {
		if err := message.CheckCommand(c, c.Audience, q.Last, f.Now()); err != nil {
			return err
		}
		size := len(msg)
		for _, p := range q.Pending {
			size += len(p.Message)
		}
		if len(q.Pending) >= maxQueue || size > maxQueueBytes {
			return fmt.Errorf("%d commands wait for this gateway already", len(q.Pending))
		}
		if pending.Instance != "" { // the ledger first: who has the command has an entry
			if err := f.enter(ctx, tenant, d); err != nil {
				return err
			}
		}
		q.Last = c.Sequence
		q.Pending = append(q.Pending, pending)
		return nil
	})
	if err != nil {
		if pending.Instance != "" {
			err = errors.Join(err, f.undo(ctx, tenant, pending.Instance, d.order.Command))
		}
		return c, err
	}
	f.Notify(tenant, top.Gateway)
	return c, nil
}

func dotted(subject string) string {
	b := []byte(subject)
	for i := range b {
		switch b[i] {
		case '/':
			b[i] = '.'
		case '.':
			b[i] = '/' // no level may hold a dot: this fails to parse
		}
	}
	return string(b)
}

// result takes a gateway's signed answer to a command.
func (f *Fleet) result(ctx context.Context, t mqtt.Topic, data []byte) error {
	tenant, err := f.Tenants.Tenant(t.Tenant)
	if err != nil {
		return err
	}
	if _, err := f.gateway(ctx, t.Tenant, t.Gateway); err != nil {
		return err
	}
	_, v, err := f.latest(ctx, tenant, t.Gateway)
	if err != nil {
		return err
	}
	if err := v.Usable(t.Tenant+"/"+t.Gateway, t.Tenant, f.Now()); err != nil {
		return err
	}
	keys, err := v.DataKeys()
	if err != nil {
		return err
	}
	var r message.Result
	err = errors.New("no key")
	for _, k := range keys {
		if r, err = message.VerifyResult(k, data); err == nil {
			break
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("result: no key that the verdict vouches for has signed it: %w", err), f.askToAttest(ctx, t))
	}
	if r.Subject != t.Tenant+"/"+t.Gateway {
		return fmt.Errorf("result: it is of %s", r.Subject)
	}
	more, deployed := false, ""
	err = f.changeQueue(ctx, t.Tenant, t.Gateway, func(q *Queue) error {
		i := 0
		for i < len(q.Pending) && !answers(r, q.Pending[i]) {
			i++
		}
		if i == len(q.Pending) {
			return errNotWaited
		}
		sequence := q.Pending[i].Sequence
		deployed = q.Pending[i].Instance
		// A command is answered in order; what came before it was never accepted.
		q.Pending = append([]Pending(nil), q.Pending[i+1:]...)
		q.Results = append(q.Results, Outcome{Sequence: sequence, Message: data, Result: r})
		if n := len(q.Results); n > maxResults {
			q.Results = q.Results[n-maxResults:]
		}
		more = len(q.Pending) > 0
		return nil
	})
	if errors.Is(err, errNotWaited) {
		return nil // answered before
	}
	if err != nil {
		return err
	}
	if deployed != "" && !r.Done {
		if err := f.undo(ctx, t.Tenant, deployed, r.Command); err != nil {
			return err
		}
	}
	if r.Done {
		if _, err := cloud.Change(ctx, f.Bus.Gateways, cloud.Key(t.Tenant, t.Gateway), func(g *cloud.Gateway, found bool) error {
			if !found {
				return errNotWaited
			}
			g.Command = max(g.Command, r.Sequence)
			return nil
		}); err != nil && !errors.Is(err, errNotWaited) {
			return err
		}
	}
	if more {
		f.Notify(t.Tenant, t.Gateway)
	}
	return nil
}

var errNotWaited = errors.New("nobody waits for this")

// answers reports whether a result is the answer to a command. One that refuses
// may have no sequence: the keep could not read it.
func answers(r message.Result, p Pending) bool {
	sum := sha256.Sum256(p.Message)
	return string(r.Command) == string(sum[:]) && (r.Sequence == p.Sequence || r.Sequence == 0 && !r.Done)
}

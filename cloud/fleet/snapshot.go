package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"edgekeep/cloud"
	"edgekeep/cloud/keybroker"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// Snapshots is an entry of the bucket "snapshots", by "tenant.instance", and
// answers api.*.workload.snapshots: the newest checkpoints, signed by the keeps
// that made them, newest last.
type Snapshots struct {
	Signed [][]byte `cbor:"1,keyasint"`
}

// entry tells a gateway what the ledger says of an instance, over its nonce.
func (f *Fleet) entry(ctx context.Context, t mqtt.Topic, r message.AskedEntry) (message.Signed, error) {
	if len(r.Nonce) != message.NonceSize {
		return message.Signed{}, errors.New("a nonce has 32 bytes")
	}
	rec, _, err := f.record(ctx, t.Tenant, r.Instance)
	if err != nil {
		return message.Signed{}, err
	}
	msg, err := rec.Entry.Sign(f.Key, r.Nonce)
	return message.Signed{Message: msg}, err
}

// snapshot files a holder's word about a checkpoint whose blob is here.
func (f *Fleet) snapshot(ctx context.Context, t mqtt.Topic, msg []byte) error {
	tenant, err := f.Tenants.Tenant(t.Tenant)
	if err != nil {
		return err
	}
	_, kid, err := workload.PeekSnapshot(msg)
	if err != nil {
		return err
	}
	v, err := f.usable(ctx, tenant, t.Gateway)
	if err != nil {
		return err
	}
	key, err := cose.UnmarshalKey(v.Cnf.Key)
	if err != nil {
		return err
	}
	if !bytes.Equal(cose.Thumbprint(key), kid) {
		return errors.New("snapshot: the gateway's verdict does not vouch for the key that signed it")
	}
	s, err := workload.VerifySnapshot(key, msg)
	if err != nil {
		return err
	}
	rec, _, err := f.record(ctx, t.Tenant, s.Instance)
	if err != nil {
		return err
	}
	if s.Subject != t.Tenant+"/"+t.Gateway || rec.Entry.Holder != t.Gateway || rec.Entry.Epoch != s.Epoch {
		return fmt.Errorf("snapshot: %s does not hold instance %s at epoch %d", t.Gateway, s.Instance, s.Epoch)
	}
	if err := f.complete(ctx, t.Tenant, s.Blob); err != nil {
		return err
	}
	_, err = cloud.Change(ctx, f.Bus.Snapshots, cloud.Key(t.Tenant, s.Instance), func(all *Snapshots, _ bool) error {
		all.Signed = append(all.Signed, msg)
		if n := len(all.Signed); n > keptOfEach {
			all.Signed = all.Signed[n-keptOfEach:]
		}
		return nil
	})
	return err
}

func (f *Fleet) snapshots(ctx context.Context, subject string, r Instance) (Snapshots, error) {
	if !workload.ValidInstance(r.Instance) {
		return Snapshots{}, fmt.Errorf("not an instance's name: %.64q", r.Instance)
	}
	all, _, _, err := cloud.Get[Snapshots](ctx, f.Bus.Snapshots, cloud.Key(tenantOf(subject), r.Instance))
	return all, err
}

// recovery has the key broker give a checkpoint's key to the gateway that the data
// owner named.
func (f *Fleet) recovery(ctx context.Context, t mqtt.Topic, r message.AskedRecovery) (message.Signed, error) {
	rec, _, err := f.record(ctx, t.Tenant, r.Instance)
	if err != nil {
		return message.Signed{}, err
	}
	if !rec.Entry.Owner || rec.Entry.Holder != t.Gateway {
		return message.Signed{}, fmt.Errorf("no word of the data owner lets instance %s go on at %s", r.Instance, t.Gateway)
	}
	all, _, _, err := cloud.Get[Snapshots](ctx, f.Bus.Snapshots, cloud.Key(t.Tenant, r.Instance))
	if err != nil {
		return message.Signed{}, err
	}
	for _, msg := range all.Signed {
		if s, _, err := workload.PeekSnapshot(msg); err == nil && bytes.Equal(s.Head, rec.Entry.Head) {
			return cloud.Ask[message.Signed](ctx, f.Bus.NC, "svc.recovery", keybroker.RecoveryRequest{
				Tenant: t.Tenant, Gateway: t.Gateway, Verdict: r.Verdict, Word: rec.Recovery, Snapshot: msg,
			})
		}
	}
	return message.Signed{}, errors.New("the checkpoint is not here any more")
}

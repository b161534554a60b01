package keybroker

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"edgekeep/tee/message"
	"edgekeep/workload"
)

// RecoveryRequest asks for the key of a checkpoint, for the gateway that the data
// owner's word names.
type RecoveryRequest struct {
	Tenant   string `cbor:"1,keyasint"`
	Gateway  string `cbor:"2,keyasint"` // that asks, by its topic
	Verdict  []byte `cbor:"3,keyasint"` // its own
	Word     []byte `cbor:"4,keyasint"` // message.Recover, signed by the data owner
	Snapshot []byte `cbor:"5,keyasint"` // workload.Snapshot, signed by the keep that made it
}

// recovery gives a checkpoint's key on. The data owner's word is all the grant that
// it takes, and the gateway's verdict has to be good. The snapshot's signature is
// not looked at: its maker may be gone with its keys. What follows from a forged one
// is a key that opens nothing.
func (b *Broker) recovery(ctx context.Context, _ string, r RecoveryRequest) (message.Signed, error) {
	t, err := b.Tenants.Tenant(r.Tenant)
	if err != nil {
		return message.Signed{}, err
	}
	w, err := message.VerifyRecover(t.Owner, r.Word)
	if err != nil {
		return message.Signed{}, err
	}
	s, _, err := workload.PeekSnapshot(r.Snapshot)
	if err != nil {
		return message.Signed{}, err
	}
	if w.Tenant != t.Tenant || w.To != r.Gateway || w.Instance != s.Instance || !bytes.Equal(w.Checkpoint, s.Blob) || !bytes.Equal(w.Head, s.Head) {
		return message.Signed{}, errors.New("the data owner's word is about another checkpoint or gateway")
	}
	to, who, err := b.recipient(ctx, t, Request{Gateway: r.Gateway, Verdict: r.Verdict})
	if err != nil {
		return message.Signed{}, err
	}
	subject := t.Tenant + "/" + r.Gateway
	if who != subject {
		return message.Signed{}, fmt.Errorf("the recipient's verdict is about %.64q, but %s asks", who, subject)
	}
	data, err := b.Data(t.Tenant)
	if err != nil {
		return message.Signed{}, err
	}
	key, err := workload.OpenFrom(workload.PurposeSnapshot, workload.SnapshotContext(s.Subject, s.Instance, s.KeyID), s.Sealed, data)
	if err != nil {
		return message.Signed{}, err
	}
	defer clear(key)
	sealed, err := workload.SealTo(workload.PurposeRecovery, workload.RecoveryContext(s.Instance, s.Blob, s.Head), key, to)
	if err != nil {
		return message.Signed{}, err
	}
	msg, err := workload.Recovery{Instance: s.Instance, To: subject, Blob: s.Blob, Head: s.Head, Sealed: sealed}.Sign(b.Key)
	b.Log.Info("checkpoint's key released", "instance", s.Instance, "to", who)
	return message.Signed{Message: msg}, err
}

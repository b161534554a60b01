package client

import (
	"context"
	"crypto/hpke"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"edgekeep/cloud/fleet"
	"edgekeep/internal/cose"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// PutBundle stores a bundle's content and returns its id, which is the manifest's
// Content. An upload that broke off goes on where it was. progress, which may be
// nil, is told how many bytes of the content are stored.
func (c *Client) PutBundle(ctx context.Context, content []byte, progress func(done int)) (id []byte, err error) {
	list, err := message.BlobList(content)
	if err != nil {
		return nil, err
	}
	id = message.BlobID(list)
	n := message.Blocks(len(content))
	put := func(block int, data []byte) (int, error) {
		have, err := ask[message.Have](ctx, c, "blob.put", message.PutBlob{ID: id, Block: block, Data: data})
		if err != nil {
			return 0, fmt.Errorf("storing the bundle: %w", err)
		}
		if have.Next <= block || have.Next > n {
			return 0, fmt.Errorf("storing the bundle: the cloud does not take block %d", block)
		}
		return have.Next, nil
	}
	next, err := put(-1, list)
	for err == nil {
		if progress != nil {
			progress(min(next*message.BlockSize, len(content)))
		}
		if next == n {
			return id, nil
		}
		next, err = put(next, message.Block(content, next))
	}
	return nil, err
}

// DropBundle removes a stored bundle's content.
func (c *Client) DropBundle(ctx context.Context, id []byte) error {
	_, err := ask[fleet.None](ctx, c, "blob.rm", fleet.BlobName{ID: id})
	return err
}

// Deploy has a gateway run an instance of a bundle whose content is stored. It
// has the gateway attest, holds the verdict against the manifest, and seals the
// bundle key to the receiving key in it. inputs say where each of the manifest's
// streams comes from; nil: from that gateway.
func (c *Client) Deploy(ctx context.Context, gateway, instance string, manifest, key []byte, inputs []workload.Source) (message.Result, error) {
	m, err := workload.VerifyManifest(c.Roots.Operator, manifest)
	if err != nil {
		return message.Result{}, err
	}
	if !workload.ValidInstance(instance) {
		return message.Result{}, fmt.Errorf("%.64q cannot be an instance's name: 1 to 26 small letters, digits and hyphens", instance)
	}
	if !m.Allows(gateway) {
		return message.Result{}, fmt.Errorf("the manifest does not allow %s: its nodes are %v", gateway, m.Nodes)
	}
	if inputs == nil {
		for _, s := range m.Input.Streams {
			inputs = append(inputs, workload.Source{Gateway: gateway, Stream: s})
		}
	}
	subject := c.Tenant + "/" + gateway
	_, v, err := c.Attest(ctx, gateway)
	if err != nil {
		return message.Result{}, err
	}
	to, err := c.receivingKey(v, subject)
	if err != nil {
		return message.Result{}, err
	}
	if err := m.Assured(v.Assurance); err != nil {
		return message.Result{}, err
	}
	sealed, err := workload.SealTo(workload.PurposeBundle, workload.DeployContext(subject, instance, manifest), key, to)
	if err != nil {
		return message.Result{}, err
	}
	body, err := cose.Marshal(workload.Deploy{Instance: instance, Manifest: manifest, Key: sealed, Inputs: inputs})
	if err != nil {
		return message.Result{}, err
	}
	return c.command(ctx, gateway, message.Command{
		Name: message.WorkloadDeploy, Args: map[string]string{"instance": instance}, Body: body,
	})
}

// receivingKey is what may be sealed to, if the verdict is one to rely on.
func (c *Client) receivingKey(v attest.Verdict, subject string) (hpke.PublicKey, error) {
	if err := v.Usable(subject, c.Tenant, time.Now()); err != nil {
		return nil, err
	}
	key, err := cose.UnmarshalHPKEKey(v.Keys[attest.PurposeReceive])
	if err != nil {
		return nil, fmt.Errorf("the verdict on %s names no receiving key: %w", subject, err)
	}
	return key, nil
}

// Stop has the holder of an instance stop it. If the ledger says that the holder
// was revoked, or never got the instance, it is stopped there, and the result is
// empty but Done.
func (c *Client) Stop(ctx context.Context, instance string) (message.Result, error) {
	r, err := c.held(ctx, instance)
	if err != nil {
		return message.Result{}, err
	}
	if _, err := ask[fleet.None](ctx, c, "workload.stop", fleet.Instance{Instance: instance}); err == nil {
		return message.Result{Subject: c.Tenant + "/" + r.Entry.Holder, Done: true}, nil
	}
	return c.command(ctx, r.Entry.Holder, message.Command{
		Name: message.WorkloadStop, Args: map[string]string{"instance": instance},
	})
}

// Move has the holder of an instance move it to another gateway. The result says
// that the holder has begun: the ledger says when it is done.
func (c *Client) Move(ctx context.Context, instance, to string) (message.Result, error) {
	r, err := c.held(ctx, instance)
	if err != nil {
		return message.Result{}, err
	}
	if r.Entry.Holder == to {
		return message.Result{}, fmt.Errorf("instance %s is on %s already", instance, to)
	}
	return c.command(ctx, r.Entry.Holder, message.Command{
		Name: message.WorkloadMove, Args: map[string]string{"instance": instance, "to": to},
	})
}

func (c *Client) held(ctx context.Context, instance string) (fleet.Record, error) {
	r, err := c.Inspect(ctx, instance)
	if err == nil && r.Entry.Holder == "" {
		err = fmt.Errorf("instance %s is stopped", instance)
	}
	return r, err
}

// Workloads lists instances by name.
func (c *Client) Workloads(ctx context.Context) ([]fleet.View, error) {
	var out []fleet.View
	var page fleet.Page
	for {
		got, err := ask[fleet.Instances](ctx, c, "workload.ls", page)
		if err != nil {
			return nil, err
		}
		out = append(out, got.Views...)
		if !got.More || len(got.Views) == 0 {
			return out, nil
		}
		page.After = got.Views[len(got.Views)-1].Entry.Instance
	}
}

// Inspect returns an instance's record in the ledger, signed by the fleet and
// verified with the kit's roots.
func (c *Client) Inspect(ctx context.Context, instance string) (fleet.Record, error) {
	s, err := ask[fleet.Signed](ctx, c, "data.ledger", fleet.Instance{Instance: instance})
	if err != nil {
		return fleet.Record{}, err
	}
	r, err := fleet.VerifyRecord(c.Roots.Fleet, s.Message)
	if err == nil && r.Entry.Instance != instance {
		err = fmt.Errorf("the cloud sent the record of instance %.64q", r.Entry.Instance)
	}
	return r, err
}

// Recover has a lost instance go on elsewhere from a checkpoint, by the word of
// the data owner whose kit owner is. Deploy to the same gateway then starts it.
func (c *Client) Recover(ctx context.Context, owner *Kit, instance, to string, checkpoint, head []byte) error {
	key, err := owner.Signer("owner.key")
	if err != nil {
		return err
	}
	r, err := c.Inspect(ctx, instance)
	if err != nil {
		return err
	}
	msg, err := message.Recover{
		Tenant: c.Tenant, Instance: instance, From: r.Entry.Epoch, To: to, Checkpoint: checkpoint, Head: head, Issued: time.Now().Unix(),
	}.Sign(key)
	if err != nil {
		return err
	}
	_, err = ask[fleet.None](ctx, c, "workload.recover", fleet.Signed{Message: msg})
	return err
}

// Inference is the verified result of a request, and what vouched for who gave it.
type Inference struct {
	Output   []byte
	Response workload.Response
	Verdict  attest.Verdict // the request was sealed to a key in it
}

// vouchedFor is a verdict that requests are sealed by for a while.
type vouchedFor struct {
	verdict attest.Verdict
	got     time.Time
}

const (
	verdictLife = time.Minute
	requestID   = 16
)

// Infer puts a batch to an instance and returns its result. Only the gateway's
// keep, as a verdict at most a minute old describes it, can open the input, and
// the result is sealed to a key of this request.
func (c *Client) Infer(ctx context.Context, gateway, instance string, input []byte) (Inference, error) {
	for {
		v, kept, err := c.vouched(ctx, gateway)
		if err != nil {
			return Inference{}, err
		}
		out, err := c.inferUnder(ctx, v, gateway, instance, input)
		if errors.Is(err, errRenew) && kept { // the keep may have been restarted since
			c.mu.Lock()
			delete(c.verdicts, gateway)
			c.mu.Unlock()
			continue
		}
		return out, err
	}
}

// errRenew means that an answer came which is no result, and that it may be for the
// verdict. Any other refusal is the keep's last word: the request was taken, and must
// not be taken twice.
var errRenew = errors.New("no result")

// vouched returns a verdict on a gateway, one that was used before if it is young
// enough.
func (c *Client) vouched(ctx context.Context, gateway string) (v attest.Verdict, kept bool, err error) {
	c.mu.Lock()
	k, ok := c.verdicts[gateway]
	c.mu.Unlock()
	if ok && time.Since(k.got) < verdictLife && time.Now().Unix() < k.verdict.Expires {
		return k.verdict, true, nil
	}
	s, err := ask[fleet.Saved](ctx, c, "data.attest", fleet.Vouch{Gateway: gateway})
	if err != nil {
		return v, false, err
	}
	if v, err = attest.VerifyVerdict(c.Roots.Verifier, s.Verdict); err != nil {
		return v, false, err
	}
	if age := time.Since(time.Unix(v.IssuedAt, 0)); age > 2*verdictLife {
		return v, false, fmt.Errorf("the cloud sent a verdict from %s ago on %s, or the clocks here and there differ", age.Round(time.Second), gateway)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.verdicts == nil || len(c.verdicts) >= 4096 {
		c.verdicts = map[string]vouchedFor{}
	}
	c.verdicts[gateway] = vouchedFor{v, time.Now()}
	return v, false, nil
}

// replyKey is the key for the result: a consumer's own, with the data owner's grant
// for it, if the kit has both; else a fresh one, which gets answers from workloads
// only that read no streams.
func (c *Client) replyKey() (hpke.PrivateKey, []byte, error) {
	grant, err := os.ReadFile(filepath.Join(c.Dir, "grant.cbor"))
	if errors.Is(err, os.ErrNotExist) {
		key, err := hpke.MLKEM768P256().GenerateKey()
		return key, nil, err
	}
	if err != nil {
		return nil, nil, fmt.Errorf("the kit's grant: %w", err)
	}
	key, err := c.ConsumerKey()
	return key, grant, err
}

func (c *Client) inferUnder(ctx context.Context, v attest.Verdict, gateway, instance string, input []byte) (Inference, error) {
	subject := c.Tenant + "/" + gateway
	to, err := c.receivingKey(v, subject)
	if err != nil {
		return Inference{}, err
	}
	signer, err := cose.UnmarshalKey(v.Cnf.Key)
	if err != nil {
		return Inference{}, err
	}
	key, grant, err := c.replyKey()
	if err != nil {
		return Inference{}, err
	}
	r := workload.Request{Input: input, Reply: cose.MarshalHPKEKey(key.PublicKey()), ID: make([]byte, requestID), Grant: grant}
	rand.Read(r.ID) // never fails
	sealed, err := r.Seal(subject, instance, v.Nonce, to)
	if err != nil {
		return Inference{}, err
	}
	got, err := ask[fleet.Inferred](ctx, c, "data.infer", fleet.Infer{
		Gateway: gateway, Asked: workload.Asked{Instance: instance, Nonce: v.Nonce, Sealed: sealed},
	})
	if err != nil {
		return Inference{}, err
	}
	out, rsp, err := workload.OpenResponse(signer, subject, instance, sealed, got.Data, key)
	if err != nil && (rsp.Error == "" || strings.HasSuffix(rsp.Error, workload.NewerVerdict)) {
		return Inference{}, fmt.Errorf("%w: %w", errRenew, err)
	}
	if err != nil {
		return Inference{}, err
	}
	return Inference{Output: out, Response: rsp, Verdict: v}, nil
}

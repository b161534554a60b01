package keep

import (
	"bytes"
	"crypto/hpke"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// Bounds of inference.
const (
	maxAnswered = 16      // challenges whose verdicts may name our receiving key to clients
	maxRequests = 1 << 16 // requests under one challenge: their hashes are remembered
	maxInfer    = 32      // of one instance, under way
)

// answeredChallenge is a challenge that this keep answered, and the requests that
// it took under it.
type answeredChallenge struct {
	nonce string
	taken map[string]struct{}
}

// noteChallenge remembers a challenge that was answered. The oldest is forgotten:
// clients have newer verdicts by then.
func (k *Keep) noteChallenge(nonce []byte) {
	k.answered = append(k.answered, answeredChallenge{nonce: string(nonce), taken: map[string]struct{}{}})
	if n := len(k.answered); n > maxAnswered {
		k.answered = append([]answeredChallenge(nil), k.answered[n-maxAnswered:]...)
	}
}

// takeRequest lets a request through once.
func (k *Keep) takeRequest(nonce, hash []byte) error {
	for _, a := range k.answered {
		if a.nonce != string(nonce) {
			continue
		}
		if _, again := a.taken[string(hash)]; again {
			return errors.New("this request was taken before")
		}
		if len(a.taken) >= maxRequests {
			return errors.New("too many requests under this verdict" + workload.NewerVerdict)
		}
		a.taken[string(hash)] = struct{}{}
		return nil
	}
	return errors.New("the request goes by a verdict on evidence that this keep has not given since it started, or long ago" + workload.NewerVerdict)
}

// request takes an inference request.
func (k *Keep) request(e workload.Envelope) error {
	a, err := workload.Body[workload.Asked](e)
	if err != nil {
		return err
	}
	if len(a.ID) == 0 || len(a.ID) > 64 || !workload.ValidInstance(a.Instance) {
		return errors.New("a request without an id or an instance")
	}
	r := workload.Response{Subject: k.subject(), Instance: a.Instance, Request: workload.RequestHash(a.Sealed)}
	to, err := k.infer(a, &r)
	if err != nil {
		r.Error = cut(err.Error(), 512)
		k.reply(a.ID, r, nil, to)
	}
	return nil
}

// infer opens a request and gives it to the instance's runner.
func (k *Keep) infer(a workload.Asked, r *workload.Response) (hpke.PublicKey, error) {
	i, ok := k.st.Instances[a.Instance]
	if !ok || i.Phase != phaseLive {
		return nil, fmt.Errorf("no instance %s runs here", a.Instance)
	}
	if err := k.takeRequest(a.Nonce, r.Request); err != nil {
		return nil, err
	}
	key, err := k.receiveKey(k.st)
	if err != nil {
		return nil, err
	}
	req, to, err := workload.OpenRequest(k.subject(), a.Instance, a.Nonce, a.Sealed, key)
	if err != nil {
		return nil, err
	}
	if len(i.Inputs) > 0 {
		if err := k.mayRead(req.Grant, to); err != nil {
			return to, err
		}
	}
	r.Epoch, r.Module = i.Epoch, workload.ID(i.Manifest)
	return to, k.workloads.infer(a.Instance, req.Input, func(got tee.Inferred) {
		out := *r
		out.Error = cut(got.Error, 512)
		k.reply(a.ID, out, got.Output, to)
	})
}

// mayRead says why whoever holds a key may not read the tenant's data, or nil.
// What an instance says that reads streams may tell what was in them, and who may
// read that is for the data owner to say.
func (k *Keep) mayRead(grant []byte, to hpke.PublicKey) error {
	if len(grant) == 0 {
		return errors.New("this workload reads streams: its answers are for a consumer whom the data owner has granted reading, and the request shows no grant")
	}
	g, err := message.VerifyGrant(k.roots.Owner, grant)
	if err != nil {
		return err
	}
	now, err := k.cloudTime()
	if err != nil {
		return err
	}
	granted, err := cose.UnmarshalHPKEKey(g.Key)
	switch {
	case err != nil || g.Gateway || g.Tenant != k.st.Tenant || !bytes.Equal(cose.HPKEKeyID(granted), cose.HPKEKeyID(to)):
		return errors.New("the data owner's grant is for another key than the one that the result is to be sealed to")
	case g.Expires != 0 && now.Unix() >= g.Expires:
		return errors.New("the data owner's grant has expired")
	}
	return nil
}

// reply seals a result to whoever asked, signs it, and sends it. It needs the
// epoch key only, and no lock.
func (k *Keep) reply(id []byte, r workload.Response, output []byte, to hpke.PublicKey) {
	var err error
	if len(output) > workload.MaxInput {
		r.Error = fmt.Sprintf("the result has %d bytes, at most %d fit", len(output), workload.MaxInput)
	}
	if r.Error == "" {
		r.Sealed, err = workload.SealTo(workload.PurposeResult, r.Request, output, to)
	}
	var msg []byte
	if err == nil {
		msg, err = r.Sign(k.epochKey)
	}
	if err != nil {
		k.log.Error("a result could not be sealed", "instance", r.Instance, "err", err)
		return
	}
	q := tee.Question{Kind: message.AskReply, Body: cose.MustMarshal(message.Reply{ID: id, Data: msg})}
	k.workloads.doAsync(tee.JobAsk, q)
}

// infer gives a batch to an instance's runner; done is called once, without the
// keep's lock, perhaps under the lock of workloads.
func (w *workloads) infer(name string, input []byte, done func(tee.Inferred)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.run[name]
	switch {
	case st == nil || st.runner == nil || !st.report.Running:
		return fmt.Errorf("instance %s is not running now", name)
	case len(st.infer) >= maxInfer:
		return fmt.Errorf("%d requests are under way already", maxInfer)
	}
	w.nextJob++
	st.infer[w.nextJob] = done
	w.send(st.runner, tee.KindInfer, tee.Infer{ID: w.nextJob, Input: input}, len(input)+64)
	return nil
}

// doAsync is do for callers that may hold the lock of workloads.
func (w *workloads) doAsync(kind string, body any) {
	go w.do("", kind, body, func(tee.JobDone) {})
}

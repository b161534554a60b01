package keep

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// deliver takes an item that the fleet sent over one of our nonces.
func (k *Keep) deliver(r tee.Deliver) (tee.Outcome, error) {
	switch k.phase {
	case tee.PhaseEnrolled:
		item, err := message.VerifyItem(k.roots.Fleet, r.Item)
		if err != nil {
			return tee.Outcome{}, err
		}
		a, err := k.useNonce(item.Nonce)
		if err != nil {
			return tee.Outcome{}, err
		}
		if a.enrol != nil {
			return k.deliverBoot(item, a)
		}
		return k.deliverItem(item)
	case tee.PhaseNew, tee.PhaseLocked:
		return k.deliverUnknown(r.Item)
	}
	return tee.Outcome{}, fmt.Errorf("the keep is %s: it needs Start first", k.phase)
}

// deliverUnknown takes an item while the fleet's key is not in the state: the
// roots come with the item, and count only if they have the configured digest.
func (k *Keep) deliverUnknown(msg []byte) (tee.Outcome, error) {
	item, err := message.PeekItem(msg)
	if err != nil {
		return tee.Outcome{}, err
	}
	if len(item.Roots) == 0 {
		return tee.Outcome{}, fmt.Errorf("the cloud says: %s", printable(item.Reason))
	}
	sum := sha256.Sum256(item.Roots)
	if !bytes.Equal(sum[:], k.cfg.RootsDigest) {
		return tee.Outcome{}, fmt.Errorf("the cloud's trust roots are %x…, this keep is configured for %x…: it is not our cloud, or the configuration is of another one",
			sum[:8], k.cfg.RootsDigest[:8])
	}
	roots, err := attest.ParseRoots(item.Roots)
	if err != nil {
		return tee.Outcome{}, err
	}
	if item, err = message.VerifyItem(roots.Fleet, msg); err != nil {
		return tee.Outcome{}, err
	}
	a, err := k.useNonce(item.Nonce)
	if err != nil {
		return tee.Outcome{}, err
	}
	k.roots = roots
	return k.deliverBoot(item, a)
}

// deliverBoot goes on with an enrolment, or with a round of attestation over the
// boot topics.
func (k *Keep) deliverBoot(item message.Item, a asked) (tee.Outcome, error) {
	switch {
	case item.Credential != nil:
		return k.activate(item, a)
	case item.Verdict == nil:
		return tee.Outcome{}, fmt.Errorf("the cloud says: %s", printable(item.Reason))
	}
	v, err := attest.VerifyVerdict(k.roots.Verifier, item.Verdict)
	if err != nil {
		return tee.Outcome{}, err
	}
	if s := k.subject(); s != "" && item.Subject != s {
		return tee.Outcome{}, fmt.Errorf("the delivery is for %q, this is %s", printable(item.Subject), s)
	}
	usable := v.Usable(item.Subject, k.roots.Tenant, time.Unix(item.Time, 0)) == nil
	if !usable || len(item.Certificate) == 0 {
		return tee.Outcome{Verdict: item.Verdict}, nil
	}
	if !bytes.Equal(v.Cnf.Key, cose.MarshalKey(&k.epochKey.PublicKey)) {
		return tee.Outcome{}, errors.New("the verdict is about another keep")
	}
	out := tee.Outcome{Verdict: item.Verdict, Certificate: item.Certificate, Pull: true}
	if k.phase != tee.PhaseNew {
		return out, nil
	}
	tenant, gateway, ok := strings.Cut(item.Subject, "/")
	if !ok || tenant != k.roots.Tenant || !attest.ValidName(gateway) {
		return tee.Outcome{}, fmt.Errorf("the cloud enrolled this gateway under the name %q", printable(item.Subject))
	}
	next := k.st
	next.Tenant, next.Gateway, next.Roots = tenant, gateway, item.Roots
	return k.step(next, func() (tee.Outcome, error) {
		k.phase, k.reason = tee.PhaseEnrolled, ""
		k.sealer.begin(beginning{subject: k.subject(), data: k.roots.Data, epoch: k.st.Epoch})
		k.adoptInstances()
		k.log.Info("enrolled", "gateway", k.subject())
		return out, nil
	})
}

// activate opens the credential and answers with evidence, which proves that AK
// and EK are of one TPM and what this machine booted.
func (k *Keep) activate(item message.Item, a asked) (tee.Outcome, error) {
	if a.enrol == nil {
		return tee.Outcome{}, errors.New("a credential that was not asked for")
	}
	secret, err := k.ident.ak.Activate(item.Credential.Blob, item.Credential.Secret)
	if err != nil {
		return tee.Outcome{}, err
	}
	evidence, err := k.evidence(item.Challenge)
	if err != nil {
		return tee.Outcome{}, err
	}
	return tee.Outcome{Publish: []tee.Message{{Kind: "activate", Data: message.Encode(message.Activate{
		EK: k.ek.Public, EKCert: k.ek.Cert, AK: k.ident.ak.Public(),
		Enrol: a.enrol, Evidence: evidence, Proof: message.Proof(secret, evidence),
		Nonce: k.newNonce(a.enrol),
	})}}}, nil
}

// deliverItem takes what an enrolled gateway pulled.
func (k *Keep) deliverItem(item message.Item) (tee.Outcome, error) {
	if item.Subject != k.subject() {
		return tee.Outcome{}, fmt.Errorf("the delivery is for %q, this is %s", printable(item.Subject), k.subject())
	}
	out := tee.Outcome{Certificate: item.Certificate}
	k.learn(item)
	if item.Verdict != nil {
		if _, err := attest.VerifyVerdict(k.roots.Verifier, item.Verdict); err != nil {
			return tee.Outcome{}, err
		}
		out.Verdict = item.Verdict
	}
	if item.Command != nil {
		return k.command(item, out)
	}
	return k.answerChallenge(item.Challenge, out)
}

func (k *Keep) answerChallenge(challenge []byte, out tee.Outcome) (tee.Outcome, error) {
	if challenge == nil {
		return out, nil
	}
	ev, err := k.evidence(challenge)
	if err != nil {
		return tee.Outcome{}, err
	}
	out.Publish = append(out.Publish, tee.Message{Kind: "evidence", Data: ev})
	return out, nil
}

// command checks a command and, if it is accepted, takes the irreversible step
// that makes its sequence used, together with its result and its effect.
func (k *Keep) command(item message.Item, out tee.Outcome) (tee.Outcome, error) {
	sum := sha256.Sum256(item.Command)
	res := message.Result{Subject: k.subject(), Command: sum[:]}
	c, err := message.VerifyCommand(k.roots.Operator, item.Command)
	if err == nil {
		res.Sequence = c.Sequence
		if done := k.st.Result; done != nil && c.Sequence == k.st.Command && bytes.Equal(done.Command, sum[:]) {
			return k.answerCommand(*done, item.Challenge, out) // delivered again: the same answer
		}
		err = message.CheckCommand(c, k.subject(), k.st.Command, time.Unix(item.Time, 0))
	}
	if err != nil {
		res.Reason = cut(err.Error(), 512)
		k.log.Warn("command refused", "sequence", res.Sequence, "reason", res.Reason)
		return k.answerCommand(res, item.Challenge, out)
	}
	next := k.st
	effect, err := k.execute(c, item, &next, &res)
	if err != nil { // it was the command's turn, and it cannot be done: that is its answer
		next, effect, res.Reason = k.st, func() {}, cut(err.Error(), 512)
	}
	res.Done = err == nil
	next.Command, next.Result = c.Sequence, &res
	return k.step(next, func() (tee.Outcome, error) {
		effect()
		k.log.Info("command accepted", "sequence", c.Sequence, "name", c.Name)
		return k.answerCommand(res, item.Challenge, out)
	})
}

func (k *Keep) answerCommand(res message.Result, challenge []byte, out tee.Outcome) (tee.Outcome, error) {
	msg, err := res.Sign(k.epochKey)
	if err != nil {
		return tee.Outcome{}, err
	}
	out.Publish = append(out.Publish, tee.Message{Kind: "result", Data: msg})
	return k.answerChallenge(challenge, out)
}

// execute prepares a command's effect on the state and returns what is to be
// done once the state is durable.
func (k *Keep) execute(c message.Command, item message.Item, next *state, res *message.Result) (effect func(), err error) {
	effect = func() {}
	switch c.Name {
	case message.AttestNow: // the fleet sends a challenge along
	case message.SetInterval:
		d, err := message.Interval(c)
		if err != nil {
			return nil, err
		}
		next.Interval = int64(d / time.Second)
		res.Output = map[string]string{"seconds": strconv.FormatInt(next.Interval, 10)}
	case message.StatusCommand:
		res.Output = k.describe()
	case message.RotateStreamKeys:
		epoch, err := k.nextEpoch()
		if err != nil {
			return nil, err
		}
		next.Epoch = epoch
		res.Output = map[string]string{"epoch": epoch.String()}
		effect = func() { k.sealer.begin(beginning{subject: k.subject(), data: k.roots.Data, epoch: epoch}) }
	case message.WorkloadDeploy:
		return k.deploy(c, item, next)
	case message.WorkloadStop:
		return k.stop(c, next)
	case message.WorkloadMove:
		return k.startMove(c, res)
	default:
		return nil, fmt.Errorf("unknown command %q", c.Name) // CheckCommand knows better: our own bug
	}
	return effect, nil
}

func (k *Keep) describe() map[string]string {
	out := map[string]string{
		"epoch": k.st.Epoch.String(), "software": k.cfg.Software,
		"interval": strconv.FormatInt(k.st.Interval, 10),
	}
	sources, _ := k.sealer.stats()
	for _, s := range sources {
		state := "fresh"
		if s.Late {
			state = "late"
		}
		out["source."+s.Name] = fmt.Sprintf("%s, %d readings, %d rejected", state, s.Readings, s.Rejected)
	}
	return out
}

// cut shortens a text that may quote what came from outside.
func cut(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// printable makes a string from outside fit for a person's eyes.
func printable(s string) string {
	q := strconv.QuoteToASCII(cut(s, 512))
	return q[1 : len(q)-1]
}

// Package verifier answers "is it acceptable?": it challenges gateways, has
// package attest check that evidence is genuine, holds what genuine evidence
// says against a policy, and signs a verdict. Without a policy there is no
// verdict.
package verifier

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/tee/tpm"
)

// challengeLife is how long a challenge may be answered.
const challengeLife = 2 * time.Minute

// Verifier is one replica of the role. Replicas share keys and store, and
// nothing else.
type Verifier struct {
	Bus          *cloud.Bus
	Tenants      *cloud.Tenants
	Key          crypto.Signer // signs verdicts
	ChallengeKey []byte        // 32 bytes, of all replicas
	Build        string
	Log          *slog.Logger
	Now          func() time.Time
	Metrics      *cloud.Counts
}

// ChallengeRequest asks for a challenge.
type ChallengeRequest struct {
	Tenant  string `cbor:"1,keyasint"`
	Gateway string `cbor:"2,keyasint"`
}

// AppraiseRequest asks for a verdict on evidence given to another role.
type AppraiseRequest struct {
	Tenant   string `cbor:"1,keyasint"`
	Gateway  string `cbor:"2,keyasint"`
	EKHash   []byte `cbor:"3,keyasint"`
	AKName   []byte `cbor:"4,keyasint"`
	Evidence []byte `cbor:"5,keyasint"`
	Hold     bool   `cbor:"6,keyasint,omitempty"` // enrolment is not final: not yet the gateway's newest verdict
}

// Bytes is an answer of one byte string.
type Bytes struct {
	Data []byte `cbor:"1,keyasint"`
}

// Run serves until ctx ends.
func (v *Verifier) Run(ctx context.Context) error {
	if err := cloud.Answer(ctx, v.Bus, "svc.challenge", "verifier", v.challenge); err != nil {
		return err
	}
	if err := cloud.Answer(ctx, v.Bus, "svc.appraise", "verifier", v.appraise); err != nil {
		return err
	}
	slots := make(chan struct{}, 32)
	sub, err := v.Bus.NC.QueueSubscribe("ek1.*.*.up.evidence", "verifier", func(m *nats.Msg) {
		select {
		case slots <- struct{}{}:
			go func() { defer func() { <-slots }(); v.evidence(ctx, m) }()
		default: // more than 32 under way: the gateway is asked again
		}
	})
	if err != nil {
		return fmt.Errorf("subscribing to evidence: %w", err)
	}
	<-ctx.Done()
	_ = sub.Unsubscribe()
	return ctx.Err()
}

func (v *Verifier) challenge(_ context.Context, _ string, r ChallengeRequest) (Bytes, error) {
	t, err := v.Tenants.Tenant(r.Tenant)
	if err != nil {
		return Bytes{}, err
	}
	p, err := LoadPolicy(t.Dir)
	if err != nil {
		return Bytes{}, err
	}
	now := v.Now()
	c := attest.Challenge{
		Tenant: r.Tenant, Gateway: r.Gateway, Nonce: make([]byte, 32),
		Issued: now.Unix(), Expires: now.Add(challengeLife).Unix(), PCRs: p.PCRs(),
	}
	rand.Read(c.Nonce) // never fails
	msg, err := c.Marshal(v.ChallengeKey)
	return Bytes{Data: msg}, err
}

// evidence takes what a gateway published. Its topic says who it claims to be.
func (v *Verifier) evidence(ctx context.Context, m *nats.Msg) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	t, err := mqtt.ParseSubject(m.Subject)
	if err != nil {
		return
	}
	g, _, ok, err := cloud.Get[cloud.Gateway](ctx, v.Bus.Gateways, cloud.Key(t.Tenant, t.Gateway))
	if err == nil && (!ok || g.Revoked) {
		err = errors.New("no such gateway is enrolled")
	}
	if err == nil {
		_, err = v.appraise(ctx, "", AppraiseRequest{Tenant: t.Tenant, Gateway: t.Gateway, EKHash: g.EKHash, AKName: g.AKName, Evidence: m.Data})
	}
	if err != nil {
		tenant := ""
		if ok { // whose it is, only if it is anybody's
			tenant = t.Tenant
		}
		v.Metrics.Add(tenant, "evidence refused", err.Error())
		v.Log.Warn("evidence refused", "gateway", t.Tenant+"/"+t.Gateway, "reason", err)
	}
}

// appraise makes the verdict on evidence, or returns the one made before for the
// same challenge.
func (v *Verifier) appraise(ctx context.Context, _ string, r AppraiseRequest) (Bytes, error) {
	t, err := v.Tenants.Tenant(r.Tenant)
	if err != nil {
		return Bytes{}, err
	}
	policy, err := LoadPolicy(t.Dir)
	if err != nil {
		return Bytes{}, err
	}
	g, err := attest.Verify(r.Evidence, attest.Params{ChallengeKey: v.ChallengeKey, Now: v.Now(), AKName: r.AKName})
	if err != nil {
		return Bytes{}, fmt.Errorf("the evidence is not genuine: %w", err)
	}
	if g.Challenge.Tenant != r.Tenant || g.Challenge.Gateway != r.Gateway {
		return Bytes{}, fmt.Errorf("the evidence answers a challenge to %s/%s", g.Challenge.Tenant, g.Challenge.Gateway)
	}
	msg, err := v.judge(ctx, r, t, policy, g)
	if err != nil {
		return Bytes{}, err
	}
	return Bytes{Data: msg}, nil
}

func (v *Verifier) judge(ctx context.Context, r AppraiseRequest, t cloud.Tenant, policy Policy, g attest.Genuine) ([]byte, error) {
	key := cloud.Key(r.Tenant, r.Gateway)
	seen, _, known, err := cloud.Get[cloud.Gateway](ctx, v.Bus.Gateways, key)
	if err != nil {
		return nil, err
	}
	if known && string(seen.AKName) != string(r.AKName) {
		known, seen = false, cloud.Gateway{} // enrolling anew: another TPM's clock says nothing
	}
	a := appraisal{g: g, checks: g.Checks}
	a.identity(r.EKHash)
	a.roots(t.Digest)
	a.pcrs(policy)
	a.keys()
	if known {
		a.order(seen)
	}
	challengeHash := sha256.Sum256(g.Claims.Challenge)
	evidenceHash := sha256.Sum256(r.Evidence)
	verdict := attest.Verdict{
		Subject: r.Tenant + "/" + r.Gateway, Audience: r.Tenant,
		IssuedAt: v.Now().Unix(), NotBefore: g.Challenge.Issued, Expires: g.Challenge.Issued + int64(policy.Lifetime/time.Second),
		Cnf: g.Claims.Cnf, Nonce: g.Challenge.Nonce, Profile: attest.VerdictProfile,
		Submods: map[string]attest.Appraisal{attest.Submodule: {
			Status: a.vector.Status(), Vector: a.vector, Policies: []string{policy.ID},
		}},
		VerifierID:    attest.VerifierID{Developer: "edgekeep", Build: v.Build},
		ChallengeHash: challengeHash[:], EvidenceHash: evidenceHash[:],
		Keys: a.vouched(), Prior: g.Claims.Prior, Checks: a.checks, Assurance: "tpm", Command: g.Claims.Command,
	}
	msg, err := verdict.Sign(v.Key)
	if err != nil {
		return nil, fmt.Errorf("signing a verdict: %w", err)
	}
	return v.store(ctx, r, g, verdict, msg)
}

// store keeps the verdict if it is the first for its challenge, and returns the
// first. Everything after that may be repeated: a replica that died in between is
// finished by the next one that is shown the evidence.
func (v *Verifier) store(ctx context.Context, r AppraiseRequest, g attest.Genuine, verdict attest.Verdict, msg []byte) ([]byte, error) {
	id := hex.EncodeToString(verdict.ChallengeHash)
	err := cloud.Put(ctx, v.Bus.Verdicts, id, Bytes{Data: msg}, 0)
	if errors.Is(err, cloud.ErrConflict) {
		return v.first(ctx, r, id)
	}
	if err != nil {
		return nil, err
	}
	key := cloud.Key(r.Tenant, r.Gateway)
	if _, err := v.Bus.JS.Publish(ctx, "ev."+key, r.Evidence); err != nil {
		return nil, fmt.Errorf("keeping the evidence: %w", err)
	}
	if err := v.remember(ctx, key, r.AKName, g, verdict.Affirming()); err != nil {
		return nil, err
	}
	v.Log.Info("verdict", "gateway", verdict.Subject, "status", attest.Tier(verdict.Appraisal().Status))
	if r.Hold {
		return msg, nil
	}
	return msg, v.publish(ctx, key, verdict, msg)
}

// first returns the verdict that was made first for a challenge.
func (v *Verifier) first(ctx context.Context, r AppraiseRequest, id string) ([]byte, error) {
	b, _, ok, err := cloud.Get[Bytes](ctx, v.Bus.Verdicts, id)
	if err == nil && !ok {
		err = errors.New("the first verdict for this challenge is gone already")
	}
	if err != nil {
		return nil, err
	}
	verdict, err := attest.PeekVerdict(b.Data)
	if err != nil {
		return nil, err
	}
	if r.Hold {
		return b.Data, nil
	}
	return b.Data, v.publish(ctx, cloud.Key(r.Tenant, r.Gateway), verdict, b.Data)
}

// remember notes what later evidence must not go back behind. The TPM's clock is
// the TPM's own word; epoch and command are the keep's, which counts only where it
// is the approved one.
func (v *Verifier) remember(ctx context.Context, key string, akName []byte, g attest.Genuine, affirming bool) error {
	_, err := cloud.Change(ctx, v.Bus.Gateways, key, func(gw *cloud.Gateway, found bool) error {
		if !found || string(gw.AKName) != string(akName) {
			return errNotEnrolled
		}
		if gw.Clock.Before(g.Quoted.Clock) {
			gw.Clock = g.Quoted.Clock
		}
		if !affirming {
			return nil
		}
		gw.Command = max(gw.Command, g.Claims.Command)
		if len(g.Claims.Epoch) > 0 && string(gw.Epoch) < string(g.Claims.Epoch) {
			gw.Epoch = g.Claims.Epoch
		}
		return nil
	})
	if errors.Is(err, errNotEnrolled) {
		return nil
	}
	return err
}

// publish makes a verdict the gateway's newest, unless there is one on a newer
// challenge: evidence that was held back must not bring an old verdict back.
func (v *Verifier) publish(ctx context.Context, key string, verdict attest.Verdict, msg []byte) error {
	_, err := cloud.Change(ctx, v.Bus.Latest, key, func(b *Bytes, found bool) error {
		old, err := attest.PeekVerdict(b.Data)
		if found && err == nil && (old.NotBefore > verdict.NotBefore || old.NotBefore == verdict.NotBefore && old.IssuedAt > verdict.IssuedAt) {
			return errOlder
		}
		b.Data = msg
		return nil
	})
	if errors.Is(err, errOlder) {
		return nil
	}
	if err != nil {
		return err
	}
	return v.Bus.NC.Publish("verdict."+key, msg)
}

var (
	errNotEnrolled = errors.New("not enrolled")
	errOlder       = errors.New("older")
)

// appraisal collects what is found of one gateway.
type appraisal struct {
	g      attest.Genuine
	checks []attest.Check
	vector attest.Vector
}

func (a *appraisal) check(name string, ok bool, found string) bool {
	c := attest.Check{Name: name, Result: attest.OK, Detail: found}
	if !ok {
		c.Result = attest.Failed
	}
	a.checks = append(a.checks, c)
	return ok
}

func worse(v *int, claim int) {
	if *v == 0 || attest.Tier(claim) != "affirming" {
		*v = claim
	}
}

// Values of the trustworthiness claims used (AR4SI §2.3.4).
const (
	knownInstance        = 2  // instance-identity: recognised, not compromised
	instanceUntrusted    = 97 // instance-identity: recognised, and something is wrong with it
	genuineHardware      = 2
	approvedConfig       = 2
	configContraindicate = 96
	approvedBoot         = 3 // executables: what was booted is approved
	unrecognisedBoot     = 96
	secretsInHardware    = 2  // storage-opaque: encrypted with keys from the root of trust
	secretsUnprotected   = 32 // storage-opaque: its keys are not shown to be protected
)

func (a *appraisal) identity(ekHash []byte) {
	same := string(a.g.Claims.UEID) == "\x01"+string(ekHash)
	a.check("ek", same, fmt.Sprintf("ueid is the enrolled EK, %x", ekHash))
	a.vector.Instance, a.vector.Hardware = knownInstance, genuineHardware
	if !same {
		a.vector.Instance = instanceUntrusted
	}
}

func (a *appraisal) roots(digest []byte) {
	ok := string(a.g.Claims.Roots) == string(digest)
	a.check("trust roots", ok, fmt.Sprintf("configured with %s, this cloud's are %s", short(a.g.Claims.Roots), short(digest)))
	worse(&a.vector.Configuration, approvedConfig)
	if !ok {
		worse(&a.vector.Configuration, configContraindicate)
	}
}

func (a *appraisal) pcrs(p Policy) {
	values := a.g.Claims.Submods.TPM.PCRs
	ref, all := p.Closest(values)
	worse(&a.vector.Executables, approvedBoot)
	if !all {
		worse(&a.vector.Executables, unrecognisedBoot)
	}
	for _, i := range p.PCRs() {
		got, want := hex.EncodeToString(values[i]), ref.PCRs[i]
		detail := fmt.Sprintf("%s, as in %q", got, ref.Name)
		if got != want {
			detail = fmt.Sprintf("%s; %q has %s", got, ref.Name, want)
		}
		a.check(fmt.Sprintf("pcr %d", i), got == want, detail)
	}
}

func (a *appraisal) keys() {
	ok := a.g.TLSKey != nil && a.g.Receive != nil && len(a.g.Claims.Epoch) > 0
	detail := "TLS and receiving keys are usable in this state only, and the keep's own state is open"
	worse(&a.vector.Storage, secretsInHardware)
	if !ok {
		detail = "keys are missing or not bound to this state: the keep is locked, or PCRs changed under it, or `pcrs` in keep.toml is not the set that the policy names"
		worse(&a.vector.Storage, secretsUnprotected)
	}
	a.check("keys", ok, detail)
}

// vouched are the confirmation keys that were shown to be bound to this state.
func (a *appraisal) vouched() map[string]attest.Key {
	out := map[string]attest.Key{}
	if a.g.TLSKey != nil {
		out[attest.PurposeTLS] = a.g.Claims.Keys[attest.PurposeTLS]
	}
	if a.g.Receive != nil {
		out[attest.PurposeReceive] = a.g.Claims.Keys[attest.PurposeReceive]
	}
	return out
}

// order refuses what goes back: the TPM's clock, the epoch, the newest command.
func (a *appraisal) order(seen cloud.Gateway) {
	now := a.g.Quoted.Clock
	back := now.Before(tpm.Clock{ResetCount: seen.Clock.ResetCount, RestartCount: seen.Clock.RestartCount})
	if !a.check("tpm clock", !back, fmt.Sprintf("reset %d restart %d, seen before: %d, %d",
		now.ResetCount, now.RestartCount, seen.Clock.ResetCount, seen.Clock.RestartCount)) {
		a.vector.Instance = instanceUntrusted
	}
	if len(a.g.Claims.Epoch) == 0 {
		return // locked: it has no epoch and remembers no command
	}
	if !a.check("epoch", len(seen.Epoch) == 0 || string(a.g.Claims.Epoch[:8]) >= string(seen.Epoch[:8]),
		fmt.Sprintf("epoch %s, seen before: %s", short(a.g.Claims.Epoch), short(seen.Epoch))) {
		a.vector.Instance = instanceUntrusted
	}
	if !a.check("commands", a.g.Claims.Command >= seen.Command,
		fmt.Sprintf("newest accepted command %d, seen before: %d", a.g.Claims.Command, seen.Command)) {
		a.vector.Instance = instanceUntrusted
	}
}

func short(b []byte) string {
	if len(b) > 8 {
		return hex.EncodeToString(b[:8]) + "…"
	}
	return hex.EncodeToString(b)
}

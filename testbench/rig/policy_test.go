package rig

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"edgekeep/agent"
	"edgekeep/tee/attest"
)

// TestNoPolicy: without a policy nothing is acceptable, and everybody is told.
func TestNoPolicy(t *testing.T) {
	b := newBench(t, time.Minute, Options{})
	g := b.gateway("gw1", "machine")
	policy, err := os.ReadFile(b.PolicyPath())
	b.must(err)
	b.must(os.Remove(b.PolicyPath()))
	b.startCloud()
	b.must(g.Start(b.ctx))
	b.must(g.Approve(b.ctx, b.op))
	b.status(g, "the reason", func(s agent.Status) bool {
		return !s.Connected && strings.Contains(s.Reason, "there is no policy, so nothing is acceptable")
	})
	if e, ok := b.listed("gw1"); ok {
		t.Errorf("it was enrolled without a policy: %+v", e)
	}
	if exists(g.Path("agent/client.pem")) {
		t.Error("it got a certificate without a policy")
	}
	b.must(os.WriteFile(b.PolicyPath(), policy, 0o600))
	b.must(g.KillAgent()) // it would ask again by itself, after half a minute
	b.must(g.StartAgent(b.ctx))
	b.affirmed(g)
	b.status(g, "a connection, and the stream opened", func(s agent.Status) bool {
		return s.Connected && s.SpoolChunks == 0 && len(s.Watermarks) == 1
	})
	opened := len(b.stored(g))

	b.must(os.Remove(b.PolicyPath())) // and it is not only asked for at enrolment
	b.must(g.KillKeep())
	b.must(g.StartKeep(b.ctx))
	w := b.writer(g, "machine")
	w.lines("m v=1 1")
	b.status(g, "data that is not accepted", func(s agent.Status) bool { return s.SpoolChunks == 2 && s.Resends > 0 })
	b.until("the reason for the operator", func() error {
		d, err := b.op.Gateway(b.ctx, "gw1")
		b.must(err)
		for what := range d.Counts {
			if strings.HasPrefix(what, "no challenge: there is no policy") {
				return nil
			}
		}
		return fmt.Errorf("the cloud counts %v", d.Counts)
	})
	if n := len(b.stored(g)); n != opened {
		t.Errorf("%d chunks were accepted without a policy", n-opened)
	}
	b.must(os.WriteFile(b.PolicyPath(), policy, 0o600))
	_, v, err := b.op.Attest(b.ctx, "gw1")
	if b.must(err); !v.Affirming() {
		t.Errorf("with the policy back the verdict is %+v", v.Checks)
	}
	r := b.read(g, "machine")
	r.upTo(1)
}

// TestOtherReferenceValues: a gateway that is not what the policy names does not
// enrol.
func TestOtherReferenceValues(t *testing.T) {
	b := newBench(t, time.Minute, Options{})
	g := b.gateway("gw1", "machine")
	policy, err := os.ReadFile(b.PolicyPath())
	b.must(err)
	head, tail, _ := strings.Cut(string(policy), "\n4 = \"")
	other := head + "\n4 = \"" + strings.Repeat("0", 64) + tail[64:]
	b.must(os.WriteFile(b.PolicyPath(), []byte(other), 0o600))
	b.startCloud()
	b.must(g.Start(b.ctx))
	b.must(g.Approve(b.ctx, b.op))
	b.status(g, "the reason", func(s agent.Status) bool {
		return !s.Connected && strings.Contains(s.Reason, "not affirming")
	})
	raw, err := os.ReadFile(g.Path("agent/verdict.cbor"))
	b.must(err)
	v, err := attest.VerifyVerdict(b.op.Roots.Verifier, raw)
	b.must(err)
	if attest.Tier(v.Appraisal().Status) != "contraindicated" {
		t.Errorf("the verdict is %s", attest.Tier(v.Appraisal().Status))
	}
	for _, c := range v.Checks {
		if (c.Result == attest.Failed) != (c.Name == "pcr 4") {
			t.Errorf("check %q: %s, %s", c.Name, c.Result, c.Detail)
		}
	}
	if e, ok := b.listed("gw1"); ok || exists(g.Path("agent/client.pem")) {
		t.Errorf("it was enrolled: %+v", e)
	}
	b.must(os.WriteFile(b.PolicyPath(), policy, 0o600))
	b.affirmed(g)
	b.status(g, "a connection", func(s agent.Status) bool { return s.Connected })
}

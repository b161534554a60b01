package verifier

import (
	"testing"

	"edgekeep/cloud"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/tpm"
)

func TestOrder(t *testing.T) {
	epoch := func(n uint64) []byte { e := sealing.NewEpoch(n, [8]byte{0xff, byte(n)}); return e[:] }
	twin := func(n uint64) []byte { e := sealing.NewEpoch(n, [8]byte{0x01}); return e[:] }
	seen := cloud.Gateway{Clock: tpm.Clock{ResetCount: 7, RestartCount: 3, Milliseconds: 5000}, Epoch: epoch(9), Command: 4}
	for _, x := range []struct {
		name    string
		clock   tpm.Clock
		epoch   []byte
		command uint64
		failed  string // the check that fails; empty: none
		checks  int
	}{
		{"the same", tpm.Clock{ResetCount: 7, RestartCount: 3, Milliseconds: 5000}, epoch(9), 4, "", 3},
		{"later", tpm.Clock{ResetCount: 7, RestartCount: 3, Milliseconds: 6000}, epoch(9), 4, "", 3},
		{"answered out of order, within one start", tpm.Clock{ResetCount: 7, RestartCount: 3, Milliseconds: 4000}, epoch(9), 4, "", 3},
		{"restarted", tpm.Clock{ResetCount: 7, RestartCount: 4}, epoch(9), 4, "", 3},
		{"reset, the restart count begins anew", tpm.Clock{ResetCount: 8}, epoch(10), 5, "", 3},
		{"fewer restarts", tpm.Clock{ResetCount: 7, RestartCount: 2, Milliseconds: 9000}, epoch(9), 4, "tpm clock", 3},
		{"fewer resets", tpm.Clock{ResetCount: 6, RestartCount: 9, Milliseconds: 9000}, epoch(9), 4, "tpm clock", 3},
		{"an earlier epoch", tpm.Clock{ResetCount: 8}, epoch(8), 4, "epoch", 3},
		{"a twin of the epoch", tpm.Clock{ResetCount: 8}, twin(9), 4, "", 3},
		{"an older command", tpm.Clock{ResetCount: 8}, epoch(9), 3, "commands", 3},
		{"no command", tpm.Clock{ResetCount: 8}, epoch(10), 0, "commands", 3},
		{"locked: it knows of no epoch and no command", tpm.Clock{ResetCount: 8}, nil, 0, "", 1},
		{"locked, and fewer resets", tpm.Clock{ResetCount: 6}, nil, 0, "tpm clock", 1},
	} {
		a := appraisal{g: attest.Genuine{Claims: attest.Claims{Epoch: x.epoch, Command: x.command}, Quoted: tpm.Quoted{Clock: x.clock}}}
		a.vector.Instance = knownInstance
		a.order(seen)
		if len(a.checks) != x.checks {
			t.Errorf("%s: %d checks, want %d", x.name, len(a.checks), x.checks)
		}
		for _, c := range a.checks {
			if (c.Result == attest.Failed) != (c.Name == x.failed) {
				t.Errorf("%s: %s is %s: %s", x.name, c.Name, c.Result, c.Detail)
			}
		}
		want := knownInstance
		if x.failed != "" {
			want = instanceUntrusted
		}
		if a.vector.Instance != want {
			t.Errorf("%s: instance-identity is %d", x.name, a.vector.Instance)
		}
	}
	first := appraisal{g: attest.Genuine{Claims: attest.Claims{Epoch: epoch(1)}}}
	first.order(cloud.Gateway{})
	for _, c := range first.checks {
		if c.Result != attest.OK {
			t.Errorf("of a gateway not seen before: %s is %s", c.Name, c.Result)
		}
	}
}

// A claim never gets better by a later check.
func TestWorse(t *testing.T) {
	v := 0
	worse(&v, approvedConfig)
	if v != approvedConfig {
		t.Fatal("the first claim does not count")
	}
	worse(&v, configContraindicate)
	worse(&v, approvedConfig)
	if v != configContraindicate {
		t.Fatalf("a good claim came over a bad one: %d", v)
	}
}

func TestIdentityRootsAndPCRs(t *testing.T) {
	hash, digest := make([]byte, 32), make([]byte, 32)
	p := Policy{References: []Reference{{Name: "one", PCRs: map[int]string{0: ones}}}}
	good := attest.Claims{UEID: append([]byte{1}, hash...), Roots: digest, Submods: &attest.Submods{TPM: attest.TPM{PCRs: map[int][]byte{0: make([]byte, 32)}}}}
	for i := range good.Submods.TPM.PCRs[0] {
		good.Submods.TPM.PCRs[0][i] = 0x11
	}
	for _, x := range []struct {
		name   string
		change func(*attest.Claims)
		want   string // tier
	}{
		{"as it should be", func(*attest.Claims) {}, "affirming"},
		{"another EK", func(c *attest.Claims) { c.UEID = append([]byte{1}, digest[:31]...) }, "contraindicated"},
		{"another kind of ueid", func(c *attest.Claims) { c.UEID = append([]byte{2}, hash...) }, "contraindicated"},
		{"other trust roots", func(c *attest.Claims) { c.Roots = []byte{1} }, "contraindicated"},
		{"no trust roots", func(c *attest.Claims) { c.Roots = nil }, "contraindicated"},
		{"another PCR value", func(c *attest.Claims) {
			c.Submods = &attest.Submods{TPM: attest.TPM{PCRs: map[int][]byte{0: make([]byte, 32)}}}
		}, "contraindicated"},
	} {
		c := good
		x.change(&c)
		a := appraisal{g: attest.Genuine{Claims: c}}
		a.identity(hash)
		a.roots(digest)
		a.pcrs(p)
		if got := attest.Tier(a.vector.Status()); got != x.want {
			t.Errorf("%s: %s", x.name, got)
		}
	}
	// Keys that are not bound to the state are no reason to trust, and are not vouched for.
	a := appraisal{g: attest.Genuine{Claims: good}}
	a.identity(hash)
	a.keys()
	if got := attest.Tier(a.vector.Status()); got != "warning" || len(a.vouched()) != 0 {
		t.Errorf("without keys: %s, %d vouched for", got, len(a.vouched()))
	}
}

package rig

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"edgekeep/agent"
	"edgekeep/cloud"
	"edgekeep/cloud/keybroker"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// reboot cuts the power and switches on again.
func (b *bench) reboot(g *Gateway, firmware string) {
	b.t.Helper()
	b.must(g.PowerOff())
	g.Firmware = firmware
	b.must(g.Boot(b.ctx))
	b.must(g.StartKeep(b.ctx))
	b.must(g.StartAgent(b.ctx))
}

// TestReboot cuts a gateway's power under load. It comes back as who it was,
// without anybody's help.
func TestReboot(t *testing.T) {
	file := machine(t)
	b, g := up(t, time.Minute, Options{}, "machine")
	before, ok := b.listed("gw1")
	if !ok {
		t.Fatal("the gateway is not listed")
	}
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", file.speed(6*time.Second)))
	r := b.read(g, "machine")
	for i := range 2 {
		r.upTo(3000 * (i + 1))
		b.reboot(g, g.Firmware)
		b.must(g.StartDriver("machine", "replay", file.path, "--speed", file.speed(6*time.Second)))
	}
	b.finish(g, "machine")
	r.upTo(len(file.want))
	r.all(g)
	r.equal(file.want)
	if len(r.epochs) != 3 {
		t.Errorf("two reboots made %d epochs, want 3", len(r.epochs))
	}
	b.findings(g, nil)
	b.affirmed(g)
	after, _ := b.listed("gw1")
	if !bytes.Equal(after.AKName, before.AKName) || !bytes.Equal(after.EKHash, before.EKHash) || !bytes.Equal(after.CertSerial, before.CertSerial) {
		t.Errorf("after the reboot it is %+v, before it was %+v", after, before)
	}
	list, err := b.op.Gateways(b.ctx)
	b.must(err)
	if len(list.Pending) != 0 {
		t.Errorf("approval is asked for: %+v", list.Pending)
	}
}

// TestOtherFirmware boots something else. The keep's secrets stay closed, the
// verdict says what differs, and nothing is given to this machine until it is
// back as it was.
func TestOtherFirmware(t *testing.T) {
	file := machine(t)
	b, g := up(t, time.Minute, Options{}, "machine")
	good := g.Firmware
	affirming, _, err := b.op.Saved(b.ctx, "gw1")
	b.must(err)
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", file.speed(4*time.Second)))
	r := b.read(g, "machine")
	r.upTo(5000)
	epoch := r.epochs[0]
	release := func(verdict []byte) error {
		_, err := ask[message.Release](b.ctx, b.raw("consumer"), "data.key",
			keybroker.Request{Gateway: "gw1", Stream: "machine", Epoch: epoch[:], Verdict: verdict})
		return err
	}
	grant, err := message.Grant{Tenant: Tenant, Consumer: "gw1", Gateway: true}.Sign(b.key("owner/owner.key"))
	b.must(err)
	b.must(os.WriteFile(b.path("cloud/tenants", Tenant, "grants/gateway-gw1.cbor"), grant, 0o600))
	if err := release(affirming.Verdict); err != nil {
		t.Errorf("a key for a gateway in good state: %v", err)
	}

	b.reboot(g, "an implant")
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", "0"))
	verdict := b.contraindicated(g, good)
	s := b.status(g, "a locked keep", func(s agent.Status) bool { return s.Phase == tee.PhaseLocked })
	if s.Connected || s.Reason == "" || s.Readings != 0 {
		t.Errorf("of a locked keep the agent says %+v", s)
	}
	b.locked(g)
	var no *cloud.Refused
	if err := release(verdict); !errors.As(err, &no) || !strings.Contains(no.Reason, "contraindicated") {
		t.Errorf("a key for a gateway in bad state: %v", err)
	}

	b.reboot(g, good)
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", "0"))
	b.finish(g, "machine")
	r.upTo(len(file.want))
	r.all(g)
	r.equal(file.want)
	b.findings(g, nil)
	b.affirmed(g)
}

// contraindicated waits for the verdict on a machine with other firmware, and
// checks what it says.
func (b *bench) contraindicated(g *Gateway, good string) (verdict []byte) {
	b.t.Helper()
	pcr := func(firmware string) string {
		d := sha256.Sum256([]byte(firmware))
		v := sha256.Sum256(append(make([]byte, 32), d[:]...))
		return hex.EncodeToString(v[:])
	}
	b.until("a contraindicated verdict", func() error {
		saved, v, err := b.op.Saved(b.ctx, g.Name)
		if err != nil {
			return err
		}
		if attest.Tier(v.Appraisal().Status) != "contraindicated" {
			return errors.New("the verdict is " + attest.Tier(v.Appraisal().Status))
		}
		verdict = saved.Verdict
		for _, c := range v.Checks {
			failed := c.Name == "pcr 0" || c.Name == "keys"
			if (c.Result == attest.Failed) != failed {
				b.t.Errorf("check %q: %s, %s", c.Name, c.Result, c.Detail)
			}
			if c.Name == "pcr 0" && (!strings.Contains(c.Detail, pcr(g.Firmware)) || !strings.Contains(c.Detail, pcr(good))) {
				b.t.Errorf("check %q does not name both values: %s", c.Name, c.Detail)
			}
		}
		if len(v.Keys) != 0 {
			b.t.Errorf("the verdict vouches for keys: %v", v.Keys)
		}
		return nil
	})
	return verdict
}

// locked checks that a keep does nothing with secrets.
func (b *bench) locked(g *Gateway) {
	b.t.Helper()
	s := b.socket(g)
	_, err := tee.Pull{}.Do(b.ctx, s)
	b.refused(err, "locked")
	text := append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, client CertificateVerify\x00"...)
	_, err = tee.SignTLS{Text: append(text, make([]byte, 32)...)}.Do(b.ctx, s)
	b.refused(err, "locked")
	_, err = tee.Oldest{Stream: "machine", Epoch: make([]byte, 16)}.Do(b.ctx, s)
	b.refused(err, "locked")
	take, err := tee.Take{}.Do(b.ctx, s)
	b.must(err)
	if len(take.Chunks) != 0 {
		b.t.Errorf("a locked keep sealed %d chunks", len(take.Chunks))
	}
	st := b.keep(g)
	if st.Phase != tee.PhaseLocked || st.Tenant != "" || st.Epoch != "" || len(st.TLSKey) != 0 {
		b.t.Errorf("a locked keep says %+v", st)
	}
	if !strings.Contains(st.Reason, fmt.Sprint(PCRs)) {
		b.t.Errorf("a locked keep does not say why: %s", st.Reason)
	}
}

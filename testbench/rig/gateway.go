package rig

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"edgekeep/agent"
	"edgekeep/cloud/client"
	"edgekeep/tee"
	"edgekeep/testbench/internal/process"
	"edgekeep/testbench/swtpm"
)

// PCRs are those that the rig fills and that keys are bound to.
var PCRs = []int{0, 4, 7, 8}

// SourceUID is the user of a gateway's first driver; the others follow. When the
// rig is not run by root all drivers are its own user, and there is one source.
const SourceUID = 64001

// RunnerUID is the user of runners.
const RunnerUID = 64000

// Gateway is a gateway: a TPM, a keep, an agent, drivers.
type Gateway struct {
	r       *Rig
	Name    string
	Sources []string
	TPM     *swtpm.TPM
	keep    *process.Process
	agent   *process.Process
	runners []*process.Process
	drivers map[string]*process.Process
	dir     string
	// Firmware is what PCR 0 is extended with: change it to boot another one.
	Firmware string
	// Roots is the digest the keep is configured with.
	Roots    string
	Compress bool
}

// Gateway prepares a gateway. The policy of the tenant is extended by what this
// gateway will have in its PCRs.
func (r *Rig) Gateway(name string, sources ...string) (*Gateway, error) {
	g := &Gateway{
		r: r, Name: name, Sources: sources, dir: r.path(name), Firmware: "test bench firmware 1",
		Roots: r.Roots, Compress: true, drivers: map[string]*process.Process{},
	}
	for _, d := range []string{"run", "agent", "tpm"} {
		if err := os.MkdirAll(filepath.Join(g.dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("making the gateway's directory: %w", err)
		}
	}
	r.gateways = append(r.gateways, g)
	return g, g.addPolicy()
}

// measured is what the rig extends, by PCR.
func (g *Gateway) measured() (map[int][32]byte, error) {
	keep, err := digestFile(filepath.Join(g.r.Bin, "edgekeep-keep"))
	if err != nil {
		return nil, err
	}
	agent, err := digestFile(filepath.Join(g.r.Bin, "edgekeep-agent"))
	if err != nil {
		return nil, err
	}
	return map[int][32]byte{
		0: sha256.Sum256([]byte(g.Firmware)), 4: keep, 7: sha256.Sum256([]byte("secure boot: none")), 8: agent,
	}, nil
}

// addPolicy adds the gateway's reference values to the tenant's policy. They
// follow from the programs on disk, not from what the gateway says.
func (g *Gateway) addPolicy() error {
	measured, err := g.measured()
	if err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "[[reference]]\nname = %q\n[reference.pcrs]\n", "test bench: "+g.Firmware)
	for _, p := range PCRs {
		d := measured[p]
		value := sha256.Sum256(append(make([]byte, 32), d[:]...))
		fmt.Fprintf(&b, "%d = %q\n", p, hex.EncodeToString(value[:]))
	}
	for _, old := range g.r.policies {
		if old == b.String() {
			return nil
		}
	}
	g.r.policies = append(g.r.policies, b.String())
	text := fmt.Sprintf("lifetime = %q\n%s", g.r.Lifetime, strings.Join(g.r.policies, ""))
	if err := os.WriteFile(g.r.PolicyPath(), []byte(text), 0o600); err != nil {
		return fmt.Errorf("writing the policy: %w", err)
	}
	return nil
}

// PolicyPath is the tenant's policy file.
func (r *Rig) PolicyPath() string { return r.path("cloud/tenants", Tenant, "policy.toml") }

// Boot switches the TPM on and plays the firmware. The first Boot of a rig makes
// the TPM manufacturer whom the cloud trusts: it comes before StartCloud.
func (g *Gateway) Boot(ctx context.Context) error {
	tpm, err := swtpm.Start(ctx, swtpm.Options{Dir: filepath.Join(g.dir, "tpm"), CADir: g.r.path("manufacturer")})
	if err != nil {
		return err
	}
	g.TPM = tpm
	measured, err := g.measured()
	if err != nil {
		return err
	}
	for _, p := range PCRs {
		if err := tpm.Extend(p, measured[p]); err != nil {
			return err
		}
	}
	return nil
}

// Start boots, unless that was done, and starts keep and agent.
func (g *Gateway) Start(ctx context.Context) error {
	if g.TPM == nil {
		if err := g.Boot(ctx); err != nil {
			return err
		}
	}
	if err := g.StartKeep(ctx); err != nil {
		return err
	}
	return g.StartAgent(ctx)
}

// Path is a path in the gateway's directory.
func (g *Gateway) Path(parts ...string) string {
	return filepath.Join(append([]string{g.dir}, parts...)...)
}

// Ingest is the socket that drivers write to.
func (g *Gateway) Ingest() string { return g.Path("run/ingest.sock") }

// KeepSocket is the socket that the agent uses.
func (g *Gateway) KeepSocket() string { return g.Path("run/keep.sock") }

// RunnerSocket is the socket that runners use.
func (g *Gateway) RunnerSocket() string { return g.Path("run/runner.sock") }

func (g *Gateway) runnerUID() int {
	if os.Getuid() != 0 {
		return os.Getuid()
	}
	return RunnerUID
}

// StartRunners starts runners, each of which waits for an instance.
func (g *Gateway) StartRunners(n int, args ...string) error {
	for range n {
		p, err := g.r.start(g.Name+"-runner", g.runnerUID(), "edgekeep-runner", append([]string{"--socket", g.RunnerSocket()}, args...)...)
		if err != nil {
			return err
		}
		g.runners = append(g.runners, p)
	}
	return nil
}

// RunnerPIDs are the process ids of the runners: each has a worker as its child.
func (g *Gateway) RunnerPIDs() []int {
	var out []int
	for _, p := range g.runners {
		out = append(out, p.PID())
	}
	return out
}

// StopRunners ends the runners.
func (g *Gateway) StopRunners() error {
	var errs []error
	for _, p := range g.runners {
		errs = append(errs, p.Stop())
	}
	g.runners = nil
	return errors.Join(errs...)
}

func (g *Gateway) uid(source int) int {
	if os.Getuid() != 0 {
		return os.Getuid()
	}
	return SourceUID + source
}

// StartKeep starts the keep and waits for its sockets.
func (g *Gateway) StartKeep(ctx context.Context, args ...string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "tpm = %q\npcrs = [0, 4, 7, 8]\nroots = %q\nflush = \"100ms\"\ncompress = %v\n[sockets]\nkeep = %q\ningest = %q\nrunner_mode = \"0666\"\n",
		g.TPM.Socket(), g.Roots, g.Compress, g.KeepSocket(), g.Ingest())
	fmt.Fprintf(&b, "runner = %q\n[runners]\nuser = \"%d\"\n", g.RunnerSocket(), g.runnerUID())
	for i, s := range g.Sources {
		fmt.Fprintf(&b, "[[source]]\nname = %q\nuser = \"%d\"\nfreshness = \"10s\"\nrate = 1000000\n", s, g.uid(i))
	}
	if err := os.WriteFile(g.Path("keep.toml"), []byte(b.String()), 0o600); err != nil {
		return fmt.Errorf("writing keep.toml: %w", err)
	}
	_ = os.Remove(g.KeepSocket()) // of an earlier start
	var err error
	if g.keep, err = g.r.start(g.Name+"-keep", -1, "edgekeep-keep", append([]string{"--config", g.Path("keep.toml")}, args...)...); err != nil {
		return err
	}
	return g.r.awaitFile(ctx, g.keep, g.KeepSocket())
}

// StartAgent starts the agent.
func (g *Gateway) StartAgent(context.Context) error {
	cfg := fmt.Sprintf("[broker]\nurl = %q\nboot_url = %q\nca = %q\n[keep]\nsocket = %q\n[state]\ndir = %q\n",
		g.r.MQTT, g.r.bootURL, g.r.path("cloud/keys/ca.pem"), g.KeepSocket(), g.Path("agent"))
	if err := os.WriteFile(g.Path("agent.toml"), []byte(cfg), 0o600); err != nil {
		return fmt.Errorf("writing agent.toml: %w", err)
	}
	var err error
	g.agent, err = g.r.start(g.Name+"-agent", -1, "edgekeep-agent", "--config", g.Path("agent.toml"))
	return err
}

// StartDriver starts edgekeep-sensor as a source's user.
func (g *Gateway) StartDriver(source string, args ...string) error {
	for i, s := range g.Sources {
		if s != source {
			continue
		}
		p, err := g.r.start(g.Name+"-"+source, g.uid(i), "edgekeep-sensor", append(args, "--socket", g.Ingest())...)
		if err != nil {
			return err
		}
		g.drivers[source] = p
		return nil
	}
	return fmt.Errorf("no source %q", source)
}

// StopDriver ends a driver in good order, after it has sent what it has, and
// returns the line of figures that it prints last.
func (g *Gateway) StopDriver(source string) (string, error) {
	p, ok := g.drivers[source]
	if !ok {
		return "", fmt.Errorf("no driver for %q", source)
	}
	delete(g.drivers, source)
	err := p.Stop()
	lines := strings.Split(strings.TrimSpace(p.LogTail()), "\n")
	return lines[len(lines)-1], err
}

// DriverDone is closed when a driver has ended by itself.
func (g *Gateway) DriverDone(source string) <-chan struct{} { return g.drivers[source].Done() }

// KillDriver, KillKeep and KillAgent end a process with SIGKILL.
func (g *Gateway) KillDriver(source string) error { return g.drivers[source].Kill() }

// KillKeep ends the keep with SIGKILL.
func (g *Gateway) KillKeep() error { return g.keep.Kill() }

// KillAgent ends the agent with SIGKILL.
func (g *Gateway) KillAgent() error { return g.agent.Kill() }

// PauseAgent freezes the agent, ResumeAgent lets it go on.
func (g *Gateway) PauseAgent() error { return syscall.Kill(g.agent.PID(), syscall.SIGSTOP) }

// ResumeAgent lets a paused agent go on.
func (g *Gateway) ResumeAgent() error { return syscall.Kill(g.agent.PID(), syscall.SIGCONT) }

// PIDs are the process ids of keep and agent.
func (g *Gateway) PIDs() (keep, agent int) { return g.keep.PID(), g.agent.PID() }

// Ended tells which process has ended by itself.
func (g *Gateway) Ended() error {
	for name, p := range map[string]*process.Process{"keep": g.keep, "agent": g.agent} {
		select {
		case <-p.Done():
			return fmt.Errorf("the %s of %s has ended: %w\n%s", name, g.Name, p.Err(), p.LogTail())
		default:
		}
	}
	return nil
}

// Status reads what the agent says of itself.
func (g *Gateway) Status() (agent.Status, error) {
	var s agent.Status
	raw, err := os.ReadFile(g.Path("agent/status.json"))
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	return s, err
}

// keepStatus asks the keep how it is.
func (g *Gateway) keepStatus(ctx context.Context) (tee.StatusReply, error) {
	s := &tee.Socket{Path: g.KeepSocket()}
	defer s.Close()
	return tee.Status{}.Do(ctx, s)
}

// Approve waits until the gateway's TPM asks to enrol, and approves it.
func (g *Gateway) Approve(ctx context.Context, op *client.Client) error {
	st, err := g.keepStatus(ctx)
	if err != nil {
		return err
	}
	for {
		list, err := op.Gateways(ctx)
		if err != nil {
			return err
		}
		for _, p := range list.Pending {
			if bytes.Equal(p.Hash, st.EKHash) {
				return op.Approve(ctx, p.Hash, g.Name)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gateway %s never asked to enrol: %w", g.Name, errors.Join(ctx.Err(), g.Ended()))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// PowerOff ends keep, agent and TPM as a power cut would.
func (g *Gateway) PowerOff() error {
	var errs []error
	for _, p := range g.drivers {
		errs = append(errs, p.Kill())
	}
	g.drivers = map[string]*process.Process{}
	for _, p := range g.runners {
		errs = append(errs, p.Kill())
	}
	g.runners = nil
	for _, p := range []*process.Process{g.agent, g.keep} {
		if p != nil {
			errs = append(errs, p.Kill())
		}
	}
	if g.TPM != nil {
		errs = append(errs, g.TPM.Kill())
	}
	return errors.Join(errs...)
}

// Stop ends everything in good order.
func (g *Gateway) Stop() error {
	var errs []error
	for _, p := range g.drivers {
		errs = append(errs, p.Stop())
	}
	errs = append(errs, g.StopRunners())
	for _, p := range []*process.Process{g.agent, g.keep} {
		if p != nil {
			errs = append(errs, p.Stop())
		}
	}
	if g.TPM != nil {
		errs = append(errs, g.TPM.Stop())
	}
	return errors.Join(errs...)
}

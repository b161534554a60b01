package rig

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"edgekeep/agent"
	"edgekeep/cloud"
	"edgekeep/cloud/client"
	"edgekeep/tee"
	_ "edgekeep/tee/keep" // the programs are made of these: with them changed, results from before do not count
	_ "edgekeep/tee/runner"
)

// programs is where TestMain has put the programs.
var programs string

func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == supervising {
		os.Exit(supervise(os.Args[2], os.Args[3:]...))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	flag.Parse()
	if testing.Short() {
		fmt.Println("end-to-end tests take too long for -short")
		return 0
	}
	parallel := flag.Lookup("test.parallel")
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == parallel.Name })
	if !set { // these tests wait more than they compute
		_ = parallel.Value.Set("4")
	}
	dir, err := tempDir("ek-bin-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// tempDir makes a directory with a short path that every user may enter: sockets
// and programs in it are for drivers of other users.
func tempDir(prefix string) (string, error) {
	dir, err := os.MkdirTemp("", prefix)
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

func build(dir string) error {
	programs = dir
	args := []string{"build", "-o", dir + string(filepath.Separator)}
	for _, p := range []string{"keep", "agent", "cloud", "sensor", "runner"} {
		args = append(args, "edgekeep/cmd/edgekeep-"+p)
	}
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the programs: %w\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	program, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "supervisor"), program, 0o755)
}

// long reports whether the long variants were asked for.
func long() bool { return os.Getenv("EDGEKEEP_LONG") != "" }

// bench is a rig under test, with the connections of its people. Everything it
// does ends with its deadline, and its failures end the test.
type bench struct {
	*Rig
	t        *testing.T
	ctx      context.Context //nolint:containedctx // of the test: it ends with it
	op       *client.Client
	consumer *client.Client
}

func newBench(t *testing.T, limit time.Duration, o Options) *bench {
	t.Helper()
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	dir, err := tempDir("ek-")
	if err != nil {
		t.Fatal(err)
	}
	o.Dir, o.Bin = dir, programs
	b := &bench{t: t, ctx: ctx}
	t.Cleanup(func() { b.end(dir) })
	b.Rig, err = New(ctx, o)
	b.must(err)
	return b
}

// end stops everything; the logs of a failed test are kept.
func (b *bench) end(dir string) {
	for _, c := range []*client.Client{b.op, b.consumer} {
		if c != nil {
			c.Close()
		}
	}
	if b.Rig != nil {
		if err := b.Stop(); err != nil {
			b.t.Errorf("stopping: %v", err)
		}
	}
	logs, _ := filepath.Glob(filepath.Join(dir, "logs", "*")) // a constant pattern
	for _, path := range logs {
		text, err := os.ReadFile(path)
		if err != nil || bytes.Contains(text, []byte("panic:")) || bytes.Contains(text, []byte("fatal error:")) {
			b.t.Errorf("%s tells of a crash: %v\n%s", path, err, text)
		}
	}
	if b.t.Failed() {
		b.t.Logf("what happened is in %s", dir)
		return
	}
	_ = os.RemoveAll(dir)
}

func (b *bench) must(err error) {
	b.t.Helper()
	if errors.Is(err, exec.ErrNotFound) {
		b.t.Skip(err)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// until tries f until it returns nil.
func (b *bench) until(what string, f func() error) {
	b.t.Helper()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-b.ctx.Done():
			b.t.Fatalf("waited in vain: %s: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// gateway makes a gateway and switches its TPM on.
func (b *bench) gateway(name string, sources ...string) *Gateway {
	b.t.Helper()
	g, err := b.Gateway(name, sources...)
	b.must(err)
	b.must(g.Boot(b.ctx))
	return g
}

// startCloud starts the cloud and connects its people.
func (b *bench) startCloud() {
	b.t.Helper()
	b.must(b.StartCloud(b.ctx))
	for name, to := range map[string]**client.Client{"operator": &b.op, "consumer": &b.consumer} {
		kit, err := b.Kit(name)
		b.must(err)
		*to, err = kit.Connect()
		b.must(err)
	}
}

// enrol starts a gateway, approves it and waits until it is vouched for.
func (b *bench) enrol(g *Gateway) {
	b.t.Helper()
	b.must(g.Start(b.ctx))
	b.must(g.Approve(b.ctx, b.op))
	b.affirmed(g)
}

// affirmed waits until the keep as it runs now has an affirming verdict.
func (b *bench) affirmed(g *Gateway) {
	b.t.Helper()
	b.until("an affirming verdict on "+g.Name, func() error {
		_, v, err := b.op.Saved(b.ctx, g.Name)
		if err == nil && !v.Affirming() {
			err = fmt.Errorf("the verdict is %+v", v.Checks)
		}
		return err
	})
}

// up is the usual bench: a cloud and one enrolled gateway "gw1".
func up(t *testing.T, limit time.Duration, o Options, sources ...string) (*bench, *Gateway) {
	t.Helper()
	b := newBench(t, limit, o)
	g := b.gateway("gw1", sources...)
	b.startCloud()
	b.enrol(g)
	return b, g
}

// status waits for what the agent says of itself after now, and until ok likes
// it.
func (b *bench) status(g *Gateway, what string, ok func(agent.Status) bool) agent.Status {
	b.t.Helper()
	var s agent.Status
	now := time.Now()
	b.until(what, func() (err error) {
		if s, err = g.Status(); err != nil {
			return err
		}
		if !s.Time.After(now) || !ok(s) {
			return fmt.Errorf("the agent says %+v", s)
		}
		return nil
	})
	return s
}

// keep asks the keep itself.
func (b *bench) keep(g *Gateway) tee.StatusReply {
	b.t.Helper()
	s, err := g.keepStatus(b.ctx)
	b.must(err)
	return s
}

// listed returns what the cloud's list says of a gateway.
func (b *bench) listed(name string) (g cloud.Gateway, ok bool) {
	b.t.Helper()
	list, err := b.op.Gateways(b.ctx)
	b.must(err)
	for _, s := range list.Gateways {
		if s.Gateway.Name == name {
			return s.Gateway, true
		}
	}
	return g, false
}

package rig

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/workload"
	"edgekeep/workload/pack"
)

// supervising is the argument by which this test binary plays edgekeep-runner's
// supervisor for a worker of another architecture: what it executes is not itself
// but an emulator.
const supervising = "supervise"

// supervise runs workers, one after the other, as edgekeep-runner does.
func supervise(socket string, program ...string) int {
	for {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			time.Sleep(200 * time.Millisecond)
			continue
		}
		if err := work(conn.(*net.UnixConn), program); err != nil {
			fmt.Fprintln(os.Stderr, "the worker ended:", err)
		}
		conn.Close()
	}
}

func work(conn *net.UnixConn, program []string) error {
	f, err := conn.File()
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.Command(program[0], program[1:]...)
	cmd.Stderr, cmd.ExtraFiles, cmd.Env = os.Stderr, []*os.File{f}, []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			return err
		case <-time.After(50 * time.Millisecond):
		}
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLRDHUP}}
		if n, err := unix.Poll(fds, 0); err == nil && n > 0 {
			_ = cmd.Process.Kill()
			return errors.Join(errors.New("the keep hung up"), <-ended)
		}
	}
}

// startArm64 starts runners whose workers are programs for 64-bit Arm.
func (b *bench) startArm64(g *Gateway, n int, args ...string) {
	b.t.Helper()
	qemu, err := exec.LookPath("qemu-aarch64-static")
	if err != nil {
		b.t.Skip("qemu-aarch64-static is not installed: apt-get install qemu-user-static")
	}
	dir := b.path("arm64")
	b.must(os.MkdirAll(dir, 0o755))
	cmd := exec.Command("go", "build", "-o", dir+"/", "edgekeep/cmd/edgekeep-runner")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=arm64")
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("building the runner for arm64: %v\n%s", err, out)
	}
	for range n {
		p, err := b.start(g.Name+"-runner-arm64", g.runnerUID(), "supervisor",
			append([]string{supervising, g.RunnerSocket(), qemu, filepath.Join(dir, "edgekeep-runner"), "--worker"}, args...)...)
		b.must(err)
		g.runners = append(g.runners, p)
	}
}

// example builds and packs one of the example workloads, for a slow machine.
func (b *bench) example(name string) bundle {
	b.t.Helper()
	dir := b.path("examples")
	if out, err := exec.Command("sh", "../../workload/examples/build.sh", dir, name).CombinedOutput(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 3 {
			b.t.Skipf("%s", out)
		}
		b.t.Fatalf("%v: %s", err, out)
	}
	s, err := pack.Read(filepath.Join(dir, name), "")
	b.must(err)
	s.Manifest.Limits.CPU = 60_000
	kit, err := b.Kit("operator")
	b.must(err)
	signer, err := kit.Signer("operator.key")
	b.must(err)
	key := make([]byte, workload.KeySize)
	copy(key, name)
	p, _, err := s.Pack(key, signer)
	b.must(err)
	return bundle{manifest: p.Manifest, key: key, content: p.Content}
}

// two is a bench with two gateways, the first of which has a stream.
func two(t *testing.T, limit time.Duration, stream string) (b *bench, edge, other *Gateway) {
	t.Helper()
	b = newBench(t, limit, Options{})
	edge, other = b.gateway("edge", stream), b.gateway("other", "unused")
	b.startCloud()
	for _, g := range []*Gateway{edge, other} {
		b.enrol(g)
		b.grantGateway(g)
	}
	return b, edge, other
}

// running waits until a gateway says in its evidence that it runs an instance.
func (b *bench) running(g *Gateway, instance string) (out attest.Workload) {
	b.t.Helper()
	b.until(instance+" runs on "+g.Name, func() error {
		all, err := b.workloads(g)
		i := slices.IndexFunc(all, func(w attest.Workload) bool { return w.Instance == instance && w.Running })
		if err == nil && i < 0 {
			err = fmt.Errorf("its evidence says %+v", all)
		}
		if err == nil {
			out = all[i]
		}
		return err
	})
	return out
}

// TestMoveEngines moves instances between places that execute them in other ways,
// and holds what comes out against an instance that stays.
func TestMoveEngines(t *testing.T) {
	for _, engine := range []struct {
		name      string
		guests    []string
		start     func(b *bench, g *Gateway)
		compiler  bool
		protected bool
	}{
		{"interpreter", []string{"anomaly", "rolling"}, func(b *bench, g *Gateway) { b.must(g.StartRunners(3, "--interpreter")) }, false, true},
		{"arm64", []string{"rolling"}, func(b *bench, g *Gateway) { b.startArm64(g, 3) }, true, false},
		{"arm64 interpreter", []string{"rolling"}, func(b *bench, g *Gateway) { b.startArm64(g, 3, "--interpreter") }, false, false},
	} {
		if engine.name == "arm64 interpreter" && !long() {
			continue
		}
		t.Run(engine.name, func(t *testing.T) {
			b, edge, other := two(t, 5*time.Minute, "machine")
			b.must(edge.StartRunners(5))
			engine.start(b, other)
			from := workload.Source{Gateway: "edge", Stream: "machine"}
			b.deploy(edge, "counter", b.pack(counter("machine"), clang(t, "counter.c", "-mexec-model=reactor", "-DMB=1")), from)
			for _, name := range engine.guests {
				w := b.example(name)
				b.deploy(edge, name, w, from)
				b.deploy(edge, name+"-stays", w, from)
			}
			const n = 6000
			path := b.path("waves.csv")
			var text strings.Builder
			text.WriteString("timestamp,value\n")
			at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
			sum := 0.0
			for i := range n {
				v := math.Round(1000 + 200*math.Sin(float64(i)/40) + 50*math.Sin(float64(i)))
				fmt.Fprintf(&text, "%s,%.0f\n", at.Add(time.Duration(i)*5*time.Minute).Format(time.DateTime), v)
				sum += v
			}
			b.must(os.WriteFile(path, []byte(text.String()), 0o644))
			b.must(edge.StartDriver("machine", "replay", path, "--speed", "60000")) // 200 a second
			c := b.tally("counter")
			c.upTo(200)
			began := time.Now()
			for _, to := range []*Gateway{other, edge, other} {
				for _, name := range append(engine.guests, "counter") {
					b.move(name, to)
					claim := b.running(to, name)
					if to == other && claim.Compiler != engine.compiler || to == edge && !claim.Compiler {
						t.Errorf("on %s its evidence says compiler %v", to.Name, claim.Compiler)
					}
					t.Logf("%s on %s after %.1f s, memory %s, module %s", name, to.Name, time.Since(began).Seconds(), claim.Protection, hex.EncodeToString(claim.Rewritten[:4]))
				}
				c.upTo(min(n, int(c.count)+100))
			}
			c.upTo(n)
			if c.count != n || c.sum != sum {
				t.Errorf("counted %.0f with the sum %.0f, it was %d and %.0f", c.count, c.sum, n, sum)
			}
			for _, name := range engine.guests {
				b.alike(name, name+"-stays")
			}
		})
	}
}

// alike waits until two instances have given the same results. Their names begin
// with the input's, so they are the same too.
func (b *bench) alike(one, other string) {
	b.t.Helper()
	var got [2][]sealing.Reading
	var next [2]func() error
	for i, name := range []string{one, other} {
		r, err := b.consumer.Results(name)
		b.must(err)
		next[i] = func() error {
			more, err := r.Next(b.ctx, time.Second)
			for _, x := range more {
				if x.Gap != "" || x.Conflict != "" {
					b.t.Errorf("%s, line %d: %s%s", name, x.Line, x.Gap, x.Conflict)
				}
				got[i] = append(got[i], x.Reading)
			}
			return err
		}
	}
	last := -1
	b.until(one+" and "+other+" have said the same", func() error {
		for _, f := range next {
			if err := f(); err != nil {
				return err
			}
		}
		if len(got[0]) != len(got[1]) || len(got[0]) != last || last == 0 {
			last = len(got[0])
			return fmt.Errorf("%d and %d results", len(got[0]), len(got[1]))
		}
		return nil
	})
	for i, x := range got[0] {
		if x != got[1][i] {
			b.t.Fatalf("result %d of %s is %+v, of %s %+v", i, one, x, other, got[1][i])
		}
	}
	b.t.Logf("%s: %d results, as if it had not moved", one, len(got[0]))
}

// TestMoveLarge moves 64 MiB of memory that no compression would make smaller.
func TestMoveLarge(t *testing.T) {
	if !long() {
		t.Skip("64 MiB take a while: make test-long")
	}
	module := clang(t, "counter.c", "-mexec-model=reactor", "-DMB=64")
	b := newBench(t, 3*time.Minute, Options{})
	w := b.wire()
	edge, other := b.gateway("edge", "numbers"), b.gateway("other", "unused")
	b.startCloud()
	for _, g := range []*Gateway{edge, other} {
		b.enrol(g)
		b.must(g.StartRunners(2))
		b.grantGateway(g)
	}
	m := counter("numbers")
	m.Limits.Memory = 128 << 20
	b.deploy(edge, "counter", b.pack(m, module), workload.Source{Gateway: edge.Name, Stream: "numbers"})
	const n = 4000
	path, sum := b.numbers(n)
	b.must(edge.StartDriver("numbers", "replay", path, "--speed", "200"))
	c := b.tally("counter")
	c.upTo(100)
	for _, to := range []*Gateway{other, edge} {
		w.mu.Lock()
		before := w.bytes["frame"]
		w.mu.Unlock()
		began := time.Now()
		b.move("counter", to)
		took := time.Since(began)
		c.upTo(min(n, int(c.count)+20))
		w.mu.Lock()
		bytes := w.bytes["frame"] - before
		w.mu.Unlock()
		t.Logf("to %s: %.1f MiB in %.1f s, the next result after %.1f s", to.Name, float64(bytes)/(1<<20), took.Seconds(), time.Since(began).Seconds())
		if bytes < 64<<20 {
			t.Errorf("only %d bytes were seen", bytes)
		}
	}
	c.upTo(n)
	if c.count != n || c.sum != float64(sum) {
		t.Errorf("counted %.0f with the sum %.0f, it was %d and %d", c.count, c.sum, n, sum)
	}
}

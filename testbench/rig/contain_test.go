package rig

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"edgekeep/tee/attest"
	"edgekeep/workload"
)

// feeder writes numbered readings of a source and waits until the keep has them
// durably.
type feeder struct {
	w    *writer
	last int
}

func (b *bench) feeder(g *Gateway, source string) *feeder {
	b.t.Helper()
	w := b.writer(g, source)
	w.lines("#hello 1 feed")
	w.answer("#ack feed 0\n")
	w.lines("#seq 1")
	return &feeder{w: w}
}

// feed writes n more readings, whose values count on.
func (f *feeder) feed(n int, tags string) {
	f.w.b.t.Helper()
	var s strings.Builder
	for range n {
		f.last++
		fmt.Fprintf(&s, "m%s v=%di %d\n", tags, f.last, f.last)
	}
	go func() { _, _ = io.WriteString(f.w.conn, s.String()) }() // acknowledgements come before the end of it
	for want := fmt.Sprintf("#ack feed %d\n", f.last); ; {
		line, err := f.w.in.ReadString('\n')
		f.w.b.must(err)
		if line == want {
			return
		}
	}
}

// said is what new evidence says of a gateway's instances, by name.
func (b *bench) said(g *Gateway) map[string]attest.Workload {
	b.t.Helper()
	out := map[string]attest.Workload{}
	b.until("evidence", func() error {
		list, err := b.workloads(g)
		for _, w := range list {
			out[w.Instance] = w
		}
		return err
	})
	return out
}

// runs waits until an instance runs.
func (b *bench) runs(g *Gateway, instance string) {
	b.t.Helper()
	b.until(instance+" runs", func() error {
		if w := b.said(g)[instance]; !w.Running {
			return fmt.Errorf("%+v", w)
		}
		return nil
	})
}

const killed = "its runner was killed: over its CPU budget of 300 ms for a batch, out of memory, or from outside"

// bad are guests, by what they do and how they are built, and what is said of them.
var bad = []struct {
	instance, mode, shape, reason string
}{
	{"f-loop", "loop", workload.Filter, killed},
	{"r-loop", "loop", workload.Reactor, killed},
	{"f-alloc", "alloc", workload.Filter, "wasm error: unreachable"},
	{"r-alloc", "alloc", workload.Reactor, "wasm error: unreachable"},
	{"r-trap", "trap", workload.Reactor, "wasm error: unreachable"},
	{"f-stdout", "stdout", workload.Filter, "it wrote more than the 65536 bytes"},
	{"r-stdout", "stdout", workload.Reactor, "its manifest allows 65536"},
	{"f-stderr", "stderr", workload.Filter, killed},
	{"f-fill", "fill", workload.Filter, "exit code 4"},
	{"r-exit", "exit", workload.Reactor, "exit code 3"},
	{"f-malformed", "malformed", workload.Filter, "its results are not readings in json: line 3"},
	{"f-sleep", "sleep", workload.Filter, "its batch took too long"},
}

func badManifest(shape, mode, stream string) workload.Manifest {
	m := counter(stream)
	m.Name, m.Shape, m.Args = "bad", shape, []string{mode}
	m.Input.Wait, m.Limits = 200, workload.Limits{Memory: 16 << 20, CPU: 300, Disk: 1 << 20, Output: 64 << 10}
	return m
}

// TestContainment: a guest that loops, takes all memory, traps, floods, fills its
// directory, ends, writes nonsense or sleeps hurts only itself. It is named in the
// evidence with its failures and why, gets another runner later each time, and
// nothing of what it did in a batch that failed is ever seen.
func TestContainment(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("two sources need root")
	}
	modules := map[string][]byte{
		workload.Filter:  clang(t, "bad.c"),
		workload.Reactor: clang(t, "bad.c", "-DREACTOR", "-mexec-model=reactor"),
	}
	b, g := up(t, 2*time.Minute, Options{}, "numbers", "food")
	b.must(g.StartRunners(len(bad) + 2))
	b.deploy(g, "good", b.pack(counter("numbers"), clang(t, "counter.c", "-mexec-model=reactor")))
	for _, x := range bad {
		b.deploy(g, x.instance, b.pack(badManifest(x.shape, x.mode, "food"), modules[x.shape]))
	}
	b.deploy(g, "f-reach", b.pack(badManifest(workload.Filter, "reach", "food"), modules[workload.Filter]))

	const n = 20_000
	path, sum := b.numbers(n)
	b.must(g.StartDriver("numbers", "replay", path, "--speed", "1500"))
	f := b.feeder(g, "food")
	f.feed(10, "")
	b.until("each of them to be named, with three failures", func() error {
		said := b.said(g)
		for _, x := range bad {
			want := uint64(3)
			if x.mode == "sleep" { // it may sleep for as long as a batch may take
				want = 1
			}
			if w := said[x.instance]; w.Failures < want || !strings.Contains(w.Reason, x.reason) || w.Phase != "live" {
				return fmt.Errorf("%s: %d failures, %q, %s", x.instance, w.Failures, w.Reason, w.Phase)
			}
		}
		if w := said["good"]; w.Failures != 0 || w.Reason != "" {
			return fmt.Errorf("the good one has %d failures: %s", w.Failures, w.Reason)
		}
		return nil
	})
	for _, x := range bad {
		if got := b.allResults(x.instance); len(got) != 0 {
			t.Errorf("of batches that failed %s has let out %v", x.instance, got)
		}
	}
	b.spacedOut(g)
	for _, shape := range []string{"f-loop", "r-exit"} {
		out, _, err := b.cli("operator", "workload", "inspect", shape)
		b.must(err)
		t.Logf("workload inspect %s:\n%s", shape, out)
	}
	b.reachedNothing()

	// Everybody else had nothing of it.
	c := b.tally("good")
	c.upTo(n)
	if c.count != n || c.sum != float64(sum) {
		t.Errorf("the good one counted %.0f with the sum %.0f, it was %d and %d", c.count, c.sum, n, sum)
	}
	b.finish(g, "numbers")
	r := b.read(g, "numbers")
	r.upTo(n)
	for i, x := range r.got {
		if x.Value != float64(i+1) && x.Value != int64(i+1) {
			t.Fatalf("reading %d of the source is %+v", i+1, x)
		}
	}

	// With enough readings they behave, and have counted each of them once.
	f.feed(200, "")
	for _, x := range bad {
		c := b.tally(x.instance)
		c.upTo(210)
		if c.count != 210 || c.sum != 210*211/2 {
			t.Errorf("%s counted %.0f with the sum %.0f", x.instance, c.count, c.sum)
		}
	}
	said := b.said(g)
	for _, x := range bad {
		if w := said[x.instance]; !w.Running || w.Protection != said["good"].Protection {
			t.Errorf("%s does not run, or not like the good one, in %s: %+v", x.instance, said["good"].Protection, w)
		}
	}
	for _, x := range bad {
		res, err := b.op.Stop(b.ctx, x.instance)
		if b.must(err); !res.Done {
			t.Errorf("stopping %s: %s", x.instance, res.Reason)
		}
	}
	b.findings(g, nil)
	logs, _, err := b.cli("consumer", "workload", "logs", "f-exit")
	b.must(err)
	t.Logf("workload logs:\n%s", logs)
}

// allResults are all that is stored of an instance.
func (b *bench) allResults(instance string) (out []string) {
	b.t.Helper()
	r, err := b.consumer.Results(instance)
	b.must(err)
	for {
		got, err := r.Next(b.ctx, 0)
		b.must(err)
		if len(got) == 0 {
			return out
		}
		for _, x := range got {
			out = append(out, fmt.Sprintf("%d.%d %s %v", x.Epoch, x.Line, x.Name, x.Value))
		}
	}
}

var endedLine = regexp.MustCompile(`^time=(\S+) .*msg="a workload's runner ended" instance=(\S+) .*"again in"=(\S+)$`)

// spacedOut checks that runners came after the pauses that the keep announced, and
// that those double.
func (b *bench) spacedOut(g *Gateway) {
	b.t.Helper()
	paths, _ := filepath.Glob(b.path("logs", g.Name+"-keep.*.log")) // a constant pattern
	if len(paths) != 1 {
		b.t.Fatalf("the keep has the logs %v", paths)
	}
	raw, err := os.ReadFile(paths[0])
	b.must(err)
	type end struct {
		at   time.Time
		wait time.Duration
	}
	last, count := map[string]end{}, map[string]int{}
	for line := range strings.Lines(string(raw)) {
		m := endedLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		at, err := time.Parse(time.RFC3339Nano, m[1])
		b.must(err)
		wait, err := time.ParseDuration(m[3])
		b.must(err)
		if want := min(time.Second<<count[m[2]], time.Minute); wait != want {
			b.t.Errorf("after failure %d of %s the keep waits %s, want %s", count[m[2]]+1, m[2], wait, want)
		}
		if before := last[m[2]]; !before.at.IsZero() && at.Sub(before.at) < before.wait-time.Millisecond { // of the log's clock
			b.t.Errorf("%s ended %s and again %s later, though it was to wait %s", m[2], before.at, at.Sub(before.at), before.wait)
		}
		last[m[2]] = end{at, wait}
		count[m[2]]++
	}
	if len(count) != len(bad) {
		b.t.Errorf("the keep's log names %v", count)
	}
}

// reachedNothing checks what the guest says that tried to reach out.
func (b *bench) reachedNothing() {
	b.t.Helper()
	tried := 0
	for _, line := range b.allResults("f-reach") {
		if !strings.Contains(line, " reach/") {
			continue
		}
		if tried++; !strings.HasSuffix(line, " false") {
			b.t.Errorf("a guest says %s", line)
		}
	}
	if tried < 80 {
		b.t.Errorf("a guest tried %d ways out, want 80 at least", tried)
	}
}

// TestLoopDelaysNothing: while one guest is in one and the same loop, and another
// runner reads nothing at all, every reading is sealed, and the one after it.
func TestLoopDelaysNothing(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("two sources need root")
	}
	module := clang(t, "bad.c", "-DREACTOR", "-mexec-model=reactor")
	b, g := up(t, 2*time.Minute, Options{}, "numbers", "food")
	m := badManifest(workload.Reactor, "loop", "food")
	m.Limits.CPU = 600_000 // longer than the test
	b.must(g.StartRunners(1))
	b.deploy(g, "loop", b.pack(m, module))
	b.runs(g, "loop")
	looping := b.worker(g, 0)
	b.must(g.StartRunners(1))
	b.deploy(g, "good", b.pack(counter("numbers"), clang(t, "counter.c", "-mexec-model=reactor")))
	b.feeder(g, "food").feed(10, "")
	b.until("the loop", func() error {
		if used := cpu(looping); used < time.Second {
			return fmt.Errorf("%s of CPU time", used)
		}
		return nil
	})

	f := b.feeder(g, "numbers")
	before := cpu(looping)
	for range 50 { // one after the other: each is durable before the next is written
		f.feed(1, "")
	}
	c := b.tally("good")
	c.upTo(50)
	if after := cpu(looping); after <= before {
		t.Errorf("the loop used %s of CPU time before and %s after: it has ended", before, after)
	}

	// A runner that takes nothing from the keep, more than the keep holds for it.
	stopped := b.worker(g, 1)
	b.must(syscall.Kill(stopped, syscall.SIGSTOP))
	f.feed(40_000, ",a="+strings.Repeat("x", 400))
	for range 20 {
		f.feed(1, "")
	}
	r := b.read(g, "numbers")
	r.upTo(f.last)
	if len(r.got) != f.last || cpu(looping) <= before {
		t.Errorf("%d readings were sealed, %d were written", len(r.got), f.last)
	}
	b.must(syscall.Kill(stopped, syscall.SIGCONT))
	c.upTo(f.last)
	if want := float64(f.last) * float64(f.last+1) / 2; c.count != float64(f.last) || c.sum != want {
		t.Errorf("the runner that was stopped counted %.0f with the sum %.0f, want %d and %.0f", c.count, c.sum, f.last, want)
	}

	if w := b.said(g)["loop"]; w.Failures != 0 || !w.Running {
		t.Errorf("the loop was ended meanwhile: %+v", w)
	}
	if res, err := b.op.Stop(b.ctx, "loop"); err != nil || !res.Done {
		t.Errorf("stopping a guest in a loop: %+v, %v", res, err)
	}
	b.until("the end of the loop", func() error {
		if err := syscall.Kill(looping, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("process %d is still there: %v", looping, err)
		}
		return nil
	})
}

// worker is the process that has the guest in it, of a gateway's nth runner.
func (b *bench) worker(g *Gateway, n int) (pid int) {
	b.t.Helper()
	b.until("a worker", func() error {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", g.RunnerPIDs()[n])) // a constant pattern
		for _, path := range tasks {
			raw, _ := os.ReadFile(path) // the thread may have ended
			if f := strings.Fields(string(raw)); len(f) > 0 {
				var err error
				pid, err = strconv.Atoi(f[0])
				return err
			}
		}
		return errors.New("none")
	})
	return pid
}

// cpu is the CPU time that a process has used; 0 if it is gone.
func cpu(pid int) time.Duration {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	user, _ := strconv.Atoi(f[11]) // numbers, by the kernel's word
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// TestRunnerHasNoReach looks at a worker from outside: what it holds open, what it
// may do, and that not even root reads its guest's memory.
func TestRunnerHasNoReach(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("reading another process's memory needs root")
	}
	b, g := up(t, time.Minute, Options{}, "machine")
	b.must(g.StartRunners(1))
	b.deploy(g, "vault", b.pack(answering(), clang(t, "answer.c", "-mexec-model=reactor")))
	b.until("an answer", func() error { _, err := b.consumer.Infer(b.ctx, g.Name, "vault", []byte("abc")); return err })
	pid := b.worker(g, 0)
	b.confined(pid)

	input := "canary-" + strings.ToLower(strconv.FormatInt(time.Now().UnixNano(), 36)) + "-in"
	kept := []byte(input)
	for i := range kept {
		kept[i] ^= 1
	}
	_, err := b.consumer.Infer(b.ctx, g.Name, "vault", []byte("?"+input))
	b.must(err)
	w := b.said(g)["vault"]
	needles := map[string][]byte{"the input": []byte(input), "what the guest made of it": kept}
	found, unreadable := search(t, pid, needles)
	t.Logf("guest memory is %s; unreadable: %v; found: %v", w.Protection, unreadable, found)
	fd, err := unix.MemfdSecret(0)
	if err != nil {
		t.Skipf("this kernel has no secret memory: %v", err)
	}
	unix.Close(fd)
	if w.Protection != "memfd-secret" || unreadable["/secretmem (deleted)"] == 0 {
		t.Errorf("guest memory is %q, and %v cannot be read: want memfd-secret", w.Protection, unreadable)
	}
	for where := range found {
		if strings.Contains(where, "secretmem") {
			t.Errorf("found in secret memory: %s", where)
		}
	}

	control := exec.Command("sleep", "60")
	control.Env = []string{"CANARY=" + input}
	b.must(control.Start())
	defer func() { _ = control.Process.Kill(); _ = control.Wait() }()
	if found, _ := search(t, control.Process.Pid, needles); len(found) == 0 {
		t.Error("the search does not find what lies in a process in the clear: it proves nothing")
	}
}

// confined checks what the kernel says of a worker.
func (b *bench) confined(pid int) {
	b.t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	b.must(err)
	status := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		status[k] = strings.Join(strings.Fields(v), " ")
	}
	for k, want := range map[string]string{
		"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapAmb": "0000000000000000",
		"Uid": strings.Repeat(" "+strconv.Itoa(RunnerUID), 4)[1:], "Groups": "",
	} {
		if status[k] != want {
			b.t.Errorf("the worker has %s: %s, want %s", k, status[k], want)
		}
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	b.must(err)
	kinds := map[string]int{}
	for _, fd := range fds {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		b.must(err)
		switch n, _ := strconv.Atoi(fd.Name()); {
		case n == 0 || n == 1:
			to = "stdio " + to
		case n == 2:
			to = "stderr"
		case strings.HasPrefix(to, "socket:"):
			to = "socket"
		case strings.HasSuffix(to, "/pagemap"):
			to = "pagemap"
		case strings.HasPrefix(to, "/sys/fs/cgroup/"): // Go's runtime reads there how many processors it may use
			to = "cgroup"
		}
		kinds[to]++
	}
	b.t.Logf("the worker holds %v", kinds)
	for kind, n := range kinds {
		if !slices.Contains([]string{"stdio /dev/null", "stderr", "socket", "pagemap", "cgroup", "anon_inode:[userfaultfd]", "anon_inode:[eventpoll]", "anon_inode:[eventfd]"}, kind) || kind == "socket" && n > 1 {
			b.t.Errorf("the worker holds %d of %s open", n, kind)
		}
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if b.must(err); len(env) > 0 {
		b.t.Errorf("the worker's environment is %q", env)
	}
}

// search looks for needles in all of a process's memory. It returns where they
// were, and how many bytes could not be read, by mapping.
func search(t *testing.T, pid int, needles map[string][]byte) (found, unreadable map[string]int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found, unreadable = map[string]int{}, map[string]int{}
	const piece, overlap = 1 << 20, 4096
	buf := make([]byte, piece+overlap)
	for s := bufio.NewScanner(bytes.NewReader(maps)); s.Scan(); {
		f := strings.Fields(s.Text())
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil || !strings.HasPrefix(f[1], "r") || start>>63 != 0 {
			continue
		}
		name := "anonymous"
		if len(f) > 5 {
			name = strings.Join(f[5:], " ")
		}
		for at := start; at < end; at += piece {
			n, err := mem.ReadAt(buf[:min(piece+overlap, end-at)], int64(at))
			if n == 0 && err != nil {
				unreadable[name] += int(min(piece, end-at))
				continue
			}
			for what, needle := range needles {
				if k := bytes.Count(buf[:n], needle); k > 0 {
					found[what+" in "+name] += k
				}
			}
		}
	}
	return found, unreadable
}

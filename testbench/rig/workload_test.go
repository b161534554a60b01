package rig

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud/client"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// clang builds a guest of ours.
func clang(t *testing.T, source string, args ...string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "guest.wasm")
	cmd := exec.Command("clang", append([]string{"--target=wasm32-wasi", "-O2", "-o", out, "testdata/" + source}, args...)...)
	if msg, err := cmd.CombinedOutput(); err != nil {
		if _, e := exec.LookPath("clang"); e != nil {
			t.Skip("clang is not installed: apt-get install clang lld wasi-libc libclang-rt-14-dev-wasm32")
		}
		t.Fatalf("%v: %s", err, msg)
	}
	wasm, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return wasm
}

// counter is the manifest of the counting guest.
func counter(stream ...string) workload.Manifest {
	return workload.Manifest{
		Name: "counter", Version: "1", Shape: workload.Reactor,
		Input: workload.Input{Format: workload.JSON, Streams: stream, Batch: 500, Wait: 20}, Output: workload.JSON,
		Limits: workload.Limits{Memory: 64 << 20, CPU: 5000, Disk: 1 << 20, Output: 1 << 20}, Assurance: "tpm", Nodes: []string{"*"}, Moves: 1000, Commit: 50,
	}
}

// bundle is a packed workload.
type bundle struct {
	manifest []byte
	key      []byte
	content  []byte
}

// pack packs a guest with the operator's key.
func (b *bench) pack(m workload.Manifest, module []byte) bundle {
	b.t.Helper()
	out := bundle{key: make([]byte, workload.KeySize)}
	rand.Read(out.key)
	var err error
	out.content, err = workload.SealContent(out.key, module, nil)
	b.must(err)
	list, err := message.BlobList(out.content)
	b.must(err)
	sum := sha256.Sum256(module)
	m.Module, m.ModuleSize, m.Content, m.ContentSize = sum[:], int64(len(module)), message.BlobID(list), int64(len(out.content))
	kit, err := b.Kit("operator")
	b.must(err)
	signer, err := kit.Signer("operator.key")
	b.must(err)
	out.manifest, err = m.Sign(signer)
	b.must(err)
	return out
}

// deploy puts a workload on a gateway.
func (b *bench) deploy(g *Gateway, instance string, w bundle, inputs ...workload.Source) {
	b.t.Helper()
	_, err := b.op.PutBundle(b.ctx, w.content, nil)
	b.must(err)
	res, err := b.op.Deploy(b.ctx, g.Name, instance, w.manifest, w.key, inputs)
	b.must(err)
	if !res.Done {
		b.t.Fatalf("deploy refused: %s", res.Reason)
	}
}

// numbers writes n numbered readings where a replay finds them, and says what
// their sum is.
func (b *bench) numbers(n int) (path string, sum uint64) {
	b.t.Helper()
	var s strings.Builder
	s.WriteString("timestamp,value\n")
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := 1; i <= n; i++ {
		fmt.Fprintf(&s, "%s,%d\n", at.Add(time.Duration(i)*time.Second).Format(time.DateTime), i)
		sum += uint64(i)
	}
	path = b.path("numbers.csv")
	b.must(os.WriteFile(path, []byte(s.String()), 0o644))
	return path, sum
}

// tally reads a counter's results until it has counted so many, and checks that
// each line came once.
type tally struct {
	b     *bench
	r     *client.Results
	line  uint64
	count float64
	sum   float64
}

func (b *bench) tally(instance string) *tally {
	b.t.Helper()
	r, err := b.consumer.Results(instance)
	b.must(err)
	return &tally{b: b, r: r}
}

func (c *tally) upTo(n int) {
	c.b.t.Helper()
	c.b.until(fmt.Sprintf("%d readings counted", n), func() error {
		for c.count < float64(n) {
			got, err := c.r.Next(c.b.ctx, time.Second)
			if err != nil {
				return err
			}
			for _, x := range got {
				if x.Gap != "" || x.Conflict != "" || x.Line != c.line+1 {
					c.b.t.Errorf("line %d of epoch %d on %s after line %d: %s%s", x.Line, x.Epoch, x.Gateway, c.line, x.Gap, x.Conflict)
				}
				c.line = x.Line
				v := asFloat(x.Value)
				switch {
				case strings.HasSuffix(x.Name, "count"):
					c.count = v
				case strings.HasSuffix(x.Name, "sum"):
					c.sum = v
				}
			}
			if len(got) == 0 {
				return fmt.Errorf("%.0f so far, line %d", c.count, c.line)
			}
		}
		return nil
	})
}

func asFloat(v any) float64 {
	switch v := v.(type) {
	case int64:
		return float64(v)
	case uint64:
		return float64(v)
	case float64:
		return v
	}
	return -1
}

// TestWorkload: a reactor gets every reading of a stream once, in spite of kills.
func TestWorkload(t *testing.T) {
	module := clang(t, "counter.c", "-mexec-model=reactor")
	b, g := up(t, 3*time.Minute, Options{}, "numbers")
	b.must(g.StartRunners(1))
	b.deploy(g, "counter", b.pack(counter("numbers"), module), workload.Source{Gateway: g.Name, Stream: "numbers"})
	const n = 20_000
	path, sum := b.numbers(n)
	b.must(g.StartDriver("numbers", "replay", path, "--speed", "4000"))
	c := b.tally("counter")
	c.upTo(n)
	if c.count != n || c.sum != float64(sum) {
		t.Errorf("counted %.0f with the sum %.0f, it was %d and %d", c.count, c.sum, n, sum)
	}
}

// workloads are what a gateway's evidence, asked for now, says of instances.
func (b *bench) workloads(g *Gateway) ([]attest.Workload, error) {
	saved, v, err := b.op.Attest(b.ctx, g.Name)
	if err == nil && !v.Affirming() {
		err = fmt.Errorf("the verdict on %s is not affirming", g.Name)
	}
	if err != nil {
		return nil, err
	}
	claims, err := attest.ParseClaims(saved.Evidence)
	return claims.Workloads, err
}

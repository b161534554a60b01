// Bench measures what the README's last section reports, as ratios within one
// run: absolute times mean little on a shared machine.
//
//	seal_vs_bare     time to seal a 64 KiB batch in the keep (SenML, AES-256-GCM,
//	                 hash chain, signed checkpoint) / AES-256-GCM and SHA-256 of the
//	                 same bytes
//	durable_vs_bare  time until readings replayed at full speed through a driver,
//	                 the keep and the agent are durable / time to write the same
//	                 spool with one fdatasync for each of its chunks
//	attest_vs_bare   time from challenge to verdict over MQTT / a bare TPM quote and
//	                 one ES256 verification
//	rss_mb           resident memory of an idle keep and agent
//	binary_mb        sizes of the stripped programs
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"edgekeep/cloud/client"
	"edgekeep/tee/attest"
	"edgekeep/tee/tpm"
	"edgekeep/testbench/rig"
	"edgekeep/testbench/swtpm"
)

type figures struct {
	SealVsBare    float64            `json:"seal_vs_bare"`
	DurableVsBare float64            `json:"durable_vs_bare"`
	AttestVsBare  float64            `json:"attest_vs_bare"`
	ReadingsPerS  float64            `json:"readings_per_s"`
	AttestMS      float64            `json:"attest_ms"`
	RSS           map[string]float64 `json:"rss_mb"`
	Binary        map[string]float64 `json:"binary_mb"`
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "edgekeep-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	bin, err := filepath.Abs("bin")
	if err != nil {
		return err
	}
	var f figures
	fmt.Println("sealing …")
	if f.SealVsBare, err = seal(ctx); err != nil {
		return err
	}
	if err := f.gateway(ctx, dir, bin); err != nil {
		return err
	}
	f.Binary = map[string]float64{}
	for _, name := range []string{"keep", "agent", "sensor", "cloud"} {
		fi, err := os.Stat(filepath.Join(bin, "edgekeep-"+name))
		if err != nil {
			return err
		}
		f.Binary[name] = round(float64(fi.Size()) / (1 << 20))
	}
	line, err := json.Marshal(f)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", line)
	return nil
}

func round(x float64) float64 { return float64(int(x*100+0.5)) / 100 }

func median(xs []float64) float64 {
	slices.Sort(xs)
	return xs[len(xs)/2]
}

// seal runs the keep's own benchmark five times, the two sides in turn.
func seal(ctx context.Context) (float64, error) {
	out, err := exec.CommandContext(ctx, "go", "test", "./tee/keep", "-run", "^$", "-bench", "^BenchmarkSeal$", "-count", "5").CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%w\n%s", err, out)
	}
	times := map[string][]float64{}
	for _, m := range regexp.MustCompile(`BenchmarkSeal/(\w+)\S*\s+\d+\s+([\d.]+) ns/op`).FindAllStringSubmatch(string(out), -1) {
		ns, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return 0, err
		}
		times[m[1]] = append(times[m[1]], ns)
	}
	if len(times["keep"]) == 0 || len(times["bare"]) == 0 {
		return 0, fmt.Errorf("the benchmark printed no times:\n%s", out)
	}
	return round(median(times["keep"]) / median(times["bare"])), nil
}

// gateway measures a running gateway.
func (f *figures) gateway(ctx context.Context, dir, bin string) error {
	r, err := rig.New(ctx, rig.Options{Dir: dir, Bin: bin})
	if err != nil {
		return err
	}
	defer r.Stop()
	g, err := r.Gateway("gw1", "bench")
	if err != nil {
		return err
	}
	if err := g.Boot(ctx); err != nil {
		return err
	}
	if err := r.StartCloud(ctx); err != nil {
		return err
	}
	if err := g.Start(ctx); err != nil {
		return err
	}
	kit, err := r.Kit("operator")
	if err != nil {
		return err
	}
	op, err := kit.Connect()
	if err != nil {
		return err
	}
	defer op.Close()
	if err := g.Approve(ctx, op); err != nil {
		return err
	}
	fmt.Println("attesting …")
	if err := f.attest(ctx, op, dir); err != nil {
		return err
	}
	keep, agent := g.PIDs()
	f.RSS = map[string]float64{"keep": rss(keep), "agent": rss(agent)}
	fmt.Println("ingesting …")
	if err := r.StopCloud(); err != nil { // what is spooled stays there, to be counted
		return err
	}
	return f.ingest(ctx, g, dir)
}

// rss is the resident memory of a process in MiB.
func rss(pid int) float64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return -1
	}
	for line := range strings.Lines(string(raw)) {
		if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseFloat(strings.Fields(kb)[0], 64)
			if err != nil {
				return -1
			}
			return round(n / 1024)
		}
	}
	return -1
}

// attest compares rounds of attestation, asked for by an operator, with quotes of
// another software TPM and a verification.
func (f *figures) attest(ctx context.Context, op *client.Client, dir string) error {
	for { // the gateway is enrolled
		if _, v, err := op.Saved(ctx, "gw1"); err == nil && v.Affirming() {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	var full []float64
	for range 20 {
		// The gateway waits 200 ms between two questions to the cloud: ask when it is
		// ready, to time the round and not the wait.
		time.Sleep(300 * time.Millisecond)
		begin := time.Now()
		if _, _, err := op.Attest(ctx, "gw1"); err != nil {
			return err
		}
		full = append(full, time.Since(begin).Seconds())
	}
	bare, err := bareQuotes(ctx, dir)
	if err != nil {
		return err
	}
	f.AttestMS = round(median(full) * 1000)
	f.AttestVsBare = round(median(full) / bare)
	return nil
}

func bareQuotes(ctx context.Context, dir string) (float64, error) {
	t, err := swtpm.Start(ctx, swtpm.Options{Dir: filepath.Join(dir, "bare"), CADir: filepath.Join(dir, "manufacturer")})
	if err != nil {
		return 0, err
	}
	defer t.Stop()
	d, err := tpm.Open(t.Socket())
	if err != nil {
		return 0, err
	}
	defer d.Close()
	auth := tpm.AuthValue([32]byte{1})
	blob, err := d.NewAK(auth)
	if err != nil {
		return 0, err
	}
	ak, err := d.LoadAK(blob, auth)
	if err != nil {
		return 0, err
	}
	defer ak.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	digest := attest.KeyQualifier("bench")
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest)
	if err != nil {
		return 0, err
	}
	var times []float64
	for range 50 {
		begin := time.Now()
		if _, _, err := ak.Quote(digest, rig.PCRs); err != nil {
			return 0, err
		}
		if !ecdsa.VerifyASN1(&key.PublicKey, digest, sig) {
			return 0, fmt.Errorf("a signature does not verify")
		}
		times = append(times, time.Since(begin).Seconds())
	}
	return median(times), nil
}

const ingestRows = 400_000

// ingest replays a CSV at full speed until the driver has all acknowledged.
func (f *figures) ingest(ctx context.Context, g *rig.Gateway, dir string) error {
	var b strings.Builder
	b.WriteString("time,a,b\n")
	for i := range ingestRows {
		fmt.Fprintf(&b, "%d,%.3f,%d\n", 1_700_000_000_000_000_000+int64(i)*1_000_000, float64(i%9973)/7, i%101)
	}
	path := filepath.Join(dir, "bench.csv")
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		return err
	}
	begin := time.Now()
	if err := g.StartDriver("bench", "replay", path, "--speed", "0"); err != nil {
		return err
	}
	select {
	case <-g.DriverDone("bench"):
	case <-ctx.Done():
		return ctx.Err()
	}
	took := time.Since(begin).Seconds()
	line, err := g.StopDriver("bench")
	if err != nil {
		return fmt.Errorf("the driver: %w: %s", err, line)
	}
	size, err := sizeOf(g.Path("agent/spool"))
	if err != nil {
		return err
	}
	time.Sleep(2 * time.Second) // until the status file tells of it
	s, err := g.Status()
	if err != nil {
		return err
	}
	bare, err := bareWrites(dir, size, max(1, s.SpoolChunks))
	if err != nil {
		return err
	}
	f.ReadingsPerS = float64(int(2 * ingestRows / took))
	f.DurableVsBare = round(took / bare)
	return nil
}

// sizeOf adds up the files in a directory.
func sizeOf(dir string) (int64, error) {
	var n int64
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			n += fi.Size()
		}
		return err
	})
	return n, err
}

// bareWrites writes size bytes in n pieces, with an fdatasync after each.
func bareWrites(dir string, size int64, n int) (float64, error) {
	f, err := os.Create(filepath.Join(dir, "bare.bin"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	piece := make([]byte, size/int64(n))
	rand.Read(piece)
	begin := time.Now()
	for range n {
		if _, err := f.Write(piece); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
	}
	return time.Since(begin).Seconds(), nil
}

// Package demo runs the main job of Edgekeep on one machine and watches it: a
// cloud, a gateway with a software TPM, drivers, a consumer who opens what
// arrives, and an eavesdropper who sees every MQTT message. Everything but the
// TPM and the firmware is the product as it ships, each part in a process of its
// own.
package demo

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"edgekeep/cloud/client"
	"edgekeep/tee/attest"
	"edgekeep/testbench/rig"
)

// Options of a demo.
type Options struct {
	Dir    string        // created; "" makes a temporary one
	Bin    string        // directory of the programs
	Broker string        // "nats" or "mosquitto"
	For    time.Duration // 0: until ctx ends
	Screen bool          // redraw a view instead of printing lines
	Width  int
}

// Result is the demo's last line. Every figure is counted from what happened.
type Result struct {
	Readings      uint64 `json:"readings"`       // that the drivers say the keep acknowledged
	Records       int    `json:"records"`        // opened at the consumer
	Delivered     int    `json:"delivered"`      // readings opened and checked at the consumer, each counted once
	Lost          int    `json:"lost"`           // acknowledged and not delivered
	Duplicated    int    `json:"duplicated"`     // delivered again
	Verdict       string `json:"verdict"`        // of the newest verdict
	EvidenceBytes int    `json:"evidence_bytes"` // size of the newest evidence
	PlaintextHits int    `json:"plaintext_hits"` // occurrences of the canary where only sealed bytes belong
	Commands      int    `json:"commands"`       // executed by the keep
	Dir           string `json:"dir"`
}

// gateway is the demo's only gateway.
const gateway = "gw1"

// Demo is a running demo.
type Demo struct {
	o       Options
	out     io.Writer
	rig     *rig.Rig
	gw      *rig.Gateway
	op      *client.Client
	canary  string
	control string
	tap     *tap

	mu     sync.Mutex // protects what follows
	seen   map[string]int
	sealed bool // the canary went through, sealed
	view   view
	count  Result
}

// Run runs the demo and prints its result as the last line on out. The error is
// not nil if anything was lost, doubled or leaked, or the verdict is not
// affirming.
func Run(ctx context.Context, o Options, out io.Writer) error {
	if o.Dir == "" {
		dir, err := os.MkdirTemp("", "edgekeep-demo-")
		if err != nil {
			return fmt.Errorf("making a directory: %w", err)
		}
		o.Dir = dir
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the demo's directory: %w", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // drivers have users of their own
		return fmt.Errorf("opening the demo's directory: %w", err)
	}
	o.Dir = dir
	d := &Demo{o: o, out: out, canary: secret(), control: "c-" + rand.Text(), seen: map[string]int{}}
	defer d.close()
	if err := d.setup(ctx); err != nil {
		return err
	}
	if err := d.job(ctx); err != nil {
		return err
	}
	return d.finish()
}

// secret is an incompressible string that occurs nowhere else.
func secret() string {
	b := make([]byte, 48)
	rand.Read(b) // never fails
	return "canary-" + base64.RawURLEncoding.EncodeToString(b)
}

func (d *Demo) say(format string, args ...any) {
	if !d.o.Screen {
		fmt.Fprintf(d.out, format+"\n", args...)
		return
	}
	d.mu.Lock()
	d.view.note = fmt.Sprintf(format, args...)
	d.mu.Unlock()
	d.draw()
}

func (d *Demo) setup(ctx context.Context) error {
	d.say("Everything is in %s", d.o.Dir)
	d.say("1  making a TPM (swtpm) and playing the firmware: PCRs 0 4 7 8 get the digests of our programs")
	var err error
	if d.rig, err = rig.New(ctx, rig.Options{Dir: d.o.Dir, Bin: d.o.Bin, Broker: d.o.Broker}); err != nil {
		return err
	}
	if d.gw, err = d.rig.Gateway(gateway, d.sources()...); err != nil {
		return err
	}
	if err := d.gw.Boot(ctx); err != nil {
		return err
	}
	d.say("2  starting the cloud (verifier, key broker, fleet), its policy written from the same digests")
	if err := d.rig.StartCloud(ctx); err != nil {
		return err
	}
	if d.tap, err = openTap(ctx, d.rig); err != nil {
		return err
	}
	d.say("3  starting keep and agent; the gateway asks to enrol over MQTT")
	if err := d.gw.Start(ctx); err != nil {
		return err
	}
	kit, err := d.rig.Kit("operator")
	if err != nil {
		return err
	}
	if d.op, err = kit.Connect(); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	d.say("4  approving its TPM as %s/%s, as `edgekeep gateway approve` does", rig.Tenant, gateway)
	if err := d.gw.Approve(wait, d.op); err != nil {
		return err
	}
	return d.awaitVerdict(wait)
}

func (d *Demo) sources() []string {
	if os.Getuid() != 0 {
		return []string{"canary"} // one user, one source: run as root to see more
	}
	return []string{"canary", "host", "machine"}
}

func (d *Demo) awaitVerdict(ctx context.Context) error {
	for {
		_, v, err := d.op.Saved(ctx, gateway)
		if err == nil && v.Affirming() {
			d.noteVerdict(v)
			d.say("5  the verdict is %s: a TLS certificate was issued, sealing begins", attest.Tier(v.Appraisal().Status))
			return nil
		}
		if e := d.gw.Ended(); e != nil {
			return e
		}
		select {
		case <-ctx.Done():
			s, _ := d.gw.Status()
			return fmt.Errorf("no affirming verdict: %w; the agent says: %s", ctx.Err(), s.Reason)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// job runs drivers, a consumer and a few commands until the time is over.
func (d *Demo) job(ctx context.Context) error {
	if d.o.For > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.o.For)
		defer cancel()
	}
	if err := d.startDrivers(); err != nil {
		return err
	}
	defer d.draw()
	var wg sync.WaitGroup
	defer wg.Wait()
	jobs, stop := context.WithCancel(ctx)
	defer stop()
	reader, err := d.reader()
	if err != nil {
		return err
	}
	wg.Go(func() { d.consume(jobs, reader, time.Second) })
	wg.Go(func() { d.watch(jobs) })
	wg.Go(func() { d.command(jobs) })
	for {
		select {
		case <-ctx.Done():
			stop()
			wg.Wait()
			return d.drain(reader)
		case <-time.After(250 * time.Millisecond):
			if err := d.gw.Ended(); err != nil {
				return err
			}
			d.draw()
		}
	}
}

// startDrivers starts a driver for each source. The canary's replays a file in
// which one value, now and then, is the secret that must not be found anywhere.
func (d *Demo) startDrivers() error {
	for _, s := range d.sources() {
		var args []string
		switch s {
		case "host":
			args = []string{"host", "--interval", "500ms"}
		default:
			path := d.gw.Path(s + ".csv")
			if err := os.WriteFile(path, d.series(s), 0o644); err != nil {
				return fmt.Errorf("writing what %s replays: %w", s, err)
			}
			args = []string{"replay", path, "--speed", "1", "--measurement", s}
		}
		if err := d.gw.StartDriver(s, args...); err != nil {
			return err
		}
	}
	return nil
}

// series is a CSV of a day: a machine's temperature that drifts, or the canary.
func (d *Demo) series(source string) []byte {
	var b strings.Builder
	begin := time.Now().Add(time.Second).UTC()
	if source == "machine" {
		b.WriteString("time,temperature,vibration\n")
		for i := range 20 * 3600 * 4 {
			x := float64(i%2400)/2400*6.28 - 3.14
			fmt.Fprintf(&b, "%s,%.3f,%.4f\n", begin.Add(time.Duration(i)*50*time.Millisecond).Format(time.RFC3339Nano), 70+12*x*(1-x*x/16), 0.1+0.001*float64(i%97))
		}
		return []byte(b.String())
	}
	b.WriteString("time,secret\n")
	for i := range 3600 * 4 {
		fmt.Fprintf(&b, "%s,%s\n", begin.Add(time.Duration(i)*time.Second).Format(time.RFC3339Nano), d.canary)
	}
	return []byte(b.String())
}

// command sends one of each command, as an operator would.
func (d *Demo) command(ctx context.Context) {
	for _, c := range []struct {
		name string
		args map[string]string
	}{{"status", nil}, {"set-interval", map[string]string{"seconds": "20"}}, {"attest-now", nil}, {"rotate-stream-keys", nil}} {
		select {
		case <-ctx.Done():
			return
		case <-time.After(2 * time.Second):
		}
		r, err := d.op.Command(ctx, gateway, c.name, c.args, time.Now().Add(time.Minute))
		if err != nil || !r.Done {
			if ctx.Err() == nil {
				d.say("command %s: %v %s", c.name, err, r.Reason)
			}
			continue
		}
		d.mu.Lock()
		d.count.Commands++
		d.mu.Unlock()
		d.say("command %s was executed by the keep; its answer is signed", c.name)
	}
}

// drain stops the drivers, which tell what was acknowledged, and waits until the
// consumer has all of it.
func (d *Demo) drain(reader *client.Reader) error {
	d.say("stopping the drivers, and waiting until everything has arrived")
	for _, s := range d.sources() {
		line, err := d.gw.StopDriver(s)
		var figures struct {
			Readings uint64 `json:"readings"`
		}
		if e := json.Unmarshal([]byte(line), &figures); e != nil {
			return fmt.Errorf("the driver of %s ended with %q: %w", s, line, errors.Join(err, e))
		}
		d.count.Readings += figures.Readings
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	for ctx.Err() == nil && uint64(len(d.seen)) < d.count.Readings {
		d.consumeOnce(ctx, reader, time.Second)
	}
	quiet, stop := context.WithTimeout(context.Background(), 2*time.Second)
	defer stop()
	d.consume(quiet, reader, 500*time.Millisecond) // anything that comes twice comes now
	s, v, err := d.op.Saved(ctx, gateway)
	if err != nil {
		return err
	}
	d.noteVerdict(v)
	d.count.EvidenceBytes = len(s.Evidence)
	return nil
}

func (d *Demo) noteVerdict(v attest.Verdict) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.view.verdict = v
	d.count.Verdict = attest.Tier(v.Appraisal().Status)
	if time.Now().Unix() >= v.Expires {
		d.count.Verdict = "expired"
	}
}

func (d *Demo) reader() (*client.Reader, error) {
	kit, err := d.rig.Kit("consumer")
	if err != nil {
		return nil, err
	}
	c, err := kit.Connect()
	if err != nil {
		return nil, err
	}
	return c.Reader(gateway, "")
}

// consume opens what arrives, as any holder of a consumer key could.
func (d *Demo) consume(ctx context.Context, r *client.Reader, wait time.Duration) {
	for ctx.Err() == nil {
		d.consumeOnce(ctx, r, wait)
	}
}

func (d *Demo) consumeOnce(ctx context.Context, r *client.Reader, wait time.Duration) {
	recs, err := r.Next(ctx, wait)
	if err != nil {
		if ctx.Err() == nil {
			d.say("consumer: %v", err)
			time.Sleep(200 * time.Millisecond)
		}
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range recs {
		d.count.Records++
		for _, x := range o.Readings {
			// A driver gives each reading a time of its own: name and time tell whether
			// one came twice.
			id := fmt.Sprintf("%s/%s@%d", o.Stream, x.Name, x.Time)
			d.seen[id]++
			if d.seen[id] > 1 {
				d.count.Duplicated++
			}
			d.sealed = d.sealed || x.Value == d.canary
			d.view.newest(o.Stream, x, d.canary)
		}
	}
}

// finish searches for the canary and prints the last line.
func (d *Demo) finish() error {
	d.count.Delivered = len(d.seen)
	d.count.Lost = max(0, int(d.count.Readings)-d.count.Delivered)
	d.count.Dir = d.o.Dir
	hits, err := d.search()
	if err != nil {
		return err
	}
	d.count.PlaintextHits = hits
	d.draw()
	if d.o.Screen {
		fmt.Fprintln(d.out)
	}
	if err := d.stop(); err != nil {
		d.say("stopping: %v", err)
	}
	line, err := json.Marshal(d.count)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "%s\n", line)
	switch c := d.count; {
	case c.Readings == 0 || c.Delivered == 0:
		return errors.New("no reading went through: nothing was shown")
	case !d.sealed:
		return errors.New("the canary did not go through: that it was found nowhere proves nothing")
	case c.Lost != 0 || c.Duplicated != 0:
		return fmt.Errorf("%d readings were lost and %d doubled", c.Lost, c.Duplicated)
	case c.PlaintextHits != 0:
		return fmt.Errorf("the canary was found in the clear %d times", c.PlaintextHits)
	case c.Verdict != "affirming":
		return fmt.Errorf("the verdict is %s", c.Verdict)
	}
	return nil
}

func (d *Demo) stop() error {
	if d.rig == nil {
		return nil
	}
	r := d.rig
	d.rig = nil
	return r.Stop()
}

func (d *Demo) close() {
	if d.op != nil {
		d.op.Close()
	}
	if d.tap != nil {
		d.tap.close()
	}
	if err := d.stop(); err != nil {
		fmt.Fprintln(d.out, "stopping:", err)
	}
}

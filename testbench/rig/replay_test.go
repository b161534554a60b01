package rig

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"edgekeep/agent"
	"edgekeep/cloud/client"
	"edgekeep/sealing"
)

// replay is a file of old readings and what has to arrive of it.
type replay struct {
	path string
	want []sealing.Reading
}

// machine is 22,695 readings of a machine's temperature up to its failure
// (Numenta Anomaly Benchmark).
func machine(t *testing.T) replay {
	t.Helper()
	r := replay{path: vector(t, "nab/machine_temperature_system_failure.csv")}
	f, err := os.Open(r.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows[1:] {
		at, err := time.Parse(time.DateTime, row[0])
		if err != nil {
			t.Fatal(err)
		}
		v, err := strconv.ParseFloat(row[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		r.want = append(r.want, sealing.Reading{Name: "replay/value", Time: at.UnixNano(), Value: v})
	}
	if len(r.want) != 22_695 {
		t.Fatalf("the file has %d readings, it is known for 22695", len(r.want))
	}
	return r
}

// vector finds a published test vector.
func vector(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("EDGEKEEP_VECTORS")
	for up := ".."; dir == "" && up != "../../../../../.."; up += "/.." {
		if _, err := os.Stat(filepath.Join(up, "shared/vectors")); err == nil {
			dir = filepath.Join(up, "shared/vectors")
		}
	}
	if dir == "" {
		t.Skip("the published test vectors are not here: set EDGEKEEP_VECTORS to their directory")
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// speed is that of a replay which takes so long.
func (r replay) speed(d time.Duration) string {
	span := r.want[len(r.want)-1].Time - r.want[0].Time
	return strconv.FormatFloat(float64(span)/float64(d), 'f', -1, 64)
}

// reading collects what a consumer gets of one stream.
type reading struct {
	b      *bench
	reader *client.Reader
	got    []sealing.Reading
	epochs []sealing.Epoch // in the order of their first record
	last   client.Opened
}

func (b *bench) read(g *Gateway, stream string) *reading {
	b.t.Helper()
	r, err := b.consumer.Reader(g.Name, stream)
	b.must(err)
	return &reading{b: b, reader: r}
}

// next takes what has arrived, and fails the test at a gap.
func (r *reading) next(wait time.Duration) (n int, err error) {
	r.b.t.Helper()
	opened, err := r.reader.Next(r.b.ctx, wait)
	for _, o := range opened {
		if o.Gap != "" {
			r.b.t.Errorf("after %d readings: %s", len(r.got), o.Gap)
		}
		if o.Epoch != r.last.Epoch {
			r.epochs = append(r.epochs, o.Epoch)
		}
		r.last = o
		r.got = append(r.got, o.Readings...)
	}
	return len(opened), err
}

// upTo reads until n readings have arrived. Errors are tried again: the cloud may
// be away.
func (r *reading) upTo(n int) {
	r.b.t.Helper()
	r.b.until(fmt.Sprintf("%d readings", n), func() error {
		for len(r.got) < n {
			if _, err := r.next(time.Second); err != nil {
				return fmt.Errorf("%d have arrived: %w", len(r.got), err)
			}
			if err := r.b.ctx.Err(); err != nil {
				return fmt.Errorf("%d have arrived: %w", len(r.got), err)
			}
		}
		return nil
	})
}

// all waits until the gateway has nothing left to send, and reads to the end.
func (r *reading) all(g *Gateway) {
	r.b.t.Helper()
	r.b.status(g, "an empty spool", func(s agent.Status) bool { return s.Connected && s.SpoolChunks == 0 })
	for {
		n, err := r.next(0)
		r.b.must(err)
		if n == 0 {
			return
		}
	}
}

// equal checks that exactly these readings arrived, in this order.
func (r *reading) equal(want []sealing.Reading) {
	r.b.t.Helper()
	for i := range min(len(want), len(r.got)) {
		if r.got[i] != want[i] {
			r.b.t.Fatalf("reading %d of %d is %+v, want %+v", i, len(want), r.got[i], want[i])
		}
	}
	if len(r.got) != len(want) {
		r.b.t.Fatalf("%d readings went in, %d came out", len(want), len(r.got))
	}
	r.b.t.Logf("%d readings in, %d out, in %d epochs", len(want), len(r.got), len(r.epochs))
}

// findings fails the test if the cloud found anything but what is expected, by
// kind.
func (b *bench) findings(g *Gateway, want map[string]int) {
	b.t.Helper()
	d, err := b.op.Gateway(b.ctx, g.Name)
	b.must(err)
	got := map[string]int{}
	for _, f := range d.Findings {
		got[f.Kind]++
	}
	for _, kinds := range []map[string]int{got, want} {
		for kind := range kinds {
			if got[kind] != want[kind] {
				b.t.Errorf("%d findings of kind %q, want %d: %+v", got[kind], kind, want[kind], d.Findings)
			}
		}
	}
}

// figures is what a driver prints at its end.
type figures struct {
	Sent, Acked, Readings, Rejected uint64
}

// finish waits for a driver that ends by itself.
func (b *bench) finish(g *Gateway, source string) figures {
	b.t.Helper()
	select {
	case <-g.DriverDone(source):
	case <-b.ctx.Done():
		b.t.Fatalf("the driver of %s does not end", source)
	}
	if err := g.drivers[source].Err(); err != nil {
		b.t.Fatalf("the driver of %s failed: %v\n%s", source, err, g.drivers[source].LogTail())
	}
	line, err := g.StopDriver(source)
	b.must(err)
	var f figures
	if err := json.Unmarshal([]byte(line), &f); err != nil {
		b.t.Fatalf("the driver's account %q: %v", line, err)
	}
	if f.Rejected != 0 || f.Sent != f.Acked {
		b.t.Errorf("the driver's account: %s", line)
	}
	return f
}

func TestReplayArrives(t *testing.T) {
	for _, broker := range []string{"nats", "mosquitto"} {
		t.Run(broker, func(t *testing.T) {
			file := machine(t)
			b, g := up(t, time.Minute, Options{Broker: broker}, "machine")
			b.must(g.StartDriver("machine", "replay", file.path, "--speed", "0"))
			if f := b.finish(g, "machine"); f.Readings != uint64(len(file.want)) {
				t.Errorf("the driver's account: %+v", f)
			}
			r := b.read(g, "machine")
			r.upTo(len(file.want))
			r.all(g)
			r.equal(file.want)
			b.findings(g, nil)
			if s := b.keep(g).Sources[0]; s.Lines != 22_695 || s.Readings != 22_695 || s.Rejected+s.Repeated+s.Missing != 0 {
				t.Errorf("the keep counts %+v", s)
			}
			b.replayedAgain(g, file, r)
		})
	}
}

// replayedAgain starts the same replay a second time: all of it is known.
func (b *bench) replayedAgain(g *Gateway, file replay, r *reading) {
	b.t.Helper()
	b.must(g.StartDriver("machine", "replay", file.path, "--speed", "0"))
	if f := b.finish(g, "machine"); f.Sent != 0 {
		b.t.Errorf("a finished replay was sent again: %+v", f)
	}
	r.all(g)
	r.equal(file.want)
}

// wait waits; it is for choosing a moment, not for something to be ready.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

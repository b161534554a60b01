// Package hands checks Edgekeep with other people's hands: a Python script that
// was written from docs/protocol.md alone opens what a gateway sealed, and
// tpm2-tools judge its quotes.
package hands

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"edgekeep/cloud/client"
	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/testbench/rig"
)

const python = "/usr/bin/python3" // Debian's, which has Debian's modules

// skip skips a test for want of a tool, but not in continuous integration.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func need(t *testing.T, programs ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("end-to-end tests take too long for -short")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			skip(t, "%s is missing (apt-get install swtpm swtpm-tools tpm2-tools zstd python3-cbor2 python3-cryptography)", p)
		}
	}
}

// bench is a cloud with its people.
type bench struct {
	*rig.Rig
	t            *testing.T
	ctx          context.Context //nolint:containedctx // of the test: it ends with it
	op, consumer *client.Client
}

func (b *bench) must(err error) {
	b.t.Helper()
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

// start builds the programs and starts a rig with these gateways. The one named
// "plain" does not compress.
func start(t *testing.T, names []string, sources ...string) (*bench, map[string]*rig.Gateway) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	b := &bench{t: t, ctx: ctx}
	bin, dir := short(t), short(t)
	build := exec.CommandContext(ctx, "go", "build", "-o", bin+"/", "edgekeep/cmd/edgekeep-keep", "edgekeep/cmd/edgekeep-agent",
		"edgekeep/cmd/edgekeep-cloud", "edgekeep/cmd/edgekeep-sensor")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the programs: %v\n%s", err, out)
	}
	var err error
	b.Rig, err = rig.New(ctx, rig.Options{Dir: dir, Bin: bin})
	b.must(err)
	t.Cleanup(func() {
		if err := b.Stop(); err != nil {
			t.Errorf("stopping: %v", err)
		}
	})
	gateways := map[string]*rig.Gateway{}
	for _, name := range names {
		g, err := b.Gateway(name, sources...)
		b.must(err)
		g.Compress = name != "plain"
		b.must(g.Boot(ctx))
		gateways[name] = g
	}
	b.must(b.StartCloud(ctx))
	for name, to := range map[string]**client.Client{"operator": &b.op, "consumer": &b.consumer} {
		kit, err := b.Kit(name)
		b.must(err)
		*to, err = kit.Connect()
		b.must(err)
		t.Cleanup((*to).Close)
	}
	for _, g := range gateways {
		b.must(g.Start(ctx))
		b.must(g.Approve(ctx, b.op))
	}
	for name := range gateways {
		b.until("an affirming verdict on "+name, func() error {
			_, v, err := b.op.Saved(ctx, name)
			if err == nil && !v.Affirming() {
				err = fmt.Errorf("the verdict is %+v", v.Checks)
			}
			return err
		})
	}
	return b, gateways
}

// short makes a directory with a short path, for sockets, that every user may
// enter.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hands-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// reading is one line that the script prints.
type reading struct {
	Subject, Stream, Epoch string
	Seq                    uint64
	Name, Unit             string
	Time                   int64
	Value                  json.RawMessage
}

// value spells a number or a boolean so that an integer is never equal to a float.
func value(v any) string {
	if f, ok := v.(float64); ok {
		return "float " + strconv.FormatUint(math.Float64bits(f), 16)
	}
	return fmt.Sprint(v)
}

// said is value of what the script printed, in whose spelling a float, and nothing
// else, has a point or an exponent.
func said(raw json.RawMessage) string {
	s := string(raw)
	if !strings.ContainsAny(s, ".e") || s == "true" || s == "false" {
		return s
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return "not a float: " + s
	}
	return value(f)
}

// want is a reading that was sent.
type want struct {
	name, unit string
	time       int64
	value      any
}

// table writes a CSV file with what is hard about names, times and numbers in
// it, and says what has to arrive of its rows. The names are escaped by hand,
// from docs/protocol.md §12.
func table(t *testing.T, salt int) (path string, out []want) {
	t.Helper()
	var b strings.Builder
	b.WriteString("ts,temp,Ström/A,state\n")
	floats := []string{"21.5", "0.1", "-0", "5e-324", "65504", "65505", "1e22", "-3", "1.7976931348623157e308", "16777217"}
	texts := []string{"ok", "a b", "°C, µ", `back\slash`}
	for i := range 4000 {
		at := int64(1_700_000_000_000_000_001) + int64(i)*1_000_003 + int64(salt)
		switch i {
		case 0:
			at = -1_500_000_000_000_000_000 // 1922
		case 1:
			at = 86_400_000_000_000 // a day: an absolute time all the same
		}
		stamp := time.Unix(0, at).UTC().Format(time.RFC3339Nano)
		f, g, s := floats[i%len(floats)], strconv.Itoa(i*7+salt)+".25", texts[i%len(texts)]
		fmt.Fprintf(&b, "%s,%s,%s,\"%s\"\n", stamp, f, g, s)
		v, err := strconv.ParseFloat(f, 64)
		if err != nil {
			t.Fatal(err)
		}
		w, err := strconv.ParseFloat(g, 64)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out,
			want{"x:_Hall:201/temp", "", at, v}, want{"x:_Hall:201/Str:c3:b6m:2fA", "", at, w}, want{"x:_Hall:201/state", "", at, s})
	}
	path = filepath.Join(short(t), "table.csv")
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return path, out
}

// lines are readings of the kinds that a CSV file cannot hold.
const lines = `climate,room=Hall\ 1,unit=Cel temp=21.5,n=3i 1700000000123456789
climate,room=Hall\ 1,unit=Cel temp=-9223372036854775808i,n=18446744073709551615u,on=true,off=false,note="a \"b\"" 1700000000123456790
`

var linesWant = []want{
	{"climate/room.Hall:201/temp", "Cel", 1700000000123456789, 21.5},
	{"climate/room.Hall:201/n", "Cel", 1700000000123456789, int64(3)},
	{"climate/room.Hall:201/temp", "Cel", 1700000000123456790, int64(math.MinInt64)},
	{"climate/room.Hall:201/n", "Cel", 1700000000123456790, uint64(math.MaxUint64)},
	{"climate/room.Hall:201/on", "Cel", 1700000000123456790, true},
	{"climate/room.Hall:201/off", "Cel", 1700000000123456790, false},
	{"climate/room.Hall:201/note", "Cel", 1700000000123456790, `a "b"`},
}

// send writes lines to the ingest socket as the user of the second source,
// without numbers, as any program could.
func (b *bench) send(g *rig.Gateway, text string) {
	b.t.Helper()
	cmd := exec.CommandContext(b.ctx, python, "-c",
		"import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(sys.stdin.buffer.read())", g.Ingest())
	cmd.Stdin = strings.NewReader(text)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: rig.SourceUID + 1, Gid: rig.SourceUID + 1}}
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("sending lines: %v\n%s", err, out)
	}
}

// replay has the first source's driver replay a file to its end.
func (b *bench) replay(g *rig.Gateway, path string) {
	b.t.Helper()
	b.must(g.StartDriver("file", "replay", path, "--speed", "0", "--measurement", "_Hall 1"))
	select {
	case <-g.DriverDone("file"):
	case <-b.ctx.Done():
		b.t.Fatal("the driver does not end")
	}
	account, err := g.StopDriver("file")
	b.must(err)
	if !strings.Contains(account, `"rejected":0}`) {
		b.t.Fatalf("the driver says %s", account)
	}
}

// files is what the script gets of one gateway.
type files struct {
	dir      string   // of chunks
	chunks   []string // in the order of the store
	middle   string   // one of them that follows another in its epoch, and is followed
	releases []string
	epochKey string
	kit      string
}

// fetch waits until so many readings of a gateway have arrived, and writes its
// chunks and releases to files.
func (b *bench) fetch(g *rig.Gateway, readings int) files {
	b.t.Helper()
	r, err := b.consumer.Reader(g.Name, "")
	b.must(err)
	n := 0
	b.until("all readings", func() error {
		records, err := r.Next(b.ctx, 0)
		for _, o := range records {
			n += len(o.Readings)
		}
		if err == nil && n < readings {
			err = fmt.Errorf("%d of %d", n, readings)
		}
		return err
	})
	work := short(b.t)
	f := files{dir: filepath.Join(work, "chunks"), epochKey: filepath.Join(work, "epoch.key"), kit: b.KitDir("consumer")}
	b.must(os.Mkdir(f.dir, 0o755))
	for after := uint64(0); ; {
		got, err := b.consumer.Chunks(b.ctx, g.Name, "", after, 0)
		b.must(err)
		if len(got.Chunks) == 0 {
			return f
		}
		for _, c := range got.Chunks {
			path := filepath.Join(f.dir, fmt.Sprintf("%05d", len(f.chunks)))
			b.must(os.WriteFile(path, c.Data, 0o644))
			f.chunks = append(f.chunks, path)
			_, pos, err := sealing.ParseChunk(c.Data)
			b.must(err)
			if pos.First.Seq == 1 {
				f.middle = path
			}
			if pos.First.Seq > 0 {
				continue
			}
			rel, err := b.consumer.Release(b.ctx, g.Name, pos.Checkpoint.Stream, pos.Checkpoint.Epoch)
			b.must(err)
			raw, err := cose.Marshal(rel)
			b.must(err)
			path = filepath.Join(work, fmt.Sprintf("release%d", len(f.releases)))
			b.must(os.WriteFile(path, raw, 0o644))
			b.must(os.WriteFile(f.epochKey, rel.EpochKey, 0o644))
			f.releases = append(f.releases, path)
		}
		after = got.Next
	}
}

// script runs the script. It returns what it printed and its exit status.
func (f files) script(t *testing.T, chunks []string, more ...string) (stdout, stderr string, status int) {
	t.Helper()
	args := append([]string{"open_record.py", "--key", filepath.Join(f.kit, "consumer.key")}, chunks...)
	for _, r := range f.releases {
		args = append(args, "--release", r)
	}
	cmd := exec.CommandContext(t.Context(), python, append(args, more...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestStranger: what two gateways sealed, one of them compressed, opens reading
// by reading in hands that know the protocol only; what was touched does not.
func TestStranger(t *testing.T) {
	need(t, "swtpm", "swtpm_setup", "zstd", python)
	if out, err := exec.CommandContext(t.Context(), python, "-c", "import cbor2, cryptography").CombinedOutput(); err != nil {
		skip(t, "%s has no cbor2 or cryptography (apt-get install python3-cbor2 python3-cryptography): %s", python, out)
	}
	sources := []string{"file"}
	if os.Getuid() == 0 { // only then can there be drivers of two users
		sources = append(sources, "raw")
	}
	b, gateways := start(t, []string{"zstd", "plain"}, sources...)
	for _, name := range slices.Sorted(maps.Keys(gateways)) {
		t.Run(name, func(t *testing.T) { b.stranger(t, gateways[name], len(sources) > 1) })
	}
}

func (b *bench) stranger(t *testing.T, g *rig.Gateway, raw bool) {
	all := map[string][]want{}
	first, expected := table(t, 1)
	b.replay(g, first)
	if raw {
		b.send(g, lines)
		all["raw"] = linesWant
	}
	res, err := b.op.Command(b.ctx, g.Name, message.RotateStreamKeys, nil, time.Time{})
	b.must(err)
	if !res.Done {
		t.Fatalf("new stream keys: %s", res.Reason)
	}
	second, more := table(t, 2)
	b.replay(g, second)
	all["file"] = append(expected, more...)
	f := b.fetch(g, len(all["file"])+len(all["raw"]))
	if len(f.chunks) < 6 || len(f.releases) < 2 || f.middle == "" {
		t.Fatalf("%d chunks and %d releases: too few to say much", len(f.chunks), len(f.releases))
	}
	roots := filepath.Join(f.kit, "roots.cbor")
	for _, trust := range [][]string{{"--roots", roots}, {"--epoch-key", f.epochKey}, {"--roots", roots, "--epoch-key", f.epochKey}} {
		stdout, stderr, status := f.script(t, []string{f.dir}, trust...)
		if status != 0 || stderr != "" {
			t.Fatalf("%v: status %d: %s", trust, status, stderr)
		}
		compare(t, g.Name, stdout, all)
	}
	f.touched(t, roots)
}

// compare holds what the script printed against what was sent.
func compare(t *testing.T, gateway, stdout string, all map[string][]want) {
	t.Helper()
	place := map[string]int{}
	epochs := map[string]bool{}
	for line := range strings.Lines(stdout) {
		var r reading
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		i := place[r.Stream]
		place[r.Stream]++
		epochs[r.Epoch] = true
		if i >= len(all[r.Stream]) {
			t.Fatalf("stream %s: more than the %d readings sent: %s", r.Stream, i, line)
		}
		w := all[r.Stream][i]
		if r.Subject != rig.Tenant+"/"+gateway || r.Name != w.name || r.Unit != w.unit || r.Time != w.time {
			t.Fatalf("stream %s, reading %d: got %swant %+v", r.Stream, i, line, w)
		}
		if s, ok := w.value.(string); ok {
			var got string
			if err := json.Unmarshal(r.Value, &got); err != nil || got != s {
				t.Fatalf("stream %s, reading %d: got %swant %+v", r.Stream, i, line, w)
			}
		} else if said(r.Value) != value(w.value) {
			t.Fatalf("stream %s, reading %d: got %swant %+v", r.Stream, i, line, w)
		}
	}
	for stream, want := range all {
		if place[stream] != len(want) {
			t.Errorf("stream %s: %d readings, want %d", stream, place[stream], len(want))
		}
	}
	if len(epochs) != 2 {
		t.Errorf("%d epochs, want 2", len(epochs))
	}
}

// touched: a flipped bit anywhere in a chunk or in a release, the wrong key or a
// missing chunk does not go unnoticed.
func (f files) touched(t *testing.T, roots string) {
	t.Helper()
	refuse := func(what string, want int, chunks []string, more ...string) {
		t.Helper()
		if stdout, stderr, status := f.script(t, chunks, more...); status != want {
			t.Errorf("%s: status %d, want %d: %s", what, status, want, stderr)
		} else if want == 1 && (!strings.HasPrefix(stderr, "refused: ") || stdout != "") {
			t.Errorf("%s: it says %q and printed %d bytes", what, stderr, len(stdout))
		}
	}
	flip := func(path string, times int, more ...string) {
		t.Helper()
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.WriteFile(path, good, 0o644); err != nil {
				t.Fatal(err)
			}
		}()
		for i := range times {
			at := i * (len(good) - 1) / (times - 1)
			bad := bytes.Clone(good)
			bad[at] ^= 1 << (i % 8)
			if err := os.WriteFile(path, bad, 0o644); err != nil {
				t.Fatal(err)
			}
			refuse(fmt.Sprintf("%s with bit %d of byte %d of %d flipped", filepath.Base(path), i%8, at, len(good)), 1, []string{f.chunks[0]}, more...)
		}
	}
	flip(f.chunks[0], 24, "--epoch-key", f.epochKey)
	flip(f.releases[0], 24, "--roots", roots)
	for what, path := range map[string]string{"the first chunk": f.chunks[0], "a chunk in the middle": f.middle} {
		rest := slices.DeleteFunc(slices.Clone(f.chunks), func(c string) bool { return c == path })
		refuse(what+" missing", 2, rest, "--roots", roots)
	}
	short := files{kit: f.kit, releases: f.releases[:1]}
	if _, stderr, status := short.script(t, f.chunks, "--roots", roots); status != 1 || !strings.Contains(stderr, "no release is for") {
		t.Errorf("a release missing: status %d: %s", status, stderr)
	}
}

// TestCheckquote: tpm2-tools accept the quote in a gateway's evidence, with the
// command that is written beside it, and not when a byte of it was touched.
func TestCheckquote(t *testing.T) {
	need(t, "swtpm", "swtpm_setup", "tpm2_checkquote")
	b, gateways := start(t, []string{"plain"}, "file")
	s, _, err := b.op.Saved(b.ctx, gateways["plain"].Name)
	b.must(err)
	dir := filepath.Join(t.TempDir(), "a/b")
	b.must(attest.Extract(dir, s.Evidence))
	command, err := os.ReadFile(filepath.Join(dir, "README.txt"))
	b.must(err)
	fields := strings.Fields(string(command))
	if len(fields) == 0 || fields[0] != "tpm2_checkquote" || !strings.Contains(string(command), "-l sha256:0,4,7,8 ") {
		t.Fatalf("README.txt: %q", command)
	}
	check := func() (string, error) {
		cmd := exec.CommandContext(t.Context(), fields[0], fields[1:]...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "TPM2TOOLS_TCTI=none")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := check(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	for _, name := range []string{"quote.msg", "quote.sig", "pcrs.bin"} {
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		b.must(err)
		bad := bytes.Clone(good)
		bad[len(bad)-1] ^= 1
		b.must(os.WriteFile(path, bad, 0o644))
		if out, err := check(); err == nil {
			t.Errorf("%s was touched, and accepted:\n%s", name, out)
		}
		b.must(os.WriteFile(path, good, 0o644))
	}
	last := len(fields) - 1 // the qualifying data
	fields[last] = strings.Repeat("00", 32)
	if out, err := check(); err == nil {
		t.Errorf("accepted with other qualifying data:\n%s", out)
	}
	if err := attest.Extract(dir, s.Evidence[:len(s.Evidence)-1]); err == nil {
		t.Error("extracted from evidence that was cut short")
	}
}

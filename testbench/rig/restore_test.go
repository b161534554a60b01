package rig

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"edgekeep/agent"
	"edgekeep/internal/cose"
	"edgekeep/internal/durable"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/message"
)

// halt kills keep and agent, run starts them again.
func (b *bench) halt(g *Gateway) {
	b.t.Helper()
	b.must(g.KillAgent())
	b.must(g.KillKeep())
}

func (b *bench) run(g *Gateway) {
	b.t.Helper()
	b.must(g.StartKeep(b.ctx))
	b.must(g.StartAgent(b.ctx))
}

// snapshot copies the agent's state directory as it is at one moment.
func (b *bench) snapshot(g *Gateway, name string) (dir string) {
	b.t.Helper()
	dir = b.path(name)
	b.must(g.PauseAgent())
	b.must(os.CopyFS(dir, os.DirFS(g.Path("agent"))))
	b.must(g.ResumeAgent())
	return dir
}

// replace puts a copy of a file or directory in its place.
func (b *bench) replace(g *Gateway, copied, name string) {
	b.t.Helper()
	to := g.Path("agent", name)
	b.must(os.RemoveAll(to))
	from := filepath.Join(copied, name)
	info, err := os.Stat(from)
	b.must(err)
	if info.IsDir() {
		b.must(os.CopyFS(to, os.DirFS(from)))
		return
	}
	raw, err := os.ReadFile(from)
	b.must(err)
	b.must(os.WriteFile(to, raw, 0o600))
}

// send writes numbered lines, with the number as value, and waits until they
// are durable.
func (b *bench) send(g *Gateway, from, to int) {
	b.t.Helper()
	w := b.writer(g, "machine")
	defer w.conn.Close()
	w.lines("#hello 1 count")
	w.answer("#ack count " + strconv.Itoa(from-1))
	w.lines("#seq " + strconv.Itoa(from))
	for i := from; i <= to; i++ {
		w.lines("m v=" + strconv.Itoa(i) + "i " + strconv.Itoa(i))
	}
	for want := "#ack count " + strconv.Itoa(to) + "\n"; ; {
		line, err := w.in.ReadString('\n')
		b.must(err)
		if line == want {
			return
		}
	}
}

// counted are the readings that send makes.
func counted(from, to int) (out []sealing.Reading) {
	for i := from; i <= to; i++ {
		out = append(out, sealing.Reading{Name: "m/v", Time: int64(i), Value: int64(i)})
	}
	return out
}

// TestOldState puts a copy of everything that the agent stores back, from before
// an irreversible step. The keep does not work with it, and says so.
func TestOldState(t *testing.T) {
	b, g := up(t, time.Minute, Options{}, "machine")
	b.send(g, 1, 100)
	r := b.read(g, "machine")
	r.upTo(100)
	old := b.snapshot(g, "old")
	res, err := b.op.Command(b.ctx, "gw1", message.SetInterval, map[string]string{"seconds": "7"}, time.Time{})
	if b.must(err); !res.Done {
		t.Fatalf("set-interval: %+v", res)
	}
	b.send(g, 101, 200)
	r.upTo(200)
	newest := b.snapshot(g, "newest")

	b.halt(g)
	b.replace(g, old, ".")
	b.run(g)
	s := b.status(g, "the reason", func(s agent.Status) bool { return s.Reason != "" })
	if s.Phase != "" && s.Phase != tee.PhaseWaiting || s.Connected {
		t.Errorf("with an old state the agent says %+v", s)
	}
	state, err := os.ReadFile(filepath.Join(old, "state.cbor"))
	b.must(err)
	_, err = tee.Start{State: state}.Do(b.ctx, b.socket(g))
	b.refused(err, "not the newest")
	_, err = tee.Start{}.Do(b.ctx, b.socket(g))
	b.refused(err, "its state is missing")
	if st := b.keep(g); st.Phase != tee.PhaseWaiting || st.Interval != 0 {
		t.Errorf("with an old state the keep says %+v", st)
	}

	b.must(g.KillAgent())
	b.replace(g, newest, ".")
	b.must(g.StartAgent(b.ctx))
	b.send(g, 201, 300)
	r.upTo(300)
	r.all(g)
	r.equal(counted(1, 300))
	b.findings(g, nil)
	if st := b.keep(g); st.Interval != 7 {
		t.Errorf("the accepted command is forgotten: %+v", st)
	}
}

// TestOldSpool puts only an old spool back. Keys and IVs are never used twice,
// and the cloud says that the gateway went back.
func TestOldSpool(t *testing.T) {
	for name, epochs := range map[string]int{"of the same epoch": 1, "of an earlier epoch": 2} {
		t.Run(name, func(t *testing.T) {
			b, g := up(t, time.Minute, Options{}, "machine")
			seen := nonces{}
			b.send(g, 1, 100)
			r := b.read(g, "machine")
			r.upTo(100)
			copies := []string{b.snapshot(g, "old")}
			if epochs == 2 {
				b.halt(g)
				b.run(g)
			}
			b.send(g, 101, 200)
			r.upTo(200)
			copies = append(copies, b.snapshot(g, "newest"))

			b.halt(g)
			b.replace(g, copies[0], "spool")
			b.run(g)
			b.send(g, 101, 150) // the keep was told that it has 100 lines
			told := 0
			for len(r.got) < 250 {
				got, err := r.reader.Next(b.ctx, time.Second)
				b.must(err)
				for _, o := range got {
					if o.Gap != "" && len(r.got) != 200 {
						t.Errorf("after %d readings the consumer is told %q", len(r.got), o.Gap)
					}
					if o.Gap != "" {
						told++
					}
					r.got = append(r.got, o.Readings...)
				}
			}
			r.equal(append(counted(1, 200), counted(101, 150)...))
			if told != 1 {
				t.Errorf("the consumer was told %d times of what is wrong", told)
			}
			b.findings(g, map[string]int{"rollback": 1})
			copies = append(copies, b.snapshot(g, "after"))
			for _, dir := range copies {
				for _, chunk := range b.spooled(dir) {
					seen.add(t, chunk)
				}
			}
			for _, chunk := range b.stored(g) {
				seen.add(t, chunk)
			}
			if len(seen) < 3 {
				t.Errorf("only %d records were looked at", len(seen))
			}
		})
	}
}

// spooled are the chunks in a copy of an agent's spool, trimmed or not.
func (b *bench) spooled(dir string) (chunks [][]byte) {
	b.t.Helper()
	path := filepath.Join(dir, "spool/machine")
	b.must(os.Remove(filepath.Join(path, "trimmed"))) // what is trimmed is there still
	log, err := durable.Open(path, durable.Options{MaxBytes: 1 << 30})
	b.must(err)
	defer log.Close()
	entries, err := log.Read(1, 1<<20, 1<<30)
	b.must(err)
	for _, e := range entries {
		var c tee.Chunk
		b.must(cose.Unmarshal(e.Data, &c))
		chunks = append(chunks, c.Data)
	}
	return chunks
}

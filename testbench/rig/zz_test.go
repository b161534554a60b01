package rig

import (
	"testing"
	"time"
	"strconv"

	"edgekeep/agent"
)

func TestZZHiddenEpoch(t *testing.T) {
	b, g := up(t, time.Minute, Options{}, "machine")
	b.send(g, 1, 100)
	r := b.read(g, "machine")
	r.upTo(100)
	b.status(g, "empty", func(s agent.Status) bool { return s.SpoolChunks == 0 })
	old := b.snapshot(g, "old")
	b.must(b.KillCloud())
	b.halt(g)
	b.run(g)
	b.send(g, 101, 200) // durable and acknowledged to the driver
	b.halt(g)
	b.replace(g, old, "spool")
	b.run(g)
	b.must(b.StartCloud(b.ctx))
	b.send(g, 101, 150)
	for len(r.got) < 150 {
		got, _ := r.reader.Next(b.ctx, time.Second)
		for _, o := range got {
			if o.Gap != "" { t.Log("GAP ", o.Gap) }
			r.got = append(r.got, o.Readings...)
		}
	}
	d, _ := b.op.Gateway(b.ctx, "gw1")
	t.Log("findings", d.Findings)
}

func TestZZReset(t *testing.T) {
	b, g := up(t, 90*time.Second, Options{}, "machine")
	b.send(g, 1, 100)
	r := b.read(g, "machine")
	r.upTo(100)
	b.must(b.KillCloud())
	for i := range 70 {
		b.send(g, 101+i, 101+i)
	}
	b.halt(g)
	b.must(g.StartKeep(b.ctx, "--reset-identity"))
	b.must(g.StartAgent(b.ctx))
	b.must(b.StartCloud(b.ctx))
	ekHash := b.keep(g).EKHash
	b.until("", func() error { return b.op.Approve(b.ctx, ekHash, "gw1") })
	b.status(g, "connected", func(s agent.Status) bool { return s.Connected })
	b.send(g, 1, 50)
	begin := time.Now()
	for len(r.got) < 150 && time.Since(begin) < 40*time.Second {
		got, _ := r.reader.Next(b.ctx, time.Second)
		for _, o := range got {
			r.got = append(r.got, o.Readings...)
		}
	}
	t.Log(len(r.got), time.Since(begin))
	s, _ := g.Status()
	t.Logf("%+v", s)
	d, _ := b.op.Gateway(b.ctx, "gw1")
	t.Log("findings", d.Findings, d.Counts)
	_ = strconv.Itoa
}

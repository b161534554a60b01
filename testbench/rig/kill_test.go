package rig

import (
	"math/rand/v2"
	"testing"
	"time"
)

// torment is what is done to a system while it works, several times.
type torment struct {
	broker string
	times  int
	strike func(b *bench, g *Gateway, restart func())
}

// TestKilledUnderLoad ends processes at random moments of a replay. Everything
// arrives all the same, once, in order, and nothing is reported missing.
func TestKilledUnderLoad(t *testing.T) {
	away := 8 * time.Second
	if long() {
		away = time.Minute
	}
	for name, what := range map[string]torment{
		"agent": {"", 4, func(b *bench, g *Gateway, _ func()) {
			b.must(g.KillAgent())
			b.must(g.StartAgent(b.ctx))
		}},
		"keep": {"", 4, func(b *bench, g *Gateway, _ func()) {
			b.must(g.KillKeep())
			b.must(g.StartKeep(b.ctx))
		}},
		"driver": {"", 4, func(b *bench, g *Gateway, restart func()) {
			b.must(g.KillDriver("machine"))
			restart()
		}},
		"cloud": {"", 3, func(b *bench, _ *Gateway, _ func()) {
			b.must(b.KillCloud())
			b.must(b.StartCloud(b.ctx))
		}},
		"everything": {"", 2, func(b *bench, g *Gateway, restart func()) {
			b.must(g.KillKeep())
			b.must(g.KillDriver("machine"))
			b.must(b.KillCloud())
			b.must(g.KillAgent())
			b.must(g.StartAgent(b.ctx))
			restart()
			b.must(b.StartCloud(b.ctx))
			b.must(g.StartKeep(b.ctx))
		}},
		"agent over mosquitto": {"mosquitto", 3, func(b *bench, g *Gateway, _ func()) {
			b.must(g.KillAgent())
			b.must(g.StartAgent(b.ctx))
		}},
		"cloud away": {"", 1, func(b *bench, _ *Gateway, _ func()) {
			b.must(b.StopCloud())
			wait(b.ctx, away)
			b.must(b.StartCloud(b.ctx))
		}},
		"mosquitto away": {"mosquitto", 1, func(b *bench, _ *Gateway, _ func()) {
			b.must(b.Mosquitto.Kill())
			wait(b.ctx, away)
			b.must(b.startBroker(b.ctx))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			file := machine(t)
			b, g := up(t, 90*time.Second+2*away, Options{Broker: what.broker}, "machine")
			what.run(b, g, file, away)
		})
	}
}

func (what torment) run(b *bench, g *Gateway, file replay, away time.Duration) {
	b.t.Helper()
	seed := rand.Uint64()
	b.t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	length := 10 * time.Second
	if what.times == 1 {
		length = away + 4*time.Second
	}
	start := func() {
		b.t.Helper()
		b.must(g.StartDriver("machine", "replay", file.path, "--speed", file.speed(length)))
	}
	start()
	r := b.read(g, "machine")
	r.upTo(1)
	for range what.times {
		wait(b.ctx, 300*time.Millisecond+time.Duration(random.Int64N(int64(1500*time.Millisecond))))
		select {
		case <-g.DriverDone("machine"):
			b.t.Fatal("the replay ended too early: there was no load any more")
		default:
		}
		what.strike(b, g, start)
	}
	b.finish(g, "machine")
	r.upTo(len(file.want))
	r.all(g)
	r.equal(file.want)
	b.findings(g, nil)
	if s := b.keep(g).Sources[0]; s.Rejected+s.Missing != 0 {
		b.t.Errorf("the keep counts %+v", s)
	}
}

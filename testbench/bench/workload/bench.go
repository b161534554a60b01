package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"edgekeep/cloud/client"
	"edgekeep/tee/message"
	"edgekeep/testbench/rig"
)

// bench is a cloud with two gateways, "edge", which has the source "numbers", and
// "other".
type bench struct {
	figures
	short       bool
	dir         string
	rig         *rig.Rig
	edge, other *rig.Gateway
	op          *client.Client
	asker       *asker
	replays     int
}

// prepare builds the programs and sets everything up.
func prepare(ctx context.Context, short bool) (*bench, error) {
	dir, err := os.MkdirTemp("", "edgekeep-bench-")
	if err != nil {
		return nil, err
	}
	b := &bench{short: short, dir: dir, figures: figures{
		StartMS: map[string]float64{}, MoveMS: map[string]float64{}, MoveVsBare: map[string]float64{}, MovedVsState: map[string]float64{}, Link: map[string]float64{},
	}}
	if err := os.Chmod(dir, 0o755); err != nil { // programs in it are for runners of another user
		return b, errors.Join(err, b.end())
	}
	fmt.Println("building …")
	if err := b.build(ctx); err != nil {
		return b, errors.Join(err, b.end())
	}
	fmt.Println("setting up …")
	if err := b.up(ctx, nil); err != nil {
		return b, errors.Join(err, b.end())
	}
	return b, nil
}

// end stops everything and removes it.
func (b *bench) end() error {
	return errors.Join(b.down(), os.RemoveAll(b.dir))
}

func (b *bench) down() error {
	if b.op != nil {
		b.op.Close()
	}
	if b.asker != nil {
		b.asker.nc.Close()
	}
	var err error
	if b.rig != nil {
		err = b.rig.Stop()
	}
	b.op, b.asker, b.rig = nil, nil, nil
	return err
}

// logs are the ends of what the programs wrote, for when something went wrong.
func (b *bench) logs() string {
	var s strings.Builder
	paths, _ := filepath.Glob(b.path("rig-*/logs/*")) // a constant pattern
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
		for _, line := range lines[max(0, len(lines)-5):] {
			fmt.Fprintf(&s, "%s: %s\n", filepath.Base(path), line)
		}
	}
	return s.String()
}

func (b *bench) path(parts ...string) string {
	return filepath.Join(append([]string{b.dir}, parts...)...)
}

func (b *bench) build(ctx context.Context) error {
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", b.path("bin") + string(filepath.Separator)}
	for _, p := range []string{"keep", "agent", "cloud", "sensor", "runner"} {
		args = append(args, "edgekeep/cmd/edgekeep-"+p)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the programs: %w\n%s", err, out)
	}
	return nil
}

// up sets up a rig. wrap, if there is one, says for each gateway where it finds the
// broker.
func (b *bench) up(ctx context.Context, wrap func(broker string) (string, error)) (err error) {
	dir, err := os.MkdirTemp(b.dir, "rig-")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if b.rig, err = rig.New(ctx, rig.Options{Dir: dir, Bin: b.path("bin")}); err != nil {
		return err
	}
	for name, g := range map[string]**rig.Gateway{"edge": &b.edge, "other": &b.other} {
		source := map[string]string{"edge": "numbers", "other": "none"}[name]
		if *g, err = b.rig.Gateway(name, source); err != nil {
			return err
		}
		if err := (*g).Boot(ctx); err != nil {
			return err
		}
	}
	if err := b.rig.StartCloud(ctx); err != nil {
		return err
	}
	kit, err := b.rig.Kit("operator")
	if err != nil {
		return err
	}
	if b.op, err = kit.Connect(); err != nil {
		return err
	}
	if b.asker, err = newAsker(b.rig); err != nil {
		return err
	}
	broker := b.rig.MQTT
	for _, g := range []*rig.Gateway{b.edge, b.other} {
		if wrap != nil {
			if b.rig.MQTT, err = wrap(broker); err != nil {
				return err
			}
		}
		if err := b.enrol(ctx, g); err != nil {
			return err
		}
	}
	return nil
}

// enrol starts a gateway, and has it vouched for and allowed to read streams.
func (b *bench) enrol(ctx context.Context, g *rig.Gateway) error {
	if err := g.Start(ctx); err != nil {
		return err
	}
	if err := g.Approve(ctx, b.op); err != nil {
		return err
	}
	if err := until(ctx, g.Name+" is vouched for", func() (bool, error) {
		_, v, err := b.op.Saved(ctx, g.Name)
		return err == nil && v.Affirming(), nil
	}); err != nil {
		return err
	}
	kit, err := b.rig.Kit("owner")
	if err != nil {
		return err
	}
	owner, err := kit.Signer("owner.key")
	if err != nil {
		return err
	}
	msg, err := message.Grant{Tenant: rig.Tenant, Consumer: g.Name, Gateway: true}.Sign(owner)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.rig.Dir, "cloud/tenants", rig.Tenant, "grants/gateway-"+g.Name+".cbor"), msg, 0o600); err != nil {
		return err
	}
	return g.StartRunners(1)
}

// until waits until f says that it is so.
func until(ctx context.Context, what string, f func() (bool, error)) error {
	for {
		ok, err := f()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited in vain until %s: %w", what, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func round(x float64) float64 { return float64(int(x*1000+0.5)) / 1000 }

func ms(d time.Duration) float64 { return round(d.Seconds() * 1000) }

func median[V float64 | time.Duration](xs []V) V {
	xs = slices.Sorted(slices.Values(xs))
	return xs[len(xs)/2]
}

package rig

import (
	"context"
	"encoding/csv"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

func vectors(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("EDGEKEEP_VECTORS"); dir != "" {
		return dir
	}
	dir, err := filepath.Abs("../../../shared/vectors")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skip("the published vectors are not here: set EDGEKEEP_VECTORS")
	}
	return dir
}

func TestReplayArrives(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	dir := "/tmp/rig1"
	os.RemoveAll(dir)
	os.MkdirAll(dir, 0o755)
	r, err := New(ctx, Options{Dir: dir, Bin: "/work/main/bin"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { t.Log(r.Stop()) }()
	g, err := r.Gateway("gw1", "host", "machine")
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.StartCloud(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Start(ctx); err != nil {
		t.Fatal(err)
	}
	kit, err := r.Kit("operator")
	if err != nil {
		t.Fatal(err)
	}
	op, err := kit.Connect()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Approve(ctx, op); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(vectors(t), "nab/machine_temperature_system_failure.csv")
	begin := time.Now()
	if err := g.StartDriver("machine", "replay", file, "--speed", "0"); err != nil {
		t.Fatal(err)
	}
	ck, _ := r.Kit("consumer")
	c, err := ck.Connect()
	if err != nil {
		t.Fatal(err)
	}
	rd, err := c.Reader("gw1", "machine")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	rows = rows[1:]
	n := 0
	for n < len(rows) {
		recs, err := rd.Next(ctx, 2*time.Second)
		if err != nil {
			t.Log(err)
			if ctx.Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(200 * time.Millisecond)
			continue
		}
		for _, o := range recs {
			if o.Gap != "" {
				t.Fatal(o.Gap)
			}
			for _, x := range o.Readings {
				want, _ := strconv.ParseFloat(rows[n][1], 64)
				if x.Value != want {
					t.Fatalf("reading %d is %v, want %v", n, x, want)
				}
				n++
			}
		}
	}
	t.Log(n, "in", time.Since(begin))
	t.Log(g.StopDriver("machine"))
	t.Log(g.Status())
}

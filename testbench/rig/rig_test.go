package rig

import (
	"context"
	"os"
	"testing"
	"time"
)

func TestFirstLight(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	dir := "/tmp/rig1"; os.RemoveAll(dir); os.MkdirAll(dir, 0o755)
	os.Chmod(dir, 0o755)
	r, err := New(ctx, Options{Dir: dir, Bin: "/work/main/bin"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { t.Log(r.Stop()) }()
	g, err := r.Gateway("gw1", "host")
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
	time.Sleep(10 * time.Second)
	t.Log(g.Status())
}

package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"edgekeep/tee/message"
	"edgekeep/testbench/rig"
	"edgekeep/workload"
)

//go:embed testdata/guest.c
var guestSource []byte

// guest builds the guest of the measurements with so many MiB of ballast.
func (b *bench) guest(ctx context.Context, mib int) ([]byte, error) {
	source, out := b.path("guest.c"), b.path("guest.wasm")
	if err := os.WriteFile(source, guestSource, 0o600); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "clang", "--target=wasm32-wasi", "-O2", "-mexec-model=reactor", fmt.Sprintf("-DMB=%d", mib), "-o", out, source)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the guest (apt-get install clang lld wasi-libc libclang-rt-14-dev-wasm32): %w\n%s", err, msg)
	}
	return os.ReadFile(out)
}

// anomaly builds the example, and returns its model with it.
func (b *bench) anomaly(ctx context.Context) (module, model []byte, err error) {
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "edgekeep").Output()
	if err != nil {
		return nil, nil, fmt.Errorf("finding the module's directory: %w", err)
	}
	script := filepath.Join(strings.TrimSpace(string(root)), "workload/examples/build.sh")
	if out, err := exec.CommandContext(ctx, "sh", script, b.path("examples"), "anomaly").CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("building the example: %w\n%s", err, out)
	}
	if module, err = os.ReadFile(b.path("examples/anomaly/anomaly.wasm")); err != nil {
		return nil, nil, err
	}
	if module, err = roomy(module); err != nil {
		return nil, nil, err
	}
	model, err = os.ReadFile(b.path("examples/anomaly/model.json"))
	return module, model, err
}

// roomy has a module begin with 32 MiB of memory. A Go module begins with 4 and
// grows, and where RLIMIT_MEMLOCK is small and memory begins locked, it cannot.
func roomy(module []byte) ([]byte, error) {
	const header, memorySection, pages = 8, 5, 32 << 20 >> 16
	for at := header; at < len(module); {
		id := module[at]
		size, n := binary.Uvarint(module[at+1:])
		begin := at + 1 + n
		end := begin + int(size)
		if n <= 0 || end > len(module) {
			break
		}
		if id != memorySection {
			at = end
			continue
		}
		if size < 3 || module[begin] != 1 || module[begin+1] != 0 {
			break // more than one, or with a limit
		}
		body := binary.AppendUvarint([]byte{1, 0}, pages)
		section := append([]byte{memorySection, byte(len(body))}, body...)
		return slices.Concat(module[:at], section, module[end:]), nil
	}
	return nil, errors.New("the module has no memory as a Go module has it")
}

// manifest is one of a reactor with so much memory, which reads these streams.
func manifest(name string, memory uint64, streams ...string) workload.Manifest {
	return workload.Manifest{
		Name: name, Version: "1", Shape: workload.Reactor,
		Input: workload.Input{Format: workload.JSON, Streams: streams, Batch: 500, Wait: 20}, Output: workload.JSON,
		Limits:    workload.Limits{Memory: memory, CPU: 60_000, Disk: 1 << 20, Output: 1 << 20},
		Assurance: "tpm", Nodes: []string{"*"}, Moves: 1000, Commit: 250,
	}
}

// packed is a workload whose content the cloud has.
type packed struct{ manifest, key []byte }

func (b *bench) pack(ctx context.Context, m workload.Manifest, module []byte, models ...[]byte) (packed, error) {
	out := packed{key: make([]byte, workload.KeySize)}
	rand.Read(out.key) // never fails
	content, err := workload.SealContent(out.key, module, models)
	if err != nil {
		return out, err
	}
	list, err := message.BlobList(content)
	if err != nil {
		return out, err
	}
	sum := sha256.Sum256(module)
	m.Module, m.ModuleSize, m.Content, m.ContentSize = sum[:], int64(len(module)), message.BlobID(list), int64(len(content))
	for i, model := range models {
		sum := sha256.Sum256(model)
		m.Models[i].Hash, m.Models[i].Size = sum[:], int64(len(model))
	}
	signer, err := b.op.Signer("operator.key")
	if err != nil {
		return out, err
	}
	if out.manifest, err = m.Sign(signer); err != nil {
		return out, err
	}
	_, err = b.op.PutBundle(ctx, content, nil)
	return out, err
}

// deploy has a gateway run an instance, which reads the streams of "edge".
func (b *bench) deploy(ctx context.Context, g *rig.Gateway, instance string, w packed, streams ...string) error {
	var inputs []workload.Source
	for _, s := range streams {
		inputs = append(inputs, workload.Source{Gateway: b.edge.Name, Stream: s})
	}
	res, err := b.op.Deploy(ctx, g.Name, instance, w.manifest, w.key, inputs)
	if err == nil && !res.Done {
		err = errors.New("deploy refused: " + res.Reason)
	}
	return err
}

// stop ends an instance, and waits until its runner is free again.
func (b *bench) stop(ctx context.Context, instance string) error {
	res, err := b.op.Stop(ctx, instance)
	if err == nil && !res.Done {
		err = errors.New("stop refused: " + res.Reason)
	}
	if err != nil {
		return err
	}
	return until(ctx, instance+" is stopped", func() (bool, error) {
		r, err := b.op.Inspect(ctx, instance)
		return r.Entry.Holder == "", err
	})
}

// replay has a driver send n readings to "numbers", of the same time step, at this
// speed (0: all it can).
func (b *bench) replay(n int, speed int) error {
	var s strings.Builder
	s.WriteString("time,value\n")
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range n {
		fmt.Fprintf(&s, "%s,%.3f\n", at.Add(time.Duration(i)*time.Second).Format(time.DateTime), 80+float64(i%9973)/700)
	}
	b.replays++
	path := b.path(fmt.Sprintf("numbers-%d.csv", b.replays))
	if err := os.WriteFile(path, []byte(s.String()), 0o644); err != nil {
		return err
	}
	return b.edge.StartDriver("numbers", "replay", path, "--speed", fmt.Sprint(speed))
}

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud/client"
	"edgekeep/cloud/node"
	"edgekeep/workload"
	"edgekeep/workload/pack"
)

// kits makes a cloud's files, with the operator's kit in operator/.
func kits(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "cloud")
	if _, err := node.Init(node.InitOptions{Dir: dir, Tenant: "acme", Hosts: []string{"127.0.0.1"}, Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func section(id byte, content string) string {
	return string(binary.AppendUvarint([]byte{id}, uint64(len(content)))) + content
}

// filter is a small module that exports _start and has one mutable global; more
// are sections between the exports and the code.
func filter(more ...string) string {
	return "\x00asm\x01\x00\x00\x00" + section(1, "\x01\x60\x00\x00") + section(3, "\x01\x00") + section(5, "\x01\x00\x01") +
		section(6, "\x01\x7f\x01\x41\x2a\x0b") + section(7, "\x02\x06memory\x02\x00\x06_start\x00\x00") + strings.Join(more, "") + section(10, "\x01\x02\x00\x0b")
}

const manifest = `name = "alarm"
version = "1.0.0"
shape = "filter"
module = "alarm.wasm"
[input]
format = "json"
streams = ["machine", "line-2"]
[output]
format = "json"
[limits]
memory = "16MiB"
cpu = "500ms"
disk = "1MiB"
output = "256KiB"
[require]
assurance = "tpm"
[place]
nodes = ["gw1", "gw2"]
moves = 3
[[models]]
name = "m.json"
file = "m.json"
`

func source(t *testing.T, manifest, module string) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range map[string]string{pack.DefaultManifest: manifest, "alarm.wasm": module, "m.json": "{}"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func withKit(t *testing.T, kit string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	err = run(context.Background(), append([]string{"--kit", kit}, args...), &out, &errs)
	return out.String(), errs.String(), err
}

func TestPack(t *testing.T) {
	kit := filepath.Join(kits(t), "operator")
	src := source(t, manifest, filter())
	t.Chdir(t.TempDir())
	out, _, err := withKit(t, kit, "workload", "pack", src)
	if err != nil {
		t.Fatal(err)
	}
	module := sha256.Sum256([]byte(filter()))
	for _, want := range []string{
		"Packed alarm 1.0.0, a filter.", hex.EncodeToString(module[:]), "by version 1 of the rules; mutable globals captured: 1", "imports   none",
		"reads     machine, line-2 as json, at most 500 readings or 1s at once; writes json",
		"may use   16 MiB of memory, 1 MiB of files; for each batch 500ms and 256 KiB of results",
		`may run   on gw1, gw2 with assurance "tpm" or better; may move 3 times`, "commits   every 250ms at most",
		"Wrote alarm-1.0.0.ekw", "alarm-1.0.0.key", "who has it can read the bundle", "Next: edgekeep workload deploy GATEWAY alarm-1.0.0.ekw",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	if info, err := os.Stat("alarm-1.0.0.key"); err != nil || info.Mode().Perm() != 0o600 || info.Size() != workload.KeySize {
		t.Errorf("the key's file: %v, %v", info, err)
	}
	d, err := loadDeployment("gw1", "alarm-1.0.0.ekw", "", "", nil)
	if err != nil || d.instance != "alarm" || !reflect.DeepEqual(d.inputs, []workload.Source{{Gateway: "gw1", Stream: "machine"}, {Gateway: "gw1", Stream: "line-2"}}) {
		t.Fatalf("%+v, %v", d, err)
	}
	loaded, err := client.LoadKit(kit)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.bundle.Open(loaded.Roots.Operator, d.key); err != nil {
		t.Error(err)
	}
	// Neither file is ever replaced.
	key, _ := os.ReadFile("alarm-1.0.0.key")
	for range 2 {
		if _, _, err := withKit(t, kit, "workload", "pack", src); err == nil || !strings.Contains(err.Error(), "is there already: raise the version") {
			t.Error(err)
		}
		os.Remove("alarm-1.0.0.ekw")
	}
	if again, err := os.ReadFile("alarm-1.0.0.key"); err != nil || !bytes.Equal(again, key) {
		t.Error("the key was replaced")
	}
}

func TestPackJSON(t *testing.T) {
	kit, out := filepath.Join(kits(t), "operator"), filepath.Join(t.TempDir(), "b.ekw")
	text, _, err := withKit(t, kit, "--json", "workload", "pack", source(t, manifest, filter()), "--out", out)
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Bundle, Name, File, Rewriter string
		KeyFile                      string   `json:"key_file"`
		Rewritten                    string   `json:"rewritten_sha256"`
		Module                       string   `json:"module_sha256"`
		Imports                      []string `json:"imports"`
		Limits                       map[string]uint64
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	if v.Name != "alarm" || v.File != out || v.KeyFile != strings.TrimSuffix(out, "ekw")+"key" || v.Rewriter != "1" || v.Imports == nil ||
		len(v.Bundle) != 64 || len(v.Rewritten) != 64 || v.Rewritten == v.Module || v.Limits["memory"] != 16<<20 {
		t.Errorf("%+v", v)
	}
}

func TestPackRefuses(t *testing.T) {
	operator := filepath.Join(kits(t), "operator")
	good := source(t, manifest, filter())
	t.Chdir(t.TempDir())
	for _, tt := range []struct {
		kit  string
		args []string
		want string
	}{
		{operator, []string{source(t, manifest, filter(section(8, "\x00")))}, "module refused (start-section at byte"},
		{operator, []string{source(t, manifest, "#!/bin/sh")}, "malformed module at byte 0"},
		{operator, []string{source(t, strings.Replace(manifest, `"filter"`, `"reactor"`, 1), filter())}, `the module exports _start: say shape = "filter"`},
		{operator, []string{source(t, manifest+"colour = 3\n", filter())}, `workload.toml:23: unknown key "models.colour"`},
		{operator, []string{t.TempDir()}, "there is no manifest"},
		{operator, []string{filepath.Join(good, "alarm.wasm"), "--manifest", "none.toml"}, "there is no manifest none.toml"},
		{operator, nil, "accepts 1 arg"},
		{operator, []string{good, "--out", "no/such/dir.ekw"}, "writing the key"},
		{filepath.Join(filepath.Dir(operator), "consumer"), []string{good}, "this needs the kit that holds it"},
		{t.TempDir(), []string{good}, "the operator's kit signs bundles"},
	} {
		if out, _, err := withKit(t, tt.kit, append([]string{"workload", "pack"}, tt.args...)...); err == nil || !strings.Contains(err.Error(), tt.want) || out != "" {
			t.Errorf("%v: %v; want %q", tt.args, err, tt.want)
		}
	}
	if left, _ := os.ReadDir("."); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDeployRefuses(t *testing.T) {
	kit := filepath.Join(kits(t), "operator")
	other := filepath.Join(kits(t), "operator")
	t.Chdir(t.TempDir())
	if _, _, err := withKit(t, kit, "workload", "pack", source(t, manifest, filter())); err != nil {
		t.Fatal(err)
	}
	const bundle = "alarm-1.0.0.ekw"
	raw, _ := os.ReadFile(bundle)
	for name, data := range map[string][]byte{"short.key": {1, 2}, "cut.ekw": raw[:len(raw)-1], "wrong.key": make([]byte, 32), "text.ekw": []byte("hello")} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	huge, err := os.Create("huge.ekw")
	if err == nil {
		err = errors.Join(huge.Truncate(pack.MaxFile+1), huge.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"gw1"}, "accepts 2 arg"},
		{[]string{"gw 1", bundle}, "cannot be a gateway's name"},
		{[]string{"gw3", bundle}, "may not run on gw3: its manifest allows gw1, gw2"},
		{[]string{"gw1", "none.ekw"}, "edgekeep workload pack` makes one"},
		{[]string{"gw1", "huge.ekw"}, "no bundle is that large"},
		{[]string{"gw1", "text.ekw"}, "text.ekw: this is no bundle"},
		{[]string{"gw1", "cut.ekw"}, "cut.ekw: the bundle's content was cut off"},
		{[]string{"gw1", bundle, "--key", "none.key"}, "name it with --key"},
		{[]string{"gw1", bundle, "--key", "short.key"}, "short.key has 2 bytes"},
		{[]string{"gw1", bundle, "--name", "Alarm"}, "cannot be an instance's name"},
		{[]string{"gw1", bundle, "--input", "gw1/machine"}, "the manifest has 2 streams (machine, line-2), --input was given 1 times"},
		{[]string{"gw1", bundle, "--input", "gw1/machine", "--input", "line-2"}, "--input line-2: GATEWAY/STREAM is needed, like gw1/machine"},
		{[]string{"gw1", bundle, "--input", "gw1/machine", "--input", "gw2/a/b"}, "GATEWAY/STREAM is needed"},
		{[]string{"gw1", bundle}, "connecting to"}, // all that can be checked here is in order
	} {
		if _, _, err := withKit(t, kit, append([]string{"workload", "deploy"}, tt.args...)...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v; want %q", tt.args, err, tt.want)
		}
	}
	d, err := loadDeployment("gw2", bundle, "wrong.key", "second", []string{"gw1/machine", "gw2/line-9"})
	if err != nil || d.instance != "second" || !reflect.DeepEqual(d.inputs, []workload.Source{{Gateway: "gw1", Stream: "machine"}, {Gateway: "gw2", Stream: "line-9"}}) {
		t.Errorf("%+v, %v", d, err)
	}
	for k, want := range map[string]string{kit: "is the key that of this bundle?", other: "another kit's operator key?"} {
		loaded, err := client.LoadKit(k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.bundle.Open(loaded.Roots.Operator, d.key); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

func TestWorkloadErrorsSayWhatToDo(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"workload", "ls"}, "--kit"},
		{[]string{"workload", "inspect"}, "accepts 1 arg"},
		{[]string{"workload", "stop", "x"}, "--kit"},
		{[]string{"workload", "move", "x"}, "the gateway to move to is needed"},
		{[]string{"workload", "move", "x", "--to", "a b"}, "edgekeep gateway ls"},
		{[]string{"workload", "logs", "X"}, "edgekeep workload ls"},
		{[]string{"workload", "results", "../x"}, "edgekeep workload ls"},
		{[]string{"infer", "gw1", "X"}, "edgekeep workload ls"},
		{[]string{"infer", "gw1", "x", "--input", "none"}, "the input: open none"},
		{[]string{"infer", "gw1", "x", "--input", "main_test.go"}, "--kit"},
	} {
		if _, err := edgekeep(t, tt.args...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v; want %q", tt.args, err, tt.want)
		}
	}
}

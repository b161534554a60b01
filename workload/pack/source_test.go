package pack

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"edgekeep/workload"
	"edgekeep/workload/examples"
	"edgekeep/workload/wasm"
)

func TestRead(t *testing.T) {
	s, err := Read(directory(t, good, reactor()), "")
	if err != nil {
		t.Fatal(err)
	}
	module, model := sha256.Sum256(reactor()), sha256.Sum256([]byte(`{"weights":[1,2]}`))
	want := workload.Manifest{
		Name: "scores", Version: "1.2.3", Shape: workload.Reactor, Module: module[:], ModuleSize: int64(len(reactor())),
		Models: []workload.Model{{Name: "a.json", Hash: model[:], Size: 17}}, Args: []string{"a.json", "-x"},
		Input:  workload.Input{Format: workload.JSON, Streams: []string{"machine", "line-2"}, Batch: 250, Wait: 2000},
		Output: workload.SenML, Limits: workload.Limits{Memory: 16 << 20, CPU: 1500, Output: 256 << 10},
		Assurance: "tpm", Nodes: []string{"gw1", "gw2"}, Moves: 7, Commit: 100, Checkpoint: 600,
	}
	if !reflect.DeepEqual(s.Manifest, want) {
		t.Errorf("got\n%+v\nwant\n%+v", s.Manifest, want)
	}
	rewritten, info, err := wasm.Prepare(reactor())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(rewritten)
	if !bytes.Equal(s.Rewritten, sum[:]) || bytes.Equal(s.Rewritten, module[:]) || !reflect.DeepEqual(s.Info, info) || len(s.Info.Globals) != 2 {
		t.Errorf("it runs as %x, %+v", s.Rewritten, s.Info)
	}
}

func TestDefaults(t *testing.T) {
	s, err := Read(directory(t, least, reactor()), "")
	if err != nil {
		t.Fatal(err)
	}
	m := s.Manifest
	if m.Commit != 250 || m.Checkpoint != 0 || m.Input.Batch != 500 || m.Input.Wait != 1000 || m.Limits.Disk != 0 || m.Moves != 0 {
		t.Errorf("%+v", m)
	}
	if _, _, err := s.Pack(make([]byte, 32), operator(t, 1)); err != nil {
		t.Error(err)
	}
}

// A module can be named instead of a directory, and a manifest that is elsewhere.
func TestReadModule(t *testing.T) {
	dir := directory(t, good, reactor())
	other := filepath.Join(t.TempDir(), "other.toml")
	manifest := strings.Replace(strings.Replace(good, `module = "scores.wasm"`, "", 1), `"scores"`, `"others"`, 1)
	if err := os.WriteFile(other, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, manifest, name string }{
		{filepath.Join(dir, "scores.wasm"), "", "scores"},
		{filepath.Join(dir, "scores.wasm"), other, "others"},
	} {
		s, err := Read(tt.path, tt.manifest)
		if err != nil || s.Manifest.Name != tt.name || len(s.Manifest.Models) != 1 {
			t.Errorf("%v: %+v, %v", tt, s.Manifest, err)
		}
	}
	if _, err := Read(dir, other); err == nil || !strings.Contains(err.Error(), "module: the name") {
		t.Error(err)
	}
	t.Chdir(dir)
	if s, err := Read("scores.wasm", ""); err != nil || s.Manifest.Name != "scores" {
		t.Error(err)
	}
}

func TestReadRefuses(t *testing.T) {
	for _, tt := range []struct{ old, new, want string }{
		{`wait = "2s"`, "wait = \"2s\"\nwindow = 3", `workload.toml:14: unknown key "input.window"`},
		{`format = "senml"`, "format = \"senml\"\nstream = \"alarm\"", `workload.toml:17: unknown key "output.stream"`},
		{`[place]`, "[placement]", `unknown key "placement`},
		{`version = "1.2.3"`, `version = 1`, "workload.toml"},
		{`version = "1.2.3"`, `version = "../1"`, `version "../1"`},
		{`version = "1.2.3"`, `version = ""`, "1 to 32 letters"},
		{`name = "scores"`, `name = "Scores"`, "small letters"},
		{`name = "scores"`, ``, "small letters"},
		{`"reactor"`, `"filter"`, `shape = "filter", but the module exports edgekeep_batch: say shape = "reactor"`},
		{`"reactor"`, `"daemon"`, `shape "daemon": "filter" or "reactor"`},
		{`"machine", "line-2"`, `"machine/temperature"`, "a stream has its source's name"},
		{`"machine", "line-2"`, `"machine", "machine"`, "named twice"},
		{`"16MiB"`, `"16 MiB"`, "is not a size with its unit"},
		{`"16MiB"`, `"16MB"`, "is not a size with its unit"},
		{`"16MiB"`, `"+16MiB"`, "is not a size with its unit"},
		{`"16MiB"`, `"016MiB"`, "is not a size with its unit"},
		{`"16MiB"`, `16`, "is not a size with its unit"},
		{`"16MiB"`, `"1.5MiB"`, "is not a size with its unit"},
		{`"16MiB"`, `"99999999999GiB"`, "is not a size with its unit"},
		{`"16MiB"`, `"9999999999GiB"`, "limits.memory"},
		{`"16MiB"`, `"63KiB"`, "it starts with 64 KiB of memory, limits.memory allows 63 KiB"},
		{`"1500ms"`, `"1500us"`, "limits.cpu: a whole number of milliseconds is needed, not 1.5ms"},
		{`"1500ms"`, `"1500"`, "is not a time with its unit"},
		{`"1500ms"`, `"-1s"`, "limits.cpu"},
		{`"1500ms"`, `"11m"`, "limits.cpu"},
		{`commit = "100ms"`, `commit = "0s"`, "commit must be"},
		{`"10m"`, `"1500ms"`, "checkpoint: a whole number of seconds"},
		{`batch = 250`, `batch = -1`, "input.batch"},
		{`batch = 250`, `batch = 10001`, "input batch must be"},
		{`moves = 7`, `moves = -1`, "place.moves must be 0"},
		{`"tpm"`, `"none"`, "assurance"},
		{`nodes = ["gw1", "gw2"]`, ``, "nodes: where it may run is missing"},
		{`nodes = ["gw1", "gw2"]`, `nodes = ["gw 1"]`, "no gateway's name"},
		{`"scores.wasm"`, `"../scores.wasm"`, `file "../scores.wasm": a path inside`},
		{`"scores.wasm"`, `"/etc/passwd"`, "a path inside"},
		{`"scores.wasm"`, `"none.wasm"`, "module: open"},
		{`"sub/model.json"`, `"sub/other.json"`, `model "a.json": open`},
		{`"sub/model.json"`, `"sub"`, `model "a.json": read`},
		{`"sub/model.json"`, `""`, "a path inside"},
		{`name = "a.json"`, `name = "../a"`, "model"},
		{"[[models]]", "[[models]]\nname = \"a.json\"\nfile = \"scores.wasm\"\n[[models]]", `two have the name "a.json"`},
		{`args = ["a.json", "-x"]`, `args = ["` + strings.Repeat("x", 1025) + `"]`, "longer than 1024"},
		{`args = ["a.json", "-x"]`, `args = [` + strings.Repeat(`"`+strings.Repeat("x", 1024)+`",`, 60) + `]`, "at most 61440 fit a command"},
		{`name = "scores"`, `name = `, "workload.toml:1"},
	} {
		if !strings.Contains(good, tt.old) {
			t.Fatalf("%s is not in the manifest", tt.old)
		}
		s, err := Read(directory(t, strings.Replace(good, tt.old, tt.new, 1), reactor()), "")
		if err == nil {
			_, _, err = s.Pack(make([]byte, 32), operator(t, 1))
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "workload.toml") {
			t.Errorf("%s: %v; want %q", tt.new, err, tt.want)
		}
	}
}

func TestReadRefusesModules(t *testing.T) {
	for name, tt := range map[string]struct {
		module []byte
		reason string // of package wasm; "" if it is no module
	}{
		"empty data count": {reactor(section(12, 0)), "-"},
		"a start section":  {reactor(section(8, 2)), "start-section"},
		"passive data":     {append(reactor(), section(11, []byte("\x01\x01\x05hello")...)...), "passive-segment"},
		"another's memory": {module([]string{}), "kind"},
		"a component":      {[]byte("\x00asm\x0d\x00\x01\x00"), "component"},
		"no WebAssembly":   {[]byte("\x7fELF\x02\x01\x01\x00"), ""},
		"cut off":          {reactor()[:len(reactor())-1], ""},
		"an import of its own": {append(bytes.Clone(reactor()[:8]), append(append(
			section(1, []byte("\x03\x60\x01\x7f\x01\x7f\x60\x02\x7f\x7f\x01\x7e\x60\x00\x00")...),
			section(2, []byte("\x01\x03env\x04call\x00\x02")...)...), reactor()[8+19:]...)...), "import-unknown"},
	} {
		_, err := Read(directory(t, good, tt.module), "")
		var refused *wasm.RefusedError
		var malformed *wasm.MalformedError
		switch {
		case tt.reason == "-":
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case tt.reason == "" && !errors.As(err, &malformed), tt.reason != "" && (!errors.As(err, &refused) || refused.Reason != tt.reason):
			t.Errorf("%s: %v; want %q", name, err, tt.reason)
		case !strings.Contains(err.Error(), "workload.toml: module scores.wasm: wasm: "):
			t.Errorf("%s: %v", name, err)
		}
	}
	manifest := strings.Replace(good, `"reactor"`, `"filter"`, 1)
	if s, err := Read(directory(t, manifest, command()), ""); err != nil || s.Info.Kind != wasm.Command {
		t.Error(err)
	}
	if _, err := Read(directory(t, good, command()), ""); err == nil || !strings.Contains(err.Error(), `the module exports _start: say shape = "filter"`) {
		t.Error(err)
	}
	if _, err := Read(directory(t, good, nil), ""); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Error(err)
	}
}

func TestReadNothing(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct{ path, manifest, want string }{
		{filepath.Join(dir, "none"), "", "a directory with workload.toml, or a module, is needed"},
		{dir, "", "there is no manifest " + filepath.Join(dir, "workload.toml") + ": name yours with --manifest"},
		{dir, filepath.Join(dir, "m.toml"), "there is no manifest"},
	} {
		if _, err := Read(tt.path, tt.manifest); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v; want %q", err, tt.want)
		}
	}
}

// The same files, key and operator make the same bundle, wherever the files are; a
// golden digest shows a change of format.
func TestDeterministic(t *testing.T) {
	first, second := packed(t, 7), packed(t, 7)
	if !bytes.Equal(first.Marshal(), second.Marshal()) {
		t.Error("packed twice, two bundles")
	}
	const want = "a607679ff3747fe63aaed489d17a13cb5231e125eb78cd611b275c9479924e08"
	if got := hex.EncodeToString(workload.ID(first.Manifest)); got != want {
		t.Errorf("the bundle's id is %s, it was %s", got, want)
	}
	other := packed(t, 8)
	if bytes.Equal(other.Content, first.Content) || bytes.Equal(other.Manifest, first.Manifest) {
		t.Error("the key makes no difference")
	}
}

// Real guests of three compilers are packed and opened.
func TestExamples(t *testing.T) {
	for _, name := range []string{"threshold", "rolling", "anomaly"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := t.TempDir()
			if err := examples.Build(t.Context(), out, name); err != nil {
				t.Skip(err)
			}
			s, err := Read(filepath.Join(out, name), "")
			if err != nil {
				t.Fatal(err)
			}
			key := bytes.Repeat([]byte{3}, 32)
			b, m, err := s.Pack(key, operator(t, 1))
			if err != nil {
				t.Fatal(err)
			}
			if again, err := Parse(b.Marshal()); err != nil || !reflect.DeepEqual(again, b) {
				t.Error(err)
			}
			got, err := b.Open(&operator(t, 1).key.PublicKey, key)
			if err != nil || !reflect.DeepEqual(got, m) || got.Name != name {
				t.Errorf("%+v, %v", got, err)
			}
			if len(s.Info.Globals) == 0 || len(s.Info.Imports) == 0 {
				t.Errorf("%+v", s.Info)
			}
		})
	}
}

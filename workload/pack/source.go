package pack

import (
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"edgekeep/internal/config"
	"edgekeep/tee/message"
	"edgekeep/workload"
	"edgekeep/workload/wasm"
)

// DefaultManifest is the name of a manifest in the directory that is packed.
const DefaultManifest = "workload.toml"

// Source is a workload that was read and can be packed.
type Source struct {
	Manifest  workload.Manifest // Content and ContentSize are not known yet
	Rewritten []byte            // SHA-256 of the module as it runs
	Info      wasm.Info

	file   string // of the manifest
	module []byte
	models [][]byte
}

// file is workload.toml.
type file struct {
	Name       string          `toml:"name"`
	Version    string          `toml:"version"`
	Shape      string          `toml:"shape"`
	Module     string          `toml:"module"`
	Args       []string        `toml:"args"`
	Commit     config.Duration `toml:"commit"`
	Checkpoint config.Duration `toml:"checkpoint"`
	Input      struct {
		Format  string          `toml:"format"`
		Streams []string        `toml:"streams"`
		Batch   int64           `toml:"batch"`
		Wait    config.Duration `toml:"wait"`
	} `toml:"input"`
	Output struct {
		Format string `toml:"format"`
	} `toml:"output"`
	Limits struct {
		Memory size            `toml:"memory"`
		CPU    config.Duration `toml:"cpu"`
		Disk   size            `toml:"disk"`
		Output size            `toml:"output"`
	} `toml:"limits"`
	Require struct {
		Assurance string `toml:"assurance"`
	} `toml:"require"`
	Place struct {
		Nodes []string `toml:"nodes"`
		Moves int64    `toml:"moves"`
	} `toml:"place"`
	Models []struct {
		Name string `toml:"name"`
		File string `toml:"file"`
	} `toml:"models"`
}

// size is a number of bytes.
type size uint64

var (
	sizes    = regexp.MustCompile(`^(0|[1-9][0-9]{0,9})(B|KiB|MiB|GiB)$`)
	units    = map[string]size{"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
	versions = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.+_-]{0,31}$`)
)

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *size) UnmarshalText(b []byte) error {
	m := sizes.FindSubmatch(b)
	if m == nil {
		return fmt.Errorf(`%.32q is not a size with its unit, like "256KiB" or "16MiB"`, b)
	}
	n, err := strconv.ParseUint(string(m[1]), 10, 64)
	*s = size(n) * units[string(m[2])] // at most 10^10 GiB, which fits
	return err
}

// Read reads a workload: path is a directory, or a module, in whose directory the
// other files are. manifest is empty for the one in that directory. The module is
// checked: see package wasm.
func Read(path, manifest string) (Source, error) {
	dir, module := path, ""
	if info, err := os.Stat(path); err != nil {
		return Source{}, fmt.Errorf("what is to be packed: %w: a directory with %s, or a module, is needed", err, DefaultManifest)
	} else if !info.IsDir() {
		dir, module = filepath.Split(path)
		dir = filepath.Clean(dir)
	}
	if manifest == "" {
		manifest = filepath.Join(dir, DefaultManifest)
	}
	if _, err := os.Stat(manifest); errors.Is(err, fs.ErrNotExist) {
		return Source{}, fmt.Errorf("there is no manifest %s: name yours with --manifest, or begin with one of workload/examples", manifest)
	}
	f := file{Commit: config.Duration(250 * time.Millisecond)}
	f.Input.Batch, f.Input.Wait = 500, config.Duration(time.Second)
	if err := config.Load(manifest, &f); err != nil {
		return Source{}, err
	}
	if module != "" {
		f.Module = module
	}
	s := Source{file: manifest}
	if err := s.load(f, dir); err != nil {
		return Source{}, fmt.Errorf("%s: %w", manifest, err)
	}
	return s, nil
}

// load makes the manifest and reads what it names.
func (s *Source) load(f file, dir string) error {
	m, err := f.manifest()
	if err != nil {
		return err
	}
	if f.Module == "" {
		return errors.New("module: the name of the module's file is missing")
	}
	if s.module, err = read(dir, f.Module); err != nil {
		return fmt.Errorf("module: %w", err)
	}
	if err := s.prepare(f); err != nil {
		return fmt.Errorf("module %s: %w", f.Module, err)
	}
	sum := sha256.Sum256(s.module)
	m.Module, m.ModuleSize = sum[:], int64(len(s.module))
	for _, model := range f.Models {
		if slices.ContainsFunc(m.Models, func(o workload.Model) bool { return o.Name == model.Name }) {
			return fmt.Errorf("models: two have the name %q", model.Name)
		}
		data, err := read(dir, model.File)
		if err != nil {
			return fmt.Errorf("model %q: %w", model.Name, err)
		}
		sum := sha256.Sum256(data)
		m.Models = append(m.Models, workload.Model{Name: model.Name, Hash: sum[:], Size: int64(len(data))})
		s.models = append(s.models, data)
	}
	s.Manifest = m
	return nil
}

// prepare checks that the module's state can be captured, and that it is what
// the manifest says.
func (s *Source) prepare(f file) error {
	rewritten, info, err := wasm.Prepare(s.module)
	if err != nil {
		return err
	}
	shape, exports := workload.Filter, "_start"
	if info.Kind == wasm.Reactor {
		shape, exports = workload.Reactor, "edgekeep_batch"
	}
	if f.Shape != shape && (f.Shape == workload.Filter || f.Shape == workload.Reactor) {
		return fmt.Errorf("the manifest says shape = %q, but the module exports %s: say shape = %q, or build it the other way", f.Shape, exports, shape)
	}
	if need := uint64(info.MemoryMin) << 16; need > uint64(f.Limits.Memory) {
		return fmt.Errorf("it starts with %d KiB of memory, limits.memory allows %d KiB: raise the limit, or link with a smaller stack and heap", need>>10, f.Limits.Memory>>10)
	}
	sum := sha256.Sum256(rewritten)
	s.Rewritten, s.Info = sum[:], info
	return nil
}

// manifest is what the file says that needs no other file.
func (f file) manifest() (workload.Manifest, error) {
	m := workload.Manifest{
		Name: f.Name, Version: f.Version, Shape: f.Shape, Args: f.Args, Output: f.Output.Format,
		Input:  workload.Input{Format: f.Input.Format, Streams: f.Input.Streams, Batch: uint64(f.Input.Batch)},
		Limits: workload.Limits{Memory: uint64(f.Limits.Memory), Disk: uint64(f.Limits.Disk), Output: uint64(f.Limits.Output)},
		Nodes:  f.Place.Nodes, Moves: uint64(f.Place.Moves), Assurance: f.Require.Assurance,
	}
	for _, t := range []struct {
		key  string
		from config.Duration
		unit time.Duration
		to   *int64
	}{
		{"input.wait", f.Input.Wait, time.Millisecond, &m.Input.Wait},
		{"limits.cpu", f.Limits.CPU, time.Millisecond, &m.Limits.CPU},
		{"commit", f.Commit, time.Millisecond, &m.Commit},
		{"checkpoint", f.Checkpoint, time.Second, &m.Checkpoint},
	} {
		if time.Duration(t.from)%t.unit != 0 {
			return m, fmt.Errorf("%s: a whole number of %s is needed, not %s", t.key, map[time.Duration]string{time.Millisecond: "milliseconds", time.Second: "seconds"}[t.unit], time.Duration(t.from))
		}
		*t.to = int64(time.Duration(t.from) / t.unit)
	}
	if f.Input.Batch < 0 || f.Place.Moves < 0 { // TOML's integers have a sign
		return m, errors.New("input.batch and place.moves must be 0 or more")
	}
	if !versions.MatchString(m.Version) {
		return m, fmt.Errorf("version %.64q: 1 to 32 letters, digits, dots, hyphens, underscores and plus signs are needed", m.Version)
	}
	sorted := slices.Sorted(slices.Values(m.Input.Streams))
	if len(slices.Compact(sorted)) != len(m.Input.Streams) {
		return m, errors.New("input.streams: a stream is named twice")
	}
	return m, nil
}

// read reads a file of the workload.
func read(dir, name string) ([]byte, error) {
	if !filepath.IsLocal(name) {
		return nil, fmt.Errorf("file %q: a path inside %s is needed", name, dir)
	}
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, workload.MaxContent+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) == 0:
		return nil, fmt.Errorf("file %s is empty", name)
	case len(data) > workload.MaxContent:
		return nil, fmt.Errorf("file %s has more than 64 MiB", name)
	}
	return data, nil
}

// Pack encrypts the workload under a bundle key, workload.KeySize random bytes
// that are used for nothing else, and signs its manifest. The same workload and
// key give the same content and the same manifest, but for the signature.
func (s Source) Pack(key []byte, operator crypto.Signer) (Bundle, workload.Manifest, error) {
	m := s.Manifest
	content, err := workload.SealContent(key, s.module, s.models)
	if err != nil {
		return Bundle{}, m, err
	}
	list, err := message.BlobList(content)
	if err != nil {
		return Bundle{}, m, err
	}
	m.Content, m.ContentSize = message.BlobID(list), int64(len(content))
	msg, err := m.Sign(operator)
	if err != nil {
		return Bundle{}, m, fmt.Errorf("%s: %w", s.file, err)
	}
	if len(msg) > MaxManifest {
		return Bundle{}, m, fmt.Errorf("%s: the signed manifest has %d bytes, at most %d fit a command: name fewer nodes or arguments", s.file, len(msg), MaxManifest)
	}
	return Bundle{Manifest: msg, Content: content}, m, nil
}

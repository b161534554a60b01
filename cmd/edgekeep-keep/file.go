package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"edgekeep/internal/config"
	"edgekeep/tee/keep"
)

// file is keep.toml. configs/keep.toml explains every key.
type file struct {
	TPM      string          `toml:"tpm"`
	PCRs     []int           `toml:"pcrs"`
	Roots    string          `toml:"roots"`
	Flush    config.Duration `toml:"flush"`
	Compress bool            `toml:"compress"`
	Sockets  struct {
		Keep       string `toml:"keep"`
		KeepMode   string `toml:"keep_mode"`
		Ingest     string `toml:"ingest"`
		IngestMode string `toml:"ingest_mode"`
		Runner     string `toml:"runner"`
		RunnerMode string `toml:"runner_mode"`
	} `toml:"sockets"`
	Runners struct {
		User string `toml:"user"`
	} `toml:"runners"`
	Source []source `toml:"source"`
}

type source struct {
	Name      string          `toml:"name"`
	User      string          `toml:"user"`
	Freshness config.Duration `toml:"freshness"`
	Rate      int             `toml:"rate"`
}

func defaults() file {
	f := file{TPM: "/dev/tpmrm0", Flush: config.Duration(250 * time.Millisecond), Compress: true}
	f.Sockets.Keep, f.Sockets.KeepMode = "/run/edgekeep/keep.sock", "0660"
	f.Sockets.Ingest, f.Sockets.IngestMode = "/run/edgekeep/ingest.sock", "0666"
	f.Sockets.Runner, f.Sockets.RunnerMode = "/run/edgekeep/runner.sock", "0660"
	return f
}

func (f file) keep() (keep.Config, error) {
	cfg := keep.Config{
		TPM: f.TPM, PCRs: f.PCRs, Flush: time.Duration(f.Flush), Compress: f.Compress, Software: "edgekeep-keep " + version,
		RunnerUID: keep.NoRunners,
	}
	var err error
	if f.Runners.User != "" {
		if cfg.RunnerUID, err = lookup(f.Runners.User); err != nil {
			return cfg, fmt.Errorf("runners: %w", err)
		}
	}
	if cfg.RootsDigest, err = decodeDigest(f.Roots); err != nil {
		return cfg, err
	}
	for _, s := range f.Source {
		uid, err := lookup(s.User)
		if err != nil {
			return cfg, fmt.Errorf("source %q: %w", s.Name, err)
		}
		if s.Freshness == 0 {
			s.Freshness = config.Duration(time.Minute)
		}
		if s.Rate == 0 {
			s.Rate = 50_000
		}
		cfg.Sources = append(cfg.Sources, keep.SourceConfig{Name: s.Name, UID: uid, Freshness: time.Duration(s.Freshness), Rate: s.Rate})
	}
	return cfg, cfg.Validate()
}

// lookup resolves a user's name or number.
func lookup(name string) (uint32, error) {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n), nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return 0, fmt.Errorf("user: %w", err)
	}
	n, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("user %s: %w", name, err)
	}
	return uint32(n), nil
}

// listen makes a Unix socket, in place of one that a killed predecessor left.
func listen(path, mode string) (net.Listener, error) {
	perm, err := strconv.ParseUint(mode, 8, 12)
	if err != nil {
		return nil, fmt.Errorf("the mode of socket %s is %q: four octal digits like \"0660\" are needed", path, mode)
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("another process serves %s already", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("removing an old socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("making the socket: %w", err)
	}
	if err := os.Chmod(path, fs.FileMode(perm)); err != nil {
		return nil, fmt.Errorf("making the socket: %w", err)
	}
	return l, nil
}

func decodeDigest(s string) ([]byte, error) {
	b, err := hex.DecodeString(strings.TrimPrefix(s, "sha256:"))
	if err != nil || len(b) != 32 {
		return nil, errors.New(`roots must be the SHA-256 of your tenant's trust roots, 64 hexadecimal digits: "edgekeep-cloud init" printed it`)
	}
	return b, nil
}

func load(path string) (file, keep.Config, error) {
	f := defaults()
	if err := config.Load(path, &f); err != nil {
		return f, keep.Config{}, err
	}
	cfg, err := f.keep()
	if err != nil {
		return f, cfg, fmt.Errorf("%s: %w", path, err)
	}
	return f, cfg, nil
}

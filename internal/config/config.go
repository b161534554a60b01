// Package config reads the TOML files of our processes, strictly: an unknown
// key, a missing file or a value of the wrong kind is an error that names the
// file and the line.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Duration is a time with its unit, like "250ms" or "10s".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf(`%q is not a time with its unit, like "250ms", "10s" or "5m"`, b)
	}
	*d = Duration(v)
	return nil
}

// Load decodes the file into v, a pointer to a struct that may hold defaults.
func Load(path string, v any) error {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the configuration file %s is not there: configs/ holds an example with every key explained", path)
	}
	if err != nil {
		return fmt.Errorf("reading the configuration: %w", err)
	}
	md, err := toml.Decode(string(raw), v)
	var parse toml.ParseError
	if errors.As(err, &parse) {
		return fmt.Errorf("%s:%d: %s", path, parse.Position.Line, parse.Message)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if unknown := md.Undecoded(); len(unknown) > 0 {
		key := unknown[0]
		return fmt.Errorf("%s:%d: unknown key %q", path, line(raw, key[len(key)-1]), key.String())
	}
	return nil
}

// line finds the first line that sets a key of this name.
func line(raw []byte, key string) int {
	for i, l := range bytes.Split(raw, []byte("\n")) {
		name, _, ok := strings.Cut(string(l), "=")
		if ok && strings.Trim(strings.TrimSpace(name), `"'`) == key || strings.Trim(strings.TrimSpace(string(l)), "[]") == key {
			return i + 1
		}
	}
	return 1
}

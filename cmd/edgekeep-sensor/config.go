package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/pflag"
)

// maxConfig bounds the configuration file.
const maxConfig = 64 << 10

// config is the configuration file; configs/sensor.toml explains it.
type config struct {
	Socket string       `toml:"socket"`
	JSON   bool         `toml:"json"`
	Host   hostConfig   `toml:"host"`
	Replay replayConfig `toml:"replay"`
}

type hostConfig struct {
	Interval time.Duration `toml:"interval"`
	Root     string        `toml:"root"`
	Count    uint64        `toml:"count"`
}

type replayConfig struct {
	Speed       float64 `toml:"speed"`
	Measurement string  `toml:"measurement"`
	TimeColumn  string  `toml:"time_column"`
}

func defaults() config {
	return config{
		Socket: "/run/edgekeep/ingest.sock",
		Host:   hostConfig{Interval: time.Second, Root: "/"},
		Replay: replayConfig{Speed: 1, Measurement: "replay"},
	}
}

// settle reads the file at path, if there is one, under the flags that were
// given.
func (c *config) settle(path string, flags *pflag.FlagSet) error {
	given := map[string]string{}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = f.Value.String() })
	if path != "" {
		if err := c.load(path); err != nil {
			return fmt.Errorf("config %s: %w", path, err)
		}
	}
	for name, value := range given {
		if err := flags.Set(name, value); err != nil {
			return err
		}
	}
	return c.validate()
}

func (c *config) load(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return errors.Unwrap(err)
	}
	if info.Size() > maxConfig {
		return fmt.Errorf("%d bytes, which is no configuration", info.Size())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return errors.Unwrap(err)
	}
	meta, err := toml.Decode(string(text), c)
	if err != nil {
		return err
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return fmt.Errorf("line %d: unknown key %s", lineOf(unknown[0], text), unknown[0])
	}
	return nil
}

// lineOf finds where a key is defined: with fewer lines it is not.
func lineOf(key toml.Key, text []byte) int {
	var all map[string]any
	for n, end := 1, 0; ; n++ {
		next := bytes.IndexByte(text[end:], '\n')
		if next < 0 {
			return n
		}
		end += next + 1
		if meta, err := toml.Decode(string(text[:end]), &all); err == nil && meta.IsDefined(key...) {
			return n
		}
	}
}

func (c *config) validate() error {
	switch {
	case c.Socket == "":
		return errors.New("socket: want the path of the keep's ingest socket")
	case c.Host.Root == "":
		return errors.New("host.root: want a directory, / for this machine")
	case c.Host.Interval < 10*time.Millisecond:
		return fmt.Errorf("host.interval %v: want 10ms or more, such as \"1s\"", c.Host.Interval)
	case c.Replay.Speed < 0 || math.IsNaN(c.Replay.Speed) || math.IsInf(c.Replay.Speed, 0):
		return fmt.Errorf("replay.speed %v: want 0 or more", c.Replay.Speed)
	}
	return nil
}

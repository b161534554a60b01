package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"
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
	Count    int64         `toml:"count"`
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

// flagNames are the flags that are keys of the file, too.
var flagNames = []string{"socket", "json", "interval", "root", "count", "speed", "measurement", "time-column"}

// settle reads the file at path, if there is one, and sets again what was given
// as a flag.
func (c *config) settle(path string, cmd *cobra.Command) error {
	given := map[string]string{}
	for _, name := range flagNames {
		if f := cmd.Flags().Lookup(name); f != nil && f.Changed {
			given[name] = f.Value.String()
		}
	}
	if path != "" {
		if err := c.load(path); err != nil {
			return fmt.Errorf("config %s: %w", path, err)
		}
	}
	for name, value := range given {
		if err := cmd.Flags().Set(name, value); err != nil {
			return err
		}
	}
	return c.validate()
}

func (c *config) load(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return errors.Unwrap(err)
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxConfig+1))
	if err != nil {
		return err
	}
	if len(text) > maxConfig {
		return fmt.Errorf("longer than %d bytes", maxConfig)
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
	case c.Host.Count < 0:
		return fmt.Errorf("host.count %d: want 0 or more", c.Host.Count)
	case c.Replay.Speed < 0 || math.IsNaN(c.Replay.Speed) || math.IsInf(c.Replay.Speed, 0):
		return fmt.Errorf("replay.speed %v: want 0 or more", c.Replay.Speed)
	}
	return nil
}

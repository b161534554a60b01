package main

import (
	"context"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
)

const example = "../../configs/sensor.toml"

// The example says what happens without it, has every key, and explains each.
func TestExample(t *testing.T) {
	c := config{}
	if err := c.load(example); err != nil {
		t.Fatal(err)
	}
	if c != defaults() {
		t.Errorf("the example is\n%+v, the defaults are\n%+v", c, defaults())
	}
	text, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	meta, err := toml.Decode(string(text), new(map[string]any))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys(reflect.TypeFor[config](), nil) {
		if !meta.IsDefined(key...) {
			t.Errorf("the example has no %s", key)
		}
	}
	before := ""
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "#") && line != "\n" && !strings.HasPrefix(before, "#") {
			t.Errorf("no comment above %s", line)
		}
		before = line
	}
}

func keys(t reflect.Type, above toml.Key) []toml.Key {
	var all []toml.Key
	for f := range t.Fields() {
		key := append(above[:len(above):len(above)], f.Tag.Get("toml"))
		if f.Type.Kind() == reflect.Struct {
			all = append(all, keys(f.Type, key)...)
		} else {
			all = append(all, key)
		}
	}
	return all
}

func TestConfig(t *testing.T) {
	const good = `socket = "/a"
json = true
host = { interval = "2s", root = "/b", count = 4 }
[replay]
speed = 0.5
measurement = "m"
time_column = "t"
`
	want := config{
		Socket: "/a", JSON: true,
		Host:   hostConfig{Interval: 2e9, Root: "/b", Count: 4},
		Replay: replayConfig{Speed: 0.5, Measurement: "m", TimeColumn: "t"},
	}
	flags := config{
		Socket: "/f", JSON: false,
		Host:   hostConfig{Interval: 3e9, Root: "/g", Count: 5},
		Replay: replayConfig{Speed: 0, Measurement: "n", TimeColumn: "u"},
	}
	path := file(t, "good.toml", good)
	for _, tt := range []struct {
		args []string
		want config
	}{
		{[]string{"host", "--config", path}, want},
		{
			[]string{"host", "--socket=/f", "--json=false", "--interval=3s", "--root=/g", "--count=5", "--config", path},
			config{flags.Socket, flags.JSON, flags.Host, want.Replay},
		},
		{
			[]string{"replay", "x", "--config", path, "--speed=0", "--measurement=n", "--time-column=u"},
			config{want.Socket, want.JSON, want.Host, flags.Replay},
		},
		{[]string{"host"}, defaults()},
	} {
		c := defaults()
		root := command(&c)
		sub, args, err := root.Find(tt.args)
		if err != nil {
			t.Fatal(err)
		}
		if err := sub.ParseFlags(args); err != nil {
			t.Fatal(err)
		}
		if err := root.PersistentPreRunE(sub, nil); err != nil {
			t.Fatal(err)
		}
		if c != tt.want {
			t.Errorf("%v: got\n%+v, want\n%+v", tt.args, c, tt.want)
		}
	}
	defer func(g time.Duration) { grace = g }(grace)
	grace = 0
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // none of these gets as far as to wait
	for text, want := range map[string]string{
		"json = true\n\n[host]\ninterval = \"1s\"\nintervall = \"1s\"\n": "line 5: unknown key host.intervall",
		"sockets = 1":      "line 1: unknown key sockets",
		"[hosts]\na = 1\n": "line 1: unknown key hosts",
		"# x\nhost.a.b = [\n  1,\n]\njson = true\n": "line 4: unknown key host.a",
		"json = true\njson = false\n":               "line 2",
		"json = 1\n":                                "line 1",
		"[host]\ninterval = \"soon\"\n":             "line 2",
		"[host]\ncount = -1\n":                      "host.count -1: want",
		strings.Repeat("#\n", maxConfig):            "longer than",
		"[host]\ninterval = 1\n":                    "host.interval 1ns: want 10ms",
	} {
		status, out, errs := invoke(ctx, "host", "--config", file(t, "bad.toml", text))
		if status != 1 || out != "" || !strings.Contains(errs, "bad.toml: ") && !strings.Contains(errs, "want") || !strings.Contains(errs, want) {
			t.Errorf("%.60q: status %d, %q; want ...%s...", text, status, errs, want)
		}
	}
}

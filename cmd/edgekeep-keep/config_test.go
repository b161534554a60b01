package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const example = "../../configs/keep.toml"

func TestExampleIsComplete(t *testing.T) {
	f, cfg, err := load(example)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Sources) != 1 || cfg.Sources[0].UID != 65534 || !f.Compress {
		t.Errorf("read %+v", cfg)
	}
}

func TestRefusals(t *testing.T) {
	raw, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ old, new, want string }{
		{`flush = "250ms"`, `flush = "250"`, `keep.toml:19: "250" is not a time with its unit`},
		{`flush = "250ms"`, `flush = "5s"`, "flush must be between"},
		{`compress = true`, `compres = true`, `keep.toml:23: unknown key "compres"`},
		{`pcrs = [0, 2, 4, 7]`, `pcrs = "all"`, "line 11 (last key"},
		{`pcrs = [0, 2, 4, 7]`, ``, "pcrs is missing"},
		{`roots = "0000`, `roots = "`, "roots must be the SHA-256"},
		{`user = "65534"`, `user = "nobody-of-that-name"`, "user: unknown user"},
		{`name = "host"`, `name = "a b"`, "a name is 1 to 31 letters"},
		{`[[source]]`, `[[sauce]]`, "unknown key"},
	} {
		path := filepath.Join(t.TempDir(), "keep.toml")
		if err := os.WriteFile(path, []byte(strings.Replace(string(raw), tt.old, tt.new, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := load(path); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s -> %s: %v", tt.old, tt.new, err)
		}
	}
	if _, _, err := load("no/such/keep.toml"); err == nil || !strings.Contains(err.Error(), "not there") {
		t.Errorf("a missing file: %v", err)
	}
}

func TestNoTPM(t *testing.T) {
	raw, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	text := strings.NewReplacer("/dev/tpmrm0", dir+"/no-tpm", "/run/edgekeep", dir).Replace(string(raw))
	path := filepath.Join(dir, "keep.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// In a process of its own: the sandbox cannot be taken off again.
	out, err := runAsChild(path)
	if err == nil || !strings.Contains(out, "no TPM: looked for "+dir+"/no-tpm") || !strings.Contains(out, "apt-get install swtpm") {
		t.Errorf("%v: %s", err, out)
	}
}

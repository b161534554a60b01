package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestExampleAndRefusals(t *testing.T) {
	raw, err := os.ReadFile("../../configs/agent.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ old, new, want string }{
		{"", "", "reading the broker's CA"}, // all of it decodes; the CA file is not there
		{`url = "tls://broker.example:8883"`, ``, "broker.url is missing"},
		{`bytes = 1073741824`, `bytes = "1GB"`, "line 26 (last key"},
		{`bytes = 1073741824`, `byte = 5`, `agent.toml:26: unknown key "spool.byte"`},
		{`bytes = 1073741824`, `bytes = 5`, "at least 1 MiB"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "agent.toml")
		text := strings.ReplaceAll(strings.Replace(string(raw), tt.old, tt.new, 1), "/etc/edgekeep/ca.pem", dir+"/ca.pem")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := run(context.Background(), []string{"--config", path}, io.Discard); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s -> %s: %v", tt.old, tt.new, err)
		}
	}
}

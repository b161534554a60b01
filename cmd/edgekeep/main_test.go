package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// golden reads bytes from a file of hexadecimal digits with comments.
func golden(t *testing.T, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(raw)) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.ReplaceAll(strings.TrimSpace(line), " ", ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func edgekeep(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out, errs bytes.Buffer
	err := run(context.Background(), append([]string{"--kit", t.TempDir()}, args...), &out, &errs)
	return out.String() + errs.String(), err
}

func TestVerifySaysWhatAFileIs(t *testing.T) {
	for _, tt := range []struct{ file, kind, says string }{
		{"../../tee/attest/testdata/evidence.golden", "evidence", "ok      quote"},
		{"../../tee/attest/testdata/verdict.golden", "verdict", "the cloud's key is needed"},
		{"../../tee/attest/testdata/roots.golden", "bundle of trust roots", "what keep.toml calls roots"},
		{"../../sealing/testdata/record0.golden", "sealed record", "only a consumer's key opens it"},
		{"../../sealing/testdata/chunk.golden", "chunk", "the checkpoint covers the last"},
		{"../../sealing/testdata/checkpoint.golden", "checkpoint", "the gateway's epoch key is needed"},
		{"../../sealing/testdata/watermark.golden", "watermark", "the cloud's key is needed"},
		{"../../sealing/testdata/oldest.golden", "statement of the oldest chunk", "epoch key is needed"},
	} {
		raw := golden(t, tt.file)
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := edgekeep(t, "verify", path)
		if err != nil || !strings.Contains(out, ": "+tt.kind+"\n") || !strings.Contains(out, tt.says) {
			t.Errorf("%s: %v\n%s", tt.file, err, out)
		}
		out, err = edgekeep(t, "--json", "verify", path)
		var f finding
		if err != nil || json.Unmarshal([]byte(out), &f) != nil || f.Kind != tt.kind || !f.OK {
			t.Errorf("%s: %v\n%s", tt.file, err, out)
		}
		// Cut short it is nothing, and never a crash.
		if err := os.WriteFile(path, raw[:len(raw)-1], 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := edgekeep(t, "verify", path); err == nil {
			t.Errorf("%s, cut short: %s", tt.file, out)
		}
	}
}

func TestVerifyNoticesAChange(t *testing.T) {
	raw := golden(t, "../../tee/attest/testdata/evidence.golden")
	path := filepath.Join(t.TempDir(), "file")
	for i := 0; i < len(raw); i += 41 {
		changed := bytes.Clone(raw)
		changed[i] ^= 1
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := edgekeep(t, "verify", path); err == nil {
			t.Errorf("byte %d changed: %s", i, out)
		}
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"gateway", "ls"}, "--kit"},
		{[]string{"gateway", "approve", "zz", "gw"}, "64 hexadecimal digits"},
		{[]string{"gateway", "approve", strings.Repeat("00", 32), "a b"}, "letters, digits and hyphens"},
		{[]string{"verify", "no-such-file"}, "reading the file"},
		{[]string{"verify", "main_test.go"}, "docs/protocol.md"},
		{[]string{"data", "export", "--format", "xml"}, "csv or jsonl"},
		{[]string{"demo", "--broker", "carrier-pigeon"}, "nats or mosquitto"},
		{[]string{"gatway"}, "unknown command"},
		{[]string{"command", "gw1"}, "accepts 2 arg"},
	} {
		if _, err := edgekeep(t, tt.args...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v", tt.args, err)
		}
	}
}

func TestCompletion(t *testing.T) {
	out, err := edgekeep(t, "completion", "bash")
	if err != nil || !strings.Contains(out, "edgekeep") {
		t.Error(err)
	}
}

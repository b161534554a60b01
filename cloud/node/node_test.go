package node

import (
	"context"
	"encoding/json"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"edgekeep/cloud"
	"edgekeep/internal/config"
)

func TestConfig(t *testing.T) {
	raw, err := os.ReadFile("../../configs/cloud.toml")
	if err != nil {
		t.Fatal(err)
	}
	load := func(text string) (Config, error) {
		path := filepath.Join(t.TempDir(), "cloud.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var c Config
		err := config.Load(path, &c)
		if err == nil {
			err = c.Validate()
		}
		return c, err
	}
	c, err := load(string(raw))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Roles) != 3 || c.Data == "" || c.Keys == "" || c.Tenants == "" || c.EKCA == "" || c.Server.MQTTPort != 8883 || c.Server.ClientPort != 4222 || c.Bridge.Key == "" {
		t.Errorf("read %+v", c)
	}
	for _, x := range []struct{ old, new, want string }{
		{"roles =", "role =", `cloud.toml:6: unknown key "role"`},
		{"mqtt_port", "mqttport", `unknown key "server.mqttport"`},
		{"[bridge]", "[bridges]", "unknown key"},
		{`"fleet"]`, `"flee"]`, `unknown role "flee"`},
		{`["verifier", "keybroker", "fleet"]`, `[]`, "roles is missing"},
		{`["verifier", "keybroker", "fleet"]`, `"fleet"`, "line 6"},
		{"data =", "# data =", "data, keys and tenants"},
		{"keys =", "# keys =", "data, keys and tenants"},
		{"tenants =", "# tenants =", "data, keys and tenants"},
		{"ek_ca =", "# ek_ca =", "ek_ca is missing"},
		{"= 8883", `= "8883"`, "server.mqtt_port"},
		{`"fleet"]`, `"fleet", "bridge"]` + "\n[bridge2]", "unknown key"},
		{"data =", "data = \"a\"\ndata =", "cloud.toml:10"},
	} {
		text := strings.Replace(string(raw), x.old, x.new, 1)
		if text == string(raw) {
			t.Fatalf("%q is not in the example", x.old)
		}
		if _, err := load(text); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s -> %s: %v, want %q", x.old, x.new, err, x.want)
		}
	}
	c.Roles, c.Bridge.URL = append(c.Roles, "bridge"), ""
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "bridge.url") {
		t.Errorf("a bridge to nowhere: %v", err)
	}
	if err := config.Load("no/such/cloud.toml", &c); err == nil || !strings.Contains(err.Error(), "not there") {
		t.Errorf("no file: %v", err)
	}
}

func TestInit(t *testing.T) {
	dir := t.TempDir()
	o := InitOptions{Dir: dir, Tenant: "acme", Hosts: []string{"127.0.0.1", "cloud.example"}, Now: time.Now()}
	digest, err := Init(o)
	if err != nil {
		t.Fatal(err)
	}
	tenant, err := (&cloud.Tenants{Dir: filepath.Join(dir, "tenants")}).Tenant("acme")
	if err != nil || string(tenant.Digest) != string(digest) {
		t.Fatalf("the digest is another: %v", err)
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		secret := strings.HasSuffix(path, ".key") || strings.HasSuffix(path, ".secret")
		if err == nil && secret && fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %s", path, fi.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// The cloud keeps no key of the operator or of the data owner's signature.
	for _, name := range []string{"operator.key", "owner.key"} {
		if _, err := os.Stat(filepath.Join(dir, "keys", name)); err == nil {
			t.Errorf("keys/%s is there", name)
		}
	}
	if _, err := Init(o); err == nil || !strings.Contains(err.Error(), "never overwritten") {
		t.Errorf("made again: %v", err)
	}
	for _, name := range []string{"", "boot", "monitor", "a.b", "*", "a/b", strings.Repeat("x", 32), "ü"} {
		bad := o
		bad.Dir, bad.Tenant = t.TempDir(), name
		if _, err := Init(bad); err == nil {
			t.Errorf("tenant %q", name)
		}
	}
	bad := o
	bad.Dir, bad.Hosts = t.TempDir(), nil
	if _, err := Init(bad); err == nil {
		t.Error("a server without name")
	}
}

func TestStart(t *testing.T) {
	dir := t.TempDir()
	if _, err := Init(InitOptions{Dir: dir, Tenant: "acme", Hosts: []string{"127.0.0.1"}, Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	cfg := Config{Roles: []string{"verifier", "keybroker", "fleet"}, Data: path("data"), Keys: path("keys"), Tenants: path("tenants"), EKCA: path("makers")}
	cfg.Server.Host, cfg.Server.ClientPort, cfg.Server.MQTTPort = "127.0.0.1", -1, -1
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	for _, x := range []struct {
		name  string
		spoil func(t *testing.T)
		want  string
	}{
		{"no directory of makers", func(*testing.T) {}, "TPM manufacturers"},
		{"no makers", func(t *testing.T) { try(t, os.Mkdir(path("makers"), 0o700)) }, "no TPM could ever enrol"},
		{"a maker that is no certificate", func(t *testing.T) {
			try(t, os.WriteFile(path("makers/bad.pem"), []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0o600))
		}, "bad.pem"},
	} {
		x.spoil(t)
		if _, err := Start(ctx, cfg, "test", log); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Fatalf("%s: %v, want %q", x.name, err, x.want)
		}
	}
	try(t, os.Rename(path("keys/ca.pem"), path("makers/bad.pem")))
	raw, err := os.ReadFile(path("makers/bad.pem"))
	try(t, err)
	try(t, os.WriteFile(path("keys/ca.pem"), raw, 0o600))
	n, err := Start(ctx, cfg, "test", log)
	if err != nil {
		t.Fatal(err)
	}
	where, err := json.Marshal(n.Endpoints)
	if err != nil || !strings.Contains(string(where), `"mqtt":"tls://127.0.0.1:`) {
		t.Errorf("it is at %s: %v", where, err)
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- n.Run(running) }()
	stop()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func try(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

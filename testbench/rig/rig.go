// Package rig sets up a whole Edgekeep on one machine, as real processes in one
// directory: a cloud, gateways with a software TPM each, drivers. It is what
// `edgekeep demo` shows and what the end-to-end tests torment.
//
// The rig plays what a machine would do that has these programs installed: it
// extends PCRs with the digests of the programs before the keep starts, and
// writes a policy with the values that follow. Nothing is measured by firmware
// here, and the demo says so.
package rig

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"edgekeep/cloud/client"
	"edgekeep/cloud/node"
	"edgekeep/testbench/internal/process"
	"edgekeep/testbench/mosquitto"
)

// Tenant is the rig's only tenant.
const Tenant = "acme"

// Options describe a rig.
type Options struct {
	Dir      string // absolute; created
	Bin      string // absolute: directory of the programs
	Broker   string // "" or "nats": the cloud's own; "mosquitto"; or, until StartCloud, the URL of another one
	Lifetime string // of a verdict; default "10m"
}

// Rig is a running cloud with its gateways.
type Rig struct {
	Options
	Roots     string // digest of the trust roots, hexadecimal
	Mosquitto *mosquitto.Broker
	cloud     *process.Process
	starts    int
	node.Endpoints
	bootURL  string
	policies []string
	gateways []*Gateway
}

// New makes keys and certificates and starts the cloud.
func New(ctx context.Context, o Options) (*Rig, error) {
	if o.Lifetime == "" {
		o.Lifetime = "10m"
	}
	// What a service manager would do for the runners: guest memory is locked. It is
	// root's to raise; without, guests get what there is.
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	r := &Rig{Options: o}
	if err := os.MkdirAll(r.path("logs"), 0o755); err != nil {
		return nil, fmt.Errorf("making the rig's directory: %w", err)
	}
	if err := os.MkdirAll(r.path("manufacturer"), 0o755); err != nil {
		return nil, fmt.Errorf("making the rig's directory: %w", err)
	}
	digest, err := node.Init(node.InitOptions{Dir: r.path("cloud"), Tenant: Tenant, Hosts: []string{"127.0.0.1", "localhost"}, Now: time.Now()})
	if err != nil {
		return nil, err
	}
	r.Roots = fmt.Sprintf("%x", digest)
	return r, r.startBroker(ctx)
}

func (r *Rig) path(parts ...string) string {
	return filepath.Join(append([]string{r.Dir}, parts...)...)
}

func (r *Rig) startBroker(ctx context.Context) (err error) {
	if r.Broker != "mosquitto" {
		return nil
	}
	r.Mosquitto, err = mosquitto.Start(ctx, mosquitto.Options{
		Dir: r.path("mosquitto"), CAFile: r.path("cloud/keys/ca.pem"), CertFile: r.path("cloud/keys/server.pem"), KeyFile: r.path("cloud/keys/server.key"),
	})
	if err != nil {
		return err
	}
	r.MQTT, r.bootURL = r.Mosquitto.URL(), r.Mosquitto.BootURL()
	return nil
}

// ownBroker says whether gateways connect to the cloud's own server.
func (r *Rig) ownBroker() bool { return r.Broker == "" || r.Broker == "nats" }

// StartCloud starts the cloud, or starts it again, on the same ports.
func (r *Rig) StartCloud(ctx context.Context) error {
	clientPort, mqttPort := "-1", "-1"
	if r.Client != "" {
		clientPort = r.Client[strings.LastIndex(r.Client, ":")+1:]
		mqttPort = r.MQTT[strings.LastIndex(r.MQTT, ":")+1:]
	}
	roles, bridge := `["verifier", "keybroker", "fleet"]`, ""
	if !r.ownBroker() {
		roles, mqttPort = `["verifier", "keybroker", "fleet", "bridge"]`, "0"
		if r.Mosquitto == nil {
			r.MQTT, r.bootURL = r.Broker, r.Broker
		}
		bridge = fmt.Sprintf("[bridge]\nurl = %q\nca = %q\ncert = %q\nkey = %q\n", r.MQTT,
			r.path("cloud/bridge/ca.pem"), r.path("cloud/bridge/tls.pem"), r.path("cloud/bridge/tls.key"))
	}
	cfg := fmt.Sprintf("roles = %s\ndata = %q\nkeys = %q\ntenants = %q\nek_ca = %q\n[server]\nhost = \"127.0.0.1\"\nclient_port = %s\nmqtt_port = %s\n%s",
		roles, r.path("cloud/data"), r.path("cloud/keys"), r.path("cloud/tenants"), r.path("manufacturer"), clientPort, mqttPort, bridge)
	if err := os.WriteFile(r.path("cloud/cloud.toml"), []byte(cfg), 0o600); err != nil {
		return fmt.Errorf("writing cloud.toml: %w", err)
	}
	where := r.path("cloud/data/endpoints.json")
	_ = os.Remove(where) // of an earlier start
	var err error
	if r.cloud, err = r.start("cloud", -1, "edgekeep-cloud", "run", "--config", r.path("cloud/cloud.toml")); err != nil {
		return err
	}
	if err := r.awaitFile(ctx, r.cloud, where); err != nil {
		return err
	}
	raw, err := os.ReadFile(where)
	if err != nil {
		return fmt.Errorf("reading where the cloud is: %w", err)
	}
	var e node.Endpoints
	if err := json.Unmarshal(raw, &e); err != nil {
		return fmt.Errorf("reading where the cloud is: %w", err)
	}
	r.Client = e.Client
	if r.ownBroker() {
		r.MQTT, r.bootURL = e.MQTT, e.MQTT
	}
	return r.pointKits()
}

// pointKits writes the server's address into the kits.
func (r *Rig) pointKits() error {
	for _, kit := range []string{"operator", "consumer"} {
		text := fmt.Sprintf("tenant = %q\nserver = %q\n", Tenant, r.Client)
		if kit == "consumer" {
			text += "consumer = \"consumer\"\n"
		}
		if err := os.WriteFile(r.path("cloud", kit, "kit.toml"), []byte(text), 0o600); err != nil {
			return fmt.Errorf("writing a kit: %w", err)
		}
	}
	return nil
}

// awaitFile waits until a process has written a file.
func (r *Rig) awaitFile(ctx context.Context, p *process.Process, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("it ended: %w\n%s", p.Err(), p.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("it did not start: %w\n%s", ctx.Err(), p.LogTail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// start starts one of our programs; each start has a log of its own.
func (r *Rig) start(name string, uid int, program string, args ...string) (*process.Process, error) {
	r.starts++
	return process.StartAs(uid, r.path("logs", fmt.Sprintf("%s.%d.log", name, r.starts)), filepath.Join(r.Bin, program), args...)
}

// KillCloud ends the cloud with SIGKILL.
func (r *Rig) KillCloud() error { return r.cloud.Kill() }

// StopCloud ends the cloud in good order.
func (r *Rig) StopCloud() error { return r.cloud.Stop() }

// Kit loads a kit: "operator" or "consumer".
func (r *Rig) Kit(name string) (*client.Kit, error) { return client.LoadKit(r.KitDir(name)) }

// KitDir is a kit's directory.
func (r *Rig) KitDir(name string) string { return r.path("cloud", name) }

// Stop ends everything, and says what had ended by itself before.
func (r *Rig) Stop() error {
	var errs []error
	for _, g := range r.gateways {
		errs = append(errs, g.Stop())
	}
	if r.cloud != nil {
		errs = append(errs, r.cloud.Stop())
	}
	if r.Mosquitto != nil {
		errs = append(errs, r.Mosquitto.Stop())
	}
	return errors.Join(errs...)
}

// digestFile is what a measuring boot would extend for a program.
func digestFile(path string) ([32]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return [32]byte{}, fmt.Errorf("measuring %s: %w", path, err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, bufio.NewReader(f)); err != nil {
		return [32]byte{}, fmt.Errorf("measuring %s: %w", path, err)
	}
	return [32]byte(h.Sum(nil)), nil
}

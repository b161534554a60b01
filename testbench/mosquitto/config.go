package mosquitto

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	configs "edgekeep/configs/mosquitto"
)

const (
	pollInterval = 10 * time.Millisecond // between two looks for the listeners
	probeTimeout = 2 * time.Second       // of one look
)

// writeConfig writes what is shipped, fitted to the bench, to o.Dir and returns
// the path of mosquitto.conf.
func writeConfig(o Options, p ports) (path string, err error) {
	in := func(name string) string { return filepath.Join(o.Dir, name) }
	conf, err := rewrite(configs.Conf, map[string]string{
		"listener 8883": fmt.Sprintf("listener %d 127.0.0.1", p[0]),
		"listener 8884": fmt.Sprintf("listener %d 127.0.0.1", p[1]),
		"cafile /etc/mosquitto/edgekeep/clients.pem":  "cafile " + o.CAFile,
		"certfile /etc/mosquitto/edgekeep/server.pem": "certfile " + o.CertFile,
		"keyfile /etc/mosquitto/edgekeep/server.key":  "keyfile " + o.KeyFile,
		"acl_file /etc/mosquitto/edgekeep/acl":        "acl_file " + in("acl"),
		"acl_file /etc/mosquitto/edgekeep/acl-boot":   "acl_file " + in("acl-boot"),
		"persistence_location /var/lib/mosquitto/":    "persistence_location " + in("store") + "/",
		"user mosquitto": "user root", // means: stay who you are
	})
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(in("store"), 0o700); err != nil {
		return "", fmt.Errorf("make the store of a broker: %w", err)
	}
	for name, text := range map[string]string{"mosquitto.conf": conf, "acl": configs.ACL, "acl-boot": configs.BootACL} {
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			return "", fmt.Errorf("write the configuration of a broker: %w", err)
		}
	}
	return in("mosquitto.conf"), nil
}

// rewrite replaces whole lines. Each must be there at least once.
func rewrite(conf string, replace map[string]string) (string, error) {
	lines := strings.Split(conf, "\n")
	done := map[string]bool{}
	for i, line := range lines {
		if other, ok := replace[line]; ok {
			lines[i], done[line] = other, true
		}
	}
	for line := range replace {
		if !done[line] {
			return "", fmt.Errorf("fit the shipped mosquitto.conf to the test bench: it has no line %q", line)
		}
	}
	return strings.Join(lines, "\n"), nil
}

// readLeaf returns the first certificate of a PEM file, DER.
func readLeaf(certFile string) ([]byte, error) {
	data, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("read the broker's certificate: %w", err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			return block.Bytes, nil
		}
	}
	return nil, fmt.Errorf("read the broker's certificate: %s holds no PEM certificate", certFile)
}

// waitReady returns when both listeners show the broker's own certificate, so
// that somebody else's server on the port is not taken for it.
func (b *Broker) waitReady(ctx context.Context, leaf []byte) error {
	for {
		err := errors.Join(probe(ctx, b.ports.mutual(), leaf), probe(ctx, b.ports.boot(), leaf))
		if err == nil {
			return nil
		}
		select {
		case <-b.process.Done():
			return fmt.Errorf("start mosquitto: it ended (%v): %s", b.process.Err(), b.process.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("wait for mosquitto: %w; last answer: %w", context.Cause(ctx), err)
		case <-time.After(pollInterval):
		}
	}
}

var errSeen = errors.New("the broker's certificate was seen")

// probe connects and looks at the server's certificate, no further.
func probe(ctx context.Context, address string, leaf []byte) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{
		InsecureSkipVerify: true, // VerifyPeerCertificate compares with the one certificate it can be
		VerifyPeerCertificate: func(chain [][]byte, _ [][]*x509.Certificate) error {
			if string(chain[0]) != string(leaf) {
				return fmt.Errorf("another server listens on %s", address)
			}
			return errSeen
		},
	}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if errors.Is(err, errSeen) {
		return nil
	}
	if err == nil {
		conn.Close()
		err = errors.New("the server showed no certificate") // TLS does not allow this
	}
	return fmt.Errorf("connect to the broker at %s: %w", address, err)
}

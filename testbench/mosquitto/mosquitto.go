// Package mosquitto runs Mosquitto as the test bench's ordinary, honest broker,
// from the configuration that is shipped (edgekeep/configs/mosquitto). Only
// ports, paths and the user are replaced, line by line; a line that is not found
// is an error, so the bench cannot drift away from what is installed.
//
// The directory of a broker holds the rewritten configuration, the two ACL
// files, the persistence file, a log, a lock, and the ports: a later Start in
// the same directory listens where the first one did, as a restarted broker
// would. The first Start takes two free ports of 127.0.0.1.
package mosquitto

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"edgekeep/testbench/internal/process"
)

// attempts to find two ports that nobody else takes before the broker does.
const attempts = 5

// Options tells where a broker lives and who it is.
type Options struct {
	// Dir is the broker's directory, an absolute path; created when missing.
	Dir string
	// CAFile holds the PEM certificates that client certificates chain to.
	CAFile string
	// CertFile and KeyFile are the broker's own certificate, with intermediates,
	// and its key, PEM. The product expects it to be valid for 127.0.0.1.
	CertFile, KeyFile string
}

// Broker is a running Mosquitto. Its methods are safe for concurrent use.
type Broker struct {
	dir     string
	ports   ports
	process *process.Process
	release func() // of the lock on dir; once
}

// Start starts a broker and returns when both its listeners show the
// certificate of o.CertFile. The context bounds the start, not the life of the
// broker: that ends with Stop, Kill, or this process.
//
// It fails when mosquitto is not installed (errors.Is exec.ErrNotFound; the
// message says what to install), when a broker already runs in o.Dir, and when
// its ports of an earlier start are taken.
func Start(ctx context.Context, o Options) (*Broker, error) {
	program, err := process.Find("mosquitto", "mosquitto")
	if err != nil {
		return nil, err
	}
	if o, err = absolute(o); err != nil {
		return nil, err
	}
	leaf, err := readLeaf(o.CertFile)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of a broker: %w", err)
	}
	release, err := process.Lock(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("start mosquitto: %w", err)
	}
	b := &Broker{dir: o.Dir, release: sync.OnceFunc(release)}
	if err := b.start(ctx, program, o, leaf); err != nil {
		b.release()
		return nil, err
	}
	return b, nil
}

// absolute checks the directory and makes the other paths absolute.
func absolute(o Options) (Options, error) {
	if !filepath.IsAbs(o.Dir) {
		return o, fmt.Errorf("start mosquitto in %q: give an absolute path", o.Dir)
	}
	for _, path := range []*string{&o.CAFile, &o.CertFile, &o.KeyFile} {
		if *path == "" {
			return o, errors.New("start mosquitto: CAFile, CertFile and KeyFile are needed")
		}
		full, err := filepath.Abs(*path)
		if err != nil {
			return o, fmt.Errorf("start mosquitto: %w", err)
		}
		*path = full
	}
	for _, path := range []string{o.Dir, o.CAFile, o.CertFile, o.KeyFile} {
		if strings.ContainsAny(path, " \t\r\n") {
			return o, fmt.Errorf("start mosquitto with %q: its configuration cannot carry a path with a space", path)
		}
	}
	return o, nil
}

// start does the work of Start under the lock of o.Dir.
func (b *Broker) start(ctx context.Context, program string, o Options, leaf []byte) error {
	known, err := readPorts(o.Dir)
	if err != nil {
		return err
	}
	if known != (ports{}) {
		b.ports = known
		return b.run(ctx, program, o, leaf)
	}
	for range attempts {
		if b.ports, err = freePorts(); err != nil {
			return err
		}
		err = b.run(ctx, program, o, leaf)
		if err == nil {
			return b.ports.write(o.Dir)
		}
		if !strings.Contains(err.Error(), "Address already in use") {
			break
		}
	}
	return err
}

// run starts the program once, on b.ports.
func (b *Broker) run(ctx context.Context, program string, o Options, leaf []byte) error {
	conf, err := writeConfig(o, b.ports)
	if err != nil {
		return err
	}
	b.process, err = process.Start(filepath.Join(o.Dir, "mosquitto.log"), program, "-c", conf)
	if err != nil {
		return err
	}
	if err := b.waitReady(ctx, leaf); err != nil {
		return errors.Join(err, b.process.Kill())
	}
	return nil
}

// URL is where clients with a certificate connect, "tls://127.0.0.1:port".
func (b *Broker) URL() string { return "tls://" + b.ports.mutual() }

// BootURL is where boxes without a certificate connect, "tls://127.0.0.1:port".
func (b *Broker) BootURL() string { return "tls://" + b.ports.boot() }

// StoreFile is the path of the persistence file: what the broker's operator
// could read. It exists after an orderly Stop, and after a minute.
func (b *Broker) StoreFile() string { return filepath.Join(b.dir, "store", "mosquitto.db") }

// Kill ends the broker with SIGKILL: it writes nothing more. It is no error
// when the broker is gone already.
func (b *Broker) Kill() error {
	err := b.process.Kill()
	b.release()
	return err
}

// Stop ends the broker in order: it writes its persistence file and closes all
// connections. It is no error when the broker is gone already.
func (b *Broker) Stop() error {
	err := b.process.Stop()
	b.release()
	return err
}

// ports are the two TCP ports of a broker on 127.0.0.1.
type ports [2]uint16

func (p ports) mutual() string { return fmt.Sprintf("127.0.0.1:%d", p[0]) }
func (p ports) boot() string   { return fmt.Sprintf("127.0.0.1:%d", p[1]) }

// freePorts returns two ports that were free a moment ago.
func freePorts() (p ports, err error) {
	for i := range p {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return p, fmt.Errorf("look for a free port: %w", err)
		}
		defer listener.Close()
		p[i] = uint16(listener.Addr().(*net.TCPAddr).Port)
	}
	return p, nil
}

// readPorts returns the ports of an earlier start in dir, zero if there was
// none.
func readPorts(dir string) (p ports, err error) {
	data, err := os.ReadFile(filepath.Join(dir, "ports"))
	if errors.Is(err, os.ErrNotExist) {
		return ports{}, nil
	}
	if err != nil {
		return p, fmt.Errorf("read the ports of a broker: %w", err)
	}
	if _, err := fmt.Sscanf(string(data), "%d %d\n", &p[0], &p[1]); err != nil || p[0] == 0 || p[1] == 0 {
		return ports{}, fmt.Errorf("read the ports of a broker: %s holds %q, want two port numbers; delete it to take new ones", filepath.Join(dir, "ports"), data)
	}
	return p, nil
}

func (p ports) write(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "ports"), fmt.Appendf(nil, "%d %d\n", p[0], p[1]), 0o600); err != nil {
		return fmt.Errorf("note the ports of a broker: %w", err)
	}
	return nil
}

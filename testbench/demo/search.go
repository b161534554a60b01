package demo

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"edgekeep/cloud"
	"edgekeep/internal/durable"
	"edgekeep/mqtt"
	"edgekeep/testbench/rig"
)

// tap is the eavesdropper: an MQTT client that may see every message.
type tap struct {
	conn *mqtt.Conn

	mu       sync.Mutex // protects what follows
	messages int
	seen     bytes.Buffer // every payload, one after the other
}

const maxTap = 512 << 20 // bytes of payloads kept for the search

func openTap(ctx context.Context, r *rig.Rig) (*tap, error) {
	dir := filepath.Join(r.Dir, "cloud/monitor")
	pool, err := cloud.LoadPool(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls.pem"), filepath.Join(dir, "tls.key"))
	if err != nil {
		return nil, fmt.Errorf("the monitor's certificate: %w", err)
	}
	t := &tap{}
	t.conn, err = mqtt.Dial(ctx, mqtt.Options{
		URL: r.MQTT, ClientID: "monitor", Username: "monitor",
		TLS:       &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13},
		Subscribe: []string{"ek1/#"}, Receive: t.receive,
	})
	return t, err
}

func (t *tap) receive(m mqtt.Message) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.messages++
	if t.seen.Len() < maxTap {
		t.seen.Write(m.Payload)
		t.seen.WriteByte('\n')
	}
}

func (t *tap) hits(needle string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Count(t.seen.Bytes(), []byte(needle))
}

func (t *tap) close() {
	if t.conn != nil {
		t.conn.Close()
	}
}

// search counts how often the canary occurs where only sealed bytes belong: the
// spool, the brokers' stores, the wire. In the same three places a control lies
// in the clear, put there on purpose; a search that does not find it could not
// have found the canary either, and fails.
func (d *Demo) search() (hits int, err error) {
	spool := d.gw.Path("agent")
	stores := []string{filepath.Join(d.o.Dir, "cloud/data")}
	if d.rig.Mosquitto != nil {
		stores = append(stores, filepath.Dir(d.rig.Mosquitto.StoreFile()))
	}
	if err := d.plantControl(spool); err != nil {
		return 0, err
	}
	places := []struct {
		name string
		find func(needle string) (int, error)
	}{
		{"the spool", func(n string) (int, error) { return countFiles(spool, n) }},
		{"the brokers' stores", func(n string) (int, error) {
			total := 0
			for _, s := range stores {
				c, err := countFiles(s, n)
				if err != nil {
					return 0, err
				}
				total += c
			}
			return total, nil
		}},
		{"the wire", func(n string) (int, error) { return d.tap.hits(n), nil }},
	}
	for _, p := range places {
		control, err := p.find(d.control)
		if err != nil {
			return 0, err
		}
		if control == 0 {
			return 0, fmt.Errorf("the search of %s did not find what lies there in the clear: it proves nothing", p.name)
		}
		n, err := p.find(d.canary)
		if err != nil {
			return 0, err
		}
		hits += n
		d.say("searched %s: the control, left there in the clear, %d times; the canary %d times", p.name, control, n)
	}
	return hits, nil
}

// plantControl writes the control, not sealed, through the same programs and
// formats: an entry of a spool, a message on the wire, and a name in an approval,
// which goes into the store.
func (d *Demo) plantControl(spool string) error {
	log, err := durable.Open(filepath.Join(spool, "control"), durable.Options{MaxBytes: 1 << 20})
	if err != nil {
		return fmt.Errorf("planting the control: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	if _, err := log.Append(ctx, []byte(d.control)); err != nil {
		return fmt.Errorf("planting the control: %w", errors.Join(err, log.Close()))
	}
	if err := log.Close(); err != nil {
		return fmt.Errorf("planting the control: %w", err)
	}
	if err := d.tap.conn.Flush(ctx, "ek1/monitor/control/up/sealed", []byte(d.control)); err != nil {
		return fmt.Errorf("planting the control: %w", err)
	}
	// The name in an approval is stored by the cloud as it is.
	if err := d.op.Approve(ctx, make([]byte, 32), d.control); err != nil {
		return fmt.Errorf("planting the control: %w", err)
	}
	for d.tap.hits(d.control) == 0 {
		select {
		case <-ctx.Done():
			return errors.New("planting the control: the eavesdropper does not see it")
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

func countFiles(dir, needle string) (int, error) {
	n := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed while we look
			}
			return err
		}
		if !e.Type().IsRegular() {
			return nil
		}
		raw, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		n += bytes.Count(raw, []byte(needle))
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("searching %s: %w", dir, err)
	}
	return n, nil
}

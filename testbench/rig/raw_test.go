package rig

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/sealing"
	"edgekeep/tee"
)

// raw is a connection with a kit's certificate, for requests that no honest
// client makes.
func (b *bench) raw(kit string) *nats.Conn {
	b.t.Helper()
	pool, err := cloud.LoadPool(filepath.Join(b.KitDir(kit), "ca.pem"))
	b.must(err)
	cert, err := tls.LoadX509KeyPair(filepath.Join(b.KitDir(kit), "tls.pem"), filepath.Join(b.KitDir(kit), "tls.key"))
	b.must(err)
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	b.must(err)
	nc, err := nats.Connect(b.Client, nats.CustomInboxPrefix(cloud.Inbox(leaf)),
		nats.Secure(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}))
	b.must(err)
	b.t.Cleanup(nc.Close)
	return nc
}

// ask sends a request of the tenant's people.
func ask[Rep any](ctx context.Context, nc *nats.Conn, what string, req any) (Rep, error) {
	return cloud.Ask[Rep](ctx, nc, "api."+Tenant+"."+what, req)
}

// key loads one of the cloud's or the people's signing keys.
func (b *bench) key(path string) crypto.Signer {
	b.t.Helper()
	k, err := cloud.LoadSigningKey(b.path("cloud", path))
	b.must(err)
	return k
}

// stored are all chunks of a gateway in the store, as they are.
func (b *bench) stored(g *Gateway) (chunks [][]byte) {
	b.t.Helper()
	nc := b.raw("consumer")
	for after := uint64(0); ; {
		f, err := ask[fleet.Fetched](b.ctx, nc, "data.fetch", fleet.Fetch{Gateway: g.Name, After: after})
		b.must(err)
		if len(f.Chunks) == 0 {
			return chunks
		}
		for _, c := range f.Chunks {
			chunks = append(chunks, c.Data)
		}
		after = f.Next
	}
}

// nonces remembers which (stream key, IV) sealed which record.
type nonces map[string]string

// add takes the records of a chunk, and fails the test if one of them repeats
// the key and the IV of another.
func (n nonces) add(t *testing.T, chunk []byte) {
	t.Helper()
	c, _, err := sealing.ParseChunk(chunk)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range c.Records {
		h, err := sealing.ParseRecord(r)
		if err != nil {
			t.Fatal(err)
		}
		place := fmt.Sprintf("%s/%s/%x", h.Stream, h.Epoch, h.IV)
		hash := hex.EncodeToString(sealing.Hash(r))
		if old, ok := n[place]; ok && old != hash {
			t.Errorf("two records were sealed with the same key and IV, %s", place)
		}
		n[place] = hash
	}
}

// refused checks that the keep itself said no, and why.
func (b *bench) refused(err error, why string) {
	b.t.Helper()
	var r *tee.Refusal
	if !errors.As(err, &r) || !strings.Contains(r.Reason, why) {
		b.t.Errorf("the keep's answer is %v, want a refusal with %q", err, why)
	}
}

// socket is a connection to a gateway's keep, as its agent has one.
func (b *bench) socket(g *Gateway) *tee.Socket {
	s := &tee.Socket{Path: g.KeepSocket()}
	b.t.Cleanup(s.Close)
	return s
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

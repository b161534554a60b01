package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
)

// fakeKeep answers requests on the agent's keep socket.
type fakeKeep func(kind int, body []byte) (any, error)

func (f fakeKeep) Handle(_ context.Context, kind int, body []byte) (any, error) { return f(kind, body) }

func (a *Agent) serve(t *testing.T, f fakeKeep) {
	t.Helper()
	l := must(net.Listen("unix", a.cfg.KeepSocket))(t)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go tee.ServeConn(ctx, conn, f)
		}
	}()
}

func (a *Agent) file(name string) string {
	raw, err := os.ReadFile(a.path(name))
	if err != nil {
		return "(" + err.Error() + ")"
	}
	return string(raw)
}

// The keep's states are durable before they are committed, in order, and what
// comes with the last outcome is stored.
func TestStartKeep(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := must(a.spool("a"))(t)
	appendTo(t, s, chunks(1, 0, 3)...)
	if _, err := s.trim(mark(1, 1), []byte("w")); err != nil {
		t.Fatal(err)
	}
	must(a.spool("b"))(t) // empty: nothing to show
	if err := os.WriteFile(a.path("state.cbor"), []byte("s0"), 0o600); err != nil {
		t.Fatal(err)
	}
	committed := ""
	a.serve(t, func(kind int, body []byte) (any, error) {
		switch kind {
		case tee.KindStart:
			r, err := tee.Body[tee.Start](body)
			if err != nil || string(r.State) != "s0" || len(r.Checkpoints) != 1 || !bytes.Equal(r.Checkpoints[0], chunk(1, 3).Checkpoint) ||
				len(r.Watermarks) != 1 || string(r.Watermarks[0]) != "w" {
				t.Errorf("%q, %v", r, err)
			}
			return tee.Outcome{Commit: []byte("s1")}, nil
		case tee.KindCommit:
			r, err := tee.Body[tee.Commit](body)
			state := a.file("state.cbor")
			if sum := sha256.Sum256([]byte(state)); err != nil || !bytes.Equal(r.State, sum[:]) {
				t.Errorf("committed %x while %q is stored", r.State, state)
			}
			if a.isReady() {
				t.Error("ready before the last Commit")
			}
			if committed += state; state == "s1" {
				return tee.Outcome{Commit: []byte("s2")}, nil
			}
			return tee.Outcome{Certificate: [][]byte{{1}, {2}}, Verdict: []byte("verdict"), Pull: true}, nil
		}
		return nil, tee.ErrKind
	})
	if err := a.startKeep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if committed != "s1s2" || !a.isReady() || a.file("verdict.cbor") != "verdict" || len(a.kick) != 1 {
		t.Errorf("committed %q, ready %v, verdict %q", committed, a.isReady(), a.file("verdict.cbor"))
	}
	if got := decodePEM([]byte(a.file("client.pem"))); !slices.EqualFunc(got, [][]byte{{1}, {2}}, bytes.Equal) {
		t.Errorf("%x", got)
	}
	if n, _ := s.depth(); n != 2 {
		t.Errorf("the spool has %d chunks", n)
	}
}

// Where the disk fails the keep is told nothing, and the agent stops.
func TestDiskFails(t *testing.T) {
	for name, out := range map[string]tee.Outcome{
		"state.cbor": {Commit: []byte("s1")}, "client.pem": {Certificate: [][]byte{{1}}}, "verdict.cbor": {Verdict: []byte("v")},
	} {
		a := newAgent(t, 1<<20)
		if err := os.Mkdir(a.path(name), 0o700); err != nil { // nothing can be renamed to it
			t.Fatal(err)
		}
		a.serve(t, func(kind int, _ []byte) (any, error) {
			if kind == tee.KindCommit {
				t.Error("committed")
			}
			return out, nil
		})
		if _, err := a.deliver(t.Context(), []byte("item")); !errors.Is(err, errSpool) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A new identity sets the spool of the old one aside before its first state is
// stored: there is no time at which the new one has the old spool.
func TestSetAside(t *testing.T) {
	a := newAgent(t, 1<<20)
	s := must(a.spool("a"))(t)
	appendTo(t, s, chunks(1, 0, 3)...)
	if _, err := s.trim(mark(1, 1), []byte("w")); err != nil {
		t.Fatal(err)
	}
	a.serve(t, func(kind int, body []byte) (any, error) {
		if kind == tee.KindStart {
			return tee.Outcome{Commit: []byte("s1"), Fresh: true}, nil
		}
		if entries := must(os.ReadDir(a.path("spool")))(t); len(entries) != 0 {
			t.Errorf("in the spool of the new identity: %v", entries)
		}
		return tee.Outcome{}, nil
	})
	if err := a.startKeep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if cp, w := must(a.spool("a"))(t).tail(); cp != nil || w != nil {
		t.Error("the new spool shows the old one's end")
	}
	olds := must(filepath.Glob(a.path("spool.*")))(t)
	if len(olds) != 1 {
		t.Fatalf("%v", olds)
	}
	old := must(openSpool(filepath.Join(olds[0], "a"), "a", 1<<20))(t)
	defer old.log.Close()
	wantPlaces(t, "set aside", old, [2]uint64{1, 2}, [2]uint64{1, 3})
	wantTail(t, "set aside", old, 1, 3, "w")
}

// A ticket is confirmed when its chunk is on the disk, and not before.
func TestTakeChunks(t *testing.T) {
	a := newAgent(t, 1<<20)
	all := chunks(1, 1, 9)
	for i := range all {
		all[i].Ticket = uint64(i + 1)
		if i%3 == 2 {
			all[i].Stream = "b"
		}
	}
	empty := true
	end := errors.New("the keep has gone")
	a.serve(t, func(kind int, body []byte) (any, error) {
		r, err := tee.Body[tee.Take](body)
		if kind != tee.KindTake || err != nil || r.Confirm != r.After || r.Wait <= 0 {
			t.Errorf("kind %d: %+v, %v", kind, r, err)
		}
		n := 0
		for _, name := range []string{"a", "b"} {
			chunks, _ := must(a.spool(name))(t).depth()
			n += chunks
		}
		if n != int(r.Confirm) {
			t.Errorf("%d are confirmed, %d are durable", r.Confirm, n)
		}
		if empty = !empty; empty {
			return tee.TakeReply{}, nil
		}
		if r.After == 9 {
			return nil, end
		}
		return tee.TakeReply{Chunks: all[r.After:min(r.After+4, 9)]}, nil
	})
	err := a.takeChunks(t.Context())
	var refusal *tee.Refusal
	if !errors.As(err, &refusal) || errors.Is(err, errSpool) {
		t.Errorf("%v", err)
	}
	var want [][2]uint64
	for _, c := range all {
		if c.Stream == "a" {
			want = append(want, [2]uint64{1, c.Seq})
		}
	}
	wantPlaces(t, "a", must(a.spool("a"))(t), want...)
	// A keep that names a stream which cannot be a file is not obeyed.
	if err := a.append(t.Context(), []tee.Chunk{{Stream: "../x", Epoch: epoch(1, 0)}}); !errors.Is(err, errSpool) {
		t.Errorf("%v", err)
	}
}

func TestClientCertificate(t *testing.T) {
	a := newAgent(t, 1<<20)
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	other := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	st := tee.StatusReply{TLSKey: cose.MarshalKey(&key.PublicKey)}
	cert := func(pub *ecdsa.PublicKey, life time.Duration) string {
		c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(life)}
		return string(encodePEM([][]byte{must(x509.CreateCertificate(rand.Reader, c, c, pub, key))(t)}))
	}
	if _, err := a.clientCertificate(st); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	for want, text := range map[string]string{
		"holds no certificate":            "-----BEGIN CERTIFICATE-----\n",
		"the client certificate: x509":    string(encodePEM([][]byte{{1}})),
		"for another key than the keep's": cert(&other.PublicKey, time.Hour),
		"has expired":                     cert(&key.PublicKey, -time.Second),
		"":                                cert(&key.PublicKey, time.Hour) + "trailing\n",
	} {
		if err := os.WriteFile(a.path("client.pem"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := a.clientCertificate(st)
		if want == "" && (err != nil || c.PrivateKey == nil) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", want, err)
		}
	}
	if err := os.WriteFile(a.path("client.pem"), []byte(cert(&key.PublicKey, time.Hour)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.clientCertificate(tee.StatusReply{}); err == nil || !strings.Contains(err.Error(), "the keep's TLS key") {
		t.Errorf("%v", err)
	}
	// The key signs texts only, and through the keep.
	a.serve(t, func(kind int, body []byte) (any, error) {
		r, err := tee.Body[tee.SignTLS](body)
		return tee.Signature{DER: append([]byte("signed "), r.Text...)}, err
	})
	signer := keepSigner{keep: a.keep, pub: &key.PublicKey}
	if _, err := signer.Sign(rand.Reader, make([]byte, 32), nil); err == nil {
		t.Error("a digest was signed")
	}
	if got, err := signer.SignMessage(rand.Reader, []byte("text"), nil); err != nil || string(got) != "signed text" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestValidate(t *testing.T) {
	good := Config{Broker: "b", BootBroker: "b", CA: "c", KeepSocket: "k", State: "s", SpoolBytes: 1 << 20, InstanceBytes: 8 << 20, BlobBytes: 1 << 20}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, edit := range map[string]func(*Config){
		"broker.url":      func(c *Config) { c.Broker = "" },
		"broker.ca":       func(c *Config) { c.CA = "" },
		"keep.socket":     func(c *Config) { c.KeepSocket = "" },
		"state.dir":       func(c *Config) { c.State = "" },
		"spool.bytes":     func(c *Config) { c.SpoolBytes-- },
		"instances.bytes": func(c *Config) { c.InstanceBytes-- },
		"blobs.bytes":     func(c *Config) { c.BlobBytes-- },
	} {
		c := good
		edit(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
		if _, err := New(c, discard); err == nil {
			t.Errorf("%s: an agent was made", want)
		}
	}
	c := good
	c.State, c.CA = t.TempDir(), filepath.Join(t.TempDir(), "ca.pem")
	if _, err := New(c, discard); err == nil || !strings.Contains(err.Error(), "reading the broker's CA") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(c.CA, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(c, discard); err == nil || !strings.Contains(err.Error(), "holds no PEM certificate") {
		t.Errorf("%v", err)
	}
}

// Package agent is the gateway's only process on the network. It moves opaque
// bytes: sealed chunks from the keep to its spool and on to the cloud, questions
// and answers between cloud and keep. It holds no secret and cannot open what it
// carries; even its TLS client key is used through the keep.
//
// It is in charge of losing nothing: what the keep hands over is durable before
// it is confirmed, and leaves the spool only when a watermark that the keep has
// verified covers it.
//
// For confidential workloads it does the keep's jobs: it keeps the instances' logs,
// which are durable when it says so; puts questions to the cloud and fetches blobs,
// which whoever wants them checks; and passes on messages between two keeps, which
// may get lost. In the state directory:
//
//	state.cbor, client.pem, verdict.cbor   the keep's; status.json, for people
//	spool/STREAM/, spool/STREAM.tails      what the cloud does not have yet
//	instances/NAME/                        an instance's log
//	blobs/HEX, HEX.part, HEX.list          a cache, and downloads under way
//	put/NAME.part                          uploads under way
package agent

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/internal/durable"
	"edgekeep/tee"
)

// Config is an agent's configuration.
type Config struct {
	Broker     string // tls://host:port, for enrolled gateways
	BootBroker string // tls://host:port, for boxes without a certificate; may be the same
	CA         string // PEM file: who may certify the brokers
	KeepSocket string
	State      string // directory: state, spool, certificate
	SpoolBytes int64  // bound of each stream's spool

	InstanceBytes int64 // bound of each workload instance's log
	BlobBytes     int64 // bound of all blobs together
}

// Validate says what is missing.
func (c Config) Validate() error {
	switch {
	case c.Broker == "" || c.BootBroker == "":
		return errors.New("broker.url is missing: where the MQTT broker is, like tls://broker.example:8883")
	case c.CA == "":
		return errors.New("broker.ca is missing: the PEM file of the CA that certifies the broker")
	case c.KeepSocket == "":
		return errors.New("keep.socket is missing: the keep's socket, like /run/edgekeep/keep.sock")
	case c.State == "":
		return errors.New("state.dir is missing: a directory for state and spool, like /var/lib/edgekeep/agent")
	case c.SpoolBytes < 1<<20:
		return errors.New("spool.bytes must be at least 1 MiB")
	case c.InstanceBytes < 8<<20:
		return errors.New("instances.bytes must be at least 8 MiB")
	case c.BlobBytes < 1<<20:
		return errors.New("blobs.bytes must be at least 1 MiB")
	}
	return nil
}

// Agent is a running agent.
type Agent struct {
	cfg  Config
	log  *slog.Logger
	pool *x509.CertPool
	keep *tee.Socket // short requests; Take has a socket of its own

	step   chan struct{} // has an item during an exchange with its Commits: one at a time
	starts atomic.Uint64 // goes up when a Start begins and when it has ended; changed with step held
	again  chan struct{} // start the keep again: a step may wait for a Commit that nobody sends
	kick   chan struct{} // ask the cloud at once

	questions *questions
	instances *instances
	blobs     *blobs
	uploads   *uploads

	mu      sync.Mutex // protects what follows
	spools  map[string]*spool
	link    *link         // the connection to the cloud, if there is one
	arrives chan struct{} // closed when there is one again; nil if nobody waits
	ready   bool          // the keep has been started
	status  Status
}

func assemble(cfg Config, log *slog.Logger) *Agent {
	a := &Agent{
		cfg: cfg, log: log, pool: x509.NewCertPool(), keep: &tee.Socket{Path: cfg.KeepSocket},
		step: make(chan struct{}, 1), again: make(chan struct{}, 1), kick: make(chan struct{}, 1),
		questions: newQuestions(), spools: map[string]*spool{},
	}
	a.instances = &instances{dir: a.path("instances"), maxBytes: cfg.InstanceBytes, log: log, logs: map[string]*instance{}}
	a.blobs = &blobs{dir: a.path("blobs"), maxBytes: cfg.BlobBytes, ask: a.ask, active: map[string]*download{}}
	a.uploads = &uploads{dir: a.path("put"), ask: a.ask}
	return a
}

// New prepares an agent: it reads the spool, which may take a while.
func New(cfg Config, log *slog.Logger) (*Agent, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(cfg.CA)
	if err != nil {
		return nil, fmt.Errorf("reading the broker's CA: %w", err)
	}
	a := assemble(cfg, log)
	if !a.pool.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("%s holds no PEM certificate", cfg.CA)
	}
	if err := os.MkdirAll(filepath.Join(cfg.State, "spool"), 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	if err := a.openSpools(); err != nil {
		return nil, err
	}
	if err := errors.Join(a.instances.open(), a.blobs.open(), a.uploads.reset()); err != nil {
		return nil, err
	}
	return a, nil
}

func (a *Agent) openSpools() error {
	entries, err := os.ReadDir(filepath.Join(a.cfg.State, "spool"))
	if err != nil {
		return fmt.Errorf("reading the spool: %w", err)
	}
	for _, e := range entries {
		if !e.IsDir() { // tails
			continue
		}
		if _, err := a.spool(e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// spool returns a stream's spool, making it if need be.
func (a *Agent) spool(stream string) (*spool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s, ok := a.spools[stream]; ok {
		return s, nil
	}
	if filepath.Base(stream) != stream || stream == "." || stream == ".." || stream == "/" || len(a.spools) >= 256 {
		return nil, fmt.Errorf("no spool for a stream named %q", stream)
	}
	s, err := openSpool(filepath.Join(a.cfg.State, "spool", stream), stream, a.cfg.SpoolBytes)
	if err != nil {
		return nil, fmt.Errorf("spool of %s: %w", stream, err)
	}
	if n := s.log.Recovered(); n > 0 { // unless the disk decayed, nobody was promised it
		a.log.Warn("the end of a spool was torn and cut off", "stream", stream, "bytes", n)
	}
	a.spools[stream] = s
	if a.link != nil {
		a.link.upload(s)
	}
	return s, nil
}

// Run works until ctx ends.
func (a *Agent) Run(ctx context.Context) error {
	defer a.close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.runKeep(ctx) })
	g.Go(func() error { return a.runCloud(ctx) })
	g.Go(func() error { return a.runStatus(ctx) })
	err := g.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (a *Agent) close() {
	a.keep.Close()
	for _, s := range a.spools {
		if err := s.log.Close(); err != nil {
			a.log.Error("closing a spool", "stream", s.stream, "err", err)
		}
	}
	a.instances.closeAll()
}

// runKeep starts the keep, again whenever it was restarted or a connection to it
// failed, moves chunks from it to the spool, and does its jobs.
func (a *Agent) runKeep(ctx context.Context) error {
	wait := backoff{min: 100 * time.Millisecond, max: 5 * time.Second}
	for ctx.Err() == nil {
		err := a.startKeep(ctx)
		if err == nil {
			wait.reset()
			g, gctx := errgroup.WithContext(ctx)
			g.Go(func() error { return a.takeChunks(gctx) })
			g.Go(func() error { return a.runWork(gctx) })
			g.Go(func() error {
				select {
				case <-a.again:
					return errors.New("it has to be started again: a step was cut short")
				case <-gctx.Done():
					return gctx.Err()
				}
			})
			err = g.Wait()
		}
		a.setReady(false)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, errSpool) {
			return err // the disk failed: going on could lose what was promised
		}
		a.note(func(s *Status) { s.Reason = err.Error() })
		a.log.Warn("the keep is not to be had; trying again", "err", err)
		wait.sleep(ctx)
	}
	return ctx.Err()
}

func (a *Agent) setReady(ready bool) {
	a.mu.Lock()
	a.ready = ready
	a.mu.Unlock()
	if ready {
		a.pullSoon()
	}
}

func (a *Agent) isReady() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ready
}

func (a *Agent) path(name string) string { return filepath.Join(a.cfg.State, name) }

func (a *Agent) startKeep(ctx context.Context) error {
	state, err := os.ReadFile(a.path("state.cbor"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reading the keep's state: %w", err)
	}
	start := tee.Start{State: state}
	a.mu.Lock()
	for _, s := range a.spools {
		cp, w := s.tail()
		if cp != nil {
			start.Checkpoints = append(start.Checkpoints, cp)
		}
		if w != nil {
			start.Watermarks = append(start.Watermarks, w)
		}
	}
	a.mu.Unlock()
	if err := a.start(ctx, start); err != nil {
		return err
	}
	a.note(func(s *Status) { s.Reason = "" })
	a.setReady(true)
	return nil
}

// setAside moves the spool of an earlier identity away: nobody can vouch for the
// keys that signed it any more, so the cloud would refuse it for ever, and what
// comes after it would wait. So too the logs of its instances, which nobody can
// open. They are not deleted: that is for a person to do.
func (a *Agent) setAside(ctx context.Context) error {
	a.mu.Lock()
	if a.link != nil {
		a.link.cancel()
	}
	a.mu.Unlock()
	for a.linked() {
		if !sleep(ctx, 10*time.Millisecond) {
			return ctx.Err()
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	suffix := fmt.Sprintf(".%d", time.Now().Unix())
	if err := a.instances.setAside(suffix); err != nil {
		return fmt.Errorf("%w: %w", errSpool, err)
	}
	if len(a.spools) == 0 {
		return nil
	}
	chunks := 0
	for _, s := range a.spools {
		n, _ := s.depth()
		chunks += n
		if err := s.log.Close(); err != nil {
			return fmt.Errorf("%w: closing the spool: %w", errSpool, err)
		}
	}
	old := a.path("spool" + suffix)
	if err := os.Rename(a.path("spool"), old); err != nil {
		return fmt.Errorf("%w: setting the spool aside: %w", errSpool, err)
	}
	if err := os.Mkdir(a.path("spool"), 0o700); err != nil {
		return fmt.Errorf("%w: making a new spool: %w", errSpool, err)
	}
	a.spools = map[string]*spool{}
	a.log.Warn("the keep has a new identity: the spool of the old one was set aside", "chunks", chunks, "dir", old)
	return nil
}

func (a *Agent) linked() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.link != nil
}

func encodePEM(chain [][]byte) []byte {
	var out []byte
	for _, der := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// pullSoon makes the cloud loop ask now rather than at its next tick.
func (a *Agent) pullSoon() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// errSpool marks a failed disk: the agent stops rather than go on without one.
var errSpool = errors.New("the disk failed")

// takeChunks moves chunks until the keep goes away.
func (a *Agent) takeChunks(ctx context.Context) error {
	socket := &tee.Socket{Path: a.cfg.KeepSocket}
	defer socket.Close()
	var done uint64
	for {
		r, err := tee.Take{After: done, Confirm: done, Wait: 10_000}.Do(ctx, socket)
		if err != nil {
			return err
		}
		if len(r.Chunks) == 0 {
			continue
		}
		if err := a.append(ctx, r.Chunks); err != nil {
			return err
		}
		done = r.Chunks[len(r.Chunks)-1].Ticket
	}
}

// append makes chunks durable. A full spool waits until the cloud has taken
// something: the keep then stops reading from its drivers, and they wait too.
func (a *Agent) append(ctx context.Context, chunks []tee.Chunk) error {
	streams := map[*spool][]tee.Chunk{}
	for _, c := range chunks {
		s, err := a.spool(c.Stream)
		if err != nil {
			return fmt.Errorf("%w: %w", errSpool, err)
		}
		streams[s] = append(streams[s], c)
	}
	g, ctx := errgroup.WithContext(ctx)
	for s, cs := range streams {
		g.Go(func() error {
			for warned := false; ; warned = true {
				err := s.append(ctx, cs)
				if !errors.Is(err, durable.ErrFull) {
					if err != nil && ctx.Err() == nil {
						err = fmt.Errorf("%w: %w", errSpool, err)
					}
					return err
				}
				if !warned {
					a.log.Warn("the spool is full; the source waits", "stream", s.stream)
				}
				if !sleep(ctx, time.Second) {
					return ctx.Err()
				}
			}
		})
	}
	return g.Wait()
}

// backoff waits longer each time, up to a bound.
type backoff struct {
	min, max, next time.Duration
}

func (b *backoff) reset() { b.next = 0 }

func (b *backoff) sleep(ctx context.Context) {
	b.next = min(max(b.next*2, b.min), b.max)
	sleep(ctx, b.next)
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

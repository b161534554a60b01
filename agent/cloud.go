package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee"
)

// runCloud keeps a connection to the cloud: with the gateway's certificate when
// there is one that works, else over the boot topics until one was issued.
func (a *Agent) runCloud(ctx context.Context) error {
	wait := backoff{min: 500 * time.Millisecond, max: 10 * time.Second}
	refused := 0
	for ctx.Err() == nil {
		if !a.isReady() {
			sleep(ctx, 100*time.Millisecond)
			continue
		}
		st, err := tee.Status{}.Do(ctx, a.keep)
		if err != nil {
			wait.sleep(ctx)
			continue
		}
		began := time.Now()
		cert, certErr := a.clientCertificate(st)
		if st.Phase == tee.PhaseEnrolled && certErr == nil && refused < 3 {
			err = a.session(ctx, st, cert)
			refused++
			if time.Since(began) > 10*time.Second {
				refused = 0
			}
		} else {
			if certErr != nil && st.Phase == tee.PhaseEnrolled {
				a.log.Info("asking for a client certificate", "reason", certErr)
			}
			err = a.boot(ctx, st)
			refused = 0
		}
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, errSpool) {
			return err
		}
		if err == nil {
			wait.reset()
			continue
		}
		a.note(func(s *Status) { s.Connected, s.Reason = false, err.Error() })
		a.log.Warn("no cloud; trying again", "err", err)
		if time.Since(began) > 10*time.Second {
			wait.reset()
		}
		a.waitOrKick(ctx, &wait)
	}
	return ctx.Err()
}

// waitOrKick waits before the next try; a box that waits for approval is woken
// by the cloud's hint.
func (a *Agent) waitOrKick(ctx context.Context, b *backoff) {
	b.next = min(max(b.next*2, b.min), b.max)
	t := time.NewTimer(b.next)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (a *Agent) tlsConfig() *tls.Config {
	return &tls.Config{RootCAs: a.pool, MinVersion: tls.VersionTLS13}
}

// clientCertificate returns the certificate whose key the keep holds.
func (a *Agent) clientCertificate(st tee.StatusReply) (tls.Certificate, error) {
	raw, err := os.ReadFile(a.path("client.pem"))
	if err != nil {
		return tls.Certificate{}, err
	}
	c := tls.Certificate{Certificate: decodePEM(raw)}
	if len(c.Certificate) == 0 {
		return c, errors.New("the client certificate file holds no certificate")
	}
	if c.Leaf, err = x509.ParseCertificate(c.Certificate[0]); err != nil {
		return c, fmt.Errorf("the client certificate: %w", err)
	}
	pub, err := cose.UnmarshalKey(st.TLSKey)
	if err != nil {
		return c, fmt.Errorf("the keep's TLS key: %w", err)
	}
	if !pub.Equal(c.Leaf.PublicKey) {
		return c, errors.New("the client certificate is for another key than the keep's")
	}
	if time.Now().After(c.Leaf.NotAfter) {
		return c, errors.New("the client certificate has expired")
	}
	c.PrivateKey = keepSigner{keep: a.keep, pub: pub}
	c.SupportedSignatureAlgorithms = []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}
	return c, nil
}

// keepSigner is the TLS client key. The keep sees the text that it signs.
type keepSigner struct {
	keep tee.Transport
	pub  *ecdsa.PublicKey
}

func (k keepSigner) Public() crypto.PublicKey { return k.pub }

func (k keepSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the keep signs texts, not digests")
}

// SignMessage implements crypto.MessageSigner.
func (k keepSigner) SignMessage(_ io.Reader, text []byte, _ crypto.SignerOpts) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := tee.SignTLS{Text: text}.Do(ctx, k.keep)
	return s.DER, err
}

// link is a live connection of an enrolled gateway.
type link struct {
	a      *Agent
	cancel context.CancelFunc
	ctx    context.Context //nolint:containedctx // of the connection: what it started ends with it
	conn   conn
	group  *errgroup.Group
	topic  mqtt.Topic
	acks   map[*spool]chan struct{}
	items  chan []byte
	marks  chan []byte
	peer   chan []byte

	ahead   sync.Mutex // protects unacked, and the order of messages to other gateways
	unacked int        // messages to other gateways since the broker acknowledged one
}

// session is one connection: upload, pull, deliver.
func (a *Agent) session(ctx context.Context, st tee.StatusReply, cert tls.Certificate) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cfg := a.tlsConfig()
	cfg.Certificates = []tls.Certificate{cert}
	base := mqtt.Topic{Tenant: st.Tenant, Gateway: st.Gateway}
	l := &link{
		a: a, cancel: cancel, topic: base, acks: map[*spool]chan struct{}{},
		items: make(chan []byte, 16), marks: make(chan []byte, 256), peer: make(chan []byte, peerRoom),
	}
	conn, err := mqtt.Dial(ctx, mqtt.Options{
		URL: a.cfg.Broker, TLS: cfg, ClientID: mqtt.ClientID(st.Tenant, st.Gateway), Username: mqtt.CommonName(st.Tenant, st.Gateway),
		Subscribe: []string{mqtt.Topic{Tenant: st.Tenant, Gateway: st.Gateway, Kind: "+"}.String()},
		Receive:   l.receive,
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	l.conn = conn
	a.log.Info("connected", "broker", a.cfg.Broker, "gateway", mqtt.CommonName(st.Tenant, st.Gateway))
	a.note(func(s *Status) { s.Connected, s.Reason = true, "" })
	l.group, l.ctx = errgroup.WithContext(ctx)
	l.group.Go(func() error {
		select {
		case <-conn.Lost():
			return errors.New("the connection was lost")
		case <-l.ctx.Done():
			return l.ctx.Err()
		}
	})
	l.group.Go(l.pulls)
	l.group.Go(l.watermarks)
	l.group.Go(l.peers)
	a.mu.Lock()
	a.setLink(l)
	for _, s := range a.spools {
		l.upload(s)
	}
	a.mu.Unlock()
	err = l.group.Wait()
	a.mu.Lock()
	a.setLink(nil)
	a.mu.Unlock()
	return err
}

// receive sorts what comes down. What finds no room is dropped: it is asked for
// again.
func (l *link) receive(m mqtt.Message) {
	t, err := mqtt.ParseTopic(m.Topic)
	if err != nil || t.Up {
		return
	}
	switch t.Kind {
	case "item":
		offer(l.items, m.Payload)
	case "ack":
		offer(l.marks, m.Payload)
	case "answer":
		l.a.questions.answered(m.Payload)
	case kindPeer:
		l.offerPeer(m.Payload)
	case "notify":
		l.a.pullSoon()
	}
}

func offer(c chan []byte, b []byte) {
	select {
	case c <- b:
	default:
	}
}

func (l *link) publish(m tee.Message) error {
	t := l.topic
	t.Up, t.Kind = true, m.Kind
	if m.Kind == kindPeer {
		return l.publishPeer(t.String(), m.Data)
	}
	return l.conn.Publish(t.String(), m.Data)
}

// pulls asks the cloud what is next: on a timer, at its hint, and after anything
// that may have changed.
func (l *link) pulls() error {
	const quick = 200 * time.Millisecond // between two questions, however often we are hinted at
	for {
		if err := l.pullOnce(); err != nil {
			return err
		}
		st, err := tee.Status{}.Do(l.ctx, l.a.keep)
		if err != nil {
			return err
		}
		if st.Phase != tee.PhaseEnrolled {
			return fmt.Errorf("the keep is %s: %s", st.Phase, st.Reason)
		}
		sleep(l.ctx, quick)
		timer := time.NewTimer(time.Duration(max(st.Interval, 1)) * time.Second)
		select {
		case <-timer.C:
		case <-l.a.kick:
		case <-l.ctx.Done():
		}
		timer.Stop()
		if l.ctx.Err() != nil {
			return l.ctx.Err()
		}
	}
}

// pullOnce asks and delivers what comes. No answer in ten seconds is no error:
// the next question is.
func (l *link) pullOnce() error {
	m, err := tee.Pull{}.Do(l.ctx, l.a.keep)
	if err != nil {
		return err
	}
	if err := l.publish(m); err != nil {
		return err
	}
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return l.ctx.Err()
		case <-timer.C:
			return nil
		case item := <-l.items:
			out, err := l.a.deliver(l.ctx, item)
			var refusal *tee.Refusal
			if errors.As(err, &refusal) { // not the answer, or not from the cloud: go on waiting
				l.a.log.Warn("a delivery was refused", "reason", refusal.Reason)
				l.a.count(func(s *Status) { s.RefusedItems++ })
				continue
			}
			if err != nil {
				return err
			}
			for _, m := range out.Publish {
				if err := l.publish(m); err != nil {
					return err
				}
			}
			return nil
		}
	}
}

func (a *Agent) deliver(ctx context.Context, item []byte) (tee.Outcome, error) {
	return a.exchange(ctx, func(ctx context.Context) (tee.Outcome, error) { return tee.Deliver{Item: item}.Do(ctx, a.keep) })
}

// watermarks has the keep verify each watermark and trims what it covers.
func (l *link) watermarks() error {
	for {
		select {
		case <-l.ctx.Done():
			return l.ctx.Err()
		case msg := <-l.marks:
			w, err := tee.CheckWatermark{Message: msg}.Do(l.ctx, l.a.keep)
			var refusal *tee.Refusal
			if errors.As(err, &refusal) {
				l.a.log.Warn("a watermark was refused", "reason", refusal.Reason)
				l.a.count(func(s *Status) { s.RefusedWatermarks++ })
				continue
			}
			if err != nil {
				return err
			}
			if err := l.trim(w, msg); err != nil {
				return err
			}
		}
	}
}

func (l *link) trim(w tee.Watermark, msg []byte) error {
	l.a.mu.Lock()
	s, ok := l.a.spools[w.Stream]
	acked := l.acks[s]
	l.a.mu.Unlock()
	if !ok {
		return nil
	}
	_, err := s.trim(w, msg)
	if errors.Is(err, errSpool) {
		return err
	}
	if err != nil {
		l.a.log.Error("a watermark does not fit", "err", err)
		return nil
	}
	l.a.count(func(st *Status) { st.Watermarks[w.Stream] = Mark{Epoch: hex.EncodeToString(w.Epoch), Seq: w.Seq} })
	select {
	case acked <- struct{}{}:
	default:
	}
	return nil
}

// upload starts sending a spool on this connection. The caller holds a.mu.
func (l *link) upload(s *spool) {
	acked := make(chan struct{}, 1)
	l.acks[s] = acked
	l.group.Go(func() error { return l.send(s, acked) })
}

const (
	window     = 64 // chunks sent ahead of the watermark
	resendMin  = 3 * time.Second
	resendMax  = time.Minute
	readAtOnce = 16
)

// send publishes a spool in order, at most window chunks ahead of the watermark.
// When the watermark stands still it starts again behind it: only the cloud's
// signed word counts, not a broker's acknowledgement.
func (l *link) send(s *spool, acked <-chan struct{}) error {
	resend := resendMin
	next := s.log.First()
	lastFirst := next
	deadline := time.Now().Add(resend)
	if err := l.sayOldest(s); err != nil {
		return err
	}
	for l.ctx.Err() == nil {
		first := s.first()
		if first != lastFirst { // progress
			lastFirst, resend = first, resendMin
			deadline = time.Now().Add(resend)
		} else if next > first && time.Now().After(deadline) {
			next = first
			resend = min(resend*2, resendMax)
			deadline = time.Now().Add(resend)
			l.a.count(func(st *Status) { st.Resends++ })
			if err := l.sayOldest(s); err != nil {
				return err
			}
		}
		next = max(next, first)
		if next == first { // nothing under way yet: the clock starts with the first chunk
			deadline = time.Now().Add(resend)
		}
		sent, err := l.sendSome(s, &next, first)
		if err != nil {
			return err
		}
		if sent {
			continue
		}
		l.awaitWork(s, next, first, acked, deadline)
	}
	return l.ctx.Err()
}

// sayOldest tells the cloud, in the keep's name, that nothing older will come.
func (l *link) sayOldest(s *spool) error {
	p, ok := s.oldest()
	if !ok {
		return nil
	}
	m, err := tee.Oldest{Stream: s.stream, Epoch: p.epoch, Seq: p.seq, Head: p.head}.Do(l.ctx, l.a.keep)
	if err != nil {
		return err
	}
	return l.publish(m)
}

// sendSome publishes a few chunks from next on, if the window allows.
func (l *link) sendSome(s *spool, next *uint64, first uint64) (bool, error) {
	room := int(first) + window - int(*next)
	if room <= 0 || *next >= s.log.Next() {
		return false, nil
	}
	entries, err := s.log.Read(*next, min(room, readAtOnce), 1<<20)
	if err != nil {
		return false, fmt.Errorf("%w: reading the spool: %w", errSpool, err)
	}
	for _, e := range entries {
		var c tee.Chunk
		if err := cose.Unmarshal(e.Data, &c); err != nil {
			return false, fmt.Errorf("%w: spool entry %d: %w", errSpool, e.Index, err)
		}
		t := l.topic
		t.Up, t.Kind = true, "sealed"
		if err := l.conn.Flush(l.ctx, t.String(), c.Data); err != nil {
			return false, err
		}
		*next = e.Index + 1
	}
	return len(entries) > 0, nil
}

// awaitWork waits for a new chunk, a watermark, or the time to send again.
func (l *link) awaitWork(s *spool, next, first uint64, acked <-chan struct{}, deadline time.Time) {
	ctx, cancel := context.WithCancel(l.ctx)
	defer cancel()
	var timer <-chan time.Time
	if next > first {
		t := time.NewTimer(max(time.Until(deadline), 10*time.Millisecond))
		defer t.Stop()
		timer = t.C
	}
	arrived := make(chan struct{})
	if int(next-first) < window {
		go func() { // ends with ctx
			if s.log.Wait(ctx, next-1) == nil {
				close(arrived)
			}
		}()
	}
	select {
	case <-arrived:
	case <-acked:
	case <-timer:
	case <-ctx.Done():
	}
}

// boot is one round of enrolment, or of attestation without a certificate.
func (a *Agent) boot(ctx context.Context, st tee.StatusReply) error {
	hash := hex.EncodeToString(st.EKHash)
	base := mqtt.Topic{Tenant: mqtt.Boot, Gateway: hash}
	items, hints := make(chan []byte, 16), make(chan struct{}, 1)
	id := make([]byte, 8)
	rand.Read(id) // never fails
	conn, err := mqtt.Dial(ctx, mqtt.Options{
		URL: a.cfg.BootBroker, TLS: a.tlsConfig(), ClientID: "boot_" + hex.EncodeToString(id), Username: hash,
		Subscribe: []string{mqtt.Topic{Tenant: mqtt.Boot, Gateway: hash, Kind: "+"}.String()},
		Receive: func(m mqtt.Message) {
			switch t, err := mqtt.ParseTopic(m.Topic); {
			case err != nil:
			case t.Kind == "item":
				offer(items, m.Payload)
			case t.Kind == "notify":
				select {
				case hints <- struct{}{}:
				default:
				}
			}
		},
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	m, err := tee.Enrol{}.Do(ctx, a.keep)
	if err != nil {
		return err
	}
	publish := func(m tee.Message) error {
		t := base
		t.Up, t.Kind = true, m.Kind
		return conn.Publish(t.String(), m.Data)
	}
	if err := publish(m); err != nil {
		return err
	}
	timer := time.NewTimer(30 * time.Second)
	defer timer.Stop()
	var last error
	for range 32 { // deliveries that are not ours to have end with the round
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-conn.Lost():
			return errors.New("the connection was lost during enrolment")
		case <-timer.C:
			if last == nil {
				last = errors.New("the cloud did not answer the enrolment in 30 s")
			}
			return last
		case <-hints: // approved just now: ask again
			return nil
		case item := <-items:
			out, err := a.deliver(ctx, item)
			var refusal *tee.Refusal
			if errors.As(err, &refusal) {
				last = err
				a.note(func(s *Status) { s.Reason = refusal.Reason })
				a.log.Warn("enrolment", "reason", refusal.Reason, "ek-hash", hash)
				continue
			}
			if err != nil {
				return err
			}
			if len(out.Certificate) > 0 {
				a.log.Info("certificate issued")
				return nil
			}
			if len(out.Publish) == 0 && len(out.Verdict) > 0 {
				return errors.New("the verdict is not affirming, so no certificate was issued: `edgekeep attest` shows what failed")
			}
			for _, m := range out.Publish {
				if err := publish(m); err != nil {
					return err
				}
			}
		}
	}
	return last
}

// Package keep is the trusted core of a gateway: the only process that sees
// readings in the clear, and the only one that holds keys. It takes readings
// from drivers on one socket and requests from the agent on another (package
// tee), and gives out nothing but sealed or signed bytes.
//
// A keep is a state machine over a root of trust. Its state enters once, with
// Start; every irreversible step (enrolment, an accepted command, a new epoch)
// goes through one transition: write a fresh random G into the free one of two
// NV slots in the TPM, seal the new state under HKDF(storage root, G), let the
// agent make it durable, overwrite the old G, and only then act. An old state is
// worthless from then on, whoever kept a copy.
package keep

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/tee/tpm"
	"edgekeep/workload"
)

// Config is a keep's configuration. There are no defaults: see Validate.
type Config struct {
	TPM         string // device or socket
	PCRs        []int  // what the storage root and the keys are bound to
	RootsDigest []byte // SHA-256 of the tenant's trust roots
	Sources     []SourceConfig
	Flush       time.Duration // longest time a reading waits to be sealed
	Compress    bool
	Reset       bool // give up an identity whose state is lost
	Software    string
	RunnerUID   uint32          // the user of the runners, or NoRunners
	Hardening   map[string]bool // what the process found of its own hardening
}

// NoRunners as RunnerUID means that this keep runs no workloads.
const NoRunners = ^uint32(0)

// SourceConfig is one source of readings. Its stream has its name.
type SourceConfig struct {
	Name      string
	UID       uint32        // the driver's user
	Freshness time.Duration // a source silent for longer is reported late
	Rate      int           // lines per second it may send; more has to wait
}

// Validate says what is missing.
func (c Config) Validate() error {
	switch {
	case c.TPM == "":
		return errors.New("tpm is missing: the path of the TPM, like /dev/tpmrm0")
	case len(c.PCRs) == 0:
		return errors.New("pcrs is missing: which PCRs the keys are bound to")
	case len(c.RootsDigest) != sha256.Size:
		return errors.New("roots is missing: the SHA-256 of your tenant's trust roots, as `edgekeep-cloud init` printed it")
	case len(c.Sources) == 0 || len(c.Sources) > 64:
		return errors.New("sources: between 1 and 64 are needed")
	case c.Flush < time.Millisecond || c.Flush > time.Second:
		return errors.New("flush must be between 1ms and 1s")
	}
	names, uids := map[string]bool{}, map[uint32]bool{}
	for _, s := range c.Sources {
		switch {
		case !attest.ValidName(s.Name):
			return fmt.Errorf("source %q: a name is 1 to 31 letters, digits and hyphens", s.Name)
		case names[s.Name] || uids[s.UID]:
			return fmt.Errorf("source %q: its name or user %d is another source's too", s.Name, s.UID)
		case s.Freshness <= 0 || s.Rate <= 0:
			return fmt.Errorf("source %q: freshness and rate must be positive", s.Name)
		}
		names[s.Name], uids[s.UID] = true, true
	}
	return nil
}

// Keep is a running keep.
type Keep struct {
	cfg Config
	log *slog.Logger

	mu       sync.Mutex // protects what follows; held during TPM commands
	dev      *tpm.Device
	ek       tpm.EK
	ekHash   []byte
	phase    string
	reason   string
	epochKey *ecdsa.PrivateKey
	ident    identity
	st       state
	pending  *transition
	roots    attest.Trusted
	nonces   map[string]asked
	tails    map[string]end // where data of earlier epochs ends that is still under way

	told       int64     // the fleet's clock, Unix seconds
	toldAt     time.Time // when it was told
	verdict    attest.Verdict
	verdictMsg []byte // the newest verdict about this keep
	moves      map[string]*move
	ledger     map[string]heard
	repeated   map[string]time.Time // when something about an instance was sent last
	said       map[string][]byte    // head that the source was told of last
	checked    map[string]time.Time // when the ledger was asked about an instance last
	refusals   map[string]int       // of claims in a row
	gaveUp     map[string]string    // why an instance's last move from here came to nothing
	answered   []answeredChallenge

	gateway   atomic.Value // its name, string, once it is enrolled
	workloads *workloads

	sealer *sealer
}

// asked is a nonce that waits for its answer.
type asked struct {
	at    time.Time
	enrol []byte // nonce of the enrol message that this one follows
}

const (
	maxNonces = 16
	nonceLife = 2 * time.Minute
)

// New opens the TPM. The keep then waits for Start.
func New(cfg Config, log *slog.Logger) (*Keep, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	dev, err := tpm.Open(cfg.TPM)
	if err != nil {
		return nil, err
	}
	k, err := newKeep(cfg, log, dev)
	if err != nil {
		dev.Close()
	}
	return k, err
}

func newKeep(cfg Config, log *slog.Logger, dev *tpm.Device) (*Keep, error) {
	values, err := dev.PCRs(cfg.PCRs)
	if err != nil {
		return nil, err
	}
	if err := tpm.CheckPCRs(values); err != nil {
		return nil, err
	}
	ek, err := dev.EK()
	if err != nil {
		return nil, err
	}
	hash, err := tpm.EKHash(ek.Public)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the epoch key: %w", err)
	}
	k := &Keep{
		cfg: cfg, log: log, dev: dev, ek: ek, ekHash: hash, phase: tee.PhaseWaiting,
		epochKey: key, nonces: map[string]asked{}, tails: map[string]end{},
		moves: map[string]*move{}, ledger: map[string]heard{}, refusals: map[string]int{}, checked: map[string]time.Time{}, gaveUp: map[string]string{}, said: map[string][]byte{}, repeated: map[string]time.Time{},
	}
	k.sealer = newSealer(cfg, key)
	k.workloads = newWorkloads(k)
	k.sealer.fed = k.workloads.feed
	return k, nil
}

// Close releases the TPM.
func (k *Keep) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ident.ak != nil {
		k.ident.ak.Close()
	}
	return k.dev.Close()
}

// Handle implements tee.Handler.
func (k *Keep) Handle(ctx context.Context, kind int, body []byte) (any, error) {
	switch kind {
	case tee.KindStart:
		return handle(k, body, k.start)
	case tee.KindStatus:
		return handle(k, body, k.status)
	case tee.KindEnrol:
		return handle(k, body, k.enrol)
	case tee.KindPull:
		return handle(k, body, k.pull)
	case tee.KindDeliver:
		return handle(k, body, k.deliver)
	case tee.KindCommit:
		return handle(k, body, k.commit)
	case tee.KindCheckWatermark:
		return handle(k, body, k.checkWatermark)
	case tee.KindSignTLS:
		return handle(k, body, k.signTLS)
	case tee.KindOldest:
		return handle(k, body, k.oldest)
	case tee.KindAdvance:
		return handle(k, body, k.advanceStep)
	case tee.KindPeer:
		return k.routed(body)
	case tee.KindWork: // waits
		r, err := tee.Body[tee.Work](body)
		if err != nil {
			return nil, err
		}
		return k.workloads.work(ctx, r)
	case tee.KindTake: // waits, and touches only the sealer: without the lock
		r, err := tee.Body[tee.Take](body)
		if err != nil {
			return nil, err
		}
		return k.sealer.take(ctx, r)
	}
	return nil, tee.ErrKind
}

// routed takes what another gateway sent. Frames, the bulk of a move, do not wait
// for the TPM.
func (k *Keep) routed(body []byte) (any, error) {
	r, err := tee.Body[tee.Peer](body)
	if err != nil {
		return nil, err
	}
	if e, err := workload.Unwrap(r.Data); err == nil && (e.Kind == workload.KindFrame || e.Kind == workload.KindFrameAck) {
		return tee.Outcome{}, k.workloads.frame(e)
	}
	return handle(k, body, k.peer)
}

// handle decodes a request and runs f under the keep's lock.
func handle[Req, Reply any](k *Keep, body []byte, f func(Req) (Reply, error)) (any, error) {
	r, err := tee.Body[Req](body)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return f(r)
}

func (k *Keep) subject() string {
	if k.st.Tenant == "" {
		return ""
	}
	return k.st.Tenant + "/" + k.st.Gateway
}

func (k *Keep) status(tee.Status) (tee.StatusReply, error) {
	r := tee.StatusReply{
		Phase: k.phase, Reason: k.reason, EKHash: k.ekHash,
		Tenant: k.st.Tenant, Gateway: k.st.Gateway, Command: k.st.Command, Interval: k.st.Interval,
	}
	r.Sources, r.TurnedAway = k.sealer.stats()
	if k.phase == tee.PhaseEnrolled {
		r.Epoch = k.st.Epoch.String()
		r.TLSKey = k.st.keys[attest.PurposeTLS]
	}
	return r, nil
}

// newNonce makes a nonce that one delivery may answer. A nonce that nobody
// answered makes room after two minutes, or as the oldest of sixteen.
func (k *Keep) newNonce(enrol []byte) []byte {
	now := time.Now()
	oldest := ""
	for n, a := range k.nonces {
		if now.Sub(a.at) > nonceLife {
			delete(k.nonces, n)
		} else if oldest == "" || a.at.Before(k.nonces[oldest].at) {
			oldest = n
		}
	}
	if len(k.nonces) >= maxNonces {
		delete(k.nonces, oldest)
	}
	nonce := random(message.NonceSize)
	k.nonces[string(nonce)] = asked{at: now, enrol: enrol}
	return nonce
}

// useNonce takes a nonce out: a delivery is accepted once.
func (k *Keep) useNonce(nonce []byte) (asked, error) {
	a, ok := k.nonces[string(nonce)]
	if !ok || time.Since(a.at) > nonceLife {
		return a, errors.New("the delivery answers no question of this keep, or one that it answered before")
	}
	delete(k.nonces, string(nonce))
	return a, nil
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails (crypto/rand)
	return b
}

func (k *Keep) pull(tee.Pull) (tee.Message, error) {
	if k.phase != tee.PhaseEnrolled {
		return tee.Message{}, fmt.Errorf("the keep is %s: %s", k.phase, k.reason)
	}
	return tee.Message{Kind: "pull", Data: message.Encode(message.Pull{Nonce: k.newNonce(nil)})}, nil
}

func (k *Keep) enrol(tee.Enrol) (tee.Message, error) {
	if k.ident.ak == nil {
		return tee.Message{}, fmt.Errorf("the keep is %s: it needs Start first", k.phase)
	}
	nonce := k.newNonce(nil)
	a := k.nonces[string(nonce)]
	a.enrol = nonce
	k.nonces[string(nonce)] = a
	return tee.Message{Kind: "enrol", Data: message.Encode(message.Enrol{
		EK: k.ek.Public, EKCert: k.ek.Cert, AK: k.ident.ak.Public(), Nonce: nonce,
	})}, nil
}

// oldest signs the agent's word of what is left in its spool. The agent can lose
// data anyway; signed, nobody between here and the cloud can say so for it.
func (k *Keep) oldest(r tee.Oldest) (tee.Message, error) {
	if k.phase != tee.PhaseEnrolled {
		return tee.Message{}, fmt.Errorf("the keep is %s", k.phase)
	}
	if len(r.Epoch) != len(sealing.Epoch{}) || len(r.Head) != sha256.Size || !attest.ValidName(r.Stream) { // a stream of a workload that left is none of ours any more
		return tee.Message{}, errors.New("not a place in a stream of this keep")
	}
	msg, err := sealing.Checkpoint{
		Subject: k.subject(), Stream: r.Stream, Epoch: sealing.Epoch(r.Epoch), Seq: r.Seq, Head: r.Head,
	}.Sign(k.epochKey, sealing.TypOldest)
	return tee.Message{Kind: "hello", Data: msg}, err
}

// ReadyToSeal reports whether readings may be taken, and when not, why.
func (k *Keep) ReadyToSeal() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.phase != tee.PhaseEnrolled {
		return fmt.Errorf("the keep is %s: %s", k.phase, k.reason)
	}
	return nil
}

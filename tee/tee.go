// Package tee is the contract between the keep and the processes around it: one
// struct for each request, a typed reply, over a transport of one method.
//
// On the wire (a Unix stream socket) a request is a 4-byte big-endian length and
// deterministic CBOR [kind, request]; its answer a length and [error, reply],
// where error is empty or says why there is no reply. One request at a time on a
// connection; a frame is at most MaxFrame bytes.
//
// # How state is kept
//
// The keep writes no files. Its state is an opaque sealed blob that the agent
// stores. It enters the keep once, with Start. An irreversible step answers with
// Outcome.Commit, a new state: the agent writes it durably and sends Commit with
// its SHA-256; only then does the keep make the old state worthless, act, and
// answer with what is to be sent. A keep that waits for a Commit refuses other
// irreversible steps.
package tee

import (
	"context"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
)

// MaxFrame bounds a request and an answer, in bytes.
const MaxFrame = 1 << 20

// Transport carries one request to the keep and its answer back.
type Transport interface {
	Call(ctx context.Context, request []byte) (answer []byte, err error)
}

// Start hands the keep its state (empty on a new gateway) and, for each stream,
// the newest checkpoint that was in the spool and the newest watermark. To a keep that runs already it means that
// the agent was restarted: the state must be the one the keep runs with, or the
// one whose Commit the keep waits for.
type Start struct {
	State       []byte   `cbor:"1,keyasint"`
	Checkpoints [][]byte `cbor:"2,keyasint"`
	Watermarks  [][]byte `cbor:"3,keyasint"`
}

// Status asks how the keep is.
type Status struct{}

// Phases of a keep.
const (
	PhaseWaiting  = "waiting"  // for Start
	PhaseLocked   = "locked"   // PCRs changed: it can attest, and nothing else
	PhaseNew      = "new"      // not enrolled
	PhaseEnrolled = "enrolled" // enrolled
)

// StatusReply is the keep's condition, without secrets.
type StatusReply struct {
	Phase    string   `cbor:"1,keyasint"`
	Reason   string   `cbor:"2,keyasint"` // why it is locked or not ready
	EKHash   []byte   `cbor:"3,keyasint"`
	Tenant   string   `cbor:"4,keyasint"`
	Gateway  string   `cbor:"5,keyasint"`
	Epoch    string   `cbor:"6,keyasint"`
	Command  uint64   `cbor:"7,keyasint"` // newest accepted command
	TLSKey   []byte   `cbor:"8,keyasint"` // COSE_Key
	Interval int64    `cbor:"9,keyasint"` // seconds between pulls
	Sources  []Source `cbor:"10,keyasint"`
	// TurnedAway counts connections on the ingest socket that were refused: of users
	// who are no source, and of sources with too many.
	TurnedAway uint64 `cbor:"11,keyasint"`
}

// Source counts what one source sent.
type Source struct {
	Name      string `cbor:"1,keyasint"`
	Connected bool   `cbor:"2,keyasint"`
	Lines     uint64 `cbor:"3,keyasint"` // accepted
	Readings  uint64 `cbor:"4,keyasint"` // sealed
	Rejected  uint64 `cbor:"5,keyasint"` // malformed lines
	Repeated  uint64 `cbor:"6,keyasint"` // numbered lines the keep had already
	Missing   uint64 `cbor:"7,keyasint"` // numbers the driver skipped
	Late      bool   `cbor:"8,keyasint"`
	LastError string `cbor:"9,keyasint"` // why a line was rejected last, without its content
}

// Take asks for chunks to append to the spool, oldest first, after the one with
// ticket After, and confirms that all up to Confirm are durable. It waits up to
// Wait milliseconds when there are none.
type Take struct {
	After   uint64 `cbor:"1,keyasint"`
	Confirm uint64 `cbor:"2,keyasint"`
	Wait    int64  `cbor:"3,keyasint"`
}

// TakeReply holds sealed chunks.
type TakeReply struct {
	Chunks []Chunk `cbor:"1,keyasint"`
}

// Chunk is one chunk of sealed records and its ticket, with what the agent has
// to know of it, since it cannot read it. Tickets count from 1 at each start of
// the keep.
type Chunk struct {
	Ticket     uint64 `cbor:"1,keyasint"`
	Stream     string `cbor:"2,keyasint"`
	Epoch      []byte `cbor:"3,keyasint"`
	Seq        uint64 `cbor:"4,keyasint"` // of its last record
	Head       []byte `cbor:"5,keyasint"` // SHA-256 of its last record
	Checkpoint []byte `cbor:"6,keyasint"` // for Start
	Data       []byte `cbor:"7,keyasint"`
}

// Enrol asks for the message that starts enrolment, to be published on the boot
// topic "up/enrol".
type Enrol struct{}

// Pull asks for the message that asks the cloud for what is next.
type Pull struct{}

// Message is one message to publish. Kind is the last level of its topic.
type Message struct {
	Kind string `cbor:"1,keyasint"`
	Data []byte `cbor:"2,keyasint"`
}

// Deliver hands the keep what came down on "item".
type Deliver struct {
	Item []byte `cbor:"1,keyasint"`
}

// Commit says that the state with this SHA-256 is durable.
type Commit struct {
	State []byte `cbor:"1,keyasint"`
}

// Outcome answers Start, Deliver and Commit. If Commit is not empty it is a new
// state to be made durable, and nothing else is set but, for a new identity, Fresh.
type Outcome struct {
	Commit      []byte    `cbor:"1,keyasint"`
	Publish     []Message `cbor:"2,keyasint"`
	Certificate [][]byte  `cbor:"3,keyasint"` // TLS client chain, DER, when one came
	Verdict     []byte    `cbor:"4,keyasint"` // the newest verdict, when one came
	Pull        bool      `cbor:"5,keyasint"` // ask the cloud again at once
	Fresh       bool      `cbor:"6,keyasint"` // with Commit: a new identity; what is in the spool is of another
}

// CheckWatermark has the keep verify a watermark, so that the agent may trim.
type CheckWatermark struct {
	Message []byte `cbor:"1,keyasint"`
}

// Watermark is what a verified watermark says.
type Watermark struct {
	Stream string `cbor:"1,keyasint"`
	Epoch  []byte `cbor:"2,keyasint"`
	Seq    uint64 `cbor:"3,keyasint"`
	Head   []byte `cbor:"4,keyasint"`
}

// Oldest asks for a signed word that a chunk is the oldest in its stream's spool:
// what the cloud misses before it is lost, and not only late.
type Oldest struct {
	Stream string `cbor:"1,keyasint"`
	Epoch  []byte `cbor:"2,keyasint"`
	Seq    uint64 `cbor:"3,keyasint"` // of its last record
	Head   []byte `cbor:"4,keyasint"`
}

// SignTLS asks for the signature of a TLS 1.3 client's CertificateVerify. The
// keep sees the text and signs nothing else.
type SignTLS struct {
	Text []byte `cbor:"1,keyasint"`
}

// Signature is an ECDSA signature in ASN.1 DER.
type Signature struct {
	DER []byte `cbor:"1,keyasint"`
}

// Kinds of requests on the wire. Numbers are never reused.
const (
	KindStart = iota + 1
	KindStatus
	KindTake
	KindEnrol
	KindPull
	KindDeliver
	KindCommit
	KindCheckWatermark
	KindSignTLS
	KindOldest
)

// Do sends the request.
func (r Start) Do(ctx context.Context, t Transport) (Outcome, error) {
	return call[Outcome](ctx, t, KindStart, r)
}

// Do sends the request.
func (r Status) Do(ctx context.Context, t Transport) (StatusReply, error) {
	return call[StatusReply](ctx, t, KindStatus, r)
}

// Do sends the request.
func (r Take) Do(ctx context.Context, t Transport) (TakeReply, error) {
	return call[TakeReply](ctx, t, KindTake, r)
}

// Do sends the request.
func (r Enrol) Do(ctx context.Context, t Transport) (Message, error) {
	return call[Message](ctx, t, KindEnrol, r)
}

// Do sends the request.
func (r Pull) Do(ctx context.Context, t Transport) (Message, error) {
	return call[Message](ctx, t, KindPull, r)
}

// Do sends the request.
func (r Deliver) Do(ctx context.Context, t Transport) (Outcome, error) {
	return call[Outcome](ctx, t, KindDeliver, r)
}

// Do sends the request.
func (r Commit) Do(ctx context.Context, t Transport) (Outcome, error) {
	return call[Outcome](ctx, t, KindCommit, r)
}

// Do sends the request.
func (r CheckWatermark) Do(ctx context.Context, t Transport) (Watermark, error) {
	return call[Watermark](ctx, t, KindCheckWatermark, r)
}

// Do sends the request.
func (r Oldest) Do(ctx context.Context, t Transport) (Message, error) {
	return call[Message](ctx, t, KindOldest, r)
}

// Do sends the request.
func (r SignTLS) Do(ctx context.Context, t Transport) (Signature, error) {
	return call[Signature](ctx, t, KindSignTLS, r)
}

type request struct {
	_    struct{} `cbor:",toarray"`
	Kind int
	Body cose.Raw
}

type answer struct {
	_     struct{} `cbor:",toarray"`
	Error string
	Body  cose.Raw
}

// Refusal is the keep's own word that it will not do something, as opposed to a
// transport that failed.
type Refusal struct{ Reason string }

func (r *Refusal) Error() string { return "the keep refuses: " + r.Reason }

func call[Reply any](ctx context.Context, t Transport, kind int, body any) (Reply, error) {
	var reply Reply
	b, err := cose.Marshal(body)
	if err != nil {
		return reply, fmt.Errorf("encoding a request: %w", err)
	}
	req, err := cose.Marshal(request{Kind: kind, Body: b})
	if err != nil {
		return reply, fmt.Errorf("encoding a request: %w", err)
	}
	raw, err := t.Call(ctx, req)
	if err != nil {
		return reply, err
	}
	var a answer
	if err := cose.Unmarshal(raw, &a); err != nil {
		return reply, fmt.Errorf("the keep's answer: %w", err)
	}
	if a.Error != "" {
		return reply, &Refusal{Reason: a.Error}
	}
	if err := cose.Unmarshal(a.Body, &reply); err != nil {
		return reply, fmt.Errorf("the keep's answer: %w", err)
	}
	return reply, nil
}

// Handler is the keep's side of the contract.
type Handler interface {
	// Handle does what a request of this kind asks. The body is untrusted CBOR,
	// to be decoded with Body; the reply is one of the reply types.
	Handle(ctx context.Context, kind int, body []byte) (reply any, err error)
}

// Body decodes a request's body.
func Body[R any](body []byte) (R, error) {
	var r R
	if err := cose.Unmarshal(body, &r); err != nil {
		return r, fmt.Errorf("malformed request: %w", err)
	}
	return r, nil
}

// Serve answers one encoded request.
func Serve(ctx context.Context, h Handler, raw []byte) []byte {
	var r request
	var reply any
	err := cose.Unmarshal(raw, &r)
	if err == nil {
		reply, err = h.Handle(ctx, r.Kind, r.Body)
	}
	var body, out []byte
	if err == nil {
		body, err = cose.Marshal(reply)
	}
	if err == nil {
		out, err = cose.Marshal(answer{Body: body}) // too large, perhaps, with its frame
	}
	if err != nil {
		return cose.MustMarshal(answer{Error: reason(err), Body: cose.Raw{0xf6}})
	}
	return out
}

func reason(err error) string {
	s := err.Error()
	if s == "" {
		s = "unknown error"
	}
	if len(s) > 2048 {
		s = s[:2048]
	}
	return string([]rune(s)) // invalid UTF-8 becomes U+FFFD: an answer must encode
}

// ErrKind means a request of a kind this keep does not know.
var ErrKind = errors.New("unknown kind of request")

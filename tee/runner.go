package tee

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"edgekeep/internal/cose"
)

// # Runners
//
// A runner is a process that executes one workload instance. It has one socket,
// to the keep; on it both sides send frames, a 4-byte big-endian length and
// deterministic CBOR [kind, body], without waiting for each other. What a runner
// wants done elsewhere is a Job: the keep passes it on to the agent, and sees only
// that it concerns this instance. Instance state is sealed by the runner under
// keys that the keep gave it; to the keep it is opaque too.

// Kinds of messages between keep and runner. Numbers are never reused.
const (
	// From the keep.
	KindAssign    = 64 + iota // Assign: the first
	KindFeed                  // Feed
	KindJobDone               // JobDone
	KindInfer                 // Infer
	KindOutputAck             // OutputAck
	KindSend                  // Send
	KindResume                // Resume
	KindFrame                 // Frame: from the other runner
	KindFrameAck              // FrameAck: from the other runner
	KindActivate              // Activate

	// From the runner.
	KindHello    = 86 + iota // Hello: the first
	KindJob                  // Job
	KindOutput               // Output
	KindInferred             // Inferred
	KindLog                  // Log
	KindReport               // Report
	KindFinal                // Final
	KindReceived             // Received
)

// Assign tells a runner what to run, or with Receive to take in an instance that
// moves here.
type Assign struct {
	Instance  string     `cbor:"1,keyasint"`
	Epoch     uint64     `cbor:"2,keyasint"`
	Manifest  []byte     `cbor:"3,keyasint"` // checked by the keep
	BundleKey []byte     `cbor:"4,keyasint"`
	Keys      []StateKey `cbor:"5,keyasint"` // of the instance's log; the last one seals
	Inputs    []Input    `cbor:"6,keyasint"`
	Receive   bool       `cbor:"7,keyasint"`
	Line      uint64     `cbor:"8,keyasint"` // newest result that is known to be durable
	// Newest is the head of the newest state that a runner of this keep committed;
	// empty if none did since the keep started. Older state is refused.
	Newest []byte `cbor:"9,keyasint,omitempty"`
	// Recover is the head of the checkpoint that an instance without a log goes on
	// from; empty: it begins afresh.
	Recover []byte `cbor:"10,keyasint,omitempty"`
	// Arrived means that the instance came from another place: its log is not empty.
	Arrived bool `cbor:"11,keyasint,omitempty"`
}

// StateKey is a key under which parts of the instance's log are sealed, and its
// id.
type StateKey struct {
	_   struct{} `cbor:",toarray"`
	ID  []byte   // 8 bytes
	Key []byte   // 32 bytes
}

// Input is a stream that the instance reads.
type Input struct {
	_       struct{} `cbor:",toarray"`
	Gateway string
	Stream  string
	Local   bool // of this gateway: Feed brings what is new
	// Epoch, Seq and Head are where an instance without state begins: after this
	// record. Without them it begins with the oldest that the cloud has.
	Epoch []byte
	Seq   uint64
	Head  []byte
}

// Feed is a chunk of a local stream that has become durable.
type Feed struct {
	Stream string `cbor:"1,keyasint"`
	Chunk  []byte `cbor:"2,keyasint"`
}

// JobDone answers a Job.
type JobDone struct {
	ID    uint64   `cbor:"1,keyasint"`
	Error string   `cbor:"2,keyasint"`
	Body  cose.Raw `cbor:"3,keyasint"`
}

// Infer asks for one batch whose result goes back to whoever asked.
type Infer struct {
	ID    uint64 `cbor:"1,keyasint"`
	Input []byte `cbor:"2,keyasint"`
}

// OutputAck says up to which line results are durable.
type OutputAck struct {
	Line uint64 `cbor:"1,keyasint"`
}

// Send starts a move: state goes out in Frames sealed under Session, the last of
// it under Final. The runner goes on with batches until little is left, then
// stops, and says Final.
type Send struct {
	Attempt []byte   `cbor:"1,keyasint"`
	Session StateKey `cbor:"2,keyasint"`
	Final   StateKey `cbor:"3,keyasint"`
}

// Resume ends a move that did not come about; the runner goes on.
type Resume struct{}

// Frame is sealed state on its way between two runners.
type Frame struct {
	N    uint64 `cbor:"1,keyasint"` // from 0
	Data []byte `cbor:"2,keyasint"`
}

// FrameAck says how many frames came, in order.
type FrameAck struct {
	N uint64 `cbor:"1,keyasint"`
}

// Activate makes an instance that was received live.
type Activate struct {
	Epoch uint64     `cbor:"1,keyasint"`
	Keys  []StateKey `cbor:"2,keyasint"` // all; the last one seals from now on
	Head  []byte     `cbor:"3,keyasint"`
	Line  uint64     `cbor:"4,keyasint"`
}

// Hello says what a runner is.
type Hello struct {
	Version  string `cbor:"1,keyasint"`
	Arch     string `cbor:"2,keyasint"`
	Compiler bool   `cbor:"3,keyasint"` // or the interpreter
	Rewriter string `cbor:"4,keyasint"` // version of the module rewriter
}

// Kinds of jobs.
const (
	JobAppend  = "append"  // AppendLog -> LogEnd
	JobRead    = "read"    // ReadLog -> LogEntries
	JobRecords = "records" // message.AskedRecords -> message.Records
	JobBlob    = "blob"    // ReadBlob -> BlobPart
	JobKey     = "key"     // WantKey -> GotKey; the keep does it itself
	JobFrame   = "frame"   // Frame: to the other runner
	JobAck     = "ack"     // FrameAck: to the other runner
	JobPut     = "put"     // PutPart: part of a checkpoint for the cloud

	// Jobs that the keep does itself.
	JobCheckpoint = "checkpoint" // nothing -> CheckpointKey
	JobSnapshot   = "snapshot"   // Snapshot: the checkpoint is in the cloud
	JobRecover    = "recover"    // nothing -> Recovered

	// From the keep to the agent only.
	JobDrop    = "drop"    // DropLog
	JobPeer    = "peer"    // message.Routed, published on "up/peer"
	JobAsk     = "ask"     // Question -> answer's body
	JobAdvance = "advance" // nothing: the agent calls Advance
)

// Job is something to be done elsewhere.
type Job struct {
	ID   uint64   `cbor:"1,keyasint"`
	Kind string   `cbor:"2,keyasint"`
	Body cose.Raw `cbor:"3,keyasint"`
}

// AppendLog appends entries to an instance's log, durably and all or none, then
// forgets those before Trim.
type AppendLog struct {
	Instance string   `cbor:"1,keyasint"`
	Entries  [][]byte `cbor:"2,keyasint"`
	Trim     uint64   `cbor:"3,keyasint"`
}

// LogEnd is the index after the newest entry.
type LogEnd struct {
	Next uint64 `cbor:"1,keyasint"`
}

// ReadLog reads entries of an instance's log from an index on; 0 means from the
// beginning.
type ReadLog struct {
	Instance string `cbor:"1,keyasint"`
	From     uint64 `cbor:"2,keyasint"`
}

// LogEntries are some entries, and where the log begins and ends.
type LogEntries struct {
	First   uint64   `cbor:"1,keyasint"` // index of the first of Entries
	Entries [][]byte `cbor:"2,keyasint"`
	Next    uint64   `cbor:"3,keyasint"` // of the log
}

// ReadBlob reads part of a blob, which the agent fetches from the cloud when it
// does not have it.
type ReadBlob struct {
	ID     []byte `cbor:"1,keyasint"`
	Offset int64  `cbor:"2,keyasint"`
}

// BlobPart is part of a blob.
type BlobPart struct {
	Size int64  `cbor:"1,keyasint"` // of the blob
	Data []byte `cbor:"2,keyasint"`
}

// WantKey asks for the key of a stream's epoch.
type WantKey struct {
	Gateway string `cbor:"1,keyasint"`
	Stream  string `cbor:"2,keyasint"`
	Epoch   []byte `cbor:"3,keyasint"`
}

// GotKey is a stream key and the key under which checkpoints verify.
type GotKey struct {
	Key      []byte `cbor:"1,keyasint"`
	EpochKey []byte `cbor:"2,keyasint"` // COSE_Key
}

// DropLog forgets an instance's log.
type DropLog struct {
	Instance string `cbor:"1,keyasint"`
}

// PutPart adds to a checkpoint that goes to the cloud as a blob; the last part
// names it.
type PutPart struct {
	Instance string `cbor:"1,keyasint"`
	Data     []byte `cbor:"2,keyasint"`
	Last     bool   `cbor:"3,keyasint"`
}

// CheckpointKey is the key of one checkpoint, also sealed to the data owner.
type CheckpointKey struct {
	Key    StateKey `cbor:"1,keyasint"`
	Sealed []byte   `cbor:"2,keyasint"`
}

// Snapshot says that a checkpoint is in the cloud.
type Snapshot struct {
	Blob   []byte `cbor:"1,keyasint"`
	Head   []byte `cbor:"2,keyasint"`
	Line   uint64 `cbor:"3,keyasint"`
	KeyID  []byte `cbor:"4,keyasint"`
	Sealed []byte `cbor:"5,keyasint"`
}

// Recovered is the checkpoint from which the instance goes on, and its key.
type Recovered struct {
	Blob []byte   `cbor:"1,keyasint"`
	Key  StateKey `cbor:"2,keyasint"`
}

// PutDone answers the last PutPart when the cloud has the blob.
type PutDone struct {
	ID []byte `cbor:"1,keyasint"`
}

// CloudRefuses begins the error of a job that the cloud itself will not do, as
// opposed to one for which it could not be reached.
const CloudRefuses = "the cloud refuses: "

// Question is put to the cloud (message.Ask).
type Question struct {
	Kind string   `cbor:"1,keyasint"`
	Body cose.Raw `cbor:"2,keyasint"`
}

// Output is results that are committed: one reading for each line from First on.
type Output struct {
	First    uint64 `cbor:"1,keyasint"`
	Readings []byte `cbor:"2,keyasint"` // SenML pack in CBOR, resolved
}

// Inferred answers Infer.
type Inferred struct {
	ID     uint64 `cbor:"1,keyasint"`
	Output []byte `cbor:"2,keyasint"`
	Error  string `cbor:"3,keyasint"`
}

// Log is what the guest, or the runner about it, has to say to its owner.
type Log struct {
	Lines []string `cbor:"1,keyasint"`
}

// Report is how an instance is.
type Report struct {
	Running  bool   `cbor:"1,keyasint"`
	Batches  uint64 `cbor:"2,keyasint"`
	Failures uint64 `cbor:"3,keyasint"`
	Reason   string `cbor:"4,keyasint"` // why it failed last, or is not running
	Newest   []byte `cbor:"5,keyasint"` // head of the newest committed state
	// Refused means that the instance can never run here.
	Refused bool `cbor:"6,keyasint"`
	// Protection is what protects guest memory: "memfd-secret", "locked" or "plain".
	Protection string `cbor:"7,keyasint"`
	Module     []byte `cbor:"8,keyasint"` // SHA-256 of the rewritten module
}

// Final says that all state has been sent, the last of it sealed under the final
// key, and that all results are durable.
type Final struct {
	Head []byte `cbor:"1,keyasint"`
	Line uint64 `cbor:"2,keyasint"`
}

// Received says that all state came and is durable.
type Received struct {
	Head []byte `cbor:"1,keyasint"`
}

// # What the keep wants of the agent

// Work asks for jobs and brings what became of earlier ones. It waits up to Wait
// milliseconds when there are none.
type Work struct {
	Done []JobDone `cbor:"1,keyasint"`
	Wait int64     `cbor:"2,keyasint"`
}

// WorkReply holds jobs. Those of one instance are to be done in order.
type WorkReply struct {
	Jobs []InstanceJob `cbor:"1,keyasint"`
}

// InstanceJob is a job and whose it is; Instance is empty if it is the keep's.
type InstanceJob struct {
	_        struct{} `cbor:",toarray"`
	Instance string
	Job
}

// Peer hands the keep what came down on "peer".
type Peer struct {
	From string `cbor:"1,keyasint"`
	Data []byte `cbor:"2,keyasint"`
}

// Advance lets the keep take a step that it asked for with JobAdvance.
type Advance struct{}

// Kinds of requests of the agent, continued.
const (
	KindWork = 32 + iota
	KindPeer
	KindAdvance
)

// Do sends the request.
func (r Work) Do(ctx context.Context, t Transport) (WorkReply, error) {
	return call[WorkReply](ctx, t, KindWork, r)
}

// Do sends the request.
func (r Peer) Do(ctx context.Context, t Transport) (Outcome, error) {
	return call[Outcome](ctx, t, KindPeer, r)
}

// Do sends the request.
func (r Advance) Do(ctx context.Context, t Transport) (Outcome, error) {
	return call[Outcome](ctx, t, KindAdvance, r)
}

// Duplex is a connection between keep and runner.
type Duplex struct {
	conn net.Conn
	mu   sync.Mutex // one frame at a time
}

// NewDuplex makes one of a connection.
func NewDuplex(conn net.Conn) *Duplex { return &Duplex{conn: conn} }

// Send sends a message. It may be called by many.
func (d *Duplex) Send(kind int, body any) error {
	raw, err := cose.Marshal(body)
	if err != nil {
		return fmt.Errorf("encoding a message: %w", err)
	}
	msg, err := cose.Marshal(request{Kind: kind, Body: raw})
	if err != nil {
		return fmt.Errorf("encoding a message: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return writeFrame(d.conn, msg)
}

// Receive waits for the next message. One caller at a time; io.EOF when the other
// side has ended.
func (d *Duplex) Receive() (kind int, body []byte, err error) {
	raw, err := readFrame(d.conn)
	if err != nil {
		if errors.Is(err, net.ErrClosed) {
			err = io.EOF
		}
		return 0, nil, err
	}
	var r request
	if err := cose.Unmarshal(raw, &r); err != nil {
		return 0, nil, fmt.Errorf("malformed message: %w", err)
	}
	return r.Kind, r.Body, nil
}

// Close ends the connection.
func (d *Duplex) Close() error { return d.conn.Close() }

// Package workload is the format of confidential workloads: what is packed,
// deployed, asked, and moved. It is pure: bytes in, bytes out.
//
// # Bundle
//
// A manifest is a COSE_Sign1 by the operator (typ TypManifest) over the map of
// Manifest: what the workload is, what it needs, where it may run. It names, by
// hash, the content: the module and its models, encrypted. A bundle's id is the
// SHA-256 of the signed manifest, and so pins every byte.
//
// The content is a blob (package message) made of pieces, each a 4-byte
// big-endian length and a COSE_Encrypt0 under the bundle key with the protected
// header {1: 3 (A256GCM), 5: iv, -70310: index, -70311: number of pieces}; iv is
// 4 zero bytes and the big-endian index. The plaintexts, at most PieceSize bytes
// each, make up the CBOR sequence of module (bstr), then of each model (bstr) in
// the manifest's order. The bundle key is fresh for each bundle.
//
// # Who says what
//
//	deploy    the operator's command, with the bundle key sealed to the receiving
//	          key of the gateway's verdict
//	claim     a keep's word to the ledger, COSE_Sign1 by its epoch key (TypClaim)
//	entry     the ledger's word, COSE_Sign1 by the fleet (TypEntry)
//	offer, accept, begin, ready, received, release, done
//	          between two keeps, COSE_Sign1 by the sender's epoch key (TypMove)
//	request, response
//	          between a client and a keep: see Request
package workload

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"edgekeep/internal/cose"
)

// Types of the signed messages (COSE header 16).
const (
	TypManifest = "application/edgekeep-manifest+cbor"
	TypClaim    = "application/edgekeep-claim+cbor"
	TypEntry    = "application/edgekeep-entry+cbor"
	TypMove     = "application/edgekeep-move+cbor"
	TypResponse = "application/edgekeep-response+cose"
)

// Shapes of a workload.
const (
	Filter  = "filter"  // an unmodified WASI command: a batch on stdin, results on stdout, state in its directory
	Reactor = "reactor" // edgekeep_batch is called for each batch; state in linear memory
)

// Formats of batches and results.
const (
	JSON  = "json"  // JSON lines
	CSV   = "csv"   // with a header line
	SenML = "senml" // RFC 8428 in CBOR
	Raw   = "raw"   // what a client sent; for inference only
)

// Manifest is what a workload's author and operator say about it.
type Manifest struct {
	Name        string   `cbor:"1,keyasint"`
	Version     string   `cbor:"2,keyasint"`
	Shape       string   `cbor:"3,keyasint"`
	Module      []byte   `cbor:"4,keyasint"` // SHA-256 of the module as its author built it
	ModuleSize  int64    `cbor:"5,keyasint"`
	Models      []Model  `cbor:"6,keyasint,omitempty"`
	Args        []string `cbor:"7,keyasint,omitempty"`
	Input       Input    `cbor:"8,keyasint"`
	Output      string   `cbor:"9,keyasint"` // format of results
	Limits      Limits   `cbor:"10,keyasint"`
	Assurance   string   `cbor:"11,keyasint"`           // least assurance of where it may run
	Nodes       []string `cbor:"12,keyasint"`           // gateways it may run on; "*" means any of the tenant's
	Moves       uint64   `cbor:"13,keyasint"`           // how often an instance may move
	Content     []byte   `cbor:"14,keyasint"`           // id of the blob with module and models, encrypted
	ContentSize int64    `cbor:"15,keyasint"`           // of the blob
	Commit      int64    `cbor:"16,keyasint"`           // ms at most between commits while batches run
	Checkpoint  int64    `cbor:"17,keyasint,omitempty"` // seconds between checkpoints to the cloud; 0: none
}

// Model is a file that the workload reads as /models/NAME.
type Model struct {
	_    struct{} `cbor:",toarray"`
	Name string
	Hash []byte // SHA-256
	Size int64
}

// Input says what batches are made of.
type Input struct {
	_       struct{} `cbor:",toarray"`
	Format  string
	Streams []string // of the gateway where it is deployed
	Batch   uint64   // readings in a batch, at most
	Wait    int64    // ms that a batch may wait to fill
}

// Limits bound what an instance may use.
type Limits struct {
	_      struct{} `cbor:",toarray"`
	Memory uint64   // bytes of linear memory
	CPU    int64    // ms for a batch
	Disk   uint64   // bytes of its directory
	Output uint64   // bytes of a batch's results
}

// Bounds of a manifest.
const (
	MaxContent = 64 << 20
	maxModels  = 16
	maxStreams = 16
	MaxMemory  = 1 << 30
)

var (
	fileName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$`)
	nodeName = regexp.MustCompile(`^(\*|[A-Za-z0-9-]{1,31})$`)
	instName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,25}$`)
)

// ValidInstance reports whether an instance may have this name: it is also the
// name of its stream of results, and with "-log" that of its log.
func ValidInstance(name string) bool {
	return instName.MatchString(name) && !strings.HasSuffix(name, "-log")
}

// Session names the numbering of an instance's results in one epoch: the session of
// the cursor in their checkpoints (package sealing).
func Session(instance string, epoch uint64) string { return fmt.Sprintf("%s#%d", instance, epoch) }

// Validate says what is wrong with a manifest.
func (m Manifest) Validate() error {
	total := m.ModuleSize
	for _, f := range m.Models {
		if !fileName.MatchString(f.Name) || len(f.Hash) != sha256.Size || f.Size <= 0 || f.Size > MaxContent {
			return fmt.Errorf("model %.64q: a name is 1 to 63 letters, digits, dots, hyphens and underscores; its size at most 64 MiB", f.Name)
		}
		total += f.Size
	}
	switch {
	case !ValidInstance(m.Name):
		return fmt.Errorf("name %.64q: 1 to 26 small letters, digits and hyphens are needed", m.Name)
	case len(m.Version) == 0 || len(m.Version) > 32:
		return errors.New("version: 1 to 32 characters are needed")
	case m.Shape != Filter && m.Shape != Reactor:
		return fmt.Errorf("shape %.32q: %q or %q", m.Shape, Filter, Reactor)
	case len(m.Module) != sha256.Size || m.ModuleSize <= 0 || total > MaxContent || len(m.Models) > maxModels:
		return errors.New("module and models: at most 16 models, and 64 MiB together")
	case len(m.Content) != sha256.Size || m.ContentSize < total:
		return errors.New("the content's id or size is missing")
	case len(m.Args) > 64:
		return errors.New("args: at most 64")
	case m.Assurance != "" && rank(m.Assurance) == 0:
		return fmt.Errorf("assurance %.32q: one of %v", m.Assurance, assurances)
	case m.Assurance == "":
		return errors.New("assurance is missing: the least that protects data in use where it may run, like \"tpm\"")
	case len(m.Nodes) == 0 || len(m.Nodes) > 256:
		return errors.New("nodes: where it may run is missing; \"*\" means anywhere in the tenant")
	case m.Commit < 1 || m.Commit > 60_000:
		return errors.New("commit must be between 1ms and 1m")
	case m.Checkpoint < 0 || m.Checkpoint > 7*86400:
		return errors.New("checkpoint must be at most a week")
	}
	for _, n := range m.Nodes {
		if !nodeName.MatchString(n) {
			return fmt.Errorf("nodes: %.64q is no gateway's name", n)
		}
	}
	for _, a := range m.Args {
		if len(a) > 1024 {
			return errors.New("args: one is longer than 1024 bytes")
		}
	}
	if err := m.validIO(); err != nil {
		return err
	}
	return m.Limits.validate()
}

func (m Manifest) validIO() error {
	formats := []string{JSON, CSV, SenML, Raw}
	switch {
	case !slices.Contains(formats, m.Input.Format) || !slices.Contains(formats, m.Output):
		return fmt.Errorf("input or output format: one of %v", formats)
	case m.Input.Format == Raw && len(m.Input.Streams) > 0:
		return errors.New("the raw format is for inference: it takes no streams")
	case m.Output == Raw && len(m.Input.Streams) > 0:
		return errors.New("results of streams are readings: the output format cannot be raw")
	case len(m.Input.Streams) > maxStreams:
		return errors.New("input streams: at most 16")
	case m.Input.Batch < 1 || m.Input.Batch > 10_000:
		return errors.New("input batch must be between 1 and 10000 readings")
	case m.Input.Wait < 0 || m.Input.Wait > 600_000:
		return errors.New("input wait must be at most 10m")
	}
	for _, s := range m.Input.Streams {
		if !nodeName.MatchString(s) || s == "*" {
			return fmt.Errorf("input stream %.64q: a stream has its source's name", s)
		}
	}
	return nil
}

func (l Limits) validate() error {
	switch {
	case l.Memory < 64<<10 || l.Memory > MaxMemory:
		return errors.New("limits.memory must be between 64KiB and 1GiB")
	case l.CPU < 1 || l.CPU > 600_000:
		return errors.New("limits.cpu must be between 1ms and 10m")
	case l.Disk > 256<<20:
		return errors.New("limits.disk must be at most 256MiB")
	case l.Output < 1 || l.Output > 16<<20:
		return errors.New("limits.output must be between 1 byte and 16MiB")
	}
	return nil
}

// Allows reports whether an instance may run on a gateway.
func (m Manifest) Allows(gateway string) bool {
	return slices.Contains(m.Nodes, "*") || slices.Contains(m.Nodes, gateway)
}

// assurances, the weakest first: what protects data in use.
var assurances = []string{"tpm", "optee", "cvm", "enclave"}

func rank(assurance string) int { return 1 + slices.Index(assurances, assurance) }

// Assured says why a place with this assurance, as the verifier derived it, may
// not run the workload, or nil.
func (m Manifest) Assured(have string) error {
	if rank(have) == 0 || rank(have) < rank(m.Assurance) {
		return fmt.Errorf("the workload asks for assurance %q, the verdict says %q", m.Assurance, have)
	}
	return nil
}

// Sign signs a manifest with the operator's key.
func (m Manifest) Sign(key crypto.Signer) ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return cose.Sign1(key, TypManifest, cose.MustMarshal(m))
}

// VerifyManifest verifies and decodes a manifest.
func VerifyManifest(pub *ecdsa.PublicKey, msg []byte) (Manifest, error) {
	m, err := verify[Manifest](pub, TypManifest, msg)
	if err == nil {
		err = m.Validate()
	}
	if err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	return m, nil
}

// PeekManifest decodes a manifest whose signature was checked before.
func PeekManifest(msg []byte) (Manifest, error) {
	_, payload, err := cose.Peek1(msg)
	var m Manifest
	if err == nil {
		err = cose.Unmarshal(payload, &m)
	}
	if err == nil {
		err = m.Validate()
	}
	if err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	return m, nil
}

// ID is the id of the bundle with this signed manifest.
func ID(manifest []byte) []byte {
	sum := sha256.Sum256(manifest)
	return sum[:]
}

func verify[M any](pub *ecdsa.PublicKey, typ string, msg []byte) (M, error) {
	var m M
	payload, err := cose.Verify1(pub, typ, msg)
	if err == nil {
		err = cose.Unmarshal(payload, &m)
	}
	return m, err
}

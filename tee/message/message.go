// Package message is the format of what goes down to a gateway and of its
// answers, beside evidence and sealed data: enrolment, deliveries, commands and
// their results, admissions and grants. It is pure: bytes in, bytes out.
//
// # Up, on the boot topics (unsigned; what counts is bound by TPM and evidence)
//
//	enrol     {1: EK (TPMT_PUBLIC), 2: EK certificate (DER), 3: AK (TPMT_PUBLIC), 4: nonce (32)}
//	activate  {1: EK, 2: EK certificate, 3: AK, 4: nonce of the enrol message,
//	           5: evidence, 6: HMAC-SHA256(secret, SHA-256(evidence)), 7: nonce for the answer}
//
// # Up, from an enrolled gateway
//
//	pull      {1: nonce (32)}: what is next? (unsigned)
//	evidence  see package attest
//	sealed    a chunk, see package sealing
//	result    COSE_Sign1 by the epoch key, typ TypResult
//	ask       a question (Ask); the cloud answers it on "answer" (Answer)
//	peer      a message to another gateway's keep (Routed)
//
// # Down
//
//	item      COSE_Sign1 by the fleet, typ TypItem, over the nonce that asked:
//	          fresh without a clock, and never an answer to something else
//	ack       a watermark, see package sealing
//	notify    empty: a hint to pull
//	answer    see ask
//	peer      a message from another gateway's keep, or from the cloud (Routed)
//
// # Signed by people
//
// A command is a COSE_Sign1 by the operator (typ TypCommand); an admission (typ
// TypAdmission) is the operator's word that one EK may enrol once as one
// gateway; a grant (typ TypGrant) is the data owner's word that a consumer key
// may read; a recovery (typ TypRecover) is the data owner's word that a lost
// instance goes on elsewhere.
package message

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"edgekeep/internal/cose"
)

// Types of the signed messages (COSE header 16).
const (
	TypItem      = "application/edgekeep-item+cbor"
	TypCommand   = "application/edgekeep-command+cbor"
	TypResult    = "application/edgekeep-result+cbor"
	TypAdmission = "application/edgekeep-admission+cbor"
	TypGrant     = "application/edgekeep-grant+cbor"
	TypRecover   = "application/edgekeep-recover+cbor"
)

// NonceSize is the size of every nonce here, in bytes.
const NonceSize = 32

// Enrol starts an enrolment.
type Enrol struct {
	EK     []byte `cbor:"1,keyasint"`
	EKCert []byte `cbor:"2,keyasint"`
	AK     []byte `cbor:"3,keyasint"`
	Nonce  []byte `cbor:"4,keyasint"`
}

// Activate proves that the AK lives beside the EK, and attests.
type Activate struct {
	EK       []byte `cbor:"1,keyasint"`
	EKCert   []byte `cbor:"2,keyasint"`
	AK       []byte `cbor:"3,keyasint"`
	Enrol    []byte `cbor:"4,keyasint"`
	Evidence []byte `cbor:"5,keyasint"`
	Proof    []byte `cbor:"6,keyasint"`
	Nonce    []byte `cbor:"7,keyasint"`
}

// Proof binds the secret of a credential to the evidence that comes with it.
func Proof(secret, evidence []byte) []byte {
	sum := sha256.Sum256(evidence)
	mac := hmac.New(sha256.New, secret)
	mac.Write(sum[:])
	return mac.Sum(nil)
}

// Pull asks for what is next.
type Pull struct {
	Nonce []byte `cbor:"1,keyasint"`
}

// Credential is what MakeCredential made.
type Credential struct {
	_      struct{} `cbor:",toarray"`
	Blob   []byte
	Secret []byte
}

// Item is a delivery.
type Item struct {
	Nonce       []byte      `cbor:"1,keyasint"`
	Time        int64       `cbor:"2,keyasint"` // the fleet's clock, Unix seconds
	Subject     string      `cbor:"3,keyasint"` // tenant/gateway; empty while enrolment is pending
	Challenge   []byte      `cbor:"4,keyasint,omitempty"`
	Command     []byte      `cbor:"5,keyasint,omitempty"`
	Verdict     []byte      `cbor:"6,keyasint,omitempty"`
	Credential  *Credential `cbor:"7,keyasint,omitempty"`
	Roots       []byte      `cbor:"8,keyasint,omitempty"`
	Certificate [][]byte    `cbor:"9,keyasint,omitempty"`  // TLS client chain, DER
	Reason      string      `cbor:"10,keyasint,omitempty"` // why there is nothing, for a person
	// Entry is the newest ledger entry of the instance that the command
	// workload-deploy names, signed by the fleet over the command's message.
	Entry []byte `cbor:"11,keyasint,omitempty"`
}

// Sign signs an item with the fleet's key.
func (m Item) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypItem, cose.MustMarshal(m))
}

// VerifyItem verifies and decodes an item.
func VerifyItem(pub *ecdsa.PublicKey, msg []byte) (Item, error) {
	return verify[Item](pub, TypItem, msg)
}

// PeekItem decodes an item without verifying it: a box that is not yet enrolled
// learns the key that signed it from the roots inside, whose digest it knows.
func PeekItem(msg []byte) (Item, error) {
	return peek[Item](TypItem, msg)
}

// Names of the commands.
const (
	AttestNow        = "attest-now"
	SetInterval      = "set-interval" // argument "seconds": 1 to 86400
	StatusCommand    = "status"
	RotateStreamKeys = "rotate-stream-keys"
	WorkloadDeploy   = "workload-deploy" // argument "instance"; Body says what (package workload)
	WorkloadStop     = "workload-stop"   // argument "instance"
	WorkloadMove     = "workload-move"   // arguments "instance" and "to", a gateway
)

// MaxBody bounds a command's body, in bytes.
const MaxBody = 64 << 10

// Command is an order to one gateway. Sequences of one gateway only go up.
type Command struct {
	Audience string            `cbor:"1,keyasint"` // tenant/gateway
	Sequence uint64            `cbor:"2,keyasint"`
	Name     string            `cbor:"3,keyasint"`
	Args     map[string]string `cbor:"4,keyasint,omitempty"`
	Expires  int64             `cbor:"5,keyasint,omitempty"` // Unix seconds
	Body     []byte            `cbor:"6,keyasint,omitempty"`
}

// Sign signs a command with the operator's key.
func (c Command) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypCommand, cose.MustMarshal(c))
}

// VerifyCommand verifies and decodes a command.
func VerifyCommand(pub *ecdsa.PublicKey, msg []byte) (Command, error) {
	return verify[Command](pub, TypCommand, msg)
}

// CheckCommand says whether a keep may accept the command now, or why not:
// audience, sequence and expiry. now is the cloud's time that came with it.
func CheckCommand(c Command, subject string, accepted uint64, now time.Time) error {
	switch {
	case c.Audience != subject:
		return fmt.Errorf("the command is for %.64q, this is %s", c.Audience, subject)
	case c.Sequence <= accepted:
		return fmt.Errorf("sequence %d was used: the newest accepted is %d", c.Sequence, accepted)
	case c.Expires != 0 && now.Unix() >= c.Expires:
		return fmt.Errorf("the command expired at %s", time.Unix(c.Expires, 0).UTC().Format(time.RFC3339))
	}
	if len(c.Body) > 0 && c.Name != WorkloadDeploy {
		return fmt.Errorf("%.64q takes no body", c.Name)
	}
	switch c.Name {
	case WorkloadDeploy:
		if len(c.Body) == 0 || len(c.Body) > MaxBody {
			return fmt.Errorf("%s needs a body of at most %d bytes", c.Name, MaxBody)
		}
		return checkArgs(c, argInstance)
	case WorkloadStop:
		return checkArgs(c, argInstance)
	case WorkloadMove:
		return checkArgs(c, argInstance, argTo)
	case AttestNow, StatusCommand, RotateStreamKeys:
		if len(c.Args) != 0 {
			return fmt.Errorf("%s takes no arguments", c.Name)
		}
	case SetInterval:
		if _, err := Interval(c); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown command %.64q", c.Name)
	}
	return nil
}

type arg struct {
	name  string
	valid *regexp.Regexp
}

var (
	argInstance = arg{"instance", regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,25}$`)}
	argTo       = arg{"to", regexp.MustCompile(`^[A-Za-z0-9-]{1,31}$`)}
)

func checkArgs(c Command, want ...arg) error {
	for _, a := range want {
		if !a.valid.MatchString(c.Args[a.name]) {
			return fmt.Errorf("%s: argument %q is missing, or no such name: %.64q", c.Name, a.name, c.Args[a.name])
		}
	}
	if len(c.Args) != len(want) {
		return fmt.Errorf("%s: an argument too many", c.Name)
	}
	return nil
}

// Interval reads the argument of set-interval.
func Interval(c Command) (time.Duration, error) {
	n, err := strconv.ParseUint(c.Args["seconds"], 10, 32)
	if err != nil || len(c.Args) != 1 || n < 1 || n > 86400 {
		return 0, errors.New("set-interval needs one argument, seconds, a whole number from 1 to 86400")
	}
	return time.Duration(n) * time.Second, nil
}

// Result is a keep's answer to a command.
type Result struct {
	Subject  string            `cbor:"1,keyasint"`
	Sequence uint64            `cbor:"2,keyasint"` // of the command; 0 if it could not be read
	Command  []byte            `cbor:"3,keyasint"` // SHA-256 of the command message
	Done     bool              `cbor:"4,keyasint"`
	Reason   string            `cbor:"5,keyasint,omitempty"` // why it was refused
	Output   map[string]string `cbor:"6,keyasint,omitempty"`
}

// Sign signs a result with the epoch key.
func (r Result) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypResult, cose.MustMarshal(r))
}

// VerifyResult verifies and decodes a result.
func VerifyResult(pub *ecdsa.PublicKey, msg []byte) (Result, error) {
	return verify[Result](pub, TypResult, msg)
}

// Admission lets one EK enrol, once, as one gateway.
type Admission struct {
	EKHash  []byte `cbor:"1,keyasint"`
	Tenant  string `cbor:"2,keyasint"`
	Gateway string `cbor:"3,keyasint"`
	ID      []byte `cbor:"4,keyasint"` // 16 random bytes: each admission is used once
}

// Sign signs an admission with the operator's key.
func (a Admission) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypAdmission, cose.MustMarshal(a))
}

// VerifyAdmission verifies and decodes an admission.
func VerifyAdmission(pub *ecdsa.PublicKey, msg []byte) (Admission, error) {
	a, err := verify[Admission](pub, TypAdmission, msg)
	if err == nil && (len(a.EKHash) != 32 || len(a.ID) != 16) {
		err = errors.New("admission: an identifier has the wrong size")
	}
	return a, err
}

// Grant lets a consumer read a tenant's data.
type Grant struct {
	Tenant   string   `cbor:"1,keyasint"`
	Consumer string   `cbor:"2,keyasint"`
	Key      cose.Raw `cbor:"3,keyasint,omitempty"` // HPKE public key, COSE_Key; absent: see Gateway
	Expires  int64    `cbor:"4,keyasint,omitempty"`
	Gateway  bool     `cbor:"5,keyasint,omitempty"` // Consumer is a gateway: the receiving key in its verdict
}

// Sign signs a grant with the data owner's key.
func (g Grant) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypGrant, cose.MustMarshal(g))
}

// VerifyGrant verifies and decodes a grant.
func VerifyGrant(pub *ecdsa.PublicKey, msg []byte) (Grant, error) {
	return verify[Grant](pub, TypGrant, msg)
}

// Recover is the data owner's word that an instance was lost, and goes on from a
// checkpoint. It replaces the ledger's entry of epoch From, and no other.
type Recover struct {
	Tenant     string `cbor:"1,keyasint"`
	Instance   string `cbor:"2,keyasint"`
	From       uint64 `cbor:"3,keyasint"`
	To         string `cbor:"4,keyasint"` // gateway
	Checkpoint []byte `cbor:"5,keyasint"` // id of the blob
	Head       []byte `cbor:"6,keyasint"` // of the state in it
	Issued     int64  `cbor:"7,keyasint"` // Unix seconds
}

// Sign signs a recovery with the data owner's key.
func (r Recover) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypRecover, cose.MustMarshal(r))
}

// VerifyRecover verifies and decodes a recovery.
func VerifyRecover(pub *ecdsa.PublicKey, msg []byte) (Recover, error) {
	r, err := verify[Recover](pub, TypRecover, msg)
	if err == nil && (!argInstance.valid.MatchString(r.Instance) || !argTo.valid.MatchString(r.To) ||
		r.From == 0 || len(r.Checkpoint) != sha256.Size || len(r.Head) != sha256.Size) {
		err = errors.New("recovery: a field is missing or of the wrong size")
	}
	return r, err
}

func verify[M any](pub *ecdsa.PublicKey, typ string, msg []byte) (M, error) {
	var m M
	payload, err := cose.Verify1(pub, typ, msg)
	if err == nil {
		err = cose.Unmarshal(payload, &m)
	}
	if err != nil {
		return m, fmt.Errorf("%T: %w", m, err)
	}
	return m, nil
}

func peek[M any](typ string, msg []byte) (M, error) {
	var m M
	h, payload, err := cose.Peek1(msg)
	if err == nil && h.Typ != typ {
		err = fmt.Errorf("the message is a %s", h.Typ)
	}
	if err == nil {
		err = cose.Unmarshal(payload, &m)
	}
	if err != nil {
		return m, fmt.Errorf("%T: %w", m, err)
	}
	return m, nil
}

// Decode decodes one of the unsigned messages: Enrol, Activate or Pull.
func Decode[M any](b []byte) (M, error) {
	var m M
	if err := cose.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("%T: %w", m, err)
	}
	return m, nil
}

// Encode encodes one of the unsigned messages.
func Encode(m any) []byte { return cose.MustMarshal(m) }

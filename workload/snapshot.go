package workload

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
)

// # Checkpoints in the cloud
//
// A checkpoint is a blob: the parts of one full delta, each with a 4-byte
// big-endian length before it, under a key of its own. The keep that holds the
// instance signs what it is, with the key sealed to the data owner's HPKE key. An
// instance that was lost goes on from it elsewhere by the data owner's word
// (message.Recover) and the ledger's entry that follows: then, and for that
// gateway only, the key broker gives the key on.

// Types of the signed messages.
const (
	TypSnapshot = "application/edgekeep-snapshot+cbor" // Snapshot, by the epoch key
	TypRecovery = "application/edgekeep-recovery+cbor" // Recovery, by the key broker
)

// Purposes of sealed secrets, continued: both seal a CBOR [key id, key].
const (
	PurposeSnapshot = "snapshot" // context: CBOR [subject, instance, key id]
	PurposeRecovery = "recovery" // context: CBOR [instance, blob, head]
)

// Snapshot is a keep's word about a checkpoint in the cloud.
type Snapshot struct {
	Subject  string `cbor:"1,keyasint"`
	Instance string `cbor:"2,keyasint"`
	Epoch    uint64 `cbor:"3,keyasint"`
	Blob     []byte `cbor:"4,keyasint"` // id
	Head     []byte `cbor:"5,keyasint"` // of the state in it
	Line     uint64 `cbor:"6,keyasint"` // newest result in it
	Time     int64  `cbor:"7,keyasint"` // the fleet's clock, Unix seconds
	KeyID    []byte `cbor:"8,keyasint"`
	Sealed   []byte `cbor:"9,keyasint"` // its key, for the data owner
}

// SnapshotContext binds a checkpoint's key to its place.
func SnapshotContext(subject, instance string, keyID []byte) []byte {
	return cose.MustMarshal([]any{subject, instance, keyID})
}

// Sign signs a snapshot with the epoch key.
func (s Snapshot) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypSnapshot, cose.MustMarshal(s))
}

// VerifySnapshot verifies and decodes a snapshot.
func VerifySnapshot(pub *ecdsa.PublicKey, msg []byte) (Snapshot, error) {
	s, err := verify[Snapshot](pub, TypSnapshot, msg)
	return s, s.check(err)
}

// PeekSnapshot decodes a snapshot and the id of the key that claims to have signed
// it, without verifying it.
func PeekSnapshot(msg []byte) (Snapshot, []byte, error) {
	h, payload, err := cose.Peek1(msg)
	var s Snapshot
	if err == nil {
		err = cose.Unmarshal(payload, &s)
	}
	return s, h.KID, s.check(err)
}

func (s Snapshot) check(err error) error {
	if err == nil && (!ValidInstance(s.Instance) || s.Epoch == 0 || len(s.Blob) != sha256.Size || len(s.Head) != sha256.Size || len(s.KeyID) != keyIDSize) {
		err = errors.New("a field is missing or of the wrong size")
	}
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}

// Recovery gives the key of a checkpoint to the gateway that the data owner named.
type Recovery struct {
	Instance string `cbor:"1,keyasint"`
	To       string `cbor:"2,keyasint"` // tenant/gateway
	Blob     []byte `cbor:"3,keyasint"`
	Head     []byte `cbor:"4,keyasint"`
	Sealed   []byte `cbor:"5,keyasint"` // to its receiving key
}

// RecoveryContext binds the key to the checkpoint.
func RecoveryContext(instance string, blob, head []byte) []byte {
	return cose.MustMarshal([]any{instance, blob, head})
}

// Sign signs a recovery with the key broker's key.
func (r Recovery) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypRecovery, cose.MustMarshal(r))
}

// VerifyRecovery verifies and decodes a recovery.
func VerifyRecovery(pub *ecdsa.PublicKey, msg []byte) (Recovery, error) {
	r, err := verify[Recovery](pub, TypRecovery, msg)
	if err != nil {
		return r, fmt.Errorf("recovery: %w", err)
	}
	return r, nil
}

// AppendPart appends a part to the content of a checkpoint's blob.
func AppendPart(blob, part []byte) []byte {
	return append(binary.BigEndian.AppendUint32(blob, uint32(len(part))), part...)
}

// CutPart takes the next part off a checkpoint's blob.
func CutPart(blob []byte) (part, rest []byte, err error) {
	if len(blob) < 4 || uint64(len(blob)-4) < uint64(binary.BigEndian.Uint32(blob)) {
		return nil, nil, errors.New("checkpoint: it was cut off")
	}
	n := 4 + binary.BigEndian.Uint32(blob)
	return bytes.Clone(blob[4:n]), blob[n:], nil
}

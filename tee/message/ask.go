package message

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
)

// Kinds of questions. Answers are checked by whoever asked for what they hold;
// the envelope is not signed.
const (
	AskRecords = "records" // AskedRecords -> Records
	AskKey     = "key"     // AskedKey -> Release
	AskBlob    = "blob"    // AskedBlob -> Blob
	AskPut     = "put"     // PutBlob -> Have
	AskLedger  = "ledger"  // Signed (a claim, package workload) -> Signed (an entry)
	AskReply   = "reply"   // Reply -> nothing

	AskEntry    = "entry"    // AskedEntry -> Signed (an entry)
	AskSnapshot = "snapshot" // Signed (a snapshot, package workload) -> nothing
	AskRecovery = "recovery" // AskedRecovery -> Signed (a recovery, package workload)
)

// AskID is the size of a question's id, in bytes.
const AskID = 8

// Ask is a question to the cloud, on "up/ask". Its answer comes on "down/answer"
// under the same id. A question may be asked again: each is idempotent.
type Ask struct {
	ID   []byte   `cbor:"1,keyasint"`
	Kind string   `cbor:"2,keyasint"`
	Body cose.Raw `cbor:"3,keyasint"`
}

// Answer is the answer to an Ask.
type Answer struct {
	ID    []byte   `cbor:"1,keyasint"`
	Error string   `cbor:"2,keyasint,omitempty"` // why there is none, for a person
	Body  cose.Raw `cbor:"3,keyasint"`
}

// Routed is a message from one gateway's keep to another's: on "up/peer" Peer is
// the gateway it is for, on "down/peer" the one it is from, or empty if it is
// from the cloud's services. Who routes it promises nothing.
type Routed struct {
	_    struct{} `cbor:",toarray"`
	Peer string
	Data []byte
}

// AskedRecords asks for stored chunks of a stream from a position on.
type AskedRecords struct {
	Gateway string `cbor:"1,keyasint"`
	Stream  string `cbor:"2,keyasint"`
	Epoch   []byte `cbor:"3,keyasint"` // of the newest record that is known; empty: from the beginning
	Seq     uint64 `cbor:"4,keyasint"` // of that record
	Wait    int64  `cbor:"5,keyasint"` // ms to wait when there is none, at most 20000
}

// Records are chunks, in order; the first holds the record after the one asked
// about, or what the store has next.
type Records struct {
	Chunks [][]byte `cbor:"1,keyasint"`
}

// AskedKey asks the key broker for a stream key, for the gateway in the verdict.
type AskedKey struct {
	Gateway string `cbor:"1,keyasint"`
	Stream  string `cbor:"2,keyasint"`
	Epoch   []byte `cbor:"3,keyasint"`
	Verdict []byte `cbor:"4,keyasint"` // the asking gateway's own
}

// Release is a stream key, sealed to whom it is for and signed by the key
// broker, and the epoch key under which the stream's checkpoints verify.
type Release struct {
	Message  []byte `cbor:"1,keyasint"`
	EpochKey []byte `cbor:"2,keyasint"` // COSE_Key
	Verdict  []byte `cbor:"3,keyasint"` // that vouches for it
}

// AskedBlob asks for one block of a blob, or with Block -1 for its list.
type AskedBlob struct {
	ID    []byte `cbor:"1,keyasint"`
	Block int    `cbor:"2,keyasint"`
}

// Blob is a block, or the list: the SHA-256 of each block, one after the other.
type Blob struct {
	Data []byte `cbor:"1,keyasint"`
}

// PutBlob stores one block. The list comes with Block -1, and first; with it, a
// gateway says whose checkpoint this is: of each instance, the newest are kept.
type PutBlob struct {
	ID       []byte `cbor:"1,keyasint"`
	Block    int    `cbor:"2,keyasint"`
	Data     []byte `cbor:"3,keyasint"`
	Instance string `cbor:"4,keyasint,omitempty"`
}

// Have answers PutBlob: which block is the first that is missing; as many as the
// list has when the blob is complete.
type Have struct {
	Next int `cbor:"1,keyasint"`
}

// Signed carries a signed message.
type Signed struct {
	Message []byte `cbor:"1,keyasint"`
}

// Reply is a keep's answer to a request that a client sent through the cloud.
type Reply struct {
	ID   []byte `cbor:"1,keyasint"`
	Data []byte `cbor:"2,keyasint"`
}

// AskedEntry asks what the ledger says of an instance. The answer is signed over
// the SHA-256 of Nonce, 32 random bytes.
type AskedEntry struct {
	Instance string `cbor:"1,keyasint"`
	Nonce    []byte `cbor:"2,keyasint"`
}

// AskedRecovery asks for the key of the checkpoint from which the data owner lets
// an instance go on at the asking gateway.
type AskedRecovery struct {
	Instance string `cbor:"1,keyasint"`
	Verdict  []byte `cbor:"2,keyasint"` // the asking gateway's own
}

// Bounds of blobs.
const (
	BlockSize = 96 << 10 // bytes of every block but the last
	MaxBlocks = 1024     // so a blob has at most 96 MiB, and its list fits a message
)

// BlobList cuts content into blocks and returns their hashes, one after the
// other. A blob's id is the SHA-256 of its list: so every block can be checked
// when it comes, and a download can go on where it broke off.
func BlobList(content []byte) ([]byte, error) {
	if len(content) == 0 || len(content) > MaxBlocks*BlockSize {
		return nil, fmt.Errorf("a blob has 1 to %d bytes, this one %d", MaxBlocks*BlockSize, len(content))
	}
	var list []byte
	for i := range Blocks(len(content)) {
		sum := sha256.Sum256(Block(content, i))
		list = append(list, sum[:]...)
	}
	return list, nil
}

// Blocks is the number of blocks of a blob of so many bytes.
func Blocks(size int) int { return (size + BlockSize - 1) / BlockSize }

// Block is one block of a blob.
func Block(content []byte, i int) []byte {
	return content[i*BlockSize : min(len(content), (i+1)*BlockSize)]
}

// BlobID is the id of the blob with this list.
func BlobID(list []byte) []byte {
	sum := sha256.Sum256(list)
	return sum[:]
}

// CheckList checks a list against the id of its blob and returns how many blocks
// there are.
func CheckList(id, list []byte) (int, error) {
	if n := len(list) / sha256.Size; len(list)%sha256.Size == 0 && n >= 1 && n <= MaxBlocks && bytes.Equal(BlobID(list), id) {
		return n, nil
	}
	return 0, errors.New("the list is not the blob's")
}

// CheckBlock checks a block against a list that was checked before.
func CheckBlock(list []byte, i int, block []byte) error {
	n := len(list) / sha256.Size
	if i < 0 || i >= n || len(block) == 0 || len(block) > BlockSize || i < n-1 && len(block) != BlockSize {
		return fmt.Errorf("block %d of %d has the wrong size", i, n)
	}
	if sum := sha256.Sum256(block); !bytes.Equal(sum[:], list[i*sha256.Size:(i+1)*sha256.Size]) {
		return fmt.Errorf("block %d is not the blob's", i)
	}
	return nil
}

package workload

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
)

// Sizes.
const (
	KeySize   = 32
	PieceSize = 64 << 10 // bytes of a piece's plaintext
)

type pieceHeader struct {
	Alg   int    `cbor:"1,keyasint"`
	IV    []byte `cbor:"5,keyasint"`
	Index uint64 `cbor:"-70310,keyasint"`
	Count uint64 `cbor:"-70311,keyasint"`
}

const algA256GCM = 3

// NewAEAD makes the AEAD of a key.
func NewAEAD(key []byte) (cipher.AEAD, error) {
	if len(key) != KeySize {
		return nil, errors.New("a key has 32 bytes")
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func pieceIV(i uint64) []byte { return binary.BigEndian.AppendUint64(make([]byte, 4, 12), i) }

// SealContent encrypts a module and its models under a fresh bundle key.
func SealContent(key, module []byte, models [][]byte) ([]byte, error) {
	aead, err := NewAEAD(key)
	if err != nil {
		return nil, fmt.Errorf("sealing a bundle: %w", err)
	}
	var plain []byte
	for _, part := range append([][]byte{module}, models...) {
		plain = appendBytes(plain, part)
	}
	count := (len(plain) + PieceSize - 1) / PieceSize
	var out []byte
	for i := range count {
		h := pieceHeader{Alg: algA256GCM, IV: pieceIV(uint64(i)), Index: uint64(i), Count: uint64(count)}
		piece, err := cose.SealEncrypt0(aead, h.IV, h, plain[i*PieceSize:min(len(plain), (i+1)*PieceSize)], nil)
		if err != nil {
			return nil, fmt.Errorf("sealing a bundle: %w", err)
		}
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(piece))), piece...)
	}
	return out, nil
}

// appendBytes appends a CBOR byte string (RFC 8949 §3.1), of any size.
func appendBytes(out, b []byte) []byte {
	return append(appendCBOR(out, 2, uint64(len(b))), b...)
}

// cutBytes takes a CBOR byte string of a known size from the front of b.
func cutBytes(b []byte, size int64) (part, rest []byte, err error) {
	rest, ok := bytes.CutPrefix(b, appendCBOR(nil, 2, uint64(size)))
	if !ok || int64(len(rest)) < size {
		return nil, nil, errors.New("a part is not of the size that the manifest says")
	}
	return rest[:size], rest[size:], nil
}

// OpenContent decrypts a bundle's content and checks it against its manifest.
func OpenContent(m Manifest, key, content []byte) (module []byte, models [][]byte, err error) {
	aead, err := NewAEAD(key)
	if err != nil {
		return nil, nil, fmt.Errorf("opening a bundle: %w", err)
	}
	plain := make([]byte, 0, len(content))
	count := uint64(0)
	for i := uint64(0); len(content) > 0; i++ {
		if len(content) < 4 || uint64(len(content)-4) < uint64(binary.BigEndian.Uint32(content)) {
			return nil, nil, errors.New("opening a bundle: a piece was cut off")
		}
		n := 4 + binary.BigEndian.Uint32(content)
		part, total, err := openPiece(aead, i, content[4:n])
		if err != nil {
			return nil, nil, fmt.Errorf("opening a bundle: piece %d: %w", i, err)
		}
		if i > 0 && total != count || i >= total {
			return nil, nil, fmt.Errorf("opening a bundle: piece %d is of another bundle", i)
		}
		count, plain, content = total, append(plain, part...), content[n:]
		if len(content) == 0 && i != total-1 {
			return nil, nil, errors.New("opening a bundle: pieces are missing")
		}
	}
	return splitContent(m, plain)
}

func openPiece(aead cipher.AEAD, i uint64, piece []byte) ([]byte, uint64, error) {
	msg, err := cose.ParseEncrypt0(piece)
	if err != nil {
		return nil, 0, err
	}
	var h pieceHeader
	if err := cose.Unmarshal(msg.Protected, &h); err != nil {
		return nil, 0, err
	}
	if h.Alg != algA256GCM || h.Index != i || !bytes.Equal(h.IV, pieceIV(i)) {
		return nil, 0, errors.New("its header is not of this place")
	}
	part, err := msg.Open(aead, h.IV, nil)
	return part, h.Count, err
}

func splitContent(m Manifest, plain []byte) (module []byte, models [][]byte, err error) {
	if module, plain, err = cutBytes(plain, m.ModuleSize); err != nil {
		return nil, nil, fmt.Errorf("opening a bundle: module: %w", err)
	}
	if sum := sha256.Sum256(module); !bytes.Equal(sum[:], m.Module) {
		return nil, nil, errors.New("opening a bundle: the module is not the one in the manifest")
	}
	for _, f := range m.Models {
		var model []byte
		if model, plain, err = cutBytes(plain, f.Size); err != nil {
			return nil, nil, fmt.Errorf("opening a bundle: model %s: %w", f.Name, err)
		}
		if sum := sha256.Sum256(model); !bytes.Equal(sum[:], f.Hash) {
			return nil, nil, fmt.Errorf("opening a bundle: model %s is not the one in the manifest", f.Name)
		}
		models = append(models, model)
	}
	if len(plain) > 0 {
		return nil, nil, errors.New("opening a bundle: there is more in it than the manifest says")
	}
	return module, models, nil
}

// sealedHeader is the protected header of secrets and requests: COSE_Encrypt
// {1: 3, -70312: what for, -70313: whose}.
type sealedHeader struct {
	Alg     int    `cbor:"1,keyasint"`
	Purpose string `cbor:"-70312,keyasint"`
	Context []byte `cbor:"-70313,keyasint"`
}

// Purposes of sealed secrets. Context is what binds them to their place.
const (
	PurposeBundle  = "bundle"  // the bundle key; context: CBOR [subject, instance, bundle id]
	PurposeMove    = "move"    // the keys of a move; context: CBOR [attempt, key id, target's nonce]
	PurposeRelease = "release" // the snapshot key; context: CBOR [attempt, head, target's nonce]
	PurposeRequest = "request" // an inference request; context: see Request
	PurposeResult  = "result"  // its result
)

// SealTo seals a secret to an HPKE key, as a COSE_Encrypt.
func SealTo(purpose string, context, secret []byte, to hpke.PublicKey) ([]byte, error) {
	h := sealedHeader{Alg: algA256GCM, Purpose: purpose, Context: context}
	msg, err := cose.SealEncrypt(h, secret, nil, to)
	if err != nil {
		return nil, fmt.Errorf("sealing a %s: %w", purpose, err)
	}
	return msg, nil
}

// OpenFrom opens what SealTo sealed, if it is for this purpose and context.
func OpenFrom(purpose string, context, msg []byte, key hpke.PrivateKey) ([]byte, error) {
	m, err := cose.ParseEncrypt(msg)
	if err != nil {
		return nil, fmt.Errorf("opening a %s: %w", purpose, err)
	}
	var h sealedHeader
	if err := cose.Unmarshal(m.Protected, &h); err != nil {
		return nil, fmt.Errorf("opening a %s: %w", purpose, err)
	}
	if h.Alg != algA256GCM || h.Purpose != purpose || !bytes.Equal(h.Context, context) {
		return nil, fmt.Errorf("opening a %s: it was sealed for something else", purpose)
	}
	secret, err := m.Open(key, nil)
	if err != nil {
		return nil, fmt.Errorf("opening a %s: %w", purpose, err)
	}
	return secret, nil
}

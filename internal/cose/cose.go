// Package cose is the one CBOR mode of the tree and the COSE messages (RFC 9052,
// RFC 9053) that are spelled in it: what is signed, authenticated or sealed
// anywhere in edgekeep is one of the byte formats below.
//
// # CBOR
//
// Core deterministic encoding, RFC 8949 §4.2.1: shortest integers, lengths and
// floats, map keys in bytewise order, no indefinite lengths. [Marshal] writes only
// that; [Unmarshal] reads only that, and only one spelling of each Go value:
//
//   - at most 1 MiB, 16 levels, 16,384 elements per array, 4,096 pairs per map;
//   - duplicate or misordered keys, invalid UTF-8, a NaN other than f97e00, a bignum
//     that would fit an integer, and bytes after the end are refused, also inside
//     the parts that a caller keeps as [Raw];
//   - unknown struct fields are refused, and what was read is encoded again and
//     compared. So null does not stand for an empty string, list or map (those are
//     40, 60, 80, a0 and never f6), an omitempty field is not present when empty,
//     and a float field holds a float, never an integer.
//
// # Messages
//
// Each message has a fixed shape. What differs from it by one byte is malformed.
// All lengths are in bytes.
//
//	COSE_Sign1_Tagged = #6.18([            ; Sign1, Verify1, Peek1
//	    protected: bstr .cbor {
//	        1: -7,                         ; alg: ES256, P-256 with SHA-256
//	        4: bstr .size 32,              ; kid: thumbprint of the signer's key
//	        16: typ },                     ; what the payload is (RFC 9596)
//	    unprotected: {},
//	    payload: bstr,
//	    signature: bstr .size 64 ])        ; r || s over Sig_structure, no external_aad
//
//	COSE_Mac0_Tagged = #6.17([             ; Mac0, VerifyMac0
//	    protected: bstr .cbor { 1: 5, 16: typ },  ; alg: HMAC 256/256
//	    unprotected: {},
//	    payload: bstr,
//	    tag: bstr .size 32 ])              ; over MAC_structure, no external_aad
//
//	COSE_Encrypt0_Tagged = #6.16([         ; SealEncrypt0, ParseEncrypt0
//	    protected: bstr .cbor content,
//	    unprotected: {},
//	    ciphertext: bstr ])                ; A256GCM, the 16 bytes of its tag last
//
//	COSE_Encrypt_Tagged = #6.96([          ; SealEncrypt, ParseEncrypt
//	    protected: bstr .cbor content,
//	    unprotected: { 5: bstr .size 12 }, ; IV, random
//	    ciphertext: bstr,                  ; A256GCM under a key used once
//	    recipients: [1*16 [
//	        protected: bstr .cbor {
//	            1: 35 / -65616,            ; alg: HPKE-0 / MLKEM768-P256, see below
//	            4: bstr .size 32 },        ; kid: HPKEKeyID of the recipient's key
//	        unprotected: { -4: bstr },     ; ek: HPKE encapsulated key, 65 or 1153
//	        ciphertext: bstr .size 48 ]]]) ; HPKE ciphertext of the 32-byte content key
//
//	typ = tstr                             ; "type/subtype", 3 to 128 visible ASCII
//	content = { 1: 3, * label => any }     ; alg: A256GCM, then the caller's labels;
//	label = int / tstr                     ; at most 23 pairs in all
//
// The additional data of A256GCM is Enc_structure (RFC 9052 §5.3), which covers the
// protected header and the caller's external data. Recipients are those of COSE-HPKE
// Key Encryption (draft-ietf-cose-hpke): HPKE base mode, empty HPKE aad, and as HPKE
// info the
//
//	Recipient_structure = [ "HPKE Recipient", 3, protected: bstr, h'' ]
//
// with the recipient's protected header, and 3 because the key is for A256GCM.
//
// HPKE does not say who sent a message, and a recipient can neither see whether the
// entries of the others are sound nor stop another recipient from sealing different
// content under the same key: whoever cares signs the whole message with [Sign1].
// ES256 signatures are not unique (anyone can turn s into n-s), so a message is
// identified by its payload, never by the hash of signature and all.
//
// # Keys
//
//	ec2 = { 1: 2, -1: 1, -2: x, -3: y }                 ; MarshalKey: P-256, ECDSA
//	hpke = { 1: 2, 3: 35, -1: 1, -2: x, -3: y }         ; MarshalHPKEKey: P-256
//	     / { 1: 7, 3: -65616, -1: bstr .size 1249 }     ; MLKEM768-P256, kty AKP
//	x = y = bstr .size 32                               ; on the curve, uncompressed
//
// A key is named by its thumbprint (RFC 9679): SHA-256 over ec2, without alg, for the
// first two; over the whole map for the third.
package cose

import "errors"

// ErrMalformed is wrapped by the error of every decoder of this package when its
// input is not spelled as the package says. A well-formed message that does not
// authenticate gets an error that does not wrap it.
var ErrMalformed = errors.New("malformed cbor")

// COSE algorithms (RFC 9053; draft-ietf-cose-hpke for the HPKE ones).
const (
	algES256   = -7
	algHMAC256 = 5
	algA256GCM = 3

	// AlgHPKE0 is HPKE-0: DHKEM(P-256, HKDF-SHA256), HKDF-SHA256, AES-128-GCM.
	AlgHPKE0 = 35
	// AlgHPKEHybrid is MLKEM768-P256 (KEM 0x0050), HKDF-SHA256, AES-256-GCM. The
	// number is of the private-use range, -65536 - 0x0050, until one is registered.
	AlgHPKEHybrid = -65616
)

// Sizes in bytes.
const (
	maxSize  = 1 << 20 // of any CBOR item and any message
	kidSize  = 32      // SHA-256
	tagSize  = 16      // AES-GCM
	ivSize   = 12      // AES-GCM
	cekSize  = 32      // A256GCM
	hmacSize = 32      // HMAC 256/256, key and tag
	sigSize  = 64      // ES256, r || s
)

// Package pack makes bundles of workloads. It reads a manifest and the files that
// it names, refuses a module whose state could not be captured, encrypts, and has
// the operator's key sign. It runs where a bundle is made and deployed, never on a
// gateway.
//
// # The manifest
//
// A TOML file, workload.toml unless another is named. Its keys are those of
// workload.Manifest; what a bundle is pinned by (hashes, sizes) is computed.
//
//	name, version, shape, module, args, commit ("250ms"), checkpoint (none)
//	[input]    format, streams (names of sources), batch (500), wait ("1s")
//	[output]   format
//	[limits]   memory, cpu, disk, output
//	[require]  assurance
//	[place]    nodes, moves
//	[[models]] name, file
//
// A size is a whole number and its unit without a space, "64KiB", of B, KiB, MiB
// and GiB. A time is what Go's time.ParseDuration takes, "500ms", in whole
// milliseconds; that of checkpoint in whole seconds. Files are named from the
// directory that is packed and lie in it. An unknown key is an error.
//
// # The bundle, a file NAME-VERSION.ekw
//
// Deterministic CBOR (RFC 8949 §4.2.1), so that a bundle has one spelling:
//
//	[1, manifest: bstr, content: bstr]
//
// 1 is the version of this format: a reader that does not know the number knows
// nothing about what follows. manifest is the signed manifest, at most MaxManifest
// bytes; content the blob that it names, encrypted, at most MaxBlocks·BlockSize
// (package message). Nothing follows. A bundle with the manifest "m" and the
// content "cc" would be
//
//	83 01  41 6d  42 63 63
//
// The key that opens the content is not in it.
package pack

import (
	"bytes"
	"crypto/ecdsa"
	"errors"
	"fmt"

	"edgekeep/internal/cose"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

// Sizes, in bytes.
const (
	// MaxManifest leaves room in a command's body for the key and the inputs.
	MaxManifest = message.MaxBody - 4<<10
	maxContent  = message.MaxBlocks * message.BlockSize
	// MaxFile is the size of the largest bundle's file.
	MaxFile = 2 + 5 + MaxManifest + 5 + maxContent
)

// Bundle is a packed workload.
type Bundle struct {
	Manifest []byte // signed
	Content  []byte // encrypted
}

// Major types of CBOR (RFC 8949 §3.1).
const (
	majorBytes = 2 << 5
	majorArray = 4 << 5
)

// formatVersion is the first item of a bundle.
const formatVersion = 1

// head is the head of a CBOR item.
func head(major byte, arg uint64) []byte { return cose.AppendHead(nil, major, arg) }

// Marshal is the bundle as a file.
func (b Bundle) Marshal() []byte {
	out := make([]byte, 0, len(b.Manifest)+len(b.Content)+16)
	out = append(out, head(majorArray, 3)...)
	out = append(out, head(0, formatVersion)...)
	for _, part := range [][]byte{b.Manifest, b.Content} {
		out = append(append(out, head(majorBytes, uint64(len(part)))...), part...)
	}
	return out
}

// Parse takes a bundle's file apart. Nothing in it is checked: see Open. The
// parts share memory with raw.
func Parse(raw []byte) (Bundle, error) {
	rest, ok := bytes.CutPrefix(raw, head(majorArray, 3))
	if !ok || len(rest) == 0 || rest[0] >= 24 { // the version is a small integer
		return Bundle{}, errors.New("this is no bundle: `edgekeep workload pack` makes one")
	}
	if rest[0] != formatVersion {
		return Bundle{}, fmt.Errorf("the bundle is of format %d, this program knows format %d: pack it again, or use a newer edgekeep", rest[0], formatVersion)
	}
	var b Bundle
	var err error
	if b.Manifest, rest, err = cut(rest[1:], MaxManifest); err != nil {
		return Bundle{}, fmt.Errorf("the bundle's manifest %w", err)
	}
	if b.Content, rest, err = cut(rest, maxContent); err != nil {
		return Bundle{}, fmt.Errorf("the bundle's content %w", err)
	}
	if len(rest) > 0 {
		return Bundle{}, errors.New("the bundle goes on after its end: the file is damaged, pack or fetch it again")
	}
	return b, nil
}

// cut takes a byte string of 1 to limit bytes from the front of b.
func cut(b []byte, limit uint64) (part, rest []byte, err error) {
	size, width, ok := argument(b)
	switch {
	case !ok || !bytes.HasPrefix(b, head(majorBytes, size)):
		return nil, nil, errors.New("is not where it has to be: the file is damaged, pack or fetch it again")
	case size == 0 || size > limit:
		return nil, nil, fmt.Errorf("has %d bytes, it must have 1 to %d", size, limit)
	case uint64(len(b)-width) < size:
		return nil, nil, errors.New("was cut off: the file is damaged, pack or fetch it again")
	}
	return b[width : width+int(size)], b[width+int(size):], nil
}

// argument reads the argument of a CBOR head, whose form it does not judge.
func argument(b []byte) (arg uint64, width int, ok bool) {
	if len(b) == 0 {
		return 0, 0, false
	}
	short := b[0] & 0x1f
	if short < 24 {
		return uint64(short), 1, true
	}
	width = 1 + 1<<(short-24)
	if short > 27 || len(b) < width {
		return 0, 0, false
	}
	for _, c := range b[1:width] {
		arg = arg<<8 | uint64(c)
	}
	return arg, width, true
}

// Open checks everything about a bundle that a gateway would: the operator's
// signature, that the content is the one in the manifest, and that this key opens
// it.
func (b Bundle) Open(operator *ecdsa.PublicKey, key []byte) (workload.Manifest, error) {
	m, err := workload.VerifyManifest(operator, b.Manifest)
	if err != nil {
		return m, fmt.Errorf("%w: was it packed with another kit's operator key?", err)
	}
	list, err := message.BlobList(b.Content)
	if err != nil {
		return m, err
	}
	if !bytes.Equal(message.BlobID(list), m.Content) || int64(len(b.Content)) != m.ContentSize {
		return m, errors.New("the bundle's content is not the one in its manifest: the file is damaged, pack or fetch it again")
	}
	if _, _, err := workload.OpenContent(m, key, b.Content); err != nil {
		return m, fmt.Errorf("%w: is the key that of this bundle?", err)
	}
	return m, nil
}

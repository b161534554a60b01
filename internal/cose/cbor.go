package cose

import (
	"bytes"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Raw is one encoded CBOR item, kept as it is. Unmarshal has checked that it is
// deterministic CBOR; what it means is checked when it is unmarshalled itself.
type Raw = cbor.RawMessage

var encMode = func() cbor.EncMode {
	opts := cbor.CoreDetEncOptions()
	// A nil slice is an empty one: null would be a second spelling of it.
	opts.NilContainers = cbor.NilContainerAsEmpty
	return must(opts.EncMode())
}()

var decMode = must(cbor.DecOptions{
	DupMapKey:         cbor.DupMapKeyEnforcedAPF,
	MaxNestedLevels:   16,
	MaxArrayElements:  16384,
	MaxMapPairs:       4096,
	IndefLength:       cbor.IndefLengthForbidden,
	ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	UTF8:              cbor.UTF8RejectInvalid,
	FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
}.DecMode())

func must[T any](v T, err error) T {
	if err != nil {
		panic("cose: " + err.Error())
	}
	return v
}

// Marshal encodes v in core deterministic CBOR (RFC 8949 §4.2.1). It fails when the
// result is not what Unmarshal would read: too large or too deep, a string that is
// not UTF-8, a Raw in another spelling.
func Marshal(v any) ([]byte, error) {
	data, err := encMode.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T as cbor: %w", v, err)
	}
	if err := check(data); err != nil {
		return nil, fmt.Errorf("encode %T as cbor: %w", v, err)
	}
	return data, nil
}

// MustMarshal is Marshal for values of our own fixed shape. It panics when v cannot be
// encoded, so v holds no string and no Raw that came from outside unchecked.
func MustMarshal(v any) []byte {
	return must(Marshal(v))
}

// Unmarshal decodes data, one item of at most 1 MiB in strict deterministic CBOR (see
// the package comment), into v, a pointer to a zero value. The error wraps ErrMalformed;
// what v points to is then undefined.
func Unmarshal(data []byte, v any) error {
	if err := check(data); err != nil {
		return err
	}
	if err := decMode.Unmarshal(data, v); err != nil {
		return malformed("decode %T: %v", v, err)
	}
	again, err := encMode.Marshal(v)
	if err != nil {
		return malformed("decode %T: encode it again: %v", v, err)
	}
	if !bytes.Equal(again, data) {
		return malformed("decode %T: not the one spelling of its value: it encodes to %d bytes that differ from the %d read at byte %d",
			v, len(again), len(data), firstDifference(again, data))
	}
	return nil
}

// check refuses data that is not one item of deterministic CBOR within the limits.
func check(data []byte) error {
	if len(data) > maxSize {
		return malformed("%d bytes, at most %d are read", len(data), maxSize)
	}
	if err := decMode.Wellformed(data); err != nil {
		return malformed("%v", err)
	}
	return checkCanonical(data)
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

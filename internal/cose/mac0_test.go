package cose

import (
	"bytes"
	"errors"
	"testing"
)

func TestMac0Golden(t *testing.T) {
	want, key := golden(t, "mac0.golden"), count(0x40, 32)
	got, err := Mac0(key, testTyp, []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
	payload, err := VerifyMac0(key, testTyp, want)
	if err != nil || string(payload) != "payload" {
		t.Errorf("VerifyMac0: %q, %v", payload, err)
	}
	everyFlip(t, want, func(msg []byte) bool {
		_, err := VerifyMac0(key, testTyp, msg)
		return err == nil
	})
	everyCut(t, want, func(msg []byte) error {
		_, err := VerifyMac0(key, testTyp, msg)
		return err
	})
}

func TestMac0Refuses(t *testing.T) {
	key := make([]byte, 32)
	msg, err := Mac0(key, testTyp, nil)
	if err != nil {
		t.Fatal(err)
	}
	if payload, err := VerifyMac0(key, testTyp, msg); err != nil || len(payload) != 0 {
		t.Fatalf("empty payload: %x, %v", payload, err)
	}
	for name, verify := range map[string]func() ([]byte, error){
		"other key": func() ([]byte, error) { return VerifyMac0(count(1, 32), testTyp, msg) },
		"other typ": func() ([]byte, error) { return VerifyMac0(key, "application/other", msg) },
		"short key": func() ([]byte, error) { return VerifyMac0(key[1:], testTyp, msg) },
		"no key":    func() ([]byte, error) { return VerifyMac0(nil, testTyp, msg) },
	} {
		if _, err := verify(); err == nil || errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want an error that is not ErrMalformed", name, err)
		}
	}
	for _, n := range []int{0, 16, 31, 33, 64} {
		if _, err := Mac0(make([]byte, n), testTyp, nil); err == nil {
			t.Errorf("authenticated with a key of %d bytes", n)
		}
	}
	if _, err := Mac0(key, testTyp, make([]byte, maxSize)); err == nil {
		t.Error("authenticated more than VerifyMac0 reads")
	}
}

// TestMac0RefusesForm authenticates headers that are not ours with the right key.
func TestMac0RefusesForm(t *testing.T) {
	key := make([]byte, 32)
	build := func(pairs map[any]any, tagSize int) []byte {
		protected := MustMarshal(pairs)
		msg := append(appendBytes([]byte{0xd1, 0x84}, protected), 0xa0, 0x40)
		return appendBytes(msg, mac0Tag(key, protected, nil)[:tagSize])
	}
	if _, err := VerifyMac0(key, testTyp, build(map[any]any{1: 5, 16: testTyp}, 32)); err != nil {
		t.Fatal(err)
	}
	for name, msg := range map[string][]byte{
		"HMAC 256/64":       build(map[any]any{1: 4, 16: testTyp}, 8),
		"alg of 256/64":     build(map[any]any{1: 4, 16: testTyp}, 32),
		"truncated tag":     build(map[any]any{1: 5, 16: testTyp}, 8),
		"no tag":            build(map[any]any{1: 5, 16: testTyp}, 0),
		"no typ":            build(map[any]any{1: 5}, 32),
		"typ with a escape": build(map[any]any{1: 5, 16: "a/\x1b"}, 32),
		"a kid":             build(map[any]any{1: 5, 4: []byte("k"), 16: testTyp}, 32),
	} {
		if _, err := VerifyMac0(key, testTyp, msg); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

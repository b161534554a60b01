package cose

import (
	"bytes"
	"errors"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// Each target holds a decoder to three promises: it does not panic, every refusal is
// ErrMalformed, and what it takes is spelled in the one way that the encoder writes.

func FuzzUnmarshal(f *testing.F) {
	for _, name := range []string{"sign1.golden", "mac0.golden", "encrypt0.golden", "encrypt.golden", "key.golden"} {
		f.Add(golden(f, name))
	}
	for _, in := range []string{"a60101024101036161 04f93c00 058101 06f6", "fb3ff199999999999a", "c249010000000000000000", "a2186400616100", "f97e00", "9f01ff"} {
		f.Add(unhex(f, in))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var raw Raw
		rawErr := Unmarshal(data, &raw)
		for _, v := range []any{&raw, new(any), new(item), new(contentHeader), new([]Raw), new(map[string]Raw), new(cbor.RawTag), new([]byte), new(string), new(float64)} {
			err := Unmarshal(data, v)
			if err != nil {
				if !errors.Is(err, ErrMalformed) {
					t.Fatalf("%T: %v is not ErrMalformed", v, err)
				}
				continue
			}
			if rawErr != nil {
				t.Fatalf("taken as %T, refused as an item: %v", v, rawErr)
			}
			if again, err := Marshal(v); err != nil || !bytes.Equal(again, data) {
				t.Fatalf("%T: written as %x, %v", v, again, err)
			}
		}
		compareWithLibrary(t, data, rawErr)
	})
}

// compareWithLibrary holds our check of the spelling against the library, which spells
// by encoding again what it decoded. Tags 0 and 1 and the tag 55799 do not survive that.
func compareWithLibrary(t *testing.T, data []byte, ours error) {
	t.Helper()
	var v any
	if err := decMode.Unmarshal(data, &v); err != nil {
		return // not well-formed, or nothing that Go can hold
	}
	again, err := encMode.Marshal(v)
	if err != nil {
		return
	}
	same := bytes.Equal(again, data)
	if same && ours != nil {
		t.Fatalf("the library spells it so too: %v", ours)
	}
	if !same && ours == nil && !bytes.ContainsAny(data, "\xc0\xc1\xd9") {
		t.Fatalf("the library spells it %x", again)
	}
}

func FuzzVerify1(f *testing.F) {
	key := &testKey(f, 1).PublicKey
	f.Add(golden(f, "sign1.golden"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		header, payload, err := Peek1(msg)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v is not ErrMalformed", err)
			}
			if _, err := Verify1(key, testTyp, msg); !errors.Is(err, ErrMalformed) {
				t.Fatalf("Verify1: %v, Peek1 says malformed", err)
			}
			return
		}
		again := appendBytes([]byte{0xd2, 0x84}, MustMarshal(sign1Header{Alg: algES256, KID: header.KID, Typ: header.Typ}))
		again = appendBytes(append(again, 0xa0), payload)
		again = appendBytes(again, msg[len(msg)-sigSize:])
		if !bytes.Equal(again, msg) {
			t.Fatalf("written as %x", again)
		}
		verified, err := Verify1(key, testTyp, msg)
		if errors.Is(err, ErrMalformed) {
			t.Fatalf("Peek1 takes it, but Verify1: %v", err)
		}
		if err == nil && string(verified) != "payload" {
			t.Fatalf("forged: %x", msg)
		}
	})
}

func FuzzVerifyMac0(f *testing.F) {
	key := count(0x40, 32)
	f.Add(golden(f, "mac0.golden"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		payload, err := VerifyMac0(key, testTyp, msg)
		if err != nil {
			return
		}
		if again, err := Mac0(key, testTyp, payload); err != nil || !bytes.Equal(again, msg) {
			t.Fatalf("written as %x, %v", again, err)
		}
	})
}

func FuzzParseEncrypt0(f *testing.F) {
	aead, nonce, aad := testGCM(f, count(0x60, 32)), count(0x80, 12), []byte("aad")
	f.Add(golden(f, "encrypt0.golden"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		m, err := ParseEncrypt0(msg)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v is not ErrMalformed", err)
			}
			return
		}
		again := append(appendBytes([]byte{0xd0, 0x83}, m.Protected), 0xa0)
		if again = appendBytes(again, m.Ciphertext); !bytes.Equal(again, msg) {
			t.Fatalf("written as %x", again)
		}
		if header, err := marshalContentHeader(Raw(m.Protected)); err != nil || !bytes.Equal(header, m.Protected) {
			t.Fatalf("header written as %x, %v", header, err)
		}
		if _, err := m.Open(aead, nonce, aad); err == nil && !bytes.Equal(msg, golden(t, "encrypt0.golden")) {
			t.Fatalf("forged: %x", msg)
		}
	})
}

func FuzzParseEncrypt(f *testing.F) {
	p256, hybrid := testHPKEKey(f, suiteP256, 0xa0), testHPKEKey(f, suiteHybrid, 0xc0)
	f.Add(golden(f, "encrypt.golden"))
	f.Add(must(SealEncrypt(contentHeader{Alg: 3}, nil, nil, p256.PublicKey())))
	f.Fuzz(func(t *testing.T, msg []byte) {
		m, err := ParseEncrypt(msg)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v is not ErrMalformed", err)
			}
			return
		}
		again := append(appendBytes([]byte{0xd8, 0x60, 0x84}, m.Protected), 0xa1, 5)
		again = appendHead(appendBytes(appendBytes(again, m.iv), m.ciphertext), majorArray, len(m.recipients))
		for i, rec := range m.recipients {
			again = appendBytes(append(again, 0x83), MustMarshal(recipientHeader{Alg: rec.alg, KID: m.KIDs[i]}))
			again = appendBytes(appendBytes(append(again, 0xa1, 0x23), rec.ek), rec.sealed)
		}
		if !bytes.Equal(again, msg) {
			t.Fatalf("written as %x", again)
		}
		m.Open(p256, []byte("aad"))
		m.Open(hybrid, []byte("aad"))
	})
}

func FuzzUnmarshalKey(f *testing.F) {
	f.Add(golden(f, "key.golden"))
	f.Add(golden(f, "hpkekey.golden"))
	f.Fuzz(func(t *testing.T, b []byte) {
		pub, err := UnmarshalKey(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v is not ErrMalformed", err)
			}
			return
		}
		if again := MarshalKey(pub); !bytes.Equal(again, b) {
			t.Fatalf("written as %x", again)
		}
	})
}

func FuzzUnmarshalHPKEKey(f *testing.F) {
	for _, name := range []string{"key.golden", "hpkekey.golden", "hybridkey.golden"} {
		f.Add(golden(f, name))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		pub, err := UnmarshalHPKEKey(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v is not ErrMalformed", err)
			}
			return
		}
		if again := MarshalHPKEKey(pub); !bytes.Equal(again, b) {
			t.Fatalf("written as %x", again)
		}
		HPKEKeyID(pub)
	})
}

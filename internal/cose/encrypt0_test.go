package cose

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"testing"
)

// contentHeader is a protected header as a caller has it: alg, its own use of the IV,
// and a label of its own.
type contentHeader struct {
	Alg int64  `cbor:"1,keyasint"`
	IV  []byte `cbor:"5,keyasint,omitempty"`
	Seq uint64 `cbor:"-70000,keyasint"`
}

func testGCM(t testing.TB, key []byte) cipher.AEAD {
	t.Helper()
	aead, err := newGCM(key)
	if err != nil {
		t.Fatal(err)
	}
	return aead
}

func TestEncrypt0Golden(t *testing.T) {
	want := golden(t, "encrypt0.golden")
	aead, nonce, aad := testGCM(t, count(0x60, 32)), count(0x80, 12), []byte("aad")
	got, err := SealEncrypt0(aead, nonce, contentHeader{Alg: 3, IV: nonce, Seq: 7}, []byte("plaintext"), aad)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
	everyFlip(t, want, func(msg []byte) bool {
		m, err := ParseEncrypt0(msg)
		if err != nil {
			return false
		}
		plaintext, err := m.Open(aead, nonce, aad)
		return err == nil && string(plaintext) == "plaintext"
	})
	everyCut(t, want, func(msg []byte) error {
		_, err := ParseEncrypt0(msg)
		return err
	})
	m, err := ParseEncrypt0(want)
	if err != nil {
		t.Fatal(err)
	}
	var header contentHeader
	if err := Unmarshal(m.Protected, &header); err != nil || header.Alg != 3 || !bytes.Equal(header.IV, nonce) || header.Seq != 7 {
		t.Errorf("protected header %+v, %v", header, err)
	}
}

func TestEncrypt0RoundTrip(t *testing.T) {
	aead, nonce := testGCM(t, count(0, 32)), count(0, 12)
	for _, size := range []int{0, 1, 7, 8, 239, 240, 65519, 65520, 65536, maxSize - 40} {
		plaintext := bytes.Repeat([]byte{0x5a}, size)
		msg, err := SealEncrypt0(aead, nonce, contentHeader{Alg: 3}, plaintext, nil)
		if err != nil {
			t.Fatal(err)
		}
		if spare := cap(msg) - len(msg); spare > 32+len(msg)/4 {
			t.Errorf("%d bytes: %d to spare, the buffer was made again", size, spare)
		}
		m, err := ParseEncrypt0(msg)
		if err != nil {
			t.Fatal(err)
		}
		got, err := m.Open(aead, nonce, nil)
		if err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%d bytes: opened %d, %v", size, len(got), err)
		}
		for name, open := range map[string]func() ([]byte, error){
			"other key":   func() ([]byte, error) { return m.Open(testGCM(t, count(1, 32)), nonce, nil) },
			"other nonce": func() ([]byte, error) { return m.Open(aead, count(1, 12), nil) },
			"other aad":   func() ([]byte, error) { return m.Open(aead, nonce, []byte{0}) },
			"short nonce": func() ([]byte, error) { return m.Open(aead, nonce[1:], nil) },
		} {
			if _, err := open(); err == nil || errors.Is(err, ErrMalformed) {
				t.Errorf("%d bytes, %s: %v, want an error that is not ErrMalformed", size, name, err)
			}
		}
	}
}

func TestSealEncrypt0Refuses(t *testing.T) {
	aead, nonce := testGCM(t, count(0, 32)), count(0, 12)
	block := must(aes.NewCipher(count(0, 32)))
	pairs := func(n int) map[int]int {
		m := map[int]int{1: 3}
		for i := range n - 1 {
			m[2+i] = 0
		}
		return m
	}
	if _, err := SealEncrypt0(aead, nonce, pairs(23), nil, nil); err != nil {
		t.Error(err)
	}
	for name, seal := range map[string]func() ([]byte, error){
		"short nonce": func() ([]byte, error) { return SealEncrypt0(aead, nonce[1:], contentHeader{Alg: 3}, nil, nil) },
		"no nonce":    func() ([]byte, error) { return SealEncrypt0(aead, nil, contentHeader{Alg: 3}, nil, nil) },
		"nonce of 16": func() ([]byte, error) {
			return SealEncrypt0(must(cipher.NewGCMWithNonceSize(block, 16)), count(0, 16), contentHeader{Alg: 3}, nil, nil)
		},
		"tag of 12": func() ([]byte, error) {
			return SealEncrypt0(must(cipher.NewGCMWithTagSize(block, 12)), nonce, contentHeader{Alg: 3}, nil, nil)
		},
		"no alg":   func() ([]byte, error) { return SealEncrypt0(aead, nonce, map[int]int{4: 3}, nil, nil) },
		"A128GCM":  func() ([]byte, error) { return SealEncrypt0(aead, nonce, contentHeader{Alg: 1}, nil, nil) },
		"label 0":  func() ([]byte, error) { return SealEncrypt0(aead, nonce, map[int]int{0: 0, 1: 3}, nil, nil) },
		"24 pairs": func() ([]byte, error) { return SealEncrypt0(aead, nonce, pairs(24), nil, nil) },
		// The head of 0x103 pairs, b90103, has the bytes of 1: 3 where a small map has them.
		"259 pairs":        func() ([]byte, error) { return SealEncrypt0(aead, nonce, pairs(259), nil, nil) },
		"array":            func() ([]byte, error) { return SealEncrypt0(aead, nonce, []int{1, 3}, nil, nil) },
		"empty map":        func() ([]byte, error) { return SealEncrypt0(aead, nonce, struct{}{}, nil, nil) },
		"nil":              func() ([]byte, error) { return SealEncrypt0(aead, nonce, nil, nil, nil) },
		"cannot be header": func() ([]byte, error) { return SealEncrypt0(aead, nonce, make(chan int), nil, nil) },
		"too large": func() ([]byte, error) {
			return SealEncrypt0(aead, nonce, contentHeader{Alg: 3}, make([]byte, maxSize), nil)
		},
	} {
		if msg, err := seal(); err == nil {
			t.Errorf("%s: sealed %x", name, msg)
		}
	}
}

func TestParseEncrypt0Refuses(t *testing.T) {
	build := func(protected, unprotected []byte, ciphertext int) []byte {
		msg := append(appendBytes([]byte{0xd0, 0x83}, protected), unprotected...)
		return appendBytes(msg, make([]byte, ciphertext))
	}
	if _, err := ParseEncrypt0(build([]byte{0xa1, 1, 3}, []byte{0xa0}, 16)); err != nil {
		t.Fatal(err)
	}
	for name, msg := range map[string][]byte{
		"no header":            build(nil, []byte{0xa0}, 16),
		"empty header":         build([]byte{0xa0}, []byte{0xa0}, 16),
		"header cut short":     build([]byte{0xa2, 1, 3}, []byte{0xa0}, 16),
		"header goes on":       build([]byte{0xa1, 1, 3, 0}, []byte{0xa0}, 16),
		"alg in long form":     build([]byte{0xa1, 1, 0x18, 3}, []byte{0xa0}, 16),
		"duplicate alg":        build([]byte{0xa2, 1, 3, 1, 3}, []byte{0xa0}, 16),
		"labels misordered":    build([]byte{0xa3, 1, 3, 5, 0x40, 4, 0x40}, []byte{0xa0}, 16),
		"A128GCM":              build([]byte{0xa1, 1, 1}, []byte{0xa0}, 16),
		"unprotected iv":       build([]byte{0xa1, 1, 3}, []byte{0xa1, 5, 0x40}, 16),
		"unprotected as array": build([]byte{0xa1, 1, 3}, []byte{0x80}, 16),
		"shorter than its tag": build([]byte{0xa1, 1, 3}, []byte{0xa0}, 15),
		"too large":            build([]byte{0xa1, 1, 3}, []byte{0xa0}, maxSize),
		"no tag":               build([]byte{0xa1, 1, 3}, []byte{0xa0}, 16)[1:],
		"detached":             {0xd0, 0x83, 0x43, 0xa1, 1, 3, 0xa0, 0xf6},
	} {
		if _, err := ParseEncrypt0(msg); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

func BenchmarkSealEncrypt0(b *testing.B) {
	aead, nonce, plaintext := testGCM(b, count(0, 32)), count(0, 12), make([]byte, 64<<10)
	b.SetBytes(int64(len(plaintext)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := SealEncrypt0(aead, nonce, contentHeader{Alg: 3, Seq: 1}, plaintext, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenEncrypt0(b *testing.B) {
	aead, nonce, plaintext := testGCM(b, count(0, 32)), count(0, 12), make([]byte, 64<<10)
	msg := must(SealEncrypt0(aead, nonce, contentHeader{Alg: 3, Seq: 1}, plaintext, nil))
	b.SetBytes(int64(len(plaintext)))
	b.ReportAllocs()
	for b.Loop() {
		m, err := ParseEncrypt0(msg)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := m.Open(aead, nonce, nil); err != nil {
			b.Fatal(err)
		}
	}
}

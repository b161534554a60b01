package swtpm

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestReadResponse(t *testing.T) {
	good := []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0, 7, 8}
	for _, c := range []struct {
		name string
		in   []byte
		ok   bool
	}{
		{"whole", good, true},
		{"more follows", append(bytes.Clone(good), 9), true},
		{"empty", nil, false},
		{"header cut", good[:9], false},
		{"body cut", good[:11], false},
		{"size below the header", []byte{0x80, 1, 0, 0, 0, 9, 0, 0, 0, 0}, false},
		{"size above the limit", []byte{0x80, 1, 0, 0, 16, 1, 0, 0, 0, 0}, false},
		{"size at the top", []byte{0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, false},
	} {
		got, err := readResponse(bytes.NewReader(c.in))
		if (err == nil) != c.ok || (c.ok && !bytes.Equal(got, good)) {
			t.Errorf("%s: %x, %v", c.name, got, err)
		}
	}
}

func TestRetry(t *testing.T) {
	retry := []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0x09, 0x22}
	good := []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0}
	stream := &script{answers: bytes.NewReader(append(append(bytes.Clone(retry), retry...), good...))}
	got, err := (&conn{stream}).Send([]byte("command"))
	if err != nil || !bytes.Equal(got, good) {
		t.Errorf("%x, %v", got, err)
	}
	if got := string(stream.sent); got != "commandcommandcommand" {
		t.Errorf("sent %q, want the command three times", got)
	}
}

// script is a TPM that answers from a list.
type script struct {
	answers *bytes.Reader
	sent    []byte
}

func (s *script) Read(p []byte) (int, error) { return s.answers.Read(p) }
func (s *script) Write(p []byte) (int, error) {
	s.sent = append(s.sent, p...)
	return len(p), nil
}

func FuzzReadResponse(f *testing.F) {
	f.Add([]byte{0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0, 7, 8})
	f.Add([]byte{0x80, 1, 0, 0, 0, 10, 0, 0, 9, 0x22})
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := readResponse(bytes.NewReader(in))
		if err != nil {
			return
		}
		if !bytes.HasPrefix(in, got) || int(binary.BigEndian.Uint32(got[2:])) != len(got) {
			t.Errorf("read %x from %x", got, in)
		}
	})
}

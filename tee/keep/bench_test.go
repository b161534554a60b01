package keep

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"testing"
	"time"

	"edgekeep/sealing"
	"edgekeep/sensors"
)

// benchSealer is a sealer in an epoch, with readings that fill a batch of about
// 64 KiB of SenML.
func benchSealer(b *testing.B) (*sealer, *source, sealing.Pack, int) {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	data, err := hpke.MLKEM768P256().GenerateKey()
	if err != nil {
		b.Fatal(err)
	}
	s := newSealer(Config{Sources: []SourceConfig{{Name: "s", UID: 1, Freshness: time.Hour, Rate: 1}}, Flush: time.Hour}, key)
	s.begin(beginning{subject: "acme/gw1", data: data.PublicKey(), epoch: sealing.NewEpoch(1, [8]byte{})})
	var pack sealing.Pack
	for i := 0; pack.Size() < maxContent; i++ {
		pack.Add(sealing.Reading{Name: sealing.Name("machine", nil, "temperature"), Unit: "Cel", Time: int64(i) * 1e8, Value: 70 + float64(i)/1000})
	}
	return s, s.sources[1], pack, len(pack.Marshal())
}

// BenchmarkSeal compares a batch through the keep (encoding as SenML, sealing,
// hash chain, signed checkpoint, chunk) with AES-256-GCM and SHA-256 over the
// same bytes.
func BenchmarkSeal(b *testing.B) {
	s, src, pack, size := benchSealer(b)
	b.Run("keep", func(b *testing.B) {
		b.SetBytes(int64(size))
		for b.Loop() {
			src.pack = pack
			s.flush(src)
			s.confirm(s.tickets)
		}
	})
	b.Run("bare", func(b *testing.B) {
		block, err := aes.NewCipher(make([]byte, 32))
		if err != nil {
			b.Fatal(err)
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			b.Fatal(err)
		}
		content, out, nonce := make([]byte, size), make([]byte, 0, size+16), make([]byte, 12)
		b.SetBytes(int64(size))
		for b.Loop() {
			sha256.Sum256(aead.Seal(out, nonce, content, nil))
		}
	})
}

// BenchmarkIngest is the way of a line through parser and batch, without sealing.
func BenchmarkIngest(b *testing.B) {
	line := []byte("machine,unit=Cel temperature=70.123,vibration=0.1 1700000000000000000")
	for b.Loop() {
		if _, err := sensors.ParseLine(line); err != nil {
			b.Fatal(err)
		}
	}
}

package keep

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"edgekeep/sealing"
	"edgekeep/sensors"
)

// worstLines are lines of at most sensors.MaxLine bytes that make much SenML.
func worstLines() map[string]string {
	unit := strings.Repeat("U", maxUnit)
	fields := func(head string, n int, name func(i int) string) string {
		var b strings.Builder
		b.WriteString(head)
		for i := range n {
			f := name(i)
			if b.Len()+len(f)+6 > sensors.MaxLine {
				break
			}
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(f + "=.1")
		}
		return b.String()
	}
	long := func(n int) func(int) string { // names that escaping triples
		return func(i int) string { return strings.Repeat("!", n) + string(rune('a'+i%26)) + string(rune('a'+i/26)) }
	}
	var tags strings.Builder
	for i := range 60 {
		fmt.Fprintf(&tags, ",%s%d=%s", strings.Repeat("!", 60), i, strings.Repeat("!", 60))
	}
	return map[string]string{
		"many fields":        fields("m,unit="+unit+" ", 256, long(26)),
		"few long fields":    fields("m,unit="+unit+" ", 30, long(250)),
		"one name":           fields("m,unit="+unit+" ", 1, long(8000)),
		"a long measurement": strings.Repeat("!", 8100) + " v=1",
		"many tags":          "m" + tags.String() + " v=1",
		"many short fields":  fields("m,unit="+unit+" ", 256, long(0)),
		"a long string":      `m v="` + strings.Repeat("é", 4000) + `"`,
	}
}

func TestLargestChunk(t *testing.T) {
	for name, text := range worstLines() {
		for _, compress := range []bool{false, true} {
			cfg := sealerConfig()
			cfg.Compress = compress
			s := testSealer(t, cfg)
			c := connect(s, 1, strings.Repeat("s", 32))
			src := s.sources[1]
			for src.seq%sealing.KeyEvery != 0 { // a chunk that carries the stream key
				line(t, c, 0, "m v=1i")
				s.flushAll()
			}
			s.chunks(t, s.tickets, s.tickets)
			p := must(sensors.ParseLine([]byte(text)))(t)
			for src.pack.Size() < maxContent-40 { // as full as it may be without being sealed
				line(t, c, 0, fmt.Sprintf("m v=\"%x\" 1", random(min(300, (maxContent-src.pack.Size())/2-10))))
			}
			for src.pack.Size() < maxContent-16 {
				line(t, c, 0, "m v=1i 1")
			}
			before := src.pack.Size()
			s.add(c, p, 1<<62)
			added := src.pack.Size() - before
			if before >= maxContent || added <= 0 {
				t.Fatalf("%s: %d and %d", name, before, added)
			}
			line(t, c, 0, "m v=1i") // seals it
			got := s.chunks(t, 0, 0)
			if len(got) != 1 || len(got[0].Data) > sealing.MaxChunk || src.pack.Readings() != 1 {
				t.Fatalf("%s: %d chunks", name, len(got))
			}
			if added > 37<<10 {
				t.Errorf("%s: the line adds %d bytes, more than 37 KiB", name, added)
			}
			t.Logf("%-20s %v: line %d, adds %d, chunk %d of %d", name, compress, len(text), added, len(got[0].Data), sealing.MaxChunk)
			if _, _, err := sealing.ParseChunk(got[0].Data); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// Random lines of the largest size: none breaks the bound.
func TestLargestChunkRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	worst := 0
	for range 300 {
		p := sensors.Point{Measurement: strings.Repeat("!", 1+r.IntN(300)), HasTime: true, Time: -r.Int64()}
		if r.IntN(4) > 0 {
			p.Tags = append(p.Tags, sensors.Tag{Key: "unit", Value: strings.Repeat("°", r.IntN(16)+1)})
		}
		nameLen, n := 1+r.IntN(80), 1+r.IntN(256)
		for i := range n {
			p.Fields = append(p.Fields, sensors.Field{Name: strings.Repeat("/", r.IntN(nameLen)) + fmt.Sprint(i), Value: []any{r.Float64(), r.Int64(), true, "s"}[r.IntN(4)]})
			if len(p.AppendLine(nil)) == 0 {
				p.Fields = p.Fields[:i]
				break
			}
		}
		if _, err := sensors.ParseLine(p.AppendLine(nil)); err != nil {
			continue // nothing was left of it
		}
		s := testSealer(t, sealerConfig())
		src := s.sources[1]
		s.add(connect(s, 1, ""), p, 0)
		worst = max(worst, src.pack.Size())
	}
	t.Logf("the largest adds %d bytes", worst)
	if worst > 37<<10 || worst < 20<<10 {
		t.Errorf("the largest line adds %d bytes", worst)
	}
}

func TestUnit(t *testing.T) {
	s := testSealer(t, sealerConfig())
	c := connect(s, 1, "")
	line(t, c, 0, "m,unit=Cel,room=a v=1.5,w=2i 7")
	line(t, c, 0, "m,unit="+strings.Repeat("u", maxUnit+1)+" v=true 7")
	line(t, c, 0, "m v=1u 7")
	s.flushAll()
	got := s.chunks(t, 0, 0)
	src := s.sources[1]
	chunk, _, err := sealing.ParseChunk(got[0].Data)
	if err != nil {
		t.Fatal(err)
	}
	_, readings, err := sealing.OpenRecord(src.aead, chunk.Records[0])
	want := []sealing.Reading{
		{Name: "m/room.a/v", Unit: "Cel", Time: 7, Value: 1.5},
		{Name: "m/room.a/w", Unit: "Cel", Time: 7, Value: int64(2)},
		{Name: "m/unit." + strings.Repeat("u", maxUnit+1) + "/v", Time: 7, Value: true},
		{Name: "m/v", Time: 7, Value: int64(1)},
	}
	if err != nil || !slices.Equal(readings, want) {
		t.Errorf("%+v, %v", readings, err)
	}
}

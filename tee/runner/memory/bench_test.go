package memory

import (
	"fmt"
	"os"
	"testing"

	"github.com/tetratelabs/wazero"
)

// BenchmarkDirty is one look at memory that is all present, of which 8 pages
// changed. -benchtime 20x is enough.
func BenchmarkDirty(b *testing.B) {
	for _, p := range available(b) {
		for _, scan := range []bool{true, false} {
			for _, size := range []int{4 * mib, 64 * mib, 256 * mib} {
				b.Run(fmt.Sprintf("%v/scan=%v/%dMiB", p, scan, size/mib), func(b *testing.B) {
					m := with(b, p, uint64(size))
					defer m.Free()
					tr := mustTrack(b, m, scan)
					mem := m.Reallocate(uint64(size))
					for i := 0; i < size; i += os.Getpagesize() {
						mem[i] = 1
					}
					if _, err := dirty(tr); err != nil {
						b.Fatal(err)
					}
					for b.Loop() {
						for i := range 8 {
							mem[i*size/8]++
						}
						if got, err := dirty(tr); err != nil || len(got) != 8 {
							b.Fatal(got, err)
						}
					}
				})
			}
		}
	}
}

// BenchmarkGuestStores is one call of a guest that stores a byte 262,144 times
// in as many bytes as named, 64 apart, with a look after each call or without a
// tracker. The fewer pages, the less tracking costs: it is paid per page.
func BenchmarkGuestStores(b *testing.B) {
	for _, p := range available(b) {
		for _, span := range []int{mib / 4, 16 * mib} {
			for _, tracked := range []bool{false, true} {
				b.Run(fmt.Sprintf("%v/%dKiB/tracked=%v", p, span>>10, tracked), func(b *testing.B) {
					benchmarkStores(b, with(b, p, 32*mib), span, tracked)
				})
			}
		}
	}
}

func benchmarkStores(b *testing.B, m *Memory, span int, tracked bool) {
	var tr *Tracker
	if tracked {
		tr = mustTrack(b, m, true)
	}
	g := startGuest(b, wazero.NewRuntimeConfig(), m)
	g.call("grow", 256)
	call := func() {
		for range 16 * mib / span {
			g.call("fill", 0, span/64, 64)
		}
		if tr == nil {
			return
		}
		if _, err := dirty(tr); err != nil {
			b.Fatal(err)
		}
	}
	call()
	for b.Loop() {
		call()
	}
}

// BenchmarkFirstTouch is what a page costs when it is written the first time.
func BenchmarkFirstTouch(b *testing.B) {
	for _, p := range available(b) {
		b.Run(p.String(), func(b *testing.B) {
			for b.Loop() {
				m := with(b, p, 4*mib)
				mem := m.Reallocate(4 * mib)
				for i := 0; i < len(mem); i += os.Getpagesize() {
					mem[i] = 1
				}
				m.Free()
			}
		})
	}
}

package durable

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkAppend compares groups of 256-byte entries with the least that they
// can cost: one write and one fdatasync of as many bytes.
func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{1, 16, 128} {
		entries := make([][]byte, n)
		for i := range entries {
			entries[i] = make([]byte, 256)
		}
		b.Run(fmt.Sprintf("log/%d", n), func(b *testing.B) {
			l := mustOpen(b, b.TempDir(), Options{MaxBytes: 1 << 40})
			defer l.Close()
			for b.Loop() {
				if _, err := l.Append(context.Background(), entries...); err != nil {
					b.Fatal(err)
				}
				if l.Bytes() > 256<<20 {
					if err := l.Trim(l.Next() - 1); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
		b.Run(fmt.Sprintf("bare/%d", n), func(b *testing.B) {
			f, err := os.Create(filepath.Join(b.TempDir(), "bare"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			group := make([]byte, groupLen(entries...))
			for b.Loop() {
				if _, err := f.Write(group); err != nil {
					b.Fatal(err)
				}
				if err := fdatasync(f); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

// BenchmarkConcurrentAppend has 64 callers of one entry each.
func BenchmarkConcurrentAppend(b *testing.B) {
	l := mustOpen(b, b.TempDir(), Options{MaxBytes: 1 << 40})
	defer l.Close()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := l.Append(context.Background(), make([]byte, 256)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}

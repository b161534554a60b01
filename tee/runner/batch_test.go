package runner

import (
	"testing"

	"pgregory.net/rapid"

	"edgekeep/sealing"
	"edgekeep/workload"
)

// TestBatchesTakeEachReadingOnce: records of any size, batches of any size, inputs
// mixed, and a restart from the cursors after any batch: each reading of an input
// is in one batch, in order.
func TestBatchesTakeEachReadingOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		inputs := rapid.IntRange(1, 3).Draw(t, "inputs")
		streams := make([][]record, inputs)
		want := make([]int, inputs)
		for i := range streams {
			for k, n := range rapid.SliceOfN(rapid.IntRange(0, 9), 1, 8).Draw(t, "records") {
				r := record{input: i, cursor: workload.Cursor{Seq: uint64(k) + 1}}
				for range n {
					r.readings = append(r.readings, sealing.Reading{Value: int64(i*1000 + want[i])})
					want[i]++
				}
				streams[i] = append(streams[i], r)
			}
		}
		cursors := make([]workload.Cursor, inputs)
		got, fed := make([]int, inputs), make([]int, inputs)
		s := &session{cursors: cursors, manifest: workload.Manifest{Input: workload.Input{Batch: uint64(rapid.IntRange(1, 12).Draw(t, "batch"))}}}
		for {
			more := false
			for i := range streams {
				for n := rapid.IntRange(0, 3).Draw(t, "feed"); n > 0 && fed[i] < len(streams[i]); n-- {
					s.enqueue(streams[i][fed[i]])
					fed[i]++
				}
				more = more || fed[i] < len(streams[i])
			}
			if !more && len(s.queue) == 0 {
				break
			}
			readings, after := s.take()
			if len(readings) > int(s.manifest.Input.Batch) {
				t.Fatalf("a batch of %d", len(readings))
			}
			if rapid.IntRange(0, 3).Draw(t, "killed") == 0 { // before the commit, or after the one before
				again := &session{cursors: s.cursors, manifest: s.manifest}
				for i := range fed {
					fed[i] = int(s.cursors[i].Seq)
				}
				s = again
				continue
			}
			s.cursors = after
			for _, r := range readings {
				v := int(r.Value.(int64))
				if i := v / 1000; got[i] == v%1000 {
					got[i]++
				} else {
					t.Fatalf("reading %d came twice, or out of order: %v so far", v, got)
				}
			}
			left := 0
			for i, r := range s.queue {
				left += len(r.readings)
				if i == 0 {
					left -= int(s.cursors[r.input].Skip)
				}
			}
			if inputs == 1 && s.waiting != left {
				t.Fatalf("%d wait, it says %d", left, s.waiting)
			}
		}
		total, sum := 0, 0
		for i := range want {
			total, sum = total+want[i], sum+got[i]
		}
		if total != sum {
			t.Fatalf("%d readings, %d were taken", total, sum)
		}
	})
}

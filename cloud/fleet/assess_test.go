package fleet

import (
	"bytes"
	"fmt"
	"testing"

	"edgekeep/sealing"
)

func hash(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

// ep is an epoch's id; twins share a counter value and differ in their random bytes.
func ep(counter uint64, twin ...byte) sealing.Epoch {
	return sealing.NewEpoch(counter, [8]byte(append(twin, make([]byte, 8-len(twin))...)))
}

// at is a chunk from record first to record last.
func at(e sealing.Epoch, first, last uint64, prev, head byte, before *sealing.Before) sealing.Position {
	p := sealing.Position{Checkpoint: sealing.Checkpoint{Subject: "acme/gw1", Stream: "s", Epoch: e, Seq: last, Head: hash(head)}}
	p.First = sealing.Header{Stream: "s", Epoch: e, Seq: first, Prev: hash(prev), Before: before}
	return p
}

func before(e sealing.Epoch, count uint64, head byte) *sealing.Before {
	return &sealing.Before{Epoch: e, Count: count, Head: hash(head)}
}

// putBack is the word of a keep that was shown the end of an earlier epoch only.
func putBack(e, shown sealing.Epoch) *sealing.Before {
	return &sealing.Before{Epoch: e, Head: shown[:]}
}

// unknown is the word of a keep that was not shown where the epoch before ended.
func unknown(e sealing.Epoch) *sealing.Before { return &sealing.Before{Epoch: e} }

func TestAssess(t *testing.T) {
	// The store ends with record 9 of epoch 5, whose hash is 0x99.
	stands := head{found: true, last: at(ep(5), 5, 9, 4, 0x99, nil).Checkpoint}
	empty := head{}
	tests := []struct {
		name    string
		store   head
		chunk   sealing.Position
		lost    bool // the gateway says that this chunk is the oldest it has
		verdict int
		finding string
	}{
		{"first of all", empty, at(ep(5), 0, 3, 0, 1, nil), false, next, ""},
		{"first of all, said to be the oldest", empty, at(ep(5), 0, 3, 0, 1, nil), true, next, ""},
		{"begins in the middle", empty, at(ep(5), 4, 6, 3, 1, nil), false, wait, ""},
		{"begins in the middle, the rest is lost", empty, at(ep(5), 4, 6, 3, 1, nil), true, next, gap},
		{"an epoch before of which nothing is here", empty, at(ep(5), 0, 3, 0, 1, before(ep(4), 7, 8)), false, wait, ""},
		{"an epoch before that is lost", empty, at(ep(5), 0, 3, 0, 1, before(ep(4), 7, 8)), true, next, gap},
		{"an epoch before of which the keep knows nothing", empty, at(ep(5), 0, 3, 0, 1, unknown(ep(4))), false, wait, ""},
		{"an epoch before of which nobody knows anything", empty, at(ep(5), 0, 3, 0, 1, unknown(ep(4))), true, next, gap},

		{"what comes next", stands, at(ep(5), 10, 12, 0x99, 1, nil), false, next, ""},
		{"what comes next, said to be the oldest", stands, at(ep(5), 10, 12, 0x99, 1, nil), true, next, ""},
		{"the newest again", stands, at(ep(5), 5, 9, 4, 0x99, nil), false, stored, ""},
		{"an older one", stands, at(ep(5), 0, 3, 0, 1, nil), false, stored, ""},
		{"other data in a place that is taken", stands, at(ep(5), 5, 9, 4, 0x77, nil), false, stored, ""},
		{"too early", stands, at(ep(5), 11, 12, 1, 2, nil), false, wait, ""},
		{"what is between is lost", stands, at(ep(5), 11, 12, 1, 2, nil), true, next, gap},
		{"follows another record", stands, at(ep(5), 10, 12, 0x77, 1, nil), false, aside, fork},
		{"follows another record, said to be the oldest", stands, at(ep(5), 10, 12, 0x77, 1, nil), true, aside, fork},
		{"overlaps", stands, at(ep(5), 9, 12, 8, 1, nil), false, aside, fork},
		{"overlaps everything", stands, at(ep(5), 0, 12, 0, 1, nil), true, aside, fork},

		{"an earlier epoch", stands, at(ep(4), 0, 99, 0, 1, nil), false, stored, ""},
		{"an earlier epoch, said to be the oldest", stands, at(ep(4), 3, 99, 0, 1, nil), true, stored, ""},
		{"another epoch of the same counter value", stands, at(ep(5, 1), 0, 3, 0, 1, before(ep(5), 10, 0x99)), false, aside, fork},
		{"another epoch of the same counter value, said to be the oldest", stands, at(ep(5, 1), 0, 3, 0, 1, nil), true, aside, fork},

		{"the next epoch", stands, at(ep(6), 0, 3, 0, 1, before(ep(5), 10, 0x99)), false, next, ""},
		{"an epoch after silent ones", stands, at(ep(60), 0, 3, 0, 1, before(ep(5), 10, 0x99)), false, next, ""},
		{"the next epoch begins too late", stands, at(ep(6), 4, 6, 0, 1, nil), false, wait, ""},
		{"the next epoch's beginning is lost", stands, at(ep(6), 4, 6, 0, 1, nil), true, next, gap},
		{"the end of the epoch before may still come", stands, at(ep(6), 0, 3, 0, 1, before(ep(5), 11, 1)), false, wait, ""},
		{"the end of the epoch before is lost", stands, at(ep(6), 0, 3, 0, 1, before(ep(5), 11, 1)), true, next, gap},
		{"a whole epoch may still come", stands, at(ep(7), 0, 3, 0, 1, before(ep(6), 1, 1)), false, wait, ""},
		{"a whole epoch is lost", stands, at(ep(7), 0, 3, 0, 1, before(ep(6), 1, 1)), true, next, gap},
		{"a whole epoch of unknown size may still come", stands, at(ep(7), 0, 3, 0, 1, unknown(ep(6))), false, wait, ""},
		{"a whole epoch of unknown size is lost", stands, at(ep(7), 0, 3, 0, 1, unknown(ep(6))), true, next, gap},
		{"the keep was not shown the end, which may still come", stands, at(ep(6), 0, 3, 0, 1, unknown(ep(5))), false, wait, ""},
		{"the keep was not shown the end, and nothing more will come", stands, at(ep(6), 0, 3, 0, 1, unknown(ep(5))), true, next, gap},
		{"the spool was put back, and the end may still come", stands, at(ep(6), 0, 3, 0, 1, putBack(ep(5), ep(4))), false, wait, ""},
		{"the spool was put back, and nothing more will come", stands, at(ep(6), 0, 3, 0, 1, putBack(ep(5), ep(4))), true, next, rollback},
		{"the spool was put back, a whole epoch may still come", stands, at(ep(7), 0, 3, 0, 1, putBack(ep(6), ep(5))), false, wait, ""},
		{"the spool was put back, a whole epoch is lost", stands, at(ep(7), 0, 3, 0, 1, putBack(ep(6), ep(5))), true, next, gap},
		{"the keep knows less than is stored", stands, at(ep(6), 0, 3, 0, 1, before(ep(5), 7, 6)), false, next, rollback},
		{"the keep knows of an earlier epoch only", stands, at(ep(6), 0, 3, 0, 1, before(ep(4), 2, 1)), false, next, rollback},
		{"the keep knows of no data at all", stands, at(ep(6), 0, 3, 0, 1, nil), false, next, rollback},
		{"the epoch before ended otherwise", stands, at(ep(6), 0, 3, 0, 1, before(ep(5), 10, 0x77)), false, next, fork},
		{"the epoch before is a twin of the one stored", stands, at(ep(6), 0, 3, 0, 1, before(ep(5, 1), 10, 0x99)), false, next, fork},
	}
	for _, x := range tests {
		t.Run(x.name, func(t *testing.T) {
			// Words that say nothing of this chunk change nothing.
			other := x.chunk.Checkpoint
			other.Seq++
			otherHead, otherEpoch := x.chunk.Checkpoint, x.chunk.Checkpoint
			otherHead.Head, otherEpoch.Epoch = hash(0xee), ep(1000)
			words := []sealing.Checkpoint{{}, other, otherHead, otherEpoch}
			if x.lost {
				words = []sealing.Checkpoint{x.chunk.Checkpoint}
			}
			for _, w := range words {
				p := assess(x.store, x.chunk, w)
				if p.verdict != x.verdict || p.finding != x.finding {
					t.Errorf("with the word %d/%d: got %d, finding %q (%s), want %d, %q", w.Epoch.Counter(), w.Seq, p.verdict, p.finding, p.detail, x.verdict, x.finding)
				}
				if (p.finding != "" || p.verdict == wait) && p.detail == "" {
					t.Error("it does not say why")
				}
			}
		})
	}
}

// Every chunk in a small world is assessed: what is stored without a finding
// follows exactly what is stored.
func TestAssessNeverStoresOutOfChainSilently(t *testing.T) {
	epochs := []sealing.Epoch{ep(1), ep(2), ep(2, 1), ep(3)}
	var befores []*sealing.Before
	for _, e := range epochs {
		befores = append(befores, unknown(e), putBack(e, ep(1)))
		for n := range uint64(4) {
			befores = append(befores, before(e, n, 0x11), before(e, n, 0x22))
		}
	}
	befores = append(befores, nil)
	stores := []head{{}}
	for _, e := range epochs {
		for seq := range uint64(3) {
			stores = append(stores, head{found: true, last: at(e, 0, seq, 0, 0x11, nil).Checkpoint})
		}
	}
	n, silent := 0, 0
	for _, h := range stores {
		for _, e := range epochs {
			for first := range uint64(4) {
				for _, b := range befores {
					if first > 0 && b != nil {
						continue // ParseRecord refuses it
					}
					for last := first; last < 5; last++ {
						for _, prev := range []byte{0x11, 0x22} {
							c := at(e, first, last, prev, 0x33, b)
							for _, o := range []sealing.Checkpoint{{}, c.Checkpoint} {
								n++
								p := assess(h, c, o)
								if p.verdict != next || p.finding != "" {
									continue
								}
								silent++
								if why := outOfChain(h, c); why != "" {
									t.Fatalf("stored in silence after %v: %+v: %s", h, c, why)
								}
							}
						}
					}
				}
			}
		}
	}
	if silent == 0 {
		t.Fatal("nothing was ever stored")
	}
	t.Logf("%d assessments, %d stored without a finding", n, silent)
}

// outOfChain is what assess must never pass over, said another way.
func outOfChain(h head, c sealing.Position) string {
	f := c.First
	switch {
	case !h.found && (f.Seq != 0 || f.Before != nil):
		return "not the beginning"
	case !h.found:
		return ""
	case f.Epoch == h.last.Epoch && f.Seq == h.last.Seq+1 && bytes.Equal(f.Prev, h.last.Head):
		return ""
	case f.Epoch == h.last.Epoch:
		return "it does not follow in its epoch"
	case f.Epoch.Counter() <= h.last.Epoch.Counter():
		return "the epoch is not newer"
	case f.Seq != 0 || f.Before == nil:
		return "a new epoch without word of the one before"
	case f.Before.Epoch != h.last.Epoch || f.Before.Count != h.last.Seq+1 || !bytes.Equal(f.Before.Head, h.last.Head):
		return fmt.Sprintf("it says that the epoch before was %+v", f.Before)
	}
	return ""
}

func TestAssessOld(t *testing.T) {
	pointer := func(p sealing.Position) *sealing.Position { return &p }
	// Stored are 0 to 3 of epoch 5 (0x33), 6 to 9 of epoch 5 (0x99), and from epoch 8
	// on, which knows that epoch 5 had 12 records.
	first, second := pointer(at(ep(5), 0, 3, 0, 0x33, nil)), at(ep(5), 6, 9, 5, 0x99, nil)
	eighth := at(ep(8), 0, 3, 0, 0x88, before(ep(5), 12, 0x12))
	gapBefore := at(ep(8), 0, 3, 0, 0x88, before(ep(7), 2, 0x12))
	tests := []struct {
		name    string
		below   *sealing.Position
		above   sealing.Position
		chunk   sealing.Position
		verdict int
		finding string
	}{
		{"the same", first, second, second, stored, ""},
		{"the same, the first", nil, *first, *first, stored, ""},
		{"other data, same end", first, second, at(ep(5), 6, 9, 5, 0x77, nil), aside, fork},
		{"other data, same end, other beginning", first, second, at(ep(5), 4, 9, 5, 0x77, nil), aside, fork},
		{"ends in a stored chunk", first, second, at(ep(5), 4, 7, 3, 0x77, nil), aside, fork},
		{"begins in a stored chunk", first, second, at(ep(5), 2, 5, 1, 0x77, nil), aside, fork},
		{"inside a stored chunk", nil, *first, at(ep(5), 1, 2, 1, 0x77, nil), aside, fork},
		{"inside a hole", first, second, at(ep(5), 4, 5, 3, 0x77, nil), aside, gap},
		{"before a stream that begins in the middle", nil, second, at(ep(5), 0, 5, 0, 0x77, nil), aside, gap},
		{"of a lost end of an epoch", &second, eighth, at(ep(5), 10, 11, 9, 0x12, nil), aside, gap},
		{"of a lost epoch", &second, gapBefore, at(ep(6), 0, 1, 0, 0x12, nil), aside, gap},
		{"of a lost epoch that the next one names", &second, gapBefore, at(ep(7), 0, 1, 0, 0x12, nil), aside, gap},
		{"of an epoch whose end nobody knew", &second, at(ep(8), 0, 3, 0, 0x88, unknown(ep(7))), at(ep(7), 0, 1, 0, 0x12, nil), aside, gap},
		{"of an epoch whose spool was put back", &second, at(ep(8), 0, 3, 0, 0x88, putBack(ep(7), ep(5))), at(ep(7), 0, 1, 0, 0x12, nil), aside, gap},
		{"the epoch had ended before", &second, eighth, at(ep(5), 12, 13, 1, 0x77, nil), aside, rollback},
		{"of an epoch that had no data", &second, eighth, at(ep(6), 0, 1, 0, 0x77, nil), aside, rollback},
		{"before a stream that was said to be new", nil, at(ep(8), 0, 3, 0, 0x88, nil), at(ep(6), 0, 1, 0, 0x77, nil), aside, rollback},
	}
	for _, x := range tests {
		t.Run(x.name, func(t *testing.T) {
			if p := assessOld(x.below, x.above, x.chunk); p.verdict != x.verdict || p.finding != x.finding || p.finding != "" && p.detail == "" {
				t.Errorf("got %d, finding %q (%s), want %d, %q", p.verdict, p.finding, p.detail, x.verdict, x.finding)
			}
		})
	}
}

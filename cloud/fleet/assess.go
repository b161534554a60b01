package fleet

import (
	"bytes"
	"fmt"

	"edgekeep/sealing"
)

// Kinds of findings about a stream.
const (
	gap      = "gap"      // records are missing
	rollback = "rollback" // the gateway went back to an earlier state
	fork     = "fork"     // two histories from one place
)

// Places of a chunk.
const (
	next   = iota // it is what comes next: store it
	stored        // its place is taken: a repetition, if it is the same
	wait          // what comes before it may still come
	aside         // it fits nowhere
)

// placement is where a chunk belongs, and what is to be said of it.
type placement struct {
	verdict int
	finding string
	detail  string
}

// assess decides where an authentic chunk belongs, given where the stream stands
// and which chunk the gateway says is the oldest that it has.
func assess(h head, pos sealing.Position, oldest sealing.Checkpoint) placement {
	first, cp := pos.First, pos.Checkpoint
	// The gateway's own word that what is missing before this chunk is lost.
	lost := oldest.Epoch == cp.Epoch && oldest.Seq == cp.Seq && bytes.Equal(oldest.Head, cp.Head)
	missing := func(detail string) placement {
		if !lost {
			return placement{verdict: wait, detail: detail}
		}
		return placement{verdict: next, finding: gap, detail: detail}
	}
	if !h.found {
		if first.Seq > 0 {
			return missing(fmt.Sprintf("the stream begins with record %d: %d are missing", first.Seq, first.Seq))
		}
		if b := first.Before; b != nil {
			return missing(fmt.Sprintf("nothing is known of epoch %s, in which the gateway sealed %s", b.Epoch, count(*b)))
		}
		return placement{verdict: next}
	}
	switch {
	case cp.Epoch == h.last.Epoch:
		return assessSame(h.last, first, cp, missing)
	case cp.Epoch.Counter() < h.last.Epoch.Counter():
		return placement{verdict: stored}
	case cp.Epoch.Counter() == h.last.Epoch.Counter():
		return placement{verdict: aside, finding: fork, detail: "two epochs have the same counter value"}
	}
	if first.Seq > 0 {
		return missing(fmt.Sprintf("%d records of a new epoch are missing", first.Seq))
	}
	return assessBefore(h.last, first.Before, missing)
}

func assessSame(last sealing.Checkpoint, first sealing.Header, cp sealing.Checkpoint, missing func(string) placement) placement {
	switch {
	case cp.Seq <= last.Seq:
		return placement{verdict: stored}
	case first.Seq <= last.Seq:
		return placement{verdict: aside, finding: fork, detail: "it overlaps what is stored"}
	case first.Seq > last.Seq+1:
		return missing(fmt.Sprintf("%d records are missing", first.Seq-last.Seq-1))
	case !bytes.Equal(first.Prev, last.Head):
		return placement{verdict: aside, finding: fork, detail: "it follows another record than the one stored"}
	}
	return placement{verdict: next}
}

// assessBefore holds what an epoch's first record says of the epoch before
// against what is stored.
func assessBefore(last sealing.Checkpoint, b *sealing.Before, missing func(string) placement) placement {
	have := last.Seq + 1
	switch {
	case b == nil:
		return placement{verdict: next, finding: rollback, detail: "the gateway says that the stream is new, but data of it is stored: it lost its state, or was replaced"}
	case b.Epoch.Counter() > last.Epoch.Counter():
		return missing(fmt.Sprintf("all of epoch %s is missing, %s", b.Epoch, count(*b)))
	case b.Epoch.Counter() == last.Epoch.Counter() && b.Epoch != last.Epoch:
		return placement{verdict: next, finding: fork, detail: fmt.Sprintf("the epoch before has the counter value of the one stored, and is another: %s, %s", b.Epoch, last.Epoch)}
	case b.Epoch != last.Epoch:
		return placement{verdict: next, finding: rollback, detail: fmt.Sprintf("the gateway knows of data up to epoch %s only, stored is epoch %s", b.Epoch, last.Epoch)}
	case !b.Known():
		p := missing("the keep could not know where the epoch before ended: its agent did not show it")
		if p.verdict == next && len(b.Head) > 0 {
			p = placement{verdict: next, finding: rollback, detail: fmt.Sprintf("the agent showed the end of epoch %x, stored is data of epoch %s: its spool was put back", b.Head, last.Epoch)}
		}
		return p
	case b.Count < have:
		return placement{verdict: next, finding: rollback, detail: fmt.Sprintf("the gateway knows of %d records of the epoch before, stored are %d", b.Count, have)}
	case b.Count > have:
		return missing(fmt.Sprintf("%d records of the epoch before are missing", b.Count-have))
	case !bytes.Equal(b.Head, last.Head):
		return placement{verdict: next, finding: fork, detail: "the epoch before ended with another record than the one stored"}
	}
	return placement{verdict: next}
}

// assessOld decides about a chunk that is not newer than where the stream stands,
// given its neighbours in the store: the last stored chunk that ends before it
// does (nil if there is none), and the first that does not.
func assessOld(below *sealing.Position, above, pos sealing.Position) placement {
	cp := pos.Checkpoint
	if above.Checkpoint.Epoch == cp.Epoch && above.Checkpoint.Seq == cp.Seq && bytes.Equal(above.Checkpoint.Head, cp.Head) {
		return placement{verdict: stored}
	}
	switch {
	case above.Checkpoint.Epoch == cp.Epoch && above.First.Seq <= cp.Seq,
		below != nil && below.Checkpoint.Epoch == cp.Epoch && below.Checkpoint.Seq >= pos.First.Seq:
		return placement{verdict: aside, finding: fork, detail: "the gateway signed other data before at the same place"}
	case denies(above.First, cp):
		return placement{verdict: aside, finding: rollback, detail: "data of which the gateway knew nothing later"}
	}
	return placement{verdict: aside, finding: gap, detail: "it was missing, said to be lost, and came too late for its place"}
}

// denies reports whether an epoch's first record says that there was no such
// data before it.
func denies(first sealing.Header, cp sealing.Checkpoint) bool {
	b := first.Before
	switch {
	case first.Seq > 0 || first.Epoch == cp.Epoch:
		return false
	case b == nil || b.Epoch.Counter() < cp.Epoch.Counter():
		return true
	}
	return b.Epoch == cp.Epoch && b.Known() && b.Count <= cp.Seq
}

func count(b sealing.Before) string {
	if !b.Known() {
		return "nobody knows how many records"
	}
	return fmt.Sprintf("%d records", b.Count)
}

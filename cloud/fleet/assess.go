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
	case b.Epoch != last.Epoch:
		return placement{verdict: next, finding: rollback, detail: fmt.Sprintf("the gateway knows of data up to epoch %s only, stored is epoch %s", b.Epoch, last.Epoch)}
	case len(b.Head) == 0:
		return placement{verdict: next, finding: gap, detail: "the keep could not know where the epoch before ended: its agent did not show it"}
	case b.Count < have:
		return placement{verdict: next, finding: rollback, detail: fmt.Sprintf("the gateway knows of %d records of the epoch before, stored are %d", b.Count, have)}
	case b.Count > have:
		return missing(fmt.Sprintf("%d records of the epoch before are missing", b.Count-have))
	case !bytes.Equal(b.Head, last.Head):
		return placement{verdict: next, finding: fork, detail: "the epoch before ended with another record than the one stored"}
	}
	return placement{verdict: next}
}

func count(b sealing.Before) string {
	if len(b.Head) == 0 {
		return "nobody knows how many records"
	}
	return fmt.Sprintf("%d records", b.Count)
}

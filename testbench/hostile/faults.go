package hostile

import (
	"fmt"
	"math/rand/v2"
	"slices"
)

const (
	maxHold    = 8  // a reordered message is overtaken by 1 to 8 later ones
	maxHistory = 64 // messages remembered for replay
)

// Rates are the probabilities, 0 to 1, that a fault happens to a message. They
// are independent of each other, but what is dropped suffers nothing else.
type Rates struct {
	Drop      float64 // it never arrives
	Flip      float64 // one bit of its payload is inverted; an empty payload is spared
	Duplicate float64 // it arrives twice
	Reorder   float64 // it is held back until 1 to 8 later messages have passed
	Replay    float64 // after it arrives one of the last 64 messages, as it was sent
}

// Faults returns a function for Listen that errs at random. The same seed and
// the same messages give the same faults, and each kind of fault is drawn from
// a source of its own: another rate for one leaves the others where they were.
// A message that is held back when no later ones follow never arrives.
//
// The function is not safe for concurrent use; a Broker calls it one message at
// a time. Faults panics when a rate is not between 0 and 1.
func Faults(seed uint64, rates Rates) func(Message) []Message {
	f := &faults{
		drop:      newDice(seed, 1, rates.Drop),
		flip:      newDice(seed, 2, rates.Flip),
		duplicate: newDice(seed, 3, rates.Duplicate),
		reorder:   newDice(seed, 4, rates.Reorder),
		replay:    newDice(seed, 5, rates.Replay),
	}
	return f.next
}

type faults struct {
	drop, flip, duplicate, reorder, replay dice

	held    []held
	history []Message // the last maxHistory, oldest first
}

// held is a message that waits until that many further messages have come.
type held struct {
	message Message
	wait    int
}

// next turns one message into what is delivered in its place.
func (f *faults) next(m Message) []Message {
	due := f.due()
	out := f.damage(m)
	if wait, happens := f.reorder.roll(maxHold); happens {
		for _, late := range out {
			f.held = append(f.held, held{late, 1 + wait})
		}
		out = nil
	}
	out = append(out, due...)
	if age, happens := f.replay.roll(max(1, len(f.history))); happens && len(f.history) > 0 {
		out = append(out, f.history[age])
	}
	if len(f.history) == maxHistory {
		f.history = slices.Delete(f.history, 0, 1)
	}
	f.history = append(f.history, m)
	return out
}

// due counts a new message and takes out the held ones that wait no longer.
func (f *faults) due() (out []Message) {
	var still []held
	for _, h := range f.held {
		h.wait--
		if h.wait == 0 {
			out = append(out, h.message)
		} else {
			still = append(still, h)
		}
	}
	f.held = still
	return out
}

// damage drops, alters or duplicates a message.
func (f *faults) damage(m Message) []Message {
	bits := 8 * len(m.Payload)
	_, drop := f.drop.roll(1)
	bit, flip := f.flip.roll(max(1, bits))
	_, duplicate := f.duplicate.roll(1)
	if drop {
		return nil
	}
	if flip && bits > 0 {
		m.Payload = slices.Clone(m.Payload)
		m.Payload[bit/8] ^= 1 << (bit % 8)
	}
	if duplicate {
		return []Message{m, m}
	}
	return []Message{m}
}

// dice decides about one kind of fault.
type dice struct {
	rate   float64
	source *rand.Rand
}

func newDice(seed, kind uint64, rate float64) dice {
	if !(rate >= 0 && rate <= 1) {
		panic(fmt.Sprintf("hostile: a fault rate of %v is not between 0 and 1", rate))
	}
	return dice{rate, rand.New(rand.NewPCG(seed, kind))}
}

// roll decides whether the fault happens and chooses a number below n. It draws
// both every time, so that the rate does not change what comes later.
func (d dice) roll(n int) (choice int, happens bool) {
	happens = d.source.Float64() < d.rate
	return d.source.IntN(n), happens
}

package hostile

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"testing"
)

// run sends n numbered messages through the faults and returns what comes of
// each.
func run(seed uint64, rates Rates, n int) (out [][]string) {
	next := Faults(seed, rates)
	for i := range n {
		var texts []string
		for _, m := range next(Message{Topic: "t", Payload: fmt.Appendf(nil, "%05d", i)}) {
			texts = append(texts, string(m.Payload))
		}
		out = append(out, texts)
	}
	return out
}

func TestNoFaults(t *testing.T) {
	for i, got := range run(1, Rates{}, 100) {
		if want := []string{fmt.Sprintf("%05d", i)}; !slices.Equal(got, want) {
			t.Errorf("message %d became %q", i, got)
		}
	}
}

func TestFaultsRepeat(t *testing.T) {
	rates := Rates{Drop: 0.1, Flip: 0.1, Duplicate: 0.1, Reorder: 0.1, Replay: 0.1}
	first := run(42, rates, 2000)
	if !reflect.DeepEqual(first, run(42, rates, 2000)) {
		t.Error("the same seed gives other faults")
	}
	if reflect.DeepEqual(first, run(43, rates, 2000)) {
		t.Error("another seed gives the same faults")
	}
}

// TestFaultsAreIndependent drops the same messages whatever else goes wrong.
func TestFaultsAreIndependent(t *testing.T) {
	alone := run(7, Rates{Drop: 0.2}, 1000)
	among := run(7, Rates{Drop: 0.2, Duplicate: 0.5}, 1000)
	for i := range alone {
		if (len(alone[i]) == 0) != (len(among[i]) == 0) {
			t.Fatalf("message %d: %q alone, %q among others", i, alone[i], among[i])
		}
	}
}

func TestEachFault(t *testing.T) {
	const n = 4000
	near := func(what string, got int) {
		t.Helper()
		if math.Abs(float64(got)-n/4) > 150 { // five and a half sigma
			t.Errorf("%s: %d of %d at a rate of 1/4", what, got, n)
		}
	}
	count := func(out [][]string, is func(i int, texts []string) bool) (found int) {
		for i, texts := range out {
			if is(i, texts) {
				found++
			}
		}
		return found
	}
	own := func(i int) string { return fmt.Sprintf("%05d", i) }

	near("drop", count(run(1, Rates{Drop: 0.25}, n), func(_ int, texts []string) bool { return len(texts) == 0 }))
	near("duplicate", count(run(1, Rates{Duplicate: 0.25}, n), func(i int, texts []string) bool {
		return slices.Equal(texts, []string{own(i), own(i)})
	}))
	near("flip", count(run(1, Rates{Flip: 0.25}, n), func(i int, texts []string) bool {
		if len(texts) != 1 {
			t.Errorf("message %d became %q", i, texts)
		}
		return texts[0] != own(i)
	}))
	near("replay", count(run(1, Rates{Replay: 0.25}, n), func(i int, texts []string) bool {
		if texts[0] != own(i) || len(texts) > 2 {
			t.Errorf("message %d became %q", i, texts)
		}
		if len(texts) == 2 && (texts[1] >= own(i) || texts[1] < own(max(0, i-maxHistory))) {
			t.Errorf("after message %d came %q, not one of the last %d", i, texts[1], maxHistory)
		}
		return len(texts) == 2
	}))

	arrived := map[string]int{}
	near("reorder", count(run(1, Rates{Reorder: 0.25}, n), func(i int, texts []string) bool {
		for _, text := range texts {
			arrived[text]++
			if number, err := strconv.Atoi(text); err != nil || number > i || i-number > maxHold {
				t.Errorf("%q came with message %d", text, i)
			}
		}
		return !slices.Contains(texts, own(i))
	}))
	for i := range n - maxHold {
		if arrived[own(i)] != 1 {
			t.Errorf("reordered message %d arrived %d times", i, arrived[own(i)])
		}
	}
}

func TestFlipIsOneBit(t *testing.T) {
	next := Faults(1, Rates{Flip: 1})
	for range 200 {
		payload := []byte("payload")
		out := next(Message{Topic: "t", Payload: payload})
		if string(payload) != "payload" {
			t.Fatal("the publisher's bytes were changed")
		}
		bits := 0
		for i, b := range out[0].Payload {
			for d := b ^ payload[i]; d != 0; d &= d - 1 {
				bits++
			}
		}
		if bits != 1 || len(out[0].Payload) != len(payload) {
			t.Fatalf("%q became %q", payload, out[0].Payload)
		}
	}
	if out := next(Message{Topic: "t"}); len(out) != 1 || len(out[0].Payload) != 0 {
		t.Errorf("an empty message became %v", out)
	}
}

func TestCertainFaults(t *testing.T) {
	for _, texts := range run(1, Rates{Drop: 1, Duplicate: 1, Flip: 1, Reorder: 1}, 100) {
		if len(texts) > 0 {
			t.Fatalf("%q arrived although all is dropped", texts)
		}
	}
}

func TestRatesOutOfRange(t *testing.T) {
	for _, rate := range []float64{-0.1, 1.1, math.NaN()} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("rate %v was accepted", rate)
				}
			}()
			Faults(1, Rates{Replay: rate})
		}()
	}
}

// TestFaultsThroughBroker sees every kind of fault arrive at a real subscriber.
func TestFaultsThroughBroker(t *testing.T) {
	const n = 300
	rates := Rates{Drop: 0.1, Flip: 0.1, Duplicate: 0.1, Reorder: 0.1, Replay: 0.1}
	b := listen(t, nil, Faults(5, rates))
	sub, pub := connect(t, b, "sub"), connect(t, b, "pub")
	sub.subscribe("#", 1)
	for i := range n {
		pub.publish("t", 1, fmt.Sprintf("%05d", i))
	}
	var want []string
	for _, texts := range run(5, rates, n) {
		for _, text := range texts {
			want = append(want, "t "+text)
		}
	}
	sub.want(want...)
}

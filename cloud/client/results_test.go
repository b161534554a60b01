package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"edgekeep/cloud/fleet"
	"edgekeep/sealing"
	"edgekeep/workload"
)

// record is a ledger's record with these holders, from epoch 1 on, each with the
// last line of the epochs before it.
func record(holders ...fleet.Event) fleet.Record {
	for i := range holders {
		holders[i].Epoch = uint64(i + 1)
	}
	last := holders[len(holders)-1]
	return fleet.Record{Entry: workload.Entry{Instance: "watch", Epoch: last.Epoch, Holder: last.Holder, Line: last.Line}, History: holders}
}

func reading(v int) sealing.Reading { return sealing.Reading{Name: "n", Time: 5, Value: int64(v)} }

// sealed is a chunk of one record for each group of values.
func sealedChunk(gateway, session string, last uint64, groups ...[]int) []Opened {
	cursor := &sealing.Cursor{Session: session, Line: last}
	var out []Opened
	for _, g := range groups {
		o := Opened{Gateway: gateway, Stream: "watch", Cursor: cursor}
		for _, v := range g {
			o.Readings = append(o.Readings, reading(v))
		}
		out = append(out, o)
	}
	return out
}

func newResults(rec fleet.Record) *Results {
	return &Results{
		instance: "watch", next: map[uint64]uint64{}, hashes: map[uint64][32]byte{},
		inspect: func(context.Context, string) (fleet.Record, error) { return rec, nil },
	}
}

type failer interface {
	Helper()
	Fatal(args ...any)
}

// feed gives records to a reader as if they had been opened.
func (r *Results) feed(t failer, chunks ...[]Opened) []Result {
	t.Helper()
	r.held = slices.Concat(chunks...)
	out, _, err := r.page(context.Background(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func lines(rs []Result) string {
	var out []string
	for _, r := range rs {
		s := fmt.Sprintf("%d.%d=%v@%s", r.Epoch, r.Line, r.Value, r.Gateway)
		if r.Gap != "" {
			s += "!gap"
		}
		if r.Conflict != "" {
			s += "!conflict"
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func TestResults(t *testing.T) {
	moved := record(fleet.Event{Holder: "a"}, fleet.Event{Holder: "b", Line: 4})
	for _, x := range []struct {
		name   string
		rec    fleet.Record
		chunks [][]Opened
		want   string
		fenced uint64
	}{
		{"numbered back from the cursor", record(fleet.Event{Holder: "a"}), [][]Opened{sealedChunk("a", "watch#1", 5, []int{1, 2}, nil, []int{3, 4, 5})}, "1.1=1@a 1.2=2@a 1.3=3@a 1.4=4@a 1.5=5@a", 0},
		{"empty records carry none", record(fleet.Event{Holder: "a"}), [][]Opened{sealedChunk("a", "watch#1", 2, []int{1, 2}), sealedChunk("a", "watch#1", 2, nil)}, "1.1=1@a 1.2=2@a", 0},
		{"repeated", record(fleet.Event{Holder: "a"}), [][]Opened{sealedChunk("a", "watch#1", 2, []int{1, 2}), sealedChunk("a", "watch#1", 3, []int{1, 2, 3})}, "1.1=1@a 1.2=2@a 1.3=3@a", 0},
		{"two contents", record(fleet.Event{Holder: "a"}), [][]Opened{sealedChunk("a", "watch#1", 2, []int{1, 2}), sealedChunk("a", "watch#1", 2, []int{9})}, "1.1=1@a 1.2=2@a 1.2=9@a!conflict", 0},
		{"moved", moved, [][]Opened{sealedChunk("a", "watch#1", 4, []int{1, 2, 3, 4}), sealedChunk("b", "watch#2", 6, []int{5, 6})}, "1.1=1@a 1.2=2@a 1.3=3@a 1.4=4@a 2.5=5@b 2.6=6@b", 0},
		{"a clone of the source", moved, [][]Opened{sealedChunk("a", "watch#1", 6, []int{1, 2, 3, 4, 5, 6}), sealedChunk("b", "watch#2", 5, []int{7})}, "1.1=1@a 1.2=2@a 1.3=3@a 1.4=4@a 2.5=7@b", 2},
		{"the source under the new epoch", moved, [][]Opened{sealedChunk("a", "watch#2", 5, []int{5})}, "", 1},
		{"the target under the old one", moved, [][]Opened{sealedChunk("b", "watch#1", 1, []int{1})}, "", 1},
		{"an epoch that is not yet", moved, [][]Opened{sealedChunk("b", "watch#3", 5, []int{5})}, "", 1},
		{"stopped", record(fleet.Event{Holder: "a"}, fleet.Event{Line: 1}), [][]Opened{sealedChunk("a", "watch#1", 2, []int{1, 2}), sealedChunk("a", "watch#2", 2, []int{2})}, "1.1=1@a", 2},
		{"lines are missing", record(fleet.Event{Holder: "a"}), [][]Opened{sealedChunk("a", "watch#1", 1, []int{1}), sealedChunk("a", "watch#1", 5, []int{5})}, "1.1=1@a 1.5=5@a!gap", 0},
		{"more readings than lines", record(fleet.Event{Holder: "a"}), [][]Opened{sealedChunk("a", "watch#1", 1, []int{1, 2})}, "", 2},
		{"a source of the same name", record(fleet.Event{Holder: "a"}), [][]Opened{
			sealedChunk("a", "driver", 1, []int{1}), sealedChunk("a", "watch#01", 1, []int{1}), sealedChunk("a", "watch#", 1, []int{1}), sealedChunk("a", "other#1", 1, []int{1}), {{Gateway: "a", Readings: []sealing.Reading{reading(1)}}},
		}, "", 0},
	} {
		r := newResults(x.rec)
		if got := lines(r.feed(t, x.chunks...)); got != x.want || r.Fenced() != x.fenced {
			t.Errorf("%s: %s, %d fenced; want %s, %d", x.name, got, r.Fenced(), x.want, x.fenced)
		}
	}
}

// What was read waits when the ledger cannot be asked.
func TestResultsWaitForTheLedger(t *testing.T) {
	r := newResults(record(fleet.Event{Holder: "a"}))
	inspect := r.inspect
	r.inspect = func(context.Context, string) (fleet.Record, error) { return fleet.Record{}, errors.New("no") }
	r.held = sealedChunk("a", "watch#1", 1, []int{1})
	if _, _, err := r.page(context.Background(), time.Second); err == nil {
		t.Fatal("no error")
	}
	r.inspect = inspect
	if got, _, err := r.page(context.Background(), 0); err != nil || lines(got) != "1.1=1@a" {
		t.Errorf("%s, %v", lines(got), err)
	}
}

// Whatever holders, former holders and clones seal, and however often: each line
// comes once, from the holder of its epoch, and the lines of a correct run all come.
func TestResultsModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gateways := []string{"a", "b", "c"}
		var events []fleet.Event
		line := uint64(0)
		var honest [][]Opened
		want := map[uint64]string{}
		for e := range rapid.IntRange(1, 4).Draw(t, "epochs") {
			holder := rapid.SampledFrom(gateways).Draw(t, "holder")
			events = append(events, fleet.Event{Holder: holder, Line: line})
			for range rapid.IntRange(0, 4).Draw(t, "chunks") {
				var values []int
				for range rapid.IntRange(1, 3).Draw(t, "values") {
					line++
					values = append(values, int(line))
					want[line] = fmt.Sprintf("%d.%d=%d@%s", e+1, line, line, holder)
				}
				honest = append(honest, sealedChunk(holder, workload.Session("watch", uint64(e+1)), line, values))
			}
		}
		r := newResults(record(events...))
		var out []Result
		for _, c := range honest {
			if rapid.Bool().Draw(t, "repeat") {
				out = append(out, r.feed(t, c)...)
			}
			if rapid.Bool().Draw(t, "clone") { // a clone goes on under an epoch that has ended, or as another gateway
				epoch := rapid.Uint64Range(1, uint64(len(events))).Draw(t, "epoch")
				after := line
				if epoch < uint64(len(events)) {
					after = events[epoch].Line
				}
				by := events[epoch-1].Holder
				if epoch == uint64(len(events)) {
					by = "stranger"
				}
				out = append(out, r.feed(t, sealedChunk(by, workload.Session("watch", epoch), after+2, []int{-1, -2}))...)
			}
			out = append(out, r.feed(t, c)...)
		}
		if len(out) != len(want) {
			t.Fatalf("%s; want %d lines", lines(out), len(want))
		}
		for i, res := range out {
			if res.Line != uint64(i+1) || lines([]Result{res}) != want[res.Line] {
				t.Fatalf("result %d is %s", i, lines([]Result{res}))
			}
		}
	})
}

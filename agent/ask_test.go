package agent

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee/message"
)

var nothing = cose.MustMarshal(message.AskedBlob{ID: []byte{1}})

// asked collects the questions that were published.
type asked [][]byte

func (a *asked) conn() fakeConn {
	return func(kind string, payload []byte) {
		if kind == "ask" {
			*a = append(*a, bytes.Clone(payload))
		}
	}
}

// A question is asked again, the same, when no answer comes, and not for ever.
func TestAskAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := assemble(Config{}, discard)
		var seen asked
		l := a.connect(t, seen.conn())
		defer l.cancel()
		began := time.Now()
		_, err := a.ask(t.Context(), "key", nothing)
		if err == nil || !strings.Contains(err.Error(), "did not answer") || len(seen) != askTries || time.Since(began) != askTries*askAgain {
			t.Errorf("asked %d times in %s: %v", len(seen), time.Since(began), err)
		}
		for _, q := range seen {
			if !bytes.Equal(q, seen[0]) {
				t.Error("another question")
			}
		}
		if a.questions.count() != 0 || len(a.questions.room) != 0 {
			t.Error("the question is not forgotten")
		}
		l.answer(seen[0], 1, "") // too late: nobody waits

		// What waits at the cloud is given the time; what would wait too long is not asked.
		seen, began = nil, time.Now()
		_, err = a.ask(t.Context(), message.AskRecords, cose.MustMarshal(message.AskedRecords{Wait: 20_000}))
		if err == nil || len(seen) != askTries || time.Since(began) != askTries*(askAgain+20*time.Second) {
			t.Errorf("asked %d times in %s: %v", len(seen), time.Since(began), err)
		}
		for _, bad := range []cose.Raw{cose.MustMarshal(message.AskedRecords{Wait: 20_001}), cose.MustMarshal(message.AskedRecords{Wait: -1}), {0x01}} {
			seen = nil
			if _, err := a.ask(t.Context(), message.AskRecords, bad); err == nil || len(seen) != 0 {
				t.Errorf("%x: %v", bad, err)
			}
		}
	})
}

// Without a connection a question waits for one; when it is lost, the same
// question is asked on the next one at once.
func TestAskLinkLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := assemble(Config{}, discard)
		began := time.Now()
		if _, err := a.ask(t.Context(), "key", nothing); !errors.Is(err, errNoLink) || time.Since(began) != linkPatience {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		got := make(chan error, 1)
		ask := func() {
			body, err := a.ask(t.Context(), "key", nothing)
			if err == nil && !bytes.Equal(body, []byte{0x07}) {
				err = errors.New("another answer")
			}
			got <- err
		}
		go ask()
		time.Sleep(linkPatience - time.Second)
		var first, second asked
		l := a.connect(t, first.conn())
		synctest.Wait()
		l.cancel()
		synctest.Wait()
		if len(first) != 1 || len(got) != 0 {
			t.Fatalf("asked %d times, %d answers", len(first), len(got))
		}
		time.Sleep(linkPatience - time.Second)
		l = a.connect(t, second.conn())
		defer l.cancel()
		synctest.Wait()
		if len(second) != 1 || !bytes.Equal(second[0], first[0]) {
			t.Fatalf("%x, %x", first, second)
		}
		for _, junk := range [][]byte{nil, {0xff}, cose.MustMarshal(1), cose.MustMarshal(message.Answer{ID: make([]byte, 8), Body: cose.Raw{0x08}})} {
			l.down("answer", junk)
		}
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("junk was an answer")
		}
		l.answer(second[0], 7, "")
		l.answer(second[0], 8, "") // of the question asked twice
		if err := <-got; err != nil {
			t.Error(err)
		}

		// The cloud's reason is the answer too; and the end of the session ends a question.
		go ask()
		synctest.Wait()
		l.answer(second[1], nil, "no such key")
		if err := <-got; err == nil || !strings.Contains(err.Error(), "the cloud refuses: no such key") {
			t.Error(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := a.ask(ctx, "key", nothing); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// Questions are bounded, and those that wait long leave room for others.
func TestAskBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := assemble(Config{}, discard)
		kinds := map[string]int{}
		l := a.connect(t, fakeConn(func(_ string, payload []byte) {
			var q message.Ask
			if err := cose.Unmarshal(payload, &q); err != nil {
				t.Error(err)
			}
			a.mu.Lock()
			kinds[q.Kind]++
			a.mu.Unlock()
		}))
		defer l.cancel()
		ctx, cancel := context.WithCancel(t.Context())
		for range 100 {
			go a.ask(ctx, message.AskRecords, cose.MustMarshal(message.AskedRecords{Wait: 20_000}))
		}
		synctest.Wait()
		for range 100 {
			go a.ask(ctx, "key", nothing)
		}
		synctest.Wait()
		a.mu.Lock()
		if kinds[message.AskRecords] != maxPatient || kinds["key"] != maxQuestions-maxPatient || a.questions.count() != maxQuestions {
			t.Errorf("%v, %d", kinds, a.questions.count())
		}
		a.mu.Unlock()
		cancel()
		synctest.Wait()
		if a.questions.count() != 0 || len(a.questions.room) != 0 || len(a.questions.patient) != 0 {
			t.Error("not all are forgotten")
		}
	})
}

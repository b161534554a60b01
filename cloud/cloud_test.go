package cloud_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"edgekeep/cloud"
)

// fresh removes what an earlier run has left in entries.
func fresh(t testing.TB, kv jetstream.KeyValue, keys ...string) jetstream.KeyValue {
	t.Helper()
	for _, k := range keys {
		if err := kv.Purge(deadline(t), k); err != nil {
			t.Fatal(err)
		}
	}
	return kv
}

func TestPutAndGet(t *testing.T) {
	ctx, kv := deadline(t), fresh(t, bus.Hellos, "put")
	if _, _, ok, err := cloud.Get[question](ctx, kv, "put"); ok || err != nil {
		t.Fatalf("an entry that there is not: %v, %v", ok, err)
	}
	if err := cloud.Put(ctx, kv, "put", question{"a"}, 0); err != nil {
		t.Fatal(err)
	}
	if err := cloud.Put(ctx, kv, "put", question{"b"}, 0); !errors.Is(err, cloud.ErrConflict) {
		t.Errorf("made twice: %v", err)
	}
	v, rev, ok, err := cloud.Get[question](ctx, kv, "put")
	if err != nil || !ok || v.Text != "a" {
		t.Fatalf("read %v, %v, %v", v, ok, err)
	}
	if err := cloud.Put(ctx, kv, "put", question{"c"}, rev); err != nil {
		t.Fatal(err)
	}
	if err := cloud.Put(ctx, kv, "put", question{"d"}, rev); !errors.Is(err, cloud.ErrConflict) {
		t.Errorf("written over what came in between: %v", err)
	}
	if err := cloud.Put(ctx, kv, "bad key", question{"d"}, 0); err == nil || errors.Is(err, cloud.ErrConflict) {
		t.Errorf("a bad key: %v", err)
	}
	if _, err := kv.Put(ctx, "put", []byte("garbage")); err != nil {
		t.Fatal(err)
	}
	if _, _, ok, err := cloud.Get[question](ctx, kv, "put"); err == nil || ok || !strings.Contains(err.Error(), "hellos/put") {
		t.Errorf("a damaged entry: %v, %v", ok, err)
	}
	if _, err := cloud.Change(ctx, kv, "put", func(*question, bool) error { return nil }); err == nil {
		t.Error("a damaged entry was changed")
	}
}

func TestChange(t *testing.T) {
	ctx, kv := deadline(t), fresh(t, bus.Hellos, "count", "busy")
	const writers, each = 4, 10
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				for {
					_, err := cloud.Change(ctx, kv, "count", func(q *question, found bool) error {
						if !found && q.Text != "" {
							return errors.New("a new entry is not empty")
						}
						q.Text += "x"
						return nil
					})
					if err == nil {
						break
					}
					if !errors.Is(err, cloud.ErrConflict) {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if v, _, _, err := cloud.Get[question](ctx, kv, "count"); err != nil || len(v.Text) != writers*each {
		t.Fatalf("%d of %d changes are there: %v", len(v.Text), writers*each, err)
	}
	stop := errors.New("stop")
	if _, err := cloud.Change(ctx, kv, "count", func(q *question, _ bool) error { q.Text = ""; return stop }); !errors.Is(err, stop) {
		t.Errorf("a change that was refused: %v", err)
	}
	if v, _, _, _ := cloud.Get[question](ctx, kv, "count"); v.Text == "" {
		t.Error("a change that was refused was written")
	}
	// Somebody who is always faster: it ends, and says so.
	tries := 0
	_, err := cloud.Change(ctx, kv, "busy", func(q *question, _ bool) error {
		tries++
		_, err := kv.Put(ctx, "busy", fmt.Appendf(nil, "\xa1\x01\x62%02d", tries))
		return err
	})
	if !errors.Is(err, cloud.ErrConflict) || tries != 20 {
		t.Errorf("after %d tries: %v", tries, err)
	}
}

func TestAnswer(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	calls := 0
	if err := cloud.Answer(ctx, bus, "api.*.test.answer", "test", func(_ context.Context, subject string, q question) (question, error) {
		calls++
		switch q.Text {
		case "fail":
			return question{"a reply that nobody may see"}, errors.New("no\xff way")
		case "odd":
			return question{"\xff"}, nil
		}
		return question{subject + " " + q.Text}, nil
	}); err != nil {
		t.Fatal(err)
	}
	ask := func(v any) (question, error) {
		return cloud.Ask[question](deadline(t), service, "api.acme.test.answer", v)
	}
	if got, err := ask(question{"hello"}); err != nil || got.Text != "api.acme.test.answer hello" {
		t.Fatalf("%v: %v", got, err)
	}
	var refusal *cloud.Refused
	if got, err := ask(question{"fail"}); !errors.As(err, &refusal) || !strings.HasPrefix(refusal.Reason, "no") || got.Text != "" {
		t.Errorf("a failure: %v, %v", got, err)
	}
	if _, err := ask(question{"odd"}); !errors.As(err, &refusal) {
		t.Errorf("an answer that cannot be encoded: %v", err)
	}
	had := calls
	// Malformed requests are answered, and reach nobody.
	for _, raw := range [][]byte{nil, []byte("garbage"), {0xa0}, {0xa1, 0x01, 0x05}, {0xa2, 0x01, 0x60, 0x02, 0x60}, {0xa1, 0x01, 0x60, 0x00}, {0xbf, 0x01, 0x60, 0xff}, {0xa1, 0x18, 0x01, 0x60}, bytes.Repeat([]byte{0x81}, 1000)} {
		m, err := service.RequestWithContext(deadline(t), "api.acme.test.answer", raw)
		if err != nil {
			t.Fatalf("%x: %v", raw, err)
		}
		if !bytes.Contains(m.Data, []byte("malformed")) {
			t.Errorf("%x was answered with %q", raw, m.Data)
		}
	}
	if calls != had {
		t.Errorf("%d malformed requests got through", calls-had)
	}
	if got, err := ask(question{"still"}); err != nil || !strings.HasSuffix(got.Text, "still") {
		t.Errorf("afterwards: %v, %v", got, err)
	}
	if _, err := cloud.Ask[question](deadline(t), service, "api.acme.test.nobody", question{}); err == nil || !strings.Contains(err.Error(), "nobody answers") {
		t.Errorf("nobody there: %v", err)
	}
	cancel()
	ctx = deadline(t)
	for { // a question on its way while it ends may get no answer at all
		short, done := context.WithTimeout(context.Background(), 50*time.Millisecond)
		_, err := cloud.Ask[question](short, service, "api.acme.test.answer", question{})
		done()
		if err != nil && strings.Contains(err.Error(), "nobody answers") {
			return
		}
		if ctx.Err() != nil {
			t.Fatal("it never ends")
		}
	}
}

func TestAskDistrustsAnswers(t *testing.T) {
	for i, raw := range [][]byte{nil, []byte("garbage"), {0x82, 0x60, 0x05}, {0x82, 0x60, 0xf6}, {0x81, 0x60}, {0x83, 0x60, 0xf6, 0xf6}} {
		subject := fmt.Sprintf("api.acme.liar.%d", i)
		listening := listen(t, subject)
		go func() {
			if m, err := listening.NextMsgWithContext(context.Background()); err == nil {
				_ = m.Respond(raw)
			}
		}()
		if got, err := cloud.Ask[question](deadline(t), service, subject, question{}); err == nil {
			t.Errorf("%x passed for %+v", raw, got)
		}
	}
}

func TestReport(t *testing.T) {
	found := listen(t, "find.acme.reports")
	if err := bus.Report(deadline(t), "acme", "reports", cloud.Finding{Kind: "gap", Stream: "s", Detail: "d"}); err != nil {
		t.Fatal(err)
	}
	if m := nextMessage(t, found); !bytes.Contains(m.Data, []byte("gap")) {
		t.Errorf("reported %x", m.Data)
	}
	if err := bus.Report(deadline(t), "acme", "reports", cloud.Finding{Detail: "\xff"}); err == nil {
		t.Error("a finding that nobody can read was recorded")
	}
}

func TestOpenAgain(t *testing.T) {
	ctx := deadline(t)
	if err := cloud.Put(ctx, fresh(t, bus.Keys, "kept"), "kept", question{"x"}, 0); err != nil {
		t.Fatal(err)
	}
	again, err := cloud.Open(ctx, must(srv.Connect()), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer again.NC.Close()
	if v, _, ok, err := cloud.Get[question](ctx, again.Keys, "kept"); err != nil || !ok || v.Text != "x" {
		t.Errorf("opened again, it holds %v: %v", v, err)
	}
	if err := again.Rec.DeleteMsg(ctx, 1); err == nil {
		t.Error("accepted data can be deleted")
	}
}

func TestCounts(t *testing.T) {
	var c cloud.Counts
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 300 {
				c.Add("acme", "refused", fmt.Sprint("reason ", i, j))
				c.Add("acme", "stored", "")
			}
		})
	}
	wg.Wait()
	all := c.Of("acme")
	if len(all) > 203 || all["stored"] != 1200 {
		t.Errorf("%d reasons, %d stored", len(all), all["stored"])
	}
	sum := uint64(0)
	for _, n := range all {
		sum += n
	}
	if sum != 2400 || all["refused: other"] == 0 {
		t.Errorf("%d in all", sum)
	}
	all["stored"] = 0
	if c.Of("acme")["stored"] != 1200 {
		t.Error("what was given out can be changed")
	}
}

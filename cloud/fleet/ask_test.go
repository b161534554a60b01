package fleet_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"edgekeep/cloud"
	"edgekeep/cloud/fleet"
	"edgekeep/cloud/keybroker"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/workload"
)

func TestRecords(t *testing.T) {
	startFleet(t)
	g, reader := enrolled(t, "acme", "recs"), enrolled(t, "acme", "reader")
	others := enrolled(t, "acme", "recs2")
	var want [][]byte
	var at []sealing.Checkpoint
	for epoch := range 3 {
		for i := range 4 {
			c := g.chunk("temp", 1+i)
			at = append(at, g.store(c))
			want = append(want, c)
			others.store(others.chunk("temp", 1)) // between them, in the store
		}
		if epoch < 2 {
			old := g.key
			g.start()
			g.setVerdict(g.verdict(old))
		}
	}
	asked := message.AskedRecords{Gateway: "recs", Stream: "temp"}
	after := func(c sealing.Checkpoint) message.AskedRecords {
		a := asked
		a.Epoch, a.Seq = c.Epoch[:], c.Seq
		return a
	}
	check := func(what string, a message.AskedRecords, want [][]byte) {
		t.Helper()
		got, reason := ask[message.Records](reader, message.AskRecords, a)
		if reason != "" || len(got.Chunks) != len(want) {
			t.Fatalf("%s: %d chunks, want %d: %s", what, len(got.Chunks), len(want), reason)
		}
		for i := range want {
			if !bytes.Equal(got.Chunks[i], want[i]) {
				t.Fatalf("%s: chunk %d is another", what, i)
			}
		}
	}
	for range 2 { // found, and remembered
		check("from the beginning", asked, want)
		for i, c := range at {
			check(fmt.Sprint("after chunk ", i), after(c), want[i+1:])
		}
	}
	// Within a chunk of four records: the chunk with the next one.
	mid := at[3]
	mid.Seq--
	check("within a chunk", after(mid), want[3:])
	// After what the store does not have: what it has next.
	gone := at[3]
	gone.Seq += 100
	check("after what is not stored", after(gone), want[4:])
	future := at[11]
	future.Epoch = sealing.NewEpoch(99, [8]byte{})
	check("after the end of time", after(future), nil)
	for _, bad := range []message.AskedRecords{
		{Gateway: "*", Stream: "temp"},
		{Gateway: "recs", Stream: ">"},
		{Gateway: "recs.temp", Stream: "x"},
		{Stream: "temp"},
		{Gateway: "recs", Stream: "temp", Epoch: []byte{1}},
	} {
		wantRefusal[message.Records](t, reader, fmt.Sprint(bad), message.AskRecords, bad, "which records")
	}
	stranger := enrolled(t, "globex", "stranger")
	if got, _ := ask[message.Records](stranger, message.AskRecords, asked); len(got.Chunks) != 0 {
		t.Error("another tenant reads them")
	}
}

func TestRecordsWait(t *testing.T) {
	startFleet(t)
	g, reader := enrolled(t, "acme", "recwait"), enrolled(t, "acme", "waiter")
	last := g.store(g.chunk("temp", 1))
	a := message.AskedRecords{Gateway: "recwait", Stream: "temp", Epoch: last.Epoch[:], Seq: last.Seq, Wait: 1}
	if got, reason := ask[message.Records](reader, message.AskRecords, a); reason != "" || len(got.Chunks) != 0 {
		t.Fatalf("%d chunks: %s", len(got.Chunks), reason)
	}
	a.Wait = 15_000
	waiting := reader.begin(message.AskRecords, a)
	g.publish("sealed", []byte("garbage")) // wakes nobody for good
	c := g.chunk("temp", 1)
	begin := time.Now()
	g.store(c)
	got := must(message.Decode[message.Records](waiting.answer().Body))
	if len(got.Chunks) != 1 || !bytes.Equal(got.Chunks[0], c) {
		t.Errorf("it waited for %d chunks", len(got.Chunks))
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("it was told after %s", d)
	}
}

// One chunk may be the whole answer; more come only if they fit.
func TestRecordsFitAMessage(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "recbig")
	var sent int
	for range 12 {
		g.store(g.chunk("temp", 150))
		sent++
	}
	a := message.AskedRecords{Gateway: "recbig", Stream: "temp"}
	for n := 0; n < sent; {
		ans := g.begin(message.AskRecords, a).answer()
		if size := len(message.Encode(ans)); size > mqtt.MaxPayload-100 {
			t.Fatalf("an answer of %d bytes", size)
		}
		got := must(message.Decode[message.Records](ans.Body))
		if len(got.Chunks) == 0 {
			t.Fatalf("only %d of %d came", n, sent)
		}
		n += len(got.Chunks)
		cp := g.position(got.Chunks[len(got.Chunks)-1]).Checkpoint
		a.Epoch, a.Seq = cp.Epoch[:], cp.Seq
	}
}

func TestKeysAreAskedOfTheBroker(t *testing.T) {
	startFleet(t)
	g := enrolled(t, "acme", "wantskey")
	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	if err := cloud.Answer(ctx, bus, "svc.key", "keybroker", func(_ context.Context, _ string, r keybroker.GatewayRequest) (message.Release, error) {
		return message.Release{Message: []byte(r.Tenant + "/" + r.Gateway), EpochKey: []byte(r.Asked.Stream), Verdict: r.Asked.Verdict}, nil
	}); err != nil {
		t.Fatal(err)
	}
	got, reason := ask[message.Release](g, message.AskKey, message.AskedKey{Gateway: "p", Stream: "temp", Epoch: make([]byte, 16), Verdict: []byte("v")})
	if reason != "" || string(got.Message) != "acme/wantskey" || string(got.EpochKey) != "temp" || string(got.Verdict) != "v" {
		t.Errorf("%+v: %s", got, reason)
	}
	cancel()
	eventually(t, "there is no broker", func() bool {
		_, reason := ask[message.Release](g, message.AskKey, message.AskedKey{})
		return strings.Contains(reason, "nobody answers")
	})
}

func TestQuestionsRefused(t *testing.T) {
	f, _ := startFleet(t)
	g := enrolled(t, "acme", "curious")
	wantRefusal[fleet.None](t, g, "an unknown kind", "everything", fleet.None{}, "no such kind")
	wantRefusal[fleet.None](t, g, "a long kind", strings.Repeat("x", 100_000), fleet.None{}, "no such kind")
	wantRefusal[message.Blob](t, g, "another body", message.AskBlob, message.AskedRecords{}, "malformed")
	long := g.begin(message.AskLedger, message.Signed{Message: bytes.Repeat([]byte{0xff}, 100_000)}).answer()
	if len(long.Error) == 0 || len(long.Error) > 512 {
		t.Errorf("an error of %d bytes", len(long.Error))
	}
	answers := must(bus.NC.SubscribeSync("ek1.*.*.down.answer"))
	good := func(g *gateway) []byte {
		return message.Encode(message.Ask{ID: make([]byte, message.AskID), Kind: message.AskBlob, Body: cose.MustMarshal(message.AskedBlob{ID: make([]byte, 32)})})
	}
	n := refusals(f, "")
	g.publish("ask", []byte("garbage"))
	g.publish("ask", message.Encode(message.Ask{ID: make([]byte, 7), Kind: message.AskBlob, Body: cose.Raw{0xf6}}))
	revoked := enrolled(t, "acme", "curiousrev")
	revoked.change(func(g *cloud.Gateway) { g.Revoked = true })
	revoked.publish("ask", good(revoked))
	nobody := &gateway{t: t, tenant: "acme", name: "curiousno"}
	nobody.publish("ask", good(nobody))
	eventually(t, "four are refused", func() bool { return refusals(f, "") == n+4 })
	(&gateway{t: t, tenant: "nowhere", name: "x"}).publish("ask", good(nobody))
	(&gateway{t: t, tenant: "boot", name: "x"}).publish("ask", good(nobody))
	if m, err := answers.NextMsg(20 * time.Millisecond); err == nil {
		t.Errorf("answered on %s", m.Subject)
	}
}

// A gateway with many questions under way leaves room for others, and for its own
// questions of another kind.
func TestOneGatewayStarvesNobody(t *testing.T) {
	f, _ := startFleet(t)
	g, other := enrolled(t, "acme", "greedy"), enrolled(t, "acme", "modest")
	wait := message.AskedRecords{Gateway: "greedy", Stream: "temp", Wait: 20_000}
	for range 200 {
		g.publish("ask", message.Encode(message.Ask{ID: make([]byte, message.AskID), Kind: message.AskRecords, Body: cose.MustMarshal(wait)}))
	}
	eventually(t, "most are dropped", func() bool {
		return f.Metrics.Of("acme")["dropped: too many questions under way"]+f.Metrics.Of("")["dropped: too many questions under way"] == 200-48
	})
	for _, x := range []*gateway{other, g} {
		if _, reason := ask[message.Blob](x, message.AskBlob, message.AskedBlob{ID: make([]byte, 32)}); !strings.Contains(reason, "not here") {
			t.Errorf("%s: %q", x.name, reason)
		}
	}
	wait.Wait = 0
	if _, reason := ask[message.Records](other, message.AskRecords, wait); reason != "" {
		t.Error(reason)
	}
}

func TestInfer(t *testing.T) {
	startFleet(t)
	startFleet(t) // the reply may come to the other one
	g := runner(t, "infer")
	down := must(bus.NC.SubscribeSync("ek1.acme.infer.down.peer"))
	if err := bus.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { // the keep
		for range 20 {
			m, err := down.NextMsgWithContext(deadline(t))
			if err != nil {
				t.Error(err)
				return
			}
			r := must(message.Decode[message.Routed](m.Data))
			e := must(workload.Unwrap(r.Data))
			q := must(workload.Body[workload.Asked](e))
			if r.Peer != "" || e.Kind != workload.KindRequest || q.Instance != "watch" || string(q.Nonce) != "nonce" {
				t.Errorf("it got %+v from %q", q, r.Peer)
			}
			body := cose.MustMarshal(message.Reply{ID: q.ID, Data: append([]byte("re "), q.Sealed...)})
			for range 2 { // repeated: nobody minds
				g.publish("ask", message.Encode(message.Ask{ID: make([]byte, 8), Kind: message.AskReply, Body: body}))
			}
		}
	})
	request := fleet.Infer{Gateway: "infer", Asked: workload.Asked{Instance: "watch", Nonce: []byte("nonce"), Sealed: []byte("x")}}
	for i := range 20 {
		request.Asked.Sealed = []byte{byte(i)}
		got, err := api[fleet.Inferred](t, "data.infer", request)
		if err != nil || string(got.Data) != "re "+string(byte(i)) && !bytes.Equal(got.Data, append([]byte("re "), byte(i))) {
			t.Fatalf("%q, %v", got.Data, err)
		}
	}
	for what, change := range map[string]func(*fleet.Infer){
		"nobody":      func(r *fleet.Infer) { r.Gateway = "nobody" },
		"a subject":   func(r *fleet.Infer) { r.Gateway = "infer.down" },
		"no instance": func(r *fleet.Infer) { r.Asked.Instance = "" },
		"too much":    func(r *fleet.Infer) { r.Asked.Sealed = make([]byte, mqtt.MaxPayload) },
	} {
		r := request
		change(&r)
		if _, err := api[fleet.Inferred](t, "data.infer", r); err == nil {
			t.Errorf("%s: answered", what)
		}
	}
	if _, err := cloud.Ask[fleet.Inferred](deadline(t), bus.NC, "api.globex.data.infer", request); err == nil {
		t.Error("another tenant was answered")
	}
}

func TestInferIsBounded(t *testing.T) {
	f, _ := startFleet(t)
	runner(t, "busy")
	request := fleet.Infer{Gateway: "busy", Asked: workload.Asked{Instance: "watch", Nonce: []byte("n"), Sealed: []byte("x")}}
	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	full := make(chan struct{})
	var once sync.Once
	for range 17 { // nobody answers: the seventeenth finds no place
		go func() {
			_, err := cloud.Ask[fleet.Inferred](ctx, bus.NC, "api.acme.data.infer", request)
			if err != nil && strings.Contains(err.Error(), "too many requests") {
				once.Do(func() { close(full) })
			}
		}()
	}
	select {
	case <-full:
	case <-deadline(t).Done():
		t.Fatal("there is no end to it")
	}
	_ = f
}

func TestVouch(t *testing.T) {
	f, _ := startFleet(t)
	g := runner(t, "vouched")
	ask := func(age int64) (attest.Verdict, error) {
		s, err := api[fleet.Saved](t, "data.attest", fleet.Vouch{Gateway: "vouched", Age: age})
		if err != nil {
			return attest.Verdict{}, err
		}
		return attest.PeekVerdict(s.Verdict)
	}
	if _, err := ask(60); err != nil || g.queue().Attest {
		t.Errorf("a young verdict does not do: %v", err)
	}
	f.Now = func() time.Time { return time.Now().Add(30 * time.Second) }
	if _, err := ask(60); err != nil || g.queue().Attest {
		t.Errorf("a verdict of 30 s does not do for a minute: %v", err)
	}
	answer := make(chan error, 1)
	go func() { _, err := ask(0); answer <- err }()
	eventually(t, "it is asked to attest", func() bool { return g.queue().Attest })
	v := g.verdict()
	v.NotBefore = time.Now().Unix() + 31
	for waited := true; waited; {
		if err := bus.NC.Publish("verdict.acme.vouched", must(v.Sign(signers["acme"]["verifier"]))); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-answer:
			if err != nil && !strings.Contains(err.Error(), "no evidence") {
				t.Error(err)
			}
			waited = false
		case <-time.After(5 * time.Millisecond):
		}
	}
	for _, name := range []string{"", "*", "nobody"} {
		if _, err := api[fleet.Saved](t, "data.attest", fleet.Vouch{Gateway: name}); err == nil {
			t.Errorf("%q was vouched for", name)
		}
	}
}

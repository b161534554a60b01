package fleet

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/nats-io/nats.go"

	"edgekeep/cloud"
	"edgekeep/cloud/keybroker"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee/message"
)

// limiter bounds what is under way, of each key and in all its groups.
type limiter struct {
	all, each int // in a group, and of each key in it

	mu   sync.Mutex // protects busy
	busy map[string]int
}

// enter takes a place; the function returned gives it back.
func (l *limiter) enter(group, key string) (leave func(), ok bool) {
	one := group + "\x00" + key
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[group] >= l.all || l.busy[one] >= l.each {
		return nil, false
	}
	if l.busy == nil {
		l.busy = map[string]int{}
	}
	l.busy[group]++
	l.busy[one]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, k := range []string{group, one} {
			if l.busy[k]--; l.busy[k] == 0 {
				delete(l.busy, k)
			}
		}
	}, true
}

const (
	asksAll      = 1024 // under way on a replica
	asksEach     = 16   // of a gateway, beside those for records
	waitsEach    = 48   // for records, which may wait long
	maxReason    = 512  // bytes of an error that goes down
	answersLimit = mqtt.MaxPayload - 1024
)

// asking answers gateways' questions. Those that find no place are dropped, and
// asked again: so no gateway takes the places of others.
type asking struct {
	*Fleet
	total, quick, waits *limiter
}

func (f *Fleet) runAsks(ctx context.Context) error {
	a := &asking{
		Fleet: f,
		total: &limiter{all: asksAll, each: asksEach + waitsEach},
		quick: &limiter{all: asksAll, each: asksEach},
		waits: &limiter{all: asksAll, each: waitsEach},
	}
	sub, err := f.Bus.NC.QueueSubscribe("ek1.*.*.up.ask", "fleet", func(m *nats.Msg) {
		leave, ok := a.total.enter("", m.Subject)
		if !ok {
			f.Count("", "dropped", "too many questions under way")
			return
		}
		go func() {
			defer leave()
			f.handle(ctx, m, a.ask)
		}()
	})
	if err != nil {
		return fmt.Errorf("subscribing to questions: %w", err)
	}
	<-ctx.Done()
	_ = sub.Unsubscribe()
	return ctx.Err()
}

// ask answers one question. Who is not enrolled gets no answer at all.
func (a *asking) ask(ctx context.Context, t mqtt.Topic, data []byte) error {
	if t.Tenant == mqtt.Boot {
		return nil
	}
	q, err := message.Decode[message.Ask](data)
	if err != nil {
		return err
	}
	if len(q.ID) != message.AskID {
		return fmt.Errorf("a question's id has %d bytes", message.AskID)
	}
	if err := a.peers.check(ctx, a.Fleet, t.Tenant, t.Gateway); err != nil {
		return err
	}
	limit := a.quick
	if q.Kind == message.AskRecords {
		limit = a.waits
	}
	leave, ok := limit.enter("", t.Subject())
	if !ok {
		a.Count(t.Tenant, "dropped", "too many questions under way")
		return nil
	}
	defer leave()
	body, err := a.answerTo(ctx, t, q)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	answer := message.Answer{ID: q.ID, Body: body}
	if err == nil && len(body) > answersLimit {
		err = fmt.Errorf("the answer has %d bytes, too many to send", len(body))
	}
	if err != nil {
		a.Count(t.Tenant, "question refused", q.Kind+": "+err.Error())
		a.Log.Debug("question refused", "gateway", t.Tenant+"/"+t.Gateway, "kind", q.Kind, "reason", err)
		answer.Error, answer.Body = cloud.Cut(err.Error(), maxReason), cose.Raw{0xf6}
	}
	return a.Bus.NC.Publish(mqtt.Topic{Tenant: t.Tenant, Gateway: t.Gateway, Kind: "answer"}.Subject(), message.Encode(answer))
}

// answerTo finds the answer. A bug of ours that one gateway has found must not
// stop the others.
func (a *asking) answerTo(ctx context.Context, t mqtt.Topic, q message.Ask) (body cose.Raw, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v", p)
		}
	}()
	switch q.Kind {
	case message.AskRecords:
		return reply(q, func(r message.AskedRecords) (message.Records, error) { return a.records(ctx, t.Tenant, r) })
	case message.AskKey:
		return reply(q, func(r message.AskedKey) (message.Release, error) { return a.releaseTo(ctx, t, r) })
	case message.AskBlob:
		return reply(q, func(r message.AskedBlob) (message.Blob, error) { return a.blob(ctx, t.Tenant, r) })
	case message.AskPut:
		return reply(q, func(r message.PutBlob) (message.Have, error) { return a.put(ctx, t.Tenant, t.Gateway, r) })
	case message.AskLedger:
		return reply(q, func(r message.Signed) (message.Signed, error) {
			msg, err := a.claim(ctx, t, r.Message)
			return message.Signed{Message: msg}, err
		})
	case message.AskEntry:
		return reply(q, func(r message.AskedEntry) (message.Signed, error) { return a.entry(ctx, t, r) })
	case message.AskSnapshot:
		return reply(q, func(r message.Signed) (None, error) { return None{}, a.snapshot(ctx, t, r.Message) })
	case message.AskRecovery:
		return reply(q, func(r message.AskedRecovery) (message.Signed, error) { return a.recovery(ctx, t, r) })
	case message.AskReply:
		return reply(q, func(r message.Reply) (None, error) { return None{}, a.reply(t, r) })
	}
	return nil, errors.New("no such kind of question")
}

func reply[Req, Rep any](q message.Ask, f func(Req) (Rep, error)) (cose.Raw, error) {
	var req Req
	if err := cose.Unmarshal(q.Body, &req); err != nil {
		return nil, err
	}
	rep, err := f(req)
	if err != nil {
		return nil, err
	}
	return cose.Marshal(rep)
}

// releaseTo passes a question for a key on to the key broker, with who asks.
func (f *Fleet) releaseTo(ctx context.Context, t mqtt.Topic, r message.AskedKey) (message.Release, error) {
	return cloud.Ask[message.Release](ctx, f.Bus.NC, "svc.key", keybroker.GatewayRequest{Tenant: t.Tenant, Gateway: t.Gateway, Asked: r})
}

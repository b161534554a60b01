// Package bridge joins the cloud to any MQTT broker: what gateways publish there
// goes onto the bus, what the cloud sends down goes to the broker. It understands
// nothing of what it moves, and trusts the broker as little as the rest does.
package bridge

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"

	"edgekeep/mqtt"
)

// Bridge is the role.
type Bridge struct {
	NC  *nats.Conn
	URL string
	TLS *tls.Config
	Log *slog.Logger
}

// Run joins until ctx ends; a broker that goes away is connected to again.
func (b *Bridge) Run(ctx context.Context) error {
	wait := 200 * time.Millisecond
	for ctx.Err() == nil {
		began := time.Now()
		err := b.join(ctx)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > 10*time.Second {
			wait = 200 * time.Millisecond
		}
		b.Log.Warn("no broker; trying again", "broker", b.URL, "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, 10*time.Second)
	}
	return ctx.Err()
}

func (b *Bridge) join(ctx context.Context) error {
	conn, err := mqtt.Dial(ctx, mqtt.Options{
		URL: b.URL, TLS: b.TLS, ClientID: "bridge", Username: "bridge",
		Subscribe: []string{"ek1/+/+/up/+"}, // "boot" is a tenant like any other here
		Receive: func(m mqtt.Message) {
			t, err := mqtt.ParseTopic(m.Topic)
			if err != nil || !t.Up {
				return
			}
			if err := b.NC.Publish(t.Subject(), m.Payload); err != nil {
				b.Log.Error("a message did not reach the bus", "topic", m.Topic, "err", err)
			}
		},
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	sub, err := b.NC.QueueSubscribe("ek1.*.*.down.*", "bridge", func(m *nats.Msg) {
		t, err := mqtt.ParseSubject(m.Subject)
		if err == nil {
			err = conn.Send(t.String(), m.Data)
		}
		if err != nil {
			b.Log.Warn("a message was not sent down", "subject", m.Subject, "err", err)
		}
	})
	if err != nil {
		return fmt.Errorf("subscribing to what goes down: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	b.Log.Info("joined", "broker", b.URL)
	select {
	case <-conn.Lost():
		return fmt.Errorf("the connection was lost")
	case <-ctx.Done():
		return ctx.Err()
	}
}

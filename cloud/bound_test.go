package cloud_test

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// What an MQTT client can leave behind in the server is bounded, also for a box
// without certificate: retained messages most of all.
func TestWhatMQTTLeavesBehindIsBounded(t *testing.T) {
	ctx := deadline(t)
	if _, _, err := (identity{}).dial(t, "boot_bound", strings.Repeat("ab", 32)); err != nil {
		t.Fatal(err)
	}
	js := must(jetstream.New(bus.NC))
	for _, name := range []string{"$MQTT_rmsgs", "$MQTT_sess", "$MQTT_msgs"} {
		for {
			s, err := js.Stream(ctx, name)
			if err == nil && s.CachedInfo().Config.MaxBytes > 0 {
				break
			}
			select {
			case <-ctx.Done():
				t.Fatalf("%s is not bounded: %v", name, err)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

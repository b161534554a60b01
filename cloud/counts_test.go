package cloud_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"edgekeep/cloud"
)

// Reasons come from hostile messages: however long and many, they stay small, and
// one tenant's are not another's.
func TestCountsStaySmall(t *testing.T) {
	var c cloud.Counts
	for i := range 1000 {
		c.Add("acme", "refused", fmt.Sprintf("%d%s", i, strings.Repeat("ü\x01", 1<<16)))
	}
	n, size := uint64(0), 0
	for k, v := range c.Of("acme") {
		n += v
		size += len(k)
		if !utf8.ValidString(k) {
			t.Errorf("%q", k)
		}
	}
	if n != 1000 || size > 64<<10 || len(c.Of("globex")) != 0 {
		t.Errorf("%d counted in %d bytes; of another tenant %v", n, size, c.Of("globex"))
	}
}

// An answer that is too large, an endless reason and a panic are errors of one
// request.
func TestAnswerSurvives(t *testing.T) {
	ctx := deadline(t)
	type text struct {
		S string `cbor:"1,keyasint"`
	}
	if err := cloud.Answer(ctx, bus, "svc.test.survives", "test", func(_ context.Context, _ string, r text) (text, error) {
		switch r.S {
		case "large":
			return text{strings.Repeat("x", 1<<20-8)}, nil
		case "reason":
			return text{}, errors.New(strings.Repeat("\xff", 2<<20))
		case "panic":
			panic("a bug")
		}
		return r, nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"large", "reason", "panic"} {
		var refused *cloud.Refused
		if _, err := cloud.Ask[text](ctx, bus.NC, "svc.test.survives", text{s}); !errors.As(err, &refused) {
			t.Errorf("%s: %.200v", s, err)
		}
	}
	if got, err := cloud.Ask[text](ctx, bus.NC, "svc.test.survives", text{"on"}); err != nil || got.S != "on" {
		t.Errorf("afterwards: %v, %v", got, err)
	}
}

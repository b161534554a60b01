package mqtt

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestTopic(t *testing.T) {
	for text, want := range map[string]Topic{
		"ek1/acme/gw7/up/sealed":                             {"acme", "gw7", true, "sealed"},
		"ek1/acme/gw7/down/item":                             {"acme", "gw7", false, "item"},
		"ek1/boot/" + strings.Repeat("0f", 32) + "/up/enrol": {Boot, strings.Repeat("0f", 32), true, "enrol"},
	} {
		got, err := ParseTopic(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%s: %+v, %s, %v", text, got, got, err)
		}
		subject := strings.ReplaceAll(text, "/", ".")
		got, err = ParseSubject(subject)
		if err != nil || got != want || got.Subject() != subject {
			t.Errorf("%s: %+v, %s, %v", subject, got, got.Subject(), err)
		}
	}
}

func TestTopicRefused(t *testing.T) {
	for _, text := range []string{
		"", "ek1", "ek1/acme/gw7/up", "ek1/acme/gw7/up/sealed/x", "/ek1/acme/gw7/up/sealed", "ek2/acme/gw7/up/sealed",
		"ek1/acme/gw7/sideways/sealed", "ek1//gw7/up/sealed", "ek1/acme//up/sealed", "ek1/acme/gw7/up/", "ek1/+/gw7/up/sealed",
		"ek1/acme/#/up/sealed", "ek1/acme/gw7/up/*", "ek1/acme/>/up/sealed", "ek1/acme/g w/up/sealed", "ek1/acme/gw_7/up/sealed",
		"ek1/acme/gw.7/up/sealed", "ek1/ac\x00me/gw7/up/sealed", "ek1/äcme/gw7/up/sealed", "ek1/acme/" + strings.Repeat("a", 65) + "/up/sealed",
	} {
		if got, err := ParseTopic(text); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

// Whatever a broker hands us as a topic is ours in one spelling, or none of ours.
func FuzzParseTopic(f *testing.F) {
	f.Add("ek1/acme/gw7/up/sealed")
	f.Add("ek1/boot/00/down/item")
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := ParseTopic(text); err == nil && got.String() != text {
			t.Fatalf("%q is written %q", text, got)
		}
		if got, err := ParseSubject(text); err == nil && got.Subject() != text {
			t.Fatalf("%q is written %q", text, got.Subject())
		}
	})
}

// Two gateways share neither a client id nor a common name.
func TestIdentitiesInjective(t *testing.T) {
	name := rapid.StringMatching(`[a-zA-Z0-9-]{1,31}`)
	rapid.Check(t, func(t *rapid.T) {
		a, b, c, d := name.Draw(t, "a"), name.Draw(t, "b"), name.Draw(t, "c"), name.Draw(t, "d")
		same := a == c && b == d
		if (ClientID(a, b) == ClientID(c, d)) != same || (CommonName(a, b) == CommonName(c, d)) != same {
			t.Fatalf("%s/%s and %s/%s are %s and %s", a, b, c, d, ClientID(a, b), ClientID(c, d))
		}
		if len(ClientID(a, b)) > 64 || len(CommonName(a, b)) > 64 {
			t.Fatalf("%s is too long", ClientID(a, b))
		}
	})
}

package hostile

import (
	"regexp"
	"strings"
	"testing"
)

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		filter, topic string
		want          bool
	}{
		// MQTT 3.1.1 section 4.7.1
		{"sport/tennis/player1/#", "sport/tennis/player1", true},
		{"sport/tennis/player1/#", "sport/tennis/player1/ranking", true},
		{"sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true},
		{"sport/#", "sport", true},
		{"#", "sport/tennis", true},
		{"sport/tennis/+", "sport/tennis/player1", true},
		{"sport/tennis/+", "sport/tennis/player1/ranking", false},
		{"sport/+", "sport", false},
		{"sport/+", "sport/", true},
		{"+/+", "/finance", true},
		{"/+", "/finance", true},
		{"+", "/finance", false},
		// ours
		{"ek1/+/+/up/#", "ek1/t/g/up/sealed", true},
		{"ek1/+/+/up/#", "ek1/t/g/down/ack", false},
		{"ek1/t/g/up/sealed", "ek1/t/g/up/sealed", true},
		{"ek1/t/g/up/sealed", "ek1/t/g/up/seale", false},
		{"ek1/t/g/up", "ek1/t/g/up/sealed", false},
		{"ek1/t/g/up/sealed", "ek1/t/g/up", false},
		{"a/+/#", "a/b", true},
		{"a/+/#", "a", false},
	} {
		if got := matches(c.filter, c.topic); got != c.want {
			t.Errorf("matches(%q, %q) = %v", c.filter, c.topic, got)
		}
	}
}

func TestValid(t *testing.T) {
	for filter, want := range map[string]bool{
		"a": true, "+": true, "#": true, "+/+": true, "a/#": true, "/": true, "a//b": true, "+/a/#": true,
		"": false, "a#": false, "#/a": false, "a+": false, "+a/b": false, "a/#/b": false, "\xff": false, "a\x00": false,
	} {
		if validFilter(filter) != want {
			t.Errorf("validFilter(%q) is not %v", filter, want)
		}
	}
	for topic, want := range map[string]bool{
		"a": true, "/": true, "a/b": true, strings.Repeat("x", 65535): true,
		"": false, "+": false, "a/#": false, "\xff": false, "a\x00b": false, strings.Repeat("x", 65536): false,
	} {
		if validTopic(topic) != want {
			t.Errorf("validTopic(%.20q) is not %v", topic, want)
		}
	}
}

// FuzzMatches compares with a regular expression made from the filter.
func FuzzMatches(f *testing.F) {
	f.Add("a/+/#", "a/b/c")
	f.Add("/+", "/a")
	f.Add("#", "/")
	f.Add("a/#", "a")
	f.Fuzz(func(t *testing.T, filter, topic string) {
		if !validFilter(filter) || !validTopic(topic) {
			return
		}
		pattern := strings.ReplaceAll(regexp.QuoteMeta(filter), `\+`, `[^/]*`)
		if pattern == "#" {
			pattern = ".*"
		} else if rest, ok := strings.CutSuffix(pattern, "/#"); ok {
			pattern = rest + "(/.*)?"
		}
		want := regexp.MustCompile(`(?s)\A` + pattern + `\z`).MatchString(topic)
		if got := matches(filter, topic); got != want {
			t.Errorf("matches(%q, %q) = %v, the expression %q says %v", filter, topic, got, pattern, want)
		}
	})
}

package hostile

import (
	"strings"
	"unicode/utf8"
)

// validTopic tells whether a message may have this topic (MQTT 3.1.1 sections
// 1.5.3 and 4.7).
func validTopic(topic string) bool {
	return topic != "" && len(topic) <= 65535 && utf8.ValidString(topic) && !strings.ContainsAny(topic, "+#\x00")
}

// validFilter tells whether a subscription may have this filter: + only as a
// whole level, # only as the whole last level.
func validFilter(filter string) bool {
	if filter == "" || !utf8.ValidString(filter) || strings.Contains(filter, "\x00") {
		return false
	}
	levels := strings.Split(filter, "/")
	for i, level := range levels {
		switch {
		case level == "+", level == "#" && i == len(levels)-1:
		case strings.ContainsAny(level, "+#"):
			return false
		}
	}
	return true
}

// matches tells whether a valid filter covers a valid topic. "a/#" covers "a".
func matches(filter, topic string) bool {
	for {
		want, moreWanted, wantsMore := strings.Cut(filter, "/")
		if want == "#" {
			return true
		}
		got, moreGot, gotMore := strings.Cut(topic, "/")
		if want != "+" && want != got {
			return false
		}
		if !gotMore {
			return !wantsMore || moreWanted == "#"
		}
		if !wantsMore {
			return false
		}
		filter, topic = moreWanted, moreGot
	}
}

package cloud

import (
	"maps"
	"strings"
	"sync"
)

// Counts counts events for each tenant, by what and why. Reasons come from
// hostile messages: they are cut, and only so many are told apart.
type Counts struct {
	mu sync.Mutex // protects n
	n  map[string]map[string]uint64
}

const (
	maxReasons = 200
	maxReason  = 120 // bytes
)

// Add counts one for a tenant; "" is for what belongs to none.
func (c *Counts) Add(tenant, what, why string) {
	key := what
	if why != "" {
		key += ": " + Cut(why, maxReason)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]map[string]uint64{}
	}
	of := c.n[tenant]
	if of == nil {
		of = map[string]uint64{}
		c.n[tenant] = of
	}
	if _, ok := of[key]; !ok && len(of) >= maxReasons {
		key = what + ": other"
	}
	of[key]++
}

// Of returns a tenant's counts.
func (c *Counts) Of(tenant string) map[string]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.n[tenant])
}

// Cut shortens a text from outside to at most n bytes of UTF-8.
func Cut(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

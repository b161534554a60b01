package keep

import (
	"testing"

	"edgekeep/sensors"
)

// line gives a line to the sealer as a connection's reader does.
func line(t testing.TB, c *ingestConn, number uint64, text string) bool {
	t.Helper()
	return c.s.add(c, must(sensors.ParseLine([]byte(text)))(t), number)
}

package client

import (
	"context"
	"time"

	"edgekeep/cloud/fleet"
	"edgekeep/cloud/keybroker"
	"edgekeep/sealing"
	"edgekeep/tee/message"
)

// Chunks returns stored chunks as they are, sealed and not checked, after a
// position in the store (0: from the beginning); the answer's Next is the
// position to go on from. gateway and stream may be empty: all. It waits up to
// wait, at most 20 s, for the first one.
func (c *Client) Chunks(ctx context.Context, gateway, stream string, after uint64, wait time.Duration) (fleet.Fetched, error) {
	return ask[fleet.Fetched](ctx, c, "data.fetch", fleet.Fetch{
		Gateway: gateway, Stream: stream, After: after, Wait: wait.Milliseconds(),
	})
}

// Release has the key broker seal a stream key to this kit's consumer. Nothing in
// the answer is checked.
func (c *Client) Release(ctx context.Context, gateway, stream string, epoch sealing.Epoch) (message.Release, error) {
	return ask[message.Release](ctx, c, "data.key", keybroker.Request{
		Gateway: gateway, Stream: stream, Epoch: epoch[:], Consumer: c.Consumer,
	})
}

package client

import (
	"context"
	"fmt"

	"edgekeep/cloud/fleet"
	"edgekeep/workload"
)

// Snapshots returns an instance's checkpoints in the cloud, newest last. What they
// say is their keeps' word, as the fleet has verified it: a lost gateway's keys
// cannot be asked for any more.
func (c *Client) Snapshots(ctx context.Context, instance string) ([]workload.Snapshot, error) {
	all, err := ask[fleet.Snapshots](ctx, c, "workload.snapshots", fleet.Instance{Instance: instance})
	if err != nil {
		return nil, err
	}
	var out []workload.Snapshot
	for _, msg := range all.Signed {
		s, _, err := workload.PeekSnapshot(msg)
		if err == nil && s.Instance != instance {
			err = fmt.Errorf("the cloud sent a checkpoint of %s", s.Instance)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

package agent

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"maps"
	"time"

	"edgekeep/internal/durable"
	"edgekeep/tee"
)

// Status is what status.json in the agent's state directory says, once a second.
type Status struct {
	Time              time.Time        `json:"time"`
	Phase             string           `json:"phase"`
	Gateway           string           `json:"gateway"`
	Epoch             string           `json:"epoch"`
	Connected         bool             `json:"connected"`
	Reason            string           `json:"reason,omitempty"`
	SpoolChunks       int              `json:"spool_chunks"`
	SpoolBytes        int64            `json:"spool_bytes"`
	Readings          uint64           `json:"readings"`    // sealed since the keep started
	Rejected          uint64           `json:"rejected"`    // lines
	TurnedAway        uint64           `json:"turned_away"` // connections of drivers
	Resends           int              `json:"resends"`
	RefusedItems      int              `json:"refused_items"`
	RefusedWatermarks int              `json:"refused_watermarks"`
	Watermarks        map[string]Mark  `json:"watermarks"`
	Sources           []map[string]any `json:"sources"`

	// Of workloads.
	InstanceLogs  []InstanceLog `json:"instance_logs"`
	Downloads     []Download    `json:"downloads"`
	BlocksFetched int           `json:"blocks_fetched"`        // of blobs, since the agent started
	RefusedBlocks int           `json:"refused_blocks"`        // that were not the blob's
	Questions     int           `json:"questions"`             // that wait for the cloud's answer
	DroppedPeers  int           `json:"dropped_peer_messages"` // from other gateways: malformed, or no room
	RefusedPeers  int           `json:"refused_peer_messages"` // by the keep
}

// InstanceLog is how much a workload instance keeps on this gateway.
type InstanceLog struct {
	Instance string `json:"instance"`
	Bytes    int64  `json:"bytes"`
	Entries  uint64 `json:"entries"`
}

// Download is a blob that is being fetched.
type Download struct {
	Blob   string `json:"blob"` // its id in hexadecimal
	Have   int    `json:"have"`
	Blocks int    `json:"blocks"` // 0 until it is known
}

// Mark is a place in a stream.
type Mark struct {
	Epoch string `json:"epoch"`
	Seq   uint64 `json:"seq"`
}

func (a *Agent) note(f func(*Status)) { a.count(f) }

func (a *Agent) count(f func(*Status)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.status.Watermarks == nil {
		a.status.Watermarks = map[string]Mark{}
	}
	f(&a.status)
}

// runStatus writes the status file. It is for people and monitors: it may be
// lost, so it is not synced.
func (a *Agent) runStatus(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		raw, err := json.Marshal(a.snapshot(ctx))
		if err == nil {
			err = durable.WriteFile(a.path("status.json"), append(raw, '\n'), 0o644)
		}
		if err != nil {
			a.log.Warn("writing the status file", "err", err)
		}
	}
}

func (a *Agent) snapshot(ctx context.Context) Status {
	var keep tee.StatusReply
	if a.isReady() {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		keep, _ = tee.Status{}.Do(ctx, a.keep) // a keep that does not answer shows as an empty phase
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.status
	s.InstanceLogs, s.Questions = a.instances.status(), a.questions.count()
	s.Downloads, s.BlocksFetched, s.RefusedBlocks = a.blobs.status()
	s.Watermarks = maps.Clone(s.Watermarks)
	s.Time, s.Phase, s.Epoch, s.TurnedAway = time.Now().UTC(), keep.Phase, keep.Epoch, keep.TurnedAway
	if keep.Tenant != "" {
		s.Gateway = keep.Tenant + "/" + keep.Gateway
	}
	if s.Reason == "" {
		s.Reason = keep.Reason
	}
	for _, sp := range a.spools {
		n, size := sp.depth()
		s.SpoolChunks += n
		s.SpoolBytes += size
	}
	for _, src := range keep.Sources {
		s.Readings += src.Readings
		s.Rejected += src.Rejected
		s.Sources = append(s.Sources, map[string]any{
			"name": src.Name, "connected": src.Connected, "late": src.Late, "lines": src.Lines, "readings": src.Readings,
			"rejected": src.Rejected, "repeated": src.Repeated, "missing": src.Missing, "last_error": src.LastError,
		})
	}
	return s
}

func decodePEM(raw []byte) [][]byte {
	var out [][]byte
	for {
		b, rest := pem.Decode(raw)
		if b == nil {
			return out
		}
		if b.Type == "CERTIFICATE" {
			out = append(out, b.Bytes)
		}
		raw = rest
	}
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"edgekeep/internal/durable"
	"edgekeep/tee"
)

// stepPatience is for a step: a TPM may be slow.
const stepPatience = 30 * time.Second

// asking is a request whose outcome may be a step.
type asking func(context.Context) (tee.Outcome, error)

// start starts the keep, which offers a step again that was cut short.
func (a *Agent) start(ctx context.Context, start tee.Start) error {
	if err := acquire(ctx, a.step); err != nil {
		return err
	}
	defer release(a.step)
	select {
	case <-a.again:
	default:
	}
	a.starts.Add(1)
	defer a.starts.Add(1)
	out, err := start.Do(ctx, a.keep)
	if err == nil && out.Fresh {
		err = a.setAside(ctx)
	}
	if err == nil {
		_, err = a.settle(ctx, out)
	}
	return err
}

// exchange asks the keep for something that may be a step, and settles the outcome:
// what comes with the last one is still to be published. One at a time.
func (a *Agent) exchange(ctx context.Context, ask asking) (tee.Outcome, error) {
	if err := acquire(ctx, a.step); err != nil {
		return tee.Outcome{}, err
	}
	defer release(a.step)
	return a.take(ctx, func(ctx context.Context) (tee.Outcome, error) {
		out, err := ask(ctx)
		if err != nil {
			return out, err
		}
		return a.settle(ctx, out)
	})
}

// handOver is exchange for messages of other gateways. Most are frames of a move,
// which are no step, and shall not wait while the TPM works on somebody else's.
func (a *Agent) handOver(ctx context.Context, ask asking) (tee.Outcome, error) {
	starts := a.starts.Load()
	if len(a.step) == 0 || starts%2 == 1 {
		return a.exchange(ctx, ask)
	}
	out, err := a.take(ctx, ask)
	var refusal *tee.Refusal
	if errors.As(err, &refusal) { // perhaps because of the other step
		return a.exchange(ctx, ask)
	}
	if err != nil || len(out.Commit)+len(out.Certificate)+len(out.Verdict) == 0 {
		if out.Pull {
			a.pullSoon()
		}
		return out, err
	}
	// A step after all. The keep refuses others until this one has its Commit; only a
	// Start offers it anew, and then this state is worthless and must not be stored.
	if err := acquire(ctx, a.step); err != nil {
		a.startAgain()
		return tee.Outcome{}, err
	}
	defer release(a.step)
	if a.starts.Load() != starts {
		a.startAgain()
		return tee.Outcome{}, errors.New("the keep was started in the middle of a step")
	}
	return a.take(ctx, func(ctx context.Context) (tee.Outcome, error) { return a.settle(ctx, out) })
}

// take lets a step come to its end even if ctx does not wait for it: a connection
// that is lost is no reason to leave the keep without its Commit. A keep that did
// not give its word has to be started again.
func (a *Agent) take(ctx context.Context, ask asking) (tee.Outcome, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepPatience)
	defer cancel()
	out, err := ask(ctx)
	var refusal *tee.Refusal
	if err != nil && !errors.As(err, &refusal) {
		a.startAgain()
	}
	return out, err
}

func (a *Agent) startAgain() {
	select {
	case a.again <- struct{}{}:
	default:
	}
}

// settle makes the states durable that an outcome asks for, and takes what came
// with it. The caller holds a.step.
func (a *Agent) settle(ctx context.Context, out tee.Outcome) (tee.Outcome, error) {
	for len(out.Commit) > 0 {
		if err := durable.WriteFile(a.path("state.cbor"), out.Commit, 0o600); err != nil {
			return out, fmt.Errorf("%w: storing the keep's state: %w", errSpool, err)
		}
		var err error
		if out, err = (tee.Commit{State: sha256Sum(out.Commit)}).Do(ctx, a.keep); err != nil {
			return out, err
		}
	}
	if len(out.Certificate) > 0 {
		if err := durable.WriteFile(a.path("client.pem"), encodePEM(out.Certificate), 0o600); err != nil {
			return out, fmt.Errorf("%w: storing the client certificate: %w", errSpool, err)
		}
	}
	if len(out.Verdict) > 0 {
		if err := durable.WriteFile(a.path("verdict.cbor"), out.Verdict, 0o600); err != nil {
			return out, fmt.Errorf("%w: storing the verdict: %w", errSpool, err)
		}
	}
	if out.Pull {
		a.pullSoon()
	}
	return out, nil
}

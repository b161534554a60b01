package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"edgekeep/sensors/driver"
	"edgekeep/sensors/host"
	"edgekeep/sensors/replay"
)

var (
	// grace is how long the keep has, after a signal or a failure, for what was read before.
	grace = 5 * time.Second
	// patience is after how long without an answer of the keep we say so.
	patience = 10 * time.Second
)

func (c *config) driveHost(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	session := "host-" + rand.Text()
	return c.drive(ctx, session, stdout, log, func(client *driver.Client) error {
		tick := time.NewTicker(c.Host.Interval)
		defer tick.Stop()
		said := ""
		var line []byte
		for n := int64(1); ; n++ {
			points, errs := host.Sample(c.Host.Root, time.Now())
			if err := errors.Join(errs...); err != nil && err.Error() != said {
				said = err.Error() // once, until it changes
				log.Warn("not everything can be read", "err", err)
			}
			for _, p := range points {
				line = p.AppendLine(line[:0])
				if err := client.Send(ctx, line); err != nil {
					return err
				}
			}
			if n == c.Host.Count {
				return nil
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
			}
		}
	})
}

func (c *config) driveReplay(ctx context.Context, path string, stdout io.Writer, log *slog.Logger) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	session, err := c.replaySession(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return c.drive(ctx, session, stdout, log, func(client *driver.Client) error {
		skip, err := client.Resume(ctx)
		if err != nil {
			return err
		}
		o := replay.Options{
			Measurement: c.Replay.Measurement, TimeColumn: c.Replay.TimeColumn, Speed: c.Replay.Speed, Skip: skip,
		}
		return replay.Run(ctx, file, o, func(line []byte) error { return client.Send(ctx, line) })
	})
}

// replaySession names the lines that a replay of file makes, by all that they
// are made of, so that the same replay resumes and another one does not.
func (c *config) replaySession(file io.ReadSeeker) (string, error) {
	content := sha256.New()
	if _, err := io.Copy(content, file); err != nil {
		return "", err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	all := sha256.New()
	fmt.Fprintf(all, "%x %q %q", content.Sum(nil), c.Replay.Measurement, c.Replay.TimeColumn)
	return fmt.Sprintf("replay-%x", all.Sum(nil)[:12]), nil
}

// drive gives a client to source until that ends, waits for the keep, and
// prints the account.
func (c *config) drive(ctx context.Context, session string, stdout io.Writer, log *slog.Logger, source func(*driver.Client) error) error {
	client := driver.NewClient(c.Socket, session)
	// The client outlives ctx: it has to deliver what was read before.
	alive, stop := context.WithCancel(context.WithoutCancel(ctx))
	ran, told := make(chan error, 1), make(chan struct{})
	go func() { ran <- client.Run(alive) }()
	go func() {
		defer close(told)
		tellOfSilence(alive, client, log)
	}()

	failed := source(client)
	if ctx.Err() != nil && errors.Is(failed, ctx.Err()) {
		failed = nil // stopped, as asked
	}
	flushed := flush(ctx, client, failed != nil)
	stop()
	failed = cmp.Or(failed, <-ran, flushed)
	<-told
	return cmp.Or(failed, account(stdout, client.Stats()))
}

// flush waits for the keep: as long as it takes, but not longer than grace when
// ctx has ended or something has failed.
func flush(ctx context.Context, client *driver.Client, failed bool) error {
	if !failed {
		if err := client.Flush(ctx); err == nil || ctx.Err() == nil {
			return err
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	return client.Flush(last)
}

// tellOfSilence warns as long as the keep has not answered for the first time.
func tellOfSilence(ctx context.Context, client *driver.Client, log *slog.Logger) {
	for {
		wait, cancel := context.WithTimeout(ctx, patience)
		_, err := client.Resume(wait)
		cancel()
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return
		}
		log.Warn("no answer from the keep yet; is it running, and may this user use its socket?", "err", err)
	}
}

func account(stdout io.Writer, s driver.Stats) error {
	return json.NewEncoder(stdout).Encode(struct {
		Sent     uint64 `json:"sent"`
		Acked    uint64 `json:"acked"`
		Readings uint64 `json:"readings"`
		Rejected uint64 `json:"rejected"`
	}{s.Sent, s.Acked, s.Readings, s.Rejected})
}

package main

import (
	"context"
	"errors"
	"log/slog"
	"net"

	"golang.org/x/sync/errgroup"

	"edgekeep/tee"
)

// serve answers the agent's requests on every connection.
func serve(ctx context.Context, l net.Listener, h tee.Handler, log *slog.Logger) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				err = nil
			}
			return errors.Join(err, g.Wait())
		}
		g.Go(func() error {
			if err := tee.ServeConn(ctx, conn, h); err != nil && ctx.Err() == nil {
				log.Warn("the agent's connection ended", "err", err)
			}
			return nil
		})
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
)

func (a *app) sendCommand(cmd *cobra.Command, c *client.Client, pos, args []string, expires, wait time.Duration) error {
	m := map[string]string{}
	for _, arg := range args {
		k, v, ok := strings.Cut(arg, "=")
		if !ok {
			return fmt.Errorf("--arg %s: name=value is needed", arg)
		}
		m[k] = v
	}
	if len(m) == 0 {
		m = nil
	}
	var until time.Time
	if expires > 0 {
		until = time.Now().Add(expires)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), wait)
	defer cancel()
	r, err := c.Command(ctx, pos[0], pos[1], m, until)
	if err != nil {
		return err
	}
	err = a.print(map[string]any{
		"gateway": r.Subject, "sequence": r.Sequence, "command": pos[1], "done": r.Done, "reason": r.Reason, "output": r.Output,
	}, func(w io.Writer) {
		fmt.Fprintf(w, "%s, command %d, %s: %s\n", r.Subject, r.Sequence, pos[1], resultText(r.Done, r.Reason, r.Output))
	})
	if err == nil && !r.Done {
		err = errors.New("the gateway refused the command")
	}
	return err
}

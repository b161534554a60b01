package main

import (
	"bufio"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/sealing"
)

func (a *app) dataCommand() *cobra.Command {
	c := &cobra.Command{Use: "data", Short: "Open sealed readings, for the holder of a consumer key"}
	c.AddCommand(a.dataTail(), a.dataExport(), a.dataGrant())
	return c
}

// readingLine is a reading as JSON.
type readingLine struct {
	Gateway string `json:"gateway"`
	Stream  string `json:"stream"`
	Time    string `json:"time"`
	Name    string `json:"name"`
	Value   any    `json:"value"`
	Unit    string `json:"unit,omitempty"`
	Epoch   string `json:"epoch"`
	Seq     uint64 `json:"seq"`
}

func newLine(o client.Opened, r sealing.Reading) readingLine {
	return readingLine{
		Gateway: o.Gateway, Stream: o.Stream, Time: time.Unix(0, r.Time).UTC().Format(time.RFC3339Nano),
		Name: r.Name, Value: r.Value, Unit: r.Unit, Epoch: o.Epoch.String(), Seq: o.Seq,
	}
}

func (a *app) dataTail() *cobra.Command {
	var gateway, stream string
	var all bool
	c := &cobra.Command{
		Use: "tail", Short: "Show readings as they arrive, until interrupted", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				rd, err := c.Reader(gateway, stream)
				if err != nil {
					return err
				}
				start := time.Now()
				for cmd.Context().Err() == nil {
					recs, err := rd.Next(cmd.Context(), 10*time.Second)
					if err != nil && cmd.Context().Err() == nil {
						return err
					}
					for _, o := range recs {
						if err := a.tailRecord(o, all, start); err != nil {
							return err
						}
					}
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&gateway, "gateway", "", "only this gateway")
	c.Flags().StringVar(&stream, "stream", "", "only this stream")
	c.Flags().BoolVar(&all, "all", false, "from the beginning of what is stored, not only from now on")
	return c
}

func (a *app) tailRecord(o client.Opened, all bool, start time.Time) error {
	if o.Gap != "" {
		fmt.Fprintf(a.err, "edgekeep: %s/%s: %s\n", o.Gateway, o.Stream, o.Gap)
	}
	for _, r := range o.Readings {
		if !all && r.Time < start.UnixNano() {
			continue
		}
		l := newLine(o, r)
		if err := a.print(l, func(w io.Writer) {
			fmt.Fprintf(w, "%s  %s/%s  %s  %v %s\n", time.Unix(0, r.Time).Local().Format("15:04:05.000"), o.Gateway, o.Stream, r.Name, r.Value, r.Unit)
		}); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) dataExport() *cobra.Command {
	var gateway, stream, format, out string
	c := &cobra.Command{
		Use: "export", Short: "Write everything that is stored to a file, as CSV or JSON lines", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "csv" && format != "jsonl" {
				return fmt.Errorf("--format %s: csv or jsonl", format)
			}
			return a.with(func(c *client.Client) error {
				rd, err := c.Reader(gateway, stream)
				if err != nil {
					return err
				}
				return a.export(cmd.Context(), rd, format, out)
			})
		},
	}
	c.Flags().StringVar(&gateway, "gateway", "", "only this gateway")
	c.Flags().StringVar(&stream, "stream", "", "only this stream")
	c.Flags().StringVar(&format, "format", "csv", "csv or jsonl")
	c.Flags().StringVarP(&out, "output", "o", "", "file to write; standard output if not given")
	return c
}

func (a *app) export(ctx context.Context, rd *client.Reader, format, path string) (err error) {
	w := a.out
	if path != "" {
		f, err := os.Create(path)
		if err != nil {
			return fmt.Errorf("making the file: %w", err)
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		w = f
	}
	buf := bufio.NewWriter(w)
	emit, flush := exporter(buf, format)
	records, readings, gaps := 0, 0, 0
	for {
		recs, err := rd.Next(ctx, 0)
		if err != nil {
			return err
		}
		if len(recs) == 0 {
			break
		}
		for _, o := range recs {
			records++
			if o.Gap != "" {
				gaps++
				fmt.Fprintf(a.err, "edgekeep: %s/%s: %s\n", o.Gateway, o.Stream, o.Gap)
			}
			for _, r := range o.Readings {
				readings++
				if err := emit(newLine(o, r)); err != nil {
					return fmt.Errorf("writing: %w", err)
				}
			}
		}
	}
	if err := errors.Join(flush(), buf.Flush()); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	if path == "" {
		return nil
	}
	return a.print(map[string]any{"file": path, "records": records, "readings": readings, "gaps": gaps}, func(w io.Writer) {
		fmt.Fprintf(w, "Wrote %d readings from %d verified records to %s; %d gaps.\n", readings, records, path, gaps)
	})
}

func exporter(w io.Writer, format string) (emit func(readingLine) error, flush func() error) {
	if format == "jsonl" {
		enc := json.NewEncoder(w)
		return func(l readingLine) error { return enc.Encode(l) }, func() error { return nil }
	}
	cw := csv.NewWriter(w)
	header := false
	return func(l readingLine) error {
			if !header {
				header = true
				if err := cw.Write([]string{"time", "gateway", "stream", "name", "value", "unit", "epoch", "seq"}); err != nil {
					return err
				}
			}
			return cw.Write([]string{l.Time, l.Gateway, l.Stream, l.Name, fmt.Sprint(l.Value), l.Unit, l.Epoch, strconv.FormatUint(l.Seq, 10)})
		}, func() error {
			cw.Flush()
			return cw.Error()
		}
}

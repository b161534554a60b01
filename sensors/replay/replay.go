// Package replay turns a CSV file of old readings into lines of the ingest
// format, at the pace they were taken or as fast as they are wanted.
//
// The first row names the columns. One column is the time; every other becomes
// a field under its name, with the time of its row. A column whose first value
// is a decimal number holds float64 fields, and every value in it has to be a
// number; any other column holds strings. An empty cell is no field.
//
// The same file and options give the same lines, one for each row, so a replay
// that was stopped goes on after the last line that arrived.
//
// Times are one of
//
//	2013-12-02T21:15:00.5+01:00   RFC 3339
//	2013-12-02 21:15:00.5         in UTC
//	1386018900                    seconds since the Unix epoch, at most 11 digits
//	1386018900000000000           nanoseconds since the Unix epoch, 16 digits or more
package replay

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"edgekeep/sensors"
)

// Options of a replay. The zero value replays a file with a column named time,
// timestamp or ts as fast as send takes it.
type Options struct {
	Measurement string  // of every line; "replay" when empty
	TimeColumn  string  // the first one named time, timestamp or ts when empty
	Speed       float64 // 1 is the pace of the times in the file, 2 twice that; 0 is as fast as possible
	Skip        uint64  // so many rows are not sent: those of an earlier replay
}

// Run reads the file and calls send for every row after the first o.Skip, with a
// line (no "\n") that is valid during the call. It returns when the file has
// ended, when ctx has (with its error), when send fails, or at the first row that
// is malformed: a file is worth correcting, so the error names the row. Rows are
// counted from 1, without the one that names the columns.
func Run(ctx context.Context, file io.Reader, o Options, send func(line []byte) error) error {
	r, err := newReader(file, o)
	if err != nil {
		return fmt.Errorf("replay: %w", err)
	}
	pace := pacer{speed: o.Speed}
	var line []byte
	for {
		p, err := r.next()
		if errors.Is(err, io.EOF) && r.row < o.Skip {
			return fmt.Errorf("replay: the file has %d rows, of which %d are to be skipped: is it the same file?", r.row, o.Skip)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("replay: row %d: %w", r.row+1, err)
		}
		if line = p.AppendLine(line[:0]); len(line) == 0 {
			return fmt.Errorf("replay: row %d: does not fit a line of %d bytes without control characters",
				r.row+1, sensors.MaxLine)
		}
		if r.row++; r.row <= o.Skip {
			continue
		}
		if err := pace.wait(ctx, p.Time); err != nil {
			return err
		}
		if err := send(line); err != nil {
			return err
		}
	}
}

type reader struct {
	csv         *csv.Reader
	measurement string
	columns     []column
	time        int    // index of the time column
	row         uint64 // rows done
}

type column struct {
	name            string
	known, isNumber bool // isNumber once a value is known
}

func newReader(file io.Reader, o Options) (*reader, error) {
	if o.Speed < 0 || math.IsNaN(o.Speed) || math.IsInf(o.Speed, 0) {
		return nil, fmt.Errorf("speed %v: want 0 or more", o.Speed)
	}
	r := &reader{csv: csv.NewReader(file), measurement: o.Measurement}
	if r.measurement == "" {
		r.measurement = "replay"
	}
	r.csv.ReuseRecord = true
	header, err := r.csv.Read()
	if errors.Is(err, io.EOF) {
		return nil, errors.New("the file is empty: want a first row with the names of the columns")
	}
	if err != nil {
		return nil, fmt.Errorf("first row: %w", err)
	}
	header[0] = strings.TrimPrefix(header[0], "\ufeff") // a byte order mark
	for _, name := range header {
		if slices.ContainsFunc(r.columns, func(c column) bool { return c.name == name }) {
			return nil, fmt.Errorf("first row: two columns are named %q", name)
		}
		r.columns = append(r.columns, column{name: name})
	}
	if r.time, err = timeColumn(header, o.TimeColumn); err != nil {
		return nil, err
	}
	return r, r.checkNames()
}

// checkNames finds out which name no line can have.
func (r *reader) checkNames() error {
	probe := func(p sensors.Point) bool { return len(p.AppendLine(nil)) > 0 }
	if !probe(sensors.Point{Measurement: r.measurement, Fields: []sensors.Field{{Name: "f", Value: true}}}) {
		return fmt.Errorf("measurement %q cannot be a name", r.measurement)
	}
	for i, c := range r.columns {
		if i != r.time && !probe(sensors.Point{Measurement: "m", Fields: []sensors.Field{{Name: c.name, Value: true}}}) {
			return fmt.Errorf("first row: column %d: %q cannot be a name", i+1, c.name)
		}
	}
	return nil
}

func timeColumn(header []string, name string) (int, error) {
	i := slices.IndexFunc(header, func(h string) bool {
		if name != "" {
			return h == name
		}
		return h == "time" || h == "timestamp" || h == "ts"
	})
	if i >= 0 {
		return i, nil
	}
	if name != "" {
		return 0, fmt.Errorf("first row: no column is named %q", name)
	}
	return 0, errors.New("first row: no column is named time, timestamp or ts: say which one is the time")
}

// next returns the point of the next row, io.EOF after the last.
func (r *reader) next() (sensors.Point, error) {
	cells, err := r.csv.Read()
	if err != nil {
		return sensors.Point{}, err
	}
	p := sensors.Point{Measurement: r.measurement, HasTime: true}
	if p.Time, err = parseTime(cells[r.time]); err != nil {
		return sensors.Point{}, err
	}
	for i, cell := range cells {
		if i == r.time || cell == "" {
			continue
		}
		v, err := r.columns[i].value(cell)
		if err != nil {
			return sensors.Point{}, err
		}
		p.Fields = append(p.Fields, sensors.Field{Name: r.columns[i].name, Value: v})
	}
	if len(p.Fields) == 0 {
		return sensors.Point{}, errors.New("no value in any column")
	}
	return p, nil
}

func (c *column) value(cell string) (any, error) {
	v, err := strconv.ParseFloat(cell, 64)
	// ParseFloat also takes Inf, NaN, hexadecimal and digit separators.
	number := err == nil && strings.Trim(cell, "0123456789+-.eE") == ""
	if !c.known {
		c.known, c.isNumber = true, number
	}
	switch {
	case !c.isNumber:
		return cell, nil
	case !number:
		return nil, fmt.Errorf("column %q: no number, and the rows before have numbers", c.name)
	}
	return v, nil
}

// maxSeconds is how many of them 64 bits of nanoseconds hold.
const maxSeconds = math.MaxInt64 / int64(time.Second)

// parseTime gives nanoseconds since the Unix epoch.
func parseTime(s string) (int64, error) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		switch digits := len(strings.TrimLeft(s, "+-")); {
		case digits <= 11 && n >= -maxSeconds && n <= maxSeconds:
			return n * int64(time.Second), nil
		case digits >= 16:
			return n, nil
		}
	}
	for _, layout := range []string{time.RFC3339, time.DateTime} {
		t, err := time.Parse(layout, s)
		if err == nil && t.Year() > 1677 && t.Year() < 2262 { // what 64 bits of nanoseconds hold
			return t.UnixNano(), nil
		}
	}
	return 0, fmt.Errorf("time %q: want RFC 3339, 2006-01-02 15:04:05, or seconds or nanoseconds since 1970", s)
}

// pacer waits as long as it took from the first time to the one it is given.
type pacer struct {
	speed   float64
	started time.Time
	first   int64
}

func (p *pacer) wait(ctx context.Context, at int64) error {
	if p.speed == 0 {
		return ctx.Err()
	}
	if p.started.IsZero() {
		p.started, p.first = time.Now(), at
	}
	due := (float64(at) - float64(p.first)) / p.speed
	left := time.Duration(max(0, min(due, math.MaxInt64/2))) - time.Since(p.started)
	if left <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

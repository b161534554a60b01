package runner

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"edgekeep/sealing"
	"edgekeep/workload"
)

const (
	maxReadings = 10_000
	maxText     = 64 << 10 // bytes of a line
	maxValue    = 16 << 10 // bytes of a text: it fits a record of its stream
	maxName     = 1024     // bytes of a name
	csvHeader   = "name,time,value,unit\n"
)

// encodeBatch writes readings in a workload's input format.
func encodeBatch(format string, readings []sealing.Reading) ([]byte, error) {
	switch format {
	case workload.JSON:
		var b []byte
		for _, r := range readings {
			b = appendJSON(b, r)
		}
		return b, nil
	case workload.CSV:
		var b bytes.Buffer
		b.WriteString(csvHeader)
		w := csv.NewWriter(&b)
		for _, r := range readings {
			_ = w.Write([]string{r.Name, seconds(r.Time), text(r.Value), r.Unit}) // a buffer takes all
		}
		w.Flush()
		return b.Bytes(), w.Error()
	case workload.SenML:
		var p sealing.Pack
		for _, r := range readings {
			p.Add(r)
		}
		return p.Marshal(), nil
	}
	return nil, fmt.Errorf("readings have no format %q", format)
}

func appendJSON(b []byte, r sealing.Reading) []byte {
	b = append(b, `{"n":`...)
	b = appendString(b, r.Name)
	b = append(append(b, `,"t":`...), seconds(r.Time)...)
	if r.Unit != "" {
		b = appendString(append(b, `,"u":`...), r.Unit)
	}
	switch v := r.Value.(type) {
	case string:
		b = appendString(append(b, `,"vs":`...), v)
	case bool:
		b = strconv.AppendBool(append(b, `,"vb":`...), v)
	default:
		b = append(append(b, `,"v":`...), text(v)...)
	}
	return append(b, '}', '\n')
}

func appendString(b []byte, s string) []byte {
	q, err := json.Marshal(s)
	if err != nil { // not of a string
		panic(err)
	}
	return append(b, q...)
}

// seconds writes ns since the epoch as seconds.
func seconds(ns int64) string {
	s, frac := ns/1e9, ns%1e9
	sign := ""
	if ns < 0 {
		s, frac, sign = -s, -frac, "-"
	}
	out := sign + strconv.FormatInt(s, 10)
	if frac != 0 {
		out += "." + strings.TrimRight(fmt.Sprintf("%09d", frac), "0")
	}
	return out
}

func text(v any) string {
	switch v := v.(type) {
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64)
	case int64:
		return strconv.FormatInt(v, 10)
	case uint64:
		return strconv.FormatUint(v, 10)
	case bool:
		return strconv.FormatBool(v)
	case string:
		return v
	}
	panic(fmt.Sprintf("a reading's value of type %T", v)) // package sealing has no other
}

// decodeResults reads a workload's results. Those without a time get now.
func decodeResults(format string, out []byte, now time.Time) ([]sealing.Reading, error) {
	if len(out) == 0 {
		return nil, nil
	}
	var readings []sealing.Reading
	var err error
	switch format {
	case workload.JSON:
		readings, err = decodeJSON(out, now)
	case workload.CSV:
		readings, err = decodeCSV(out, now)
	case workload.SenML:
		readings, err = sealing.ParsePack(out)
	default:
		err = fmt.Errorf("readings have no format %q", format)
	}
	if err == nil && len(readings) > maxReadings {
		err = fmt.Errorf("%d readings, at most %d", len(readings), maxReadings)
	}
	for i, r := range readings {
		if err == nil {
			if err = check(r); err != nil {
				err = fmt.Errorf("reading %d: %w", i+1, err)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("its results are not readings in %s: %w", format, err)
	}
	return readings, nil
}

func check(r sealing.Reading) error {
	switch {
	case r.Name == "" || len(r.Name) > maxName || !utf8.ValidString(r.Name):
		return errors.New("a name is missing, too long, or no UTF-8")
	case len(r.Unit) > 64 || !utf8.ValidString(r.Unit):
		return errors.New("a unit is too long or no UTF-8")
	}
	switch v := r.Value.(type) {
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return errors.New("a value is no number")
		}
	case string:
		if len(v) > maxValue || !utf8.ValidString(v) {
			return errors.New("a text is too long or no UTF-8")
		}
	}
	return nil
}

func decodeJSON(out []byte, now time.Time) ([]sealing.Reading, error) {
	var readings []sealing.Reading
	for n := 1; len(out) > 0; n++ {
		line, rest, _ := bytes.Cut(out, []byte("\n"))
		out = rest
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		switch {
		case len(line) > maxText || n > maxReadings:
			return nil, fmt.Errorf("line %d is too long, or there are more than %d", n, maxReadings)
		case !utf8.Valid(line): // encoding/json would repair it
			return nil, fmt.Errorf("line %d is no UTF-8", n)
		}
		r, err := decodeLine(line, now)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		readings = append(readings, r)
	}
	return readings, nil
}

// decodeLine reads one object. encoding/json lets a key come twice, so it goes by
// tokens.
func decodeLine(line []byte, now time.Time) (sealing.Reading, error) {
	r := sealing.Reading{Time: now.UnixNano()}
	d := json.NewDecoder(bytes.NewReader(line))
	d.UseNumber()
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return r, errors.New("not a JSON object")
	}
	seen := map[string]bool{}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return r, errors.New("not a JSON object")
		}
		v, err := d.Token()
		if err != nil {
			return r, errors.New("not a JSON object")
		}
		name, _ := key.(string)
		if len(name) > 0 && name[0] == 'v' {
			name = "v"
		}
		if seen[name] {
			return r, fmt.Errorf("%.16q twice, or two values", name)
		}
		seen[name] = true
		if err := setField(&r, key.(string), v); err != nil {
			return r, err
		}
	}
	if t, err := d.Token(); err != nil || t != json.Delim('}') || d.InputOffset() != int64(len(bytes.TrimRight(line, " \t\r"))) {
		return r, errors.New("not one JSON object")
	}
	if r.Value == nil {
		return r, errors.New("a value is missing: \"v\", \"vs\" or \"vb\"")
	}
	return r, nil
}

// setField sets one field.
func setField(r *sealing.Reading, key string, v json.Token) (err error) {
	ok := false
	switch key {
	case "n":
		r.Name, ok = v.(string)
	case "u":
		r.Unit, ok = v.(string)
	case "vs":
		r.Value, ok = v, isA[string](v)
	case "vb":
		r.Value, ok = v, isA[bool](v)
	case "v":
		if n, is := v.(json.Number); is {
			ok = true
			r.Value, err = number(n.String())
		}
	case "t":
		if n, is := v.(json.Number); is {
			ok = true
			r.Time, err = nanoseconds(n.String())
		}
	default:
		return fmt.Errorf("unknown key %.32q", key)
	}
	if err == nil && !ok {
		err = fmt.Errorf("%q has a value of the wrong kind", key)
	}
	return err
}

func isA[T any](v any) bool {
	_, ok := v.(T)
	return ok
}

func number(s string) (any, error) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n, nil
	}
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		return n, nil
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return nil, fmt.Errorf("%.32q is no number", s)
	}
	return f, nil
}

// nanoseconds reads seconds with up to nine decimals exactly.
func nanoseconds(s string) (int64, error) {
	whole, frac, _ := strings.Cut(s, ".")
	digits := strings.TrimLeft(whole, "-")
	if strings.ContainsAny(s, "eE+") || len(frac) > 9 || digits == "" || len(digits) > 10 {
		f, err := strconv.ParseFloat(s, 64)
		if err != nil || math.Abs(f) > 9e9 || math.IsNaN(f) {
			return 0, fmt.Errorf("%.32q is no time in seconds", s)
		}
		return int64(math.Round(f * 1e9)), nil
	}
	n, err := strconv.ParseInt(whole+frac+strings.Repeat("0", 9-len(frac)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%.32q is no time in seconds", s)
	}
	return n, nil
}

func decodeCSV(out []byte, now time.Time) ([]sealing.Reading, error) {
	rest, ok := bytes.CutPrefix(out, []byte(csvHeader))
	if !ok {
		return nil, fmt.Errorf("the first line is not %q", strings.TrimSpace(csvHeader))
	}
	c := csv.NewReader(bytes.NewReader(rest))
	c.FieldsPerRecord = 4
	var readings []sealing.Reading
	for n := 1; ; n++ {
		row, err := c.Read()
		if errors.Is(err, io.EOF) {
			return readings, nil
		}
		if err == nil && n > maxReadings {
			err = fmt.Errorf("more than %d rows", maxReadings)
		}
		if err != nil {
			return nil, err
		}
		r, err := decodeRow(row, now)
		if err != nil {
			return nil, fmt.Errorf("row %d: %w", n, err)
		}
		readings = append(readings, r)
	}
}

// decodeRow reads name, time, value and unit.
func decodeRow(row []string, now time.Time) (sealing.Reading, error) {
	r := sealing.Reading{Name: row[0], Unit: row[3], Time: now.UnixNano()}
	if len(row[0])+len(row[1])+len(row[2])+len(row[3]) > maxText {
		return r, errors.New("it is too long")
	}
	var err error
	if row[1] != "" {
		if r.Time, err = nanoseconds(row[1]); err != nil {
			return r, err
		}
	}
	switch {
	case row[2] == "true" || row[2] == "false":
		r.Value = row[2] == "true"
	case jsonNumber.MatchString(row[2]):
		r.Value, err = number(row[2])
	case infinite(row[2]):
		err = fmt.Errorf("%q is no number", row[2])
	default:
		r.Value = row[2]
	}
	return r, err
}

// jsonNumber is how a number is written in CSV too: 007 and 0x7 are texts.
var jsonNumber = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$`)

// infinite reports whether s is how a language writes a float that is no number.
func infinite(s string) bool {
	f, err := strconv.ParseFloat(s, 64)
	return err == nil && (math.IsNaN(f) || math.IsInf(f, 0))
}

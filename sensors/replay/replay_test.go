package replay

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"edgekeep/sensors"
)

func collect(t *testing.T, file string, o Options) ([]string, error) {
	t.Helper()
	var lines []string
	err := Run(t.Context(), strings.NewReader(file), o, func(line []byte) error {
		lines = append(lines, string(line))
		return nil
	})
	return lines, err
}

func TestRun(t *testing.T) {
	for class, tt := range map[string]struct {
		file string
		o    Options
		want []string
	}{
		"numbers and strings": {
			"timestamp,value,state\n2013-12-02 21:15:00,73.96732207,\"a, \"\"b\"\"\"\n2013-12-02 21:20:00,-1e3,7\n",
			Options{},
			[]string{`replay value=73.96732207,state="a, \"b\"" 1386018900000000000`, `replay value=-1000,state="7" 1386019200000000000`},
		},
		"empty cells, CRLF, byte order mark": {
			"\ufefftime,a,b\r\n1,,x\r\n2,5,\r\n",
			Options{Measurement: "m m"},
			[]string{`m\ m b="x" 1000000000`, `m\ m a=5 2000000000`},
		},
		"all times": {
			"v,ts\n1,2013-12-02T21:15:00+01:00\n2,2013-12-02T21:15:00.000000001Z\n3,2013-12-02 21:15:00.25\n4,-1\n5,1386018900000000001\n6,1386018900\n",
			Options{},
			[]string{
				"replay v=1 1386015300000000000", "replay v=2 1386018900000000001", "replay v=3 1386018900250000000",
				"replay v=4 -1000000000", "replay v=5 1386018900000000001", "replay v=6 1386018900000000000",
			},
		},
		"named time column": {
			"time,when\n7,1\n", Options{TimeColumn: "when"}, []string{"replay time=7 1000000000"},
		},
		"skip":                              {"ts,v\n1,1\n2,2\n3,3\n", Options{Skip: 2}, []string{"replay v=3 3000000000"}},
		"all skipped":                       {"ts,v\n1,1\n2,2\n", Options{Skip: 2}, nil},
		"skipped rows say what a column is": {"ts,v\n1,x\n2,2\n", Options{Skip: 1}, []string{`replay v="2" 2000000000`}},
		"no rows":                           {"ts,v\n", Options{}, nil},
	} {
		got, err := collect(t, tt.file, tt.o)
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s:\n got %q, %v\nwant %q", class, got, err, tt.want)
		}
		for _, line := range got {
			if _, err := sensors.ParseLine([]byte(line)); err != nil {
				t.Errorf("%s: %s: %v", class, line, err)
			}
		}
	}
}

func TestMalformed(t *testing.T) {
	for class, tt := range map[string]struct {
		file string
		o    Options
		sent int
		want string
	}{
		"empty":             {"", Options{}, 0, "file is empty"},
		"no time column":    {"a,b\n1,2\n", Options{}, 0, "no column is named time"},
		"other time column": {"ts,b\n1,2\n", Options{TimeColumn: "x"}, 0, `no column is named "x"`},
		"two of a name":     {"ts,b,b\n1,2,3\n", Options{}, 0, `two columns are named "b"`},
		"no name":           {"ts,\n1,2\n", Options{}, 0, "column 2"},
		"name with newline": {"ts,\"a\nb\"\n1,2\n", Options{}, 0, "column 2"},
		"bad measurement":   {"ts,b\n1,2\n", Options{Measurement: "#m"}, 0, "measurement"},
		"negative speed":    {"ts,b\n1,2\n", Options{Speed: -1}, 0, "speed"},
		"short row":         {"ts,a,b\n1,2,3\n1,2\n", Options{}, 1, "row 2"},
		"long row":          {"ts,a\n1,2\n1,2,3\n", Options{}, 1, "row 2"},
		"bad quotes":        {"ts,a\n1,2\n2,\"x\"y\n", Options{}, 1, "row 2"},
		"no number":         {"ts,a\n1,2\n2,3\n3,n/a\n", Options{}, 2, "row 3"},
		"NaN":               {"ts,a\n1,2\n2,NaN\n", Options{}, 1, "row 2"},
		"hexadecimal":       {"ts,a\n1,2\n2,0x1p3\n", Options{}, 1, "row 2"},
		"out of range":      {"ts,a\n1,2\n2,1e999\n", Options{}, 1, "row 2"},
		"no value":          {"ts,a\n1,2\n2,\n", Options{}, 1, "row 2"},
		"no time":           {"ts,a\n1,2\n,3\n", Options{}, 1, "row 2"},
		"word for a time":   {"ts,a\n1,2\nnow,3\n", Options{}, 1, "row 2"},
		"milliseconds":      {"ts,a\n1386018900000,2\n", Options{}, 0, "row 1"},
		"time out of range": {"ts,a\n99999999999,2\n", Options{}, 0, "row 1"},
		"year out of range": {"ts,a\n2300-01-01 00:00:00,2\n", Options{}, 0, "row 1"},
		"control character": {"ts,a\n1,x\n2,\"x\ny\"\n", Options{}, 1, "row 2"},
		"too long":          {"ts,a\n1,x\n2," + strings.Repeat("x", sensors.MaxLine) + "\n", Options{}, 1, "row 2"},
		"skipped but bad":   {"ts,a\n1,2\n2,x\n3,4\n", Options{Skip: 2}, 0, "row 2"},
		"too few rows":      {"ts,a\n1,2\n", Options{Skip: 2}, 0, "the file has 1 rows"},
	} {
		lines, err := collect(t, tt.file, tt.o)
		if err == nil || !strings.Contains(err.Error(), tt.want) || len(lines) != tt.sent {
			t.Errorf("%s: %v after %d lines, want ...%s... after %d", class, err, len(lines), tt.want, tt.sent)
		}
	}
}

func TestSpeed(t *testing.T) {
	const file = "ts,v\n100,1\n110,2\n105,3\n110,4\n130,5\n"
	for speed, want := range map[float64][]time.Duration{
		0:   {0, 0, 0, 0, 0},
		1:   {0, 10 * time.Second, 10 * time.Second, 10 * time.Second, 30 * time.Second}, // back in time costs none
		0.5: {0, 20 * time.Second, 20 * time.Second, 20 * time.Second, 60 * time.Second},
		10:  {0, time.Second, time.Second, time.Second, 3 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			var got []time.Duration
			err := Run(t.Context(), strings.NewReader(file), Options{Speed: speed}, func([]byte) error {
				got = append(got, time.Since(start))
				return nil
			})
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("speed %v: %v, %v; want %v", speed, got, err, want)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) { // the pace starts with the first row that is sent
		start := time.Now()
		err := Run(t.Context(), strings.NewReader(file), Options{Speed: 1, Skip: 4}, func([]byte) error { return nil })
		if err != nil || time.Since(start) != 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestStops(t *testing.T) {
	broken := errors.New("broken")
	err := Run(t.Context(), strings.NewReader("ts,v\n1,1\n2,2\n"), Options{}, func([]byte) error { return broken })
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	for _, speed := range []float64{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			n := 0
			err := Run(ctx, strings.NewReader("ts,v\n1,1\n9000000000,2\n"), Options{Speed: speed}, func([]byte) error {
				n++
				cancel()
				return nil
			})
			if !errors.Is(err, context.Canceled) || n != 1 {
				t.Errorf("speed %v: %v after %d lines", speed, err, n)
			}
		})
	}
}

// A real machine's temperature, 22,695 rows: the same values in the same order,
// from the start and from any row on.
func TestRealFile(t *testing.T) {
	dir := os.Getenv("EDGEKEEP_VECTORS")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "vectors")
	}
	path := filepath.Join(dir, "nab", "machine_temperature_system_failure.csv")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Skipf("no test vectors: %v; set EDGEKEEP_VECTORS", err)
	}
	rows, err := csv.NewReader(bytes.NewReader(data)).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	rows = rows[1:]
	if len(rows) != 22695 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, skip := range []int{0, 1, 10000, 22694, 22695} {
		next := skip
		err = Run(t.Context(), bytes.NewReader(data), Options{Skip: uint64(skip)}, func(line []byte) error {
			p, err := sensors.ParseLine(line)
			if err != nil {
				return err
			}
			value, _ := strconv.ParseFloat(rows[next][1], 64)
			at, _ := time.Parse(time.DateTime, rows[next][0])
			want := sensors.Point{
				Measurement: "replay", Fields: []sensors.Field{{Name: "value", Value: value}}, Time: at.UnixNano(), HasTime: true,
			}
			if !reflect.DeepEqual(p, want) {
				t.Fatalf("row %d is %+v, want %+v", next+1, p, want)
			}
			next++
			return nil
		})
		if err != nil || next != len(rows) {
			t.Errorf("skip %d: %v at row %d", skip, err, next)
		}
	}
}

func FuzzRun(f *testing.F) {
	f.Add([]byte("ts,v\n1,1\n2,x\n"))
	f.Add([]byte("a,time\n\"x\ny\",2013-12-02 21:15:00\n"))
	f.Fuzz(func(t *testing.T, file []byte) {
		_ = Run(t.Context(), bytes.NewReader(file), Options{}, func(line []byte) error {
			if p, err := sensors.ParseLine(line); err != nil || !p.HasTime {
				t.Fatalf("%q: %v", line, err)
			}
			return nil
		})
	})
}

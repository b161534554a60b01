package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"edgekeep/workload/examples/anomaly/detect"
)

const seriesName = "machine_temperature_system_failure"

// dataset is the series with its labels.
type dataset struct {
	times   []time.Time
	values  []float64
	windows []window
}

// window is a labelled anomaly: the indices of its first and last reading.
type window struct{ first, last int }

const layout = "2006-01-02 15:04:05"

// load reads the series and combined_windows.json from a folder of NAB.
func load(dir string) (*dataset, error) {
	file, err := os.Open(filepath.Join(dir, seriesName+".csv"))
	if err != nil {
		return nil, fmt.Errorf("read the series: %w; give the folder with -data", err)
	}
	defer file.Close()
	d := new(dataset)
	if err := d.readSeries(file); err != nil {
		return nil, fmt.Errorf("read the series: %w", err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "combined_windows.json"))
	if err != nil {
		return nil, fmt.Errorf("read the labels: %w", err)
	}
	if err := d.readWindows(raw); err != nil {
		return nil, fmt.Errorf("read the labels: %w", err)
	}
	return d, nil
}

func (d *dataset) readSeries(r io.Reader) error {
	lines := csv.NewReader(r)
	lines.FieldsPerRecord = 2
	rows, err := lines.ReadAll()
	if err != nil {
		return err
	}
	for _, row := range rows[min(1, len(rows)):] {
		t, err := time.Parse(layout, row[0])
		if err != nil {
			return err
		}
		v, err := strconv.ParseFloat(row[1], 64)
		if err != nil {
			return err
		}
		d.times, d.values = append(d.times, t), append(d.values, v)
	}
	return nil
}

func (d *dataset) readWindows(raw []byte) error {
	var labels map[string][][2]string
	if err := json.Unmarshal(raw, &labels); err != nil {
		return err
	}
	at := make(map[string]int, len(d.times))
	for i, t := range d.times {
		at[t.Format(layout+".000000")] = i
	}
	for _, l := range labels["realKnownCause/"+seriesName+".csv"] {
		first, ok := at[l[0]]
		last, ok2 := at[l[1]]
		if !ok || !ok2 || last <= first {
			return fmt.Errorf("window %v is not in the series", l)
		}
		d.windows = append(d.windows, window{first, last})
	}
	if len(d.windows) == 0 {
		return fmt.Errorf("no windows of %s", seriesName)
	}
	return nil
}

// alarms are the indices of the readings at which the model turns the alarm on.
func (d *dataset) alarms(m *detect.Model) []int {
	var out []int
	series := detect.NewSeries(m)
	for i, v := range d.values {
		if _, on, changed := series.Next(float64(d.times[i].Unix()), v); on && changed {
			out = append(out, i)
		}
	}
	return out
}

// result of the alarms against the labels, from the end of training on. An alarm
// counts where it goes on: one that was on when a window began found nothing.
type result struct {
	windows, detected int
	alarms, outside   int
	delay             time.Duration // mean, from a window's beginning to its first alarm
	perWeek           float64       // alarms outside, per week outside
	precision         float64       // alarms inside / alarms
	nab               float64       // the NAB score of this series, standard profile, 100 is perfect
}

func (d *dataset) score(alarms []int) result {
	r := result{windows: len(d.windows), nab: d.nab(alarms)}
	readings := len(d.values) - week
	first := make([]int, len(d.windows))
	for _, w := range d.windows {
		readings -= w.last - w.first + 1
	}
	for _, i := range alarms {
		if i < week {
			continue
		}
		r.alarms++
		w := d.in(i)
		if w < 0 {
			r.outside++
		} else if first[w] == 0 {
			first[w] = i
			r.detected++
			r.delay += d.times[i].Sub(d.times[d.windows[w].first])
		}
	}
	r.delay /= time.Duration(max(1, r.detected))
	r.perWeek = float64(r.outside) * week / float64(readings)
	r.precision = float64(r.alarms-r.outside) / float64(max(1, r.alarms))
	return r
}

// in is the window that the reading is in, -1 if none.
func (d *dataset) in(i int) int {
	for w, win := range d.windows {
		if i >= win.first && i <= win.last {
			return w
		}
	}
	return -1
}

// nab is the score of section II of "Evaluating Real-time Anomaly Detection
// Algorithms - the Numenta Anomaly Benchmark" (Lavin and Ahmad, 2015), with the
// standard profile (weights 1 for a window found or missed, 0.11 for a false
// alarm), for this one series: 0 is no alarm at all, 100 the earliest possible in
// every window and none outside. What the paper leaves open is as in the
// benchmark's program: the first 750 readings (15 % of at most 5,000) are not
// scored, the earliest alarm of a window is worth 1, and a false alarm three
// widths of the window before it, or with none before it, costs the whole weight.
func (d *dataset) nab(alarms []int) float64 {
	const probation, falseAlarm = 750, 0.11
	best := make([]float64, len(d.windows))
	for w := range best {
		best[w] = -1 // missed
	}
	total := 0.0
	for _, i := range alarms {
		if i < probation {
			continue
		}
		if w := d.in(i); w >= 0 {
			win := d.windows[w]
			y := -float64(win.last-i+1) / float64(win.last-win.first+1)
			best[w] = max(best[w], sigma(y)/sigma(-1))
			continue
		}
		y := 3.0
		for _, win := range d.windows {
			if win.last < i {
				y = float64(i-win.last) / float64(win.last-win.first)
			}
		}
		total += falseAlarm * sigma(y)
	}
	for _, b := range best {
		total += b
	}
	n := float64(len(d.windows))
	return 100 * (total + n) / (2 * n)
}

// sigma is the paper's scoring function at a position relative to a window: -1
// its beginning, 0 its end, beyond it a false alarm.
func sigma(y float64) float64 {
	if y >= 3 {
		return -1
	}
	return 2/(1+math.Exp(5*y)) - 1
}

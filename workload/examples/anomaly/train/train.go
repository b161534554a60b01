package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"

	"edgekeep/workload/examples/anomaly/detect"
)

// interval is the pace of the series, in seconds, and week so many readings.
const interval, week = 300, 2016

// options of a training: what is chosen, not learnt.
type options struct {
	order, weeks    int     // lags of the autoregression, weeks to simulate
	alarm           float64 // share of normal weeks without an alarm
	level, baseline float64 // time constants, in seconds
}

// chosen are the options of the model in the tree: one false alarm a year, were
// the machine always as in the training week. The time constants, and the method,
// come from a search scored by the labels: -score prints what others would give.
var chosen = options{order: 36, weeks: 4000, alarm: 0.98, level: 12 * 3600, baseline: 7 * 24 * 3600}

// train makes a model of the first week of values. It fits an autoregression to
// that week, lets it make up many normal weeks out of the residuals it saw, and
// records how far the detector's deviation goes in each.
func train(values []float64, o options) (*detect.Model, error) {
	if len(values) < week {
		return nil, fmt.Errorf("train: %d readings, %d are needed", len(values), week)
	}
	values = values[:week]
	m := &detect.Model{Level: o.level, Baseline: o.baseline, Alarm: o.alarm}
	m.Centre = mean(values)
	for _, v := range values {
		m.Spread += math.Abs(v-m.Centre) / week
	}
	coefficients := autoregression(values, m.Centre, o.order)
	maxima := simulate(m, coefficients, residuals(values, m.Centre, coefficients), o.weeks)
	m.Centre, m.Spread = round(m.Centre), round(m.Spread)
	const steps = 200
	for i := range steps + 1 {
		m.Maxima = append(m.Maxima, round(maxima[i*(len(maxima)-1)/steps]))
	}
	return m, nil
}

func mean(values []float64) float64 {
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}

// autoregression solves the Yule-Walker equations by Levinson's recursion, which
// makes a stationary process whatever the values.
func autoregression(values []float64, centre float64, order int) []float64 {
	covariance := make([]float64, order+1)
	for lag := range covariance {
		for i := lag; i < len(values); i++ {
			covariance[lag] += (values[i] - centre) * (values[i-lag] - centre)
		}
	}
	a, variance := make([]float64, order), covariance[0]
	for k := range order {
		reflection := covariance[k+1]
		for j := range k {
			reflection -= a[j] * covariance[k-j]
		}
		reflection /= variance
		before := slices.Clone(a[:k])
		for j := range k {
			a[j] -= reflection * before[k-1-j]
		}
		a[k] = reflection
		variance *= 1 - reflection*reflection
	}
	return a
}

// residuals are what the autoregression did not foresee, their mean removed.
func residuals(values []float64, centre float64, a []float64) []float64 {
	var out []float64
	for i := len(a); i < len(values); i++ {
		r := values[i] - centre
		for j, c := range a {
			r -= c * (values[i-1-j] - centre)
		}
		out = append(out, r)
	}
	m := mean(out)
	for i := range out {
		out[i] -= m
	}
	return out
}

// simulate runs the detector over weeks of the autoregression driven by residuals
// drawn at random (the same ones every time), and returns the largest deviation
// of each week, in ascending order. Two weeks before them are not counted.
func simulate(m *detect.Model, a, residuals []float64, weeks int) []float64 {
	random := rand.New(rand.NewPCG(1, 2))
	series := detect.NewSeries(m)
	past := make([]float64, len(a)) // a ring: the value of step i is at i modulo its length
	maxima := make([]float64, weeks+2)
	for i := range len(maxima) * week {
		x := residuals[random.IntN(len(residuals))]
		at := i % len(past)
		for j, c := range a {
			x += c * past[(at+len(past)-1-j)%len(past)]
		}
		past[at] = x
		w := i / week
		maxima[w] = max(maxima[w], series.Deviation(float64(i+1)*interval, m.Centre+x))
	}
	maxima = maxima[2:]
	slices.Sort(maxima)
	return maxima
}

// round to six digits, more than a model needs and the same on every machine.
func round(v float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 6, 64), 64)
	if err != nil {
		panic(err)
	}
	return r
}

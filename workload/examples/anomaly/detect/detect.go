// Package detect finds lasting shifts in the level of a series of readings.
//
// Two exponential means follow the readings: the level, over hours, and the
// baseline, over days (a reading moves it by no more than three spreads, so that
// an anomaly is not learnt at once as the new normal). Their distance, in
// spreads, is the deviation. The score of a reading is how unusual its deviation
// is: the share of normal weeks whose largest deviation stays below it, read from
// a table that was made in training. The alarm goes on when the score reaches
// [Model.Alarm], and off when the deviation is back to half of what that takes.
//
// Weights follow the times of the readings. One reading stands for at most an
// hour, however long the silence before it; one that is not newer than the last
// is scored but moves nothing.
package detect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// Model is what training found, as the JSON file holds it.
type Model struct {
	Centre   float64   `json:"centre"`   // mean of the readings it was trained on, where the baseline starts
	Spread   float64   `json:"spread"`   // their mean absolute distance from it
	Level    float64   `json:"level"`    // time constant of the level, in seconds
	Baseline float64   `json:"baseline"` // time constant of the baseline, in seconds
	Alarm    float64   `json:"alarm"`    // score at which the alarm goes on
	Maxima   []float64 `json:"maxima"`   // deviations at evenly spaced quantiles, 0 to 1, of the weeks' largest
}

// MaxMaxima is the longest table a model may have.
const MaxMaxima = 1000

// ParseModel decodes a model file and checks it.
func ParseModel(raw []byte) (*Model, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	m := new(Model)
	if err := dec.Decode(m); err != nil {
		return nil, fmt.Errorf("decode model: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("decode model: something follows the object")
	}
	return m, m.validate()
}

func (m *Model) validate() error {
	switch {
	case m.Spread <= 0, m.Level <= 0, m.Baseline <= m.Level:
		return errors.New("model: spread, level and baseline have to be positive, and level below baseline")
	case m.Alarm <= 0 || m.Alarm > 1:
		return errors.New("model: alarm has to be above 0 and at most 1")
	case len(m.Maxima) < 2 || len(m.Maxima) > MaxMaxima || m.Maxima[0] <= 0 || !slices.IsSorted(m.Maxima):
		return fmt.Errorf("model: maxima have to be 2 to %d positive numbers in ascending order", MaxMaxima)
	}
	return nil
}

// score is the share of normal weeks that stay below the deviation, 0 to 1.
func (m *Model) score(deviation float64) float64 {
	i, _ := slices.BinarySearch(m.Maxima, deviation)
	if i == 0 {
		return 0
	}
	last := len(m.Maxima) - 1
	if i > last {
		return 1
	}
	below, above := m.Maxima[i-1], m.Maxima[i]
	return (float64(i-1) + (deviation-below)/(above-below)) / float64(last)
}

// deviation is the one at which the score is reached: the inverse of score.
func (m *Model) deviation(score float64) float64 {
	last := len(m.Maxima) - 1
	at := score * float64(last)
	i := min(int(at), last-1)
	return m.Maxima[i] + (at-float64(i))*(m.Maxima[i+1]-m.Maxima[i])
}

// Series follows one series. It starts with [NewSeries].
type Series struct {
	model           *Model
	level, baseline float64
	last            float64 // time of the newest reading; 0 before the first
	on              bool
}

// NewSeries is a series of which no reading was seen.
func NewSeries(m *Model) *Series {
	return &Series{model: m, level: m.Centre, baseline: m.Centre}
}

// longest is how many seconds one reading may stand for; the first one stands
// for a reading every five minutes.
const longest, first = 3600, 300

// Deviation takes the next reading, its time in seconds, and returns the distance
// of the level from the baseline in spreads.
func (s *Series) Deviation(t, v float64) float64 {
	dt := min(t-s.last, longest)
	if s.last == 0 {
		dt = first
	}
	if dt > 0 {
		s.last = t
		step := 3 * s.model.Spread
		s.level += -math.Expm1(-dt/s.model.Level) * (v - s.level)
		s.baseline += -math.Expm1(-dt/s.model.Baseline) * max(-step, min(step, v-s.baseline))
	}
	return math.Abs(s.level-s.baseline) / s.model.Spread
}

// Next takes the next reading, its time in seconds. It returns the score, 0 to 1,
// whether the alarm is on, and whether this reading turned it on or off.
func (s *Series) Next(t, v float64) (score float64, on, changed bool) {
	d := s.Deviation(t, v)
	score = s.model.score(d)
	was := s.on
	if score >= s.model.Alarm {
		s.on = true
	} else if d <= s.model.deviation(s.model.Alarm)/2 {
		s.on = false
	}
	return score, s.on, s.on != was
}

package detect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
)

// MaxSeries is how many series one detector follows.
const MaxSeries = 64

// Detector follows many series, each by its name. It starts with [NewDetector].
type Detector struct {
	model  *Model
	series map[string]*Series
}

// NewDetector has seen no series yet.
func NewDetector(m *Model) *Detector {
	return &Detector{model: m, series: map[string]*Series{}}
}

// reading is one line of a batch, in or out.
type reading struct {
	Name   string   `json:"n"`
	Time   *float64 `json:"t"`
	Unit   string   `json:"u,omitempty"`
	Value  *float64 `json:"v,omitempty"`
	String *string  `json:"vs,omitempty"`
	Bool   *bool    `json:"vb,omitempty"`
}

// Batch takes a batch of readings as JSON lines and returns JSON lines: for every
// number NAME/anomaly, its score from 0 to 1, and, when the alarm goes on or off,
// NAME/anomaly/alarm, true or false. Strings and booleans are passed over. When
// it fails, the detector is as before.
func (d *Detector) Batch(in []byte) ([]byte, error) {
	readings, err := d.decode(in)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	for _, r := range readings {
		s := d.series[r.Name]
		if s == nil {
			s = NewSeries(d.model)
			d.series[r.Name] = s
		}
		score, on, changed := s.Next(*r.Time, *r.Value)
		score = math.Round(score*1e6) / 1e6
		if err := enc.Encode(reading{Name: r.Name + "/anomaly", Time: r.Time, Value: &score}); err != nil {
			return nil, err
		}
		if changed {
			if err := enc.Encode(reading{Name: r.Name + "/anomaly/alarm", Time: r.Time, Bool: &on}); err != nil {
				return nil, err
			}
		}
	}
	return out.Bytes(), nil
}

// largest is the largest value and time that is taken: far from where sums and
// differences overflow.
const largest = 1e100

// decode checks the whole batch before any of it counts.
func (d *Detector) decode(in []byte) ([]reading, error) {
	dec := json.NewDecoder(bytes.NewReader(in))
	dec.DisallowUnknownFields()
	unseen := map[string]bool{}
	var out []reading
	for n := 1; ; n++ {
		var r reading
		err := dec.Decode(&r)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err == nil {
			err = r.check()
		}
		if err != nil {
			return nil, fmt.Errorf("reading %d of the batch: %w", n, err)
		}
		if r.Value == nil {
			continue
		}
		if d.series[r.Name] == nil {
			unseen[r.Name] = true
		}
		if len(d.series)+len(unseen) > MaxSeries {
			return nil, fmt.Errorf("reading %d of the batch: %s is one series more than %d: give the workload fewer streams", n, r.Name, MaxSeries)
		}
		out = append(out, r)
	}
}

func (r *reading) check() error {
	values := 0
	for _, has := range []bool{r.Value != nil, r.String != nil, r.Bool != nil} {
		if has {
			values++
		}
	}
	switch {
	case r.Name == "" || len(r.Name) > 256:
		return errors.New("n has to be a name of 1 to 256 bytes")
	case r.Time == nil || *r.Time <= 0 || *r.Time > largest:
		return errors.New("t has to be seconds since 1970")
	case values != 1:
		return errors.New("one of v, vs and vb has to be there")
	case r.Value != nil && math.Abs(*r.Value) > largest:
		return errors.New("v is out of range")
	}
	return nil
}

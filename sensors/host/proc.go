package host

import (
	"cmp"
	"errors"
	"math"
	"strconv"
	"strings"

	"edgekeep/sensors"
)

var errMalformed = errors.New("not in the format that the kernel documents")

func (s *sampler) load() {
	path := s.path("proc/loadavg")
	lines, ok := s.lines(path)
	if !ok {
		return
	}
	if len(lines) != 1 || len(lines[0]) != 5 {
		s.fail(path, errMalformed)
		return
	}
	words := lines[0]
	running, tasks, _ := strings.Cut(words[3], "/")
	fields, err := floats(words[:3], 1, "load1", "load5", "load15")
	counts, errCounts := counters([]string{running, tasks}, 1, "running", "tasks")
	if err := cmp.Or(err, errCounts); err != nil {
		s.fail(path, err)
		return
	}
	s.add("load", "", nil, append(fields, counts...))
}

func (s *sampler) memory() {
	path := s.path("proc/meminfo")
	lines, ok := s.lines(path)
	if !ok {
		return
	}
	names := map[string]string{
		"MemTotal:": "total", "MemFree:": "free", "MemAvailable:": "available", "Buffers:": "buffers",
		"Cached:": "cached", "SwapTotal:": "swap_total", "SwapFree:": "swap_free",
	}
	var all []sensors.Field
	for _, words := range lines {
		if len(words) != 3 || names[words[0]] == "" {
			continue
		}
		fields, err := counters(words[1:2], 1024, names[words[0]])
		if err != nil {
			s.fail(path, err)
			return
		}
		all = append(all, fields...)
	}
	if len(all) == 0 {
		s.fail(path, errMalformed)
	}
	s.add("memory", "B", nil, all)
}

func (s *sampler) cpu() {
	path := s.path("proc/stat")
	lines, ok := s.lines(path)
	if !ok {
		return
	}
	if len(lines) == 0 || len(lines[0]) < 9 || lines[0][0] != "cpu" {
		s.fail(path, errMalformed)
		return
	}
	// The kernel gives USER_HZ, which is 100 per second on every Linux that Go runs on.
	fields, err := floats(lines[0][1:9], 100, "user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
	if err != nil {
		s.fail(path, err)
		return
	}
	s.add("cpu", "s", nil, fields)
}

func (s *sampler) network() {
	path := s.path("proc/net/dev")
	data, err := readFile(path)
	if err != nil {
		s.fail(path, err)
		return
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		if n++; n <= 2 { // the two lines of headings
			continue
		}
		name, numbers, _ := strings.Cut(line, ":")
		w := strings.Fields(numbers)
		if len(w) < 12 {
			s.fail(path, errMalformed)
			continue
		}
		bytes, err := counters([]string{w[0], w[8]}, 1, "rx_bytes", "tx_bytes")
		counts, errCounts := counters([]string{w[1], w[2], w[3], w[9], w[10], w[11]}, 1,
			"rx_packets", "rx_errors", "rx_dropped", "tx_packets", "tx_errors", "tx_dropped")
		if err := cmp.Or(err, errCounts); err != nil {
			s.fail(path, err)
			continue
		}
		tags := []sensors.Tag{{Key: "interface", Value: name}}
		s.add("net", "B", tags, bytes)
		s.add("net", "count", tags, counts)
	}
}

func (s *sampler) disks() {
	path := s.path("proc/diskstats")
	lines, _ := s.lines(path)
	for _, w := range lines {
		if len(w) < 11 {
			s.fail(path, errMalformed)
			continue
		}
		bytes, err := counters([]string{w[5], w[9]}, 512, "read_bytes", "written_bytes") // sectors of 512
		counts, errCounts := counters([]string{w[3], w[7]}, 1, "reads", "writes")
		if err := cmp.Or(err, errCounts); err != nil {
			s.fail(path, err)
			continue
		}
		if w[3] == "0" && w[7] == "0" {
			continue
		}
		tags := []sensors.Tag{{Key: "device", Value: w[2]}}
		s.add("disk", "B", tags, bytes)
		s.add("disk", "count", tags, counts)
	}
}

func (s *sampler) pressure() {
	for _, resource := range []string{"cpu", "io", "memory"} {
		path := s.path("proc/pressure", resource)
		lines, _ := s.lines(path)
		for _, w := range lines {
			if err := s.stall(resource, w); err != nil {
				s.fail(path, err)
			}
		}
	}
}

// stall takes one line: some avg10=7.92 avg60=9.97 avg300=9.61 total=64733967
func (s *sampler) stall(resource string, words []string) error {
	if len(words) != 5 {
		return errMalformed
	}
	names := []string{"avg10", "avg60", "avg300", "total"}
	var values []string
	for i, name := range names {
		value, ok := strings.CutPrefix(words[1+i], name+"=")
		percent, hundredths, decimal := strings.Cut(value, ".")
		if !ok || decimal != (name != "total") || decimal && len(hundredths) != 2 {
			return errMalformed
		}
		values = append(values, percent+hundredths)
	}
	averages, err := floats(values[:3], 1e4, names[:3]...) // hundredths of a percent: no digit is lost
	total, errTotal := floats(values[3:], 1e6, "total")    // microseconds
	if err := cmp.Or(err, errTotal); err != nil {
		return err
	}
	tags := []sensors.Tag{{Key: "resource", Value: resource}, {Key: "share", Value: words[0]}}
	s.add("pressure", "/", tags, averages)
	s.add("pressure", "s", tags, total)
	return nil
}

// floats parses decimal numbers and divides them by per.
func floats(words []string, per float64, names ...string) ([]sensors.Field, error) {
	var fields []sensors.Field
	for i, name := range names {
		v, err := strconv.ParseFloat(words[i], 64)
		if err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, errMalformed
		}
		fields = append(fields, sensors.Field{Name: name, Value: v / per})
	}
	return fields, nil
}

// counters parses whole numbers and multiplies them by times; like the kernel's
// counters they wrap at 64 bits.
func counters(words []string, times uint64, names ...string) ([]sensors.Field, error) {
	var fields []sensors.Field
	for i, name := range names {
		v, err := strconv.ParseUint(words[i], 10, 64)
		if err != nil {
			return nil, errMalformed
		}
		fields = append(fields, sensors.Field{Name: name, Value: v * times})
	}
	return fields, nil
}

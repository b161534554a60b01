// Package host reads the machine it runs on: load, memory, processor, network,
// disks and pressure from procfs, and the hardware monitors and thermal zones of
// sysfs.
//
// One sample is a list of points, all with the time of the sample. The tag
// "unit" is the SenML unit of all fields of its point (RFC 8428, section 12.1;
// B is from RFC 8798); points without it have fields that have none. So what is
// measured at one place is two points where the units differ.
//
//	measurement  tags                            fields
//	load                                         load1 load5 load15, running tasks
//	memory       unit=B                          total free available buffers cached swap_total swap_free
//	cpu          unit=s                          user nice system idle iowait irq softirq steal, since boot
//	net          interface, unit=B               rx_bytes tx_bytes, since boot
//	net          interface, unit=count           rx_packets rx_errors rx_dropped tx_packets tx_errors tx_dropped
//	disk         device, unit=B                  read_bytes written_bytes, since boot; no unused devices
//	disk         device, unit=count              reads writes
//	pressure     resource, share, unit=/         avg10 avg60 avg300: part of the time that tasks waited
//	pressure     resource, share, unit=s         total, since boot
//	hwmon        chip name sensor label, unit    input, and what else the sensor has in its unit (max, crit, ...)
//	hwmon        chip name sensor label          its other attributes (alarm, beep, pulses, ...) as the kernel gives them
//	thermal      zone type, unit=Cel             temp
//	cooling      device type                     cur_state max_state
//
// The units of hwmon are V (in), Cel (temp), A (curr), W (power), J (energy),
// %RH (humidity), Hz (freq) and 1/min (fan), scaled from what the kernel's
// Documentation/hwmon/sysfs-interface.rst says the files hold. The tag chip is
// made of the bus and name of the device, which stay the same when drivers load
// in another order; name is what the driver calls the chip; label is what the
// board calls the sensor.
package host

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode"

	"edgekeep/sensors"
)

// maxFile bounds what is read of one file.
const maxFile = 64 << 10

// Sample reads everything once, from the proc and sys directories under root
// ("/" for this machine). What cannot be read, or is not what the kernel
// documents, is an error in the list, naming the file, and stops nothing else.
func Sample(root string, now time.Time) ([]sensors.Point, []error) {
	s := &sampler{root: root, now: now.UnixNano()}
	s.load()
	s.memory()
	s.cpu()
	s.network()
	s.disks()
	s.pressure()
	s.hwmon()
	s.thermal()
	return s.points, s.errs
}

type sampler struct {
	root   string
	now    int64
	points []sensors.Point
	errs   []error
}

// add takes a point; tags without a value are left out, and so is a point
// without fields.
func (s *sampler) add(measurement, unit string, tags []sensors.Tag, fields []sensors.Field) {
	if len(fields) == 0 {
		return
	}
	p := sensors.Point{Measurement: measurement, Fields: fields, Time: s.now, HasTime: true}
	for _, t := range append(tags[:len(tags):len(tags)], sensors.Tag{Key: "unit", Value: unit}) {
		if t.Value = tagValue(t.Value); t.Value != "" {
			p.Tags = append(p.Tags, t)
		}
	}
	s.points = append(s.points, p)
}

func (s *sampler) fail(path string, err error) {
	s.errs = append(s.errs, fmt.Errorf("read %s: %w", path, err))
}

// tagValue makes what a driver calls itself fit to be a tag.
func tagValue(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '_'
		}
		return r
	}, strings.ToValidUTF8(strings.TrimSpace(s), "_"))
	if strings.HasSuffix(s, `\`) {
		s = s[:len(s)-1] + "_"
	}
	return s
}

func (s *sampler) path(elements ...string) string {
	return filepath.Join(append([]string{s.root}, elements...)...)
}

// lines reads a file and splits every line into words.
func (s *sampler) lines(path string) ([][]string, bool) {
	data, err := readFile(path)
	if err != nil {
		s.fail(path, err)
		return nil, false
	}
	var lines [][]string
	for line := range strings.Lines(string(data)) {
		lines = append(lines, strings.Fields(line))
	}
	return lines, true
}

// readFile reads with bare system calls: a broken hwmon driver answers EAGAIN,
// which os.ReadFile would wait out for ever.
func readFile(path string) ([]byte, error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = syscall.Close(fd) }()
	data := make([]byte, 0, 512)
	for {
		if len(data) == cap(data) {
			data = append(data, 0)[:len(data)]
		}
		n, err := syscall.Read(fd, data[len(data):cap(data)])
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return data, nil
		}
		if data = data[:len(data)+n]; len(data) > maxFile {
			return nil, fmt.Errorf("longer than %d bytes", maxFile)
		}
	}
}

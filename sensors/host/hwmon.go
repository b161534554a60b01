package host

import (
	"cmp"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"edgekeep/sensors"
)

// attributeFile matches the files that the kernel's hwmon interface names:
// type, number, attribute. Only a pwm has a value without an attribute.
var attributeFile = regexp.MustCompile(
	`^(?:(in|fan|temp|curr|power|energy|humidity|freq|pwm|intrusion)([0-9]{1,5})_([a-z][a-z0-9_]*)|(pwm)([0-9]{1,5}))$`)

// units says what one unit of a type is in the kernel's numbers.
var units = map[string]struct {
	unit string
	per  float64
}{
	"in": {"V", 1e3}, "temp": {"Cel", 1e3}, "curr": {"A", 1e3}, "power": {"W", 1e6}, "energy": {"J", 1e6},
	"humidity": {"%RH", 1e3}, "freq": {"Hz", 1}, "fan": {"1/min", 1},
}

// inUnit are the attributes that are in the unit of their type; each may have a
// hysteresis, which is.
var inUnit = map[string]bool{
	"input": true, "input_highest": true, "input_lowest": true, "highest": true, "lowest": true,
	"average": true, "average_highest": true, "average_lowest": true, "min": true, "max": true, "lcrit": true,
	"crit": true, "emergency": true, "rated_min": true, "rated_max": true, "cap": true, "cap_min": true,
	"cap_max": true, "offset": true, "target": true,
}

type chip struct {
	dir  string
	id   string // the tag chip
	name string
}

// sensor is what a chip has under one type and number.
type sensor struct {
	kind   string
	number int
	files  map[string]string // attribute to path
}

func (s *sampler) hwmon() {
	class := s.path("sys/class/hwmon")
	entries, err := os.ReadDir(class)
	if err != nil {
		s.fail(class, errors.Unwrap(err))
		return
	}
	var chips []chip
	ids := map[string]int{}
	for _, e := range entries {
		dir := filepath.Join(class, e.Name())
		c := chip{dir: dir, name: s.optional(filepath.Join(dir, "name"))}
		c.id = chipID(dir, c.name)
		ids[c.id]++
		chips = append(chips, c)
	}
	for _, c := range chips {
		if ids[c.id] > 1 { // several on one device
			c.id += "_" + cmp.Or(identifier(c.name), filepath.Base(c.dir))
		}
		for _, one := range s.sensorsOf(c.dir) {
			s.sensor(c, one)
		}
	}
}

// chipID names a chip by its device, as bus_device, else by what its driver
// calls it, else by its place in the class directory.
func chipID(dir, name string) string {
	if device, err := filepath.EvalSymlinks(filepath.Join(dir, "device")); err == nil {
		bus, id := identifier(filepath.Base(filepath.Dir(device))), identifier(filepath.Base(device))
		return strings.Trim(bus+"_"+id, "_")
	}
	return cmp.Or(identifier(name), filepath.Base(dir))
}

func identifier(s string) string {
	return strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == ':' || r == '_' {
			return r
		}
		return '_'
	}, strings.ToLower(s)), "_")
}

// sensorsOf finds the attributes of a chip, in its directory and, where older
// drivers put them, in that of its device.
func (s *sampler) sensorsOf(dir string) []*sensor {
	found := map[string]*sensor{}
	for _, d := range []string{dir, filepath.Join(dir, "device")} {
		entries, err := os.ReadDir(d)
		if err != nil && (d == dir || !errors.Is(err, fs.ErrNotExist)) {
			s.fail(d, errors.Unwrap(err))
		}
		for _, e := range entries {
			m := attributeFile.FindStringSubmatch(e.Name())
			if m == nil || e.IsDir() || writeOnly(e) {
				continue
			}
			kind, digits, attribute := cmp.Or(m[1], m[4]), cmp.Or(m[2], m[5]), cmp.Or(m[3], "value")
			one := found[kind+digits]
			if one == nil {
				number, _ := strconv.Atoi(digits) // at most five digits
				one = &sensor{kind, number, map[string]string{}}
				found[kind+digits] = one
			}
			if one.files[attribute] == "" {
				one.files[attribute] = filepath.Join(d, e.Name())
			}
		}
	}
	return slices.SortedFunc(maps.Values(found), func(a, b *sensor) int {
		return cmp.Or(strings.Compare(a.kind, b.kind), cmp.Compare(a.number, b.number))
	})
}

// writeOnly is true for files such as temp1_reset_history.
func writeOnly(e fs.DirEntry) bool {
	info, err := e.Info()
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o444 == 0
}

func (s *sampler) sensor(c chip, one *sensor) {
	label := ""
	var measured, other []sensors.Field
	scale := units[one.kind]
	for _, attribute := range slices.Sorted(maps.Keys(one.files)) {
		path := one.files[attribute]
		if attribute == "label" {
			label = s.optional(path)
			continue
		}
		v, ok := s.integer(path)
		switch {
		case !ok:
		case scale.unit != "" && inUnit[strings.TrimSuffix(attribute, "_hyst")]:
			measured = append(measured, sensors.Field{Name: attribute, Value: float64(v) / scale.per})
		default:
			other = append(other, sensors.Field{Name: attribute, Value: v})
		}
	}
	tags := []sensors.Tag{
		{Key: "chip", Value: c.id},
		{Key: "name", Value: c.name},
		{Key: "sensor", Value: one.kind + strconv.Itoa(one.number)},
		{Key: "label", Value: label},
	}
	s.add("hwmon", scale.unit, tags, measured)
	s.add("hwmon", "", tags, other)
}

func (s *sampler) thermal() {
	class := s.path("sys/class/thermal")
	entries, err := os.ReadDir(class)
	if err != nil {
		s.fail(class, errors.Unwrap(err))
		return
	}
	for _, e := range entries {
		dir := filepath.Join(class, e.Name())
		if number, ok := strings.CutPrefix(e.Name(), "thermal_zone"); ok {
			tags := []sensors.Tag{{Key: "zone", Value: number}, {Key: "type", Value: s.optional(filepath.Join(dir, "type"))}}
			if v, ok := s.integer(filepath.Join(dir, "temp")); ok {
				s.add("thermal", "Cel", tags, []sensors.Field{{Name: "temp", Value: float64(v) / 1e3}})
			}
		}
		if number, ok := strings.CutPrefix(e.Name(), "cooling_device"); ok {
			tags := []sensors.Tag{{Key: "device", Value: number}, {Key: "type", Value: s.optional(filepath.Join(dir, "type"))}}
			var fields []sensors.Field
			for _, name := range []string{"cur_state", "max_state"} {
				if v, ok := s.integer(filepath.Join(dir, name)); ok {
					fields = append(fields, sensors.Field{Name: name, Value: v})
				}
			}
			s.add("cooling", "", tags, fields)
		}
	}
}

// optional reads a text that need not be there.
func (s *sampler) optional(path string) string {
	data, err := readFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.fail(path, err)
	}
	return strings.TrimSpace(string(data))
}

func (s *sampler) integer(path string) (int64, bool) {
	data, err := readFile(path)
	if err != nil {
		s.fail(path, err)
		return 0, false
	}
	v, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		s.fail(path, errMalformed)
		return 0, false
	}
	return v, true
}

package host

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"edgekeep/sensors"
)

// vectors finds a folder of the published test vectors.
func vectors(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("EDGEKEEP_VECTORS")
	if dir == "" {
		dir, _ = os.Getwd()
		for ; dir != "/"; dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
				break
			}
		}
		dir = filepath.Join(dir, "../shared/vectors")
	}
	dir = filepath.Join(dir, name)
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no test vectors: %v; set EDGEKEEP_VECTORS", err)
	}
	return dir
}

// untar unpacks a ttar archive: text, one header per line, the lines of a file
// after "Lines: n".
func untar(t *testing.T, archive, dir string) {
	t.Helper()
	file, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	lines := bufio.NewScanner(file)
	path := ""
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ": ")
		switch key {
		case "Directory":
			check(os.MkdirAll(filepath.Join(dir, value), 0o755))
		case "Path":
			path = filepath.Join(dir, value)
			check(os.MkdirAll(filepath.Dir(path), 0o755))
		case "SymlinkTo":
			check(os.Symlink(value, path))
		case "Lines":
			n, err := strconv.Atoi(value)
			check(err)
			var content strings.Builder
			for range n {
				if !lines.Scan() {
					t.Fatalf("%s is cut short", archive)
				}
				content.WriteString(lines.Text() + "\n")
			}
			check(os.WriteFile(path, []byte(content.String()), 0o644))
		case "Mode":
		default:
			if !strings.HasPrefix(key, "#") {
				t.Fatalf("ttar header %q", lines.Text())
			}
		}
	}
	check(lines.Err())
}

// metric is one value in the text format of Prometheus, labels sorted.
func metric(name string, labels map[string]string, value float64) string {
	var pairs []string
	for k, v := range labels {
		pairs = append(pairs, k+"="+strconv.Quote(v))
	}
	slices.Sort(pairs)
	return name + "{" + strings.Join(pairs, ",") + "} " + strconv.FormatFloat(value, 'g', -1, 64)
}

// asNodeExporter says our points in the names and units of node_exporter.
func asNodeExporter(points []sensors.Point) map[string]bool {
	all := map[string]bool{}
	for _, p := range points {
		tags := map[string]string{}
		for _, t := range p.Tags {
			tags[t.Key] = t.Value
		}
		for _, f := range p.Fields {
			value, isFloat := f.Value.(float64)
			if !isFloat {
				value = float64(f.Value.(int64))
			}
			switch p.Measurement {
			case "thermal":
				all[metric("node_thermal_zone_temp", map[string]string{"zone": tags["zone"], "type": tags["type"]}, value)] = true
			case "cooling":
				all[metric("node_cooling_device_"+f.Name, map[string]string{"name": tags["device"], "type": tags["type"]}, value)] = true
			case "hwmon":
				chip, sensor := tags["chip"], tags["sensor"]
				if tags["name"] != "" {
					all[metric("node_hwmon_chip_names", map[string]string{"chip": chip, "chip_name": tags["name"]}, 1)] = true
				}
				if tags["label"] != "" {
					all[metric("node_hwmon_sensor_label", map[string]string{"chip": chip, "sensor": sensor, "label": tags["label"]}, 1)] = true
				}
				name, scale := nodeExporterName(sensor, f.Name, tags["unit"])
				if tags["unit"] == "Hz" {
					sensor = tags["label"]
				}
				all[metric(name, map[string]string{"chip": chip, "sensor": sensor}, value*scale)] = true
			}
		}
	}
	return all
}

func nodeExporterName(sensor, attribute, unit string) (name string, scale float64) {
	kind := strings.TrimRight(sensor, "0123456789")
	name, scale = "node_hwmon_"+kind, 1
	if attribute != "input" {
		name += "_" + attribute
	}
	switch {
	case unit == "Hz":
		return name + "_freq_mhz", 1e-6
	case unit != "":
		return name + map[string]string{"V": "_volts", "Cel": "_celsius", "1/min": "_rpm"}[unit], 1
	case attribute == "beep":
		return name + "_enabled", 1
	case kind == "temp" && attribute != "alarm": // there, everything of a temperature is one
		return name + "_celsius", 1e-3
	}
	return name, 1
}

// Every value that node_exporter reads from a dump of real machines is read
// here, and no other.
func TestHwmonOfRealMachines(t *testing.T) {
	dir, root := vectors(t, "hwmon"), t.TempDir()
	untar(t, filepath.Join(dir, "sys-hwmon-thermal.ttar"), root)

	points, errs := Sample(root, time.Unix(1, 5))
	for _, err := range errs {
		if !strings.Contains(err.Error(), filepath.Join(root, "proc")) { // which is not in the dump
			t.Error(err)
		}
	}
	for _, p := range points {
		if !p.HasTime || p.Time != 1e9+5 {
			t.Fatalf("time %d of %v", p.Time, p)
		}
	}
	got := asNodeExporter(points)

	text, err := os.ReadFile(filepath.Join(dir, "expected-node_hwmon.prom"))
	if err != nil {
		t.Fatal(err)
	}
	// The archive has no attribute file of this device, so its values cannot come
	// from there; if it ever gets one, they have to.
	absent := regexp.MustCompile(`chip="platform_applesmc_768"`)
	files, _ := filepath.Glob(filepath.Join(root, "sys/devices/platform/applesmc.768/*[0-9]_*"))
	if len(files) > 0 {
		absent = regexp.MustCompile(`$^`)
	}
	compared, skipped := 0, 0
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case line[0] == '#':
		case absent.MatchString(line):
			skipped++
		case !got[line]:
			t.Errorf("not read: %s", line)
		default:
			compared++
			delete(got, line)
		}
	}
	for line := range got {
		t.Errorf("node_exporter does not read: %s", line)
	}
	t.Logf("%d values compared, %d without a source in the dump", compared, skipped)
	if compared+skipped != 140 || skipped > 12 {
		t.Errorf("%d values compared, %d skipped", compared, skipped)
	}
}

package host

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"edgekeep/sensors"
)

// files writes a root directory; a value that starts with "->" is a symbolic
// link.
func files(t *testing.T, content map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range content {
		path := filepath.Join(root, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if target, ok := strings.CutPrefix(text, "->"); ok {
			err = errors.Join(err, os.Symlink(target, path))
		} else {
			err = errors.Join(err, os.WriteFile(path, []byte(text), 0o644))
		}
		if strings.HasSuffix(path, "_reset_history") {
			err = errors.Join(err, os.Chmod(path, 0o200))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// machine is a small machine, complete.
func machine() map[string]string {
	return map[string]string{
		"proc/loadavg": "0.88 0.79 0.39 2/87 17941\n",
		"proc/meminfo": "MemTotal:       24683656 kB\nMemFree:        23774692 kB\nMemAvailable:   24215204 kB\n" +
			"Buffers:            5324 kB\nCached:           572716 kB\nSwapCached:            0 kB\nSwapTotal:             0 kB\n" +
			"SwapFree:              0 kB\nHugePages_Total:       0\n",
		"proc/stat": "cpu  24240 1 7505 366513 651 0 84 20 0 0\ncpu0 24240 1 7505 366513 651 0 84 20 0 0\nintr 1 2 3\n",
		"proc/net/dev": "Inter-|   Receive                                                |  Transmit\n" +
			" face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n" +
			"  eth0:103352063    6034    1    2    0     0          0         0   470767    4619    3    4    0     0       0          0\n",
		"proc/diskstats": "   7       0 loop0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n" +
			" 254       0 vda 106069 28511 3645170 27533 13305 37422 2192384 6588 1 10392 35185 16672 35 824208 1023 1112 40\n",
		"proc/pressure/cpu":    "some avg10=7.92 avg60=9.97 avg300=9.61 total=64733967\n",
		"proc/pressure/io":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
		"proc/pressure/memory": "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",

		"sys/devices/i2c-1/1-0040/hwmon/hwmon0/device":            "->../..",
		"sys/devices/i2c-1/1-0040/hwmon/hwmon0/name":              "sht3x\n",
		"sys/devices/i2c-1/1-0040/hwmon/hwmon0/humidity1_input":   "45200\n",
		"sys/devices/i2c-1/1-0040/hwmon/hwmon0/temp1_input":       "-5125\n",
		"sys/devices/i2c-1/1-0040/hwmon/hwmon0/temp1_max_hyst":    "60000\n",
		"sys/devices/i2c-1/1-0040/hwmon/hwmon0/temp1_max_alarm":   "1\n",
		"sys/devices/i2c-1/1-0040/hwmon/hwmon0/heater_enable":     "0\n",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/device":            "->../..",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/name":              "ina238\n",
		"sys/devices/i2c-1/1-0041/curr1_input":                    "1500\n", // as older drivers do
		"sys/devices/i2c-1/1-0041/curr1_label":                    "main\trail\\\n",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/power1_input":      "12345678\n",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/energy1_input":     "987654321\n",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/in10_input":        "3299\n",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/in9_input":         "11\n",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/in9_reset_history": "",
		"sys/devices/i2c-1/1-0041/hwmon/hwmon1/pwm1":              "128\n",
		"sys/class/hwmon/hwmon0":                                  "->../../devices/i2c-1/1-0040/hwmon/hwmon0",
		"sys/class/hwmon/hwmon1":                                  "->../../devices/i2c-1/1-0041/hwmon/hwmon1",
		"sys/class/thermal/thermal_zone0/type":                    "cpu-thermal\n",
		"sys/class/thermal/thermal_zone0/temp":                    "12376\n",
		"sys/class/thermal/cooling_device3/type":                  "Fan\n",
		"sys/class/thermal/cooling_device3/cur_state":             "1\n",
		"sys/class/thermal/cooling_device3/max_state":             "4\n",
	}
}

const machineSample = `
load load1=0.88,load5=0.79,load15=0.39,running=2u,tasks=87u 9
memory,unit=B total=25276063744u,free=24345284608u,available=24796368896u,buffers=5451776u,cached=586461184u,swap_total=0u,swap_free=0u 9
cpu,unit=s user=242.4,nice=0.01,system=75.05,idle=3665.13,iowait=6.51,irq=0,softirq=0.84,steal=0.2 9
net,interface=eth0,unit=B rx_bytes=103352063u,tx_bytes=470767u 9
net,interface=eth0,unit=count rx_packets=6034u,rx_errors=1u,rx_dropped=2u,tx_packets=4619u,tx_errors=3u,tx_dropped=4u 9
disk,device=vda,unit=B read_bytes=1866327040u,written_bytes=1122500608u 9
disk,device=vda,unit=count reads=106069u,writes=13305u 9
pressure,resource=cpu,share=some,unit=/ avg10=0.0792,avg60=0.0997,avg300=0.0961 9
pressure,resource=cpu,share=some,unit=s total=64.733967 9
pressure,resource=io,share=some,unit=/ avg10=0,avg60=0,avg300=0 9
pressure,resource=io,share=some,unit=s total=1e-06 9
pressure,resource=io,share=full,unit=/ avg10=0,avg60=0,avg300=0 9
pressure,resource=io,share=full,unit=s total=0 9
pressure,resource=memory,share=full,unit=/ avg10=0,avg60=0,avg300=0 9
pressure,resource=memory,share=full,unit=s total=0 9
hwmon,chip=i2c_1_1_0040,name=sht3x,sensor=humidity1,unit=%RH input=45.2 9
hwmon,chip=i2c_1_1_0040,name=sht3x,sensor=temp1,unit=Cel input=-5.125,max_hyst=60 9
hwmon,chip=i2c_1_1_0040,name=sht3x,sensor=temp1 max_alarm=1i 9
hwmon,chip=i2c_1_1_0041,name=ina238,sensor=curr1,label=main_rail_,unit=A input=1.5 9
hwmon,chip=i2c_1_1_0041,name=ina238,sensor=energy1,unit=J input=987.654321 9
hwmon,chip=i2c_1_1_0041,name=ina238,sensor=in9,unit=V input=0.011 9
hwmon,chip=i2c_1_1_0041,name=ina238,sensor=in10,unit=V input=3.299 9
hwmon,chip=i2c_1_1_0041,name=ina238,sensor=power1,unit=W input=12.345678 9
hwmon,chip=i2c_1_1_0041,name=ina238,sensor=pwm1 value=128i 9
cooling,device=3,type=Fan cur_state=1i,max_state=4i 9
thermal,zone=0,type=cpu-thermal,unit=Cel temp=12.376 9
`

func lines(points []sensors.Point) string {
	out := []byte("\n")
	for _, p := range points {
		out = append(p.AppendLine(out), '\n')
	}
	return string(out)
}

func TestSample(t *testing.T) {
	root := files(t, machine())
	points, errs := Sample(root, time.Unix(0, 9))
	if got := lines(points); got != machineSample || errs != nil {
		t.Errorf("got %s\nwant %s\nerrors %v", got, machineSample, errs)
	}
}

// Whatever one file is like, the others are read, and the error names the file.
func TestOneBadFile(t *testing.T) {
	whole, _ := Sample(files(t, machine()), time.Unix(0, 9))
	const chip = "sys/devices/i2c-1/1-0041/hwmon/hwmon1/"
	for class, tt := range map[string]struct {
		file string
		make func(path string) error
		lost int // points
	}{
		"absent load":           {"proc/loadavg", nil, 1},
		"absent memory":         {"proc/meminfo", nil, 1},
		"absent cpu":            {"proc/stat", nil, 1},
		"absent net":            {"proc/net/dev", nil, 2},
		"absent disks":          {"proc/diskstats", nil, 2},
		"absent pressure":       {"proc/pressure/io", nil, 4},
		"absent zone":           {"sys/class/thermal/thermal_zone0/temp", nil, 1},
		"empty load":            {"proc/loadavg", write(""), 1},
		"empty memory":          {"proc/meminfo", write(""), 1},
		"empty cpu":             {"proc/stat", write(""), 1},
		"other load":            {"proc/loadavg", write("a b c d e\n"), 1},
		"infinite load":         {"proc/loadavg", write("Inf 1 1 1/2 3\n"), 1},
		"other memory":          {"proc/meminfo", write("MemTotal: -1 kB\n"), 1},
		"other cpu":             {"proc/stat", write("cpu a b c d e f g h\n"), 1},
		"other net":             {"proc/net/dev", write("\n\neth0: 1 2 3\n"), 2},
		"other disks":           {"proc/diskstats", write("1 0 sda x x x x x x x x x\n"), 2},
		"other pressure":        {"proc/pressure/memory", write("full avg10=1 avg60=2 avg600=3 total=4\n"), 2},
		"word for a number":     {chip + "power1_input", write("12 W\n"), 1},
		"empty sensor":          {chip + "power1_input", write(""), 1},
		"no end":                {chip + "power1_input", write(strings.Repeat(" ", maxFile+1)), 1},
		"link to nowhere":       {chip + "power1_input", func(p string) error { return os.Symlink("nowhere", p) }, 1},
		"pipe, nobody writes":   {chip + "power1_input", func(p string) error { return syscall.Mkfifo(p, 0o644) }, 1},
		"directory as a number": {"sys/class/thermal/cooling_device3/max_state", func(p string) error { return os.Mkdir(p, 0o755) }, 0},
	} {
		t.Run(class, func(t *testing.T) {
			root := files(t, machine())
			path := filepath.Join(root, tt.file)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if tt.make != nil {
				if err := tt.make(path); err != nil {
					t.Fatal(err)
				}
			}
			points, errs := Sample(root, time.Unix(0, 9))
			if len(points) != len(whole)-tt.lost {
				t.Errorf("%d points, want %d less than %d", len(points), tt.lost, len(whole))
			}
			if len(errs) != 1 || !strings.Contains(errs[0].Error(), filepath.Join(filepath.Base(filepath.Dir(path)), filepath.Base(path))+":") {
				t.Errorf("errors %v", errs)
			}
		})
	}
}

func write(text string) func(string) error {
	return func(path string) error { return os.WriteFile(path, []byte(text), 0o644) }
}

func TestNothingThere(t *testing.T) {
	points, errs := Sample(t.TempDir(), time.Unix(0, 9))
	if len(points) != 0 || len(errs) != 10 { // five in proc, three of pressure, two classes
		t.Errorf("%d points, errors %v", len(points), errs)
	}
	for _, err := range errs {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
}

// This machine: whatever it has, every point is one that the keep takes.
func TestThisMachine(t *testing.T) {
	points, errs := Sample("/", time.Now())
	if len(points) == 0 {
		t.Fatalf("nothing was read: %v", errs)
	}
	for _, p := range points {
		got, err := sensors.ParseLine(p.AppendLine(nil))
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%+v became %+v, %v", p, got, err)
		}
	}
}

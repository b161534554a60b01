// Command train makes the model of the anomaly workload and scores it.
//
//	go run ./workload/examples/anomaly/train -data DIR -out model.json
//	go run ./workload/examples/anomaly/train -data DIR -score
//
// DIR is a folder with machine_temperature_system_failure.csv and
// combined_windows.json of the Numenta Anomaly Benchmark. It trains on the first
// week of readings alone, which ends before the first labelled window begins, and
// the same week always gives the same model.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"time"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "train:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("train", flag.ContinueOnError)
	data := flags.String("data", ".", "folder of the series and its labels")
	out := flags.String("out", "", "write the model to this file")
	score := flags.Bool("score", false, "score the model, and others, by the labels")
	if err := flags.Parse(args); err != nil {
		return err
	}
	d, err := load(*data)
	if err != nil {
		return err
	}
	if *score {
		return report(d, stdout)
	}
	m, err := train(d.values, chosen)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if *out == "" {
		_, err = stdout.Write(append(raw, '\n'))
		return err
	}
	return os.WriteFile(*out, append(raw, '\n'), 0o644)
}

// report prints the score of the model, and of models trained with other time
// constants, so that one can see how much depends on the choice.
func report(d *dataset, w io.Writer) error {
	for _, hours := range []float64{12, 6, 24} {
		for _, days := range []float64{7, 3, 14} {
			o := chosen
			o.level, o.baseline = hours*3600, days*24*3600
			m, err := train(d.values, o)
			if err != nil {
				return err
			}
			alarms := d.alarms(m)
			fmt.Fprintf(w, "level %2.0f h, baseline %2.0f days: %v\n", hours, days, d.score(alarms))
			if o == chosen {
				for _, i := range alarms {
					fmt.Fprintf(w, "  alarm %s, window %d\n", d.times[i].Format(layout), d.in(i)+1)
				}
			}
		}
	}
	return nil
}

func (r result) String() string {
	return fmt.Sprintf("%d of %d windows, %d false alarms (%.2f a week), precision %.2f, mean delay %v, NAB score %.1f",
		r.detected, r.windows, r.outside, r.perWeek, r.precision, r.delay.Round(time.Minute), r.nab)
}

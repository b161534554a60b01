package demo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"edgekeep/agent"
	"edgekeep/sealing"
	"edgekeep/tee/attest"
	"edgekeep/testbench/rig"
)

// view is what the terminal shows.
type view struct {
	note     string
	verdict  attest.Verdict
	status   agent.Status
	rate     float64
	last     uint64
	lastTime time.Time
	readings []line
	lines    int // drawn last
}

type line struct{ name, value string }

// newest remembers the newest value of a few quantities of each stream.
func (v *view) newest(stream string, r sealing.Reading, canary string) {
	value := fmt.Sprintf("%v %s", r.Value, r.Unit)
	if f, ok := r.Value.(float64); ok {
		value = fmt.Sprintf("%.4g %s", f, r.Unit)
	}
	if r.Value == canary {
		value = canary[:14] + "… (opened by the consumer; nowhere else)"
	}
	l := line{stream + "  " + r.Name, value}
	of := 0 // the stream's lines: each has room for four
	for i, x := range v.readings {
		if x.name == l.name {
			v.readings[i] = l
			return
		}
		if strings.HasPrefix(x.name, stream+"  ") {
			of++
		}
	}
	if of < 4 {
		v.readings = append(v.readings, l)
		slices.SortFunc(v.readings, func(a, b line) int { return strings.Compare(a.name, b.name) })
	}
}

// watch reads figures once a second, and prints a line where there is no screen.
func (d *Demo) watch(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if _, v, err := d.op.Saved(ctx, gateway); err == nil {
			d.noteVerdict(v)
		}
		s, err := d.gw.Status()
		if err != nil {
			continue
		}
		d.mu.Lock()
		v := &d.view
		if dt := s.Time.Sub(v.lastTime).Seconds(); dt > 0 && s.Readings >= v.last {
			v.rate = float64(s.Readings-v.last) / dt
		}
		v.last, v.lastTime, v.status = s.Readings, s.Time, s
		text := fmt.Sprintf("   %s/%s %s; %.0f readings/s sealed; spool %d; %d opened by the consumer",
			rig.Tenant, gateway, d.count.Verdict, v.rate, s.SpoolChunks, len(d.seen))
		d.mu.Unlock()
		if !d.o.Screen && n%5 == 0 {
			d.say("%s", text)
		}
	}
}

// draw redraws the view in place.
func (d *Demo) draw() {
	if !d.o.Screen {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	v := &d.view
	var b strings.Builder
	put := func(format string, args ...any) {
		text := []rune(fmt.Sprintf(format, args...))
		if d.o.Width > 0 && len(text) > d.o.Width-1 {
			text = append(text[:d.o.Width-2], '…')
		}
		b.WriteString(string(text) + "\x1b[K\n")
	}
	if v.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", v.lines)
	}
	start := strings.Count(b.String(), "\n")
	put("Edgekeep demo   %s", d.o.Dir)
	put("")
	put("  gateway     %s/%s   %s", rig.Tenant, gateway, orDash(v.status.Phase))
	put("  verdict     %s", d.verdictText())
	put("  sealed      %d readings, %.0f/s", v.status.Readings, v.rate)
	put("  spool       %d chunks wait for their watermark", v.status.SpoolChunks)
	put("  watermark   %s", d.watermarkText())
	put("  opened      %d readings in %d records by the consumer, %d twice", len(d.seen), d.count.Records, d.count.Duplicated)
	put("  commands    %d executed", d.count.Commands)
	put("")
	for i := range 10 {
		if i < len(v.readings) {
			put("  %-58s %s", v.readings[i].name, v.readings[i].value)
		} else {
			put("")
		}
	}
	put("")
	put("  %s", v.note)
	v.lines = strings.Count(b.String(), "\n") - start
	fmt.Fprint(d.out, b.String())
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (d *Demo) verdictText() string {
	v := d.view.verdict
	if v.Subject == "" {
		return "none yet"
	}
	var parts []string
	for _, n := range v.Appraisal().Vector.List() {
		parts = append(parts, fmt.Sprintf("%s %d", n.Name, n.Value))
	}
	return fmt.Sprintf("%s   %s", attest.Tier(v.Appraisal().Status), strings.Join(parts, ", "))
}

func (d *Demo) watermarkText() string {
	var parts []string
	for _, s := range d.sources() {
		if m, ok := d.view.status.Watermarks[s]; ok && len(m.Epoch) >= 16 {
			parts = append(parts, fmt.Sprintf("%s epoch %s record %d", s, strings.TrimLeft(m.Epoch[:16], "0"), m.Seq))
		}
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.Join(parts, "   ")
}

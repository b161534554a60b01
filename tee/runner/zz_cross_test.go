package runner
import ("testing";"os";"encoding/gob";"runtime")
func TestCross(t *testing.T) {
	f := os.Getenv("CROSS")
	var in struct{ Parts [][]byte; Wants []string }
	l := newLog(t)
	g := load(t, newHost(t, false), testManifest("reactor"), module(t, "reactor"), nil)
	if b, err := os.Open(f); err == nil {
		if err := gob.NewDecoder(b).Decode(&in); err != nil { t.Fatal(err) }
		b.Close()
		old := &instanceLog{key: l.key, parts: in.Parts}
		old.mustRestore(t, g)
		t.Log(runtime.GOARCH, g.host.Compiler(), batch(t, g, "s"), batch(t, g, "g0"), batch(t,g,"g9"))
	} else {
		g.started(t); batch(t, g, "s"); batch(t, g, "m30"); t.Log(batch(t, g, "s"), batch(t, g, "g0"))
	}
	l.commit(t, g, true)
	in.Parts = l.parts
	o, err := os.Create(f); if err != nil { t.Fatal(err) }
	if err := gob.NewEncoder(o).Encode(in); err != nil { t.Fatal(err) }
	o.Close()
}

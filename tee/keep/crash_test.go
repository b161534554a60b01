package keep

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"edgekeep/internal/cose"
	"edgekeep/sealing"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

// steps are the irreversible steps. Each leads a gateway to where the keep waits
// for a Commit, and says afterwards whether the step was taken.
var steps = map[string]struct {
	lead  func(t *testing.T) (*gateway, tee.Outcome)
	taken func(g *gateway) bool
}{
	"identity": {
		func(t *testing.T) (*gateway, tee.Outcome) {
			g := newGateway(t)
			g.boot()
			return g, must(g.start())(t)
		},
		func(g *gateway) bool { return g.status().Phase == tee.PhaseNew },
	},
	"first epoch": {
		func(t *testing.T) (*gateway, tee.Outcome) {
			g := newGateway(t)
			g.boot()
			g.state = must(g.start())(t).Commit
			return g, must(g.commit())(t)
		},
		func(g *gateway) bool { return g.status().Phase == tee.PhaseNew },
	},
	"enrolment": {
		func(t *testing.T) (*gateway, tee.Outcome) {
			g := newGateway(t)
			g.up()
			a, genuine := g.activates()
			return g, must(g.deliver(g.admission(a, genuine)))(t)
		},
		func(g *gateway) bool { return g.status().Phase == tee.PhaseEnrolled },
	},
	"restart": {
		func(t *testing.T) (*gateway, tee.Outcome) {
			g, _ := enrolled(t)
			g.boot()
			return g, must(g.start())(t)
		},
		func(g *gateway) bool { return g.status().Phase == tee.PhaseEnrolled },
	},
	"command": {
		func(t *testing.T) (*gateway, tee.Outcome) {
			g, _ := enrolled(t)
			msg := g.cloud.command(message.Command{Sequence: 1, Name: message.SetInterval, Args: map[string]string{"seconds": "7"}})
			return g, must(g.deliver(message.Item{Nonce: g.nonce(), Subject: subject, Command: msg}))(t)
		},
		func(g *gateway) bool { s := g.status(); return s.Interval == 7 && s.Command == 1 },
	},
}

// points are where keep or agent dies around a step. The agent comes back with
// what it has stored.
var points = []struct {
	name                    string
	stored, committed, kill bool
	taken                   bool // the step counts, whatever step it is
}{
	{"the state is lost with keep and agent", false, false, true, false},
	{"the state is lost with the agent", false, false, false, true}, // offered again
	{"stored, keep and agent die", true, false, true, true},
	{"stored, the agent dies", true, false, false, true},
	{"committed, keep and agent die", true, true, true, true},
	{"committed, the agent dies", true, true, false, true},
}

// Whoever dies around an irreversible step: what the agent has stored opens, the
// step is taken or not but never half, and afterwards nothing older opens.
func TestCrashPoints(t *testing.T) {
	for step, s := range steps {
		for _, p := range points {
			t.Run(step+"/"+p.name, func(t *testing.T) {
				g, out := s.lead(t)
				if len(out.Commit) == 0 {
					t.Fatal("no step")
				}
				seen := [][]byte{g.state, out.Commit}
				if p.stored {
					g.state = out.Commit
				}
				if p.committed {
					next := must(g.commit())(t)
					if len(next.Commit) > 0 {
						seen = append(seen, next.Commit)
					}
				}
				if p.kill {
					g.boot()
				}
				must(g.settle(g.start()))(t)
				always := step == "identity" || step == "first epoch" || step == "restart" // a start takes it again
				if taken := s.taken(g); taken != (p.taken || always) {
					t.Errorf("taken: %v, %+v", taken, g.status())
				}
				g.onlyNewest(seen)
			})
		}
	}
}

// onlyNewest checks that of all states only the newest opens.
func (g *gateway) onlyNewest(seen [][]byte) {
	g.t.Helper()
	newest := g.state
	for i, state := range seen {
		if bytes.Equal(state, newest) {
			continue
		}
		g.boot()
		g.state = state
		if _, err := g.start(); err == nil {
			g.t.Errorf("state %d of %d opens although it is not the newest", i, len(seen))
		}
	}
	g.state = newest
	g.up()
	if g.status().Phase == tee.PhaseEnrolled {
		g.attest()
	} else {
		g.enrol()
	}
}

// A state that nobody committed is worthless once the one before it went on.
func TestUncommittedState(t *testing.T) {
	g, out := steps["command"].lead(t)
	lost := out.Commit
	g.boot() // with the state from before
	must(g.settle(g.start()))(t)
	if g.status().Command != 0 {
		t.Error("the command was taken")
	}
	g.onlyNewest([][]byte{lost})
}

// faulty stands between keep and TPM. It breaks one command, and is out of the
// way afterwards.
type faulty struct {
	socket, tpm string

	mu   sync.Mutex // protects what follows
	all  bool       // not only what changes something for good
	left int        // commands until the one that breaks; negative: none does
	mode string
	hit  string // what was broken
}

// Command codes (TPM 2.0 Part 2 §6.5.2).
const flushContext = 0x165

var lasting = []uint32{0x122, 0x12a, 0x134, 0x137} // NV_UndefineSpace, NV_DefineSpace, NV_Increment, NV_Write

const (
	cutBefore = "cut before" // the connection ends, the command was not executed
	cutAfter  = "cut after"  // the command was executed, the answer is lost
	refuse    = "refuse"     // TPM_RC_FAILURE; the connection lives on
)

func newFaulty(t *testing.T, path string) *faulty {
	t.Helper()
	f := &faulty{socket: filepath.Join(base, "faulty"), tpm: path, left: -1}
	l := must(net.Listen("unix", f.socket))(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = f.serve(conn) // one client at a time, as the TPM
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return f
}

func (f *faulty) serve(client net.Conn) error {
	defer client.Close()
	tpm, err := net.Dial("unix", f.tpm)
	if err != nil {
		return err
	}
	defer tpm.Close()
	for {
		command, err := readTPM(client)
		if err != nil {
			return err
		}
		mode := f.next(command)
		if mode == cutBefore {
			return nil
		}
		answer := []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x01}
		if mode != refuse {
			if _, err := tpm.Write(command); err != nil {
				return err
			}
			if answer, err = readTPM(tpm); err != nil {
				return err
			}
		}
		if mode == cutAfter {
			return nil
		}
		if _, err := client.Write(answer); err != nil {
			return err
		}
	}
}

func readTPM(r io.Reader) ([]byte, error) {
	head := make([]byte, 10)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	b := append(head, make([]byte, binary.BigEndian.Uint32(head[2:])-10)...)
	_, err := io.ReadFull(r, b[10:])
	return b, err
}

func (f *faulty) next(command []byte) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	code := binary.BigEndian.Uint32(command[6:])
	if f.left < 0 || !f.all && !slices.Contains(lasting, code) || f.mode == refuse && code == flushContext {
		return "" // a TPM that does not flush has no room soon: only a new keep helps
	}
	if f.left--; f.left >= 0 {
		return ""
	}
	f.hit = fmt.Sprintf("command code %#x", code)
	return f.mode
}

// arm breaks the command after n others.
func (f *faulty) arm(n int, mode string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left, f.mode, f.hit = n, mode, ""
}

func (f *faulty) disarm() (hit string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left = -1
	return f.hit
}

// Each TPM command that changes something for good fails, or is the last one
// before everything dies, in turn; with EDGEKEEP_LONG set, each command at all.
// The agent goes on with what it has stored, with a new keep if the old one lost
// its TPM, and nothing that had been reached before is lost.
func TestEveryTPMCommand(t *testing.T) {
	needTPM(t)
	f := newFaulty(t, shared.Socket())
	f.all = os.Getenv("EDGEKEEP_LONG") != ""
	modes := []string{cutAfter, refuse} // cut before a command is cut after the one before it
	if f.all {
		modes = append(modes, cutBefore)
	}
	up := func(t *testing.T, g *gateway) *gateway {
		if g == nil {
			g, _ = enrolled(t)
		}
		g.cfg.TPM = f.socket
		g.up()
		g.read(1)
		return g
	}
	for name, s := range map[string]struct {
		prepare func(t *testing.T, before *gateway) *gateway
		act     func(g *gateway) error
		after   func(g *gateway) error
	}{
		"first start": {
			func(t *testing.T, _ *gateway) *gateway { return newGateway(t) },
			(*gateway).tryStart,
			func(g *gateway) error { g.enrol(); return nil },
		},
		"reset": {
			func(t *testing.T, g *gateway) *gateway {
				g = up(t, g)
				g.kill()
				g.cfg.Reset = true
				return g
			},
			(*gateway).tryStart,
			func(g *gateway) error {
				g.cfg.Reset = false
				g.up()
				g.enrol()
				return nil
			},
		},
		"restart": {
			func(t *testing.T, g *gateway) *gateway {
				g = up(t, g)
				g.last = cose.MarshalKey(&g.keep.epochKey.PublicKey)
				g.kill()
				return g
			},
			(*gateway).tryStart,
			func(g *gateway) error {
				if !slices.ContainsFunc(g.attest().Claims.Prior, func(k attest.Key) bool { return bytes.Equal(k, g.last) }) {
					return errors.New("the key of data under way is lost")
				}
				return nil
			},
		},
		"enrolment": {
			func(t *testing.T, _ *gateway) *gateway {
				g := newGateway(t)
				g.cfg.TPM = f.socket
				g.up()
				return g
			},
			func(g *gateway) error {
				out, err := g.deliver(g.credential(g.asks(), random(32)))
				if err != nil {
					return err
				}
				a := must(message.Decode[message.Activate](out.Publish[0].Data))(g.t)
				_, err = g.settle(g.deliver(g.admission(a, g.cloud.verify(a.Evidence))))
				return err
			},
			func(g *gateway) error {
				if g.status().Phase != tee.PhaseEnrolled {
					g.enrol()
				}
				return nil
			},
		},
		"command": {
			up,
			func(g *gateway) error { return g.rotate() },
			func(g *gateway) error {
				if g.status().Command == g.keep.st.Command && g.keep.st.Command < g.sequence {
					g.sequence--
					if err := g.rotate(); err != nil {
						return err
					}
				}
				if g.status().Command != g.sequence {
					return errors.New("the command is not to be had")
				}
				return nil
			},
		},
	} {
		for _, mode := range modes {
			t.Run(name+"/"+mode, func(t *testing.T) {
				var g *gateway
				for n := 0; ; n++ {
					g = s.prepare(t, g)
					g.cfg.TPM = f.socket
					f.arm(n, mode)
					err := s.act(g)
					hit := f.disarm()
					if hit == "" {
						if n == 0 || err != nil {
							t.Errorf("without a fault, after %d: %v", n, err)
						}
						g.kill()
						return
					}
					if mode != refuse || g.keep == nil {
						g.boot()
					}
					if _, again := g.settle(g.start()); again != nil {
						t.Fatalf("after %s %d (%s): %v; then %v", mode, n, hit, err, again)
					}
					err = s.after(g)
					if err == nil && mode == refuse { // the same keep lives on
						err = g.sound()
					}
					if err != nil {
						t.Fatalf("after %s %d (%s): %v", mode, n, hit, err)
					}
					g.kill()
				}
			})
		}
	}
}

// sound checks that an enrolled keep seals under an epoch of its own and that the
// next keep knows of it.
func (g *gateway) sound() error {
	genuine := g.attest()
	c := g.read(1)
	g.up()
	if n := sealing.Epoch(c.Epoch).Counter(); n == 0 {
		return errors.New("it sealed without an epoch")
	}
	if !slices.ContainsFunc(g.attest().Claims.Prior, func(k attest.Key) bool { return bytes.Equal(k, genuine.Claims.Cnf.Key) }) {
		return errors.New("the next keep does not know the key under which it sealed")
	}
	return nil
}

func (g *gateway) rotate() error {
	g.sequence++
	_, err := g.send(g.cloud.command(message.Command{Sequence: g.sequence, Name: message.RotateStreamKeys}))
	return err
}

// tryStart boots a keep and starts it, and takes failures as they come.
func (g *gateway) tryStart() error {
	k, err := New(g.cfg, discard)
	if err != nil {
		return err
	}
	g.keep, g.ticket = k, 0
	_, err = g.settle(g.start())
	return err
}

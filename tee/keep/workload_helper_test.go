package keep

import (
	"bytes"
	"context"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/testbench/swtpm"
	"edgekeep/workload"
)

// The second gateway's TPM.
var (
	second      *swtpm.TPM
	startSecond = sync.OnceFunc(func() {
		var err error
		second, err = swtpm.Start(context.Background(), swtpm.Options{Dir: filepath.Join(base, "tpm2"), CADir: filepath.Join(base, "maker")})
		if err != nil {
			panic(err)
		}
		firmware(second)
	})
)

// fabric is what lies between gateways: the cloud with its ledger, and the network.
type fabric struct {
	t     testing.TB
	cloud *cloud
	nodes map[string]*node
	rng   *rand.Rand

	ledger  map[string]workload.Entry
	refuse  func(workload.Claim) string // reason, or nothing
	release func(message.AskedKey) message.Release
	claims  int
	replies []message.Reply
	wire    []packet
	sent    []packet // all there ever were
	lose    float64  // share of packets and answers
	repeat  float64
	shuffle bool
	crash   func(n *node, at string) bool

	agentOnly bool // only the agent dies in a crash
	drop      func(packet) bool

	mu    sync.Mutex        // protects what follows, which runners touch
	lived map[string]string // instance#epoch -> gateway
	value map[string]uint64 // by gateway: what its live runner holds
	wrong []string          // what runners found wrong
}

type packet struct {
	from, to string
	data     []byte
}

// node is a gateway with an agent that does the keep's jobs.
type node struct {
	*gateway
	f      *fabric
	name   string
	life   context.Context //nolint:containedctx // of the fake: it ends with the test
	end    context.CancelFunc
	logs   map[string][][]byte
	served sync.WaitGroup

	staff    int // machines that there should be
	machines atomic.Int64
}

func newFabric(t testing.TB) *fabric {
	t.Helper()
	return &fabric{
		t: t, cloud: newCloud(t), nodes: map[string]*node{}, rng: rand.New(rand.NewPCG(1, 1)), ledger: map[string]workload.Entry{},
		lived: map[string]string{}, value: map[string]uint64{}, crash: func(*node, string) bool { return false },
	}
}

// node adds an enrolled gateway with a verdict.
func (f *fabric) node(name string) *node {
	f.t.Helper()
	needTPM(f.t)
	socket := shared.Socket()
	if name != gw {
		startSecond()
		socket = second.Socket()
	}
	wipe(f.t, socket)
	g := &gateway{t: f.t, cloud: f.cloud, cfg: Config{
		TPM: socket, PCRs: measured, RootsDigest: f.cloud.digest, Flush: time.Second, Software: "test 1", RunnerUID: uint32(os.Getuid()),
		Sources: []SourceConfig{{Name: "a", UID: 1, Freshness: time.Hour, Rate: 1000}, {Name: "b", UID: 2, Freshness: time.Hour, Rate: 1000}},
	}}
	n := &node{gateway: g, f: f, name: name, logs: map[string][][]byte{}}
	f.nodes[name] = n
	f.t.Cleanup(n.down)
	n.boot()
	must(g.settle(g.start()))(f.t)
	n.enrolAs()
	return n
}

func (n *node) subject() string { return tenant + "/" + n.name }

func (n *node) enrolAs() {
	n.t.Helper()
	m := n.asks()
	item := n.credential(m, random(32))
	item.Subject, item.Challenge = n.subject(), n.cloud.challenge(n.name)
	out := must(n.gateway.deliver(item))(n.t)
	a := must(message.Decode[message.Activate](out.Publish[0].Data))(n.t)
	genuine := n.cloud.verify(a.Evidence)
	must(n.gateway.settle(n.gateway.deliver(message.Item{
		Nonce: a.Nonce, Subject: n.subject(), Roots: n.cloud.roots, Verdict: n.cloud.verdict(genuine, n.subject(), nil), Certificate: n.cloud.certificate(genuine.TLSKey),
	})))(n.t)
	n.vouch(nil)
}

// boot starts a keep process, without its Start.
func (n *node) boot() {
	n.t.Helper()
	n.down()
	n.life, n.end = context.WithCancel(context.Background())
	n.gateway.boot()
}

// down ends keep and runners as a power cut does. Logs stay.
func (n *node) down() {
	if n.keep == nil {
		return
	}
	n.end()
	n.keep.sealer.drain() // lets runners that wait for room end
	n.served.Wait()
	n.keep.mu.Lock()
	k := n.keep
	n.kill()
	k.mu.Unlock()
}

// restart boots from what is stored, with runners and a verdict; or only the agent
// comes back, to the keep that runs.
func (n *node) restart(runners int) {
	n.t.Helper()
	if !n.f.agentOnly {
		n.boot()
	}
	must(n.gateway.settle(n.start()))(n.t)
	n.vouch(nil)
	n.staff = runners
}

// evidence has the keep answer a challenge.
func (n *node) evidence() attest.Genuine {
	n.t.Helper()
	out := must(n.gateway.deliver(message.Item{Nonce: n.nonce(), Subject: n.subject(), Challenge: n.cloud.challenge(n.name)}))(n.t)
	return n.cloud.verify(out.Publish[0].Data)
}

// vouch brings the keep a verdict about itself.
func (n *node) vouch(edit func(*attest.Verdict)) attest.Genuine {
	n.t.Helper()
	genuine := n.evidence()
	must(n.gateway.deliver(message.Item{Nonce: n.nonce(), Subject: n.subject(), Verdict: n.cloud.verdict(genuine, n.subject(), edit)}))(n.t)
	return genuine
}

func (n *node) receive() hpke.PublicKey {
	n.t.Helper()
	return must(cose.UnmarshalHPKEKey(n.keep.st.keys[attest.PurposeReceive]))(n.t)
}

func manifest(edit func(*workload.Manifest)) workload.Manifest {
	m := workload.Manifest{
		Name: "sum", Version: "1", Shape: workload.Filter, Module: make([]byte, 32), ModuleSize: 10, Input: workload.Input{Format: workload.JSON, Streams: []string{"a"}, Batch: 10},
		Output: workload.JSON, Limits: workload.Limits{Memory: 1 << 20, CPU: 100, Output: 1 << 20}, Assurance: "tpm", Nodes: []string{"*"}, Moves: 1 << 20,
		Content: bytes.Repeat([]byte{7}, 32), ContentSize: 20, Commit: 100,
	}
	if edit != nil {
		edit(&m)
	}
	return m
}

// deployment is a command to deploy and what comes with it.
type deployment struct {
	deploy workload.Deploy
	entry  workload.Entry
	arg    string
	over   []byte // the command that the entry answers, if another
}

// order makes a command to deploy; edit may change each part of it.
func (n *node) order(instance string, m workload.Manifest, edit func(*deployment)) message.Item {
	n.t.Helper()
	msg := must(m.Sign(n.cloud.operator))(n.t)
	e := n.f.ledger[instance]
	d := deployment{
		arg:    instance,
		deploy: workload.Deploy{Instance: instance, Manifest: msg, Inputs: []workload.Source{{Gateway: n.name, Stream: "a"}}},
		entry:  workload.Entry{Instance: instance, Epoch: e.Epoch + 1, Line: e.Line, Holder: n.name, Bundle: workload.ID(msg), Tenant: tenant},
	}
	d.entry.Inputs = workload.InputsHash(d.deploy.Inputs)
	d.deploy.Key = must(workload.SealTo(workload.PurposeBundle, workload.DeployContext(n.subject(), instance, msg), random(workload.KeySize), n.receive()))(n.t)
	if edit != nil {
		edit(&d)
	}
	n.sequence++
	cmd := n.cloud.command(message.Command{
		Audience: n.subject(), Sequence: n.sequence, Name: message.WorkloadDeploy, Args: map[string]string{"instance": d.arg}, Body: cose.MustMarshal(d.deploy),
	})
	over := cmd
	if d.over != nil {
		over = d.over
	}
	n.f.ledger[instance] = d.entry
	return message.Item{Nonce: n.nonce(), Subject: n.subject(), Command: cmd, Entry: must(d.entry.Sign(n.cloud.fleet, over))(n.t)}
}

func (n *node) outcome(item message.Item) message.Result {
	n.t.Helper()
	out := must(n.gateway.settle(n.gateway.deliver(item)))(n.t)
	return must(message.VerifyResult(&n.keep.epochKey.PublicKey, out.Publish[0].Data))(n.t)
}

func (n *node) deployed(instance string, m workload.Manifest) {
	n.t.Helper()
	if r := n.outcome(n.order(instance, m, nil)); !r.Done {
		n.t.Fatal(r.Reason)
	}
}

func (n *node) command(name string, args map[string]string) message.Result {
	n.t.Helper()
	n.sequence++
	cmd := n.cloud.command(message.Command{Audience: n.subject(), Sequence: n.sequence, Name: name, Args: args})
	return n.outcome(message.Item{Nonce: n.nonce(), Subject: n.subject(), Command: cmd})
}

// errCrash says that the node was killed.
var errCrash = errors.New("crash")

// commits makes states durable, and may die around it.
func (n *node) commits(out tee.Outcome, err error) error {
	for err == nil && len(out.Commit) > 0 {
		n.keep.mu.Lock()
		phase := phaseNames[n.keep.pending.next.Instances["i"].Phase]
		n.keep.mu.Unlock()
		if n.f.crash(n, "before storing: "+phase) {
			return errCrash
		}
		n.state = out.Commit
		if n.f.crash(n, "after storing: "+phase) {
			return errCrash
		}
		out, err = n.commit()
		if n.f.crash(n, "after committing: "+phase) {
			return errCrash
		}
	}
	return err
}

// work does the jobs that wait now, and says how many there were.
func (n *node) work(wait int64) (int, error) {
	n.t.Helper()
	r := must(tee.Work{Wait: wait}.Do(n.ctx(), n))(n.t)
	for _, j := range r.Jobs {
		if n.f.crash(n, "before job "+j.Kind) {
			return 0, errCrash
		}
		v, err := n.do(j)
		if errors.Is(err, errCrash) {
			return 0, err
		}
		d := tee.JobDone{ID: j.ID, Body: cose.Raw{0xf6}}
		if err != nil {
			d.Error = err.Error()
		} else if v != nil {
			d.Body = cose.MustMarshal(v)
		}
		must(tee.Work{Done: []tee.JobDone{d}}.Do(n.ctx(), n))(n.t)
	}
	return len(r.Jobs), nil
}

func (n *node) do(j tee.InstanceJob) (any, error) {
	switch j.Kind {
	case tee.JobAppend:
		b := must(tee.Body[tee.AppendLog](j.Body))(n.t)
		n.logs[b.Instance] = append(n.logs[b.Instance], b.Entries...)
		return tee.LogEnd{Next: uint64(len(n.logs[b.Instance]))}, nil
	case tee.JobRead:
		b := must(tee.Body[tee.ReadLog](j.Body))(n.t)
		log := n.logs[b.Instance]
		return tee.LogEntries{First: b.From, Entries: log[min(b.From, uint64(len(log))):], Next: uint64(len(log))}, nil
	case tee.JobDrop:
		delete(n.logs, must(tee.Body[tee.DropLog](j.Body))(n.t).Instance)
	case tee.JobPeer:
		m := must(tee.Body[message.Routed](j.Body))(n.t)
		n.f.publish(packet{from: n.name, to: m.Peer, data: m.Data})
	case tee.JobAdvance:
		return nil, n.commits(tee.Advance{}.Do(n.ctx(), n))
	case tee.JobAsk:
		if n.f.rng.Float64() < n.f.lose {
			return nil, errors.New("no answer")
		}
		v, err := n.f.asked(n, must(tee.Body[tee.Question](j.Body))(n.t))
		if n.f.rng.Float64() < n.f.lose {
			return nil, errors.New("the answer was lost")
		}
		return v, err
	default:
		return nil, fmt.Errorf("job %s", j.Kind)
	}
	return nil, nil
}

func (f *fabric) publish(p packet) {
	f.sent = append(f.sent, p)
	if f.drop != nil && f.drop(p) {
		return
	}
	if f.rng.Float64() >= f.lose {
		f.wire = append(f.wire, p)
	}
	if f.rng.Float64() < f.repeat {
		f.wire = append(f.wire, p)
	}
}

// asked is the cloud.
func (f *fabric) asked(n *node, q tee.Question) (any, error) {
	switch q.Kind {
	case message.AskLedger:
		s := must(tee.Body[message.Signed](q.Body))(f.t)
		return f.claim(n, s.Message)
	case message.AskEntry:
		b := must(tee.Body[message.AskedEntry](q.Body))(f.t)
		return message.Signed{Message: must(f.ledger[b.Instance].Sign(f.cloud.fleet, b.Nonce))(f.t)}, nil
	case message.AskReply:
		f.replies = append(f.replies, must(tee.Body[message.Reply](q.Body))(f.t))
		return nil, nil
	case message.AskKey:
		if f.release != nil {
			return f.release(must(tee.Body[message.AskedKey](q.Body))(f.t)), nil
		}
	}
	return nil, errors.New(tee.CloudRefuses + "no such question")
}

// claim is the ledger's compare-and-set.
func (f *fabric) claim(n *node, msg []byte) (any, error) {
	c := must(workload.VerifyClaim(&n.keep.epochKey.PublicKey, msg))(f.t)
	e := f.ledger[c.Instance]
	f.claims++
	if e.Epoch == c.From && e.Holder == n.name && (c.Entry.Tenant != e.Tenant || !bytes.Equal(c.Entry.Inputs, e.Inputs)) {
		return nil, errors.New(tee.CloudRefuses + "another tenant's, or other inputs")
	}
	if e.Epoch == c.From && e.Holder == n.name {
		if f.refuse != nil {
			if reason := f.refuse(c); reason != "" {
				return nil, errors.New(tee.CloudRefuses + reason)
			}
		}
		if c.Entry.Line < e.Line {
			return nil, errors.New(tee.CloudRefuses + "the line is before the entry's")
		}
		e = c.Entry
		f.ledger[c.Instance] = e
	}
	return message.Signed{Message: must(e.Sign(f.cloud.fleet, msg))(f.t)}, nil
}

// deliverOne hands over one packet, and reports whether there was one.
func (f *fabric) deliverOne() bool {
	if len(f.wire) == 0 {
		return false
	}
	i := 0
	if f.shuffle {
		i = f.rng.IntN(len(f.wire))
	}
	p := f.wire[i]
	f.wire = slices.Delete(f.wire, i, i+1)
	n := f.nodes[p.to]
	if n == nil || n.keep == nil {
		return true
	}
	kind := p.kind()
	if f.crash(n, fmt.Sprintf("before message %d", kind)) {
		n.restart(2)
		return true
	}
	if err := n.hand(p); errors.Is(err, errCrash) || f.crash(n, fmt.Sprintf("after message %d", kind)) {
		n.restart(2)
	}
	return true
}

// kind is that of a routed message.
func (p packet) kind() int {
	e, err := workload.Unwrap(p.data)
	if err != nil {
		return 0
	}
	return e.Kind
}

// hand gives a node a message, and takes its steps.
func (n *node) hand(p packet) error {
	return n.commits(tee.Peer{From: p.from, Data: p.data}.Do(n.ctx(), n))
}

// round lets everybody do what there is to do, and lets time pass that the keeps
// wait before they repeat something.
func (f *fabric) round() {
	f.t.Helper()
	for range max(1, len(f.wire)) {
		if !f.deliverOne() {
			break
		}
	}
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range f.nodes {
			if !yield(name) {
				return
			}
		}
	}) {
		n := f.nodes[name]
		for n.machines.Load() < int64(n.staff) {
			n.machine()
		}
		if _, err := n.work(1); errors.Is(err, errCrash) {
			n.restart(2)
		}
	}
}

// later lets so much time pass that everything unanswered is repeated.
func (f *fabric) later() {
	for _, n := range f.nodes {
		k := n.keep
		k.mu.Lock()
		for _, mv := range k.moves {
			mv.sent = time.Time{}
		}
		k.repeated = map[string]time.Time{}
		k.resendAll()
		k.mu.Unlock()
		n.again()
	}
}

// again ends the wait after runners that died.
func (n *node) again() {
	w := n.keep.workloads
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, st := range w.run {
		st.after = time.Time{}
	}
	w.assign()
}

// until runs rounds until done, or fails with what happened.
func (f *fabric) until(what string, done func() bool) {
	f.t.Helper()
	for i, end := 0, time.Now().Add(20*time.Second); !done(); i++ {
		if time.Now().After(end) {
			f.t.Fatalf("never: %s; %s", what, f.describe())
		}
		f.round()
		if i%4 == 3 {
			f.later()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.wrong {
		f.t.Error(w)
	}
	f.wrong = nil
}

func (f *fabric) describe() string {
	var s strings.Builder
	s.WriteString(fmt.Sprintf("ledger %+v", f.ledger))
	for name, n := range f.nodes {
		for i, inst := range n.keep.st.Instances {
			s.WriteString(fmt.Sprintf("; %s: %s %s epoch %d", name, i, phaseNames[inst.Phase], inst.Epoch))
		}
		s.WriteString(fmt.Sprintf("; %d moves, %d entries", len(n.keep.moves), len(n.logs["i"])))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return s.String() + fmt.Sprintf("; wrong: %v", f.wrong)
}

func (f *fabric) complain(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wrong = append(f.wrong, fmt.Sprintf(format, args...))
}

// runner is a connection to the keep as a runner has it.
type client struct {
	t    testing.TB
	d    *tee.Duplex
	in   chan tee.JobDone // answers
	msgs chan inbound     // the rest
	gone chan struct{}
}

type inbound struct {
	kind int
	body []byte
}

// connect makes an idle runner. A deaf one never reads.
func (n *node) connect(deaf bool) *client {
	n.t.Helper()
	ours, theirs := net.Pipe()
	life, k := n.life, n.keep
	n.served.Go(func() { k.workloads.serve(life, theirs) })
	c := &client{t: n.t, d: tee.NewDuplex(ours), in: make(chan tee.JobDone, 1024), msgs: make(chan inbound, 4096), gone: make(chan struct{})}
	go func() {
		if deaf {
			<-life.Done()
			c.d.Close()
			return
		}
		defer close(c.gone)
		for {
			kind, body, err := c.d.Receive()
			if err != nil {
				return
			}
			if kind == tee.KindJobDone {
				if d, err := tee.Body[tee.JobDone](body); err == nil {
					c.in <- d
				}
				continue
			}
			c.msgs <- inbound{kind, body}
		}
	}()
	_ = c.d.Send(tee.KindHello, tee.Hello{Version: "test", Arch: "test"})
	return c
}

// next waits for a message of a kind, and leaves out others.
func next[M any](c *client, kind int) M {
	c.t.Helper()
	for {
		select {
		case m := <-c.msgs:
			if m.kind == kind {
				return must(tee.Body[M](m.body))(c.t)
			}
		case <-c.gone:
			c.t.Fatalf("the connection ended before a message of kind %d", kind)
		case <-time.After(10 * time.Second):
			c.t.Fatalf("no message of kind %d", kind)
		}
	}
}

func (c *client) job(id uint64, kind string, body any) {
	_ = c.d.Send(tee.KindJob, tee.Job{ID: id, Kind: kind, Body: cose.MustMarshal(body)})
}

func (c *client) ended(name string) {
	c.t.Helper()
	select {
	case <-c.gone:
	case <-time.After(10 * time.Second):
		c.t.Fatalf("%s: the connection goes on", name)
	}
}

// machine is a runner whose workload is a number.
type machine struct {
	*client
	n      *node
	nextID uint64
	keys   []tee.StateKey
	value  uint64
}

// parts is how many frames a move takes.
const parts = 3

func (n *node) machine() {
	m := &machine{client: n.connect(false), n: n}
	n.machines.Add(1)
	go func() {
		defer n.machines.Add(-1)
		m.run()
	}()
}

func sealValue(k tee.StateKey, v uint64) []byte {
	aead, err := workload.NewAEAD(k.Key)
	if err != nil {
		panic(err)
	}
	nonce := random(12)
	return aead.Seal(append(bytes.Clone(k.ID), nonce...), nonce, binary.BigEndian.AppendUint64(nil, v), nil)
}

func openValue(keys []tee.StateKey, b []byte) (uint64, bool) {
	for _, k := range keys {
		if len(b) < 20 || !bytes.Equal(k.ID, b[:8]) {
			continue
		}
		aead, err := workload.NewAEAD(k.Key)
		if err != nil {
			return 0, false
		}
		if plain, err := aead.Open(nil, b[8:20], b[20:], nil); err == nil {
			return binary.BigEndian.Uint64(plain), true
		}
	}
	return 0, false
}

func (m *machine) ask(kind string, body any) (tee.JobDone, bool) {
	m.nextID++
	m.job(m.nextID, kind, body)
	for {
		select {
		case d := <-m.in:
			if d.ID == m.nextID {
				return d, d.Error == ""
			}
		case <-m.gone:
			return tee.JobDone{}, false
		}
	}
}

func (m *machine) run() {
	defer m.d.Close()
	var in inbound
	select {
	case in = <-m.msgs:
	case <-m.gone:
		return
	}
	a, err := tee.Body[tee.Assign](in.body)
	if in.kind != tee.KindAssign || err != nil {
		m.n.f.complain("a runner was given a message of kind %d first: %v", in.kind, err)
		return
	}
	d, ok := m.ask(tee.JobRead, tee.ReadLog{Instance: a.Instance})
	if !ok {
		return
	}
	log, err := tee.Body[tee.LogEntries](d.Body)
	if err != nil {
		m.n.f.complain("log: %v", err)
		return
	}
	m.keys = a.Keys
	if a.Receive {
		m.takeIn(a, log.Entries)
		return
	}
	if len(log.Entries) > 0 {
		if m.value, ok = openValue(a.Keys, log.Entries[len(log.Entries)-1]); !ok {
			m.n.f.complain("%s: the log does not open", m.n.name)
			return
		}
	} else if a.Epoch > 1 {
		m.n.f.complain("%s: the log is empty in epoch %d", m.n.name, a.Epoch)
		return
	} else {
		m.value = 42
	}
	m.live(a, a.Epoch)
}

func head(frames [][]byte) []byte {
	sum := sha256.Sum256(bytes.Join(frames, nil))
	return sum[:]
}

func (m *machine) takeIn(a tee.Assign, have [][]byte) {
	told := false
	for {
		m.job(0, tee.JobAck, tee.FrameAck{N: uint64(len(have))})
		if len(have) >= parts && !told {
			told = true
			_ = m.d.Send(tee.KindReceived, tee.Received{Head: head(have)})
		}
		var in inbound
		select {
		case in = <-m.msgs:
		case <-m.gone:
			return
		}
		switch in.kind {
		case tee.KindFrame:
			if f, err := tee.Body[tee.Frame](in.body); err == nil && f.N == uint64(len(have)) && len(have) < parts {
				if _, ok := m.ask(tee.JobAppend, tee.AppendLog{Instance: a.Instance, Entries: [][]byte{f.Data}}); !ok {
					return
				}
				have = append(have, f.Data)
			}
		case tee.KindActivate:
			act, err := tee.Body[tee.Activate](in.body)
			if err != nil || len(have) != parts || !bytes.Equal(act.Head, head(have)) {
				m.n.f.complain("%s was activated without its state", m.n.name)
				return
			}
			if _, early := openValue(a.Keys, have[parts-1]); early {
				m.n.f.complain("the last state opens with the session key")
			}
			var ok bool
			if m.value, ok = openValue(act.Keys, have[parts-1]); !ok {
				m.n.f.complain("%s: what was released does not open", m.n.name)
				return
			}
			m.keys, a.Line = act.Keys, act.Line
			m.live(a, act.Epoch)
			return
		}
	}
}

// lives notes who runs an instance in which epoch: there is one at most.
func (m *machine) lives(instance string, epoch uint64) {
	f := m.n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	key := workload.Session(instance, epoch)
	if other := f.lived[key]; other != "" && other != m.n.name {
		f.wrong = append(f.wrong, fmt.Sprintf("%s lives on %s and on %s", key, other, m.n.name))
	}
	f.lived[key] = m.n.name
	f.value[m.n.name] = m.value
	if m.value != 42 {
		f.wrong = append(f.wrong, fmt.Sprintf("the state is %d", m.value))
	}
}

func (m *machine) live(a tee.Assign, epoch uint64) {
	if _, ok := m.ask(tee.JobAppend, tee.AppendLog{Instance: a.Instance, Entries: [][]byte{sealValue(m.keys[len(m.keys)-1], m.value)}}); !ok {
		return
	}
	m.lives(a.Instance, epoch)
	_ = m.d.Send(tee.KindReport, tee.Report{Running: true})
	var frames [][]byte
	acked, told := uint64(0), false
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var in inbound
		select {
		case in = <-m.msgs:
		case <-tick.C:
			for i := acked; i < uint64(len(frames)); i++ {
				m.job(0, tee.JobFrame, tee.Frame{N: i, Data: frames[i]})
			}
			continue
		case <-m.gone:
			return
		}
		switch in.kind {
		case tee.KindSend:
			if s, err := tee.Body[tee.Send](in.body); err == nil {
				frames, acked, told = [][]byte{sealValue(s.Session, m.value+1), sealValue(s.Session, m.value+2), sealValue(s.Final, m.value)}, 0, false
			}
		case tee.KindResume:
			frames = nil
			m.lives(a.Instance, epoch)
		case tee.KindFrameAck:
			if f, err := tee.Body[tee.FrameAck](in.body); err == nil && f.N <= uint64(len(frames)) {
				acked = max(acked, f.N)
			}
			if len(frames) > 0 && acked == parts && !told {
				told = true
				_ = m.d.Send(tee.KindFinal, tee.Final{Head: head(frames), Line: a.Line})
			}
		case tee.KindInfer:
			if i, err := tee.Body[tee.Infer](in.body); err == nil {
				_ = m.d.Send(tee.KindInferred, tee.Inferred{ID: i.ID, Output: append([]byte("got "), i.Input...)})
			}
		}
	}
}

// settled reports whether an instance runs at one place, as the ledger says, and
// nothing is under way any more.
func (f *fabric) settled(instance string) bool {
	e, holders := f.ledger[instance], 0
	for name, n := range f.nodes {
		n.keep.mu.Lock()
		i, here := n.keep.st.Instances[instance]
		moving := n.keep.moves[instance] != nil
		n.keep.mu.Unlock()
		if !here {
			continue
		}
		if i.Phase != phaseLive || name != e.Holder || i.Epoch != e.Epoch || moving {
			return false
		}
		holders++
		w := n.keep.workloads
		w.mu.Lock()
		running := w.run[instance] != nil && w.run[instance].report.Running
		w.mu.Unlock()
		if !running {
			return false
		}
	}
	return holders == 1
}

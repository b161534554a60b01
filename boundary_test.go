package edgekeep_test

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// allowed says which packages of ours each package may import. Imports go down
// only: roles, formats, leaves (docs/design.md). A package that is not here
// fails, so that a new one is placed on purpose.
var allowed = map[string]string{
	// leaves
	"internal/cose":    "",
	"internal/durable": "",
	"internal/config":  "",
	"internal/sandbox": "",
	"mqtt":             "",
	"sensors":          "",
	"sensors/driver":   "sensors",
	"sensors/host":     "sensors",
	"sensors/replay":   "sensors",
	"tee/tpm":          "",

	// formats: pure, never one another
	"sealing":     "internal/cose",
	"tee/attest":  "internal/cose tee/tpm",
	"tee/message": "internal/cose",
	"workload":    "internal/cose",

	// what is done with a module before it is a workload, and what it calls
	"workload/wasm":                    "",
	"workload/pack":                    "workload workload/wasm tee/message internal/config internal/cose",
	"workload/examples":                "",
	"workload/examples/anomaly/detect": "",
	"workload/examples/anomaly/train":  "workload/examples/anomaly/detect",
	"tee/runner/memory":                "",
	"tee/runner/wasi":                  "internal/cose",

	// the contract between keep and agent
	"tee": "internal/cose",

	// roles: never one another
	"tee/keep":        "tee tee/attest tee/message tee/tpm sealing sensors workload internal/cose",
	"tee/runner":      "tee tee/message workload workload/wasm tee/runner/wasi tee/runner/memory sealing internal/cose",
	"agent":           "tee tee/message mqtt internal/cose internal/durable",
	"cloud":           "mqtt tee/attest tee/tpm internal/cose internal/durable",
	"cloud/verifier":  "cloud mqtt tee/attest tee/tpm",
	"cloud/keybroker": "cloud sealing tee/attest tee/message workload internal/cose",
	// The fleet speaks the other roles' request formats, and stores what the key
	// broker reads: see docs/rationale.md.
	"cloud/fleet":  "cloud cloud/verifier cloud/keybroker mqtt sealing tee/attest tee/message tee/tpm workload internal/cose",
	"cloud/bridge": "mqtt",
	"cloud/client": "cloud cloud/fleet cloud/keybroker internal/config internal/cose sealing tee/attest tee/message workload",
	"cloud/node":   "cloud cloud/bridge cloud/fleet cloud/keybroker cloud/verifier internal/cose internal/durable mqtt tee/attest tee/message",

	// mains
	"cmd/edgekeep-keep":   "tee tee/keep internal/config internal/sandbox",
	"cmd/edgekeep-agent":  "agent internal/config",
	"cmd/edgekeep-runner": "tee/runner internal/sandbox",
	"cmd/edgekeep-sensor": "sensors/driver sensors/host sensors/replay internal/config",
	"cmd/edgekeep-cloud":  "cloud/node internal/config internal/durable",
	"cmd/edgekeep":        "cloud cloud/client cloud/fleet internal/cose sealing tee/attest tee/message workload workload/pack workload/wasm testbench/demo",

	// the test bench may import anything; only `edgekeep demo` and tests import it
	"testbench/swtpm": "*", "testbench/mosquitto": "*", "testbench/hostile": "*", "testbench/internal/process": "*",
	"testbench/rig": "*", "testbench/demo": "*", "testbench/hands": "*", "testbench/bench": "*", "testbench/bench/workload": "*",
	"testbench/model": "*", "testbench/model/cmd": "*",
	"configs/mosquitto": "",
}

type pkg struct {
	ImportPath, Doc, Dir, Name string
	Imports, Deps, GoFiles     []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Doc,Dir,Name,Imports,Deps,GoFiles"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	return pkgs
}

const module = "edgekeep/"

func TestBoundary(t *testing.T) {
	for _, p := range list(t, "./...") {
		name := strings.TrimPrefix(p.ImportPath, module)
		if len(p.GoFiles) == 0 {
			continue // tests only
		}
		may, ok := allowed[name]
		if !ok {
			t.Errorf("package %s is not in the table: say what it may import", name)
			continue
		}
		if p.Doc == "" {
			t.Errorf("package %s has no package comment", name)
		}
		for _, i := range p.Imports {
			dep, ours := strings.CutPrefix(i, module)
			if ours && may != "*" && !slices.Contains(strings.Fields(may), dep) {
				t.Errorf("%s imports %s", name, dep)
			}
		}
	}
}

// TestKeepStaysSmall: what a user has to trust must not reach the network or
// start programs, and has a budget of lines.
func TestKeepStaysSmall(t *testing.T) {
	keep := list(t, "./cmd/edgekeep-keep")[0]
	for _, d := range keep.Deps {
		if slices.Contains([]string{"net/http", "crypto/tls", "os/exec", "plugin", module + "workload/pack"}, d) || strings.Contains(d, "wazero") {
			t.Errorf("edgekeep-keep links %s", d)
		}
	}
	lines := linkedLines(t, "./cmd/edgekeep-keep")
	t.Logf("edgekeep-keep is made of %d lines of ours", lines)
	if lines > 9500 {
		t.Errorf("edgekeep-keep is made of %d lines of ours, more than 9500", lines)
	}
}

// linkedLines counts the lines of our own code, neither blank nor comment, that
// end up in a program: functions that the linker kept (inlining is off, so none
// hides in another), and everything in those packages that is no function.
func linkedLines(t *testing.T, main string) int {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "bin")
	if out, err := exec.Command("go", "build", "-gcflags="+module+"...=-l", "-o", bin, main).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command("go", "tool", "nm", bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	linked := map[string]bool{}
	generic := regexp.MustCompile(`\[[^\]]*\]`)
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) >= 3 {
			linked[generic.ReplaceAllString(strings.Join(f[2:], " "), "")] = true
		}
	}
	n := 0
	for _, p := range list(t, "-deps", main) {
		if strings.HasPrefix(p.ImportPath, module) {
			n += linkedIn(t, p, linked)
		}
	}
	return n
}

func linkedIn(t *testing.T, p pkg, linked map[string]bool) int {
	t.Helper()
	prefix := p.ImportPath
	if p.Name == "main" {
		prefix = "main"
	}
	n := 0
	for _, name := range p.GoFiles {
		src, err := os.ReadFile(filepath.Join(p.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, src, 0)
		if err != nil {
			t.Fatal(err)
		}
		n += codeLines(src)
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			symbol := prefix + "." + fn.Name.Name
			if fn.Recv != nil {
				recv := strings.TrimPrefix(types.ExprString(fn.Recv.List[0].Type), "*")
				recv, _, _ = strings.Cut(recv, "[")
				symbol = prefix + "." + recv + "." + fn.Name.Name
				if !linked[symbol] {
					symbol = prefix + ".(*" + recv + ")." + fn.Name.Name
				}
			}
			if !linked[symbol] {
				n -= codeLines(src[fset.Position(fn.Pos()).Offset:fset.Position(fn.End()).Offset])
			}
		}
	}
	return n
}

// codeLines counts lines that are neither blank nor a comment.
func codeLines(src []byte) int {
	n := 0
	for line := range bytes.Lines(src) {
		if l := bytes.TrimSpace(line); len(l) > 0 && !bytes.HasPrefix(l, []byte("//")) {
			n++
		}
	}
	return n
}

// TestAgentCannotOpen: the process on the network does not link what opens
// things.
func TestAgentCannotOpen(t *testing.T) {
	for _, d := range list(t, "./cmd/edgekeep-agent")[0].Deps {
		if name, ours := strings.CutPrefix(d, module); ours && slices.Contains([]string{"sealing", "workload", "tee/attest", "tee/tpm", "tee/keep", "sensors"}, name) {
			t.Errorf("edgekeep-agent links %s", name)
		}
	}
}

func TestMainsAreShort(t *testing.T) {
	mains, err := filepath.Glob("cmd/*/main.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mains {
		raw, err := os.ReadFile(m)
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(raw, []byte("\n")); n > 100 {
			t.Errorf("%s has %d lines", m, n)
		}
	}
}

// pinned are the modules on which security rests. `go mod tidy` can fall back to
// an older version without a word: this says it aloud.
var pinned = map[string]string{
	"github.com/google/go-tpm":               "v0.9.8",
	"github.com/veraison/go-cose":            "v1.3.0",
	"github.com/fxamacker/cbor/v2":           "v2.10.0",
	"github.com/eclipse/paho.mqtt.golang":    "v1.5.1",
	"github.com/nats-io/nats-server/v2":      "v2.15.2",
	"github.com/nats-io/nats.go":             "v1.53.1",
	"github.com/klauspost/compress":          "v1.20.3",
	"github.com/influxdata/line-protocol/v2": "v2.2.1",
	"github.com/landlock-lsm/go-landlock":    "v0.11.0",
	"github.com/elastic/go-seccomp-bpf":      "v1.6.0",
	"golang.org/x/crypto":                    "v0.58.0",
}

func TestSecurityModulesArePinned(t *testing.T) {
	for path, want := range pinned {
		out, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", path).Output()
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if got := strings.TrimSpace(string(out)); got != want {
			t.Errorf("%s is at %s, reviewed was %s", path, got, want)
		}
	}
}

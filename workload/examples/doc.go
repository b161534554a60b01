// Package examples builds the example workloads beside it: threshold (C, a
// filter), rolling (Rust, a reactor) and anomaly (Go, a reactor with a trained
// model). Each has its source, its manifest and a README.
package examples

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
)

// Build compiles the named examples, all of them when none is named, into
// outDir/NAME: workload.toml, NAME.wasm and the models. It runs build.sh, which
// it finds beside its own source: so it works in tests and `go run`, where that
// is still there. The error says which compiler is missing.
func Build(ctx context.Context, outDir string, names ...string) error {
	_, source, _, ok := runtime.Caller(0)
	if !ok || !filepath.IsAbs(source) {
		return errors.New("build examples: this program does not know where its source is: run build.sh yourself")
	}
	script := filepath.Join(filepath.Dir(source), "build.sh")
	out, err := exec.CommandContext(ctx, "sh", append([]string{script, outDir}, names...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("build examples: %w: %s", err, out)
	}
	return nil
}

package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"edgekeep/testbench/swtpm"
)

// One software TPM and one manufacturer serve all tests that do not cut its power.
// Each test opens the TPM, which serves one client at a time, and closes it.
var (
	base, maker string // directories
	shared      *swtpm.TPM
	startShared = sync.OnceFunc(func() {
		var err error
		if shared, err = swtpm.Start(context.Background(), swtpm.Options{Dir: filepath.Join(base, "shared"), CADir: maker}); err != nil {
			panic(err)
		}
	})
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	base, maker = dir, filepath.Join(dir, "maker")
	defer func() {
		if shared != nil {
			_ = shared.Kill()
		}
	}()
	return m.Run()
}

func haveTPM() bool {
	for _, program := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(program); err != nil && os.Getenv("CI") == "" {
			return false
		}
	}
	return true
}

// measured are PCRs into which something is measured before a test runs; unmeasured
// has its reset value.
var measured, unmeasured = []int{0, 7}, []int{14}

// open opens the shared TPM, in which the measured PCRs hold something.
func open(t testing.TB) *Device {
	t.Helper()
	if !haveTPM() {
		t.Skip("swtpm is missing (apt-get install swtpm swtpm-tools)")
	}
	startShared()
	d := openDevice(t, shared)
	for _, p := range measured {
		extend(t, d, p, t.Name())
	}
	return d
}

func openDevice(t testing.TB, s *swtpm.TPM) *Device {
	t.Helper()
	d, err := Open(s.Socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// startTPM starts a TPM of the test's own, in dir.
func startTPM(t testing.TB, dir string) *swtpm.TPM {
	t.Helper()
	if !haveTPM() {
		t.Skip("swtpm is missing (apt-get install swtpm swtpm-tools)")
	}
	s, err := swtpm.Start(context.Background(), swtpm.Options{Dir: dir, CADir: maker})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Kill() })
	return s
}

// shortDir is a directory whose path is short enough for sockets.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// extend measures an event, over the connection of d.
func extend(t testing.TB, d *Device, pcr int, event string) {
	t.Helper()
	digest := sha256.Sum256([]byte(event))
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]}}},
	}.Execute(d.tpm)
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// auth is an auth value of 32 bytes, none of them zero.
func auth(first byte) []byte { return AuthValue([32]byte(bytes.Repeat([]byte{first}, 32))) }

var qualifying = bytes.Repeat([]byte{0x51}, 32)

// newAK makes and loads an AK, closed when the test ends.
func newAK(t testing.TB, d *Device) *AK {
	t.Helper()
	ak := must(d.LoadAK(must(d.NewAK(auth(1)))(t), auth(1)))(t)
	t.Cleanup(ak.Close)
	return ak
}

// newKey makes a key of the keep, bound to the measured PCRs.
func newKey(t testing.TB, d *Device, use Use) (*Key, Blob) {
	t.Helper()
	blob := must(d.NewKey(use, measured, auth(2)))(t)
	return must(d.Key(blob, measured, auth(2)))(t), blob
}

// cutting is a TPM whose connection breaks: after `left` more commands nothing is sent,
// or, if late, what is sent is done but not answered.
type cutting struct {
	transport.TPMCloser
	left int
	late bool
}

var errCut = errors.New("the connection is cut")

func (c *cutting) Send(command []byte) ([]byte, error) {
	if c.left--; c.left < 0 {
		if c.late && c.left == -1 {
			_, _ = c.TPMCloser.Send(command)
		}
		return nil, errCut
	}
	return c.TPMCloser.Send(command)
}

// vectors is a folder of the published vectors.
func vectors(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	candidates := []string{os.Getenv("EDGEKEEP_VECTORS")}
	for ; candidates[0] == "" && dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		candidates = append(candidates, filepath.Join(dir, "..", "shared", "vectors"))
	}
	for _, c := range candidates {
		if _, err := os.Stat(filepath.Join(c, name)); c != "" && err == nil {
			return filepath.Join(c, name)
		}
	}
	t.Skip("the published vectors are not here: set EDGEKEEP_VECTORS to their folder")
	return ""
}

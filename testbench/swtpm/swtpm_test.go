package swtpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

func TestMain(m *testing.M) {
	if os.Getenv("CI") == "" {
		for _, program := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
			if _, err := exec.LookPath(program); err != nil {
				os.Stderr.WriteString("skipped: " + program + " is missing (apt-get install swtpm swtpm-tools)\n")
				os.Exit(0)
			}
		}
	}
	os.Exit(runTests(m))
}

// maker is a manufacturer that the tests share: its keys take a second to make.
var maker string

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tpm-maker")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	maker = dir
	return m.Run()
}

// shortDir is a directory whose path is short enough for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func startTPM(t *testing.T, o Options) *TPM {
	t.Helper()
	tpm, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tpm.Kill(); err != nil {
			t.Error(err)
		}
	})
	return tpm
}

func (t *TPM) must(tb testing.TB, act func(*conn) error) {
	tb.Helper()
	if err := t.visit(context.Background(), act); err != nil {
		tb.Fatal(err)
	}
}

func readPCR(t *testing.T, tpm *TPM, pcr uint) []byte {
	t.Helper()
	var digest []byte
	tpm.must(t, func(c *conn) error {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcr)},
		}}}.Execute(c)
		if err == nil {
			digest = rsp.PCRValues.Digests[0].Buffer
		}
		return err
	})
	return digest
}

func readNV(t *testing.T, tpm *TPM, index tpm2.TPMHandle) []byte {
	t.Helper()
	var data []byte
	tpm.must(t, func(c *conn) error {
		public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
		if err != nil {
			return err
		}
		contents, err := public.NVPublic.Contents()
		if err != nil {
			return err
		}
		for len(data) < int(contents.DataSize) {
			rsp, err := tpm2.NVRead{
				AuthHandle: tpm2.AuthHandle{Handle: index, Name: public.NVName, Auth: tpm2.PasswordAuth(nil)},
				NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
				Size:       uint16(min(512, int(contents.DataSize)-len(data))),
				Offset:     uint16(len(data)),
			}.Execute(c)
			if err != nil {
				return err
			}
			data = append(data, rsp.Data.Buffer...)
		}
		return nil
	})
	return data
}

// readClock returns the count of power cycles (ResetCount) and whether the clock
// has surely not gone back (Safe: the last shutdown was in order).
func readClock(t *testing.T, tpm *TPM) tpm2.TPMSClockInfo {
	t.Helper()
	var info tpm2.TPMSClockInfo
	tpm.must(t, func(c *conn) error {
		rsp, err := tpm2.ReadClock{}.Execute(c)
		if err == nil {
			info = rsp.CurrentTime.ClockInfo
		}
		return err
	})
	return info
}

func TestLife(t *testing.T) {
	dir := shortDir(t)
	o := Options{Dir: filepath.Join(dir, "box"), CADir: filepath.Join(dir, "maker")}
	tpm := startTPM(t, o)

	ek := readNV(t, tpm, 0x01c00002)
	if got := readPCR(t, tpm, 7); !bytes.Equal(got, make([]byte, 32)) {
		t.Errorf("pcr 7 of a new tpm is %x, want zeros", got)
	}
	digest := sha256.Sum256([]byte("firmware"))
	if err := tpm.Extend(7, digest); err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(append(make([]byte, 32), digest[:]...))
	if got := readPCR(t, tpm, 7); !bytes.Equal(got, want[:]) {
		t.Errorf("extended pcr 7 is %x, want %x", got, want)
	}
	first := readClock(t, tpm)

	if err := tpm.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(tpm.Socket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	again := startTPM(t, o)
	if again.Socket() != tpm.Socket() {
		t.Errorf("the socket moved from %s to %s", tpm.Socket(), again.Socket())
	}
	if got := readNV(t, again, 0x01c00002); !bytes.Equal(got, ek) {
		t.Error("another tpm came back after Stop")
	}
	if got := readPCR(t, again, 7); !bytes.Equal(got, make([]byte, 32)) {
		t.Errorf("pcr 7 survived a power cycle: %x", got)
	}
	second := readClock(t, again)
	if second.ResetCount != first.ResetCount+1 || !second.Safe {
		t.Errorf("clock after Stop %+v, before %+v: want one more reset and a safe clock", second, first)
	}

	if err := tpm.Kill(); err != nil { // the old handle must not harm the new TPM
		t.Fatal(err)
	}
	if err := again.Kill(); err != nil {
		t.Fatal(err)
	}
	last := startTPM(t, o)
	if got := readNV(t, last, 0x01c00002); !bytes.Equal(got, ek) {
		t.Error("another tpm came back after Kill")
	}
	if third := readClock(t, last); third.ResetCount != second.ResetCount+1 || third.Safe {
		t.Errorf("clock after Kill %+v, before %+v: want one more reset and a clock that may have gone back", third, second)
	}
}

func TestOneClientAtATime(t *testing.T) {
	tpm := startTPM(t, Options{Dir: shortDir(t), CADir: maker})
	tpm.timeout = 300 * time.Millisecond
	other, err := net.Dial("unix", tpm.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	client := &conn{other}
	if _, err := (tpm2.ReadClock{}).Execute(client); err != nil { // it is connected now
		t.Fatal(err)
	}
	err = tpm.Extend(1, [32]byte{1})
	if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "one client at a time") {
		t.Errorf("extend while another client is connected: %v", err)
	}
	if err := tpm.Stop(); err == nil || !strings.Contains(err.Error(), "TPM2_Shutdown") {
		t.Errorf("stop while another client is connected: %v; want to hear that it was not in order", err)
	}
	if err := tpm.Stop(); err != nil {
		t.Errorf("stop after stop: %v", err)
	}
}

func TestSecondStart(t *testing.T) {
	dir := shortDir(t)
	tpm := startTPM(t, Options{Dir: dir, CADir: maker})
	if _, err := Start(t.Context(), Options{Dir: dir, CADir: maker}); err == nil {
		t.Fatal("two TPMs run in one directory")
	}
	if err := tpm.Extend(0, [32]byte{}); err != nil {
		t.Errorf("the failed second start harmed the first: %v", err)
	}
	if err := tpm.Extend(24, [32]byte{}); err == nil {
		t.Error("extended pcr 24")
	}
	if err := tpm.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), Options{Dir: dir, CADir: shortDir(t)}); err == nil {
		t.Error("a TPM changed its manufacturer")
	}
}

func TestLongPath(t *testing.T) {
	dir := filepath.Join(shortDir(t), strings.Repeat("long/", 30))
	tpm := startTPM(t, Options{Dir: dir, CADir: maker})
	if len(tpm.Socket()) > 107 {
		t.Errorf("the socket path has %d bytes", len(tpm.Socket()))
	}
	if err := tpm.Extend(0, [32]byte{}); err != nil {
		t.Error(err)
	}
	if err := tpm.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(tpm.Socket())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the temporary directory of the sockets is still there: %v", err)
	}
}

func TestBrokenState(t *testing.T) {
	dir := shortDir(t)
	tpm := startTPM(t, Options{Dir: dir, CADir: maker})
	if err := tpm.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "state", "tpm2-00.permall"), []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if tpm, err := Start(ctx, Options{Dir: dir, CADir: maker}); err == nil {
		tpm.Kill()
		t.Error("a TPM with a broken state started")
	}
}

func TestRefusedPaths(t *testing.T) {
	for _, o := range []Options{
		{},
		{Dir: "relative"},
		{Dir: "/tmp/with,comma"},
		{Dir: "/tmp/with space"},
		{Dir: shortDir(t), CADir: "relative"},
		{Dir: shortDir(t), CADir: "/tmp/with#hash"},
	} {
		if tpm, err := Start(t.Context(), o); err == nil {
			tpm.Kill()
			t.Errorf("started with %+v", o)
		}
	}
}

func TestNotInstalled(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Start(t.Context(), Options{Dir: shortDir(t)})
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "apt-get install swtpm swtpm-tools") {
		t.Errorf("the error does not say what to install: %v", err)
	}
}

// Package swtpm is the test bench's TPM: the software TPM of libtpms, made by a
// manufacturer of our own and run as a child process. The product talks to it
// over the same byte stream as to /dev/tpmrm0 and does not know the difference.
// It protects nothing: whoever can read its directory has its keys.
//
// # The TPM
//
// The directory of a TPM holds its state (state/), its log, a lock and, when
// the path is short enough for a Unix socket, its two sockets. The first Start
// manufactures the TPM with swtpm_setup: endorsement keys RSA-2048 (handle
// 0x81010001, certificate in NV 0x01c00002) and P-384 (0x81010016, 0x01c00016),
// both locked, only the SHA-256 bank of PCRs active. It is manufactured in a
// directory of another name and renamed, so a Start that was killed half-way
// leaves no half TPM. A later Start in the same directory is a power cycle of
// the same TPM: same seeds, keys, NV and counters, PCRs back to zero.
//
// Every Start sends TPM2_Startup(CLEAR). After that all PCRs are zero: no
// firmware has run. Extend plays the firmware.
//
// swtpm serves one connection at a time. A second client waits until the first
// has closed; Extend and Stop, which are clients too, give up after five
// seconds and say so. The control channel is at Socket() + ".ctrl", where
// tpm2-tools look for it (TPM2TOOLS_TCTI=swtpm:path=SOCKET).
//
// # The manufacturer
//
// The manufacturer's directory (CADir) may be shared by many TPMs, also by
// several processes at the same time. It holds root.pem (self-signed) and
// issuer.pem (signed by the root, signs EK certificates) and nothing else that
// ends in .pem; keys, serial number and configuration are in private/. Nothing
// under /etc or /var/lib is read or written.
package swtpm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"edgekeep/testbench/internal/process"
)

const (
	socketName = "tpm.sock"
	ctrlSuffix = ".ctrl"
	maxSocket  = 107 // bytes of a Unix socket path, without its final zero
)

// Options tells where a TPM lives.
type Options struct {
	// Dir is the TPM's directory, an absolute path; created when missing.
	Dir string
	// CADir is the manufacturer's directory, an absolute path; created when
	// missing. Empty means Dir/manufacturer.
	CADir string
}

// TPM is a running software TPM. Its methods are safe for concurrent use.
type TPM struct {
	socket  string
	caDir   string
	process *process.Process
	timeout time.Duration // of a visit
	cleanup func()        // removes the sockets, releases the lock; once
}

// Start manufactures the TPM in o.Dir if there is none yet, switches it on and
// returns when it answers commands. The context bounds the start, not the life
// of the TPM: that ends with Stop, Kill, or this process.
//
// It fails when swtpm is not installed (errors.Is exec.ErrNotFound; the message
// says what to install), and when a TPM already runs in o.Dir.
func Start(ctx context.Context, o Options) (*TPM, error) {
	if o.CADir == "" {
		o.CADir = filepath.Join(o.Dir, "manufacturer")
	}
	for _, dir := range []string{o.Dir, o.CADir} {
		if err := checkPath(dir); err != nil {
			return nil, err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make the directory of a software tpm: %w", err)
		}
	}
	release, err := process.Lock(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("start a software tpm: %w", err)
	}
	t, err := start(ctx, o, release)
	if err != nil {
		release()
		return nil, err
	}
	return t, nil
}

// checkPath refuses what swtpm's option and configuration syntax cannot carry.
func checkPath(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("start a software tpm in %q: give an absolute path", path)
	}
	if strings.ContainsAny(path, ",#$\"'\\ \t\r\n") {
		return fmt.Errorf("start a software tpm in %q: swtpm cannot take a path with a space, quote, comma, backslash, $ or #", path)
	}
	return nil
}

// start does the work of Start under the lock of o.Dir.
func start(ctx context.Context, o Options, release func()) (*TPM, error) {
	program, err := process.Find("swtpm", "swtpm", "swtpm-tools")
	if err != nil {
		return nil, err
	}
	state := filepath.Join(o.Dir, "state")
	if _, err := os.Stat(state); errors.Is(err, os.ErrNotExist) {
		if err := manufacture(ctx, o, state); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(filepath.Join(o.CADir, "root.pem")); err != nil {
		return nil, fmt.Errorf("start a software tpm: %s is not the directory of its manufacturer: %w", o.CADir, err)
	}
	socketDir, temporary, err := makeSocketDir(o.Dir)
	if err != nil {
		return nil, err
	}
	t := &TPM{socket: filepath.Join(socketDir, socketName), caDir: o.CADir, timeout: commandTimeout}
	t.cleanup = sync.OnceFunc(func() {
		_ = os.Remove(t.socket) // left behind by SIGKILL only
		_ = os.Remove(t.socket + ctrlSuffix)
		if temporary {
			_ = os.Remove(socketDir)
		}
		release()
	})
	// We hold the lock: sockets that are here belong to a dead process.
	_ = os.Remove(t.socket)
	_ = os.Remove(t.socket + ctrlSuffix)
	t.process, err = process.Start(filepath.Join(o.Dir, "swtpm.log"), program,
		"socket", "--tpm2",
		"--tpmstate", "dir="+state+",mode=0600",
		"--server", "type=unixio,path="+t.socket+",mode=0600",
		"--ctrl", "type=unixio,path="+t.socket+ctrlSuffix+",mode=0600",
		"--flags", "startup-clear")
	if err != nil {
		t.cleanup()
		return nil, err
	}
	if err := t.waitReady(ctx); err != nil {
		_ = t.Kill() // the first error tells more
		return nil, err
	}
	return t, nil
}

// makeSocketDir returns the directory for the sockets: dir itself, or a
// temporary one when a socket path below dir would be too long.
func makeSocketDir(dir string) (path string, temporary bool, err error) {
	if len(filepath.Join(dir, socketName+ctrlSuffix)) <= maxSocket {
		return dir, false, nil
	}
	path, err = os.MkdirTemp("", "ek-tpm-")
	if err != nil {
		return "", false, fmt.Errorf("make a short directory for the sockets of a software tpm: %w", err)
	}
	if socket := filepath.Join(path, socketName+ctrlSuffix); len(socket) > maxSocket || checkPath(path) != nil {
		_ = os.Remove(path)
		return "", false, fmt.Errorf("make a socket at %s: too long for a unix socket or not absolute; set TMPDIR to a short path", socket)
	}
	return path, true, nil
}

// Socket is the path of the Unix socket that takes TPM commands, shorter than
// 108 bytes. It stays the same at every Start when Options.Dir is short enough
// to hold it (up to 93 bytes); else each Start makes a new one under TMPDIR.
func (t *TPM) Socket() string { return t.socket }

// CADir is the directory with the manufacturer's certificates, root.pem and
// issuer.pem: the EK certificates chain to them.
func (t *TPM) CADir() string { return t.caDir }

// Kill cuts the power: SIGKILL, no shutdown, what was not yet in NV is lost.
// It is no error when the TPM is gone already.
func (t *TPM) Kill() error {
	err := t.process.Kill()
	t.cleanup()
	return err
}

// Stop shuts the TPM down in order (TPM2_Shutdown(CLEAR), then the end of the
// process). If the shutdown cannot be sent, mostly because another client holds
// the connection, the TPM is switched off all the same and the error says that
// its next start follows an unorderly shutdown. It is no error when the TPM is
// gone already.
func (t *TPM) Stop() error {
	var shutdownErr error
	select {
	case <-t.process.Done():
	default:
		shutdownErr = t.shutdown()
	}
	err := errors.Join(shutdownErr, t.process.Stop())
	t.cleanup()
	return err
}

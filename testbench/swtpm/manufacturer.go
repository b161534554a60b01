package swtpm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"edgekeep/testbench/internal/process"
)

// manufacture makes a new TPM in the directory state, which does not exist yet.
func manufacture(ctx context.Context, o Options, state string) error {
	setup, err := process.Find("swtpm_setup", "swtpm", "swtpm-tools")
	if err != nil {
		return err
	}
	config, err := writeConfig(o.CADir)
	if err != nil {
		return fmt.Errorf("set up the manufacturer of a software tpm: %w", err)
	}
	unfinished := state + ".new"
	if err := os.RemoveAll(unfinished); err != nil {
		return fmt.Errorf("remove a half-made software tpm: %w", err)
	}
	if err := os.Mkdir(unfinished, 0o700); err != nil {
		return fmt.Errorf("make the state directory of a software tpm: %w", err)
	}
	err = runSetup(ctx, filepath.Join(o.Dir, "setup.log"), setup,
		"--tpm2", "--tpmstate", unfinished, "--config", config,
		"--create-ek-cert", "--lock-nvram", "--pcr-banks", "sha256")
	if err != nil {
		return err
	}
	if err := publish(o.CADir); err != nil {
		return fmt.Errorf("publish the manufacturer's certificates: %w", err)
	}
	if err := os.Rename(unfinished, state); err != nil {
		return fmt.Errorf("finish a software tpm: %w", err)
	}
	return nil
}

// runSetup runs swtpm_setup to its end.
func runSetup(ctx context.Context, log, program string, args ...string) error {
	p, err := process.Start(log, program, args...)
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		_ = p.Stop() // SIGTERM: swtpm_setup then ends its own swtpm
		return fmt.Errorf("manufacture a software tpm: %w", context.Cause(ctx))
	}
	if err := p.Err(); err != nil {
		return fmt.Errorf("manufacture a software tpm: swtpm_setup: %w: %s", err, p.LogTail())
	}
	return nil
}

// writeConfig writes the configuration of swtpm_setup and of its certificate
// tool below caDir/private and returns the path of the former. The contents
// depend on caDir only, so TPMs made at the same time do not disturb each other.
func writeConfig(caDir string) (path string, err error) {
	tool, err := process.Find("swtpm_localca", "swtpm-tools")
	if err != nil {
		return "", err
	}
	private := filepath.Join(caDir, "private")
	if err := os.MkdirAll(private, 0o700); err != nil {
		return "", err
	}
	in := func(name string) string { return filepath.Join(private, name) }
	for name, text := range map[string]string{
		"setup.conf": "create_certs_tool = " + tool + "\n" +
			"create_certs_tool_config = " + in("localca.conf") + "\n" +
			"create_certs_tool_options = " + in("localca.options") + "\n" +
			"active_pcr_banks = sha256\n",
		"localca.conf": "statedir = " + private + "\n" +
			"signingkey = " + in("issuer-key.pem") + "\n" +
			"issuercert = " + in("issuer-cert.pem") + "\n" +
			"certserial = " + in("serial") + "\n",
		"localca.options": "--platform-manufacturer Edgekeep\n" +
			"--platform-version 1\n" +
			"--platform-model testbench\n",
	} {
		if err := writeFile(in(name), []byte(text)); err != nil {
			return "", err
		}
	}
	return in("setup.conf"), nil
}

// publish copies the certificates, and only them, to where the product's
// configuration may point.
func publish(caDir string) error {
	for from, to := range map[string]string{
		"swtpm-localca-rootca-cert.pem": "root.pem", // named by swtpm_localca
		"issuer-cert.pem":               "issuer.pem",
	} {
		cert, err := os.ReadFile(filepath.Join(caDir, "private", from))
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(caDir, to), cert); err != nil {
			return err
		}
	}
	return nil
}

// writeFile replaces a file at once: a reader sees the old or the new contents.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already when all went well
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

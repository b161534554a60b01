package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// The test binary run with this variable set is edgekeep-keep.
const childEnv = "EDGEKEEP_KEEP_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := run(context.Background(), []string{"--config", path}, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runAsChild(config string) (string, error) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+config)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

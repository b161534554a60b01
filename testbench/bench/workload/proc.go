package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// cpuTime is the CPU time that a process has used, in s.
func cpuTime(pid int) (float64, error) {
	f, err := stat(pid)
	if err != nil {
		return 0, err
	}
	user, err := strconv.ParseFloat(f[11], 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100, err // USER_HZ is 100 wherever Linux runs
}

// stat are the fields of /proc/PID/stat from the third on.
func stat(pid int) ([]string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	f := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	if len(f) < 13 {
		return nil, fmt.Errorf("/proc/%d/stat is short", pid)
	}
	return f, nil
}

// workerOf finds the process that a runner has its guest in.
func workerOf(runner int) (int, error) {
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil {
			continue
		}
		if f, err := stat(pid); err == nil && f[1] == strconv.Itoa(runner) {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("runner %d has no worker", runner)
}

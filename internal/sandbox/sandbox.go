// Package sandbox takes away from a process what it does not need: core dumps
// and being traced by its own user, files but the given ones, programs to start,
// and the network. What the kernel could not do is reported, never assumed: the
// report goes into the evidence.
//
// This narrows what a bug in the process can be used for. It is no protection
// from root.
package sandbox

import (
	"fmt"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Policy is what a process keeps.
type Policy struct {
	Read  []string // files and directories it may read
	Write []string // directories it may write in and make sockets in
	Files []string // devices and files it may write
	Alone bool     // it keeps the connections it has, and gets no other; it signals no other process
}

// forbidden are system calls that no process of ours makes after it has started.
var forbidden = []string{
	"execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd",
	"bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key",
	"mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "swapon", "swapoff",
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot",
	"open_by_handle_at", "name_to_handle_at", "acct", "quotactl", "settimeofday", "clock_settime", "adjtimex",
	"iopl", "ioperm", "io_uring_setup", "io_uring_enter", "io_uring_register",
}

// Apply applies the policy to the whole process and reports what holds, by name:
// "no-dump", "no-core", "landlock", "seccomp". An error means a mistake of ours
// or a kernel that refused what it claims to have; what it lacks is not an
// error.
func Apply(p Policy) (map[string]bool, error) {
	held := map[string]bool{}
	held["no-dump"] = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) == nil
	held["no-core"] = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) == nil
	rules := []landlock.Rule{landlock.RODirs("/sys/devices/system/cpu", "/sys/kernel/mm/transparent_hugepage").IgnoreIfMissing()}
	for _, f := range p.Read {
		rules = append(rules, landlock.RODirs(f).IgnoreIfMissing())
	}
	for _, f := range p.Write {
		rules = append(rules, landlock.RWDirs(f).IgnoreIfMissing())
	}
	for _, f := range p.Files {
		rules = append(rules, landlock.RWFiles(f).WithIoctlDev().IgnoreIfMissing())
	}
	if version, err := llsys.LandlockGetABIVersion(); err == nil && version >= 1 {
		if err := landlock.V5.BestEffort().RestrictPaths(rules...); err != nil {
			return held, fmt.Errorf("restricting files with Landlock: %w", err)
		}
		held["landlock"] = true
	}
	if !seccomp.Supported() {
		return held, nil
	}
	if err := nativeOnly(); err != nil {
		return held, fmt.Errorf("restricting system calls with seccomp: %w", err)
	}
	if err := seccomp.LoadFilter(filter(p.Alone)); err != nil {
		return held, fmt.Errorf("restricting system calls with seccomp: %w", err)
	}
	held["seccomp"] = true
	return held, nil
}

// alone are system calls that reach other processes.
var alone = []string{
	"socket", "socketpair", "connect", "bind", "listen", "accept", "accept4", "kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo",
	"pidfd_open", "pidfd_send_signal", "shmget", "shmat", "msgget", "semget", "mq_open", "prlimit64", "sched_setaffinity", "setpriority",
}

func filter(isAlone bool) seccomp.Filter {
	groups := []seccomp.SyscallGroup{
		{Action: seccomp.ActionErrno, Names: forbidden},
		{Action: seccomp.ActionErrno, NamesWithCondtions: []seccomp.NameWithConditions{{
			Name:       "socket", // any but Unix sockets
			Conditions: []seccomp.Condition{{Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_UNIX}},
		}}},
	}
	if isAlone {
		groups = []seccomp.SyscallGroup{
			{Action: seccomp.ActionErrno, Names: append(slices.Clone(forbidden), alone...)},
			{Action: seccomp.ActionErrno, NamesWithCondtions: []seccomp.NameWithConditions{{
				Name:       "tgkill", // any process but this one: Go signals its own threads
				Conditions: []seccomp.Condition{{Argument: 0, Operation: seccomp.NotEqual, Value: uint64(unix.Getpid())}},
			}}},
		}
	}
	return seccomp.Filter{
		NoNewPrivs: true, Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls:      groups,
		},
	}
}

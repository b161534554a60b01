// Package wasi is the host side of WASI snapshot preview 1 for one confidential
// guest: a private directory in memory, a clock, randomness, three streams, and no
// other reach. It opens no file and no socket of the host. Everything it remembers
// between two calls into the guest is plain data, so a guest that stands still can
// be written down with its open files and continued in another process on another
// architecture.
//
// # What the guest sees
//
//   - 0, 1, 2: standard input, output and error, as the host gives them for each
//     call ([System.SetStdio]). They are pipes: file type unknown, not seekable,
//     always ready.
//   - 3: the preopened directory "/", the [Dir] of the instance. Without a Dir
//     nothing is preopened.
//   - "/models", the next descriptor, when there are read-only files. Changes
//     there are EROFS. It is not an entry of "/": a libc finds it by its name.
//   - Arguments and environment: what the host gives, nothing else.
//
// All 46 functions are there. Rights are those of preview 1: an operation without
// its right is ENOTCAPABLE (reading and writing: EBADF, as in POSIX), rights only
// ever shrink, a new descriptor has at most what its directory lets it inherit,
// less what does not apply to its type. A path is resolved below its descriptor:
// an absolute path, one that climbs out with "..", and a symbolic link to either
// are ENOTCAPABLE; an absolute symbolic link cannot be made. At most 40 symbolic
// links are followed (ELOOP). Names are UTF-8 (EILSEQ) of at most 255 bytes, paths
// and link targets have at most 4096 (ENAMETOOLONG). Where preview 1 is silent,
// POSIX holds, and where that leaves a choice, mostly Linux.
//
// Chosen on purpose: reading does not change the access time, so that it does not
// change the snapshot; CPU-time clocks are ENOTSUP, because they tell about the host
// and cannot move; the monotonic clock starts at one second, counts only while an
// instance lives, and never goes back, whatever the host's clock does; fd_pwrite on
// a descriptor in append mode writes where it is told; file systems are always in
// sync; a signal (proc_raise) is ENOSYS, a socket call ENOTSOCK. A function needs
// the guest to export its memory as "memory", else pointers are EFAULT; so is a
// buffer with the last byte of 4 GiB.
//
// # Bounds
//
// [Limits] bounds what a guest can make the host hold. Besides, the names and the
// metadata of a Dir are bounded so that [Dir.Tree] fits into one CBOR item of
// 1 MiB: ENOSPC. A call takes at most 1024 buffers and 4096 subscriptions (EINVAL).
//
// # Bytes
//
// Two values in deterministic CBOR, and the pages of the files, make up a snapshot;
// what is not the one spelling of a consistent state is refused.
//
//	tree  = [ version: 1, next-inode: uint, [+ inode] ]    ; ascending inode numbers
//	inode = [ number: 1.., kind: 1 / 2 / 3,                ; directory, file, symbolic link
//	          atime: uint, mtime: uint, ctime: uint,       ; ns since 1970
//	          size: uint,                                  ; of a file, else 0
//	          target: tstr,                                ; of a symbolic link, else ""
//	          next-cookie: uint,                           ; of a directory, else 0
//	          [* name] ]                                   ; of a directory, else empty
//	name  = [ name: tstr, cookie: 3.., number: uint ]      ; ascending cookies
//
// Inode 1 is the root. A directory has one name and is below the root; a file or an
// empty directory without a name was removed while it was open. A cookie is the
// place of a name in fd_readdir, and no other name of that directory ever gets it.
//
//	state = [ version: 1, monotonic: uint,                 ; ns on the guest's clock
//	          models: bstr .size 32,                       ; SHA-256 of the read-only names and sizes
//	          [* fd] ]                                     ; ascending numbers
//	fd    = [ number: uint, kind: 0..4,                    ; stdin, stdout, stderr, in "/", in "/models"
//	          inode: uint, offset: uint, flags: uint,      ; fdflags
//	          base: uint, inheriting: uint, preopen: bool ]
//
// Streams and directories have offset 0, streams inode 0.
package wasi

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"edgekeep/internal/cose"
)

// Limits says how much a guest may make the host hold. Nothing is allowed by a zero.
type Limits struct {
	Bytes   int64 // contents of all files and symbolic links of a Dir, at most 64 GiB; ENOSPC
	Entries int   // names in a Dir, at most 16384; ENOSPC
	FDs     int   // open descriptors, at most 4096, the five from the start included; EMFILE
	Output  int64 // bytes to stdout and stderr per call; ENOSPC
}

const (
	maxBytes   = 1 << 36
	maxEntries = 16384
	maxFDs     = 4096
	maxStrings = 1 << 20 // bytes of arguments, and of environment
)

// Config is what the host gives a guest. Rand, Now, Monotonic and Sleep must be set.
type Config struct {
	Limits   Limits // FDs and Output; the others are those of the Dir
	Args     []string
	Env      []string          // "NAME=value"
	Dir      *Dir              // "/", or nil
	ReadOnly map[string][]byte // path below "/models" to content, which is not copied

	Stdin          io.Reader // nil: at its end
	Stdout, Stderr io.Writer // nil: discarded

	Rand      io.Reader
	Now       func() int64 // ns since 1970
	Monotonic func() int64 // ns since any moment
	// Sleep waits for d, at most a minute, or returns an error when ctx is done;
	// the guest then ends with a [sys.ExitError].
	Sleep func(ctx context.Context, d time.Duration) error
}

// System is the WASI state of one guest: its open descriptors and its clock. A
// System serves one guest at a time, and its methods are not called while the guest
// runs.
type System struct {
	cfg     Config
	models  *Dir // nil without read-only files
	listing [sha256.Size]byte
	fds     []*descriptor // by number, nil where none is open

	output  int64 // bytes written in this call
	flooded bool

	monoBase  uint64 // the guest's clock when the host's was at monoStart
	monoStart int64
	monoLast  uint64 // never answer less
}

// NewSystem returns the state of a guest that has not run yet: three streams and
// the preopened directories. Dir must not be in use by another System.
func NewSystem(cfg Config) (*System, error) {
	if cfg.Rand == nil || cfg.Now == nil || cfg.Monotonic == nil || cfg.Sleep == nil {
		return nil, errors.New("set up wasi: set Rand, Now, Monotonic and Sleep")
	}
	if err := errors.Join(checkStrings("argument", cfg.Args), checkStrings("environment variable", cfg.Env)); err != nil {
		return nil, fmt.Errorf("set up wasi: %w", err)
	}
	if cfg.Limits.FDs < 5 {
		return nil, fmt.Errorf("set up wasi: limit of %d descriptors, a guest starts with up to 5", cfg.Limits.FDs)
	}
	cfg.Limits.FDs = min(cfg.Limits.FDs, maxFDs)
	s := &System{cfg: cfg, monoBase: uint64(time.Second), monoStart: cfg.Monotonic()}
	if err := s.loadModels(); err != nil {
		return nil, fmt.Errorf("set up wasi: %w", err)
	}
	for _, kind := range []fdKind{kindStdin, kindStdout, kindStderr} {
		s.fds = append(s.fds, &descriptor{kind: kind, base: kind.streamRights()})
	}
	if cfg.Dir != nil {
		cfg.Dir.now = s.realtime
		s.preopen(kindPrivate, cfg.Dir)
	}
	if s.models != nil {
		s.preopen(kindModels, s.models)
	}
	return s, nil
}

func checkStrings(what string, list []string) error {
	total := 0
	for i, v := range list {
		if strings.ContainsRune(v, 0) {
			return fmt.Errorf("%s %d has a zero byte", what, i)
		}
		total += len(v) + 1
	}
	if total > maxStrings {
		return fmt.Errorf("%d bytes of %ss, at most %d are given", total, what, maxStrings)
	}
	return nil
}

func (s *System) preopen(kind fdKind, tree *Dir) {
	s.fds = append(s.fds, &descriptor{
		kind: kind, node: tree.root, base: dirRights, inheriting: allRights, preopen: true,
	})
	tree.root.open++
}

// loadModels builds the tree of read-only files, in the order of their names, so
// that the same files get the same inode numbers everywhere.
func (s *System) loadModels() error {
	type file struct {
		_    struct{} `cbor:",toarray"`
		Name string
		Size int
	}
	listing := []file{}
	if len(s.cfg.ReadOnly) > 0 {
		s.models = NewDir(Limits{Bytes: maxBytes, Entries: maxEntries})
	}
	for _, name := range slices.Sorted(maps.Keys(s.cfg.ReadOnly)) {
		content := s.cfg.ReadOnly[name]
		if err := s.models.addModel(name, content); err != 0 {
			return fmt.Errorf("read-only file %q: %w", name, err)
		}
		listing = append(listing, file{Name: name, Size: len(content)})
	}
	if s.models != nil {
		s.models.readOnly, s.models.device = true, 2
	}
	raw, err := cose.Marshal(listing)
	if err != nil {
		return fmt.Errorf("list the read-only files: %w", err)
	}
	s.listing = sha256.Sum256(raw)
	return nil
}

// SetStdio gives the streams for the next call into the guest, and starts its count
// of output anew.
func (s *System) SetStdio(stdin io.Reader, stdout, stderr io.Writer) {
	s.cfg.Stdin, s.cfg.Stdout, s.cfg.Stderr = stdin, stdout, stderr
	s.output, s.flooded = 0, false
}

// Flooded tells whether the guest has tried to write more than Limits.Output since
// the last SetStdio. Nothing of that write, or of any after it, went out.
func (s *System) Flooded() bool { return s.flooded }

// Close closes all descriptors, as the end of a process does: files without a name
// are gone from the Dir, which is free for another System.
func (s *System) Close() {
	for _, d := range s.fds {
		s.release(d)
	}
	s.fds = nil
	if s.cfg.Dir != nil {
		for _, n := range s.cfg.Dir.nodes { // restored, and never taken up
			s.cfg.Dir.reap(n)
		}
	}
}

// realtime is the time of day in ns since 1970.
func (s *System) realtime() uint64 { return uint64(max(0, s.cfg.Now())) }

// monotonic is the guest's own clock in ns.
func (s *System) monotonic() uint64 {
	passed := max(0, s.cfg.Monotonic()-s.monoStart)
	s.monoLast = max(s.monoLast, s.monoBase+uint64(passed))
	return s.monoLast
}

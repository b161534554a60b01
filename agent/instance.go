package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"edgekeep/internal/durable"
	"edgekeep/tee"
)

const (
	maxInstances  = 64
	maxReadBytes  = 700 << 10
	maxReadNumber = 4096
	maxEntry      = 900 << 10  // bytes: what is appended must be readable in one answer
	dropped       = ".dropped" // no instance's name ends so
)

// instances are the logs of workload instances. What is in them is sealed.
type instances struct {
	dir      string
	maxBytes int64 // of each log
	log      *slog.Logger

	mu   sync.Mutex // protects what follows
	logs map[string]*instance
}

// instance is one instance's log.
type instance struct {
	op  sync.Mutex   // one operation at a time; taken before mu of instances
	log *durable.Log // nil if it is not open; protected by mu of instances
}

// open opens the logs that are there. One that is damaged is no reason not to
// start: whoever wants it is told.
func (s *instances) open() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("making the directory of the instances: %w", err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("reading the directory of the instances: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasSuffix(name, dropped) { // a crash was faster than its end
			if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
				return fmt.Errorf("removing a dropped instance: %w", err)
			}
			continue
		}
		if err := s.do(name, func(*durable.Log) error { return nil }); err != nil {
			s.log.Error("the log of an instance cannot be used", "instance", name, "err", err)
		}
	}
	return nil
}

// append implements tee.JobAppend but for Trim, which trim does when the answer is
// on its way: it takes as long as an append. No entries are none to append.
func (s *instances) append(ctx context.Context, r tee.AppendLog) (end tee.LogEnd, err error) {
	if slices.ContainsFunc(r.Entries, func(e []byte) bool { return len(e) == 0 || len(e) > maxEntry }) {
		return end, fmt.Errorf("appending to the log of instance %.32q: an entry has 1 to %d bytes", r.Instance, maxEntry)
	}
	err = s.do(r.Instance, func(log *durable.Log) error {
		if len(r.Entries) == 0 {
			end.Next = log.Next()
			return nil
		}
		last, err := log.Append(ctx, r.Entries...)
		if errors.Is(err, durable.ErrFull) {
			return fmt.Errorf("the disk quota of instance %s is full: %d of %d bytes are used: raise instances.bytes in agent.toml, or have it keep less state: %w",
				r.Instance, log.Bytes(), s.maxBytes, durable.ErrFull)
		}
		end.Next = last + 1
		return err
	})
	return end, err
}

// trim forgets entries before an index. What was appended is durable whatever comes
// of it: the next trim may do better.
func (s *instances) trim(name string, before uint64) {
	err := s.do(name, func(log *durable.Log) error {
		if upTo := min(before, log.Next()); upTo > 1 {
			return log.Trim(upTo - 1)
		}
		return nil
	})
	if err != nil {
		s.log.Warn("trimming the log of an instance", "instance", name, "err", err)
	}
}

// read implements tee.JobRead. A log that nothing was appended to is empty, and
// is not made.
func (s *instances) read(r tee.ReadLog) (out tee.LogEntries, err error) {
	if !validInstance(r.Instance) {
		return out, errName(r.Instance)
	}
	if _, err := os.Stat(filepath.Join(s.dir, r.Instance)); errors.Is(err, os.ErrNotExist) {
		return tee.LogEntries{First: 1, Next: 1}, nil
	}
	err = s.do(r.Instance, func(log *durable.Log) error {
		entries, err := log.Read(r.From, maxReadNumber, maxReadBytes)
		if err != nil {
			return err
		}
		out.Next = log.Next()
		out.First = out.Next
		for i, e := range entries {
			if i == 0 {
				out.First = e.Index
			}
			out.Entries = append(out.Entries, e.Data)
		}
		return nil
	})
	return out, err
}

// drop implements tee.JobDrop. The log is gone at once and for good, whatever
// becomes of its files: indices begin anew.
//
//	renameat(NAME, NAME.dropped); fsync(dir)
//	unlinkat(…)
func (s *instances) drop(name string) error {
	if !validInstance(name) {
		return errName(name)
	}
	in := s.get(name)
	in.op.Lock()
	defer in.op.Unlock()
	s.close(in)
	from, to := filepath.Join(s.dir, name), filepath.Join(s.dir, name+dropped)
	if err := os.RemoveAll(to); err != nil {
		return fmt.Errorf("dropping instance %s: %w", name, err)
	}
	if err := os.Rename(from, to); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("dropping instance %s: %w", name, err)
	}
	if err := syncPath(s.dir); err != nil {
		return fmt.Errorf("dropping instance %s: %w", name, err)
	}
	if err := os.RemoveAll(to); err != nil { // done at the next start
		s.log.Warn("removing a dropped instance", "instance", name, "err", err)
	}
	return nil
}

// do does something with a log, alone. After a failure of the disk the log is
// opened anew next time, which finds out what is really there.
func (s *instances) do(name string, f func(*durable.Log) error) error {
	if !validInstance(name) {
		return errName(name)
	}
	in := s.get(name)
	in.op.Lock()
	defer in.op.Unlock()
	s.mu.Lock()
	log := in.log
	s.mu.Unlock()
	if log == nil {
		var err error
		if log, err = durable.Open(filepath.Join(s.dir, name), durable.Options{MaxBytes: s.maxBytes, SegmentBytes: min(8<<20, s.maxBytes/4)}); err == nil {
			err = s.opened(in, log)
		}
		if err != nil {
			return fmt.Errorf("the log of instance %s: %w", name, err)
		}
		if n := log.Recovered(); n > 0 { // unless the disk decayed, nobody was promised it
			s.log.Warn("the end of an instance's log was torn and cut off", "instance", name, "bytes", n)
		}
	}
	err := f(log)
	if err == nil || errors.Is(err, durable.ErrFull) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	s.close(in)
	return fmt.Errorf("the log of instance %s: %w", name, err)
}

func (s *instances) get(name string) *instance {
	s.mu.Lock()
	defer s.mu.Unlock()
	in, ok := s.logs[name]
	if !ok {
		in = &instance{}
		s.logs[name] = in
	}
	return in
}

// opened notes that a log was opened, if there may be another one.
func (s *instances) opened(in *instance, log *durable.Log) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, o := range s.logs {
		if o.log != nil {
			n++
		}
	}
	if n >= maxInstances {
		return errors.Join(fmt.Errorf("there are %d instances already", n), log.Close())
	}
	in.log = log
	return nil
}

// close closes a log. The caller holds in.op.
func (s *instances) close(in *instance) {
	s.mu.Lock()
	log := in.log
	in.log = nil
	s.mu.Unlock()
	if log == nil {
		return
	}
	if err := log.Close(); err != nil {
		s.log.Error("closing the log of an instance", "err", err)
	}
}

// closeAll closes all logs and forgets them.
func (s *instances) closeAll() {
	s.mu.Lock()
	logs := s.logs
	s.logs = map[string]*instance{}
	s.mu.Unlock()
	for _, in := range logs {
		in.op.Lock()
		s.close(in)
		in.op.Unlock()
	}
}

// setAside moves the logs of all instances, if there are any, to a directory beside
// their own.
func (s *instances) setAside(suffix string) error {
	s.closeAll()
	entries, err := os.ReadDir(s.dir)
	if err != nil || len(entries) == 0 {
		return err
	}
	if err := os.Rename(s.dir, s.dir+suffix); err != nil {
		return fmt.Errorf("setting the logs of instances aside: %w", err)
	}
	s.log.Warn("the logs of the old identity's instances were set aside", "dir", s.dir+suffix)
	return s.open()
}

func (s *instances) status() []InstanceLog {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []InstanceLog{}
	for name, in := range s.logs {
		if in.log != nil {
			out = append(out, InstanceLog{Instance: name, Bytes: in.log.Bytes(), Entries: in.log.Next() - in.log.First()})
		}
	}
	slices.SortFunc(out, func(a, b InstanceLog) int { return strings.Compare(a.Instance, b.Instance) })
	return out
}

// validInstance reports whether a name is one of an instance, and so of a file.
func validInstance(name string) bool {
	return len(name) >= 1 && len(name) <= 26 && !strings.ContainsFunc(name, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-'
	})
}

func errName(name string) error { return fmt.Errorf("%.64q is no name of an instance", name) }

// syncPath makes a file, or what was created, renamed and deleted in a directory,
// durable.
//
//	openat(path); fsync; close
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

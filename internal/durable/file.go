package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// WriteFile replaces the file at path, or creates it, so that after a crash
// there is either the old content or the new, and after WriteFile has returned
// nil the new. The mode of the file becomes perm, whatever the umask. A
// symbolic link at path is replaced, not followed. Concurrent calls for one
// path leave one of the contents.
//
//	openat(.base.*.tmp, O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0600)
//	write; fchmod(perm); fsync; close
//	renameat(.base.*.tmp, base)
//	openat(dir); fsync(dir); close
//
// Not solved: a crash before the rename leaves the temporary file behind; and
// after an error in the last line it is unknown which content survives a
// crash, and trying again does not make it known.
func WriteFile(path string, data []byte, perm os.FileMode) error {
	if _, err := replaceFile(path, data, perm); err != nil {
		return fmt.Errorf("durable: replace %s: %w", path, err)
	}
	return nil
}

// replaceFile is WriteFile. Renamed tells whether a failure came so late that
// the new content may already be there.
func replaceFile(path string, data []byte, perm os.FileMode) (renamed bool, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return false, err
	}
	if err := errors.Join(fillFile(f, data, perm), f.Close()); err != nil {
		return false, errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return false, errors.Join(err, os.Remove(f.Name()))
	}
	return true, syncDir(filepath.Dir(path))
}

func fillFile(f *os.File, data []byte, perm os.FileMode) error {
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	return f.Sync()
}

// syncDir makes the creations, renames and deletions in dir durable.
//
//	openat(dir, O_RDONLY|O_CLOEXEC); fsync; close
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// fdatasync makes the data of f, and as much of its metadata as reading needs
// (its length), durable. EINTR says that nothing was tried, not that anything
// failed, so it is the one error after which it calls again.
func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
		}
	}
}

// makeDir creates dir, but not its parents.
//
//	mkdirat(dir, 0700); fsync(parent)
//
// Not solved: after a crash between the two, the next Open finds dir and does
// not sync the parent, which it may not even be allowed to read.
func makeDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err == nil {
		return syncDir(filepath.Dir(filepath.Clean(dir)))
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// lockFile takes the lock that makes one process the owner of the directory of
// path. It is given back when the file is closed, also by the end of the
// process, and is not inherited by programs that this one starts.
//
//	openat(path, O_RDWR|O_CREAT|O_CLOEXEC, 0600); flock(LOCK_EX|LOCK_NB)
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errors.New("the log is already open, here or in another process: close that one first")
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

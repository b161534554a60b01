package wasi

import "fmt"

// Replace puts a directory and an earlier State in the place of those that s has:
// how a guest that was instantiated already goes on from a snapshot.
func (s *System) Replace(dir *Dir, state []byte) error {
	for _, d := range s.fds {
		s.release(d)
	}
	s.fds = nil
	s.cfg.Dir = dir
	dir.now = s.realtime
	if err := s.RestoreState(state); err != nil {
		return fmt.Errorf("going on from a snapshot: %w", err)
	}
	return nil
}

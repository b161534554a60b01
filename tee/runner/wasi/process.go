package wasi

import (
	"context"
	"errors"
	"io"
	"runtime"

	"github.com/tetratelabs/wazero/sys"
)

func (s *System) argsGet(c *call) errno         { return c.putStrings(s.cfg.Args) }
func (s *System) argsSizesGet(c *call) errno    { return c.putSizes(s.cfg.Args) }
func (s *System) environGet(c *call) errno      { return c.putStrings(s.cfg.Env) }
func (s *System) environSizesGet(c *call) errno { return c.putSizes(s.cfg.Env) }

func stringSize(list []string) (total uint64) {
	for _, v := range list {
		total += uint64(len(v)) + 1
	}
	return total
}

// putStrings writes the pointers to args[0] and the strings they point to, each
// ended by a zero, to args[1].
func (c *call) putStrings(list []string) errno {
	pointers, err := c.view(c.u32(0), uint64(len(list))*4)
	if err != 0 {
		return err
	}
	at := c.u32(1)
	text, err := c.view(at, stringSize(list))
	if err != 0 {
		return err
	}
	for i, v := range list {
		le.PutUint32(pointers[4*i:], at)
		n := copy(text, v)
		text[n] = 0
		text, at = text[n+1:], at+uint32(n)+1
	}
	return success
}

func (c *call) putSizes(list []string) errno {
	count, err := c.view(c.u32(0), 4)
	if err != 0 {
		return err
	}
	size, err := c.view(c.u32(1), 4)
	if err != 0 {
		return err
	}
	le.PutUint32(count, uint32(len(list)))
	return putU32(size, int(stringSize(list)))
}

// clock reads a clock in ns.
func (s *System) clock(id uint32) (uint64, errno) {
	switch id {
	case 0:
		return s.realtime(), success
	case 1:
		return s.monotonic(), success
	case 2, 3: // CPU time of the process, of the thread
		return 0, eNOTSUP
	}
	return 0, eINVAL
}

func (s *System) clockResGet(c *call) errno {
	if _, err := s.clock(c.u32(0)); err != 0 {
		return err
	}
	out, err := c.view(c.u32(1), 8)
	if err != 0 {
		return err
	}
	return putU64(out, 1)
}

func (s *System) clockTimeGet(c *call) errno {
	now, err := s.clock(c.u32(0))
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(2), 8)
	if err != 0 {
		return err
	}
	return putU64(out, now)
}

func (s *System) randomGet(c *call) errno {
	b, err := c.bytes(0)
	if err != 0 {
		return err
	}
	if _, err := io.ReadFull(s.cfg.Rand, b); err != nil {
		return eIO
	}
	return success
}

// exit ends the guest: it does not return.
func (c *call) exit(code uint32) {
	_ = c.module.CloseWithExitCode(c.ctx, code) // of a module in memory: nothing can fail
	panic(sys.NewExitError(code))
}

// interrupted ends the guest because the host's wait ended with err.
func (c *call) interrupted(err error) {
	code := sys.ExitCodeContextCanceled
	if cause := c.ctx.Err(); cause != nil {
		err = cause
	}
	if errors.Is(err, context.DeadlineExceeded) {
		code = sys.ExitCodeDeadlineExceeded
	}
	c.exit(code)
}

func (s *System) procRaise(*call) errno { return eNOSYS }

func (s *System) schedYield(*call) errno {
	runtime.Gosched()
	return success
}

// notSocket answers all calls on sockets: there are none.
func (s *System) notSocket(c *call) errno {
	if _, err := s.descriptor(c.u32(0)); err != 0 {
		return err
	}
	return eNOTSOCK
}

package wasi

import (
	"math"
	"time"
)

const (
	maxSubscriptions = 4096
	subscriptionSize = 48
	eventSize        = 32
	maxSleep         = uint64(time.Minute) // in one piece; ctx is looked at in between

	eventClock = 0
	eventRead  = 1
	eventWrite = 2
)

// subscription is one of poll_oneoff, and what has become of it.
type subscription struct {
	userdata uint64
	tag      byte
	due      bool
	wait     uint64 // ns, for a clock
	err      errno
	nbytes   uint64
}

func (s *System) pollOneoff(c *call) errno {
	n := c.u32(2)
	if n == 0 || n > maxSubscriptions {
		return eINVAL
	}
	in, err := c.view(c.u32(0), uint64(n)*subscriptionSize)
	if err != 0 {
		return err
	}
	out, err := c.view(c.u32(1), uint64(n)*eventSize)
	if err != 0 {
		return err
	}
	count, err := c.view(c.u32(3), 4)
	if err != 0 {
		return err
	}
	list := make([]subscription, n)
	for i := range list {
		if list[i], err = s.subscribe(in[i*subscriptionSize:]); err != 0 {
			return err
		}
	}
	s.wait(c, list)
	events := 0
	for i := range list {
		if list[i].due {
			list[i].put(out[events*eventSize:][:eventSize])
			events++
		}
	}
	return putU32(count, events)
}

// subscribe reads a subscription. Only a clock is not due at once.
func (s *System) subscribe(b []byte) (subscription, errno) {
	sub := subscription{userdata: le.Uint64(b), tag: b[8], due: true}
	switch sub.tag {
	case eventClock:
		sub.wait, sub.err = s.remaining(le.Uint32(b[16:]), le.Uint64(b[24:]), le.Uint16(b[40:]))
		sub.due = sub.wait == 0
	case eventRead:
		sub.nbytes, sub.err = s.ready(le.Uint32(b[16:]), rightFDRead)
	case eventWrite:
		sub.nbytes, sub.err = s.ready(le.Uint32(b[16:]), rightFDWrite)
	default:
		return sub, eINVAL
	}
	return sub, success
}

// remaining is how long a clock has to run.
func (s *System) remaining(clock uint32, timeout uint64, flags uint16) (uint64, errno) {
	now, err := s.clock(clock)
	switch {
	case err != 0:
		return 0, err
	case flags > 1:
		return 0, eINVAL
	case flags == 0:
		return timeout, success
	case timeout > now: // absolute
		return timeout - now, success
	}
	return 0, success
}

// ready tells how many bytes can be moved at once: files and streams never make a
// poll wait, a read of standard input may wait itself.
func (s *System) ready(fd uint32, right rights) (uint64, errno) {
	d, err := s.descriptor(fd)
	switch {
	case err != 0:
		return 0, err
	case d.isDir() || d.base&right == 0:
		return 0, eBADF
	case d.base&rightPoll == 0:
		return 0, eNOTCAPABLE
	case d.node == nil:
		return 1, success
	case right == rightFDWrite:
		return PageSize, success
	}
	return uint64(max(0, d.node.size-d.offset)), success
}

// wait sleeps until the first clock is due, unless something is already.
func (s *System) wait(c *call, list []subscription) {
	least := uint64(math.MaxUint64)
	for i := range list {
		if list[i].due {
			return
		}
		least = min(least, list[i].wait)
	}
	for left := least; left > 0; {
		d := min(left, maxSleep)
		if err := s.cfg.Sleep(c.ctx, time.Duration(d)); err != nil {
			c.interrupted(err)
		}
		left -= d
	}
	for i := range list {
		list[i].due = list[i].wait == least
	}
}

func (sub *subscription) put(b []byte) {
	clear(b)
	le.PutUint64(b, sub.userdata)
	le.PutUint16(b[8:], uint16(sub.err))
	b[10] = sub.tag
	le.PutUint64(b[16:], sub.nbytes)
}

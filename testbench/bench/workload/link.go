package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// What a link carries in each direction, and how long a byte takes.
const (
	linkBytes = 10_000_000 / 8 // a second
	linkDelay = 50 * time.Millisecond
)

// relay is a link between a gateway and its broker: a TCP relay that passes on
// linkBytes a second in each direction, each of them linkDelay after it came. It
// stands in for `tc netem`, which needs a kernel module that many machines lack;
// unlike it, it loses nothing and its queue holds a MiB.
type relay struct {
	l      net.Listener
	broker string
	wg     sync.WaitGroup
}

func newRelay(broker string) (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{l: l, broker: broker}
	r.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.pass(conn) })
		}
	})
	return r, nil
}

func (r *relay) pass(a net.Conn) {
	defer a.Close()
	b, err := net.Dial("tcp", r.broker)
	if err != nil {
		return
	}
	defer b.Close()
	var wg sync.WaitGroup
	for _, d := range []struct{ from, to net.Conn }{{a, b}, {b, a}} {
		wg.Go(func() {
			carryOver(d.to, d.from)
			a.Close()
			b.Close()
		})
	}
	wg.Wait()
}

type chunk struct {
	data []byte
	due  time.Time
}

// carryOver is one direction. What was read waits for its turn on the link, and
// then for the delay.
func carryOver(to io.Writer, from io.Reader) {
	const size = 4 << 10
	queue := make(chan chunk, 1<<20/size)
	var wg sync.WaitGroup
	wg.Go(func() {
		for c := range queue {
			time.Sleep(time.Until(c.due))
			if _, err := to.Write(c.data); err != nil {
				break
			}
		}
		for range queue { // until the other side has noticed
		}
	})
	free := time.Now()
	for {
		b := make([]byte, size)
		n, err := from.Read(b)
		if err != nil {
			break
		}
		if now := time.Now(); free.Before(now) {
			free = now
		}
		free = free.Add(time.Duration(n) * time.Second / linkBytes)
		queue <- chunk{b[:n], free.Add(linkDelay)}
	}
	close(queue)
	wg.Wait()
}

func (r *relay) close() {
	r.l.Close()
}

// link measures moves between gateways behind such links, on a rig of their own.
func (b *bench) link(ctx context.Context) error {
	if b.short {
		return nil
	}
	if err := b.down(); err != nil {
		return err
	}
	var relays []*relay
	defer func() {
		for _, r := range relays {
			r.close()
		}
	}()
	if err := b.up(ctx, func(broker string) (string, error) {
		scheme, host, _ := strings.Cut(broker, "://")
		r, err := newRelay(host)
		if err != nil {
			return "", err
		}
		relays = append(relays, r)
		return scheme + "://" + r.l.Addr().String(), nil
	}); err != nil {
		return err
	}
	m, err := b.movesOf(ctx, 4, 3)
	if err != nil {
		return err
	}
	m.tell(4)
	bare := 1000 * (median(m.final)/linkBytes + 2*linkDelay.Seconds()) // source to cloud to target
	b.Link["move_ms"], b.Link["move_vs_bare"] = ms(median(m.down)), round(ms(median(m.down))/bare)
	fmt.Printf("  the final delta alone takes %.0f ms over two such links\n", bare)
	return nil
}

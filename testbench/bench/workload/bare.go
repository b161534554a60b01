package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"golang.org/x/sync/errgroup"
)

// bare is a reactor in wazero, and nothing else.
type bare struct {
	runtime wazero.Runtime
	mod     api.Module
	out     []byte // of the newest batch
}

// newBare compiles and instantiates a module. models is the directory that it sees
// as /models, if any.
func newBare(ctx context.Context, module []byte, models string, args ...string) (*bare, error) {
	b := &bare{runtime: wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigCompiler())}
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, b.runtime); err != nil {
		return nil, err
	}
	cfg := wazero.NewModuleConfig().WithArgs(args...).WithRandSource(rand.Reader).WithSysWalltime().WithSysNanotime().WithStartFunctions("_initialize")
	if models != "" {
		cfg = cfg.WithFSConfig(wazero.NewFSConfig().WithReadOnlyDirMount(models, "/models"))
	}
	compiled, err := b.runtime.CompileModule(ctx, module)
	if err != nil {
		return nil, err
	}
	b.mod, err = b.runtime.InstantiateModule(ctx, compiled, cfg)
	return b, err
}

func (b *bare) close() { _ = b.runtime.Close(context.Background()) }

// batch runs a batch, and takes its results out of memory.
func (b *bare) batch(ctx context.Context, in []byte) error {
	p, err := b.mod.ExportedFunction("edgekeep_alloc").Call(ctx, uint64(len(in)))
	if err != nil {
		return err
	}
	if !b.mod.Memory().Write(uint32(p[0]), in) {
		return errors.New("no room for the batch")
	}
	r, err := b.mod.ExportedFunction("edgekeep_batch").Call(ctx, p[0], uint64(len(in)))
	if err != nil {
		return err
	}
	out, ok := b.mod.Memory().Read(uint32(r[0]>>32), uint32(r[0]))
	if !ok || int64(r[0]) == -1 {
		return fmt.Errorf("a batch failed: %#x", r[0])
	}
	b.out = append(b.out[:0], out...)
	return nil
}

const piece = 64 << 10

// carry encrypts n bytes in pieces, sends them over loopback TCP, decrypts them
// there, and waits until the other side says that it has all: the median of nine
// times.
func carry(n int) (time.Duration, error) {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		return 0, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return 0, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	var g errgroup.Group
	const rounds = 9
	g.Go(func() error { return take(l, aead, n, rounds) })
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	plain := make([]byte, n)
	rand.Read(plain) // never fails
	var times []time.Duration
	nonce, buf, done := make([]byte, 12), make([]byte, 0, piece+16), make([]byte, 1)
	for range rounds {
		began := time.Now()
		for at := 0; at < n; at += piece {
			buf = aead.Seal(buf[:0], nonce, plain[at:min(at+piece, n)], nil)
			if _, err := conn.Write(buf); err != nil {
				return 0, err
			}
		}
		if _, err := io.ReadFull(conn, done); err != nil {
			return 0, err
		}
		times = append(times, time.Since(began))
	}
	return median(times), g.Wait()
}

func take(l net.Listener, aead cipher.AEAD, n, rounds int) error {
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	nonce, buf := make([]byte, 12), make([]byte, piece+16)
	for range rounds {
		for at := 0; at < n; at += piece {
			sealed := buf[:min(piece, n-at)+16]
			if _, err := io.ReadFull(conn, sealed); err != nil {
				return err
			}
			if _, err := aead.Open(sealed[:0], nonce, sealed, nil); err != nil {
				return err
			}
		}
		if _, err := conn.Write([]byte{1}); err != nil {
			return err
		}
	}
	return nil
}

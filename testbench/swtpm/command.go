package swtpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2"
)

const (
	commandTimeout = 5 * time.Second       // a whole visit: connect, act, close
	pollInterval   = 10 * time.Millisecond // between two looks for the socket

	responseHeader = 10   // tag(2) size(4) code(4), TPM 2.0 Part 1 clause 18
	maxResponse    = 4096 // bytes; the buffer of libtpms
	rcRetry        = 0x922
)

// Extend plays the firmware: it extends the PCR (0..23) of the SHA-256 bank with
// the digest (TPM2_PCR_Extend, TPM 2.0 Part 3 clause 22.2). It opens a
// connection, acts, and closes; when another client holds the TPM's only
// connection for five seconds the error wraps os.ErrDeadlineExceeded.
func (t *TPM) Extend(pcr int, digest [32]byte) error {
	if pcr < 0 || pcr > 23 {
		return fmt.Errorf("extend pcr %d: a tpm has pcrs 0 to 23", pcr)
	}
	err := t.visit(context.Background(), func(c *conn) error {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
				{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]},
			}},
		}.Execute(c)
		return err
	})
	if err != nil {
		return fmt.Errorf("extend pcr %d of the software tpm: %w", pcr, err)
	}
	return nil
}

// shutdown announces the loss of power.
func (t *TPM) shutdown() error {
	err := t.visit(context.Background(), func(c *conn) error {
		_, err := tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(c)
		return err
	})
	if err != nil {
		return fmt.Errorf("send TPM2_Shutdown to the software tpm, which now stops without: %w", err)
	}
	return nil
}

// waitReady returns when the TPM answers a command.
func (t *TPM) waitReady(ctx context.Context) error {
	for {
		err := t.visit(ctx, func(c *conn) error {
			_, err := tpm2.GetCapability{
				Capability:    tpm2.TPMCapTPMProperties,
				Property:      uint32(tpm2.TPMPTManufacturer),
				PropertyCount: 1,
			}.Execute(c)
			return err
		})
		if err == nil {
			return nil
		}
		select {
		case <-t.process.Done():
			return fmt.Errorf("start a software tpm: swtpm ended (%v): %s", t.process.Err(), t.process.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("wait for the software tpm: %w; last answer: %w", context.Cause(ctx), err)
		case <-time.After(pollInterval):
		}
	}
}

// visit opens a connection, hands it to act, and closes it, all within
// t.timeout and the life of the context.
func (t *TPM) visit(ctx context.Context, act func(*conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	stream, err := new(net.Dialer).DialContext(ctx, "unix", t.socket)
	if err != nil {
		return err
	}
	defer stream.Close()
	stop := context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err = act(&conn{stream})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("no answer in time; swtpm serves one client at a time, close the other connection first: %w", err)
	}
	return err
}

// conn is go-tpm's transport over a stream with a deadline.
type conn struct{ stream io.ReadWriter }

// Send sends one command and returns its response. A TPM that answers
// TPM_RC_RETRY, as swtpm does while it tests itself, is asked again.
func (c *conn) Send(command []byte) ([]byte, error) {
	for {
		if _, err := c.stream.Write(command); err != nil {
			return nil, err
		}
		response, err := readResponse(c.stream)
		if err != nil {
			return nil, err
		}
		if binary.BigEndian.Uint32(response[6:]) != rcRetry {
			return response, nil
		}
	}
}

// readResponse reads one response of a TPM: a header of 10 bytes, whose bytes 2
// to 5 are the size of the whole, and the rest.
func readResponse(r io.Reader) ([]byte, error) {
	var header [responseHeader]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, fmt.Errorf("read the header of a tpm response: %w", err)
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < responseHeader || size > maxResponse {
		return nil, fmt.Errorf("read a tpm response: its size is %d, want %d to %d", size, responseHeader, maxResponse)
	}
	response := append(make([]byte, 0, size), header[:]...)[:size]
	if _, err := io.ReadFull(r, response[responseHeader:]); err != nil {
		return nil, fmt.Errorf("read the body of a tpm response: %w", err)
	}
	return response, nil
}

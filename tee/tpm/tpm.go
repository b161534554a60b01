// Package tpm drives a TPM 2.0 for the keep, and checks what one signed.
//
// The TPM is the root of trust for reporting and storage. It holds, for one
// gateway:
//
//   - the EK (TCG EK Credential Profile, RSA-2048 template L-1 or ECC P-256
//     template L-2), with the manufacturer's certificate in NV;
//   - the AK: restricted ECDSA P-256, child of the EK and so in the endorsement
//     hierarchy (quotes of owner-hierarchy keys carry an obfuscated resetCount,
//     TPM 2.0 Part 1 §36.7);
//   - the keep's keys: ECDSA and ECDH P-256, children of the SRK, usable only
//     while chosen PCRs have the values they had at creation and only with an
//     auth value: policy = PolicyPCR ∧ PolicyAuthValue;
//   - three NV indices under the same kind of policy: a counter and two slots.
//
// Only fixed-size secrets cross the boundary, and each command that carries one
// runs in a session salted to the SRK with AES-128-CFB parameter encryption.
//
// A Device is not safe for concurrent use by itself where commands depend on
// each other; every exported method takes the device's lock, so calls from
// several goroutines are serialised.
package tpm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// ErrPolicy means that the TPM refused to use an object because the machine is
// not in the state the object is bound to: some PCR has another value.
var ErrPolicy = errors.New("the TPM refused: PCRs differ from those the object is bound to")

// srkHandle is the persistent handle that TCG TPM v2.0 Provisioning Guidance
// §7.5.1 reserves for the storage root key.
const srkHandle = tpm2.TPMHandle(0x81000001)

const maxPCR = 23

// Device is an open TPM.
type Device struct {
	mu   sync.Mutex // protects the command sequence and the fields below
	tpm  transport.TPMCloser
	srk  tpm2.NamedHandle
	pub  tpm2.TPMTPublic // of the SRK: sessions are salted to it
	path string
}

// Open opens the TPM at path: a character device (/dev/tpmrm0) or the Unix
// socket of a software TPM. It removes transient objects and sessions that a
// killed predecessor left (on a resource-managed device there are none to see)
// and makes sure that a storage root key is there.
func Open(path string) (*Device, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("no TPM: looked for %s: %w; on a machine without one, "+
			"install a software TPM (Debian: apt-get install swtpm swtpm-tools) and give its socket", path, err)
	}
	var t transport.TPMCloser
	if fi.Mode()&os.ModeSocket != 0 {
		t, err = linuxudstpm.Open(path)
	} else {
		t, err = linuxtpm.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("opening TPM %s: %w", path, err)
	}
	d := &Device{tpm: retrying{t}, path: path}
	if err := d.flushLeftovers(); err != nil {
		t.Close()
		return nil, fmt.Errorf("TPM %s: flushing what a predecessor left: %w", path, err)
	}
	if err := d.openSRK(); err != nil {
		t.Close()
		return nil, fmt.Errorf("TPM %s: storage root key: %w", path, err)
	}
	return d, nil
}

// Close closes the connection. Keys loaded by the caller must be closed before.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.tpm.Close()
}

// retrying repeats a command that the TPM asked to repeat: TPM_RC_RETRY comes
// from a TPM that runs a self-test first, TPM_RC_YIELDED and TPM_RC_TESTING from
// busy ones (TPM 2.0 Part 2 §6.6.3). The number of tries is bounded.
type retrying struct{ transport.TPMCloser }

func (r retrying) Send(cmd []byte) ([]byte, error) {
	var rsp []byte
	var err error
	for range 50 {
		rsp, err = r.TPMCloser.Send(cmd)
		if err != nil || len(rsp) < 10 {
			return rsp, err
		}
		switch rc := tpm2.TPMRC(uint32(rsp[6])<<24 | uint32(rsp[7])<<16 | uint32(rsp[8])<<8 | uint32(rsp[9])); rc {
		case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting:
		default:
			return rsp, nil
		}
	}
	return rsp, err
}

func (d *Device) flushLeftovers() error {
	for _, class := range []tpm2.TPMHandle{0x80000000, 0x02000000, 0x03000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(class), PropertyCount: 64}.Execute(d.tpm)
		if err != nil {
			return err
		}
		handles, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return err
		}
		for _, h := range handles.Handle {
			if class == 0x02000000 && h>>24 == 0x03 {
				h = 0x03000000 | h&0xffffff
			}
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(d.tpm); err != nil && class == 0x80000000 {
				return err
			}
		}
	}
	return nil
}

// openSRK uses the persistent SRK, or makes it persistent first: a primary key
// that must be derived at each start costs seconds on some TPMs.
func (d *Device) openSRK() error {
	if rsp, err := (tpm2.ReadPublic{ObjectHandle: srkHandle}).Execute(d.tpm); err == nil {
		pub, err := rsp.OutPublic.Contents()
		if err != nil {
			return err
		}
		if !isStorageParent(pub) {
			return fmt.Errorf("handle %#x holds something else than a storage key; free it (tpm2_evictcontrol -C o -c %#x)", srkHandle, srkHandle)
		}
		d.srk, d.pub = tpm2.NamedHandle{Handle: srkHandle, Name: rsp.Name}, *pub
		return nil
	}
	p, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(d.tpm)
	if err != nil {
		return err
	}
	defer d.flush(p.ObjectHandle)
	pub, err := p.OutPublic.Contents()
	if err != nil {
		return err
	}
	if _, err := (tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     tpm2.NamedHandle{Handle: p.ObjectHandle, Name: p.Name},
		PersistentHandle: srkHandle,
	}).Execute(d.tpm); err != nil {
		return err
	}
	d.srk, d.pub = tpm2.NamedHandle{Handle: srkHandle, Name: p.Name}, *pub
	return nil
}

func isStorageParent(pub *tpm2.TPMTPublic) bool {
	a := pub.ObjectAttributes
	return a.Restricted && a.Decrypt && !a.SignEncrypt && a.FixedTPM && a.FixedParent &&
		(pub.Type == tpm2.TPMAlgECC || pub.Type == tpm2.TPMAlgRSA)
}

func (d *Device) flush(h tpm2.TPMHandle) {
	// A handle that cannot be flushed shows at the next command that needs room.
	_, _ = tpm2.FlushContext{FlushHandle: h}.Execute(d.tpm)
}

// cover says which first parameter a session encrypts: the command's, the
// response's, or both. A TPM refuses a session that would encrypt what is not
// there or not of variable size (TPM 2.0 Part 1 §19.2).
type cover int

const (
	coverNone cover = iota
	coverCommand
	coverResponse
	coverBoth
)

// session is a one-command HMAC session, salted to the SRK, that proves
// knowledge of auth.
func (d *Device) session(auth []byte, c cover) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, d.options(auth, c)...)
}

func (d *Device) options(auth []byte, c cover) []tpm2.AuthOption {
	opts := []tpm2.AuthOption{tpm2.Auth(auth), tpm2.Salted(d.srk.Handle, d.pub)}
	switch c {
	case coverCommand:
		opts = append(opts, tpm2.AESEncryption(128, tpm2.EncryptIn))
	case coverResponse:
		opts = append(opts, tpm2.AESEncryption(128, tpm2.EncryptOut))
	case coverBoth:
		opts = append(opts, tpm2.AESEncryption(128, tpm2.EncryptInOut))
	}
	return opts
}

// policySession satisfies PolicyPCR(pcrs) and, when auth is not nil,
// PolicyAuthValue.
func (d *Device) policySession(pcrs []int, auth []byte, c cover) tpm2.Session {
	return tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, h tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		err := policyCommands(t, h, pcrs, auth != nil)
		if err != nil { // go-tpm leaks the session of a failed callback; a TPM has three
			d.flush(h)
		}
		return err
	}, d.options(auth, c)...)
}

func policyCommands(t transport.TPM, h tpm2.TPMISHPolicy, pcrs []int, auth bool) error {
	if len(pcrs) > 0 {
		if _, err := (tpm2.PolicyPCR{PolicySession: h, Pcrs: selection(pcrs)}).Execute(t); err != nil {
			return err
		}
	}
	if auth {
		if _, err := (tpm2.PolicyAuthValue{PolicySession: h}).Execute(t); err != nil {
			return err
		}
	}
	return nil
}

// endorsement satisfies the EK's policy, PolicySecret(TPM_RH_ENDORSEMENT) with
// the hierarchy's empty auth (TCG EK Credential Profile, policy A).
func (d *Device) endorsement() tpm2.Session {
	return tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, h tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{AuthHandle: tpm2.TPMRHEndorsement, PolicySession: h, NonceTPM: nonce}.Execute(t)
		if err != nil {
			d.flush(h)
		}
		return err
	})
}

// selection is a PCR selection in the SHA-256 bank.
func selection(pcrs []int) tpm2.TPMLPCRSelection {
	bits := make([]uint, len(pcrs))
	for i, p := range pcrs {
		bits[i] = uint(p)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(bits...),
	}}}
}

// PCRs reads SHA-256 PCRs: 32 bytes each, keyed by index.
func (d *Device) PCRs(which []int) (map[int][]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.readPCRs(which)
}

func (d *Device) readPCRs(which []int) (map[int][]byte, error) {
	out := make(map[int][]byte, len(which))
	for _, p := range which {
		if p < 0 || p > maxPCR {
			return nil, fmt.Errorf("there is no PCR %d, choose among 0-15", p)
		}
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection([]int{p})}.Execute(d.tpm)
		if err != nil {
			return nil, fmt.Errorf("reading PCR %d: %w", p, err)
		}
		if len(rsp.PCRValues.Digests) != 1 || len(rsp.PCRValues.Digests[0].Buffer) != 32 {
			return nil, fmt.Errorf("reading PCR %d: the TPM has no SHA-256 bank for it", p)
		}
		out[p] = bytes.Clone(rsp.PCRValues.Digests[0].Buffer)
	}
	return out, nil
}

// CheckPCRs refuses a set of PCRs that binds nothing: an empty set, one that
// holds PCR 16 or 23 (anyone can reset them), and one in which every value is
// still as the reset left it, zero or all ones.
func CheckPCRs(values map[int][]byte) error {
	if len(values) == 0 {
		return errors.New("no PCRs chosen: sealing to an empty set binds nothing")
	}
	measured := false
	for p, v := range values {
		if p == 16 || p == 23 || p < 0 || p > maxPCR {
			return fmt.Errorf("PCR %d cannot protect anything: choose among 0-15", p)
		}
		if !bytes.Equal(v, make([]byte, 32)) && !bytes.Equal(v, bytes.Repeat([]byte{0xff}, 32)) {
			measured = true
		}
	}
	if !measured {
		return errors.New("all chosen PCRs are as the reset left them: nothing was measured, so nothing would be protected; " +
			"boot with measured boot enabled (UEFI with a TPM), or choose other PCRs")
	}
	return nil
}

// explain turns the TPM's refusals that a caller can act on into ErrPolicy.
func explain(err error) error {
	if errors.Is(err, tpm2.TPMRCPolicyFail) || errors.Is(err, tpm2.TPMRCPCRChanged) || errors.Is(err, tpm2.TPMRCPolicy) {
		return fmt.Errorf("%w (%v)", ErrPolicy, err)
	}
	return err
}

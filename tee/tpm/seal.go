package tpm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Seal puts up to 128 bytes into an object that opens only while pcrs have their
// current values. With no pcrs it opens whenever this TPM is there.
func (d *Device) Seal(data []byte, pcrs []int) (Blob, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	pub := tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgKeyedHash,
		NameAlg:          tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash,
			&tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
	}
	if len(pcrs) == 0 {
		pub.ObjectAttributes.UserWithAuth = true
	} else {
		values, err := d.readPCRs(pcrs)
		if err != nil {
			return Blob{}, err
		}
		if err := CheckPCRs(values); err != nil {
			return Blob{}, err
		}
		pub.AuthPolicy = tpm2.TPM2BDigest{Buffer: PolicyDigest(values, false)}
	}
	b, err := d.create(d.srk, d.session(nil, coverBoth), pub, nil, data)
	if err != nil {
		return Blob{}, fmt.Errorf("sealing: %w", err)
	}
	return b, nil
}

// Unseal opens what Seal made, given the same pcrs. ErrPolicy means that they
// have changed.
func (d *Device) Unseal(b Blob, pcrs []int) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h, err := d.load(d.srk, d.session(nil, coverBoth), b)
	if err != nil {
		return nil, fmt.Errorf("loading a sealed object (was it made by this TPM?): %w", err)
	}
	defer d.flush(h.Handle)
	session := d.session(nil, coverResponse)
	if len(pcrs) > 0 {
		session = d.policySession(pcrs, nil, coverResponse)
	}
	rsp, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: session}}.Execute(d.tpm)
	if err != nil {
		return nil, fmt.Errorf("unsealing: %w", explain(err))
	}
	return bytes.Clone(rsp.OutData.Buffer), nil
}

// NV indices of ours, in the range the TCG leaves to the owner.
const (
	counterIndex = tpm2.TPMHandle(0x0180ec00)
	slotIndex    = tpm2.TPMHandle(0x0180ec01) // and the next one
	slotSize     = 32
)

// NV is the keep's non-volatile memory in the TPM: a counter that only goes up
// and two slots of 32 bytes, under PolicyPCR ∧ PolicyAuthValue.
type NV struct {
	d      *Device
	pcrs   []int
	auth   []byte
	policy []byte
}

// DefineNV removes what an earlier identity left at our indices and defines them
// anew, with first in slot 0. The counter of a redefined index does not go back
// (TPM 2.0 Part 1 §37.2.4). Slot 1 is written last: HasNV sees nothing of a
// DefineNV that was cut off.
func (d *Device) DefineNV(pcrs []int, auth, first []byte) (*NV, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	nv, err := d.nv(pcrs, auth)
	if err != nil {
		return nil, err
	}
	for i := 2; i >= 0; i-- {
		if err := d.undefine(counterIndex + tpm2.TPMHandle(i)); err != nil {
			return nil, fmt.Errorf("removing old NV index %#x: %w", uint32(counterIndex)+uint32(i), err)
		}
	}
	for i := range 3 {
		if err := nv.define(i); err != nil {
			return nil, fmt.Errorf("defining NV index %#x: %w", uint32(counterIndex)+uint32(i), err)
		}
		switch i {
		case 0:
			_, err = nv.increment()
		case 1:
			err = nv.write(0, first)
		case 2:
			err = nv.write(1, make([]byte, slotSize))
		}
		if err != nil {
			return nil, fmt.Errorf("initialising NV index %#x: %w", uint32(counterIndex)+uint32(i), err)
		}
	}
	return nv, nil
}

// HasNV reports whether a DefineNV has been completed: whether a keep has lived
// here.
func (d *Device) HasNV() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	rsp, err := tpm2.NVReadPublic{NVIndex: slotIndex + 1}.Execute(d.tpm)
	if err != nil {
		return false
	}
	pub, err := rsp.NVPublic.Contents()
	return err == nil && pub.Attributes.Written
}

// OpenNV opens indices that DefineNV made while the PCRs had today's values. An
// index that somebody deleted and defined again with other attributes or another
// policy is refused by its name; one with another auth value at its first use.
func (d *Device) OpenNV(pcrs []int, auth []byte) (*NV, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	nv, err := d.nv(pcrs, auth)
	if err != nil {
		return nil, err
	}
	for i := range 3 {
		want := nv.public(i)
		want.Attributes.Written = true
		name, err := tpm2.NVName(&want)
		if err != nil {
			return nil, err
		}
		got, err := tpm2.NVReadPublic{NVIndex: want.NVIndex}.Execute(d.tpm)
		if err != nil {
			return nil, fmt.Errorf("NV index %#x is gone: %w", uint32(want.NVIndex), err)
		}
		if !bytes.Equal(name.Buffer, got.NVName.Buffer) {
			return nil, fmt.Errorf("NV index %#x is not the one the keep defined: its name differs", uint32(want.NVIndex))
		}
	}
	return nv, nil
}

func (d *Device) nv(pcrs []int, auth []byte) (*NV, error) {
	values, err := d.readPCRs(pcrs)
	if err != nil {
		return nil, err
	}
	if err := CheckPCRs(values); err != nil {
		return nil, err
	}
	return &NV{d: d, pcrs: pcrs, auth: auth, policy: PolicyDigest(values, true)}, nil
}

// Increment raises the counter and returns its new value.
func (n *NV) Increment() (uint64, error) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	v, err := n.increment()
	if err != nil {
		return 0, fmt.Errorf("raising the NV counter: %w", err)
	}
	return v, nil
}

// Read returns the 32 bytes of slot 0 or 1.
func (n *NV) Read(slot int) ([]byte, error) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	b, err := n.read(slot+1, slotSize)
	if err != nil {
		return nil, fmt.Errorf("reading NV slot %d: %w", slot, err)
	}
	return b, nil
}

// Write replaces slot 0 or 1 by 32 bytes. When it returns, the old bytes are
// gone from the TPM.
func (n *NV) Write(slot int, data []byte) error {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if err := n.write(slot, data); err != nil {
		return fmt.Errorf("writing NV slot %d: %w", slot, err)
	}
	return nil
}

func (d *Device) undefine(index tpm2.TPMHandle) error {
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(d.tpm)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil // not defined: nothing to remove
	}
	if err != nil {
		return err
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
	}.Execute(d.tpm)
	return err
}

func (n *NV) public(i int) tpm2.TPMSNVPublic {
	p := tpm2.TPMSNVPublic{
		NVIndex: counterIndex + tpm2.TPMHandle(i), NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{PolicyRead: true, PolicyWrite: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: n.policy}, DataSize: slotSize,
	}
	if i == 0 {
		p.Attributes.NT, p.DataSize = tpm2.TPMNTCounter, 8
	}
	return p
}

func (n *NV) define(i int) error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: n.d.session(nil, coverCommand)},
		Auth:       tpm2.TPM2BAuth{Buffer: n.auth},
		PublicInfo: tpm2.New2B(n.public(i)),
	}.Execute(n.d.tpm)
	return err
}

// handle is index i with the session that may use it; its current name is read
// because the first write changes it.
func (n *NV) handle(i int, c cover) (tpm2.AuthHandle, tpm2.NamedHandle, error) {
	index := counterIndex + tpm2.TPMHandle(i)
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(n.d.tpm)
	if err != nil {
		return tpm2.AuthHandle{}, tpm2.NamedHandle{}, err
	}
	return tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: n.d.policySession(n.pcrs, n.auth, c)},
		tpm2.NamedHandle{Handle: index, Name: pub.NVName}, nil
}

func (n *NV) increment() (uint64, error) {
	auth, index, err := n.handle(0, coverNone)
	if err != nil {
		return 0, err
	}
	if _, err := (tpm2.NVIncrement{AuthHandle: auth, NVIndex: index}).Execute(n.d.tpm); err != nil {
		return 0, explain(err)
	}
	b, err := n.read(0, 8)
	if err != nil {
		return 0, err
	}
	var v uint64
	for _, x := range b {
		v = v<<8 | uint64(x)
	}
	return v, nil
}

func (n *NV) read(i int, size uint16) ([]byte, error) {
	auth, index, err := n.handle(i, coverResponse)
	if err != nil {
		return nil, err
	}
	rsp, err := tpm2.NVRead{AuthHandle: auth, NVIndex: index, Size: size}.Execute(n.d.tpm)
	if err != nil {
		return nil, explain(err)
	}
	if len(rsp.Data.Buffer) != int(size) {
		return nil, fmt.Errorf("short read: %d of %d bytes", len(rsp.Data.Buffer), size)
	}
	return bytes.Clone(rsp.Data.Buffer), nil
}

func (n *NV) write(slot int, data []byte) error {
	if len(data) != slotSize || slot < 0 || slot > 1 {
		return errors.New("a slot is 0 or 1 and holds exactly 32 bytes")
	}
	auth, index, err := n.handle(slot+1, coverCommand)
	if err != nil {
		return err
	}
	_, err = tpm2.NVWrite{AuthHandle: auth, NVIndex: index, Data: tpm2.TPM2BMaxNVBuffer{Buffer: data}}.Execute(n.d.tpm)
	return explain(err)
}

package tpm

import (
	"bytes"
	"crypto"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

func TestSeal(t *testing.T) {
	d := open(t)
	secret := bytes.Repeat([]byte{9}, 128)
	bound, free := must(d.Seal(secret, measured))(t), must(d.Seal(secret[:32], nil))(t)
	if got := must(d.Unseal(bound, measured))(t); !bytes.Equal(got, secret) {
		t.Errorf("unsealed %x", got)
	}
	if bytes.Contains(bound.Private, secret[:16]) || bytes.Contains(bound.Public, secret[:16]) {
		t.Error("the blob holds the secret")
	}
	if _, err := d.Unseal(bound, nil); err == nil {
		t.Error("unsealed without its policy")
	}
	if _, err := d.Unseal(bound, measured[:1]); !errors.Is(err, ErrPolicy) {
		t.Errorf("unsealed with fewer PCRs: %v", err)
	}
	if _, err := d.Seal(make([]byte, 129), nil); err == nil {
		t.Error("sealed 129 bytes")
	}
	mixed := Blob{Public: free.Public, Private: bound.Private}
	if _, err := d.Unseal(mixed, nil); err == nil {
		t.Error("unsealed under the policy of another blob")
	}
	extend(t, d, measured[0], "something else boots")
	if _, err := d.Unseal(bound, measured); !errors.Is(err, ErrPolicy) {
		t.Errorf("in another state: %v", err)
	}
	if got := must(d.Unseal(free, nil))(t); !bytes.Equal(got, secret[:32]) {
		t.Errorf("unsealed %x", got)
	}
}

// TestRestart cuts the power. The same boot opens what was sealed, another does not.
func TestRestart(t *testing.T) {
	dir := shortDir(t)
	s := startTPM(t, dir)
	d := openDevice(t, s)
	extend(t, d, 0, "firmware")
	sealed := must(d.Seal([]byte("root"), []int{0}))(t)
	keyBlob := must(d.NewKey(Signing, []int{0}, auth(2)))(t)
	akBlob := must(d.NewAK(auth(1)))(t)
	nv := must(d.DefineNV([]int{0}, auth(4), qualifying))(t)
	count := must(nv.Increment())(t)
	ak := must(d.LoadAK(akBlob, auth(1)))(t)
	before := clock(t, ak)
	ek := must(d.EK())(t)

	restart := func() {
		t.Helper()
		d.Close()
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		s = startTPM(t, dir)
		d = openDevice(t, s)
		extend(t, d, 0, "firmware")
	}
	restart()
	if got := must(d.Unseal(sealed, []int{0}))(t); string(got) != "root" {
		t.Errorf("unsealed %q", got)
	}
	key := must(d.Key(keyBlob, []int{0}, auth(2)))(t)
	must(key.Sign(nil, qualifying, crypto.SHA256))(t)
	ak = must(d.LoadAK(akBlob, auth(1)))(t)
	after := clock(t, ak)
	if !before.Before(after) || after.Before(before) || after.ResetCount != before.ResetCount+1 {
		t.Errorf("%+v, then %+v", before, after)
	}
	if again := must(d.EK())(t); !bytes.Equal(again.Public, ek.Public) {
		t.Error("it is another TPM")
	}
	nv = must(d.OpenNV([]int{0}, auth(4)))(t)
	if got := must(nv.Increment())(t); got != count+1 {
		t.Errorf("the counter is %d, was %d", got, count)
	}
	if got := must(nv.Read(0))(t); !bytes.Equal(got, qualifying) {
		t.Errorf("slot 0 is %x", got)
	}

	// An unclean stop with wrong auth values before must not lock the TPM.
	for range 5 {
		wrong := must(d.Key(keyBlob, []int{0}, auth(3)))(t)
		if _, err := wrong.Sign(nil, qualifying, crypto.SHA256); err == nil {
			t.Fatal("signed with a wrong auth value")
		}
	}
	restart()
	key = must(d.Key(keyBlob, []int{0}, auth(2)))(t)
	must(key.Sign(nil, qualifying, crypto.SHA256))(t)

	extend(t, d, 0, "something else")
	if _, err := d.Unseal(sealed, []int{0}); !errors.Is(err, ErrPolicy) {
		t.Errorf("another boot: %v", err)
	}
	ak = must(d.LoadAK(akBlob, auth(1)))(t) // it must be able to say that the state is bad
	clock(t, ak)
}

func clock(t *testing.T, ak *AK) Clock {
	t.Helper()
	q, values, err := ak.Quote(qualifying, []int{0})
	if err != nil {
		t.Fatal(err)
	}
	return must(CheckQuote(ak.Public(), q, qualifying, values))(t).Clock
}

func TestClockBefore(t *testing.T) {
	ordered := []Clock{
		{ResetCount: 1, RestartCount: 1, Milliseconds: 9},
		{ResetCount: 1, RestartCount: 2, Milliseconds: 3},
		{ResetCount: 1, RestartCount: 2, Milliseconds: 4},
		{ResetCount: 2, RestartCount: 0, Milliseconds: 1},
	}
	for i, a := range ordered {
		for j, b := range ordered {
			if a.Before(b) != (i < j) {
				t.Errorf("%+v before %+v: %v", a, b, a.Before(b))
			}
		}
	}
}

func TestNV(t *testing.T) {
	d := open(t)
	nv := must(d.DefineNV(measured, auth(4), qualifying))(t)
	if !d.HasNV() {
		t.Error("HasNV is false")
	}
	first := must(nv.Increment())(t)
	if second := must(nv.Increment())(t); second != first+1 {
		t.Errorf("counter %d, then %d", first, second)
	}
	for slot, want := range [][]byte{qualifying, make([]byte, 32)} {
		if got := must(nv.Read(slot))(t); !bytes.Equal(got, want) {
			t.Errorf("slot %d: %x", slot, got)
		}
	}
	changed := bytes.Repeat([]byte{3}, 32)
	if err := nv.Write(1, changed); err != nil {
		t.Fatal(err)
	}
	reopened := must(d.OpenNV(measured, auth(4)))(t)
	if got := must(reopened.Read(1))(t); !bytes.Equal(got, changed) {
		t.Errorf("slot 1: %x", got)
	}
	for name, err := range map[string]error{
		"slot 2": nv.Write(2, changed), "slot -1": nv.Write(-1, changed),
		"31 bytes": nv.Write(0, changed[:31]), "33 bytes": nv.Write(0, append(changed, 0)),
	} {
		if err == nil {
			t.Errorf("wrote %s", name)
		}
	}
	wrong := must(d.OpenNV(measured, auth(5)))(t)
	if _, err := wrong.Read(0); err == nil {
		t.Error("read with another auth value")
	}
	if _, err := wrong.Increment(); err == nil {
		t.Error("raised with another auth value")
	}
	if err := wrong.Write(0, changed); err == nil {
		t.Error("wrote with another auth value")
	}

	again := must(d.DefineNV(measured, auth(4), changed))(t)
	if third := must(again.Increment())(t); third <= first+1 {
		t.Errorf("defined again, the counter went back to %d from %d", third, first+1)
	}
	extend(t, d, measured[0], "something else boots")
	if _, err := again.Read(0); !errors.Is(err, ErrPolicy) {
		t.Errorf("read in another state: %v", err)
	}
	if _, err := again.Increment(); !errors.Is(err, ErrPolicy) {
		t.Errorf("raised in another state: %v", err)
	}
	if err := again.Write(0, changed); !errors.Is(err, ErrPolicy) {
		t.Errorf("wrote in another state: %v", err)
	}
	if _, err := d.OpenNV(measured, auth(4)); err == nil || !strings.Contains(err.Error(), "its name differs") {
		t.Errorf("opened in another state: %v", err)
	}
}

// Root may delete an index and define it again as it likes.
func TestRedefinedNV(t *testing.T) {
	d := open(t)
	for i := range 3 {
		nv := must(d.DefineNV(measured, auth(4), qualifying))(t)
		index := counterIndex + tpm2.TPMHandle(i)
		if err := d.undefine(index); err != nil {
			t.Fatal(err)
		}
		if _, err := d.OpenNV(measured, auth(4)); err == nil || !strings.Contains(err.Error(), "is gone") {
			t.Errorf("deleted: %v", err)
		}
		if err := nv.define(i); err != nil { // right in all, but not written
			t.Fatal(err)
		}
		if _, err := d.OpenNV(measured, auth(4)); err == nil || !strings.Contains(err.Error(), "its name differs") {
			t.Errorf("defined again, not written: %v", err)
		}
		if err := d.undefine(index); err != nil {
			t.Fatal(err)
		}
		writeNV(t, d, index, qualifying) // readable and writable by the owner
		if _, err := d.OpenNV(measured, auth(4)); err == nil || !strings.Contains(err.Error(), "its name differs") {
			t.Errorf("defined again with other attributes: %v", err)
		}
	}
	must(d.DefineNV(measured, auth(4), qualifying))(t) // takes away what is there
	must(d.OpenNV(measured, auth(4)))(t)
}

// TestCutDefineNV cuts the connection after each command of a DefineNV in turn, before or
// after the TPM has done the command, where nothing was defined and over a complete
// definition.
func TestCutDefineNV(t *testing.T) {
	for _, late := range []bool{false, true} {
		for _, over := range []bool{false, true} {
			cutDefineNV(t, late, over)
		}
	}
}

func cutDefineNV(t *testing.T, late, over bool) {
	d := open(t)
	defer d.Close()
	whole := d.tpm
	for n := 0; ; n++ {
		if n > 300 {
			t.Fatal("DefineNV never ends")
		}
		if over && n > 15 {
			return // what was there is removed: the rest is as if it had not been
		}
		for i := 2; i >= 0 && !over; i-- {
			if err := d.undefine(counterIndex + tpm2.TPMHandle(i)); err != nil {
				t.Fatal(err)
			}
		}
		if over {
			must(d.DefineNV(measured, auth(4), qualifying))(t)
		}
		d.tpm = &cutting{TPMCloser: whole, left: n, late: late}
		_, err := d.DefineNV(measured, auth(4), qualifying)
		d.tpm = whole
		if err := d.flushLeftovers(); err != nil {
			t.Fatal(err)
		}
		if d.HasNV() { // so all of it is there
			nv, err := d.OpenNV(measured, auth(4))
			if err != nil {
				t.Fatalf("cut after %d: HasNV is true: %v", n, err)
			}
			if got, err := nv.Read(0); err != nil || !bytes.Equal(got, qualifying) {
				t.Fatalf("cut after %d: HasNV is true, slot 0 is %x, %v", n, got, err)
			}
			must(nv.Read(1))(t)
		} else if err == nil {
			t.Fatal("complete, but HasNV is false")
		}
		if err == nil {
			return
		}
	}
}

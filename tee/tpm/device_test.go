package tpm

import (
	"crypto"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// A keep that was killed leaves its objects in the TPM; the next one finds room.
func TestLeftovers(t *testing.T) {
	d := open(t)
	blob := must(d.NewAK(auth(1)))(t)
	for range 3 {
		if _, err := d.LoadAK(blob, auth(1)); err != nil {
			break
		}
		if _, _, err := tpm2.HMACSession(d.tpm, tpm2.TPMAlgSHA256, 16); err != nil {
			break
		}
	}
	if _, err := d.LoadAK(blob, auth(1)); err == nil {
		t.Fatal("the TPM has more room than this test thinks")
	}
	d.Close()
	d = open(t)
	handles := must(tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: 0x80000000, PropertyCount: 8}.Execute(d.tpm))(t)
	if left := must(handles.CapabilityData.Data.Handles())(t).Handle; len(left) != 0 {
		t.Errorf("still there: %x", left)
	}
	must(d.LoadAK(blob, auth(1)))(t)
	must(d.Unseal(must(d.Seal(qualifying, measured))(t), measured))(t)
}

// A TPM has room for three sessions: one that a failure leaves behind is felt soon.
func TestFailuresLeaveNoSession(t *testing.T) {
	d := open(t)
	key, blob := newKey(t, d, Signing)
	sealed := must(d.Seal(qualifying, measured))(t)
	wrong := must(d.Key(blob, measured, auth(3)))(t)
	nv := must(d.DefineNV(measured, auth(4), qualifying))(t)
	for i := range 50 {
		if _, err := d.Unseal(sealed, []int{100}); err == nil { // PolicyPCR itself fails
			t.Fatal("unsealed with a PCR that is not there")
		}
		if _, err := d.Unseal(sealed, measured[:1]); !errors.Is(err, ErrPolicy) { // the command fails
			t.Fatalf("failure %d: %v", i, err)
		}
		if _, err := wrong.Sign(nil, qualifying, crypto.SHA256); err == nil {
			t.Fatal("signed with another auth value")
		}
		if _, err := nv.Read(7); err == nil {
			t.Fatal("read a slot that is not there")
		}
	}
	must(key.Sign(nil, qualifying, crypto.SHA256))(t)
	must(d.Unseal(sealed, measured))(t)
}

func TestConcurrentUse(t *testing.T) {
	d := open(t)
	key, _ := newKey(t, d, Signing)
	ak := newAK(t, d)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				if _, err := key.Sign(nil, qualifying, crypto.SHA256); err != nil {
					t.Error(err)
				}
				if _, _, err := ak.Quote(qualifying, measured); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestOpenRefuses(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "apt-get install swtpm") {
		t.Errorf("no TPM: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if d, err := Open(file); err == nil {
		d.Close()
		t.Error("opened a plain file as a TPM")
	}
}

// The storage root key is made persistent once, and another key in its place is not used.
func TestSRK(t *testing.T) {
	d := open(t)
	name := d.srk.Name.Buffer
	d.Close()
	d = open(t)
	if string(d.srk.Name.Buffer) != string(name) {
		t.Error("another storage root key")
	}
	ak := must(tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(akTemplate())}.Execute(d.tpm))(t)
	evict := func(object tpm2.NamedHandle) {
		t.Helper()
		_, err := tpm2.EvictControl{Auth: tpm2.TPMRHOwner, ObjectHandle: object, PersistentHandle: srkHandle}.Execute(d.tpm)
		if err != nil {
			t.Fatal(err)
		}
	}
	evict(d.srk)
	evict(tpm2.NamedHandle{Handle: ak.ObjectHandle, Name: ak.Name})
	d.Close()
	if _, err := Open(shared.Socket()); err == nil || !strings.Contains(err.Error(), "tpm2_evictcontrol") {
		t.Errorf("%v", err)
	}
	raw := must(openRaw(shared.Socket()))(t)
	defer raw.tpm.Close()
	d = raw
	evict(tpm2.NamedHandle{Handle: srkHandle, Name: ak.Name})
}

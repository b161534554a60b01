package tpm

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
)

func TestQuote(t *testing.T) {
	d := open(t)
	ak := newAK(t, d)
	pcrs := []int{0, 1, 7, 14}
	q, values, err := ak.Quote(qualifying, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	got, err := CheckQuote(ak.Public(), q, qualifying, values)
	if err != nil || !slices.Equal(got.PCRs, pcrs) || got.Firmware == 0 {
		t.Fatalf("%+v, %v", got, err)
	}
	later, values2, err := ak.Quote(qualifying, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	got2, err := CheckQuote(ak.Public(), later, qualifying, values2)
	if err != nil || got2.Clock.Before(got.Clock) {
		t.Errorf("%+v after %+v, %v", got2.Clock, got.Clock, err)
	}

	everyFlip(t, "attest", q.Attest, func(b []byte) error {
		_, err := CheckQuote(ak.Public(), Signed{Attest: b, Signature: q.Signature}, qualifying, values)
		return err
	})
	everyFlip(t, "signature", q.Signature, func(b []byte) error {
		_, err := CheckQuote(ak.Public(), Signed{Attest: q.Attest, Signature: b}, qualifying, values)
		return err
	})
	everyFlip(t, "qualifying data", qualifying, func(b []byte) error {
		_, err := CheckQuote(ak.Public(), q, b, values)
		return wantError(t, err, ErrBinding)
	})
	everyFlip(t, "AK", ak.Public(), func(b []byte) error {
		_, err := CheckQuote(b, q, qualifying, values)
		return err
	})
	for _, p := range pcrs {
		everyFlip(t, "PCR", values[p], func(b []byte) error {
			changed := maps.Clone(values)
			changed[p] = b
			_, err := CheckQuote(ak.Public(), q, qualifying, changed)
			return wantError(t, err, ErrPCRDigest)
		})
	}
}

func TestQuoteRefused(t *testing.T) {
	d := open(t)
	ak := newAK(t, d)
	q, values, err := ak.Quote(qualifying, measured)
	if err != nil {
		t.Fatal(err)
	}
	more, fewer, moved := maps.Clone(values), maps.Clone(values), map[int][]byte{}
	more[3] = values[0]
	delete(fewer, measured[0])
	for p, v := range values {
		moved[p+1] = v
	}
	for name, v := range map[string]map[int][]byte{"more": more, "fewer": fewer, "moved": moved, "none": nil} {
		if _, err := CheckQuote(ak.Public(), q, qualifying, v); !errors.Is(err, ErrPCRDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ak.Close()
	other := newAK(t, d)
	if _, err := CheckQuote(other.Public(), q, qualifying, values); !errors.Is(err, ErrSignature) {
		t.Errorf("another AK: %v", err)
	}
	ak = other
	key, _ := newKey(t, d, Signing)
	certified := must(ak.Certify(key, qualifying))(t)
	if _, err := CheckQuote(ak.Public(), certified, qualifying, values); err == nil || !strings.Contains(err.Error(), "expected kind") {
		t.Errorf("a certification as a quote: %v", err)
	}
	if _, _, err := ak.Quote(make([]byte, 67), measured); err == nil {
		t.Error("67 bytes of qualifying data")
	}
	if _, _, err := ak.Quote(qualifying, []int{24}); err == nil || !strings.Contains(err.Error(), "no PCR 24") {
		t.Errorf("PCR 24: %v", err)
	}
}

func TestCertify(t *testing.T) {
	d := open(t)
	ak := newAK(t, d)
	for use, other := range map[Use]Use{Signing: Agreement, Agreement: Signing} {
		key, blob := newKey(t, d, use)
		_, stranger := newKey(t, d, use)
		c := must(ak.Certify(key, qualifying))(t)
		values := must(d.PCRs(measured))(t)
		check := func(c Signed, qualifying, public []byte, use Use, values map[int][]byte) error {
			pub, err := CheckCertified(ak.Public(), c, qualifying, public, use, values)
			if err == nil && !pub.Equal(key.Public()) {
				t.Error("it is another key")
			}
			return err
		}
		everyFlip(t, "name", c.Attest[len(c.Attest)-70:], func(b []byte) error {
			b = append(bytes.Clone(c.Attest[:len(c.Attest)-70]), b...)
			return check(Signed{Attest: b, Signature: c.Signature}, qualifying, blob.Public, use, values)
		})
		everyFlip(t, "public", blob.Public, func(b []byte) error { return check(c, qualifying, b, use, values) })
		if err := check(c, make([]byte, 32), blob.Public, use, values); !errors.Is(err, ErrBinding) {
			t.Errorf("other qualifier: %v", err)
		}
		if err := check(c, qualifying, stranger.Public, use, values); err == nil || !strings.Contains(err.Error(), "another key") {
			t.Errorf("other key: %v", err)
		}
		if err := check(c, qualifying, blob.Public, other, values); err == nil || !strings.Contains(err.Error(), "other attributes") {
			t.Errorf("other use: %v", err)
		}
		for _, p := range []int{-1, 24, 1 << 40} { // as evidence may claim
			if err := check(c, qualifying, blob.Public, use, map[int][]byte{p: values[0]}); err == nil || errors.Is(err, ErrKeyPolicy) {
				t.Errorf("PCR %d: %v", p, err)
			}
		}
		quote, quoted, err := ak.Quote(qualifying, measured)
		if err != nil {
			t.Fatal(err)
		}
		if err := check(quote, qualifying, blob.Public, use, quoted); err == nil || !strings.Contains(err.Error(), "expected kind") {
			t.Errorf("a quote as a certification: %v", err)
		}
		extend(t, d, measured[0], "something else boots")
		if err := check(c, qualifying, blob.Public, use, must(d.PCRs(measured))(t)); !errors.Is(err, ErrKeyPolicy) {
			t.Errorf("in another state: %v", err)
		}
		if err := check(c, qualifying, blob.Public, use, must(d.PCRs(unmeasured))(t)); !errors.Is(err, ErrKeyPolicy) {
			t.Errorf("other PCRs: %v", err)
		}
		// Certifying is no use of the key, and possible; the check then says what it is worth.
		c = must(ak.Certify(key, qualifying))(t)
		if err := check(c, qualifying, blob.Public, use, must(d.PCRs(measured))(t)); !errors.Is(err, ErrKeyPolicy) {
			t.Errorf("certified in another state: %v", err)
		}
	}
}

// A key that can be used without its policy is not a key of the keep, also when the AK
// vouches for it.
func TestCertifyLooseKey(t *testing.T) {
	d := open(t)
	ak := newAK(t, d)
	values := must(d.PCRs(measured))(t)
	template := keyTemplate(Signing, PolicyDigest(values, true))
	template.ObjectAttributes.UserWithAuth = true
	blob := must(d.create(d.srk, d.session(nil, coverBoth), template, auth(2), nil))(t)
	key := must(d.Key(blob, measured, auth(2)))(t)
	c := must(ak.Certify(key, qualifying))(t)
	_, err := CheckCertified(ak.Public(), c, qualifying, blob.Public, Signing, values)
	if err == nil || !strings.Contains(err.Error(), "other attributes") {
		t.Errorf("%v", err)
	}
}

// everyFlip fails when check takes b with any one bit flipped, or refuses b itself.
func everyFlip(t *testing.T, what string, b []byte, check func([]byte) error) {
	t.Helper()
	changed := bytes.Clone(b)
	if len(b) == 0 {
		t.Fatalf("%s is empty", what)
	}
	for i := range changed {
		for bit := range 8 {
			changed[i] ^= 1 << bit
			if check(changed) == nil {
				t.Errorf("%s: taken with bit %d of byte %d flipped", what, bit, i)
			}
			changed[i] ^= 1 << bit
		}
	}
	if err := check(changed); err != nil {
		t.Errorf("%s: not taken as it is: %v", what, err)
	}
}

// wantError passes err on, and fails when it is an error but not this one.
func wantError(t *testing.T, err, want error) error {
	t.Helper()
	if err != nil && !errors.Is(err, want) {
		t.Errorf("%v, want %v", err, want)
	}
	return err
}

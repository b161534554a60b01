package attest

import (
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"fmt"

	"edgekeep/internal/cose"
)

// Roots is the set of keys that a tenant's gateways trust. The keep's
// configuration pins its digest; the bundle itself may come from anyone.
//
// It is the deterministic CBOR of the map below, all values COSE_Keys but the
// tenant's name. Keys of roles are told apart because each signs only its own
// types of message, but they should be different keys.
type Roots struct {
	Tenant   string `cbor:"1,keyasint"`
	Operator Key    `cbor:"2,keyasint"` // signs admissions and commands
	Verifier Key    `cbor:"3,keyasint"` // signs verdicts
	Fleet    Key    `cbor:"4,keyasint"` // signs deliveries and watermarks
	Broker   Key    `cbor:"5,keyasint"` // signs key releases
	Owner    Key    `cbor:"6,keyasint"` // the data owner: signs who may read
	Data     Key    `cbor:"7,keyasint"` // the data owner's HPKE key: stream keys are sealed to it
}

// Trusted is Roots, parsed.
type Trusted struct {
	Tenant                                   string
	Operator, Verifier, Fleet, Broker, Owner *ecdsa.PublicKey
	Data                                     hpke.PublicKey
	Digest                                   []byte // SHA-256 of the bundle
}

// ParseRoots decodes a bundle.
func ParseRoots(bundle []byte) (Trusted, error) {
	var r Roots
	if err := cose.Unmarshal(bundle, &r); err != nil {
		return Trusted{}, fmt.Errorf("trust roots: %w", err)
	}
	if !ValidName(r.Tenant) {
		return Trusted{}, fmt.Errorf("trust roots: tenant name %q", r.Tenant)
	}
	sum := sha256.Sum256(bundle)
	t := Trusted{Tenant: r.Tenant, Digest: sum[:]}
	for _, k := range []struct {
		name string
		raw  Key
		to   **ecdsa.PublicKey
	}{
		{"operator", r.Operator, &t.Operator},
		{"verifier", r.Verifier, &t.Verifier},
		{"fleet", r.Fleet, &t.Fleet},
		{"broker", r.Broker, &t.Broker},
		{"owner", r.Owner, &t.Owner},
	} {
		pub, err := cose.UnmarshalKey(k.raw)
		if err != nil {
			return Trusted{}, fmt.Errorf("trust roots: %s key: %w", k.name, err)
		}
		*k.to = pub
	}
	data, err := cose.UnmarshalHPKEKey(r.Data)
	if err != nil {
		return Trusted{}, fmt.Errorf("trust roots: data key: %w", err)
	}
	t.Data = data
	return t, nil
}

package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"slices"
	"time"

	"edgekeep/internal/cose"
)

// Tiers of AR4SI (draft-ietf-rats-ar4si §2.3.2), which are also the values of
// ear.status.
const (
	TierNone            = 0
	TierAffirming       = 2
	TierWarning         = 32
	TierContraindicated = 96
)

// Tier names the tier that a trustworthiness claim or a status lies in.
func Tier(v int) string {
	switch {
	case v == -1 || v == 0 || v == 1:
		return "none"
	case v >= 2 && v <= 31 || v >= -32 && v <= -2:
		return "affirming"
	case v >= 32 && v <= 95 || v >= -96 && v <= -33:
		return "warning"
	}
	return "contraindicated"
}

// Vector is the AR4SI trustworthiness vector (§2.3.4): claims that were not made
// are absent. For a TPM nothing is said of the runtime: it does not protect it.
type Vector struct {
	Instance      int `cbor:"0,keyasint,omitempty"` // instance-identity
	Configuration int `cbor:"1,keyasint,omitempty"`
	Executables   int `cbor:"2,keyasint,omitempty"`
	FileSystem    int `cbor:"3,keyasint,omitempty"`
	Hardware      int `cbor:"4,keyasint,omitempty"`
	Runtime       int `cbor:"5,keyasint,omitempty"` // runtime-opaque
	Storage       int `cbor:"6,keyasint,omitempty"` // storage-opaque
	SourcedData   int `cbor:"7,keyasint,omitempty"`
}

// Named is one claim of a vector, for people.
type Named struct {
	Name  string
	Value int
}

// List returns the claims that were made, in order.
func (v Vector) List() []Named {
	all := []Named{
		{"instance-identity", v.Instance},
		{"configuration", v.Configuration},
		{"executables", v.Executables},
		{"file-system", v.FileSystem},
		{"hardware", v.Hardware},
		{"runtime-opaque", v.Runtime},
		{"storage-opaque", v.Storage},
		{"sourced-data", v.SourcedData},
	}
	return slices.DeleteFunc(all, func(n Named) bool { return n.Value == 0 })
}

// Status is the worst tier in the vector; none if it is empty.
func (v Vector) Status() int {
	worst := TierNone
	for _, n := range v.List() {
		switch Tier(n.Value) {
		case "affirming":
			worst = max(worst, TierAffirming)
		case "warning":
			worst = max(worst, TierWarning)
		case "contraindicated":
			worst = TierContraindicated
		}
	}
	return worst
}

// Appraisal is an EAR-appraisal of one submodule.
type Appraisal struct {
	Status   int      `cbor:"1000,keyasint"`
	Vector   Vector   `cbor:"1001,keyasint"`
	Policies []string `cbor:"1003,keyasint,omitempty"`
}

// VerifierID is the ear.verifier-id claim.
type VerifierID struct {
	Developer string `cbor:"0,keyasint"`
	Build     string `cbor:"1,keyasint"`
}

// Verdict is an EAR. Private claims: -70201 SHA-256 of the challenge message,
// -70202 SHA-256 of the evidence, -70203 the other confirmation keys by purpose,
// -70204 keys of earlier epochs, -70205 what was checked, -70206 what protects
// data in use ("tpm": nothing but measured boot), -70207 the newest accepted
// command.
type Verdict struct {
	Subject       string               `cbor:"2,keyasint"` // tenant/gateway
	Audience      string               `cbor:"3,keyasint"` // tenant
	Expires       int64                `cbor:"4,keyasint"` // Unix seconds, counted from the challenge's issue
	NotBefore     int64                `cbor:"5,keyasint"` // when the challenge was issued
	IssuedAt      int64                `cbor:"6,keyasint"`
	Cnf           Confirmation         `cbor:"8,keyasint"`
	Nonce         []byte               `cbor:"10,keyasint"`
	Profile       string               `cbor:"265,keyasint"`
	Submods       map[string]Appraisal `cbor:"266,keyasint"`
	VerifierID    VerifierID           `cbor:"1004,keyasint"`
	ChallengeHash []byte               `cbor:"-70201,keyasint"`
	EvidenceHash  []byte               `cbor:"-70202,keyasint"`
	Keys          map[string]Key       `cbor:"-70203,keyasint,omitempty"`
	Prior         []Key                `cbor:"-70204,keyasint,omitempty"`
	Checks        []Check              `cbor:"-70205,keyasint"`
	Assurance     string               `cbor:"-70206,keyasint"`
	Command       uint64               `cbor:"-70207,keyasint"`
}

// Submodule is the name under which the gateway's appraisal stands.
const Submodule = "gateway"

// Sign signs the verdict with the verifier's key.
func (v Verdict) Sign(key crypto.Signer) ([]byte, error) {
	return cose.Sign1(key, TypVerdict, cose.MustMarshal(v))
}

// VerifyVerdict verifies a verdict's signature and shape. Whether it is
// affirming, in time and for the right audience is for Usable.
func VerifyVerdict(pub *ecdsa.PublicKey, msg []byte) (Verdict, error) {
	payload, err := cose.Verify1(pub, TypVerdict, msg)
	if err != nil {
		return Verdict{}, fmt.Errorf("verdict: %w", err)
	}
	return parseVerdict(payload)
}

// PeekVerdict reads a verdict without verifying it.
func PeekVerdict(msg []byte) (Verdict, error) {
	_, payload, err := cose.Peek1(msg)
	if err != nil {
		return Verdict{}, fmt.Errorf("verdict: %w", err)
	}
	return parseVerdict(payload)
}

func parseVerdict(payload []byte) (Verdict, error) {
	var v Verdict
	if err := cose.Unmarshal(payload, &v); err != nil {
		return v, fmt.Errorf("verdict: %w", err)
	}
	if v.Profile != VerdictProfile {
		return v, fmt.Errorf("verdict: profile %q is not known", v.Profile)
	}
	a, ok := v.Submods[Submodule]
	if !ok || len(v.Submods) != 1 || a.Status != a.Vector.Status() {
		return v, errors.New("verdict: its status does not follow from its vector")
	}
	return v, nil
}

// Appraisal returns the gateway's appraisal.
func (v Verdict) Appraisal() Appraisal { return v.Submods[Submodule] }

// Affirming reports whether the appraisal's status is affirming.
func (v Verdict) Affirming() bool { return v.Appraisal().Status == TierAffirming }

// Usable says why a verdict may not be relied on now for this subject and
// tenant, or nil.
func (v Verdict) Usable(subject, tenant string, now time.Time) error {
	switch {
	case v.Subject != subject:
		return fmt.Errorf("the verdict is about %s, not %s", v.Subject, subject)
	case v.Audience != tenant:
		return fmt.Errorf("the verdict is for %s, not %s", v.Audience, tenant)
	case now.Unix() >= v.Expires:
		return fmt.Errorf("the verdict expired at %s", utc(v.Expires))
	case !v.Affirming():
		return fmt.Errorf("the verdict is %s", Tier(v.Appraisal().Status))
	}
	return nil
}

// DataKey returns the key with this id (cose.Thumbprint), if the verdict vouches for
// it as one that signs data.
func (v Verdict) DataKey(kid []byte) (*ecdsa.PublicKey, error) {
	keys, err := v.DataKeys()
	if err != nil {
		return nil, err
	}
	for _, pub := range keys {
		if bytes.Equal(cose.Thumbprint(pub), kid) {
			return pub, nil
		}
	}
	return nil, fmt.Errorf("the verdict on %s does not vouch for the key that signed this", v.Subject)
}

// DataKeys returns the keys whose checkpoints the verdict vouches for: the epoch
// key and those of earlier epochs.
func (v Verdict) DataKeys() ([]*ecdsa.PublicKey, error) {
	out := make([]*ecdsa.PublicKey, 0, 1+len(v.Prior))
	for _, k := range append([]Key{v.Cnf.Key}, v.Prior...) {
		pub, err := cose.UnmarshalKey(k)
		if err != nil {
			return nil, fmt.Errorf("verdict: %w", err)
		}
		out = append(out, pub)
	}
	return out, nil
}

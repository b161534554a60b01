// Package attest is the format of challenge, evidence and verdict, and answers
// one question about evidence: is it genuine? Whether it is acceptable is the
// verifier's question. It is pure: bytes in, bytes out.
//
// # Challenge
//
// A COSE_Mac0 (typ TypChallenge) under a key of the verifier's replicas, so that
// any of them can check it without memory:
//
//	{1: tenant, 2: gateway, 3: nonce (32 random bytes), 4: issued, 5: expires
//	 (Unix seconds), 6: [+ PCR index]}
//
// # Evidence
//
// An EAT (RFC 9711) in a COSE_Sign1 by the epoch key (typ TypEvidence). Claims:
//
//	10 eat_nonce   the challenge's nonce
//	 8 cnf         {1: COSE_Key of the epoch key} (RFC 8747)
//	256 ueid       0x01 and the SHA-256 of the EK's SubjectPublicKeyInfo
//	265 eat_profile Profile
//	266 submods    {"tpm": claims below}
//	-70001 the challenge itself, as received
//	-70002 other confirmation keys: {"tls": COSE_Key, "receive": COSE_Key}
//	-70003 keys of earlier epochs whose data is still under way: [* COSE_Key]
//	-70004 epoch id; absent when the keep could not open its state
//	-70005 sequence of the newest command the keep accepted
//	-70006 SHA-256 of the trust roots the keep was configured with
//	-70007 {tstr => bool}: process hardening, as the keep found it
//	-70008 software name and version
//	-70009 [* [source, late]]: is each source within its freshness deadline
//	-70010 [* Workload]: the workload instances that are here
//
// Claims of the submodule "tpm":
//
//	-70101 AK, a TPMT_PUBLIC
//	-70102 quote: [TPMS_ATTEST, TPMT_SIGNATURE]
//	-70103 {PCR index => value}, SHA-256 bank
//	-70104 {purpose => [TPMT_PUBLIC, [TPMS_ATTEST, TPMT_SIGNATURE]]}: keys that
//	       the AK certified, under qualifying data KeyQualifier(purpose)
//
// The quote's qualifying data bind everything together:
//
//	SHA-256(CBOR [Context, challenge, [+ COSE_Key thumbprint], SHA-256 of the
//	claims without 266])
//
// where the thumbprints (RFC 9679) are of the epoch key and of the other
// confirmation keys in the order of their purposes' names.
//
// # Verdict
//
// An EAR (draft-ietf-rats-ear-04) with an AR4SI trustworthiness vector in a
// COSE_Sign1 by the verifier (typ TypVerdict): see Verdict.
package attest

import (
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"edgekeep/internal/cose"
	"edgekeep/tee/tpm"
)

// Types of the signed messages (COSE header 16), and the context of the binding.
const (
	TypChallenge = "application/edgekeep-challenge+cbor"
	TypEvidence  = "application/eat+cwt" // RFC 9782
	TypVerdict   = "application/ear+cwt" // ours: the draft has none of its own

	Profile        = "tag:edgekeep.example,2026:evidence#1"
	VerdictProfile = "tag:ietf.org,2026:rats/ear#04"
	Context        = "edgekeep evidence 1"
)

// Purposes of the confirmation keys beside the epoch key.
const (
	PurposeTLS     = "tls"     // MQTT client authentication; ECDSA P-256 in the TPM
	PurposeReceive = "receive" // HPKE; its P-256 half in the TPM
)

// Bounds of evidence.
const (
	MaxEvidence = 64 << 10
	maxPrior    = 256
	maxSources  = 64
	maxWorkload = 16
)

// Challenge is what evidence answers.
type Challenge struct {
	Tenant  string `cbor:"1,keyasint"`
	Gateway string `cbor:"2,keyasint"`
	Nonce   []byte `cbor:"3,keyasint"`
	Issued  int64  `cbor:"4,keyasint"`
	Expires int64  `cbor:"5,keyasint"`
	PCRs    []int  `cbor:"6,keyasint"`
}

// Marshal makes the message.
func (c Challenge) Marshal(key []byte) ([]byte, error) {
	return cose.Mac0(key, TypChallenge, cose.MustMarshal(c))
}

// VerifyChallenge checks a challenge's MAC and that now is within its life.
func VerifyChallenge(key, msg []byte, now time.Time) (Challenge, error) {
	payload, err := cose.VerifyMac0(key, TypChallenge, msg)
	if err != nil {
		return Challenge{}, fmt.Errorf("challenge: %w", err)
	}
	c, err := parseChallenge(payload)
	if err != nil {
		return c, err
	}
	if t := now.Unix(); t < c.Issued-5 || t >= c.Expires {
		return c, fmt.Errorf("challenge: valid from %s to %s, now it is %s", utc(c.Issued), utc(c.Expires), utc(t))
	}
	return c, nil
}

func utc(s int64) string { return time.Unix(s, 0).UTC().Format(time.RFC3339) }

// PeekChallenge reads a challenge without its key: all that a keep can do. What
// it learns is what is wanted, never whom to trust.
func PeekChallenge(msg []byte) (Challenge, error) {
	payload, err := cose.PeekMac0(TypChallenge, msg)
	if err != nil {
		return Challenge{}, fmt.Errorf("challenge: %w", err)
	}
	return parseChallenge(payload)
}

func parseChallenge(payload []byte) (Challenge, error) {
	var c Challenge
	if err := cose.Unmarshal(payload, &c); err != nil {
		return c, fmt.Errorf("challenge: %w", err)
	}
	if len(c.Nonce) != 32 || !ValidName(c.Tenant) || !ValidName(c.Gateway) || len(c.PCRs) == 0 || len(c.PCRs) > 24 || c.Expires <= c.Issued {
		return c, errors.New("challenge: a field is missing or of the wrong size")
	}
	if !slices.IsSorted(c.PCRs) || len(slices.Compact(slices.Clone(c.PCRs))) != len(c.PCRs) || c.PCRs[0] < 0 || c.PCRs[len(c.PCRs)-1] > 23 {
		return c, errors.New("challenge: PCRs are not an ascending set of 0 to 23")
	}
	return c, nil
}

// ValidName reports whether a tenant's or gateway's name may be used: 1 to 31
// letters, digits and hyphens. Such a name is safe in a topic, a subject, a
// certificate's CN, a client id and a file name.
func ValidName(s string) bool {
	if len(s) == 0 || len(s) > 31 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// Key is a COSE_Key as bytes; it encodes as the map that it is.
type Key = cose.Raw

// Confirmation is the cnf claim (RFC 8747 §3.1).
type Confirmation struct {
	Key Key `cbor:"1,keyasint"`
}

// SourceHealth is one source's freshness.
type SourceHealth struct {
	_    struct{} `cbor:",toarray"`
	Name string
	Late bool
}

// Claims is the evidence's claims-set.
type Claims struct {
	Nonce     []byte          `cbor:"10,keyasint"`
	Cnf       Confirmation    `cbor:"8,keyasint"`
	UEID      []byte          `cbor:"256,keyasint"`
	Profile   string          `cbor:"265,keyasint"`
	Submods   *Submods        `cbor:"266,keyasint,omitempty"`
	Challenge []byte          `cbor:"-70001,keyasint"`
	Keys      map[string]Key  `cbor:"-70002,keyasint,omitempty"`
	Prior     []Key           `cbor:"-70003,keyasint,omitempty"`
	Epoch     []byte          `cbor:"-70004,keyasint,omitempty"`
	Command   uint64          `cbor:"-70005,keyasint"`
	Roots     []byte          `cbor:"-70006,keyasint"`
	Hardening map[string]bool `cbor:"-70007,keyasint,omitempty"`
	Software  string          `cbor:"-70008,keyasint"`
	Sources   []SourceHealth  `cbor:"-70009,keyasint,omitempty"`
	Workloads []Workload      `cbor:"-70010,keyasint,omitempty"`
}

// Workload is what a keep says of a workload instance. The manifest, and with it
// everything that the bundle is made of, is pinned by the bundle id; a verifier
// that has the module can compute Rewritten itself.
type Workload struct {
	Instance   string   `cbor:"1,keyasint"`
	Bundle     []byte   `cbor:"2,keyasint"` // SHA-256 of the signed manifest
	Module     []byte   `cbor:"3,keyasint"` // SHA-256
	Models     [][]byte `cbor:"4,keyasint,omitempty"`
	Epoch      uint64   `cbor:"5,keyasint"`
	Phase      string   `cbor:"6,keyasint"`
	Running    bool     `cbor:"7,keyasint"`
	Rewriter   string   `cbor:"8,keyasint,omitempty"`  // version of what made Rewritten of Module
	Rewritten  []byte   `cbor:"9,keyasint,omitempty"`  // SHA-256 of what runs
	Compiler   bool     `cbor:"10,keyasint"`           // or interpreted
	Protection string   `cbor:"11,keyasint,omitempty"` // of guest memory
	Failures   uint64   `cbor:"12,keyasint"`
	Reason     string   `cbor:"13,keyasint,omitempty"` // of the last failure
}

// Submods is the submods claim.
type Submods struct {
	TPM TPM `cbor:"tpm"`
}

// TPM is the claims-set of the TPM submodule.
type TPM struct {
	AK        []byte               `cbor:"-70101,keyasint"`
	Quote     tpm.Signed           `cbor:"-70102,keyasint"`
	PCRs      map[int][]byte       `cbor:"-70103,keyasint"`
	Certified map[string]Certified `cbor:"-70104,keyasint,omitempty"`
}

// Certified is a key with the AK's word for it.
type Certified struct {
	_      struct{} `cbor:",toarray"`
	Public []byte   // TPMT_PUBLIC
	By     tpm.Signed
}

// KeyQualifier is the qualifying data under which the AK certifies a key, so
// that a key cannot be passed off for another purpose.
func KeyQualifier(purpose string) []byte {
	sum := sha256.Sum256(cose.MustMarshal([]string{Context, purpose}))
	return sum[:]
}

// Binding computes the quote's qualifying data from claims without submodules.
func (c Claims) Binding() ([]byte, error) {
	c.Submods = nil
	digest := sha256.Sum256(cose.MustMarshal(c))
	epochKey, err := cose.UnmarshalKey(c.Cnf.Key)
	if err != nil {
		return nil, fmt.Errorf("confirmation key: %w", err)
	}
	prints := [][]byte{cose.Thumbprint(epochKey)}
	for _, purpose := range slices.Sorted(maps.Keys(c.Keys)) {
		id, err := keyID(purpose, c.Keys[purpose])
		if err != nil {
			return nil, fmt.Errorf("%s key: %w", purpose, err)
		}
		prints = append(prints, id)
	}
	sum := sha256.Sum256(cose.MustMarshal([]any{Context, c.Challenge, prints, digest[:]}))
	return sum[:], nil
}

func keyID(purpose string, k Key) ([]byte, error) {
	switch purpose {
	case PurposeTLS:
		pub, err := cose.UnmarshalKey(k)
		if err != nil {
			return nil, err
		}
		return cose.Thumbprint(pub), nil
	case PurposeReceive:
		pub, err := cose.UnmarshalHPKEKey(k)
		if err != nil {
			return nil, err
		}
		return cose.HPKEKeyID(pub), nil
	}
	return nil, fmt.Errorf("unknown purpose %q", purpose)
}

// ParseClaims decodes evidence without verifying anything.
func ParseClaims(evidence []byte) (Claims, error) {
	var c Claims
	if len(evidence) > MaxEvidence {
		return c, fmt.Errorf("evidence: %d bytes, at most %d", len(evidence), MaxEvidence)
	}
	h, payload, err := cose.Peek1(evidence)
	if err != nil {
		return c, fmt.Errorf("evidence: %w", err)
	}
	if h.Typ != TypEvidence {
		return c, fmt.Errorf("evidence: its type is %q", h.Typ)
	}
	if err := cose.Unmarshal(payload, &c); err != nil {
		return c, fmt.Errorf("evidence: %w", err)
	}
	switch {
	case c.Profile != Profile:
		err = fmt.Errorf("profile %q is not known", c.Profile)
	case c.Submods == nil:
		err = errors.New("it has no submodule")
	case len(c.UEID) != 33 || c.UEID[0] != 1:
		err = errors.New("the ueid is not of type RAND with 32 bytes")
	case len(c.Prior) > maxPrior || len(c.Sources) > maxSources || len(c.Workloads) > maxWorkload:
		err = errors.New("too many prior keys, sources or workloads")
	case !validPCRs(c.Submods.TPM.PCRs):
		err = errors.New("a PCR is not of 0 to 23 or its value not of 32 bytes")
	case len(c.Epoch) != 0 && len(c.Epoch) != 16:
		err = errors.New("the epoch id is not of 16 bytes")
	}
	if err != nil {
		return c, fmt.Errorf("evidence: %w", err)
	}
	return c, nil
}

func validPCRs(values map[int][]byte) bool {
	for p, v := range values {
		if p < 0 || p > 23 || len(v) != sha256.Size {
			return false
		}
	}
	return true
}

// Check is one thing that was checked, and what was found.
type Check struct {
	_      struct{} `cbor:",toarray"`
	Name   string
	Result string // "ok", "failed" or "skipped"
	Detail string // what was found and against what it was held
}

// Results of a check.
const (
	OK      = "ok"
	Failed  = "failed"
	Skipped = "skipped"
)

// Params is what evidence is held against.
type Params struct {
	ChallengeKey []byte    // nil: the challenge's MAC and life are not checked (offline)
	Now          time.Time // for the challenge's life
	AKName       []byte    // nil: any AK; the caller decides whether that is right
}

// Genuine is what genuine evidence says.
type Genuine struct {
	Claims    Claims
	Challenge Challenge
	EpochKey  *ecdsa.PublicKey
	TLSKey    *ecdsa.PublicKey // nil if there is none
	Receive   hpke.PublicKey   // nil if there is none
	Quoted    tpm.Quoted
	Checks    []Check
}

// Verify checks that evidence is genuine: every signature in it, its freshness,
// and that all its parts are bound to the challenge and to the epoch key. The
// checks are listed in the result whether they pass or not; the error is the
// first that failed. What cannot be decoded at all has no checks.
func Verify(evidence []byte, p Params) (Genuine, error) {
	c, err := ParseClaims(evidence)
	if err != nil {
		return Genuine{}, err
	}
	v := verification{g: Genuine{Claims: c}}
	v.signature(evidence)
	v.freshness(p)
	v.quote(p)
	v.keys()
	return v.g, v.err
}

type verification struct {
	g   Genuine
	err error
}

func (v *verification) check(name string, err error, detail string) {
	c := Check{Name: name, Result: OK, Detail: detail}
	if err != nil {
		c.Result, c.Detail = Failed, err.Error()
		if v.err == nil {
			v.err = fmt.Errorf("%s: %w", name, err)
		}
	}
	v.g.Checks = append(v.g.Checks, c)
}

func (v *verification) signature(evidence []byte) {
	key, err := cose.UnmarshalKey(v.g.Claims.Cnf.Key)
	if err == nil {
		v.g.EpochKey = key
		_, err = cose.Verify1(key, TypEvidence, evidence)
	}
	v.check("signature", err, "COSE_Sign1 verifies with the epoch key")
	for _, k := range v.g.Claims.Prior {
		if _, err := cose.UnmarshalKey(k); err != nil {
			v.check("prior keys", err, "")
		}
	}
}

func (v *verification) freshness(p Params) {
	var err error
	if p.ChallengeKey == nil {
		v.g.Challenge, err = PeekChallenge(v.g.Claims.Challenge)
		if err == nil {
			v.g.Checks = append(v.g.Checks, Check{Name: "challenge", Result: Skipped, Detail: "not checked here: only the verifier has the key of its challenges"})
		} else {
			v.check("challenge", err, "")
		}
	} else {
		v.g.Challenge, err = VerifyChallenge(p.ChallengeKey, v.g.Claims.Challenge, p.Now)
		v.check("challenge", err, fmt.Sprintf("ours, issued %s, for %s/%s", utc(v.g.Challenge.Issued), v.g.Challenge.Tenant, v.g.Challenge.Gateway))
	}
	err = nil
	if !slices.Equal(v.g.Claims.Nonce, v.g.Challenge.Nonce) {
		err = errors.New("eat_nonce is not the challenge's nonce")
	}
	v.check("nonce", err, "eat_nonce is the challenge's")
}

func (v *verification) quote(p Params) {
	t := v.g.Claims.Submods.TPM
	err := tpm.CheckAK(t.AK)
	v.check("ak", err, "restricted ECDSA P-256, bound to its TPM")
	if err != nil {
		return
	}
	if p.AKName != nil {
		name, err := tpm.Name(t.AK)
		if err == nil && !slices.Equal(name, p.AKName) {
			err = fmt.Errorf("AK %x is not the one enrolled, %x", name, p.AKName)
		}
		v.check("ak enrolled", err, fmt.Sprintf("AK name %x", p.AKName))
	}
	binding, err := v.g.Claims.Binding()
	if err == nil {
		v.g.Quoted, err = tpm.CheckQuote(t.AK, t.Quote, binding, t.PCRs)
	}
	v.check("quote", err, fmt.Sprintf("TPM quote over PCRs %v, bound to challenge, keys and claims", v.g.Quoted.PCRs))
	if err == nil && !slices.Equal(v.g.Quoted.PCRs, v.g.Challenge.PCRs) {
		v.check("pcr selection", fmt.Errorf("quoted %v, wanted %v", v.g.Quoted.PCRs, v.g.Challenge.PCRs), "")
	}
}

// keys checks that every confirmation key beside the epoch key was certified by
// the AK and can be used only in the state that was quoted.
func (v *verification) keys() {
	t := v.g.Claims.Submods.TPM
	for _, purpose := range slices.Sorted(maps.Keys(v.g.Claims.Keys)) {
		err := v.certified(purpose, t)
		if errors.Is(err, tpm.ErrKeyPolicy) {
			// Genuine all the same: the machine changed under a running keep. The key is
			// left out of what is vouched for.
			v.g.Checks = append(v.g.Checks, Check{Name: purpose + " key", Result: Failed, Detail: err.Error()})
			continue
		}
		v.check(purpose+" key", err, "certified by the AK: in the TPM, bound to these PCRs and an auth value")
	}
	for purpose := range t.Certified {
		if _, ok := v.g.Claims.Keys[purpose]; !ok {
			v.check(purpose+" key", errors.New("certified but not claimed"), "")
		}
	}
}

func (v *verification) certified(purpose string, t TPM) error {
	c, ok := t.Certified[purpose]
	if !ok {
		return errors.New("not certified by the AK")
	}
	use := tpm.Signing
	if purpose == PurposeReceive {
		use = tpm.Agreement
	}
	pub, err := tpm.CheckCertified(t.AK, c.By, KeyQualifier(purpose), c.Public, use, t.PCRs)
	if err != nil {
		return err
	}
	switch purpose {
	case PurposeTLS:
		claimed, err := cose.UnmarshalKey(v.g.Claims.Keys[purpose])
		if err != nil {
			return err
		}
		if !pub.Equal(claimed) {
			return errors.New("the certified key is not the one claimed")
		}
		v.g.TLSKey = claimed
	case PurposeReceive:
		claimed, err := cose.UnmarshalHPKEKey(v.g.Claims.Keys[purpose])
		if err != nil {
			return err
		}
		// The hybrid public key is the ML-KEM encapsulation key and then the point.
		point, err := pub.Bytes()
		if err != nil {
			return err
		}
		raw := claimed.Bytes()
		if len(raw) <= len(point) || !slices.Equal(raw[len(raw)-len(point):], point) {
			return errors.New("the certified key is not the P-256 half of the one claimed")
		}
		v.g.Receive = claimed
	default:
		return fmt.Errorf("unknown purpose %q", purpose)
	}
	return nil
}

package verifier

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Policy is what a tenant accepts, from policy.toml in the tenant's directory.
type Policy struct {
	ID         string // "sha-256:" and the digest of the file
	Lifetime   time.Duration
	References []Reference
}

// Reference is one set of reference values, under a name for people.
type Reference struct {
	Name string
	PCRs map[int]string // SHA-256 bank, lower-case hexadecimal
}

type policyFile struct {
	Lifetime  string `toml:"lifetime"`
	Reference []struct {
		Name string            `toml:"name"`
		PCRs map[string]string `toml:"pcrs"`
	} `toml:"reference"`
}

// LoadPolicy reads a tenant's policy. No policy is a refusal.
func LoadPolicy(dir string) (Policy, error) {
	path := filepath.Join(dir, "policy.toml")
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return Policy{}, fmt.Errorf("there is no policy, so nothing is acceptable: write the reference values to %s", path)
	}
	if err != nil {
		return Policy{}, fmt.Errorf("reading the policy: %w", err)
	}
	p, err := ParsePolicy(raw)
	if err != nil {
		return Policy{}, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

// ParsePolicy decodes a policy file. All references name the same PCRs, so that
// a challenge can ask for them.
func ParsePolicy(raw []byte) (Policy, error) {
	var f policyFile
	md, err := toml.Decode(string(raw), &f)
	if err != nil {
		return Policy{}, err
	}
	if u := md.Undecoded(); len(u) > 0 {
		return Policy{}, fmt.Errorf("line %d: unknown key %q", line(raw, u[0][len(u[0])-1]), u[0].String())
	}
	sum := sha256.Sum256(raw)
	p := Policy{ID: "sha-256:" + hex.EncodeToString(sum[:])}
	if p.Lifetime, err = time.ParseDuration(f.Lifetime); err != nil || p.Lifetime < 10*time.Second || p.Lifetime > 24*time.Hour {
		return Policy{}, errors.New(`lifetime is missing or not between "10s" and "24h"`)
	}
	for _, r := range f.Reference {
		ref := Reference{Name: r.Name, PCRs: map[int]string{}}
		for k, v := range r.PCRs {
			i, err := strconv.Atoi(k)
			b, hexErr := hex.DecodeString(v)
			if err != nil || strconv.Itoa(i) != k || i < 0 || i > 15 || hexErr != nil || len(b) != 32 || strings.ToLower(v) != v {
				return Policy{}, fmt.Errorf("reference %q: pcr %q: 0 to 15, and 64 lower-case hexadecimal digits", r.Name, k)
			}
			ref.PCRs[i] = v
		}
		if r.Name == "" || len(ref.PCRs) == 0 {
			return Policy{}, errors.New("a reference without name or PCRs accepts nothing: remove it or fill it in")
		}
		if !measured(ref) {
			return Policy{}, fmt.Errorf("reference %q: all its PCRs are zero: a machine that measured nothing would be acceptable", r.Name)
		}
		p.References = append(p.References, ref)
	}
	if len(p.References) == 0 {
		return Policy{}, errors.New("it has no reference, so nothing is acceptable")
	}
	want := p.PCRs()
	for _, r := range p.References {
		if len(r.PCRs) != len(want) {
			return Policy{}, fmt.Errorf("reference %q names other PCRs than the others", r.Name)
		}
	}
	return p, nil
}

// line finds the first line that has a key or table of this name.
func line(raw []byte, key string) int {
	for i, l := range strings.Split(string(raw), "\n") {
		name, _, _ := strings.Cut(l, "=")
		if l = strings.Trim(name, " \t\r[]\"'"); l == key || strings.HasSuffix(l, "."+key) {
			return i + 1
		}
	}
	return 1
}

// measured reports whether any PCR of a reference was extended.
func measured(r Reference) bool {
	for _, v := range r.PCRs {
		if strings.Trim(v, "0") != "" {
			return true
		}
	}
	return false
}

// PCRs are the PCRs that any reference names, ascending.
func (p Policy) PCRs() []int {
	var out []int
	for _, r := range p.References {
		for i := range r.PCRs {
			if !slices.Contains(out, i) {
				out = append(out, i)
			}
		}
	}
	slices.Sort(out)
	return out
}

// Closest returns the reference that agrees with the most of these PCR values,
// and whether it agrees with all: a mixture of two references is neither.
func (p Policy) Closest(values map[int][]byte) (Reference, bool) {
	var best Reference
	most := -1
	for _, r := range p.References {
		n := 0
		for i, want := range r.PCRs {
			if hex.EncodeToString(values[i]) == want {
				n++
			}
		}
		if n > most {
			best, most = r, n
		}
	}
	return best, most == len(best.PCRs)
}

package verifier

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	zeros = "0000000000000000000000000000000000000000000000000000000000000000"
	ones  = "1111111111111111111111111111111111111111111111111111111111111111"
	twos  = "2222222222222222222222222222222222222222222222222222222222222222"
)

const example = `lifetime = "10m"
[[reference]]
name = "one"
[reference.pcrs]
0 = "` + ones + `"
7 = "` + zeros + `"
[[reference]]
name = "two"
pcrs = { 0 = "` + twos + `", 7 = "` + twos + `" }
`

func TestParsePolicy(t *testing.T) {
	p, err := ParsePolicy([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	if p.Lifetime != 10*time.Minute || len(p.References) != 2 || !slices.Equal(p.PCRs(), []int{0, 7}) || p.References[1].PCRs[7] != twos {
		t.Errorf("read %+v", p)
	}
	if want := "sha-256:"; !strings.HasPrefix(p.ID, want) || len(p.ID) != len(want)+64 {
		t.Errorf("its id is %s", p.ID)
	}
	q, err := ParsePolicy([]byte(example + "# a remark\n"))
	if err != nil || q.ID == p.ID {
		t.Errorf("another file has the same id: %v", err)
	}
}

func TestParsePolicyRefusals(t *testing.T) {
	for _, x := range []struct{ name, old, new, want string }{
		{"no lifetime", `lifetime = "10m"`, ``, "lifetime"},
		{"a lifetime without unit", `"10m"`, `"10"`, "lifetime"},
		{"a lifetime that is a number", `"10m"`, `10`, "line 1"},
		{"too short a life", `"10m"`, `"9s"`, "lifetime"},
		{"too long a life", `"10m"`, `"24h1s"`, "lifetime"},
		{"a negative life", `"10m"`, `"-10m"`, "lifetime"},
		{"an unknown key", `name = "one"`, "name = \"one\"\nname2 = \"x\"", `line 4: unknown key "reference.name2"`},
		{"an unknown key at the top", `lifetime`, "strict = true\nlifetime", `line 1: unknown key "strict"`},
		{"an unknown table", `[[reference]]`, "[other]\na = 1\n[[reference]]", `line 2: unknown key "other"`},
		{"a misspelt table", "[reference.pcrs]", "[reference.pcr]", `line 4: unknown key "reference.pcr"`},
		{"no name", `name = "one"`, ``, "without name"},
		{"no PCRs", `0 = "` + ones + "\"\n7 = \"" + zeros + `"`, ``, "without name or PCRs"},
		{"a PCR that can be reset", `7 = "` + zeros, `16 = "` + zeros, `pcr "16"`},
		{"PCR 23", `7 = "` + zeros, `23 = "` + zeros, `pcr "23"`},
		{"a negative PCR", `7 = "` + zeros, `-1 = "` + zeros, `pcr "-1"`},
		{"a PCR in words", `7 = "` + zeros, `seven = "` + zeros, `pcr "seven"`},
		{"a PCR spelt otherwise", `7 = "` + zeros, `07 = "` + zeros, `pcr "07"`},
		{"a PCR with a plus", `7 = "` + zeros, `"+7" = "` + zeros, `pcr "+7"`},
		{"one PCR in two spellings", `7 = "` + zeros, "\"07\" = \"" + twos + "\"\n7 = \"" + zeros, `pcr "07"`},
		{"one PCR twice", `7 = "` + zeros, "7 = \"" + twos + "\"\n7 = \"" + zeros, "line 7"},
		{"a short value", `7 = "00`, `7 = "`, `pcr "7"`},
		{"a long value", `7 = "`, `7 = "00`, `pcr "7"`},
		{"a value in capitals", `7 = "00`, `7 = "AA`, `pcr "7"`},
		{"a value that is no hexadecimal", `7 = "00`, `7 = "xx`, `pcr "7"`},
		{"a value that is a number", `7 = "` + zeros + `"`, `7 = 5`, "incompatible types"},
		{"other PCRs in one reference", `7 = "` + zeros, `8 = "` + zeros, "other PCRs"},
		{"a PCR less in one reference", "7 = \"" + zeros + "\"\n", ``, "other PCRs"},
		{"not TOML", `[[reference]]`, `[[reference`, "line 3"},
	} {
		text := strings.Replace(example, x.old, x.new, 1)
		if text == example {
			t.Fatalf("%s: nothing was replaced", x.name)
		}
		if _, err := ParsePolicy([]byte(text)); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: got %v, want %q", x.name, err, x.want)
		}
	}
	for _, text := range []string{"", `lifetime = "10m"`} {
		if _, err := ParsePolicy([]byte(text)); err == nil {
			t.Errorf("%q accepts something", text)
		}
	}
}

func TestLoadPolicy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.toml")
	if _, err := LoadPolicy(dir); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("no policy: %v", err)
	}
	if err := os.WriteFile(path, []byte(example+"oops = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadPolicy(dir); err == nil || !strings.Contains(err.Error(), path+": line 10: unknown key") {
		t.Errorf("a bad policy: %v", err)
	}
	raw, err := os.ReadFile("../../configs/policy.toml")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := LoadPolicy(dir); err != nil || len(p.References) != 1 {
		t.Errorf("the example: %v", err)
	}
}

func TestClosest(t *testing.T) {
	p := Policy{References: []Reference{
		{Name: "one", PCRs: map[int]string{0: ones, 4: ones, 7: ones}},
		{Name: "two", PCRs: map[int]string{0: twos, 4: twos, 7: twos}},
	}}
	value := func(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }
	for _, x := range []struct {
		name   string
		values map[int][]byte
		want   string
		all    bool
	}{
		{"the first", map[int][]byte{0: value(0x11), 4: value(0x11), 7: value(0x11)}, "one", true},
		{"the second", map[int][]byte{0: value(0x22), 4: value(0x22), 7: value(0x22)}, "two", true},
		{"a mixture, more of the first", map[int][]byte{0: value(0x11), 4: value(0x22), 7: value(0x11)}, "one", false},
		{"a mixture, more of the second", map[int][]byte{0: value(0x22), 4: value(0x22), 7: value(0x11)}, "two", false},
		{"neither", map[int][]byte{0: value(0x33), 4: value(0x33), 7: value(0x33)}, "one", false},
		{"a value less", map[int][]byte{0: value(0x22), 4: value(0x22)}, "two", false},
		{"a value more", map[int][]byte{0: value(0x22), 4: value(0x22), 7: value(0x22), 8: value(9)}, "two", true},
		{"nothing", nil, "one", false},
		{"a short value", map[int][]byte{0: value(0x11)[:31], 4: value(0x11), 7: value(0x11)}, "one", false},
	} {
		got, all := p.Closest(x.values)
		if all != x.all || got.Name != x.want {
			t.Errorf("%s: got %q, %v", x.name, got.Name, all)
		}
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte("lifetime = \"1h\"\n[[reference]]\nname = \"a\"\npcrs = { 0 = \"" + zeros + "\" }\n"))
	f.Add([]byte("[[reference]]\n[reference.pcrs]\n\"01\" = \"\"\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := ParsePolicy(raw)
		if err != nil {
			return
		}
		q, err := ParsePolicy(raw)
		if err != nil || q.ID != p.ID || fmt.Sprint(q) != fmt.Sprint(p) {
			t.Fatalf("read again it is another: %v", err)
		}
		if p.Lifetime < 10*time.Second || p.Lifetime > 24*time.Hour || len(p.References) == 0 {
			t.Fatalf("accepted %+v", p)
		}
		for _, r := range p.References {
			if !slices.Equal(slices.Sorted(maps.Keys(r.PCRs)), p.PCRs()) || len(r.PCRs) == 0 {
				t.Fatal("references name different PCRs")
			}
			values := map[int][]byte{}
			for i, v := range r.PCRs {
				b, err := hex.DecodeString(v)
				if err != nil || i < 0 || i > 15 || len(b) != 32 {
					t.Fatalf("PCR %d is %q", i, v)
				}
				values[i] = b
			}
			if _, all := p.Closest(values); !all {
				t.Fatal("a reference does not agree with itself")
			}
		}
	})
}

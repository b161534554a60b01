package wasi

import (
	"strings"
	"unicode/utf8"
)

const maxFollowed = 40 // symbolic links in one path

// place is what a path leads to.
type place struct {
	parent *inode // the directory that has, or would have, the name
	name   string // "" when the path ends in "." or ".."
	node   *inode // nil when there is none
	dots   string // "." or ".." at the end
	slash  bool   // after the name
}

// last says what happens to a symbolic link at the end of a path.
type last int

const (
	keepLast   last = iota // it is meant itself, even with a slash after it: to make, remove, rename
	noFollow               // followed only with a slash after it
	followLast             // always followed
	createLast             // followed unless a slash is after it: no file can be made there
)

func (m last) follows(slash bool) bool {
	return m == followLast || m == createLast && !slash || m == noFollow && slash
}

// checkPath refuses what no path can be.
func checkPath(path string) errno {
	switch {
	case path == "":
		return eNOENT
	case len(path) > maxPath:
		return eNAMETOOLONG
	case !utf8.ValidString(path):
		return eILSEQ
	case strings.IndexByte(path, 0) >= 0:
		return eINVAL
	case path[0] == '/':
		return eNOTCAPABLE
	}
	return success
}

func validName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxName &&
		utf8.ValidString(name) && !strings.ContainsAny(name, "/\x00")
}

// find walks a path from base and never above it.
func find(base *inode, path string, mode last) (place, errno) {
	if err := checkPath(path); err != 0 {
		return place{}, err
	}
	at, rest, followed := base, path, 0
	slash := strings.HasSuffix(path, "/")
	for {
		name, after, _ := strings.Cut(rest, "/")
		rest = strings.TrimLeft(after, "/")
		if len(name) > maxName {
			return place{}, eNAMETOOLONG
		}
		if name == "." || name == ".." {
			if name == ".." {
				if at == base {
					return place{}, eNOTCAPABLE
				}
				at = at.parent
			}
			if rest == "" {
				return place{node: at, dots: name}, success
			}
			continue
		}
		node := at.lookup(name)
		if node != nil && node.kind == kindLink && (rest != "" || mode.follows(slash)) {
			if followed++; followed > maxFollowed {
				return place{}, eLOOP
			}
			if rest == "" {
				slash = slash || strings.HasSuffix(node.target, "/")
				rest = node.target
			} else {
				rest = node.target + "/" + rest
			}
			continue
		}
		if rest == "" {
			p := place{parent: at, name: name, node: node, slash: slash}
			if (mode == followLast || mode == noFollow) && slash && node != nil && node.kind != kindDir {
				return place{}, eNOTDIR
			}
			return p, success
		}
		if node == nil {
			return place{}, eNOENT
		}
		if node.kind != kindDir {
			return place{}, eNOTDIR
		}
		at = node
	}
}

package fsm

import (
	"encoding/hex"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/go-version"

	"rollcall/node/fault"
)

// invalid is a rejection in the contract's words.
func invalid(format string, args ...any) error { return fault.Text(fault.Invalid, format, args...) }

// pluginName is the shape of a plugin's name (CONTRACT 2.2).
var pluginName = regexp.MustCompile(`^\w(([\w.-]+)?\w)?$`)

// canonicalVersion returns v as "v1.2.3" with its pre-release and metadata; "" stays "".
func canonicalVersion(v string) (string, error) {
	if v == "" {
		return "", nil
	}
	if len(v) > maxHashes {
		return "", invalid("version %q is not a valid semantic version: too long", trim(v, maxHashes))
	}
	sv, err := version.NewSemver(v)
	if err != nil {
		return "", invalid("version %q is not a valid semantic version: malformed version: %s", v, v)
	}
	if slices.Contains(strings.Split(sv.Metadata(), "."), "builtin") {
		return "", invalid("version %q is not allowed because 'builtin' is a reserved metadata identifier", v)
	}
	return "v" + sv.String(), nil
}

// newer reports whether a is the higher of two canonical versions. Equal precedence (metadata) falls back to text, so
// that there is always one answer.
func newer(a, b string) bool {
	va, ea := version.NewSemver(a)
	vb, eb := version.NewSemver(b)
	if ea != nil || eb != nil {
		return eb != nil && (ea == nil || a > b)
	}
	if c := va.Compare(vb); c != 0 {
		return c > 0
	}
	return a > b
}

// plain reports whether a name may be part of a key: no control bytes, bounded.
func plain(s string, limit int) bool {
	if len(s) > limit || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if r < 0x20 || r == 0x7f {
			return false
		}
	}
	return true
}

func validSHA256(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 32 && strings.ToLower(s) == s
}

// trim shortens s to at most n bytes without cutting a character.
func trim(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// dotted reports whether a slash-separated path has an element "." or "..", or an empty one inside.
func dotted(path string) bool {
	for el := range strings.SplitSeq(strings.TrimSuffix(path, "/"), "/") {
		if el == "" || el == "." || el == ".." {
			return true
		}
	}
	return false
}

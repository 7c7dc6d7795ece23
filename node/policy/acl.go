package policy

import (
	"cmp"
	"slices"
	"strings"
	"sync"

	"rollcall/fsm"
)

// Engine keeps parsed policies, so that a decision parses nothing. It holds no decision: the view does.
type Engine struct {
	mu     sync.Mutex
	parsed map[parsedKey]*Policy
}

type parsedKey struct {
	namespace, name string
	index           uint64
}

// maxParsed bounds the cache; when it is full, it starts again.
const maxParsed = 4096

// NewEngine makes an empty one. Its methods may be called from any goroutine.
func NewEngine() *Engine { return &Engine{parsed: map[parsedKey]*Policy{}} }

// find returns a policy of a namespace, parsed; nil where there is none. A stored text that cannot be parsed (no version of
// this program stores one) grants nothing.
func (e *Engine) find(view *fsm.View, namespace, name string) *Policy {
	row := view.Policy(namespace, name)
	if row == nil {
		if name == Default {
			return builtinDefault
		}
		return nil
	}
	k := parsedKey{namespace, name, row.GetIndex()}
	e.mu.Lock()
	p, ok := e.parsed[k]
	e.mu.Unlock()
	if ok {
		return p
	}
	p, err := Parse(row.GetText())
	if err != nil {
		p = &Policy{}
	}
	e.mu.Lock()
	if len(e.parsed) >= maxParsed {
		clear(e.parsed)
	}
	e.parsed[k] = p
	e.mu.Unlock()
	return p
}

// scoped is a rule with the namespace that its path begins in.
type scoped struct {
	namespace string
	*Rule
}

func (e *Engine) rules(view *fsm.View, namespace string, names []string) []scoped {
	var out []scoped
	for _, n := range names {
		if p := e.find(view, namespace, n); p != nil {
			for i := range p.Rules {
				out = append(out, scoped{namespace, &p.Rules[i]})
			}
		}
	}
	return out
}

// matches reports whether a rule's pattern covers a full path (namespace and all).
func (s scoped) matches(full string) bool {
	rest, ok := strings.CutPrefix(full, s.namespace)
	return ok && s.pattern.matches(rest)
}

// permission is what the rules of one pattern grant together.
type permission struct {
	caps       map[Capability]bool
	parameters []*parameters
}

// best finds the pattern that decides about a path, by Vault's priorities, and merges every rule that has it. list says that
// the path may be meant with and without its trailing slash. nil when nothing matches.
func best(rules []scoped, full string, list bool) *permission {
	var top *pattern
	find := func(path string) {
		for _, r := range rules {
			if r.matches(path) && (top == nil || r.pattern.outranks(top)) {
				top = &r.pattern
			}
		}
	}
	find(full)
	bare := strings.TrimSuffix(full, "/")
	if list && bare != full && (top == nil || !top.exact()) {
		// A list names "secret/x/" what other calls name "secret/x": an exact rule for the latter decides about both.
		for _, r := range rules {
			if r.pattern.exact() && r.matches(bare) {
				top = &r.pattern
			}
		}
	}
	if top == nil {
		return nil
	}
	p := &permission{caps: map[Capability]bool{}}
	for _, r := range rules {
		if r.pattern.text != top.text {
			continue
		}
		for _, c := range r.Capabilities {
			p.caps[c] = true
		}
		p.parameters = append(p.parameters, &r.parameters)
	}
	return p
}

// decide is the whole decision. Deny wins: also where the path is denied under its other spelling, with or without a
// trailing slash, because plugins may take the two for the same.
func decide(rules []scoped, q Query) bool {
	full := q.Namespace + q.Path
	for _, spelling := range []string{strings.TrimSuffix(full, "/"), strings.TrimSuffix(full, "/") + "/"} {
		for _, r := range rules {
			if slices.Contains(r.Capabilities, Deny) && r.pattern.exact() && r.matches(spelling) {
				return false
			}
		}
	}
	p := best(rules, full, q.Need == List)
	if p == nil || p.caps[Deny] || !p.caps[q.Need] {
		return false
	}
	return checkWrap(p.parameters, q.WrapTTL) && checkParameters(p.parameters, q)
}

// pattern is the path of a rule.
type pattern struct {
	text string
	// glob: the text without its "*" is a prefix.
	glob     bool
	prefix   string
	segments []string // only where a segment is "+"
	plus     int
	first    int // position of the first wildcard; len(text) when there is none
}

func newPattern(text string) pattern {
	p := pattern{text: text, first: len(text)}
	p.prefix, p.glob = strings.CutSuffix(text, "*")
	if p.glob {
		p.first = len(p.prefix)
	}
	at := 0
	segments := strings.Split(p.prefix, "/")
	for _, s := range segments {
		if s == "+" {
			if p.plus == 0 {
				p.first = min(p.first, at)
			}
			p.plus++
		}
		at += len(s) + 1
	}
	if p.plus > 0 {
		p.segments = segments
	}
	return p
}

func (p *pattern) exact() bool { return !p.glob && p.plus == 0 }

func (p *pattern) matches(path string) bool {
	switch {
	case p.plus > 0:
		return p.matchSegments(strings.Split(path, "/"))
	case p.glob:
		return strings.HasPrefix(path, p.prefix)
	default:
		return path == p.text
	}
}

func (p *pattern) matchSegments(path []string) bool {
	if len(path) < len(p.segments) || !p.glob && len(path) != len(p.segments) {
		return false
	}
	for i, want := range p.segments {
		switch {
		case want == "+":
			if path[i] == "" {
				return false
			}
		case p.glob && i == len(p.segments)-1:
			if !strings.HasPrefix(path[i], want) {
				return false
			}
		case want != path[i]:
			return false
		}
	}
	return true
}

// outranks orders patterns that match the same path, as Vault's documents state it: the one whose first wildcard comes
// later, then the one without a glob, then the one with fewer "+", then the longer, then the greater text.
func (p *pattern) outranks(q *pattern) bool {
	if p.exact() != q.exact() {
		return p.exact()
	}
	glob := func(x *pattern) int {
		if x.glob {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(p.first, q.first), cmp.Compare(glob(p), glob(q)), cmp.Compare(q.plus, p.plus),
		cmp.Compare(len(p.text), len(q.text)), strings.Compare(p.text, q.text)) > 0
}

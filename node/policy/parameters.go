package policy

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"time"
)

// checkWrap holds the wrapping that the caller asked for against the narrowest bounds of the rules.
func checkWrap(rules []*parameters, ttl time.Duration) bool {
	for _, p := range rules {
		if p.minWrap > 0 && ttl < p.minWrap || p.maxWrap > 0 && (ttl <= 0 || ttl > p.maxWrap) {
			return false
		}
	}
	return true
}

// checkParameters decides as Vault does: for calls that write, over the union of the rules that share a pattern.
func checkParameters(rules []*parameters, q Query) bool {
	if q.Need != Create && q.Need != Update && q.Need != Patch {
		return true
	}
	named := map[string]json.RawMessage{}
	if q.Data != nil && slices.ContainsFunc(rules, (*parameters).restrict) {
		for k, v := range q.Data() {
			named[strings.ToLower(k)] = v
		}
	}
	allowed, denied := map[string][]json.RawMessage{}, map[string][]json.RawMessage{}
	for _, p := range rules {
		for _, name := range p.required {
			if _, ok := named[name]; !ok {
				return false
			}
		}
		merge(allowed, p.allowed)
		merge(denied, p.denied)
	}
	if len(named) == 0 {
		return true
	}
	if _, all := denied["*"]; all {
		return false
	}
	for name, value := range named {
		if values, ok := denied[name]; ok && (len(values) == 0 || contains(values, value)) {
			return false
		}
	}
	if len(allowed) == 0 {
		return true
	}
	_, all := allowed["*"]
	for name, value := range named {
		values, ok := allowed[name]
		if !ok && !all || ok && len(values) > 0 && !contains(values, value) {
			return false
		}
	}
	return true
}

func (p *parameters) restrict() bool { return len(p.allowed)+len(p.denied)+len(p.required) > 0 }

// merge unites the lists of a name; an empty one stands for every value.
func merge(into, from map[string][]json.RawMessage) {
	for name, values := range from {
		old, ok := into[name]
		if ok && len(old) == 0 || len(values) == 0 {
			into[name] = nil
			continue
		}
		into[name] = append(slices.Clone(old), values...)
	}
}

// contains compares values; a string with "*" at an end is a glob.
func contains(values []json.RawMessage, v json.RawMessage) bool {
	var s string
	isString := json.Unmarshal(v, &s) == nil
	for _, want := range values {
		var w string
		if json.Unmarshal(want, &w) == nil {
			if isString && globs(w, s) {
				return true
			}
			continue
		}
		if bytes.Equal(compact(want), compact(v)) {
			return true
		}
	}
	return false
}

func globs(pattern, s string) bool {
	rest, before := strings.CutPrefix(pattern, "*")
	rest, after := strings.CutSuffix(rest, "*")
	switch {
	case pattern == "*":
		return true
	case before && after:
		return strings.Contains(s, rest)
	case before:
		return strings.HasSuffix(s, rest)
	case after:
		return strings.HasPrefix(s, rest)
	default:
		return s == pattern
	}
}

func compact(raw json.RawMessage) []byte {
	var v any
	if json.Unmarshal(raw, &v) != nil {
		return raw
	}
	out, err := json.Marshal(v)
	if err != nil {
		return raw
	}
	return out
}

package policy

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	hcljson "github.com/hashicorp/hcl/v2/json"
	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"

	"rollcall/node/fault"
)

// Policy is a parsed text.
type Policy struct {
	Rules []Rule
}

// Rule is one path of a policy.
type Rule struct {
	pattern      pattern
	Capabilities []Capability
	parameters   parameters
}

// Path is the rule's pattern as it was written, without a leading slash.
func (r *Rule) Path() string { return r.pattern.text }

// parameters are what a rule demands of a call besides its path.
type parameters struct {
	allowed, denied map[string][]json.RawMessage // by lower-case name
	required        []string
	minWrap         time.Duration
	maxWrap         time.Duration
}

// maxNesting bounds a text before the parser recurses into it.
const maxNesting = 32

var capabilities = []Capability{Create, Read, Update, Delete, List, Patch, Sudo, Deny}

// legacy are the grants of the old "policy" attribute.
var legacy = map[string][]Capability{
	"deny":  {Deny},
	"read":  {Read, List},
	"write": {Create, Read, Update, Delete, List},
	"sudo":  {Create, Read, Update, Delete, List, Sudo},
}

// withoutMeaning are attributes of the two servers' languages that rollcall has nothing for. A text that names one is
// refused: to leave out what restricts would grant more than was written.
var withoutMeaning = map[string]string{
	"control_group":         "there are no control groups",
	"mfa_methods":           "there is no multi-factor authentication",
	"expiration":            "rules do not expire; delete the policy instead",
	"pagination_limit":      "lists are not paged",
	"subscribe_event_types": "events are read by path",
}

func broken(format string, args ...any) error {
	return fault.Text(fault.Invalid, "failed to parse policy: %s", fmt.Sprintf(format, args...))
}

// Parse reads a policy in HCL or JSON. Errors are fault.Invalid in the contract's words, with the line.
func Parse(text string) (*Policy, error) {
	parse, check := hclsyntax.ParseConfig, checkTokens
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		check = checkBrackets
		parse = func(src []byte, name string, _ hcl.Pos) (*hcl.File, hcl.Diagnostics) { return hcljson.Parse(src, name) }
	}
	if err := check(text); err != nil {
		return nil, err
	}
	file, diags := parse([]byte(text), "policy", hcl.InitialPos)
	if diags.HasErrors() {
		return nil, broken("%s", firstError(diags))
	}
	content, diags := file.Body.Content(&hcl.BodySchema{
		Attributes: []hcl.AttributeSchema{{Name: "name"}},
		Blocks:     []hcl.BlockHeaderSchema{{Type: "path", LabelNames: []string{"pattern"}}},
	})
	if diags.HasErrors() {
		return nil, broken("%s", firstError(diags))
	}
	p := &Policy{}
	for _, b := range content.Blocks {
		r, err := parseRule(b)
		if err != nil {
			return nil, err
		}
		p.Rules = append(p.Rules, *r)
	}
	return p, nil
}

// literals are the tokens that a policy is made of: nothing in it is computed, and so no parser recurses but into brackets.
var literals = []hclsyntax.TokenType{
	hclsyntax.TokenOBrace, hclsyntax.TokenCBrace, hclsyntax.TokenOBrack, hclsyntax.TokenCBrack, hclsyntax.TokenOQuote,
	hclsyntax.TokenCQuote, hclsyntax.TokenQuotedLit, hclsyntax.TokenStringLit, hclsyntax.TokenNumberLit,
	hclsyntax.TokenIdent, hclsyntax.TokenEqual, hclsyntax.TokenComma, hclsyntax.TokenColon, hclsyntax.TokenNewline,
	hclsyntax.TokenComment, hclsyntax.TokenEOF, hclsyntax.TokenOHeredoc, hclsyntax.TokenCHeredoc,
}

// checkTokens refuses what is no literal, and what would make a recursive parser run out of stack.
func checkTokens(text string) error {
	tokens, _ := hclsyntax.LexConfig([]byte(text), "policy", hcl.InitialPos) // the parser reports what is wrong here
	depth := 0
	for _, t := range tokens {
		switch t.Type {
		case hclsyntax.TokenOBrace, hclsyntax.TokenOBrack:
			depth++
		case hclsyntax.TokenCBrace, hclsyntax.TokenCBrack:
			depth = max(0, depth-1)
		case hclsyntax.TokenTemplateInterp, hclsyntax.TokenTemplateControl:
			return broken("line %d: %q begins a template, and nothing in a policy is computed; write $${ for the characters",
				t.Range.Start.Line, t.Bytes)
		default: // a literal, or the parser's business
		}
		switch {
		case depth > maxNesting:
			return broken("line %d: nested deeper than %d levels", t.Range.Start.Line, maxNesting)
		case !slices.Contains(literals, t.Type):
			return broken("line %d: unexpected %q: a policy is made of literals", t.Range.Start.Line, t.Bytes)
		}
	}
	return nil
}

// checkBrackets is checkTokens for JSON. It counts brackets wherever they stand.
func checkBrackets(text string) error {
	depth := 0
	for _, c := range []byte(text) {
		switch c {
		case '{', '[':
			if depth++; depth > maxNesting {
				return broken("nested deeper than %d levels", maxNesting)
			}
		case '}', ']':
			depth = max(0, depth-1)
		}
	}
	return nil
}

func firstError(diags hcl.Diagnostics) string {
	for _, d := range diags {
		if d.Severity != hcl.DiagError {
			continue
		}
		text := d.Summary
		if d.Detail != "" {
			text += ": " + d.Detail
		}
		if d.Subject != nil {
			text = fmt.Sprintf("line %d: %s", d.Subject.Start.Line, text)
		}
		return text
	}
	return "unknown error"
}

func parseRule(b *hcl.Block) (*Rule, error) {
	text := strings.TrimPrefix(b.Labels[0], "/")
	if err := checkPattern(text); err != nil {
		return nil, err
	}
	r := &Rule{pattern: newPattern(text)}
	attrs, diags := b.Body.JustAttributes()
	if diags.HasErrors() {
		for name, why := range withoutMeaning {
			if strings.Contains(firstError(diags), name) {
				return nil, broken("path %q: %s is not supported: %s", text, name, why)
			}
		}
		return nil, broken("path %q: %s", text, firstError(diags))
	}
	names := make([]string, 0, len(attrs))
	for name := range attrs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		v, diags := attrs[name].Expr.Value(nil)
		if diags.HasErrors() {
			return nil, broken("path %q: %s", text, firstError(diags))
		}
		if err := r.set(name, v); err != nil {
			return nil, broken("path %q: %s", text, err.Error())
		}
	}
	if slices.Contains(r.Capabilities, Deny) {
		r.Capabilities = []Capability{Deny}
		r.parameters = parameters{}
	}
	return r, nil
}

func checkPattern(text string) error {
	switch {
	case strings.Contains(text, "+*"):
		return broken("path %q: invalid use of wildcards ('+*' is forbidden)", text)
	case strings.Contains(strings.TrimSuffix(text, "*"), "*"):
		return broken("path %q: a '*' may stand only at the end; '+' stands for one whole segment", text)
	case strings.Contains(text, "{{"):
		return broken("path %q: templates need identities, which rollcall does not have", text)
	}
	for _, c := range []byte(text) {
		if c < ' ' || c == 0x7f {
			return broken("path %q holds a control character", text)
		}
	}
	for s := range strings.SplitSeq(text, "/") {
		if s == "." || s == ".." {
			return broken("path %q: no request has a segment %q, so it would never match", text, s)
		}
	}
	return nil
}

// set reads one attribute. Its errors name the attribute.
func (r *Rule) set(name string, v cty.Value) (err error) {
	if v.IsNull() || !v.IsWhollyKnown() {
		return fmt.Errorf("%s has no value", name)
	}
	switch name {
	case "capabilities":
		words, err := stringList(name, v)
		if err != nil {
			return err
		}
		for _, w := range words {
			c := Capability(strings.ToLower(w))
			if !slices.Contains(capabilities, c) {
				return fmt.Errorf("invalid capability %q", w)
			}
			r.Capabilities = append(r.Capabilities, c)
		}
	case "policy":
		word, err := oneString(name, v)
		if err != nil {
			return err
		}
		caps, ok := legacy[word]
		if !ok {
			return fmt.Errorf("invalid policy %q", word)
		}
		r.Capabilities = append(r.Capabilities, caps...)
	case "allowed_parameters":
		r.parameters.allowed, err = parameterMap(name, v)
	case "denied_parameters":
		r.parameters.denied, err = parameterMap(name, v)
	case "required_parameters":
		r.parameters.required, err = stringList(name, v)
		for i, s := range r.parameters.required {
			r.parameters.required[i] = strings.ToLower(s)
		}
	case "min_wrapping_ttl":
		r.parameters.minWrap, err = duration(name, v)
	case "max_wrapping_ttl":
		r.parameters.maxWrap, err = duration(name, v)
	case "comment":
	default:
		if why, ok := withoutMeaning[name]; ok {
			return fmt.Errorf("%s is not supported: %s", name, why)
		}
		return fmt.Errorf("invalid key %q", name)
	}
	if err == nil && r.parameters.maxWrap > 0 && r.parameters.minWrap > r.parameters.maxWrap {
		return fmt.Errorf("max_wrapping_ttl cannot be less than min_wrapping_ttl")
	}
	return err
}

func oneString(name string, v cty.Value) (string, error) {
	if v.Type() != cty.String {
		return "", fmt.Errorf("%s must be a string", name)
	}
	return v.AsString(), nil
}

func stringList(name string, v cty.Value) ([]string, error) {
	if !v.CanIterateElements() || v.Type().IsObjectType() || v.Type().IsMapType() {
		return nil, fmt.Errorf("%s must be a list of strings", name)
	}
	var out []string
	for _, e := range v.AsValueSlice() {
		if e.IsNull() || e.Type() != cty.String {
			return nil, fmt.Errorf("%s must be a list of strings", name)
		}
		out = append(out, e.AsString())
	}
	return out, nil
}

func parameterMap(name string, v cty.Value) (map[string][]json.RawMessage, error) {
	if !v.Type().IsObjectType() && !v.Type().IsMapType() {
		return nil, fmt.Errorf("%s must be an object of lists", name)
	}
	out := map[string][]json.RawMessage{}
	for key, list := range v.AsValueMap() {
		if list.IsNull() || !list.CanIterateElements() || list.Type().IsObjectType() || list.Type().IsMapType() {
			return nil, fmt.Errorf("%s: the values of %q must be a list", name, key)
		}
		values := []json.RawMessage{}
		for _, e := range list.AsValueSlice() {
			raw, err := ctyjson.Marshal(e, e.Type())
			if err != nil {
				return nil, fmt.Errorf("%s: a value of %q cannot be read", name, key)
			}
			values = append(values, raw)
		}
		out[strings.ToLower(key)] = values
	}
	return out, nil
}

func duration(name string, v cty.Value) (time.Duration, error) {
	if v.Type() == cty.Number {
		n, _ := v.AsBigFloat().Int64()
		if n < 0 || n > 1<<31 {
			return 0, fmt.Errorf("%s is out of range", name)
		}
		return time.Duration(n) * time.Second, nil
	}
	s, err := oneString(name, v)
	if err != nil {
		return 0, err
	}
	var n int64
	if _, err := fmt.Sscanf(s+"|", "%d|", &n); err == nil && n >= 0 && n < 1<<31 {
		return time.Duration(n) * time.Second, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%s must be a duration such as \"30s\"", name)
	}
	return d, nil
}

package httpd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"net/url"
	"sort"
	"strconv"
	"strings"
	"time"

	"rollcall/fsm"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// request is one authorised call of a system route: what the handler may use. It belongs to the handler's goroutine.
type request struct {
	ctx    context.Context
	http   *http.Request
	id     string
	ns     string
	path   string
	op     operation
	params map[string]string
	who    *policy.Identity
	// view is a consistent view, or this node's own for routes that answer without a leader.
	view *fsm.View
	// body is nil for routes that read it themselves.
	body *fields
	// wrapTTL is how long the caller wants the answer to be wrapped for; 0 for not at all.
	wrapTTL time.Duration
}

// parameters are the body's fields, for policies that restrict them.
func (q *request) parameters() map[string]json.RawMessage {
	if q.body == nil {
		return nil
	}
	return q.body.raw
}

// by is the hash of the token that the call is authorised by.
func (q *request) by() []byte {
	if q.who == nil {
		return nil
	}
	return q.who.Hash
}

// wall is the proposer's wall clock as commands carry it: for people, never compared.
func wall() int64 { return time.Now().UnixMilli() }

// errScan refuses OpenBao's recursive list, in words that its users know. Answering it as a read would be worse.
var errScan = &fault.Error{Kind: fault.UnsupportedOperation}

// operationOf maps method and query to an operation as the contract's section 1.1 has it.
func operationOf(r *http.Request) (operation, error) {
	q := r.URL.Query()
	switch r.Method {
	case http.MethodGet:
		if v := q.Get("help"); v != "" {
			return opHelp, nil
		}
		if scan, _ := strconv.ParseBool(q.Get("scan")); scan {
			return "", errScan
		}
		if q.Has("list") {
			list, err := strconv.ParseBool(q.Get("list"))
			if err != nil {
				return "", &fault.Error{Kind: fault.Invalid}
			}
			if list {
				return opList, nil
			}
		}
		return opRead, nil
	case "LIST":
		return opList, nil
	case "SCAN":
		return "", errScan
	case http.MethodPost, http.MethodPut:
		return opUpdate, nil
	case http.MethodDelete:
		return opDelete, nil
	case http.MethodHead:
		return opHead, nil
	case http.MethodPatch:
		ct, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
		if strings.TrimSpace(ct) != "application/merge-patch+json" {
			return "", &fault.Error{
				Kind: fault.Invalid, Code: http.StatusUnsupportedMediaType,
				Text: "a PATCH needs Content-Type: application/merge-patch+json",
			}
		}
		return opPatch, nil
	case http.MethodOptions:
		return "", &fault.Error{Kind: fault.Invalid} // no origin is allowed, so there is nothing to say before a request
	default:
		return "", &fault.Error{Kind: fault.Invalid, Code: http.StatusMethodNotAllowed}
	}
}

// readBody returns the request's body as a JSON object: "{}" when it is empty, and the query's values for methods
// without a body. It refuses what is not an object, is nested deeper than maxDepth, or is larger than limit bytes.
func readBody(w http.ResponseWriter, r *http.Request, op operation, limit int64) (json.RawMessage, error) {
	if op == opRead || op == opList || op == opDelete || op == opHelp || op == opHead {
		return queryObject(r.URL.Query()), nil
	}
	if r.ContentLength > limit {
		return nil, fault.Text(fault.TooLarge, "http: request body too large")
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return nil, fault.Text(fault.TooLarge, "http: request body too large")
		}
		return nil, fault.As(fault.Invalid, err, "read", "request body")
	}
	trimmed := bytes.TrimSpace(raw)
	if len(trimmed) == 0 || bytes.Equal(trimmed, []byte("null")) { // null is what `write -f` sends
		return json.RawMessage("{}"), nil
	}
	if formEncoded(r) && trimmed[0] != '{' && trimmed[0] != '[' {
		values, perr := url.ParseQuery(string(trimmed))
		if perr != nil {
			return nil, fault.Text(fault.Invalid, "failed to parse form: %s", perr.Error())
		}
		return queryObject(values), nil
	}
	if trimmed[0] != '{' {
		return nil, fault.Text(fault.Invalid, "failed to parse JSON input: the body must be a JSON object")
	}
	if err := checkJSON(trimmed); err != nil {
		return nil, err
	}
	return trimmed, nil
}

func formEncoded(r *http.Request) bool {
	return strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded")
}

// queryObject makes the request data of a call without a body: strings, and lists for repeated keys.
func queryObject(q url.Values) json.RawMessage {
	data := make(map[string]any, len(q))
	for k, v := range q {
		switch {
		case k == "list" || k == "help" || k == "scan":
		case len(v) == 1:
			data[k] = v[0]
		default:
			data[k] = v
		}
	}
	raw, err := json.Marshal(data)
	if err != nil { // strings and lists of strings always encode
		return json.RawMessage("{}")
	}
	return raw
}

// fields reads a body field by field, remembers the first error and which fields nobody asked for.
type fields struct {
	raw  map[string]json.RawMessage
	used map[string]bool
	err  error
}

func newFields(raw json.RawMessage) (*fields, error) {
	f := &fields{used: map[string]bool{}}
	if err := json.Unmarshal(raw, &f.raw); err != nil {
		return nil, fault.Text(fault.Invalid, "failed to parse JSON input: %s", err.Error())
	}
	return f, nil
}

func (f *fields) get(key string) (json.RawMessage, bool) {
	f.used[key] = true
	v, ok := f.raw[key]
	if !ok || bytes.Equal(v, []byte("null")) {
		return nil, false
	}
	return v, true
}

// has reports whether the body names key with a value other than null.
func (f *fields) has(key string) bool { _, ok := f.get(key); return ok }

func (f *fields) fail(key, format string, args ...any) {
	if f.err == nil {
		f.err = fault.Text(fault.Invalid, "Field validation failed: error converting input for field %q: %s", key,
			fault.Text(fault.Invalid, format, args...).Text)
	}
}

// str reads a string; numbers and booleans are taken as their text, as the contract's servers do.
func (f *fields) str(key string) string {
	v, ok := f.get(key)
	if !ok {
		return ""
	}
	var s string
	if json.Unmarshal(v, &s) == nil {
		return s
	}
	if v[0] == '{' || v[0] == '[' {
		f.fail(key, "expected a string, got %s", kindOfJSON(v))
		return ""
	}
	return string(v)
}

// strs reads a list: an array of strings, or one string that is split on commas. Elements of an array that hold
// commas are split too: the stock commands send -mounts=a,b as one element.
func (f *fields) strs(key string) []string {
	v, ok := f.get(key)
	if !ok {
		return nil
	}
	var list []string
	var one string
	if json.Unmarshal(v, &one) == nil {
		list = []string{one}
	} else if json.Unmarshal(v, &list) != nil {
		f.fail(key, "expected a list of strings, got %s", kindOfJSON(v))
		return nil
	}
	var out []string
	for _, e := range list {
		for s := range strings.SplitSeq(e, ",") {
			if s = strings.TrimSpace(s); s != "" {
				out = append(out, s)
			}
		}
	}
	return out
}

// list reads an array of strings as it is, or one string as a list of one: for args and env, where commas mean nothing.
func (f *fields) list(key string) []string {
	v, ok := f.get(key)
	if !ok {
		return nil
	}
	var list []string
	var one string
	switch {
	case json.Unmarshal(v, &list) == nil:
		return list
	case json.Unmarshal(v, &one) == nil && one != "":
		return []string{one}
	case one == "" && v[0] == '"':
		return nil
	}
	f.fail(key, "expected a list of strings, got %s", kindOfJSON(v))
	return nil
}

func (f *fields) boolean(key string) bool {
	v, ok := f.get(key)
	if !ok {
		return false
	}
	var b bool
	if json.Unmarshal(v, &b) == nil {
		return b
	}
	var s string
	if json.Unmarshal(v, &s) == nil {
		if s == "" {
			return false
		}
		if b, err := strconv.ParseBool(s); err == nil {
			return b
		}
	}
	f.fail(key, "expected a boolean, got %s", string(v))
	return false
}

func (f *fields) float(key string) float64 {
	v, ok := f.get(key)
	if !ok {
		return 0
	}
	n, err := strconv.ParseFloat(strings.TrimSuffix(strings.Trim(string(v), `"`), "%"), 64)
	if err != nil || math.IsNaN(n) || math.IsInf(n, 0) {
		f.fail(key, "expected a number, got %s", string(v))
		return 0
	}
	if bytes.HasSuffix(v, []byte(`%"`)) {
		n /= 100
	}
	return n
}

func (f *fields) number(key string) int64 {
	v, ok := f.get(key)
	if !ok {
		return 0
	}
	n, err := strconv.ParseInt(strings.Trim(string(v), `"`), 10, 64)
	if err != nil {
		f.fail(key, "expected a whole number, got %s", string(v))
		return 0
	}
	return n
}

// duration reads "30s", "1h30m", "2d", or a number of seconds. "" and "system" are 0. Negative values are refused.
func (f *fields) duration(key string) time.Duration {
	v, ok := f.get(key)
	if !ok {
		return 0
	}
	s := strings.Trim(string(v), `"`)
	d, err := ParseDuration(s)
	if err != nil || d < 0 {
		f.fail(key, "expected a duration such as \"30s\" or seconds, got %s", string(v))
		return 0
	}
	return d
}

// ParseDuration reads a duration as clients write it: Go's form, days with "d", or whole seconds. "" and "system" are 0.
func ParseDuration(s string) (time.Duration, error) {
	if s == "" || s == "system" {
		return 0, nil
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if n > int64(math.MaxInt64/time.Second) || n < int64(math.MinInt64/time.Second) {
			return 0, fault.Text(fault.Invalid, "duration %s is out of range", s)
		}
		return time.Duration(n) * time.Second, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseInt(days, 10, 32)
		if err != nil {
			return 0, err
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	return time.ParseDuration(s)
}

// strMap reads an object of strings; numbers and booleans become their text. nil when absent.
func (f *fields) strMap(key string) map[string]string {
	v, ok := f.get(key)
	if !ok {
		return nil
	}
	var m map[string]any
	d := json.NewDecoder(bytes.NewReader(v))
	d.UseNumber()
	if err := d.Decode(&m); err != nil {
		f.fail(key, "expected an object of strings, got %s", kindOfJSON(v))
		return nil
	}
	out := make(map[string]string, len(m))
	for k, e := range m {
		switch t := e.(type) {
		case string:
			out[k] = t
		case json.Number:
			out[k] = t.String()
		case bool:
			out[k] = strconv.FormatBool(t)
		case nil:
			out[k] = ""
		default:
			f.fail(key, "the value of %q is not a string", k)
		}
	}
	return out
}

// object reads a nested object as fields of its own; an absent one is empty. Its first error becomes this one's.
func (f *fields) object(key string) *fields {
	empty := &fields{raw: map[string]json.RawMessage{}, used: map[string]bool{}}
	v, ok := f.get(key)
	if !ok {
		return empty
	}
	sub, err := newFields(v)
	if err != nil {
		f.fail(key, "expected an object, got %s", kindOfJSON(v))
		return empty
	}
	return sub
}

// ignored lists what the body held and no handler asked for, sorted.
func (f *fields) ignored() []string {
	var out []string
	for k := range f.raw {
		if !f.used[k] {
			out = append(out, k)
		}
	}
	sort.Strings(out)
	return out
}

func kindOfJSON(v json.RawMessage) string {
	switch {
	case len(v) == 0:
		return "nothing"
	case v[0] == '{':
		return "an object"
	case v[0] == '[':
		return "an array"
	case v[0] == '"':
		return "a string"
	case v[0] == 't' || v[0] == 'f':
		return "a boolean"
	default:
		return "a number"
	}
}

package client

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"rollcall/node/api"
)

// say prints a line on standard output. Writing there is not checked: a pipe that was closed has nobody to tell.
func (e *Env) say(format string, args ...any) { _, _ = fmt.Fprintf(e.Stdout, format+"\n", args...) }

func (e *Env) warn(warnings []string) {
	for _, w := range warnings {
		_, _ = fmt.Fprintf(e.Stderr, "WARNING: %s\n", w)
	}
}

// printJSON prints v indented, with its HTML as it is.
func (e *Env) printJSON(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return usageErr(err)
	}
	_, err := e.Stdout.Write(b.Bytes())
	if err != nil {
		return usageErr(err)
	}
	return nil
}

// table is rows under a head, aligned.
type table struct {
	head []string
	rows [][]string
	// paint colors a cell after it was padded; nil for none.
	paint func(row, col int, cell string) string
	// upper prints the head in capitals without a rule under it; otherwise it is ruled as the stock commands do.
	upper bool
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) print(w io.Writer) {
	widths := make([]int, len(t.head))
	for i, h := range t.head {
		widths[i] = utf8.RuneCountInString(h)
	}
	for _, r := range t.rows {
		for i, c := range r {
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	gap := 4 // as the stock commands have it
	if t.upper {
		gap = 2
	}
	var b strings.Builder
	line := func(row int, cells []string) {
		var l strings.Builder
		for i, c := range cells {
			padded := c
			if i < len(cells)-1 {
				padded += strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+gap)
			}
			if t.paint != nil && row >= 0 {
				padded = t.paint(row, i, padded)
			}
			l.WriteString(padded)
		}
		b.WriteString(strings.TrimRight(l.String(), " "))
		b.WriteByte('\n')
	}
	if t.upper {
		up := make([]string, len(t.head))
		for i, h := range t.head {
			up[i] = strings.ToUpper(h)
		}
		line(-1, up)
	} else {
		rule := make([]string, len(t.head))
		for i, h := range t.head {
			rule[i] = strings.Repeat("-", utf8.RuneCountInString(h))
		}
		line(-1, t.head)
		line(-1, rule)
	}
	for i, r := range t.rows {
		line(i, r)
	}
	_, _ = io.WriteString(w, b.String())
}

// keyValue prints pairs as the stock commands do.
func (e *Env) keyValue(pairs ...[2]string) {
	t := table{head: []string{"Key", "Value"}}
	for _, p := range pairs {
		t.add(p[0], p[1])
	}
	t.print(e.Stdout)
}

// text is a JSON value for a table's cell.
func text(v any) string {
	switch x := v.(type) {
	case nil:
		return "n/a"
	case string:
		return x
	case json.Number:
		return x.String()
	case bool:
		return strconv.FormatBool(x)
	case []any:
		parts := make([]string, len(x))
		for i, p := range x {
			parts[i] = text(p)
		}
		return "[" + strings.Join(parts, " ") + "]"
	case map[string]any:
		parts := make([]string, 0, len(x))
		for _, k := range slices.Sorted(maps.Keys(x)) {
			parts = append(parts, k+":"+text(x[k]))
		}
		return "map[" + strings.Join(parts, " ") + "]"
	default:
		return fmt.Sprint(x)
	}
}

// decodeData reads an envelope's data with its numbers as they were sent.
func decodeData(raw json.RawMessage) (map[string]any, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	out := map[string]any{}
	if err := d.Decode(&out); err != nil {
		return nil, err
	}
	return out, nil
}

// printEnvelope shows an answer of read or write: as JSON, one field, or a table.
func (e *Env) printEnvelope(env *api.Envelope, field string) error {
	data, err := decodeData(env.Data)
	if err != nil {
		return failed("reading the answer's data", err)
	}
	e.warn(env.Warnings)
	if field != "" {
		return e.printField(env, data, field)
	}
	if e.json() {
		return e.printJSON(env)
	}
	var pairs [][2]string
	if env.LeaseID != "" {
		pairs = append(pairs, [2]string{"lease_id", env.LeaseID},
			[2]string{"lease_duration", seconds(env.LeaseDuration)}, [2]string{"lease_renewable", strconv.FormatBool(env.Renewable)})
	}
	for _, part := range []json.RawMessage{env.Auth, env.WrapInfo} {
		m, err := decodeData(part)
		if err != nil {
			return failed("reading the answer", err)
		}
		named := map[string]string{}
		_, isAuth := m["client_token"]
		for k, v := range m {
			switch {
			case k == "client_token":
				k = "token"
			case isAuth && !strings.HasPrefix(k, "token_"):
				k = "token_" + k
			}
			named[k] = text(v)
		}
		for _, k := range sortedKeys(named) {
			pairs = append(pairs, [2]string{k, named[k]})
		}
	}
	for _, k := range slices.Sorted(maps.Keys(data)) {
		pairs = append(pairs, [2]string{k, text(data[k])})
	}
	if len(pairs) > 0 {
		e.keyValue(pairs...)
	}
	return nil
}

func (e *Env) printField(env *api.Envelope, data map[string]any, field string) error {
	v, ok := data[field]
	if !ok {
		auth, err := decodeData(env.Auth)
		if err != nil {
			return failed("reading the answer", err)
		}
		if field == "token" {
			field = "client_token"
		}
		if v, ok = auth[field]; !ok {
			return usagef("field %q is not in the answer; it has %s", field, strings.Join(slices.Sorted(maps.Keys(data)), ", "))
		}
	}
	if e.json() {
		return e.printJSON(v)
	}
	_, _ = io.WriteString(e.Stdout, text(v))
	if s, isText := v.(string); !isText || !strings.HasSuffix(s, "\n") {
		if _, _, tty := terminal(e.Stdout, e.Getenv); tty { // in a pipe, the value and nothing else
			e.say("")
		}
	}
	return nil
}

// seconds as people write them.
func seconds(n int64) string {
	switch {
	case n == 0:
		return "0s"
	case n%3600 == 0:
		return fmt.Sprintf("%dh", n/3600)
	case n%60 == 0:
		return fmt.Sprintf("%dm", n/60)
	default:
		return fmt.Sprintf("%ds", n)
	}
}

// millis is a length of time for a cell; "-" when none was measured.
func millis(ms float64) string {
	switch {
	case ms <= 0:
		return "-"
	case ms < 0.1:
		return "<0.1ms"
	case ms < 10:
		return strconv.FormatFloat(ms, 'f', 1, 64) + "ms"
	case ms < 1000:
		return strconv.FormatFloat(ms, 'f', 0, 64) + "ms"
	default:
		return strconv.FormatFloat(ms/1000, 'f', 1, 64) + "s"
	}
}

// short is a sha256 short enough for a table.
func short(sha string) string { return sha[:min(len(sha), 8)] }

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

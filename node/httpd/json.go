package httpd

import (
	"encoding/json"
	"unicode/utf8"

	"rollcall/node/fault"
)

// Bounds of a JSON body, against bodies that cost more to read than to send. The largest container is as Vault has it.
const (
	maxDepth    = 64
	maxElements = 10_000
)

// checkJSON refuses what two readers of a body could read differently, or could not afford to: nesting and containers beyond
// their bounds, bytes that are not UTF-8, a key that stands twice at the top (policies look at those), and whatever is not one JSON
// value. It looks at the bytes before any parser recurses.
func checkJSON(raw []byte) error {
	if !utf8.Valid(raw) {
		return fault.Text(fault.Invalid, "failed to parse JSON input: it is not UTF-8")
	}
	var elements [maxDepth + 1]int
	depth, begins := 0, -1 // begins: where the string that is being read begins
	isKey, escaped := false, false
	keys := map[string]bool{}
	for i, c := range raw {
		switch {
		case escaped:
			escaped = false
		case begins >= 0:
			switch c {
			case '\\':
				escaped = true
			case '"':
				if isKey && depth == 1 && raw[0] == '{' {
					if err := once(keys, raw[begins:i+1]); err != nil {
						return err
					}
				}
				begins, isKey = -1, false
			}
		case c == '"':
			begins = i
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return fault.Text(fault.Invalid, "failed to parse JSON input: nested deeper than %d levels", maxDepth)
			}
			elements[depth], isKey = 0, c == '{'
		case c == '}' || c == ']':
			depth = max(0, depth-1)
		case c == ',':
			if elements[depth]++; elements[depth] >= maxElements {
				return fault.Text(fault.Invalid, "failed to parse JSON input: an object or array of more than %d elements", maxElements)
			}
			isKey = depth == 1 // values of arrays are no keys, but the top is an object
		}
	}
	if !json.Valid(raw) {
		var v json.RawMessage
		err := json.Unmarshal(raw, &v)
		return fault.Text(fault.Invalid, "failed to parse JSON input: %v", err)
	}
	return nil
}

// once notes a key, and refuses it the second time.
func once(keys map[string]bool, quoted []byte) error {
	var key string
	if json.Unmarshal(quoted, &key) != nil {
		return nil // the whole is refused further down
	}
	if keys[key] {
		return fault.Text(fault.Invalid, "failed to parse JSON input: the key %.64q stands there twice", key)
	}
	keys[key] = true
	return nil
}

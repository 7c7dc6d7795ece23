package audit

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"hash"
	"slices"
	"strings"
	"sync"

	"rollcall/node/api"
)

const (
	prefix = "hmac-sha256:"
	// unsalted stands for every secret while the cluster has no salt: before its first leader has entered one.
	unsalted = prefix + "unknown"
	// maxData bounds what is written value by value of one request's or answer's data, in bytes of JSON; maxValues bounds
	// the strings in it, each of which becomes 76 bytes. What is beyond is told by its length and its hash.
	maxData   = 64 << 10
	maxValues = 2048
	// leastSecret is the shortest value that is looked for in error texts: shorter ones are parts of ordinary words.
	leastSecret = 4
	// maxText bounds an error or a warning.
	maxText = 4 << 10
)

// hasher hashes under one salt. Any goroutine.
type hasher struct {
	salt string
	pool sync.Pool
}

func newHasher(salt string) *hasher {
	h := &hasher{salt: salt}
	h.pool.New = func() any { return hmac.New(sha256.New, []byte(salt)) }
	return h
}

// of is the hash of a text as it stands in records.
func (h *hasher) of(text string) string {
	if h.salt == "" {
		return unsalted
	}
	m, ok := h.pool.Get().(hash.Hash)
	if !ok {
		return unsalted // never: the pool makes nothing else
	}
	m.Reset()
	_, _ = m.Write([]byte(text))
	var sum [sha256.Size]byte
	out := prefix + hex.EncodeToString(m.Sum(sum[:0]))
	h.pool.Put(m)
	return out
}

// set hashes what is there and leaves what is not.
func (h *hasher) set(text string) string {
	if text == "" {
		return ""
	}
	return h.of(text)
}

// walk hashes every string of JSON data but those of the keys in clear, which count at the top alone.
type walk struct {
	*hasher
	clear  []string
	values int
	// seen are the secrets that were hashed, for texts that may repeat them.
	seen map[string]string
}

// data hashes JSON. What is too large or no JSON comes back as omitted.
func (w *walk) data(raw json.RawMessage) (json.RawMessage, *api.AuditOmitted) {
	if len(raw) == 0 || string(raw) == "null" || string(raw) == "{}" {
		return nil, nil
	}
	if len(raw) <= maxData {
		d := json.NewDecoder(bytes.NewReader(raw))
		d.UseNumber()
		var v any
		if d.Decode(&v) == nil {
			v = w.value(v, true)
			if out, err := json.Marshal(v); err == nil && w.values <= maxValues {
				return out, nil
			}
		}
	}
	return nil, &api.AuditOmitted{Bytes: len(raw), HMAC: w.of(string(raw))}
}

func (w *walk) value(v any, top bool) any {
	switch t := v.(type) {
	case string:
		return w.text(t)
	case []any:
		for i := range t {
			t[i] = w.value(t[i], false)
		}
	case map[string]any:
		for k, e := range t {
			if top && slices.Contains(w.clear, k) {
				continue
			}
			t[k] = w.value(e, false)
		}
	}
	return v
}

func (w *walk) text(s string) string {
	if w.values++; w.values > maxValues {
		return "" // the whole is left out
	}
	out := w.of(s)
	w.remember(s, out)
	return out
}

func (w *walk) remember(secret, hashed string) {
	if len(secret) >= leastSecret {
		if w.seen == nil {
			w.seen = map[string]string{}
		}
		w.seen[secret] = hashed
	}
}

// scrub takes out of a text what was hashed elsewhere in the record: errors like to repeat what they were given. The longest
// secrets go first, so that none is left over for having held another.
func (w *walk) scrub(text string) string {
	if text == "" {
		return ""
	}
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + " …"
	}
	for _, secret := range longestFirst(w.seen) {
		if quoted := quotedInside(secret); quoted != secret {
			text = strings.ReplaceAll(text, quoted, w.seen[secret])
		}
		text = strings.ReplaceAll(text, secret, w.seen[secret])
	}
	return text
}

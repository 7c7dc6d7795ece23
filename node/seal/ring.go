package seal

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/fault"
)

// maxDataKeys bounds a ring. Each rotation adds one; one goes when nothing on the disk needs it any more.
const maxDataKeys = 256

// File is the place that a ring is kept in, lent by whoever owns the disk.
type File interface {
	// Read returns the content, and nil when there is no such file.
	Read() ([]byte, error)
	// Write replaces the content so that after a power loss either the old or the new one is there.
	Write(content []byte) error
}

// dataKey is one data key. Records and streams are sealed under keys derived from it.
type dataKey struct {
	ID     uint32 `json:"id"`
	Term   uint64 `json:"term"`
	MadeMs int64  `json:"made_ms"`
	Secret []byte `json:"secret"`
}

// ringBody is what the key-encryption key locks.
type ringBody struct {
	// Owner is the node that the ring was made for.
	Owner string `json:"owner"`
	// Opening is true while what the directory held unsealed is being sealed: only then is anything unsealed believed.
	Opening bool      `json:"opening,omitempty"`
	Keys    []dataKey `json:"keys"` // by id; the last one seals
}

// Ring holds a node's data keys: the newest seals, the older ones open. Its methods may be called from any goroutine.
type Ring struct {
	file      File
	key       *Key
	rewrapped bool

	mu   sync.RWMutex // guards body and subs
	body ringBody
	subs map[subkey]cipher.AEAD // derived keys that were used lately

	write  sync.Mutex // one change at a time
	sealer atomic.Pointer[sealer]
	sealed atomic.Uint64
}

// Status is what people may know of a ring.
type Status struct {
	// Term is of the newest data key, and Made when this node made it.
	Term uint64
	Made time.Time
	// Keys is how many data keys something on the disk may still need.
	Keys int
	// Sealed counts the records that this process has sealed.
	Sealed uint64
	// KeyID names the key-encryption key, and KeyFrom the file or command that it is from.
	KeyID, KeyFrom string
}

// NewRing makes the ring of a node, with one data key of term 1. opening says that the directory holds unsealed things,
// which are believed until Opened is called.
func NewRing(f File, owner string, keys Keys, opening bool) (*Ring, error) {
	r := &Ring{file: f, key: keys.Current, subs: map[subkey]cipher.AEAD{}}
	body := ringBody{Owner: owner, Opening: opening, Keys: []dataKey{freshKey(1, 1)}}
	if err := r.save(body); err != nil {
		return nil, err
	}
	return r, nil
}

// OpenRing reads the ring of a node. A ring that a previous key locks is locked again by the current one. Errors:
// fault.NotFound when there is no ring, fault.Denied when none of the keys opens it, fault.Corrupt when it is damaged or
// another node's.
func OpenRing(f File, owner string, keys Keys) (*Ring, error) {
	raw, err := f.Read()
	if err != nil {
		return nil, err
	}
	if raw == nil {
		return nil, fault.New(fault.NotFound, "open keyring", "", "there is none")
	}
	id, head, wrapped, err := parseRing(raw)
	if err != nil {
		return nil, err
	}
	key := keys.find(id)
	if key == nil {
		return nil, fault.New(fault.Denied, "open keyring", "",
			"it is locked with the key %s, and the configuration gives %s (%s). Give the key that this node was sealed with; where it "+
				"was replaced, give the old one as seal.previous_key_file or seal.previous_command for one start", id, keys.names(), keys.Current.from)
	}
	plain, ok := key.unwrap(forRing, wrapped, head)
	var body ringBody
	if !ok || json.Unmarshal(plain, &body) != nil || !body.valid() {
		return nil, brokenRing("its content is not what the key %s has locked", id)
	}
	if body.Owner != owner {
		return nil, brokenRing("it belongs to node %s, and this is node %s", body.Owner, owner)
	}
	r := &Ring{file: f, key: keys.Current, subs: map[subkey]cipher.AEAD{}}
	if key.id != keys.Current.id {
		r.rewrapped = true
		return r, r.save(body)
	}
	r.use(body)
	return r, nil
}

func brokenRing(format string, args ...any) error {
	return fault.New(fault.Corrupt, "open keyring", "", "the keyring is damaged: %w. Without it nothing in this data directory can be read. "+
		"Put it back from a copy; or, where other members live, move this node's data directory away and start it again under the "+
		"same name, and it rejoins as a replaced disk", fmt.Errorf(format, args...))
}

// The file: a line of what it is and which key locks it, the locked body in base64, and a checksum over both lines, so
// that damage is told from a wrong key.
var ringPattern = regexp.MustCompile(`\A(rollcall-keyring 1 ([0-9a-f]{16}))\n([A-Za-z0-9+/]+={0,2})\n([0-9a-f]{8})\n\z`)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func parseRing(raw []byte) (keyID string, head, wrapped []byte, err error) {
	m := ringPattern.FindSubmatch(raw)
	if m == nil {
		return "", nil, nil, brokenRing("it has %d bytes of another form", len(raw))
	}
	if got := fmt.Sprintf("%08x", crc32.Checksum(raw[:len(raw)-9], castagnoli)); got != string(m[4]) {
		return "", nil, nil, brokenRing("checksum %s, expected %s", got, m[4])
	}
	wrapped, berr := base64.StdEncoding.DecodeString(string(m[3]))
	if berr != nil {
		return "", nil, nil, brokenRing("%w", berr)
	}
	return string(m[2]), m[1], wrapped, nil
}

// valid holds a body against what this package writes.
func (b *ringBody) valid() bool {
	for i, k := range b.Keys {
		if len(k.Secret) != keySize || k.Term == 0 || i > 0 && (k.ID <= b.Keys[i-1].ID || k.Term < b.Keys[i-1].Term) {
			return false
		}
	}
	return len(b.Keys) > 0 && len(b.Keys) <= maxDataKeys
}

// save makes a body durable, and uses it then: no record is sealed with a key that a power loss could take away.
func (r *Ring) save(body ringBody) error {
	plain, err := json.Marshal(body)
	if err != nil {
		return fault.As(fault.Internal, err, "encode", "keyring")
	}
	head := []byte("rollcall-keyring 1 " + r.key.id)
	var out bytes.Buffer
	fmt.Fprintf(&out, "%s\n%s\n", head, base64.StdEncoding.EncodeToString(r.key.wrap(forRing, plain, head)))
	fmt.Fprintf(&out, "%08x\n", crc32.Checksum(out.Bytes(), castagnoli))
	if err := r.file.Write(out.Bytes()); err != nil {
		return err
	}
	r.use(body)
	return nil
}

func (r *Ring) use(body ringBody) {
	r.mu.Lock()
	defer r.mu.Unlock()
	newest := body.Keys[len(body.Keys)-1]
	if s := r.sealer.Load(); s == nil || s.key != newest.ID {
		r.sealer.Store(newSealer(newest))
	}
	r.body = body
	clear(r.subs)
}

func freshKey(id uint32, term uint64) dataKey {
	secret := make([]byte, keySize)
	_, _ = rand.Read(secret)
	return dataKey{ID: id, Term: term, MadeMs: time.Now().UnixMilli(), Secret: secret}
}

// Rotate makes a new data key for the term and seals with it from now on; what is sealed already stays readable. A term
// that the ring has reached changes nothing. fault.Exhausted when too many old keys are still needed.
func (r *Ring) Rotate(term uint64) (rotated bool, err error) {
	r.write.Lock()
	defer r.write.Unlock()
	body := r.copy()
	newest := body.Keys[len(body.Keys)-1]
	if term <= newest.Term {
		return false, nil
	}
	if len(body.Keys) >= maxDataKeys {
		return false, fault.New(fault.Exhausted, "rotate data key", "", "%d older keys are still needed by entries of the log; "+
			"a snapshot lets them go", len(body.Keys))
	}
	body.Keys = append(body.Keys, freshKey(newest.ID+1, term))
	err = r.save(body)
	return err == nil, err
}

// Retire forgets every data key but the newest that needed does not name: what it has sealed cannot be read by anybody
// any more. It returns how many went.
func (r *Ring) Retire(needed func(key uint32) bool) (int, error) {
	r.write.Lock()
	defer r.write.Unlock()
	body := r.copy()
	before := len(body.Keys)
	newest := body.Keys[before-1].ID
	body.Keys = slices.DeleteFunc(body.Keys, func(k dataKey) bool { return k.ID != newest && !needed(k.ID) })
	if len(body.Keys) == before {
		return 0, nil
	}
	return before - len(body.Keys), r.save(body)
}

// Opening reports whether unsealed things in the directory are still believed.
func (r *Ring) Opening() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.body.Opening
}

// Opened ends that: from now on whatever is not sealed is not ours.
func (r *Ring) Opened() error {
	r.write.Lock()
	defer r.write.Unlock()
	body := r.copy()
	if !body.Opening {
		return nil
	}
	body.Opening = false
	return r.save(body)
}

// Rewrapped reports whether OpenRing has locked the ring with a new key-encryption key.
func (r *Ring) Rewrapped() bool { return r.rewrapped }

// Term is the term of the newest data key.
func (r *Ring) Term() uint64 { return r.Status().Term }

// Keys counts the data keys.
func (r *Ring) Keys() int { return r.Status().Keys }

// Status is what people may know of the ring.
func (r *Ring) Status() Status {
	r.mu.RLock()
	defer r.mu.RUnlock()
	newest := r.body.Keys[len(r.body.Keys)-1]
	return Status{
		Term: newest.Term, Made: time.UnixMilli(newest.MadeMs), Keys: len(r.body.Keys), Sealed: r.sealed.Load(),
		KeyID: r.key.id, KeyFrom: r.key.from,
	}
}

func (r *Ring) copy() ringBody {
	r.mu.RLock()
	defer r.mu.RUnlock()
	body := r.body
	body.Keys = slices.Clone(body.Keys)
	return body
}

// secret returns a data key, nil if the ring does not have it.
func (r *Ring) secret(id uint32) []byte {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, k := range r.body.Keys {
		if k.ID == id {
			return k.Secret
		}
	}
	return nil
}

// Package seal keeps what a node writes to its disk unreadable to whoever has the disk and not the key. It owns the
// key-encryption key and where it comes from, the ring of data keys that this key locks, single sealed records, and
// sealed streams. It knows nothing of Raft and touches no disk: a File is lent to it. See DESIGN.md beside this file.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"strings"

	"rollcall/node/fault"
)

const (
	keySize   = 32 // of every key: AES-256
	nonceSize = 12 // of AES-GCM
	tagSize   = 16 // of AES-GCM
)

// What a key is derived for. A key never does two jobs: what is sealed for one cannot be opened as the other.
const (
	forKeyID   = "rollcall seal 1: key id"
	forRing    = "rollcall seal 1: keyring"
	forBackup  = "rollcall seal 1: backup"
	forRecords = "rollcall seal 1: records"
	forStream  = "rollcall seal 1: stream"
)

// Key is a key-encryption key: it locks data keys and nothing else, and never stands on a disk that this package knows.
type Key struct {
	secret [keySize]byte
	id     string
	from   string
}

// NewKeyText makes a key and returns it as it stands in a key file: 32 random bytes in base64 and a newline.
func NewKeyText() string {
	var secret [keySize]byte
	_, _ = rand.Read(secret[:]) // never fails: the program ends instead
	return base64.StdEncoding.EncodeToString(secret[:]) + "\n"
}

// ParseKey reads the text of a key file. from says where it is from in errors, and never is the key itself.
// fault.Invalid when it is no key.
func ParseKey(text []byte, from string) (*Key, error) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(raw) != keySize {
		// The cause is not shown: it quotes a byte of what may be a key.
		return nil, fault.New(fault.Invalid, "read seal key", from,
			"it must hold 32 bytes in base64 (44 characters) and nothing else; rollcall tls seal-key makes one")
	}
	k := &Key{from: from}
	copy(k.secret[:], raw)
	k.id = hex.EncodeToString(derive(k.secret[:], nil, forKeyID, 8))
	return k, nil
}

// Ephemeral is a key that only this process ever has, for files that must not outlive it.
func Ephemeral() *Key {
	k, err := ParseKey([]byte(NewKeyText()), "memory")
	if err != nil {
		panic("seal: a fresh key does not parse: " + err.Error()) // a defect of this file
	}
	return k
}

// ID names the key without giving it away: 16 hexadecimal digits, the same for the same key.
func (k *Key) ID() string { return k.id }

// From is the file or command that the key is from.
func (k *Key) From() string { return k.from }

// wrap locks a few bytes under the key: nonce, then ciphertext. The nonce is random: wraps are counted in thousands.
func (k *Key) wrap(purpose string, plain, context []byte) []byte {
	out := make([]byte, nonceSize, nonceSize+len(plain)+tagSize)
	_, _ = rand.Read(out)
	return gcm(derive(k.secret[:], nil, purpose, keySize)).Seal(out, out[:nonceSize], plain, context)
}

// unwrap is the reverse of wrap; ok is false when key, bytes or context are not those of wrap.
func (k *Key) unwrap(purpose string, wrapped, context []byte) (plain []byte, ok bool) {
	if len(wrapped) < nonceSize+tagSize {
		return nil, false
	}
	plain, err := gcm(derive(k.secret[:], nil, purpose, keySize)).Open(nil, wrapped[:nonceSize], wrapped[nonceSize:], context)
	return plain, err == nil
}

// Keys are the key in force and those before it, which only open.
type Keys struct {
	Current  *Key
	Previous []*Key
}

// find returns the key with the id, nil if there is none.
func (k Keys) find(id string) *Key {
	for _, key := range append([]*Key{k.Current}, k.Previous...) {
		if key != nil && key.id == id {
			return key
		}
	}
	return nil
}

// names lists the ids for an error text.
func (k Keys) names() string {
	var out []string
	for _, key := range append([]*Key{k.Current}, k.Previous...) {
		if key != nil && !slices.Contains(out, key.id) {
			out = append(out, key.id)
		}
	}
	return strings.Join(out, ", ")
}

func derive(secret, salt []byte, purpose string, size int) []byte {
	key, err := hkdf.Key(sha256.New, secret, salt, purpose, size)
	if err != nil {
		panic("seal: derive a key: " + err.Error()) // sizes are constants
	}
	return key
}

func gcm(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic("seal: " + err.Error()) // the size is a constant
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("seal: " + err.Error())
	}
	return aead
}

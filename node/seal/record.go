package seal

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"math"
	"sync/atomic"

	"rollcall/node/fault"
)

// A record's mark says how to open it: what it is, which data key, the salt of the key derived from that, and the number
// of the record under the derived key, which is its nonce.
const (
	recordMagic = "rcR1"
	saltSize    = 16
	// MarkSize is the length of every mark, in bytes.
	MarkSize = len(recordMagic) + 4 + saltSize + 8
	// Overhead is how much longer a sealed record is than the plain one, in bytes, besides its mark.
	Overhead = tagSize
)

// sealer numbers the records under one derived key. The salt is drawn anew in every process and for every data key, so a
// number cannot come twice under one key: not after a crash, and not when a directory is put back from an old copy.
type sealer struct {
	key  uint32 // data key
	salt [saltSize]byte
	aead cipher.AEAD
	next atomic.Uint64
}

// maxRecords is after how many records a sealer is replaced, well inside what one AES-GCM key may do.
const maxRecords = math.MaxUint32

func newSealer(k dataKey) *sealer {
	s := &sealer{key: k.ID}
	_, _ = rand.Read(s.salt[:])
	s.aead = gcm(derive(k.Secret, s.salt[:], forRecords, keySize))
	return s
}

// subkey names a derived key.
type subkey struct {
	key  uint32
	salt [saltSize]byte
}

// maxSubkeys bounds the derived keys that are kept. There is one for each process and data key that the log has seen.
const maxSubkeys = 64

// Seal locks a record in place, where its capacity allows, and returns it with its mark. Open wants the same context,
// which says where the record belongs.
func (r *Ring) Seal(record, context []byte) (sealed, mark []byte) {
	s := r.sealer.Load()
	number := s.next.Add(1)
	for number > maxRecords {
		s, number = r.renew(s)
	}
	r.sealed.Add(1)
	mark = make([]byte, 0, MarkSize+4) // callers put a checksum behind it
	mark = append(mark, recordMagic...)
	mark = binary.BigEndian.AppendUint32(mark, s.key)
	mark = append(mark, s.salt[:]...)
	mark = binary.BigEndian.AppendUint64(mark, number)
	return s.aead.Seal(record[:0], nonceOf(number), record, context), mark
}

// renew replaces a sealer that has numbered enough, and takes a number of the one in force.
func (r *Ring) renew(spent *sealer) (*sealer, uint64) {
	r.write.Lock()
	defer r.write.Unlock()
	if r.sealer.Load() == spent {
		body := r.copy()
		r.sealer.Store(newSealer(body.Keys[len(body.Keys)-1]))
	}
	s := r.sealer.Load()
	return s, s.next.Add(1)
}

func nonceOf(number uint64) []byte {
	nonce := make([]byte, nonceSize)
	binary.BigEndian.PutUint64(nonce[nonceSize-8:], number)
	return nonce
}

// IsMark reports whether bytes are a record's mark, and which data key it names. It needs no key.
func IsMark(mark []byte) (key uint32, ok bool) {
	if len(mark) != MarkSize || string(mark[:len(recordMagic)]) != recordMagic {
		return 0, false
	}
	return binary.BigEndian.Uint32(mark[len(recordMagic):]), true
}

// Open unlocks a record into bytes of its own. fault.Corrupt when it is not what Seal made, or does not belong here.
func (r *Ring) Open(sealed, mark, context []byte) ([]byte, error) {
	id, ok := IsMark(mark)
	if !ok {
		return nil, fault.New(fault.Corrupt, "open sealed record", "", "it has no mark")
	}
	sub := subkey{key: id}
	at := len(recordMagic) + 4
	copy(sub.salt[:], mark[at:])
	aead := r.derived(sub)
	if aead == nil {
		return nil, fault.New(fault.Corrupt, "open sealed record", "", "it is sealed with data key %d, which the keyring does not have", id)
	}
	plain, err := aead.Open(nil, nonceOf(binary.BigEndian.Uint64(mark[at+saltSize:])), sealed, context)
	if err != nil {
		return nil, fault.New(fault.Corrupt, "open sealed record", "", "it was changed, or it belongs elsewhere")
	}
	return plain, nil
}

// derived returns the key that a mark names, nil if its data key is not there.
func (r *Ring) derived(sub subkey) cipher.AEAD {
	r.mu.RLock()
	aead := r.subs[sub]
	r.mu.RUnlock()
	if aead != nil {
		return aead
	}
	secret := r.secret(sub.key)
	if secret == nil {
		return nil
	}
	aead = gcm(derive(secret, sub.salt[:], forRecords, keySize))
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.subs) >= maxSubkeys {
		clear(r.subs)
	}
	r.subs[sub] = aead
	return aead
}

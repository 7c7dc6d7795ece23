package seal

import (
	"bufio"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"

	"rollcall/node/fault"
)

// A stream is a header and chunks. The header names the key: a data key of a ring, or a key of the stream's own that a
// key-encryption key locks. Each chunk is sealed by itself under its number, and the last one is marked as the last, so a
// chunk that was changed, moved, doubled or left out is noticed, and so is an end that is not the end. Header and context
// are bound to every chunk.
const (
	streamMagic = "rcSEAL1\n"
	kindRing    = 1 // data key (4), salt (32)
	kindKey     = 2 // id of the key-encryption key (8), locked key of the stream (60)

	ringHeader = len(streamMagic) + 1 + 4 + keySize
	keyHeader  = len(streamMagic) + 1 + 8 + nonceSize + keySize + tagSize

	// chunkSize is how much of the plain stream one chunk holds; all but the last hold exactly that.
	chunkSize = 64 << 10
)

// HeaderSize is how many bytes of a stream say what it is, at most.
const HeaderSize = keyHeader

// IsStream reports whether bytes are the beginning of a sealed stream.
func IsStream(head []byte) bool {
	return len(head) >= len(streamMagic) && string(head[:len(streamMagic)]) == streamMagic
}

// RingKey returns the data key that the stream was sealed with, by its first HeaderSize bytes; ok is false for others.
func RingKey(head []byte) (key uint32, ok bool) {
	if !IsStream(head) || len(head) < ringHeader || head[len(streamMagic)] != kindRing {
		return 0, false
	}
	return binary.BigEndian.Uint32(head[len(streamMagic)+1:]), true
}

// PlainSize is how long the plain stream is whose sealed form, under a ring, has size bytes.
func PlainSize(size int64) int64 {
	body := size - int64(ringHeader)
	if body < tagSize {
		return 0
	}
	chunks := (body + chunkSize + tagSize - 1) / (chunkSize + tagSize)
	return body - chunks*tagSize
}

// NewWriter seals what is written to it under the ring's newest data key, whose id it also returns. Close ends the
// stream, and is needed: without it the reader refuses it. It does not close w.
func (r *Ring) NewWriter(w io.Writer, context []byte) (out *Writer, key uint32, err error) {
	body := r.copy()
	newest := body.Keys[len(body.Keys)-1]
	head := append(make([]byte, 0, ringHeader), streamMagic...)
	head = binary.BigEndian.AppendUint32(append(head, kindRing), newest.ID)
	salt := head[len(head) : len(head)+keySize]
	_, _ = rand.Read(salt)
	out, err = newWriter(w, head[:ringHeader], context, derive(newest.Secret, salt, forStream, keySize))
	return out, newest.ID, err
}

// NewWriter seals what is written to it under a key of its own, which it carries in its header, locked by k: whoever has k
// can read it, anywhere. Close ends the stream.
func (k *Key) NewWriter(w io.Writer, context []byte) (*Writer, error) {
	own := make([]byte, keySize)
	_, _ = rand.Read(own)
	id, err := hex.DecodeString(k.id)
	if err != nil {
		return nil, fault.As(fault.Internal, err, "seal stream", k.id)
	}
	head := append(append([]byte(streamMagic), kindKey), id...)
	head = append(head, k.wrap(forBackup, own, head)...)
	return newWriter(w, head, context, own)
}

// Writer seals a stream. It is used by one goroutine.
type Writer struct {
	w      io.Writer
	chunks chunks
	buf    []byte // the chunk being filled, with room for its tag
	err    error
}

func newWriter(w io.Writer, head, context, key []byte) (*Writer, error) {
	if _, err := w.Write(head); err != nil {
		return nil, err
	}
	return &Writer{w: w, chunks: newChunks(head, context, key), buf: make([]byte, 0, chunkSize+tagSize)}, nil
}

// Write is io.Writer's. A full chunk is written when more follows: only then is it known not to be the last.
func (s *Writer) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 && s.err == nil {
		if len(s.buf) == chunkSize {
			s.flush(false)
		}
		take := min(len(p), chunkSize-len(s.buf))
		s.buf, p = append(s.buf, p[:take]...), p[take:]
	}
	return n - len(p), s.err
}

func (s *Writer) flush(last bool) {
	if _, err := s.w.Write(s.chunks.seal(s.buf, last)); err != nil {
		s.err = err
	}
	s.buf = s.buf[:0]
}

var errEnded = errors.New("the stream has ended")

// Close writes the last chunk.
func (s *Writer) Close() error {
	if s.err != nil {
		return s.err
	}
	s.flush(true)
	err := s.err
	if err == nil {
		s.err = errEnded
	}
	return err
}

// NewReader opens a stream that the ring has sealed. Errors, here and when reading: fault.Corrupt.
func (r *Ring) NewReader(in io.Reader, context []byte) (*Reader, error) {
	head, err := readHeader(in)
	if err != nil {
		return nil, err
	}
	id, ok := RingKey(head)
	if !ok {
		return nil, fault.New(fault.Corrupt, "open sealed stream", "", "it was sealed for another purpose")
	}
	secret := r.secret(id)
	if secret == nil {
		return nil, fault.New(fault.Corrupt, "open sealed stream", "", "it is sealed with data key %d, which the keyring does not have", id)
	}
	return newReader(in, head, context, derive(secret, head[len(head)-keySize:], forStream, keySize)), nil
}

// NewReader opens a stream that one of the keys locks. fault.Denied when none of them does, which names the key that
// would; fault.Corrupt, also when reading, when the stream is damaged.
func (k Keys) NewReader(in io.Reader, context []byte) (*Reader, error) {
	head, err := readHeader(in)
	if err != nil {
		return nil, err
	}
	if len(head) != keyHeader {
		return nil, fault.New(fault.Corrupt, "open sealed stream", "", "it was sealed for another purpose")
	}
	named := len(streamMagic) + 1 + 8
	id := hex.EncodeToString(head[named-8 : named])
	key := k.find(id)
	if key == nil {
		have := k.names()
		if have == "" {
			have = "none: there is no seal block in its configuration"
		}
		return nil, fault.New(fault.Denied, "open sealed stream", "", "it is locked with the seal key %s, and this node has %s", id, have)
	}
	own, ok := key.unwrap(forBackup, head[named:], head[:named])
	if !ok || len(own) != keySize {
		return nil, fault.New(fault.Corrupt, "open sealed stream", "", "its header was changed")
	}
	return newReader(in, head, context, own), nil
}

func readHeader(in io.Reader) ([]byte, error) {
	broken := func(err error) error {
		return fault.New(fault.Corrupt, "open sealed stream", "", "its header cannot be read: %w", err)
	}
	head := make([]byte, len(streamMagic)+1, keyHeader)
	if _, err := io.ReadFull(in, head); err != nil {
		return nil, broken(err)
	}
	size := map[byte]int{kindRing: ringHeader, kindKey: keyHeader}[head[len(streamMagic)]]
	if !IsStream(head) || size == 0 {
		return nil, broken(errors.New("it is of an unknown kind"))
	}
	rest := head[len(head):size]
	if _, err := io.ReadFull(in, rest); err != nil {
		return nil, broken(err)
	}
	return head[:size], nil
}

// Reader opens a sealed stream. It gives nothing out that it has not verified. It is used by one goroutine.
type Reader struct {
	in     *bufio.Reader
	chunks chunks
	buf    []byte // the sealed chunk, opened in place
	plain  []byte // what is not given out yet
	err    error
}

func newReader(in io.Reader, head, context, key []byte) *Reader {
	return &Reader{
		in: bufio.NewReaderSize(in, 4096), chunks: newChunks(head, context, key),
		buf: make([]byte, chunkSize+tagSize),
	}
}

// Read is io.Reader's. io.EOF comes only after the chunk that is marked as the last.
func (s *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(s.plain) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		s.next()
	}
	n := copy(p, s.plain)
	s.plain = s.plain[n:]
	return n, nil
}

// next reads one chunk. It is the last one when nothing follows it.
func (s *Reader) next() {
	n, err := io.ReadFull(s.in, s.buf)
	last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err == nil {
		if _, err = s.in.Peek(1); errors.Is(err, io.EOF) {
			last, err = true, nil
		}
	} else if last {
		err = nil
	}
	if err != nil {
		s.err = err
		return
	}
	plain, ok := s.chunks.open(s.buf[:n], last)
	if !ok {
		s.err = fault.New(fault.Corrupt, "open sealed stream", "", "it was changed or cut at or before byte %d", s.chunks.before())
		return
	}
	s.plain = plain
	if last {
		s.err = io.EOF
	}
}

// chunks numbers, seals and opens the chunks of one stream.
type chunks struct {
	aead    cipher.AEAD
	context []byte
	next    uint64
}

func newChunks(head, context, key []byte) chunks {
	bound := append(make([]byte, 0, len(head)+len(context)), head...) // the header's length follows from its kind
	return chunks{aead: gcm(key), context: append(bound, context...)}
}

func (c *chunks) nonce(last bool) []byte {
	nonce := nonceOf(c.next)
	if last {
		nonce[0] = 1
	}
	c.next++
	return nonce
}

func (c *chunks) seal(plain []byte, last bool) []byte {
	return c.aead.Seal(plain[:0], c.nonce(last), plain, c.context)
}

func (c *chunks) open(sealed []byte, last bool) ([]byte, bool) {
	plain, err := c.aead.Open(sealed[:0], c.nonce(last), sealed, c.context)
	return plain, err == nil
}

// before is where the chunk that was looked at last begins in the plain stream.
func (c *chunks) before() uint64 { return (c.next - 1) * chunkSize }

package seal

import (
	"bytes"
	"io"
	"testing"

	"rollcall/node/fault"
)

// FuzzRing gives any bytes as a keyring: an error of a kind that the start knows what to say to, and never a panic.
func FuzzRing(f *testing.F) {
	keys := Keys{Current: Ephemeral()}
	file := &memory{}
	r, err := NewRing(file, "node", keys, true)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := r.Rotate(5); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(file.content))
	f.Add([]byte("rollcall-keyring 1 0011223344556677\nAAAA\n00000000\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if raw == nil {
			raw = []byte{}
		}
		got, err := OpenRing(&memory{content: raw}, "node", keys)
		switch {
		case err == nil && !bytes.Equal(raw, file.content):
			t.Fatalf("opened what nobody wrote: %+v", got.Status())
		case err != nil && !fault.Is(err, fault.Corrupt) && !fault.Is(err, fault.Denied):
			t.Fatalf("%v", err)
		}
	})
}

// FuzzStream gives any bytes as a sealed stream, under the right keys.
func FuzzStream(f *testing.F) {
	keys := Keys{Current: Ephemeral()}
	r, err := NewRing(&memory{}, "node", keys, false)
	if err != nil {
		f.Fatal(err)
	}
	text := bytes.Repeat([]byte("state"), 100)
	ring := stream(f, text, func(w io.Writer) (*Writer, error) { out, _, err := r.NewWriter(w, nil); return out, err })
	backup := stream(f, text, func(w io.Writer) (*Writer, error) { return keys.Current.NewWriter(w, nil) })
	f.Add(ring)
	f.Add(backup)
	f.Add([]byte(streamMagic))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if size := PlainSize(int64(len(raw))); size < 0 || size > int64(len(raw)) {
			t.Fatalf("PlainSize of %d is %d", len(raw), size)
		}
		_, _ = RingKey(raw)
		_, _ = IsMark(raw)
		for _, open := range []func() (*Reader, error){
			func() (*Reader, error) { return r.NewReader(bytes.NewReader(raw), nil) },
			func() (*Reader, error) { return keys.NewReader(bytes.NewReader(raw), nil) },
		} {
			in, err := open()
			if err == nil {
				_, err = io.ReadAll(in)
			}
			switch {
			case err == nil && !bytes.Equal(raw, ring) && !bytes.Equal(raw, backup):
				t.Fatal("opened what nobody wrote")
			case err != nil && !fault.Is(err, fault.Corrupt) && !fault.Is(err, fault.Denied):
				t.Fatalf("%v", err)
			}
		}
	})
}

package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"testing"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/node/fault"
)

// directory is a content store with files in its plugin directory. It counts how often it was told to get bytes that it
// has no file for.
type directory struct {
	files map[string][]byte // by command
	kept  map[string][]byte // by sha256
	asked int
}

func hashOf(b []byte) string { h := sha256.Sum256(b); return hex.EncodeToString(h[:]) }

func (d *directory) OpenContent(sha string) (io.ReadCloser, int64, error) {
	if b, ok := d.kept[sha]; ok {
		return io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
	}
	return nil, 0, fault.New(fault.NotFound, "open plugin", sha, "not kept")
}

func (d *directory) Hash(_ context.Context, command string) (string, error) {
	if b, ok := d.files[command]; ok {
		return hashOf(b), nil
	}
	return "", fault.New(fault.NotFound, "hash", command, "no such file")
}

func (d *directory) Ensure(_ context.Context, spec *commandv1.Spec) error {
	b, ok := d.files[spec.GetCommand()]
	if !ok || hashOf(b) != spec.GetSha256() {
		d.asked++
		return fault.New(fault.NotFound, "ensure", spec.GetCommand(), "not here")
	}
	d.kept[spec.GetSha256()] = b
	return nil
}

func TestANodeGivesWhatLiesInItsPluginDirectoryThoughItNeverRanIt(t *testing.T) {
	program, other := []byte("a program"), []byte("another one under its name")
	sha := hashOf(program)
	specs := func(want string) []*commandv1.Spec {
		if want != sha {
			return nil
		}
		return []*commandv1.Spec{{Name: "kv", Command: "gone", Sha256: sha}, {Name: "kv", Command: "kv", Sha256: sha}}
	}
	for _, tc := range []struct {
		name  string
		files map[string][]byte
		sha   string
		found bool
	}{
		{"registered and there", map[string][]byte{"kv": program}, sha, true},
		{"another file under its name", map[string][]byte{"kv": other}, sha, false},
		{"not there", nil, sha, false},
		{"there, and not registered", map[string][]byte{"kv": other}, hashOf(other), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := &directory{files: tc.files, kept: map[string][]byte{}}
			c := &contentServer{store: d, specs: specs}
			r, err := c.open(t.Context(), tc.sha)
			if d.asked > 0 {
				t.Error("it looked for bytes elsewhere: two nodes that lack them would ask each other")
			}
			if !tc.found {
				if !fault.Is(err, fault.NotFound) {
					t.Fatalf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, _ := io.ReadAll(r); !bytes.Equal(got, program) {
				t.Errorf("it gave %q", got)
			}
		})
	}
}

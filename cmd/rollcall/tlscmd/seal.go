package tlscmd

import (
	"io"
	"os"
	"path/filepath"

	"rollcall/node/fault"
	"rollcall/node/seal"
	"rollcall/transport/pki"
)

// sealFile is the key that nodes seal their disks with.
const sealFile = "seal.key"

// SealKey makes seal.key in a directory. It replaces nothing: a key that is gone takes what it has sealed with it.
func SealKey(w io.Writer, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.As(fault.Invalid, err, "make directory", dir)
	}
	path := filepath.Join(dir, sealFile)
	if err := pki.WriteNew(path, []byte(seal.NewKeyText()), 0o600, false); err != nil {
		return err
	}
	say(w, "seal key:              %s (seal.key_file of every node; keep a copy elsewhere: nothing opens a sealed disk without it)", path)
	return nil
}

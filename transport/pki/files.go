package pki

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"rollcall/node/fault"
)

// WriteNew writes data to a file that must not exist yet. With replace it may exist and is replaced in one step, so
// that a reader sees the old bytes or the new ones. File and directory are on disk when it returns. Keys are written
// with mode 0600.
func WriteNew(path string, data []byte, mode fs.FileMode, replace bool) error {
	if !replace {
		if _, err := os.Lstat(path); err == nil {
			return fault.New(fault.Conflict, "write", path, "the file exists; move it away, or say --force to replace it")
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fault.Wrap(err, "write", path)
		}
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return fault.Wrap(err, "write", path)
	}
	defer os.Remove(f.Name()) // fails once it is renamed; then there is nothing to remove
	err = errors.Join(f.Chmod(mode), writeSync(f, data), f.Close())
	if err != nil {
		return fault.Wrap(err, "write", path)
	}
	if replace {
		err = os.Rename(f.Name(), path)
	} else {
		// A link fails where a rename would overwrite what somebody made since Lstat.
		err = os.Link(f.Name(), path)
	}
	if err != nil {
		return fault.Wrap(err, "write", path)
	}
	return fault.Wrap(syncDir(dir), "write", path)
}

func writeSync(f *os.File, data []byte) error {
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ReadKey reads a private key file and refuses one that everybody on the machine can read: such a key is no secret.
// Reading by the group is allowed, because that is how orchestrators hand secrets to a service user.
func ReadKey(path string) ([]byte, error) {
	return readSmall("read key", path, func(info fs.FileInfo) error {
		if perm := info.Mode().Perm(); perm&0o007 != 0 {
			return fault.New(fault.Invalid, "read key", path,
				"its mode is %04o: everybody can read it; run: chmod 600 %s, and issue a new one if it was exposed", perm, path)
		}
		return nil
	})
}

// ReadCerts reads a certificate file of at most 1 MiB.
func ReadCerts(path string) ([]byte, error) {
	return readSmall("read certificates", path, func(fs.FileInfo) error { return nil })
}

// maxPEM bounds what is read: a bundle of hundreds of authorities is smaller.
const maxPEM = 1 << 20

func readSmall(op, path string, check func(fs.FileInfo) error) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, op, path)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fault.As(fault.Invalid, err, op, path)
	}
	if err := check(info); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, fault.As(fault.Invalid, err, op, path)
	}
	if len(data) > maxPEM {
		return nil, fault.New(fault.TooLarge, op, path, "it is larger than %d bytes", maxPEM)
	}
	return data, nil
}

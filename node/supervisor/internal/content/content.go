// Package content keeps plugin bytes by their sha256 and hands them out as images that can be executed: the bytes
// that were hashed are the bytes that run. node/supervisor is its only user.
package content

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"rollcall/node/fault"
)

// Fetcher gets bytes from a peer. Fetch writes the bytes whose hash is sha256 to w; what it writes is verified by the
// caller, and an error may come after any number of bytes.
type Fetcher interface {
	Fetch(ctx context.Context, sha256 string, w io.Writer) error
}

// Config is what Open needs.
type Config struct {
	// PluginDir is where commands are looked up. It need not exist; it must not be a symbolic link.
	PluginDir string
	// Dir is the store itself. Open makes it with mode 0700.
	Dir string
	// MaxSize bounds one file, in bytes.
	MaxSize int64
	// Grace is how long bytes that were asked for stay, whatever Keep says: what is being registered or prepared is
	// named by no state yet.
	Grace time.Duration
	// NoMemfd executes from the store's files even where sealed memory files are to be had.
	NoMemfd bool
	// Fetch may be nil: then bytes come from PluginDir alone.
	Fetch Fetcher
	// Logger is required.
	Logger *slog.Logger
}

// Store is a directory of files named by their sha256, and the images made of them. All methods may be called from any
// goroutine.
type Store struct {
	cfg Config

	mu     sync.Mutex
	images map[string]*Image
	busy   map[string]chan struct{}
	asked  map[string]time.Time
	closed bool

	warnOnce sync.Once
}

// Open makes the directory, removes what an interrupted write left there, and checks the plugin directory.
func Open(cfg Config) (*Store, error) {
	if cfg.PluginDir != "" {
		if info, err := os.Lstat(cfg.PluginDir); err == nil {
			switch {
			case info.Mode()&fs.ModeSymlink != 0:
				target, _ := filepath.EvalSymlinks(cfg.PluginDir)
				return nil, fault.New(fault.Invalid, "open plugin directory", cfg.PluginDir,
					"it is a symbolic link; configure its target %s instead", target)
			case !info.IsDir():
				return nil, fault.New(fault.Invalid, "open plugin directory", cfg.PluginDir, "it is not a directory")
			case info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0:
				cfg.Logger.Warn("everybody may write to the plugin directory; take that right away", "dir", cfg.PluginDir)
			}
		}
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fault.As(fault.Internal, err, "make content store", cfg.Dir)
	}
	if err := os.Chmod(cfg.Dir, 0o700); err != nil {
		return nil, fault.As(fault.Internal, err, "protect content store", cfg.Dir)
	}
	left, err := filepath.Glob(filepath.Join(cfg.Dir, ".tmp-*"))
	if err != nil {
		return nil, fault.As(fault.Internal, err, "read content store", cfg.Dir)
	}
	for _, p := range left {
		_ = os.Remove(p)
	}
	return &Store{
		cfg: cfg, images: map[string]*Image{}, busy: map[string]chan struct{}{}, asked: map[string]time.Time{},
	}, nil
}

// Close gives up every image. Processes that run from one go on.
func (s *Store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for sha, img := range s.images {
		delete(s.images, sha)
		img.drop()
	}
}

// ValidSHA256 reports whether s is a sha256 in lower-case hex.
func ValidSHA256(s string) bool {
	if len(s) != sha256.Size*2 {
		return false
	}
	for _, c := range s {
		if !strings.ContainsRune("0123456789abcdef", c) {
			return false
		}
	}
	return true
}

// ValidCommand checks the name of a file in the plugin directory, before anything is opened. Errors are fault.Invalid.
func ValidCommand(command string) error {
	bad := func(why string) error {
		return fault.New(fault.Invalid, "check command", fmt.Sprintf("%q", command), "%s", why)
	}
	switch {
	case command == "":
		return bad("it is empty; give the name of a file in the plugin directory")
	case len(command) > 512:
		return bad("it is longer than 512 bytes")
	case strings.ContainsAny(command, "\x00\n\r\\"):
		return bad("it holds a byte that no file name in the plugin directory may have")
	case filepath.IsAbs(command):
		return bad("it is absolute; give a name relative to the plugin directory")
	case !filepath.IsLocal(command) || filepath.Clean(command) != command || command == ".":
		return bad("it leaves the plugin directory or is not in its shortest form")
	}
	return nil
}

// Hash returns the sha256 of a file in the plugin directory. Errors: fault.Invalid (not a name, a link, not a
// regular file, writable by everybody, somebody else's), fault.NotFound, fault.TooLarge.
func (s *Store) Hash(ctx context.Context, command string) (string, error) {
	f, err := s.openCommand(command)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, err := s.copyHash(ctx, io.Discard, f)
	if err != nil {
		return "", fault.Wrap(err, "hash plugin file", command)
	}
	return sum, nil
}

// Ensure has the bytes of sha in the store, verified: from the store, else from the plugin directory, else from a
// peer. A file in the plugin directory whose hash is another one is never used; it is told in the log, and the peers are
// asked as if it were not there. Errors: fault.Refused, fault.Invalid, fault.TooLarge, or the fetcher's.
func (s *Store) Ensure(ctx context.Context, command, sha string) error {
	if !ValidSHA256(sha) {
		return fault.New(fault.Invalid, "check sha256", fmt.Sprintf("%q", sha), "it is not 64 lower-case hex digits")
	}
	unlock, err := s.lock(ctx, sha)
	if err != nil {
		return fault.Wrap(err, "wait for plugin bytes", sha)
	}
	defer unlock()
	return s.ensure(ctx, command, sha)
}

// lock makes one caller at a time work on a sha.
func (s *Store) lock(ctx context.Context, sha string) (func(), error) {
	for {
		s.mu.Lock()
		s.asked[sha] = time.Now()
		if s.closed {
			s.mu.Unlock()
			return nil, fault.Text(fault.Unavailable, "the plugin store is closed")
		}
		wait, taken := s.busy[sha]
		if !taken {
			mine := make(chan struct{})
			s.busy[sha] = mine
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				delete(s.busy, sha)
				s.mu.Unlock()
				close(mine)
			}, nil
		}
		s.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *Store) ensure(ctx context.Context, command, sha string) error {
	switch img, err := s.image(ctx, sha); {
	case err == nil:
		if !img.Sealed {
			img.drop()
		}
		return nil
	case fault.Is(err, fault.Corrupt):
		s.cfg.Logger.Error("stored plugin bytes are damaged; getting them again", "sha256", sha, "error", err)
		_ = os.Remove(s.path(sha))
	case !fault.Is(err, fault.NotFound):
		return err
	}
	var wrong *mismatch
	if command != "" {
		err := s.fromPluginDir(ctx, command, sha)
		switch {
		case err == nil:
			return nil
		case errors.As(err, &wrong):
			s.cfg.Logger.Warn("the file in the plugin directory is not the registered one; asking the other nodes for that",
				"command", command, "registered", sha, "found", wrong.got)
		case !fault.Is(err, fault.NotFound):
			return err
		}
	}
	var err error = fault.Text(fault.Refused, "there are none to ask")
	if s.cfg.Fetch != nil {
		err = s.add(sha, func(w io.Writer) error { return s.cfg.Fetch.Fetch(ctx, sha, w) })
	}
	switch {
	case err == nil:
		return nil
	case s.cfg.Fetch == nil && wrong == nil:
		return fault.New(fault.Refused, "find plugin", command, "there is no such file in the plugin directory %s", s.cfg.PluginDir)
	case wrong != nil && ctx.Err() == nil:
		return fault.New(fault.Refused, "verify plugin", command, "the file in the plugin directory has sha256 %s, registered is %s, "+
			"and no peer gave that: %w; put the registered file there", wrong.got, sha, err)
	default:
		return fault.New(fault.KindOf(err), "find plugin", command,
			"it is not in the plugin directory %s, and no peer gave it: %w", s.cfg.PluginDir, err)
	}
}

func (s *Store) fromPluginDir(ctx context.Context, command, sha string) error {
	f, err := s.openCommand(command)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.add(sha, func(w io.Writer) error {
		_, err := s.copyHash(ctx, w, f)
		return err
	})
}

// mismatch says which bytes came instead.
type mismatch struct{ want, got string }

func (m *mismatch) Error() string { return "the bytes have sha256 " + m.got + ", wanted is " + m.want }

// add writes what fill writes to a file, and gives it its name only when its hash is sha.
func (s *Store) add(sha string, fill func(io.Writer) error) error {
	tmp, err := os.CreateTemp(s.cfg.Dir, ".tmp-*")
	if err != nil {
		return fault.As(fault.Internal, err, "write content store", s.cfg.Dir)
	}
	defer os.Remove(tmp.Name()) //nolint:errcheck // it is gone after the rename
	defer tmp.Close()           //nolint:errcheck // closed with a check below
	sum := sha256.New()
	if err := fill(&limited{w: io.MultiWriter(tmp, sum), left: s.cfg.MaxSize}); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != sha {
		return fault.As(fault.Refused, &mismatch{want: sha, got: got}, "verify plugin bytes", "")
	}
	err = tmp.Chmod(0o500)
	if err == nil {
		err = tmp.Sync()
	}
	if err == nil {
		err = tmp.Close()
	}
	if err == nil {
		err = os.Rename(tmp.Name(), s.path(sha))
	}
	if err == nil {
		err = syncDir(s.cfg.Dir)
	}
	return fault.As(fault.Internal, err, "write content store", s.path(sha))
}

// OpenContent opens stored bytes for a peer that asks. Errors: fault.NotFound, fault.Invalid. The peer verifies them.
func (s *Store) OpenContent(sha string) (io.ReadCloser, int64, error) {
	if !ValidSHA256(sha) {
		return nil, 0, fault.New(fault.Invalid, "check sha256", fmt.Sprintf("%q", sha), "it is not 64 lower-case hex digits")
	}
	f, err := os.Open(s.path(sha))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fault.New(fault.NotFound, "open plugin bytes", sha, "this node does not have them")
	}
	if err != nil {
		return nil, 0, fault.As(fault.Internal, err, "open plugin bytes", sha)
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, 0, fault.As(fault.Internal, err, "open plugin bytes", sha)
	}
	return f, info.Size(), nil
}

// Keep removes all bytes but those that are named, and those asked for within the grace.
func (s *Store) Keep(shas map[string]bool) {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		s.cfg.Logger.Warn("read content store", "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	young := func(sha string) bool {
		at, ok := s.asked[sha]
		return ok && time.Since(at) < s.cfg.Grace
	}
	for _, e := range entries {
		if sha := e.Name(); ValidSHA256(sha) && !shas[sha] && !young(sha) && s.busy[sha] == nil {
			_ = os.Remove(s.path(sha))
			s.cfg.Logger.Debug("plugin bytes removed", "sha256", sha)
		}
	}
	for sha, img := range s.images {
		if !shas[sha] && !young(sha) && s.busy[sha] == nil {
			delete(s.images, sha)
			img.drop()
		}
	}
	for sha := range s.asked {
		if !young(sha) {
			delete(s.asked, sha)
		}
	}
}

func (s *Store) path(sha string) string { return filepath.Join(s.cfg.Dir, sha) }

func (s *Store) copyHash(ctx context.Context, w io.Writer, r io.Reader) (string, error) {
	sum := sha256.New()
	_, err := io.Copy(&limited{w: io.MultiWriter(w, sum), left: s.cfg.MaxSize}, &ctxReader{ctx, r})
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// limited refuses more than left bytes.
type limited struct {
	w    io.Writer
	left int64
}

func (l *limited) Write(p []byte) (int, error) {
	if l.left -= int64(len(p)); l.left < 0 {
		return 0, fault.Text(fault.TooLarge, "the file is larger than the limit for plugins")
	}
	return l.w.Write(p)
}

// ctxReader ends a long copy when its context ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/node/fault"
)

func sha(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

type peer func(ctx context.Context, sha string, w io.Writer) error

func (p peer) Fetch(ctx context.Context, sha string, w io.Writer) error { return p(ctx, sha, w) }

func open(t *testing.T, change func(*Config)) *Store {
	t.Helper()
	cfg := Config{PluginDir: t.TempDir(), Dir: filepath.Join(t.TempDir(), "plugins"), MaxSize: 1 << 20, Logger: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func put(t *testing.T, s *Store, name string, content []byte) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.cfg.PluginDir, name), content, 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	return sha(content)
}

func TestOnlyNamesInsideThePluginDirectoryAreOpened(t *testing.T) {
	s := open(t, nil)
	for _, name := range []string{
		"", ".", "..", "../x", "a/../x", "a//b", "/etc/passwd", "a\x00b", "a\nb", `a\b`, "./x", "a/", strings.Repeat("x", 600),
	} {
		if _, err := s.Hash(t.Context(), name); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := s.Hash(t.Context(), "missing"); !fault.Is(err, fault.NotFound) {
		t.Errorf("missing: %v", err)
	}
}

func TestWhatIsNotAPlainFileIsRefused(t *testing.T) {
	s := open(t, nil)
	dir := s.cfg.PluginDir
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, s, "good", []byte("x"))
	put(t, s, "open", []byte("x"))
	put(t, s, "suid", []byte("x"))
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.Chmod(in("open"), 0o777), os.Chmod(in("suid"), 0o755|os.ModeSetuid), //nolint:gosec // what is tested
		os.Symlink(outside, in("link-out")), os.Symlink("good", in("link-in")), os.Symlink("/proc/self/fd/0", in("magic")),
		os.Symlink(filepath.Dir(outside), in("dir-out")), os.Mkdir(in("dir"), 0o755), syscall.Mkfifo(in("fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"open", "suid", "link-out", "link-in", "magic", "dir-out/outside", "dir", "fifo"} {
		done := make(chan error, 1)
		go func() {
			_, err := s.Hash(t.Context(), name)
			done <- err
		}()
		select {
		case err := <-done:
			if !fault.Is(err, fault.Invalid) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("%s blocks", name)
		}
	}
	if os.Geteuid() == 0 {
		put(t, s, "foreign", []byte("x"))
		if err := os.Chown(in("foreign"), 4711, 4711); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Hash(t.Context(), "foreign"); !fault.Is(err, fault.Invalid) {
			t.Errorf("somebody else's file: %v", err)
		}
	}
	link := filepath.Join(t.TempDir(), "plugins")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{PluginDir: link, Dir: t.TempDir(), Logger: s.cfg.Logger}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a plugin directory that is a link: %v", err)
	}
	// The way for kernels without openat2 refuses the same.
	for _, name := range []string{"link-out", "link-in", "dir-out/outside"} {
		if _, err := openRoot(dir, name); !errors.Is(err, syscall.ELOOP) {
			t.Errorf("openRoot %s: %v", name, err)
		}
	}
}

func TestBytesComeFromTheStoreThenTheDirectoryThenAPeer(t *testing.T) {
	content := []byte("the bytes")
	asked := 0
	s := open(t, func(c *Config) {
		c.Fetch = peer(func(_ context.Context, _ string, w io.Writer) error {
			asked++
			_, err := w.Write(content)
			return err
		})
	})
	sum := put(t, s, "p", content)
	ensure := func(command string) {
		t.Helper()
		if err := s.Ensure(t.Context(), command, sum); err != nil {
			t.Fatal(err)
		}
	}
	ensure("p")
	put(t, s, "p", []byte("replaced since")) // the store has what was registered
	ensure("p")
	if asked != 0 {
		t.Errorf("a peer was asked %d times", asked)
	}
	r, size, err := s.OpenContent(sum)
	if err != nil {
		t.Fatal(err)
	}
	got, _ := io.ReadAll(r)
	_ = r.Close()
	if !bytes.Equal(got, content) || size != int64(len(content)) {
		t.Errorf("served %q", got)
	}

	s.Keep(nil)
	if _, _, err := s.OpenContent(sum); !fault.Is(err, fault.NotFound) {
		t.Errorf("after Keep(nil): %v", err)
	}
	ensure("p") // the file with another hash is passed over
	if asked != 1 {
		t.Errorf("a peer was asked %d times", asked)
	}
	s.Keep(map[string]bool{sum: true})
	ensure("p")
	if asked != 1 {
		t.Error("Keep removed what it was told to keep")
	}
}

func TestWhatAPeerSendsIsVerifiedAndBounded(t *testing.T) {
	var send func(w io.Writer) error
	s := open(t, func(c *Config) {
		c.MaxSize = 1000
		c.Fetch = peer(func(_ context.Context, _ string, w io.Writer) error { return send(w) })
	})
	want := sha([]byte("good"))
	for name, c := range map[string]struct {
		send func(io.Writer) error
		kind fault.Kind
	}{
		"other bytes": {func(w io.Writer) error { _, err := w.Write([]byte("evil")); return err }, fault.Refused},
		"endless": {func(w io.Writer) error {
			for {
				if _, err := w.Write(make([]byte, 100)); err != nil {
					return err
				}
			}
		}, fault.TooLarge},
		"no peer has it": {func(io.Writer) error { return fault.Text(fault.Unavailable, "nobody") }, fault.Unavailable},
	} {
		send = c.send
		if err := s.Ensure(t.Context(), "gone", want); !fault.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	left, err := os.ReadDir(s.cfg.Dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left in the store: %v, %v", left, err)
	}
	if err := s.Ensure(t.Context(), "gone", "../../etc/passwd"); !fault.Is(err, fault.Invalid) {
		t.Errorf("a sha256 that is a path: %v", err)
	}
}

func TestDamagedBytesAreReplacedAndNeverRun(t *testing.T) {
	s := open(t, func(c *Config) { c.NoMemfd = true })
	sum := put(t, s, "p", []byte("the bytes"))
	if err := s.Ensure(t.Context(), "p", sum); err != nil {
		t.Fatal(err)
	}
	damage := func() {
		if err := os.Chmod(s.path(sum), 0o700); err != nil { //nolint:gosec // a program
			t.Fatal(err)
		}
		if err := os.WriteFile(s.path(sum), []byte("the bytez"), 0o700); err != nil { //nolint:gosec // a program
			t.Fatal(err)
		}
	}
	damage()
	if _, _, err := s.Image(t.Context(), sum); !fault.Is(err, fault.Corrupt) {
		t.Errorf("damaged: %v", err)
	}
	if err := s.Ensure(t.Context(), "p", sum); err != nil {
		t.Fatal(err)
	}
	img, release, err := s.Image(t.Context(), sum)
	if err != nil || img.Sealed || img.Path() != s.path(sum) {
		t.Fatalf("repaired: %v", err)
	}
	release()

	// What an interrupted write left is removed at the next opening.
	tmp := filepath.Join(s.cfg.Dir, ".tmp-1")
	if err := os.WriteFile(tmp, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, func(c *Config) { c.Dir = s.cfg.Dir })
	if _, err := os.Stat(tmp); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	if info, err := os.Stat(s.cfg.Dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the store has mode %v, %v", info.Mode(), err)
	}
}

func TestASealedImageCannotBeChangedAndOutlivesItsFile(t *testing.T) {
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, nil)
	sum := put(t, s, "true", program)
	if err := s.Ensure(t.Context(), "true", sum); err != nil {
		t.Fatal(err)
	}
	img, release, err := s.Image(t.Context(), sum)
	if err != nil {
		t.Fatal(err)
	}
	if !img.Sealed {
		t.Fatal("this kernel has no sealed memory files")
	}
	if _, err := img.file.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EPERM) {
		t.Errorf("written to: %v", err)
	}
	if err := img.file.Truncate(1); !errors.Is(err, syscall.EPERM) {
		t.Errorf("truncated: %v", err)
	}
	s.Keep(nil) // the store's file goes, the image is still held
	if out, err := exec.CommandContext(t.Context(), img.Path()).CombinedOutput(); err != nil {
		t.Errorf("executed: %v %s", err, out)
	}
	if why := img.Executable(); why != "" {
		t.Error(why)
	}
	release()
	release() // twice is once
	if img.file != nil {
		t.Error("the memory is still held")
	}
}

// The file is swapped by rename, overwritten in place and cut short all the time; what comes out as an image has
// the right bytes or is refused.
func TestASwappedFileNeverBecomesAnImage(t *testing.T) {
	good, evil := bytes.Repeat([]byte("good"), 20_000), bytes.Repeat([]byte("evil"), 20_000)
	dir := t.TempDir()
	path := filepath.Join(dir, "p")
	ctx, cancel := context.WithCancel(t.Context())
	var attacker sync.WaitGroup
	attacker.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			content := [][]byte{good, evil}[i%2]
			switch i % 3 {
			case 0:
				_ = os.WriteFile(path+".new", content, 0o755) //nolint:gosec // a program
				_ = os.Rename(path+".new", path)
			case 1:
				if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
					_, _ = f.WriteAt(content, 0)
					_ = f.Close()
				}
			case 2:
				_ = os.Truncate(path, int64(i%len(good)))
			}
		}
	})
	defer attacker.Wait()
	defer cancel()
	want, passed := sha(good), 0
	for range 300 {
		s := open(t, func(c *Config) { c.PluginDir = dir })
		if err := s.Ensure(t.Context(), "p", want); err != nil {
			if !fault.Is(err, fault.Refused) {
				t.Fatal(err)
			}
			continue
		}
		img, release, err := s.Image(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(img.Path())
		release()
		s.Close()
		if err != nil || !bytes.Equal(got, good) {
			t.Fatalf("an image with other bytes: %v", err)
		}
		passed++
	}
	t.Logf("%d of 300 got through, all with the right bytes", passed)
}

func TestManyAskersGetOneFetch(t *testing.T) {
	var mu sync.Mutex
	asked := 0
	s := open(t, func(c *Config) {
		c.Fetch = peer(func(_ context.Context, _ string, w io.Writer) error {
			mu.Lock()
			asked++
			mu.Unlock()
			_, err := w.Write([]byte("x"))
			return err
		})
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := s.Ensure(t.Context(), "p", sha([]byte("x"))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if asked != 1 {
		t.Errorf("fetched %d times", asked)
	}
}

func TestWhatIsBeingRegisteredIsKept(t *testing.T) {
	s := open(t, func(c *Config) { c.Grace = time.Hour })
	sum := put(t, s, "p", []byte("x"))
	if err := s.Ensure(t.Context(), "p", sum); err != nil {
		t.Fatal(err)
	}
	s.Keep(nil)
	if r, _, err := s.OpenContent(sum); err != nil {
		t.Error(err)
	} else {
		_ = r.Close()
	}
}

func FuzzCommand(f *testing.F) {
	for _, s := range []string{"p", "a/b", "../x", "/x", "a\x00", "..", "a/..", "\u2025/x", "..\\x"} {
		f.Add(s)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, command string) {
		if ValidCommand(command) != nil {
			return
		}
		full := filepath.Join(dir, command)
		if rel, err := filepath.Rel(dir, full); err != nil || rel == ".." || strings.HasPrefix(rel, "../") || rel == "." {
			t.Errorf("%q leads to %s", command, full)
		}
	})
}

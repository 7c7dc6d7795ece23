package content

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"sync"

	"rollcall/node/fault"
)

// Image is verified bytes that can be executed: a sealed file in memory, or, where there is none, a file of the
// store that was hashed just before.
type Image struct {
	// SHA256 is what the bytes hash to.
	SHA256 string
	// Sealed tells that nobody can change the bytes any more.
	Sealed bool

	path string
	file *os.File // the memory file, or the store's file

	mu      sync.Mutex
	refs    int
	dropped bool
}

// Image returns the image of sha, which Ensure has put into the store, and a function that gives it back. Path is
// good to execute until then. Errors: fault.NotFound, fault.Corrupt.
func (s *Store) Image(ctx context.Context, sha string) (*Image, func(), error) {
	unlock, err := s.lock(ctx, sha)
	if err != nil {
		return nil, nil, fault.Wrap(err, "wait for plugin bytes", sha)
	}
	defer unlock()
	img, err := s.image(ctx, sha)
	if err != nil {
		return nil, nil, err
	}
	img.mu.Lock()
	img.refs++
	img.mu.Unlock()
	return img, sync.OnceFunc(img.release), nil
}

// Path is what to execute.
func (i *Image) Path() string { return i.path }

func (i *Image) release() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.refs--
	i.closeIfUnused()
}

func (i *Image) drop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.dropped = true
	i.closeIfUnused()
}

func (i *Image) closeIfUnused() {
	if i.dropped && i.refs == 0 && i.file != nil {
		_ = i.file.Close()
		i.file = nil
	}
}

// image returns the image from the cache, or makes it from the store's file. The caller holds the lock of sha.
func (s *Store) image(ctx context.Context, sha string) (*Image, error) {
	s.mu.Lock()
	img := s.images[sha]
	s.mu.Unlock()
	if img != nil && img.Sealed {
		return img, nil
	}
	f, err := os.Open(s.path(sha))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "open plugin bytes", sha, "they are not in the content store")
	}
	if err != nil {
		return nil, fault.As(fault.Internal, err, "open plugin bytes", sha)
	}
	defer f.Close() //nolint:errcheck // opened for reading
	mem, err := s.memfd(ctx, f, sha)
	if err != nil {
		return nil, err
	}
	if mem != nil {
		img = &Image{SHA256: sha, Sealed: true, path: mem.Name(), file: mem}
		s.mu.Lock()
		s.images[sha] = img
		s.mu.Unlock()
		return img, nil
	}
	// From the store's file: hashed again at every start, because nothing seals it.
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, fault.As(fault.Internal, err, "read plugin bytes", sha)
	}
	if err := s.verify(ctx, io.Discard, f, sha); err != nil {
		return nil, err
	}
	own, err := os.Open(s.path(sha))
	if err != nil {
		return nil, fault.As(fault.Internal, err, "open plugin bytes", sha)
	}
	return &Image{SHA256: sha, path: s.path(sha), file: own, dropped: true}, nil
}

// memfd copies f into a sealed file in memory while hashing it. It returns nil where there is no such thing.
func (s *Store) memfd(ctx context.Context, f *os.File, sha string) (*os.File, error) {
	if s.cfg.NoMemfd {
		return nil, nil
	}
	mem, err := newMemfd("plugin:" + sha[:12])
	if err == nil {
		if err := s.verify(ctx, mem, f, sha); err != nil {
			_ = mem.Close()
			return nil, err
		}
		if err = seal(mem); err == nil {
			return mem, nil
		}
		_ = mem.Close()
	}
	s.warnOnce.Do(func() {
		s.cfg.Logger.Warn("no sealed memory files here: plugins are executed from the content store", "error", err, "dir", s.cfg.Dir)
	})
	return nil, nil
}

func (s *Store) verify(ctx context.Context, w io.Writer, f *os.File, sha string) error {
	sum, err := s.copyHash(ctx, w, f)
	if err != nil {
		return fault.Wrap(err, "read plugin bytes", sha)
	}
	if sum != sha {
		return fault.New(fault.Corrupt, "verify plugin bytes", sha, "the stored file has sha256 %s", sum)
	}
	return nil
}

// Executable says in words why this host cannot execute the image; "" when nothing speaks against it.
func (i *Image) Executable() string {
	i.mu.Lock()
	f := i.file
	i.mu.Unlock()
	if f == nil {
		return ""
	}
	head := make([]byte, 64)
	n, _ := f.ReadAt(head, 0)
	head = head[:n]
	switch {
	case n == 0:
		return "the file is empty"
	case bytes.HasPrefix(head, []byte("#!")):
		line, _, _ := bytes.Cut(head, []byte("\n"))
		return fmt.Sprintf("it is a script (%q); a plugin must be an executable program of its own", line)
	case runtime.GOOS != "linux":
		return ""
	case !bytes.HasPrefix(head, []byte(elf.ELFMAG)):
		return fmt.Sprintf("it is not an ELF program (it begins with %q)", head[:min(n, 8)])
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return "its ELF header cannot be read, it may be truncated: " + err.Error()
	}
	if want := machine(); want != elf.EM_NONE && e.Machine != want {
		return fmt.Sprintf("it was built for another machine: %s, this host is %s", e.Machine, want)
	}
	if e.Type != elf.ET_EXEC && e.Type != elf.ET_DYN {
		return fmt.Sprintf("it is not a program (ELF type %s)", e.Type)
	}
	return badSegments(e, f)
}

func badSegments(e *elf.File, f *os.File) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_LOAD && p.Off+p.Filesz > uint64(info.Size()) { //nolint:gosec // a size is never negative
			return fmt.Sprintf("it is truncated: a segment ends at byte %d of %d", p.Off+p.Filesz, info.Size())
		}
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		raw := make([]byte, p.Filesz)
		if _, err := p.ReadAt(raw, 0); err != nil {
			return ""
		}
		interp := strings.TrimRight(string(raw), "\x00")
		if _, err := os.Stat(interp); errors.Is(err, fs.ErrNotExist) {
			return fmt.Sprintf("it is linked dynamically and needs %s, which this host does not have; "+
				"build it statically (CGO_ENABLED=0)", interp)
		}
	}
	return ""
}

func machine() elf.Machine {
	switch runtime.GOARCH {
	case "amd64":
		return elf.EM_X86_64
	case "arm64":
		return elf.EM_AARCH64
	case "386":
		return elf.EM_386
	case "arm":
		return elf.EM_ARM
	case "riscv64":
		return elf.EM_RISCV
	case "ppc64", "ppc64le":
		return elf.EM_PPC64
	case "s390x":
		return elf.EM_S390
	default:
		return elf.EM_NONE
	}
}

// Contains reports which of the words stand in the bytes: a hint for explaining, never a decision.
func (i *Image) Contains(words ...string) []bool {
	found := make([]bool, len(words))
	i.mu.Lock()
	f := i.file
	i.mu.Unlock()
	if f == nil {
		return found
	}
	const chunk, overlap = 1 << 20, 256
	buf := make([]byte, chunk)
	for off := int64(0); ; off += chunk - overlap {
		n, err := f.ReadAt(buf, off)
		for j, w := range words {
			found[j] = found[j] || bytes.Contains(buf[:n], []byte(w))
		}
		if err != nil || n < chunk {
			return found
		}
	}
}

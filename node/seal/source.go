package seal

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"rollcall/node/fault"
)

const (
	// CommandLimit is how long a key command may take: a key service over a network may, a person may not.
	CommandLimit = 30 * time.Second
	// maxKeyText bounds what a key file or command may give, in bytes; a key has 45.
	maxKeyText = 4096
	// maxComplaint bounds what is kept of a command's standard error, in bytes.
	maxComplaint = 1024
)

// Source says where a key is from: a file or a command, one of them.
type Source struct {
	// File holds the key as NewKeyText makes it. It must not be open to everyone.
	File string
	// Command prints the same on its standard output. It runs without a shell, in the root directory, with nothing on
	// its standard input, and with no environment but PATH and what Env names.
	Command []string
	// Env names variables of this process that the command may see.
	Env []string
}

// Given reports whether there is a source at all.
func (s Source) Given() bool { return s.File != "" || len(s.Command) > 0 }

// Kind is "file" or "command".
func (s Source) Kind() string {
	if s.File != "" {
		return "file"
	}
	return "command"
}

// Load reads the key. fault.Invalid when there is none to be had, with the reason; the key is in no error.
func (s Source) Load(ctx context.Context) (*Key, error) {
	if s.File != "" {
		return s.readFile()
	}
	if len(s.Command) == 0 {
		return nil, fault.New(fault.Invalid, "read seal key", "", "neither a file nor a command is given")
	}
	return s.run(ctx)
}

func (s Source) readFile() (*Key, error) {
	f, err := os.Open(s.File)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, "read seal key", s.File)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fault.As(fault.Invalid, err, "read seal key", s.File)
	case !info.Mode().IsRegular():
		return nil, fault.New(fault.Invalid, "read seal key", s.File, "is not a file")
	case info.Mode().Perm()&0o007 != 0:
		return nil, fault.New(fault.Invalid, "read seal key", s.File, "everyone may read or change it (mode %#o); chmod 600 %s",
			info.Mode().Perm(), s.File)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyText+1))
	if err != nil {
		return nil, fault.As(fault.Invalid, err, "read seal key", s.File)
	}
	return ParseKey(text, s.File)
}

func (s Source) run(ctx context.Context) (*Key, error) {
	ctx, cancel := context.WithTimeout(ctx, CommandLimit)
	defer cancel()
	name := s.Command[0]
	out, complaint := &bounded{limit: maxKeyText + 1}, &bounded{limit: maxComplaint}
	cmd := exec.CommandContext(ctx, name, s.Command[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = "/", out, complaint, 2*time.Second
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for _, v := range s.Env {
		if text, ok := os.LookupEnv(v); ok {
			cmd.Env = append(cmd.Env, v+"="+text)
		}
	}
	// In a group of its own, so that what it has started ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return nil, fault.New(fault.Invalid, "run seal command", name, "it gave no key within %v", CommandLimit)
	case err != nil && strings.TrimSpace(complaint.String()) != "":
		return nil, fault.New(fault.Invalid, "run seal command", name, "%w; it said: %q", err, strings.TrimSpace(complaint.String()))
	case err != nil:
		return nil, fault.As(fault.Invalid, err, "run seal command", name)
	}
	return ParseKey(out.buf.Bytes(), "command "+name)
}

// bounded keeps the first bytes of what is written to it, and takes the rest for nothing.
type bounded struct {
	buf   bytes.Buffer
	limit int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.buf.Write(p[:min(len(p), b.limit-b.buf.Len())])
	return len(p), nil
}

func (b *bounded) String() string { return b.buf.String() }

// LoadKeys reads the key in force and, where it is given, the one before it.
func LoadKeys(ctx context.Context, current, previous Source) (Keys, error) {
	key, err := current.Load(ctx)
	if err != nil {
		return Keys{}, err
	}
	keys := Keys{Current: key}
	if previous.Given() {
		old, perr := previous.Load(ctx)
		if perr != nil {
			return Keys{}, errors.Join(fault.New(fault.Invalid, "read seal key", "",
				"the previous key is named in the configuration and cannot be had; leave it out once every node has started with the new one"), perr)
		}
		keys.Previous = append(keys.Previous, old)
	}
	return keys, nil
}

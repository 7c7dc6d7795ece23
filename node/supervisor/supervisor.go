// Package supervisor owns every plugin process of a node: it keeps and verifies the bytes, starts them, speaks the
// plugin protocol, watches, drains and kills. Nobody else starts a process. See DESIGN.md beside it.
package supervisor

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"rollcall/node/fault"
	"rollcall/node/supervisor/internal/content"
	"rollcall/node/supervisor/internal/proc"
)

// ownerVariable marks every process that descends from a plugin with the host that it belongs to.
const ownerVariable = "ROLLCALL_PLUGIN_OWNER="

// cgroupPrefix begins the names of the cgroups that are made here.
const cgroupPrefix = "rollcall-"

// reapEvery is how often orphans that ended are collected. They cost a table entry each until then.
const reapEvery = 2 * time.Second

// Supervisor owns the plugin processes of one node. All methods may be called from any goroutine.
type Supervisor struct {
	cfg     Config
	log     *slog.Logger
	store   *content.Store
	spawner *proc.Spawner
	metrics *metrics
	sockets socketDir
	owner   string // names this host; ownerVariable and names of cgroups add a process to it
	slots   chan struct{}

	mu        sync.Mutex
	closed    bool
	processes map[*Process]struct{}
	starting  sync.WaitGroup // Start calls under way
	work      sync.WaitGroup // goroutines of runs and of the reaper
	quit      context.CancelFunc
	closing   sync.Once
}

// New opens the content store, kills what an earlier host on the same data directory has left behind, and starts
// the thread that starts processes. It makes this program a subreaper, for as long as it runs. Close undoes the
// rest.
func New(cfg Config) (*Supervisor, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	var fetch content.Fetcher
	if cfg.Fetch != nil {
		fetch = cfg.Fetch
	}
	store, err := content.Open(content.Config{
		PluginDir: cfg.PluginDir, Dir: filepath.Join(cfg.DataDir, "plugins"), MaxSize: cfg.MaxBinary, Grace: cfg.ContentGrace,
		NoMemfd: cfg.NoMemfd, Fetch: fetch, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	sockets, err := newSocketDir(cfg)
	if err != nil {
		store.Close()
		return nil, err
	}
	if err := proc.Subreaper(); err != nil {
		cfg.Logger.Warn("cannot adopt orphans of plugins: some may be left when a plugin that forked ends", "error", err)
	}
	home := homeID(cfg.DataDir) + ":"
	if cfg.Cgroup != "" {
		proc.SweepCgroups(cfg.Cgroup, cgroupPrefix+home, hostIsGone)
	}
	if n := proc.Sweep(ownerVariable+home, hostIsGone); n > 0 {
		cfg.Logger.Warn("killed processes that plugins of an earlier run had left behind", "count", n)
	}
	s := &Supervisor{
		cfg: cfg, log: cfg.Logger, store: store, spawner: proc.NewSpawner(), metrics: newMetrics(cfg.Registerer), sockets: sockets,
		owner:     fmt.Sprintf("%s%d:%d:", home, os.Getpid(), proc.StartTime(os.Getpid())),
		slots:     make(chan struct{}, startSlots),
		processes: map[*Process]struct{}{},
	}
	s.metrics.watch(s)
	ctx, quit := context.WithCancel(context.Background())
	s.quit = quit
	s.work.Go(func() { Reap(ctx) })
	return s, nil
}

// homeID names a data directory, and not another one that has the same path in another container.
func homeID(dir string) string {
	name := dir
	if info, err := os.Stat(dir); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			name = fmt.Sprintf("%s %d %d", dir, st.Dev, st.Ino)
		}
	}
	id := sha256.Sum256([]byte(name))
	return hex.EncodeToString(id[:8])
}

// startSlots bounds the starts under way: a start costs 50-80 ms of CPU, and more at once only make each other time
// out.
const startSlots = 8

// hostIsGone reads "<pid>:<start time>:<process>" and tells whether that host has ended.
func hostIsGone(rest string) bool {
	pid, rest, _ := strings.Cut(rest, ":")
	start, _, ok := strings.Cut(rest, ":")
	n, err := strconv.Atoi(pid)
	if !ok || err != nil {
		return false
	}
	return strconv.FormatUint(proc.StartTime(n), 10) != start
}

// Reap collects orphans that have ended, until ctx ends. Every Supervisor does so by itself; a program that is PID
// 1 calls it too, for the time before and after. It never takes a process from whoever waits for it: see proc.Reap.
func Reap(ctx context.Context) {
	tick := time.NewTicker(reapEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			proc.Reap()
		case <-ctx.Done():
			return
		}
	}
}

// Close ends every process, each as Process.Close does, and waits for all of them. It does not outlast ctx by more
// than it takes the kernel to kill. Further calls wait for the first.
func (s *Supervisor) Close(ctx context.Context) error {
	s.closing.Do(func() { s.close(ctx) })
	return nil
}

func (s *Supervisor) close(ctx context.Context) {
	s.mu.Lock()
	s.closed = true
	s.quit()
	s.mu.Unlock()
	s.starting.Wait()

	s.mu.Lock()
	var all []*Process
	for p := range s.processes {
		all = append(all, p)
	}
	s.mu.Unlock()
	var wg sync.WaitGroup
	for _, p := range all {
		wg.Go(func() { _ = p.Close(ctx) })
	}
	wg.Wait()
	s.work.Wait()
	s.spawner.Close()
	s.store.Close()
	s.sockets.remove()
	s.metrics.unregister()
}

// Hash returns the sha256 of a file in the plugin directory, for registration. Errors: fault.NotFound,
// fault.Invalid (the name leaves the directory, a link, not a regular file, writable by everybody), fault.TooLarge.
func (s *Supervisor) Hash(ctx context.Context, command string) (string, error) {
	return s.store.Hash(ctx, command)
}

// Ensure has the spec's bytes in the content store, verified: from there, else from the plugin directory, else from
// a peer. Errors are of kind fault.Refused, fault.Invalid or fault.TooLarge, or what the fetcher answers.
func (s *Supervisor) Ensure(ctx context.Context, spec Spec) error {
	if err := spec.validate(); err != nil {
		return err
	}
	return fault.Wrap(s.store.Ensure(ctx, spec.Command, spec.SHA256), "verify", spec.String())
}

// OpenContent opens stored bytes to serve them to a peer, with their size. The caller closes. Errors:
// fault.NotFound, fault.Invalid.
func (s *Supervisor) OpenContent(sha256 string) (io.ReadCloser, int64, error) {
	return s.store.OpenContent(sha256)
}

// Keep removes from store and memory what is not named. Bytes that were asked for in the last ten minutes stay
// (ContentGrace): what is being registered is named by no state yet.
func (s *Supervisor) Keep(shas map[string]bool) { s.store.Keep(shas) }

// Processes returns the processes that run now, in no order.
func (s *Supervisor) Processes() []*Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*Process
	for p := range s.processes {
		all = append(all, p)
	}
	return all
}

// socketDir is where the sockets of this supervisor's plugins are. Its lock tells others that it is in use.
type socketDir struct {
	path string
	lock *os.File
}

// newSocketDir makes the directory and removes those that hosts which were killed have left: their lock is free.
func newSocketDir(cfg Config) (socketDir, error) {
	base := cfg.SocketDir
	if base == "" {
		base = os.TempDir()
	}
	mode := os.FileMode(0o700)
	if cfg.UID != 0 {
		mode = 0o755 // plugins must get through; only what is inside is private
	}
	if err := os.MkdirAll(base, mode); err != nil {
		return socketDir{}, fault.As(fault.Internal, err, "make socket directory", base)
	}
	if err := passable(base, cfg); err != nil {
		return socketDir{}, err
	}
	old, _ := filepath.Glob(filepath.Join(base, "rcp-*", "lock"))
	for _, path := range old {
		if f, ok := tryLock(path); ok {
			_ = os.RemoveAll(filepath.Dir(path))
			_ = f.Close()
		}
	}
	var suffix [4]byte
	_, _ = rand.Read(suffix[:])
	d := socketDir{path: filepath.Join(base, "rcp-"+hex.EncodeToString(suffix[:]))}
	if len(d.path) > 60 {
		return socketDir{}, fault.New(fault.Invalid, "make socket directory", d.path,
			"it is too long for unix sockets; configure a shorter SocketDir")
	}
	mode = 0o700
	if cfg.UID != 0 {
		mode = 0o711 // the directory of each process inside is its own
	}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		return socketDir{}, fault.As(fault.Internal, err, "make socket directory", d.path)
	}
	if err := os.Chmod(d.path, mode); err != nil {
		return socketDir{}, fault.As(fault.Internal, err, "make socket directory", d.path)
	}
	f, ok := tryLock(filepath.Join(d.path, "lock"))
	if !ok {
		return socketDir{}, fault.New(fault.Internal, "lock socket directory", d.path, "another process holds it")
	}
	d.lock = f
	return d, nil
}

// passable tells whether plugins that run as another user can get at their sockets.
func passable(dir string, cfg Config) error {
	for d := filepath.Clean(dir); cfg.UID != 0; d = filepath.Dir(d) {
		info, err := os.Stat(d)
		if err != nil {
			return fault.As(fault.Internal, err, "check socket directory", d)
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().Perm()&0o001 == 0 && st.Uid != cfg.UID {
			return fault.New(fault.Invalid, "check socket directory", dir,
				"plugins run as uid %d, which may not pass %s (mode %s); configure another SocketDir", cfg.UID, d, info.Mode().Perm())
		}
		if d == filepath.Dir(d) {
			break
		}
	}
	return nil
}

func tryLock(path string) (*os.File, bool) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, false
	}
	return f, true
}

func (d socketDir) remove() {
	_ = os.RemoveAll(d.path)
	_ = d.lock.Close()
}

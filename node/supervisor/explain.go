package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"syscall"

	"rollcall/node/fault"
	"rollcall/node/supervisor/internal/proc"
)

func (l *launch) logger() *slog.Logger {
	return l.s.log.With("plugin", l.spec.Type+"/"+l.spec.Name, "version", l.spec.Version)
}

// explain turns a failed start into what an operator needs to know. It ends the process, so that its last words are
// there.
func (l *launch) explain(ctx, limit context.Context, err error) *StartError {
	if ctx.Err() != nil {
		return giveUp(l.spec, phaseHandshake, ctx)
	}
	r := l.runner()
	if r == nil || r.ID() == "" {
		if r != nil && r.spawnErr != nil {
			err = r.spawnErr
		}
		return startError(l.spec, phaseStart, fault.Refused, l.explainSpawn(err), err)
	}
	timedOut := limit.Err() != nil
	// A process that ends at this moment says more than the connection that broke with it.
	if !timedOut {
		waitAWhile(r.reaped)
	}
	diedAlone := r.diedAlone()
	r.kill()
	<-r.reaped
	cause := l.explainHandshake(r, err, timedOut, diedAlone)
	return startError(l.spec, phaseHandshake, fault.Refused, cause, err)
}

func (l *launch) explainSpawn(err error) string {
	what := l.spec.Command + " could not be executed: "
	switch {
	case strings.HasPrefix(err.Error(), "make a cgroup"):
		return err.Error()
	case errors.Is(err, syscall.ENOEXEC):
		return what + "the kernel does not know its format (another machine, or damaged)"
	case errors.Is(err, syscall.EACCES) && !l.img.Sealed && proc.NoExec(l.img.Path()):
		return what + "the file system of the data directory is mounted noexec; mount it without, or allow sealed memory files (memfd)"
	case errors.Is(err, fs.ErrPermission):
		return what + "permission denied; look at vm.memfd_noexec, at the security profile (seccomp, AppArmor, SELinux), " +
			"and at whether the server may change to the configured uid"
	case errors.Is(err, fs.ErrNotExist):
		return what + "the kernel did not find it or what it is linked with; is /proc mounted?"
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return what + "this host is out of processes, memory or files: " + err.Error()
	default:
		return what + err.Error()
	}
}

func (l *launch) explainHandshake(r *run, err error, timedOut bool, died string) string {
	r.mu.Lock()
	refusal := r.refusal
	r.mu.Unlock()
	first, stderr := r.first.text(), r.stderr.last()
	spoke := strings.Count(first, "|") >= 3
	switch {
	case refusal != "":
		return fmt.Sprintf("the plugin wants to be reached at %q; only unix sockets in its own directory are allowed", refusal)
	case timedOut && !spoke:
		return fmt.Sprintf("the plugin did not answer within %s: no handshake on its stdout%s",
			l.s.cfg.StartTimeout, l.lastWords(first, stderr))
	case timedOut:
		return fmt.Sprintf("the plugin answered the handshake, and nothing after it within %s%s", l.s.cfg.StartTimeout, lastLine(stderr))
	case strings.Contains(strings.Join(stderr, " "), "This binary is a plugin"):
		return l.explainCookie()
	case died != "" && !spoke:
		return "the plugin " + died + ", before its handshake" + l.lastWords(first, stderr)
	case died != "":
		return "the plugin " + died + ", right after its handshake" + lastLine(stderr)
	case spoke && strings.Contains(err.Error(), "API version"):
		return fmt.Sprintf("the plugin speaks protocol %s, this host %s; build it with a current SDK", field(first, 1), l.offered())
	case spoke && field(first, 4) != "grpc":
		return fmt.Sprintf("the plugin speaks %q, this host gRPC only; build it with a current SDK", field(first, 4))
	case !spoke && first != "":
		return fmt.Sprintf("the plugin wrote %q to its stdout where the handshake belongs", printable(shorten(first)))
	default:
		return "the plugin answered the handshake, but does not talk on its socket: " + printable(err.Error()) + lastLine(stderr)
	}
}

// explainCookie says which kind of plugin it is instead.
func (l *launch) explainCookie() string {
	has := l.img.Contains(backendHandshake.MagicCookieValue, databaseHandshake.MagicCookieValue)
	isBackend, isDatabase := has[0], has[1]
	switch {
	case l.spec.Type != TypeDatabase && isDatabase && !isBackend:
		return "this is a database plugin, registered as " + l.spec.Type
	case l.spec.Type == TypeDatabase && isBackend && !isDatabase:
		return "this is a secrets or auth plugin, registered as database"
	case !isBackend && !isDatabase:
		return "this is a plugin of another program: it knows neither the cookie of secrets and auth plugins nor that of database plugins"
	default:
		return "the plugin refused the handshake (wrong cookie): it is not a plugin of type " + l.spec.Type
	}
}

func (l *launch) offered() string {
	if l.spec.Type == TypeDatabase {
		return "5 and 6"
	}
	return "5"
}

func (l *launch) lastWords(stdout string, stderr []string) string {
	if len(stderr) == 0 && stdout != "" {
		return fmt.Sprintf("; it wrote %q to its stdout", printable(shorten(stdout)))
	}
	return lastLine(stderr)
}

// lastLine quotes up to three lines; a panic's first line is among the last that are kept.
func lastLine(stderr []string) string {
	if len(stderr) == 0 {
		return ""
	}
	from := max(0, len(stderr)-3)
	for i, line := range stderr {
		if isPanic(line) {
			from = i
			break
		}
	}
	return "; its last lines: " + strings.Join(stderr[from:min(len(stderr), from+3)], " | ")
}

func field(line string, n int) string {
	parts := strings.Split(line, "|")
	if n < len(parts) {
		return printable(shorten(strings.TrimSpace(parts[n])))
	}
	return "net/rpc"
}

func shorten(s string) string {
	if len(s) > 120 {
		return s[:120] + "..."
	}
	return s
}

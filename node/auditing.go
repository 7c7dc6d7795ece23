package node

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"rollcall/node/audit"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// openAudit opens the audit file, where there is to be one: a node that cannot write it does not start.
func (n *Node) openAudit() error {
	if n.cfg.Audit.File == "" {
		return nil
	}
	var err error
	n.audit, err = audit.Open(audit.Config{
		File: n.cfg.Audit.File, Forbidden: []string{n.cfg.PluginDir, n.cfg.DataDir, n.cfg.Sockets()},
		ClearAccessors: !n.cfg.Audit.HMACAccessor, Headers: n.cfg.Audit.Headers, Salt: n.auditSalt,
		Logger: n.component("audit"), Registerer: n.reg,
	})
	if err != nil {
		return err
	}
	n.life.did("audit device", func(context.Context) error { return n.audit.Close() })
	return nil
}

func (n *Node) auditSalt() string { return n.state.View().AuditSalt() }

// saltAudit is the leader's: a cluster that has no salt for audit records gets one, whether this node writes any or not.
func (n *Node) saltAudit(ctx context.Context, term uint64) {
	for ctx.Err() == nil {
		changed, view := n.state.Changed(), n.state.View()
		if view.AuditSalt() != "" {
			return
		}
		if view.Initialized() {
			salt := make([]byte, 32)
			_, _ = rand.Read(salt) // it never fails
			_, err := n.replica.ProposeAsLeader(ctx, term, &commandv1.Command{WallMs: time.Now().UnixMilli(), Body: &commandv1.Command_SetAuditSalt{
				SetAuditSalt: &commandv1.SetAuditSalt{Salt: salt},
			}})
			if err == nil || fault.Is(err, fault.NotLeader) {
				return
			}
			n.log.Debug("enter the salt of audit records", "error", err)
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// hangups is what listens for a rotated log.
type hangups struct {
	wg   sync.WaitGroup
	stop context.CancelFunc
}

func (n *Node) startHangups() error {
	if n.opt.Hangup == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background()) // it ends with stopHangups
	n.hangs.stop = cancel
	n.hangs.wg.Go(func() {
		for {
			select {
			case <-n.opt.Hangup:
				n.reopenAudit()
			case <-ctx.Done():
				return
			}
		}
	})
	return nil
}

func (n *Node) stopHangups(context.Context) error {
	if n.hangs.stop != nil {
		n.hangs.stop()
		n.hangs.wg.Wait()
	}
	return nil
}

func (n *Node) reopenAudit() {
	if n.audit == nil {
		n.log.Info("told to open the audit file anew, and there is none: audit.file is not set")
		return
	}
	if err := n.audit.Reopen(); err != nil {
		n.log.Error("open the audit file anew: records go on into the old one", "error", err)
		return
	}
	n.log.Info("opened the audit file anew", "file", n.cfg.Audit.File)
}

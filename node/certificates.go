package node

import (
	"context"
	"os"
	"sync"
	"time"
)

// certificateEvery is how often the certificate files are looked at.
const certificateEvery = 10 * time.Second

// rotor reads the cluster port's certificate again when its files change, so that it rotates without a restart.
type rotor struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func (n *Node) startCertificates() error {
	if n.opt.Credentials != nil {
		return nil // they live in memory
	}
	ctx, cancel := context.WithCancel(context.Background()) // it ends with stopCertificates
	n.rotor.cancel = cancel
	n.rotor.wg.Go(func() { n.watchCertificates(ctx) })
	return nil
}

func (n *Node) stopCertificates(context.Context) error {
	if n.rotor.cancel != nil {
		n.rotor.cancel()
		n.rotor.wg.Wait()
	}
	return nil
}

func (n *Node) watchCertificates(ctx context.Context) {
	files := []string{n.cfg.Cluster.CAFile, n.cfg.Cluster.CertFile, n.cfg.Cluster.KeyFile}
	seen := stamps(files)
	tick := time.NewTicker(certificateEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := stamps(files)
		if now == seen {
			continue
		}
		// Files are replaced one by one: a set that does not fit together is tried again at the next look.
		if err := n.creds.Reload(); err != nil {
			n.log.Warn("read the changed certificates: the old ones stay in use", "error", err)
			continue
		}
		seen = now
		n.log.Info("the certificates of the cluster port were read again", "file", n.cfg.Cluster.CertFile)
	}
}

// stamps tells whether any of three files has changed since.
func stamps(files []string) (out [3]time.Time) {
	for i, f := range files[:len(out)] {
		if info, err := os.Stat(f); err == nil {
			out[i] = info.ModTime()
		}
	}
	return out
}

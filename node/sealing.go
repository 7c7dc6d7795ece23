package node

import (
	"context"
	"time"

	"rollcall/node/api"
	"rollcall/node/seal"
)

// openSeal gets the key that the disk is sealed with. Without it a node that was told to seal does not start.
func (n *Node) openSeal() error {
	current, previous := n.cfg.Seal.sources()
	switch {
	case n.opt.SealKeys != nil:
		n.keys = n.opt.SealKeys
		return nil
	case !current.Given():
		return nil
	}
	keys, err := seal.LoadKeys(context.Background(), current, previous) // it has a deadline of its own
	if err != nil {
		return err
	}
	n.keys = &keys
	n.log.Info("what this node writes to its disk is sealed", "key", keys.Current.ID(), "from", keys.Current.From())
	return nil
}

// sources are where the block seal says that the keys are.
func (s *SealConfig) sources() (current, previous seal.Source) {
	return seal.Source{File: s.KeyFile, Command: s.Command, Env: s.EnvAllow},
		seal.Source{File: s.PreviousKeyFile, Command: s.PreviousCommand, Env: s.EnvAllow}
}

// Seal tells how this node's disk is sealed; nil where it is not.
func (c *cluster) Seal() *api.KeyStatus {
	st, sealed := c.n.replica.KeyStatus()
	if !sealed {
		return nil
	}
	term, ms := c.n.state.View().KeyTerm()
	began := st.Made
	if ms > 0 {
		began = time.UnixMilli(ms)
	}
	kind := "memory" // as given by who started this node in its own process
	if current, _ := c.n.cfg.Seal.sources(); c.n.opt.SealKeys == nil {
		kind = current.Kind()
	}
	return &api.KeyStatus{
		Term: term, InstallTime: began.UTC().Format(time.RFC3339Nano), Encryptions: st.Sealed, Node: c.n.cfg.Name,
		NodeTerm: st.Term, NodeKeys: st.Keys, SealType: kind, SealKey: st.KeyID,
	}
}

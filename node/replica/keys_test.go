package replica

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/node/fault"
	"rollcall/node/seal"
	commandv1 "rollcall/proto/command/v1"
)

// Each node has a seal key of its own here: what travels between them (entries, snapshots) is sealed by each for itself.
func TestSealedNodesRotateTogetherAndFeedANewcomer(t *testing.T) {
	const canary = "canary-5b1ce2"
	keys := map[string]*seal.Keys{}
	sealed := func(cfg *Config) {
		if keys[cfg.Name] == nil {
			keys[cfg.Name] = &seal.Keys{Current: seal.Ephemeral()}
		}
		cfg.Keys = keys[cfg.Name]
		cfg.TrailingLogs, cfg.SnapshotThreshold, cfg.SnapshotInterval = 20, 1<<30, time.Hour // a snapshot when the test says so
	}
	c := newCluster(t)
	all := c.founders(3, sealed)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	write := func(n int) {
		t.Helper()
		for i := range n {
			all[0].mustWrite(fmt.Sprintf("%s-%d", canary, i))
		}
	}
	rotate := func() {
		t.Helper()
		if _, err := all[1].Propose(timeout(t, 10*time.Second), &commandv1.Command{Body: &commandv1.Command_RotateKeys{RotateKeys: &commandv1.RotateKeys{}}}); err != nil {
			t.Fatal(err)
		}
	}
	reach := func(term uint64, members ...*member) {
		t.Helper()
		for _, m := range members {
			eventually(t, 10*time.Second, func() error {
				if st, ok := m.KeyStatus(); !ok || st.Term != term {
					return fmt.Errorf("%s: %+v, want term %d", m.name, st, term)
				}
				return nil
			})
		}
	}
	write(20)
	reach(1, all...)
	away := all[2]
	away.stop()
	rotate()
	write(30)
	rotate()
	reach(3, all[:2]...) // what reaches a disk before its node has applied the rotation is under the older key
	write(30)
	all[0].mustWrite(canary + "-last")
	// A snapshot keeps the newest twenty entries of the log: only a node that has them all can do without the older key.
	has := func(m *member) func() error {
		return func() error {
			if m.fsm.View().Policy("", canary+"-last") == nil {
				return errors.New(m.name + " does not have what was written")
			}
			return nil
		}
	}
	for _, m := range all[:2] {
		eventually(t, 10*time.Second, has(m))
		if err := m.raft.Load().Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
		if st, _ := m.KeyStatus(); st.Keys != 1 {
			t.Errorf("%s keeps %d data keys, and nothing needs but the newest", m.name, st.Keys)
		}
	}
	away.start() // it is behind by a snapshot, and by two terms
	newcomer := c.node("n4", sealed).start()
	all = append(all, newcomer)
	ready(t, all...)
	reach(3, all...)
	for _, m := range all {
		eventually(t, 10*time.Second, has(m))
	}
	if metas, err := newcomer.stores.Snapshots.List(); err != nil || len(metas) == 0 {
		t.Errorf("the newcomer was not fed by a snapshot: %v, %v", metas, err)
	}
	for _, m := range all {
		m.stop()
		if found := grep(t, m.path, canary); len(found) > 0 {
			t.Errorf("readable in %v", found)
		}
	}
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	if all[3].fsm.View().Policy("", canary+"-29") == nil {
		t.Error("a restart lost what was written")
	}
}

func grep(t *testing.T, dir, text string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		raw, err := os.ReadFile(path)
		if bytes.Contains(raw, []byte(text)) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestABackupThatNoKeyOfTheLeaderOpensChangesNothing(t *testing.T) {
	c := newCluster(t)
	mine, other := seal.Ephemeral(), seal.Ephemeral()
	m := c.founders(1, func(cfg *Config) { cfg.Keys = &seal.Keys{Current: mine} })[0].start()
	ready(t, m)
	m.mustWrite("kept")
	var foreign bytes.Buffer
	w, err := other.NewWriter(&foreign, backupContext)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.fsm.View().WriteSnapshot(w), w.Close()); err != nil {
		t.Fatal(err)
	}
	var plain, good bytes.Buffer
	if err := errors.Join(m.fsm.View().WriteSnapshot(&plain), m.Backup(timeout(t, 10*time.Second), &good)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		backup []byte
		kind   fault.Kind
		says   string
	}{
		"of another key": {foreign.Bytes(), fault.Invalid, other.ID()},
		"cut":            {good.Bytes()[:good.Len()-1], fault.Corrupt, ""},
		"a header alone": {good.Bytes()[:40], fault.Corrupt, ""},
		"empty":          {nil, fault.Corrupt, ""},
	} {
		if _, err := m.RestoreBackup(timeout(t, 10*time.Second), bytes.NewReader(c.backup), "test"); !fault.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("a backup that is %s: %v", name, err)
		}
	}
	if m.fsm.View().Policy("", "kept") == nil {
		t.Error("the state is another one")
	}
	if left, err := filepath.Glob(filepath.Join(m.path, "restore-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	// A plain one is taken: it may be from before the seal.
	if _, err := m.RestoreBackup(timeout(t, 20*time.Second), &plain, "test"); err != nil {
		t.Errorf("a plain backup: %v", err)
	}
}

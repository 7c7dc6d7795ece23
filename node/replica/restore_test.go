package replica

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"rollcall/node/fault"
)

// restoring is a cluster of three with something in it, a backup of it, and something later.
func restoring(t *testing.T) (c *cluster, all []*member, backup *bytes.Buffer) {
	t.Helper()
	c = newCluster(t)
	all = c.founders(3, virtual(0))
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	all[0].mustWrite("kept")
	backup = &bytes.Buffer{}
	if err := all[0].Backup(timeout(t, 10*time.Second), backup); err != nil {
		t.Fatal(err)
	}
	all[0].mustWrite("later")
	return c, all, backup
}

// same waits until the nodes have one state, no restore is under way in it, and what was in the backup is there.
func same(t *testing.T, all ...*member) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		first, err := all[0].fsm.View().Digest()
		if err != nil {
			return err
		}
		for _, m := range all {
			v := m.fsm.View()
			sum, err := v.Digest()
			switch {
			case err != nil:
				return err
			case sum != first:
				return errors.New(m.name + " has another state than " + all[0].name)
			case v.Restoring():
				return errors.New("the restore is not entered on " + m.name)
			case v.Policy("", "kept") == nil:
				return errors.New("what was in the backup is missing on " + m.name)
			}
		}
		return nil
	})
}

// Found by reading what the simulation should look at: the leader that restored may end before it has entered Restored, and
// then plugins everywhere went on with what they remembered.
func TestARestoreWhoseLeaderEndsIsEnteredByTheNextOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, all, backup := restoring(t)
		lead := c.leader()
		hold, err := lead.change(t.Context()) // as RestoreBackup does
		if err != nil {
			t.Fatal(err)
		}
		v, err := lead.Consistent(timeout(t, 10*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if err := lead.replaceState(timeout(t, 10*time.Second), lead.led.Load(), v, backup); err != nil {
			t.Fatal(err)
		}
		// Every snapshot of the state until then may replace a newer one, or a follower that was ahead could not take it.
		if !lead.fsm.View().Restoring() {
			t.Fatal("the state does not say that it is being restored")
		}
		lead.crash()
		hold()
		rest := others(all, lead)
		c.leader(rest...)
		same(t, rest...)
		lead.start()
		ready(t, lead)
		rest[0].mustWrite("afterwards")
		same(t, all...)
		if rest[0].fsm.View().Policy("", "later") != nil {
			t.Error("what was written after the backup is still there")
		}
		c.stopAll()
		time.Sleep(time.Minute) // what the transport still waits for
	})
}

// Raft puts a restore into the leader's own state before anybody else has it. When the others go on without it, that node
// must not follow them with a state that they do not have.
func TestANodeWhoseRestoreTheClusterDidNotTakeSaysSo(t *testing.T) {
	for name, restart := range map[string]bool{"cut off": false, "killed": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, all, backup := restoring(t)
				lead := c.leader()
				v, err := lead.Consistent(timeout(t, 10*time.Second))
				if err != nil {
					t.Fatal(err)
				}
				c.net.Isolate(lead.host)
				if err := lead.replaceState(timeout(t, 10*time.Second), lead.led.Load(), v, backup); !fault.Is(err, fault.OutcomeUnknown) {
					t.Fatalf("a restore that nobody heard of: %v", err)
				}
				if lead.fsm.View().Policy("", "later") != nil {
					t.Fatal("the leader has not restored: this tests nothing")
				}
				rest := others(all, lead)
				c.leader(rest...)
				rest[0].mustWrite("instead")
				c.net.Rejoin(lead.host)
				if restart {
					lead.stop()
					lead.start()
				}
				select {
				case err := <-lead.fatal:
					if !fault.Is(err, fault.Corrupt) {
						t.Errorf("it ended with %v", err)
					}
				case <-time.After(30 * time.Second):
					t.Error("it goes on with a state that nobody else has")
				}
				lead.stop()
				lead.path = filepath.Join(t.TempDir(), "replaced") // what the error says
				lead.start()
				ready(t, all...)
				same(t, all...)
				if lead.fsm.View().Policy("", "later") == nil || lead.fsm.View().Policy("", "instead") == nil {
					t.Error("what the cluster has acknowledged is missing")
				}
				c.stopAll()
				time.Sleep(time.Minute) // what the transport still waits for
			})
		})
	}
}

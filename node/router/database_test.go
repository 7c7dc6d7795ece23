package router

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	"rollcall/node/router/internal/database"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// fakeDatabase is a database plugin's instance that makes users as the test says.
type fakeDatabase struct {
	name    string
	made    atomic.Int64
	newUser func(ctx context.Context, n int64) (string, error)
}

func (d *fakeDatabase) Type(context.Context) (string, error) { return "fake", nil }

func (d *fakeDatabase) Initialize(_ context.Context, c *structpb.Struct, _ bool) (*structpb.Struct, error) {
	return c, nil
}

func (d *fakeDatabase) NewUser(ctx context.Context, _ *pluginpb.NewUserRequest) (string, error) {
	n := d.made.Add(1)
	if d.newUser != nil {
		return d.newUser(ctx, n)
	}
	return fmt.Sprintf("%s-%d", d.name, n), nil
}

func (d *fakeDatabase) UpdateUser(context.Context, *pluginpb.UpdateUserRequest) error { return nil }
func (d *fakeDatabase) DeleteUser(context.Context, *pluginpb.DeleteUserRequest) error { return nil }
func (d *fakeDatabase) Disconnect(context.Context) error                              { return nil }
func (d *fakeDatabase) Close(context.Context) error                                   { return nil }

// Try takes every connection as it is.
func (d *fakeDatabase) Try(_ context.Context, _ *commandv1.Spec, details *structpb.Struct, _ bool) (*structpb.Struct, error) {
	return details, nil
}

// databaseMount makes a database mount with a connection, which d serves on the leader n1, and a role on it. It answers
// the connection.
func databaseMount(t *testing.T, c *cluster, d *fakeDatabase) *commandv1.Mount {
	t.Helper()
	n := c.nodes[0]
	c.must(&commandv1.Command{Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{
		Spec: &commandv1.Spec{Type: "database", Name: "fake", Version: "v1.0.0", Command: "fake", Sha256: strings.Repeat("ab", 32)},
	}}})
	c.must(&commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: "uuid-db/", Accessor: "acc", Table: "secret", Path: "db/", Type: "database", PluginType: "database",
	}}})
	for _, nd := range c.nodes {
		nd.up(t, c.get("uuid-db/"), nd.router.DatabaseMount("uuid-db/"))
	}
	stored := async(func() (*Response, error) {
		return n.do(opUpdate, "db/config/x", `{"plugin_name":"fake","allowed_roles":"*","password":"p"}`)
	})
	eventually(t, "the connection is entered", func() bool { return n.fsm.View().Connection("uuid-db/", "x") != nil })
	m := n.fsm.View().Connection("uuid-db/", "x")
	n.up(t, m, database.NewConnection(d)) // as the reconciler does, and only then the write is answered
	if r := <-stored; r.err != nil {
		t.Fatalf("write the connection: %v", r.err)
	}
	if _, err := n.do(opUpdate, "db/roles/r", `{"db_name":"x"}`); err != nil {
		t.Fatal(err)
	}
	return c.get(m.GetUuid())
}

func withDatabases(cfg *Config) { cfg.Databases = &fakeDatabase{} }

func TestCredentialsWaitAtTheGateOfTheirConnectionAndNotAtThatOfTheMount(t *testing.T) {
	c := newCluster(t, 1, withDatabases)
	n := c.nodes[0]
	enter, leave := make(chan struct{}), make(chan struct{})
	a := &fakeDatabase{name: "a", newUser: func(context.Context, int64) (string, error) {
		close(enter)
		<-leave
		return "a-1", nil
	}}
	b := &fakeDatabase{name: "b"}
	m := databaseMount(t, c, a)
	slow := async(func() (*Response, error) { return n.do(opRead, "db/creds/r", "") })
	<-enter
	switched := make(chan struct{})
	m = c.commit(m)
	go func() {
		defer close(switched)
		n.up(t, m, database.NewConnection(b))
	}()
	eventually(t, "the connection's gate is held", func() bool {
		now, _, _ := n.router.lookup(m.GetUuid()).gate.state()
		return now == held
	})
	if _, err := n.do(opRead, "db/roles/r", ""); err != nil {
		t.Errorf("a role while a connection is switched: %v", err)
	}
	waits := async(func() (*Response, error) { return n.do(opRead, "db/creds/r", "") })
	close(leave)
	<-switched
	for want, got := range map[string]<-chan result{"a-1": slow, "b-1": waits} {
		r := <-got
		if r.err != nil || !strings.Contains(r.resp.Plugin.GetData(), want) {
			t.Errorf("want %s: %v %v", want, r.err, r.resp)
		}
	}
}

func TestAUserIsNeverMadeTwiceForOneRequest(t *testing.T) {
	for name, kind := range map[string]fault.Kind{"it may have run": fault.OutcomeUnknown, "the plugin says no": fault.Internal} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 2, withDatabases)
			d := &fakeDatabase{newUser: func(context.Context, int64) (string, error) { return "", fault.Text(kind, "told to") }}
			databaseMount(t, c, d)
			want := kind
			if kind == fault.Internal {
				want = fault.Invalid // clients repeat what is answered with 5xx
			}
			for i, nd := range c.nodes { // the leader, and a follower that forwards
				_, err := nd.do(opRead, "db/creds/r", "")
				wantKind(t, err, want)
				if got := d.made.Load(); got != int64(i+1) {
					t.Fatalf("%d calls for %d requests", got, i+1)
				}
			}
		})
	}
}

func TestARequestThatDidNotReachItsProcessWaitsForTheNextOne(t *testing.T) {
	c := newCluster(t, 1, withDatabases)
	n := c.nodes[0]
	died := make(chan struct{})
	a := &fakeDatabase{newUser: func(context.Context, int64) (string, error) {
		close(died)
		return "", fault.Text(fault.Unavailable, "the process has ended")
	}}
	m := databaseMount(t, c, a)
	got := async(func() (*Response, error) { return n.do(opRead, "db/creds/r", "") })
	<-died
	n.router.Suspend(m.GetUuid(), fault.Text(fault.Unavailable, "the process has ended"))
	n.up(t, m, database.NewConnection(&fakeDatabase{name: "b"}))
	if r := <-got; r.err != nil || !strings.Contains(r.resp.Plugin.GetData(), "b-1") {
		t.Errorf("%v %v", r.err, r.resp)
	}
}

func TestAnEngineOfAFormerLeaderEntersNothing(t *testing.T) {
	c := newCluster(t, 2, withDatabases)
	databaseMount(t, c, &fakeDatabase{})
	h := &databaseHost{r: c.nodes[0].router, uuid: "uuid-db/"}
	c.elect("n2")
	if err := h.Delete(t.Context(), "x"); !fault.Is(err, fault.NotLeader) {
		t.Errorf("a former leader: %v", err)
	}
	c.elect("n1") // of another term than the mount's last take-over
	if err := h.Delete(t.Context(), "x"); !fault.Is(err, fault.NotLeader) {
		t.Errorf("a leader that has not taken the mount over: %v", err)
	}
	if c.nodes[0].fsm.View().Connection("uuid-db/", "x") == nil {
		t.Error("the connection is gone")
	}
}

func TestAConnectionIsClosedToEveryPathButItsMounts(t *testing.T) {
	c := newCluster(t, 1, withDatabases)
	m := databaseMount(t, c, &fakeDatabase{})
	n := c.nodes[0]
	for _, path := range []string{"db/config/x/new-user", m.GetPath() + "new-user", "db/new-user"} {
		if resp, err := n.do(opUpdate, path, "{}"); err == nil {
			t.Errorf("%s was answered: %v", path, resp)
		}
	}
	if to, err := n.router.Lookup(t.Context(), "", "db/config/x/new-user"); err != nil || to.Mount.GetUuid() != "uuid-db/" {
		t.Errorf("%v %v", to, err)
	}
}

package database

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"math/big"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// grace is how much longer the database keeps a user than its lease lasts, so that the lease ends first.
const grace = 5 * time.Second

// lent is what a lease keeps, to renew and revoke the user that it stands for: also when its role is gone.
type lent struct {
	Kind       string   `json:"secret_type"`
	Username   string   `json:"username"`
	Role       string   `json:"role"`
	Connection string   `json:"db_name"`
	Revocation []string `json:"revocation_statements"`
}

// ttls are how long a role's credentials last: its own, under what the mount allows.
func (e *Engine) ttls(r *role) (ttl, longest time.Duration) {
	ttl, longest = e.leaseTTLs()
	if r.Max > 0 {
		longest = min(longest, r.Max)
	}
	if r.Default > 0 {
		ttl = r.Default
	}
	return min(ttl, longest), longest
}

// creds makes a user by a role and lends it out.
func (e *Engine) creds(ctx context.Context, c *call) (*pluginpb.Response, error) {
	if c.op != "read" {
		return nil, errUnsupportedOperation
	}
	r, err := e.role(ctx, c.name)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, fault.Text(fault.Invalid, "unknown role: %s", c.name)
	}
	conn := e.host.Connection(r.Connection)
	if conn == nil {
		return nil, fault.Text(fault.Invalid, "failed to find entry for connection with name: %q", r.Connection)
	}
	config, err := parseConfig(e.host.Stored(conn))
	if err != nil {
		return nil, err
	}
	if !config.allows(c.name) {
		return nil, fault.Text(fault.Invalid, "%q is not an allowed role", c.name)
	}
	ttl, longest := e.ttls(r)
	pass := password()
	answer := &pluginpb.NewUserResponse{}
	err = e.ask(ctx, conn, pathNewUser, &pluginpb.NewUserRequest{
		UsernameConfig: &pluginpb.UsernameConfig{DisplayName: c.GetDisplayName(), RoleName: c.name},
		Password:       pass, Expiration: timestamppb.New(time.Now().Add(ttl + grace)),
		Statements: &pluginpb.Statements{Commands: r.Creation}, RollbackStatements: &pluginpb.Statements{Commands: r.Rollback},
	}, answer)
	if err != nil {
		return nil, err
	}
	data, err1 := json.Marshal(map[string]string{"username": answer.GetUsername(), "password": pass})
	kept, err2 := json.Marshal(lent{
		Kind: "creds", Username: answer.GetUsername(), Role: c.name, Connection: r.Connection, Revocation: r.Revocation,
	})
	if err1 != nil || err2 != nil {
		return nil, fault.Text(fault.Internal, "the plugin answered a user name that is no text")
	}
	return &pluginpb.Response{Data: string(data), Secret: &pluginpb.Secret{
		LeaseOptions: &pluginpb.LeaseOptions{TTL: int64(ttl), MaxTTL: int64(longest), Renewable: true}, InternalData: string(kept),
	}}, nil
}

// lease renews or revokes what was lent.
func (e *Engine) lease(ctx context.Context, c *call) (*pluginpb.Response, error) {
	var l lent
	if err := json.Unmarshal([]byte(c.GetSecret().GetInternalData()), &l); err != nil || l.Kind != "creds" || l.Username == "" {
		return nil, fault.Text(fault.Invalid, "the lease is not one of this mount's credentials")
	}
	conn := e.host.Connection(l.Connection)
	if conn == nil {
		return nil, fault.Text(fault.Invalid, "failed to find entry for connection with name: %q", l.Connection)
	}
	if c.op == "revoke" {
		return nil, e.ask(ctx, conn, pathDeleteUser, &pluginpb.DeleteUserRequest{
			Username: l.Username, Statements: &pluginpb.Statements{Commands: l.Revocation},
		}, nil)
	}
	r, err := e.role(ctx, l.Role)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, fault.Text(fault.Invalid, "error during renew: could not find role with name %q", l.Role)
	}
	o := c.GetSecret().GetLeaseOptions()
	ttl, longest := e.ttls(r)
	if want := time.Duration(o.GetIncrement()); want > 0 {
		ttl = want
	}
	if at := o.GetIssueTime(); at.IsValid() {
		ttl = min(ttl, time.Until(at.AsTime().Add(longest)))
	}
	if ttl < time.Second {
		return nil, fault.Text(fault.Invalid, "past max TTL, cannot renew")
	}
	err = e.ask(ctx, conn, pathUpdateUser, &pluginpb.UpdateUserRequest{
		Username: l.Username, Expiration: &pluginpb.ChangeExpiration{
			NewExpiration: timestamppb.New(time.Now().Add(ttl + grace)), Statements: &pluginpb.Statements{Commands: r.Renew},
		},
	}, nil)
	if err != nil {
		return nil, err
	}
	return &pluginpb.Response{Secret: &pluginpb.Secret{
		LeaseOptions: &pluginpb.LeaseOptions{TTL: int64(ttl), MaxTTL: int64(longest), Renewable: true},
		InternalData: c.GetSecret().GetInternalData(),
	}}, nil
}

// ask runs one call on a connection.
func (e *Engine) ask(ctx context.Context, conn *commandv1.Mount, path string, in, out proto.Message) error {
	data, err := protojson.Marshal(in)
	if err != nil {
		return fault.As(fault.Internal, err, "call", "connection "+conn.GetConnection())
	}
	raw, err := e.host.Call(ctx, conn, path, data)
	if fault.Is(err, fault.Internal) {
		// The plugin's own word. Clients repeat what is answered with 5xx, and a user may be there by then.
		return fault.As(fault.Invalid, err, "", "")
	}
	if err != nil || out == nil {
		return err
	}
	return fault.As(fault.Internal, protojson.Unmarshal(raw, out), "read the answer of", "connection "+conn.GetConnection())
}

// passwordLength and the classes make about 150 bits.
const passwordLength = 26

var classes = []string{"abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "-"}

// password makes a random password that holds a character of every class and begins with a letter: most databases take it
// without quoting.
func password() string {
	all := strings.Join(classes, "")
	for {
		out := make([]byte, passwordLength)
		for i := range out {
			out[i] = all[below(len(all))]
		}
		out[0] = (classes[0] + classes[1])[below(2*len(classes[0]))]
		if every(string(out)) {
			return string(out)
		}
	}
}

func every(s string) bool {
	for _, c := range classes {
		if !strings.ContainsAny(s, c) {
			return false
		}
	}
	return true
}

func below(n int) int {
	v, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil {
		panic("database: crypto/rand does not fail: " + err.Error())
	}
	return int(v.Int64())
}

package main

import (
	"context"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// ttlOfCreds is how long what creds/ lends lives, unless the caller says otherwise.
const ttlOfCreds = time.Hour

// creds lends something that can be given back, as engines with dynamic secrets do: reading creds/NAME makes a key under
// lent/, which is there until the lease is revoked.
func (b *backend) creds() (*framework.Secret, []*framework.Path) {
	secret := &framework.Secret{
		Type: "creds", DefaultDuration: ttlOfCreds,
		Renew: func(_ context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
			resp := &logical.Response{Secret: req.Secret}
			resp.Secret.TTL, resp.Secret.MaxTTL = max(req.Secret.Increment, time.Minute), 24*time.Hour
			return resp, nil
		},
		Revoke: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
			name, _ := req.Secret.InternalData["name"].(string)
			return nil, req.Storage.Delete(ctx, "lent/"+name)
		},
	}
	lend := func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		name := d.Get("name").(string)
		if err := req.Storage.Put(ctx, &logical.StorageEntry{Key: "lent/" + name, Value: []byte(req.ID)}); err != nil {
			return nil, err
		}
		resp := secret.Response(map[string]any{"user": name, "password": "p-" + name}, map[string]any{"name": name})
		resp.Secret.TTL = time.Duration(d.Get("ttl").(int)) * time.Second
		resp.Secret.Renewable = d.Get("renewable").(bool)
		return resp, nil
	}
	lent := func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
		keys, err := req.Storage.List(ctx, "lent/")
		if err != nil {
			return nil, err
		}
		return &logical.Response{Data: map[string]any{"names": keys}}, nil
	}
	return secret, []*framework.Path{
		{
			Pattern: "creds/" + framework.GenericNameRegex("name"),
			Fields: map[string]*framework.FieldSchema{
				"name": {Type: framework.TypeString}, "ttl": {Type: framework.TypeDurationSecond, Default: int(ttlOfCreds / time.Second)},
				"renewable": {Type: framework.TypeBool, Default: true},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{Callback: b.guard(lend)},
			},
		},
		b.readOnly("lent", lent),
	}
}

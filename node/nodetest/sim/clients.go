package sim

import (
	"fmt"
	"net/http"
	"time"

	"rollcall/node/nodetest/check"
)

// The mount that the clients work on, and how many keys each writer has.
const (
	mainMount = "kv/"
	keysEach  = 3
)

// think is the pause of a client between two calls, on average.
const think = 700 * time.Millisecond

// startClients starts the load: writers with values of their own, who also read what others write; clients that count one
// key up together; readers; and clients of the catalog and of tokens.
func (c *cluster) startClients() {
	for i := range c.opt.Clients {
		k := c.newCaller(fmt.Sprintf("client %d", i))
		work := []func(*caller){c.write, c.count, c.read, c.write, c.read, c.catalog, c.tokens, c.write}[i%8]
		c.load.Go(func() { work(k) })
	}
}

// keys are all that writers write.
func (c *cluster) keys() (out []string) {
	for i := range c.opt.Clients {
		for n := range keysEach {
			out = append(out, fmt.Sprintf("w%d-%d", i+1, n))
		}
	}
	return out
}

func (c *cluster) write(k *caller) {
	for n := 1; k.pause(think); n++ {
		key := fmt.Sprintf("w%d-%d", k.id, k.rng.IntN(keysEach))
		switch k.rng.IntN(8) {
		case 0:
			k.get(check.Read, key)
		case 1:
			op, _ := k.call(check.Op{Kind: check.Delete, Mount: mainMount, Key: key}, k.any(), http.MethodDelete, mainMount+key, c.token, nil)
			k.finish(op)
		default:
			value := fmt.Sprintf("%d.%d", k.id, n)
			op, _ := k.call(check.Op{Kind: check.Write, Mount: mainMount, Key: key, Input: value}, k.any(), http.MethodPut,
				mainMount+key, c.token, map[string]string{"value": value})
			k.finish(op)
		}
	}
}

func (c *cluster) count(k *caller) {
	for k.pause(think) {
		if k.rng.IntN(4) == 0 {
			k.get(check.Read, "hot")
			continue
		}
		op, _ := k.call(check.Op{Kind: check.Add, Mount: mainMount, Key: "hot", Input: "1"}, k.any(), http.MethodPut,
			mainMount+"hot", c.token, map[string]int{"add": 1})
		k.finish(op)
	}
}

func (c *cluster) read(k *caller) {
	keys := append(c.keys(), "hot")
	for k.pause(think) {
		k.get(check.Read, keys[k.rng.IntN(len(keys))])
	}
}

// get reads a key through a node by chance.
func (k *caller) get(kind check.Kind, key string) check.Op {
	op, a := k.call(check.Op{Kind: kind, Mount: mainMount, Key: key}, k.any(), http.MethodGet, mainMount+key, k.c.token, nil)
	if a != nil && a.status == http.StatusNotFound && op.By != "" {
		op.Outcome, op.Cause = check.OK, ""
	}
	op.Output = a.data("value")
	k.finish(op)
	return op
}

// catalog registers, removes and reads entries that no mount uses.
func (c *cluster) catalog(k *caller) {
	for n := 0; k.pause(2 * think); n++ {
		name := fmt.Sprintf("spare%d", k.rng.IntN(3))
		key, path := "secret/"+name+"/", "sys/plugins/catalog/secret/"+name
		switch k.rng.IntN(5) {
		case 0, 1:
			command := fmt.Sprintf("spare-%d-%d", k.id, n)
			op, _ := k.call(check.Op{Kind: check.Register, Key: key, Input: hashOf(command)}, k.any(), http.MethodPut, path, c.token,
				map[string]string{"command": command, "sha256": hashOf(command)})
			k.finish(op)
		case 2:
			op, _ := k.call(check.Op{Kind: check.Deregister, Key: key}, k.any(), http.MethodDelete, path, c.token, nil)
			k.finish(op)
		default:
			op, a := k.call(check.Op{Kind: check.Catalog, Key: key}, k.any(), http.MethodGet, path, c.token, nil)
			if a != nil && a.status == http.StatusNotFound {
				op.Outcome, op.Cause = check.OK, ""
			}
			op.Output = a.data("sha256")
			k.finish(op)
		}
	}
}

// tokens makes tokens, uses them through any node, and revokes them.
func (c *cluster) tokens(k *caller) {
	type token struct{ name, secret string }
	var live []token
	for n := 0; k.pause(2 * think); n++ {
		switch draw := k.rng.IntN(6); {
		case draw == 0 || len(live) == 0:
			name := fmt.Sprintf("token-%d-%d", k.id, n)
			op, a := k.call(check.Op{Kind: check.TokenCreate, Key: name}, k.any(), http.MethodPost, "auth/token/create", c.token,
				map[string]any{"policies": []string{"default"}, "ttl": "24h", "display_name": name})
			if secret := a.data("client_token"); op.Outcome == check.OK && secret != "" {
				live = append(live, token{name, secret})
			}
			k.finish(op)
		case draw == 1:
			t := live[0]
			op, _ := k.call(check.Op{Kind: check.TokenRevoke, Key: t.name}, k.any(), http.MethodPost, "auth/token/revoke", c.token,
				map[string]string{"token": t.secret})
			k.finish(op)
			if len(live) > 3 {
				live = live[1:]
			}
		default:
			t := live[k.rng.IntN(len(live))]
			op, a := k.call(check.Op{Kind: check.TokenUse, Key: t.name}, k.any(), http.MethodGet, "auth/token/lookup-self", t.secret, nil)
			switch {
			case op.Outcome == check.OK:
				op.Output = check.Allowed
			case a != nil && a.status == http.StatusForbidden:
				op.Outcome, op.Output, op.Cause = check.OK, check.Denied, ""
			}
			k.finish(op)
		}
	}
}

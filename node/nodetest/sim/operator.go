package sim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"rollcall/node/api"
	"rollcall/node/nodetest/check"
)

// The plugin behind the main mount, and its versions.
const plugin = "kv"

var versions = []string{"v1.0.0", "v1.1.0", "v1.2.0", "v2.0.0"}

func commandOf(version string) string { return plugin + "-" + version }

// operator is the people who run the cluster, all at once: reloads of every kind, their ids used twice, control of what
// runs, and everything else that an operator may do meanwhile.
type operator struct {
	*caller
	sent []sentReload
	// second asks the same of another node at the same time.
	second *caller
	count  int
	// saved are the restores, in their order.
	saved []*restore
	tries int
	// strike breaks the leader now.
	strike func(kind string, rng *rand.Rand)
}

type sentReload struct {
	id   string
	body map[string]any
}

func (c *cluster) newOperator() *operator {
	return &operator{caller: c.newCaller("operator"), second: c.newCaller("operator's second")}
}

// prepare makes the catalog and the mounts that everything else is about.
func (o *operator) prepare() error {
	for _, v := range versions {
		if op := o.register(o.c.founders[0].name, v); op.Outcome != check.OK {
			return fmt.Errorf("register %s: %s", v, op.Cause)
		}
	}
	for _, path := range []string{"kv", "other"} {
		a, err := o.ask(o.c.founders[0].name, http.MethodPost, "sys/mounts/"+path, o.c.token, map[string]any{
			"type": plugin, "config": map[string]string{"plugin_version": versions[0]},
		})
		if err := told(a, err); err != nil {
			return fmt.Errorf("enable %s: %w", path, err)
		}
	}
	return nil
}

// register enters a version of the plugin.
func (o *operator) register(node, v string) check.Op {
	op, _ := o.call(check.Op{Kind: check.Register, Key: "secret/" + plugin + "/" + v, Input: hashOf(commandOf(v))}, node, http.MethodPut,
		"sys/plugins/catalog/secret/"+plugin, o.c.token, map[string]any{"version": v, "command": commandOf(v), "sha256": hashOf(commandOf(v))})
	o.finish(op)
	return op
}

// told is an error for every answer that is not a good one.
func told(a *answer, err error) error {
	if err == nil && a.status >= 300 {
		return fmt.Errorf("status %d: %s", a.status, bytes.TrimSpace(a.body))
	}
	return err
}

// work acts until the load ends.
func (o *operator) work() {
	defer o.outside()
	for o.pause(4 * time.Second) {
		switch o.rng.IntN(16) {
		case 0, 1, 2, 3, 4, 5:
			o.reload()
		case 6:
			o.again()
		case 7, 8:
			o.control()
		case 9:
			o.rollback()
		case 10:
			o.extraMount()
		case 11:
			o.race()
		case 12:
			o.tune()
		case 13, 14:
			o.saveAndRestore()
		default:
			o.status()
		}
		o.status()
	}
}

// reload asks for a reload of a kind by chance.
func (o *operator) reload() {
	o.count++
	body := map[string]any{"reload_id": fmt.Sprintf("r%d", o.count)}
	if o.rng.IntN(3) == 0 {
		body["mounts"] = [][]string{{"kv"}, {"other"}, {"kv", "other"}}[o.rng.IntN(3)]
	} else {
		body["plugin"] = plugin
	}
	if o.rng.IntN(5) > 0 {
		body["scope"] = "global"
		if o.rng.IntN(4) > 0 {
			body["version"] = versions[o.rng.IntN(len(versions))]
		}
		o.strategy(body)
	}
	if o.rng.IntN(4) == 0 {
		body["on_switch_failure"] = "rollback"
	}
	if o.rng.IntN(4) == 0 {
		body["on_drain_timeout"] = "fence"
	}
	if o.rng.IntN(6) == 0 {
		body["exclude_fenced"] = false
	}
	if o.rng.IntN(4) == 0 {
		body["trial"] = []string{"handshake", "setup"}[o.rng.IntN(2)]
	}
	o.sent = append(o.sent, sentReload{body["reload_id"].(string), body})
	if o.rng.IntN(3) == 0 { // the same request through two nodes at once
		done := make(chan struct{})
		go func() { defer close(done); o.second.start(body) }()
		o.start(body)
		<-done
		return
	}
	o.start(body)
}

func (o *operator) strategy(body map[string]any) {
	switch o.rng.IntN(5) {
	case 0:
		body["strategy"] = "best-effort"
	case 1:
		body["strategy"], body["batch"], body["bake"] = "rolling", 1+o.rng.IntN(2), "1s"
	case 2:
		body["strategy"], body["waves"], body["bake"] = "canary", []string{"1", "50%", "100%"}, "2s"
		body["max_error_rate"], body["min_samples"] = 0.9, 1
	}
}

// start sends a reload and records it. Which node serves it is a part of a local one.
func (k *caller) start(body map[string]any) {
	raw, err := json.Marshal(body)
	if err != nil {
		panic(err) // a defect of ours
	}
	node, input := k.any(), string(raw)
	if body["scope"] == nil {
		input += " on " + k.c.member(node).identity()
	}
	op, a := k.call(check.Op{Kind: check.Start, Key: body["reload_id"].(string), Input: input}, node,
		http.MethodPut, "sys/plugins/reload/backend", k.c.token, body)
	op.Refused, op.Output = op.Status == http.StatusConflict, a.data("reload_id")
	if op.Status == http.StatusBadRequest {
		op.Outcome = check.Unknown // a reload of one node that ran and failed is answered so, and leaves its record
	}
	k.finish(op)
}

// again uses an id for the second time, now and then for something else.
func (o *operator) again() {
	if len(o.sent) == 0 {
		return
	}
	was := o.sent[o.rng.IntN(len(o.sent))]
	body := was.body
	if o.rng.IntN(3) == 0 {
		body = map[string]any{"reload_id": was.id, "mounts": []string{"other"}, "scope": "global", "prepare": "19s"}
	}
	o.start(body)
}

// recent is one of the last few reloads.
func (o *operator) recent() (string, bool) {
	if len(o.sent) == 0 {
		return "", false
	}
	n := min(len(o.sent), 4)
	return o.sent[len(o.sent)-1-o.rng.IntN(n)].id, true
}

func (o *operator) control() {
	if id, ok := o.recent(); ok {
		action := []string{"pause", "resume", "abort", "promote", "resume"}[o.rng.IntN(5)]
		o.plain(http.MethodPut, "sys/reloads/"+id+"/"+action, map[string]string{"why": "by chance"})
	}
}

func (o *operator) rollback() {
	o.count++
	o.plain(http.MethodPut, "sys/plugins/rollback/secret/"+plugin, map[string]any{"reload_id": fmt.Sprintf("back%d", o.count)})
}

// status asks any node how a reload is.
func (o *operator) status() {
	id, ok := o.recent()
	if !ok {
		return
	}
	op, a := o.call(check.Op{Kind: check.Status, Key: id}, o.any(), http.MethodGet, "sys/reloads/"+id, o.c.token, nil)
	if a != nil && a.status == http.StatusNotFound {
		op.Outcome, op.Cause = check.OK, ""
	}
	op.Output = a.data("phase")
	if is := a.data("id"); is != "" && is != id {
		op.Kind = "status of an alias" // it was joined to one that waited: what is told is the other's
	}
	o.finish(op)
}

// extraMount enables or disables mounts that no client works on.
func (o *operator) extraMount() {
	path := fmt.Sprintf("sys/mounts/extra%d", o.rng.IntN(2))
	if o.rng.IntN(2) == 0 {
		o.plain(http.MethodDelete, path, nil)
		return
	}
	o.plain(http.MethodPost, path, map[string]any{
		"type": plugin, "config": map[string]string{"plugin_version": versions[o.rng.IntN(len(versions))]},
	})
}

// race registers or removes a version while a reload to it runs.
func (o *operator) race() {
	v := fmt.Sprintf("v3.%d.0", o.rng.IntN(3))
	if o.rng.IntN(2) == 0 {
		op, _ := o.call(check.Op{Kind: check.Deregister, Key: "secret/" + plugin + "/" + v}, o.any(), http.MethodDelete,
			"sys/plugins/catalog/secret/"+plugin+"?version="+v, o.c.token, nil)
		o.finish(op)
		return
	}
	done := make(chan struct{})
	o.count++
	id := fmt.Sprintf("r%d", o.count)
	go func() {
		defer close(done)
		o.second.start(map[string]any{"reload_id": id, "plugin": plugin, "scope": "global", "version": v})
	}()
	o.register(o.any(), v)
	<-done
}

func (o *operator) tune() {
	switch o.rng.IntN(4) {
	case 0:
		o.plain(http.MethodPost, "sys/mounts/other/tune", map[string]any{"plugin_version": versions[o.rng.IntN(len(versions))]})
	case 1:
		o.plain(http.MethodPut, "sys/plugins/pins/secret/"+plugin, map[string]any{"version": versions[o.rng.IntN(len(versions))]})
	default:
		o.plain(http.MethodDelete, "sys/plugins/pins/secret/"+plugin, nil)
	}
}

// plain is a call that the checker knows nothing of.
func (o *operator) plain(method, path string, body any) *answer {
	op, a := o.call(check.Op{Kind: check.Kind(method), Key: path}, o.any(), method, path, o.c.token, body)
	o.finish(op)
	return a
}

// stepDown asks the leader for another one. It returns whether one was told to.
func (o *operator) stepDown() bool {
	a, err := o.ask(o.any(), http.MethodPut, "sys/step-down", o.c.token, nil)
	return told(a, err) == nil
}

// leave asks a node to leave the cluster.
func (o *operator) leave(m *member) bool {
	a, err := o.ask(m.name, http.MethodPut, "sys/leave", o.c.token, nil)
	return told(a, err) == nil
}

// running are the reloads that have not ended, as a node tells; false when none answers.
func (o *operator) running() (ids []string, paused []string, ok bool) {
	all, ok := o.reloads()
	for _, r := range all {
		if !api.Ended(r.Phase) {
			ids = append(ids, r.ID)
			if r.Paused {
				paused = append(paused, r.ID)
			}
		}
	}
	return ids, paused, ok
}

// reloads are those that a node tells of; false when none answers.
func (o *operator) reloads() ([]*api.Reload, bool) {
	for _, m := range o.c.members() {
		a, err := o.ask(m.name, http.MethodGet, "sys/reloads", o.c.token, nil)
		if told(a, err) != nil {
			continue
		}
		var env struct {
			Data struct {
				Reloads []*api.Reload `json:"reloads"`
			} `json:"data"`
		}
		if json.Unmarshal(a.body, &env) != nil {
			continue
		}
		return env.Data.Reloads, true
	}
	return nil, false
}

package nodetest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"rollcall/node"
	"rollcall/node/nodetest/check"
)

// watch lets the recorder see what a node does.
func (c *Cluster) watch(name string, opt *node.Options) {
	c.Record.Describe(func(m *check.Meta) { m.Nodes = append(m.Nodes, name) })
	n := c.Record.Node(name)
	opt.Logger, opt.Witness = slog.New(n.Handler(opt.Logger.Handler())), n.Witness
}

// StopNode stops node i, and records that it is away.
func (c *Cluster) StopNode(ctx context.Context, i int) error {
	c.mu.Lock()
	c.faults[i] = c.Record.Fault("stop", c.Node(i).Name(), "gracefully")
	c.mu.Unlock()
	return c.Local.StopNode(ctx, i)
}

// StartNode starts node i again.
func (c *Cluster) StartNode(ctx context.Context, i int) error {
	if w := c.wires[fmt.Sprintf("node-%d", i+1)]; w != nil {
		w.mend()
	}
	err := c.Local.StartNode(ctx, i)
	c.mu.Lock()
	defer c.mu.Unlock()
	if healed := c.faults[i]; healed != nil && err == nil {
		healed()
	}
	return err
}

// number is the number of the node with this name, running or not.
func (c *Cluster) number(name string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(name, "node-"))
	return n - 1
}

// recordRunning waits until every running node serves, and records what it then runs.
func (c *Cluster) recordRunning() {
	c.t.Helper()
	c.Serving()
	for _, n := range c.Nodes() {
		v := n.State().View()
		for _, run := range n.Reloads().Running() {
			m := v.Mount(run.MountUUID)
			c.Record.Event(check.Event{
				Node: n.Name(), Kind: check.Running, Mount: m.GetPath(), MountID: run.MountUUID, Generation: run.Generation,
				Want: v.Wanted(m, n.ID()).GetGeneration(), SHA256: run.Spec.GetSha256(), PID: run.PID,
			})
		}
	}
}

// judge checks the record when everything has ended. A run that is not good is kept, so that it can be judged again.
func (c *Cluster) judge() {
	c.t.Helper()
	run := c.Record.Run()
	report := check.Check(run)
	c.t.Log(report)
	if report.Good() && os.Getenv("ROLLCALL_RUNS") == "" {
		return
	}
	parent := os.Getenv("ROLLCALL_RUNS")
	if parent == "" {
		parent = os.TempDir()
	}
	dir := filepath.Join(parent, "run-"+strings.NewReplacer("/", "-", " ", "-").Replace(c.t.Name()))
	if err := run.Save(dir); err != nil {
		c.t.Errorf("keep the run: %v", err)
	}
	if !report.Good() {
		c.t.Errorf("%v\nthe run is in %s; judge it again with: go test ./node/nodetest/check -run Judge -dir %s", report.Err(), dir, dir)
	}
}

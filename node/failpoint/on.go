//go:build failpoints

package failpoint

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Enabled is whether this build has failpoints.
const Enabled = true

// Variables of the environment that a process with failpoints reads when it starts.
const (
	// EnvRules holds rules in the words of Parse, or "@FILE": then the rules are in that file, and are read again whenever
	// it has changed, so that what a running process does can be told.
	EnvRules = "ROLLCALL_FAILPOINTS"
	// EnvReport names a directory. Each process writes a file there, a line for each place at its first hit: also a
	// process that is killed has told what it reached.
	EnvReport = "ROLLCALL_FAILPOINTS_REPORT"
)

// Event is one hit of a place on a node.
type Event struct {
	Site Site
	Node string
	// N counts the hits that the rule has seen on this node, from 1.
	N int
}

// Action is what a rule does at a hit, on the goroutine that hits; its error is what Hit returns. It may block.
type Action func(Event) error

// Rule says what happens where.
type Rule struct {
	Site Site
	// Node is the node's name; "" for any. Hits are counted for each node by itself.
	Node string
	// After, when set, is a place that the node must have hit since the rule was armed before its hits count.
	After Site
	// Nth is the only hit that counts; 0 for every one.
	Nth int
	Do  Action
}

// armed is a rule with what it has seen.
type armed struct {
	Rule
	hits map[string]int
	past map[string]bool
}

// points is all that is armed in this process, and what was hit.
type points struct {
	mu     sync.Mutex
	rules  []*armed
	names  map[string]string
	counts map[Site]int
	report *os.File

	file  string // where the rules are, "" when they are in the environment
	stamp time.Time
	size  int64
	filed []*armed // those of the file
}

var all = newPoints()

func newPoints() *points {
	p := &points{names: map[string]string{}, counts: map[Site]int{}}
	if dir := os.Getenv(EnvReport); dir != "" {
		p.report = openReport(dir)
	}
	text := os.Getenv(EnvRules)
	if file, there := strings.CutPrefix(text, "@"); there {
		p.file = file
		return p
	}
	rules, err := Parse(text)
	if err != nil {
		panic(EnvRules + ": " + err.Error()) // a sweep that thinks it kills must not run without
	}
	p.arm(rules)
	return p
}

// look reads the file of rules again when it has changed. A file that is not there holds none. The mutex is held.
func (p *points) look() {
	if p.file == "" {
		return
	}
	var stamp time.Time
	var size int64
	if info, err := os.Stat(p.file); err == nil {
		stamp, size = info.ModTime(), info.Size()
	}
	if stamp.Equal(p.stamp) && size == p.size {
		return
	}
	p.stamp, p.size = stamp, size
	raw, err := os.ReadFile(p.file)
	if err != nil && !os.IsNotExist(err) {
		panic(EnvRules + ": " + err.Error())
	}
	rules, err := Parse(string(raw))
	if err != nil {
		panic(p.file + ": " + err.Error())
	}
	old := p.filed
	p.rules = slices.DeleteFunc(p.rules, func(r *armed) bool { return slices.Contains(old, r) })
	p.filed = arms(rules)
	p.rules = append(p.rules, p.filed...)
}

// openReport makes this process's file. A report that cannot be written would be a place that was never hit.
func openReport(dir string) *os.File {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		panic(EnvReport + ": " + err.Error())
	}
	name := filepath.Join(dir, filepath.Base(os.Args[0])+"."+strconv.Itoa(os.Getpid()))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		panic(EnvReport + ": " + err.Error())
	}
	return f
}

// Hit is called where a place stands, with the node's name or a key that Called has tied to it. It does what the armed
// rules say, one after the other, and returns the first error. Any goroutine.
func Hit(site Site, key string) error {
	for _, run := range all.hit(site, key) {
		if err := run(); err != nil {
			return err
		}
	}
	return nil
}

// hit notes the hit and returns what the rules want done, to be run without the lock.
func (p *points) hit(site Site, key string) []func() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.look()
	node := key
	if name, known := p.names[key]; known {
		node = name
	}
	if p.counts[site]++; p.counts[site] == 1 && p.report != nil {
		_, _ = p.report.WriteString(string(site) + "\n")
	}
	var todo []func() error
	for _, r := range p.rules {
		if r.Node != "" && r.Node != node {
			continue
		}
		if r.After == site {
			r.past[node] = true
		}
		if r.Site != site || r.After != "" && !r.past[node] {
			continue
		}
		r.hits[node]++
		if r.Nth == 0 || r.hits[node] == r.Nth {
			e, do := Event{Site: site, Node: node, N: r.hits[node]}, r.Do
			todo = append(todo, func() error { return do(e) })
		}
	}
	return todo
}

func arms(rules []Rule) []*armed {
	var out []*armed
	for _, r := range rules {
		out = append(out, &armed{Rule: r, hits: map[string]int{}, past: map[string]bool{}})
	}
	return out
}

func (p *points) arm(rules []Rule) []*armed {
	added := arms(rules)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rules = append(p.rules, added...)
	return added
}

// Arm adds rules and returns what takes them away again. A goroutine that an action holds stays held.
func Arm(rules ...Rule) (disarm func()) {
	added := all.arm(rules)
	return func() {
		all.mu.Lock()
		defer all.mu.Unlock()
		all.rules = slices.DeleteFunc(all.rules, func(r *armed) bool { return slices.Contains(added, r) })
	}
}

// Called ties a key that a room knows the node by (its id, its data directory) to the node's name in rules.
func Called(key, name string) {
	all.mu.Lock()
	defer all.mu.Unlock()
	all.names[key] = name
}

// Hits is how often a place was hit in this process.
func Hits(site Site) int {
	all.mu.Lock()
	defer all.mu.Unlock()
	return all.counts[site]
}

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"rollcall/node/api"
)

// amount is a number that the environment gives, for runs that are longer than CI's.
func amount(t *testing.T, name string, standard int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return standard
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: a number of at least 1 is wanted (%v)", name, v, err)
	}
	return n
}

// TestZeroRequestsFailWhileEveryPluginIsReloaded sends requests from 64 clients through three processes, without a pause,
// while a KV engine and the demo plugin are reloaded on every node in turn: none fails, none is lost, none is answered by
// an older generation after a newer one. ROLLCALL_ZERO says how many requests, ROLLCALL_ZERO_RELOADS how many reloads
// they are spread over.
func TestZeroRequestsFailWhileEveryPluginIsReloaded(t *testing.T) {
	requests := amount(t, "ROLLCALL_ZERO", 10_000)
	reloads := amount(t, "ROLLCALL_ZERO_RELOADS", max(8, requests/10_000))
	c := newCluster(t, options{config: patient})
	c.mountKV(kvOld)
	c.mountDemo()
	l := startLoad(c, loadOptions{mount: "kv", writers: 16, hot: 4, readers: 24})
	k := startCounting(c, "demo", 20, 0)
	sent := func() int { return l.snapshot().answers() + k.count() }
	began, first := time.Now(), sent()
	kv, demo := kvOld, "v1.0.0"
	done := 0
	for i := range reloads {
		at := first + (i+1)*requests/reloads
		s := c.nodes[i%len(c.nodes)]
		var rec *api.Reload
		if i%2 == 0 {
			kv = map[string]string{kvOld: kvNew, kvNew: kvOld}[kv]
			rec = c.reload(s, api.ReloadRequest{Plugin: "kv", Version: kv})
			allSwitched(t, rec, kv, c.nodes...)
		} else {
			demo = map[string]string{"v1.0.0": "v1.1.0", "v1.1.0": "v1.0.0"}[demo]
			rec = c.reload(s, api.ReloadRequest{Plugin: "demo", Version: demo})
			allSwitched(t, rec, demo, c.nodes...)
		}
		done++
		until(t, 10*time.Minute, fmt.Sprintf("request %d of %d", at-first, requests), func() error {
			if n := sent(); n < at && k.healthy() && l.healthy() {
				return fmt.Errorf("it is %d", n-first)
			}
			return nil
		})
		if t.Failed() || !k.healthy() || !l.healthy() {
			break
		}
	}
	took := time.Since(began)
	n := sent() - first
	l.stop().clean(t, requests/20)
	k.stop(t, requests/100)
	t.Logf("\n| | |\n|---|---|\n| requests of 64 clients | %d (%.0f a second) |\n| global reloads | %d |\n| failed | %d |\n| lost | %d |\n"+
		"| answered by an older generation after a newer one | %d |", n, float64(n)/took.Seconds(), done,
		l.sum.failed+len(k.failed), l.sum.lost, l.sum.backwards+len(k.backwards))
}

// count is how many requests were answered; healthy says that none has failed yet.
func (k *counting) count() int { k.mu.Lock(); defer k.mu.Unlock(); return k.sent }

func (k *counting) healthy() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.failed)+len(k.backwards) == 0
}

func (l *load) healthy() bool {
	s := l.snapshot()
	return s.failed+s.lost+s.backwards+s.staleReads == 0
}

// TestReloadsBackToBackCostNoRequestAndLeakNothing reloads a KV engine on three nodes again and again, the next reload
// as soon as one has ended, under 64 clients and one hot key. ROLLCALL_RELOADS says how often.
func TestReloadsBackToBackCostNoRequestAndLeakNothing(t *testing.T) {
	reloads := amount(t, "ROLLCALL_RELOADS", 20)
	c := newCluster(t, options{config: patient})
	c.mountKV(kvOld)
	c.reload(c.nodes[0], api.ReloadRequest{Plugin: "kv", Version: kvNew})
	c.reload(c.nodes[1], api.ReloadRequest{Plugin: "kv", Version: kvOld})
	before := c.rest()
	l := startLoad(c, loadOptions{mount: "kv", writers: 24, hot: 8, readers: 32})
	version := kvOld
	row := func(name string, run func()) (p50, p99 time.Duration, rate float64) {
		l.latencies()
		busy, began := busyCPU(t), time.Now()
		run()
		took := time.Since(began)
		lat := l.latencies()
		if len(lat) < 200 {
			t.Fatalf("%s: %d answers are too few to mean anything", name, len(lat))
		}
		p50, p99 = lat[len(lat)/2], lat[len(lat)*99/100]
		rate = float64(len(lat)) / took.Seconds()
		t.Logf("| %s | %.0f | %s | %s | %s | %.0f %% |", name, rate, p50.Round(100*time.Microsecond), p99.Round(100*time.Microsecond),
			lat[len(lat)-1].Round(time.Millisecond), 100*(busyCPU(t)-busy)/took.Seconds())
		return p50, p99, rate
	}
	again := func(n int) func() {
		return func() {
			for i := range n {
				version = map[string]string{kvOld: kvNew, kvNew: kvOld}[version]
				allSwitched(t, c.reload(c.nodes[i%len(c.nodes)], api.ReloadRequest{Plugin: "kv", Version: version}), version, c.nodes...)
				if t.Failed() || !l.healthy() {
					return
				}
			}
		}
	}
	answers := func(n int) func() {
		return func() {
			want := l.snapshot().answers() + n
			until(t, 5*time.Minute, fmt.Sprintf("%d answers", n), func() error {
				if l.snapshot().answers() < want && l.healthy() {
					return fmt.Errorf("not yet")
				}
				return nil
			})
		}
	}
	t.Log("| | answers a second | p50 | p99 | slowest | of one CPU, whole machine |")
	t.Log("|---|---|---|---|---|---|")
	_, _, most := row("saturated", answers(3000))
	row(fmt.Sprintf("saturated, %d reloads", max(4, reloads/50)), again(max(4, reloads/50)))
	pace := time.Duration(64 / (most / 2) * float64(time.Second))
	l.paced(pace, pace)
	_, steady, _ := row("paced at half", answers(2000))
	began := time.Now()
	_, reloading, _ := row(fmt.Sprintf("paced at half, %d reloads", reloads), again(reloads))
	t.Logf("%d reloads in %s, one %s; p99 while reloading is %.1f times the steady p99", reloads, time.Since(began).Round(time.Second),
		(time.Since(began) / time.Duration(reloads)).Round(time.Millisecond), float64(reloading)/float64(steady))
	l.stop().clean(t, 1000)
	c.sameAs(before)
}

// busyCPU is how many seconds the machine's processors have worked since it started.
func busyCPU(t *testing.T) float64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	var user, nice, system, idle, iowait, irq, soft float64
	if _, err := fmt.Sscanf(string(raw), "cpu %f %f %f %f %f %f %f", &user, &nice, &system, &idle, &iowait, &irq, &soft); err != nil {
		t.Fatal(err)
	}
	return (user + nice + system + irq + soft) / 100 // the unit of /proc/stat is a hundredth on every Linux
}

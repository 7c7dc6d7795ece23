package gossip

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/memberlist"
	"go.uber.org/goleak"

	"rollcall/node/fault"
)

func TestMain(m *testing.M) {
	code := m.Run()
	err := goleak.Find()
	for i := 0; i < 10 && err != nil; i++ { // memberlist's Shutdown does not wait for probes under way
		err = goleak.Find()
	}
	if code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// until advances virtual time until ok holds.
func until(t testing.TB, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

func TestNodesFindEachOtherInAnyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newSimNet()
		var all []*Gossip
		for _, i := range []int{5, 3, 1, 4, 2} {
			all = append(all, net.start(t, i))
			time.Sleep(300 * time.Millisecond)
		}
		until(t, time.Minute, "everybody sees four others", func() bool {
			for _, g := range all {
				if alive(g) != 4 {
					return false
				}
			}
			return true
		})
		p := all[0].Peers()[0]
		if p.BootstrapExpect != 3 || p.Address != p.Name+":8201" || p.Incarnation != 1 {
			t.Errorf("a peer is known as %+v", p)
		}
		stopInBubble(t, all...)
	})
}

func TestWhatANodeAnnouncesReachesTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newSimNet()
		a, b := net.start(t, 1), net.start(t, 2)
		until(t, time.Minute, "they see each other", func() bool { return alive(a) == 1 && alive(b) == 1 })
		changed := b.Changed()
		id := uuid.NewString()
		a.Announce(Announcement{ClusterID: id, HasState: true})
		select {
		case <-changed:
		case <-time.After(time.Minute):
			t.Fatal("Changed is not closed")
		}
		if p := b.Peers()[0]; p.ClusterID != id || !p.HasState {
			t.Errorf("b knows %+v", p)
		}
		stopInBubble(t, a, b)
	})
}

func TestASilentNodeIsDeadAndAPartingOneHasLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newSimNet()
		a, b, c := net.start(t, 1), net.start(t, 2), net.start(t, 3)
		until(t, time.Minute, "all see all", func() bool { return alive(a) == 2 && alive(b) == 2 && alive(c) == 2 })
		stopAll(t, c)
		until(t, 10*time.Second, "c has left", func() bool { return find(a, c.cfg.NodeID).Status == Left })
		net.setCut("10.0.0.2", true)
		until(t, time.Minute, "b is dead", func() bool { return find(a, b.cfg.NodeID).Status == Dead })
		net.setCut("10.0.0.2", false)
		until(t, 2*time.Minute, "b is back", func() bool { return find(a, b.cfg.NodeID).Status == Alive })
		stopInBubble(t, a, b)
	})
}

// After a partition that outlasts memberlist's memory of the dead, retry_join brings the halves together again.
func TestALongPartitionHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newSimNet()
		a, b := net.start(t, 1), net.start(t, 2)
		until(t, time.Minute, "they see each other", func() bool { return alive(a) == 1 && alive(b) == 1 })
		net.setCut("10.0.0.2", true)
		time.Sleep(10 * time.Minute)
		if alive(a) != 0 {
			t.Fatal("not partitioned")
		}
		net.setCut("10.0.0.2", false)
		until(t, 2*time.Minute, "they see each other again", func() bool { return alive(a) == 1 && alive(b) == 1 })
		stopInBubble(t, a, b)
	})
}

func TestANodeThatComesBackElsewhereIsFoundAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newSimNet()
		a, b, c := net.start(t, 1), net.start(t, 2), net.start(t, 3)
		until(t, time.Minute, "all see all", func() bool { return alive(a) == 2 && alive(b) == 2 && alive(c) == 2 })
		net.setCut("10.0.0.3", true) // it dies without a word
		stopInBubble(t, c)
		net.setCut("10.0.0.3", false)
		again := net.start(t, 3, func(cfg *Config) {
			_ = cfg.Transport.Shutdown() // nobody is there any more
			cfg.Transport = net.host("10.0.0.9")
			cfg.Incarnation, cfg.ClusterAddress = 2, "elsewhere:8201"
		})
		until(t, 5*time.Second, "a knows the new address", func() bool {
			p := find(a, c.cfg.NodeID)
			return p.Address == "elsewhere:8201" && p.Status == Alive && p.Incarnation == 2
		})
		time.Sleep(time.Minute) // the old boot is declared dead meanwhile, which changes nothing
		if p := find(a, c.cfg.NodeID); p.Status != Alive || len(a.Peers()) != 2 {
			t.Errorf("later a knows %+v", a.Peers())
		}
		stopInBubble(t, a, b, again)
	})
}

func TestTwoClustersNeverMix(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"other cluster id": func(cfg *Config) { cfg.Initial.ClusterID = uuid.NewString() },
		"other key":        func(cfg *Config) { cfg.SecretKey = bytes.Repeat([]byte{7}, 32) },
		"other label":      func(cfg *Config) { cfg.Label = "elsewhere" },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := newSimNet()
				id := uuid.NewString()
				ours := func(cfg *Config) { cfg.Initial.ClusterID = id }
				a, b := net.start(t, 1, ours), net.start(t, 2, ours)
				stranger := net.start(t, 3, edit)
				time.Sleep(2 * time.Minute)
				if alive(a) != 1 || alive(b) != 1 || alive(stranger) != 0 {
					t.Errorf("a sees %d, b sees %d, the stranger sees %d", alive(a), alive(b), alive(stranger))
				}
				stopInBubble(t, a, b, stranger)
			})
		})
	}
}

func TestMalformedPacketsAndAnnouncementsChangeNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newSimNet()
		a, b := net.start(t, 1), net.start(t, 2)
		until(t, time.Minute, "they see each other", func() bool { return alive(a) == 1 && alive(b) == 1 })
		blaster := net.host("10.0.0.66")
		for i := range 500 {
			_, _ = blaster.WriteTo(bytes.Repeat([]byte{byte(i), byte(i >> 1)}, i%700), "10.0.0.1:8202")
		}
		// A member with the key whose announcement is not ours.
		conf := memberlist.DefaultLANConfig()
		conf.Name, conf.Transport, conf.SecretKey, conf.Label = "intruder", blaster, testKey, "rollcall"
		conf.LogOutput = discard{}
		m, err := memberlist.Create(conf)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = m.Join([]string{"10.0.0.1:8202"})
		time.Sleep(time.Minute)
		if n := len(a.Peers()); n != 1 || alive(a) != 1 {
			t.Errorf("a knows %+v", a.Peers())
		}
		if err := m.Shutdown(); err != nil {
			t.Error(err)
		}
		stopInBubble(t, a, b)
	})
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

func find(g *Gossip, id string) Peer {
	for _, p := range g.Peers() {
		if p.NodeID == id {
			return p
		}
	}
	return Peer{Status: 255}
}

func TestARealPortIsFoundUnderItsName(t *testing.T) {
	start := func(i int, join ...string) *Gossip {
		cfg := testConfig(i)
		cfg.Listen, cfg.Advertise, cfg.RetryJoin = "127.0.0.1:0", "node.example", join
		cfg.Resolve = func(_ context.Context, host string) ([]string, error) {
			if host != "node.example" {
				return nil, fmt.Errorf("no such host %s", host)
			}
			return []string{"127.0.0.1"}, nil
		}
		g, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		return g
	}
	a := start(1, "nowhere.example:1")
	_, port, _ := splitPort(a.Addr())
	b := start(2, "node.example:"+port)
	until(t, 10*time.Second, "they see each other", func() bool { return alive(a) == 1 && alive(b) == 1 })
	stopAll(t, a, b)
}

func splitPort(addr string) (host, port string, ok bool) {
	i := bytes.LastIndexByte([]byte(addr), ':')
	return addr[:i], addr[i+1:], i > 0
}

func TestConfigurationsThatCannotWorkAreRefused(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"no id":     func(c *Config) { c.NodeID = "n1" },
		"short key": func(c *Config) { c.SecretKey = []byte("short") },
		"no port":   func(c *Config) { c.Listen = "127.0.0.1" },
		"no bind":   func(c *Config) { c.Listen = "" },
		"long name": func(c *Config) { c.Name = string(bytes.Repeat([]byte("x"), 200)) },
		"bad id":    func(c *Config) { c.Initial.ClusterID = "no uuid" },
	} {
		cfg := testConfig(1)
		cfg.Listen = "127.0.0.1:0"
		edit(&cfg)
		if _, err := New(cfg); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStopWithoutStartLeavesNothing(t *testing.T) {
	cfg := testConfig(1)
	cfg.Listen = "127.0.0.1:0"
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	stopAll(t, g)
}

func TestAnAnnouncementSurvivesItsEncoding(t *testing.T) {
	want := fact{
		NodeID: uuid.NewString(), Incarnation: 1 << 40, Name: "n", Address: "h:1", ClusterID: uuid.NewString(), HasState: true,
		NonVoter: true, BootstrapExpect: 5, Build: "1.2.3",
	}
	b, err := want.encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := decode(append(b, "later fields"...), want.member())
	if err != nil || *got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := decode(b, "somebody else/1"); err == nil {
		t.Error("a foreign name is accepted")
	}
	longest := want
	longest.Name, longest.Address = string(bytes.Repeat([]byte("n"), maxName)), string(bytes.Repeat([]byte("a"), maxAddress))
	longest.Build = string(bytes.Repeat([]byte("b"), maxBuild))
	if b, err = longest.encode(); err != nil || len(b) > memberlist.MetaMaxSize {
		t.Errorf("the longest announcement has %d bytes, %v", len(b), err)
	}
}

func FuzzDecode(f *testing.F) {
	good, err := (&fact{NodeID: uuid.NewString(), Incarnation: 1, Name: "n", Address: "h:1"}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		probe, err := decode(b, "x")
		if err == nil {
			t.Fatalf("accepted as somebody else: %+v", probe)
		}
	})
}

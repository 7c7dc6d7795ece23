//go:build e2e

package e2e

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// networkFaults are firewall rules in the victim's own namespace. The cable to the test's clients stays whole unless the
// fault is about the clients: a node that nobody hears must still be asked.
func networkFaults() []trouble {
	ruled := func(kind string, hold [2]time.Duration, rules func(x *chaos, v *server) []string) trouble {
		return trouble{kind: kind, hold: hold, do: func(x *chaos, v *server) func() {
			for _, r := range rules(x, v) {
				x.net.rule(v.index, r)
			}
			return func() { x.net.heal(v.index) }
		}}
	}
	port := func(rules ...string) func(*chaos, *server) []string {
		return func(*chaos, *server) []string { return rules }
	}
	return []trouble{
		ruled("cut off, short", between(300, 2500), isolated),
		ruled("cut off, past the lease", between(6500, 9000), isolated),
		ruled("sends, hears nothing", between(1000, 8000), func(x *chaos, v *server) []string { return x.net.isolated()[:1] }),
		ruled("hears, sends nothing", between(1000, 8000), func(x *chaos, v *server) []string { return x.net.isolated()[1:] }),
		ruled("one pair cut", between(1000, 8000), func(x *chaos, v *server) []string {
			other := x.net.address((v.index + 1 + x.rng.IntN(len(x.nodes)-1)) % len(x.nodes))
			return []string{"-A INPUT -s " + other + " -j DROP", "-A OUTPUT -d " + other + " -j DROP"}
		}),
		ruled("cluster port cut", between(1000, 8000), port(
			fmt.Sprintf("-A INPUT -p tcp --dport %d -j DROP", portPeer), fmt.Sprintf("-A OUTPUT -p tcp --dport %d -j DROP", portPeer))),
		ruled("gossip port cut", between(1000, 8000), port(
			fmt.Sprintf("-A INPUT -p udp --dport %d -j DROP", portGossip), fmt.Sprintf("-A OUTPUT -p udp --dport %d -j DROP", portGossip),
			fmt.Sprintf("-A INPUT -p tcp --dport %d -j DROP", portGossip), fmt.Sprintf("-A OUTPUT -p tcp --dport %d -j DROP", portGossip))),
		ruled("API port cut", between(1000, 4000), port(fmt.Sprintf("-A INPUT -p tcp --dport %d -j DROP", portHTTP))),
		ruled("resets", between(1000, 4000), port(
			fmt.Sprintf("-A INPUT -p tcp --dport %d -j REJECT --reject-with tcp-reset", portPeer),
			fmt.Sprintf("-A INPUT -p tcp --sport %d -j REJECT --reject-with tcp-reset", portPeer))),
		ruled("loss", between(2000, 6000), func(x *chaos, _ *server) []string {
			return []string{fmt.Sprintf("-A INPUT -i eth0 ! -s %s254 -m statistic --mode random --probability %.2f -j DROP",
				x.net.prefix, []float64{0.01, 0.1, 0.3, 0.5}[x.rng.IntN(4)])}
		}),
		ruled("duplicates", between(2000, 6000), func(x *chaos, v *server) (rules []string) {
			for i := range x.nodes {
				if i != v.index {
					rules = append(rules, fmt.Sprintf("-t mangle -A OUTPUT -d %s -j TEE --gateway %s", x.net.address(i), x.net.address(i)))
				}
			}
			return rules
		}),
		{kind: "delay and reorder", hold: between(2000, 6000), do: func(x *chaos, v *server) func() {
			return x.delayed(v, time.Duration(20+x.rng.IntN(200))*time.Millisecond)
		}},
		{kind: "bandwidth 200 kbit", hold: between(2000, 6000), do: func(x *chaos, v *server) func() {
			x.net.in(v.index, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "200kbit", "burst", "16kb", "latency", "400ms")
			return func() { x.net.heal(v.index) }
		}},
		{kind: "flaps every 500 ms", hold: between(0, 1), do: func(x *chaos, v *server) func() {
			for range 6 {
				for _, r := range x.net.isolated() {
					x.net.rule(v.index, r)
				}
				time.Sleep(500 * time.Millisecond)
				x.net.heal(v.index)
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		}},
	}
}

// delayed holds every packet from the other nodes back, each for another time between half and one and a half of about.
func (x *chaos) delayed(v *server, about time.Duration) func() {
	x.t.Helper()
	d, err := newDelay(x.net, v.index, func() time.Duration { return about/2 + rand.N(about) })
	if err != nil {
		x.t.Fatal(err)
	}
	x.net.rule(v.index, fmt.Sprintf("-A INPUT -i eth0 ! -s %s254 -j NFQUEUE --queue-num %d --queue-bypass", x.net.prefix, queueNumber))
	return func() {
		x.net.heal(v.index)
		if d.end() == 0 {
			x.t.Errorf("no packet of %s was delayed: the injector does nothing", v.name)
		}
	}
}

func isolated(x *chaos, _ *server) []string { return x.net.isolated() }

package reload

import (
	"sort"
	"time"

	commandv1 "rollcall/proto/command/v1"
)

// keep tells the content store now and then which bytes are still needed. What is prepared or tried right now is held
// by its own process and by the reload that names it.
func (r *Reloads) keep() {
	ticker := time.NewTicker(r.cfg.KeepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-ticker.C:
			if v := r.cfg.State.View(); r.isReady(v) {
				r.cfg.Plugins.Keep(needed(v))
			}
		}
	}
}

// needed lists every sha256 that a wanted or previous spec, an override, the catalog (and with it every pin) or an
// unfinished reload names: a restart and a rollback never depend on a file that somebody has replaced since.
func needed(v View) []string {
	set := map[string]bool{}
	add := func(s *commandv1.Spec) {
		if sha := s.GetSha256(); sha != "" {
			set[sha] = true
		}
	}
	for _, m := range v.Mounts() {
		add(m.GetWanted().GetSpec())
		add(m.GetPrevious().GetSpec())
		for _, o := range m.GetOverrides() {
			add(o.GetWanted().GetSpec())
		}
	}
	for _, p := range v.Plugins() {
		add(p.GetSpec())
	}
	for _, rl := range v.RunningReloads() {
		for _, t := range rl.GetTargets() {
			add(t.GetFrom())
			add(t.GetTo())
		}
	}
	out := make([]string, 0, len(set))
	for sha := range set {
		out = append(out, sha)
	}
	sort.Strings(out)
	return out
}

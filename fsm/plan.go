package fsm

import (
	commandv1 "rollcall/proto/command/v1"
)

// PlanReload says what a reload would touch if it were entered now: its targets, or why it would be refused. It changes
// nothing. Any goroutine.
func (v *View) PlanReload(c *commandv1.StartReload) ([]*commandv1.Target, error) {
	e := &entry{state: v.s, index: v.s.index, res: &commandv1.Result{}}
	if err := e.checkStart(c); err != nil {
		return nil, err
	}
	mounts, err := e.selectMounts(c)
	if err != nil {
		return nil, err
	}
	options := clone(c.GetOptions())
	if options == nil {
		options = &commandv1.Options{}
	}
	r := &commandv1.Reload{
		Scope: c.GetScope(), ServingNode: c.GetServingNode(), Options: options, ToPrevious: c.GetToPrevious(),
	}
	targets := make([]*commandv1.Target, 0, len(mounts))
	for _, m := range mounts {
		t, err := e.targetOf(r, m)
		if err != nil {
			return nil, err
		}
		targets = append(targets, t)
	}
	return targets, nil
}

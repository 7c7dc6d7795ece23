// Package check records what happens in a test run of a cluster, and judges the record: what clients called and were
// answered, what each node did, and what was broken on purpose. Check reads nothing else, so a run that was saved can be
// judged again. The invariants are those of DESIGN.md beside this file.
//
//	rec := check.NewRecorder()
//	node := rec.Node("node-1")           // one for each node; its Handler and Witness go into node.Options
//	op := rec.Invoke(check.Op{Kind: check.Write, Mount: "kv/", Key: "a", Input: "1"})
//	... call ...
//	op.Outcome = check.OK
//	rec.Complete(op)
//	report := check.Check(rec.Run())
package check

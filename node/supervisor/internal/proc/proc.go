// Package proc starts processes so that none of them outlives the host, and finds those that tried to.
// node/supervisor is its only user.
package proc

import (
	"os/exec"
	"runtime"
	"sync"
)

// children are the processes that Spawners of this program started and that nobody has waited for yet. The lock is held
// while a process is started, so that Reap never takes one for an orphan.
var children = struct {
	sync.Mutex
	pids map[int]bool
}{pids: map[int]bool{}}

// Spawner starts processes from one OS thread that lives as long as it does: the kernel's "kill me when my parent dies"
// (Pdeathsig) follows the thread that forked, and the Go runtime ends threads when it likes.
type Spawner struct {
	jobs chan job
	done chan struct{}
	once sync.Once
	quit chan struct{}
}

type job struct {
	cmd *exec.Cmd
	err chan error
}

// NewSpawner starts the thread. Close ends it.
func NewSpawner() *Spawner {
	s := &Spawner{jobs: make(chan job), done: make(chan struct{}), quit: make(chan struct{})}
	go s.run()
	return s
}

func (s *Spawner) run() {
	runtime.LockOSThread()
	if !onMainThread() {
		s.serve(nil)
		return
	}
	// The main thread does not end with its goroutine: the runtime parks it, and the children would outlive their spawner.
	// While this goroutine holds it, another one gets another thread.
	moved := make(chan struct{})
	go s.serve(moved)
	<-moved
	runtime.UnlockOSThread()
}

func (s *Spawner) serve(moved chan<- struct{}) {
	defer close(s.done)
	// Never unlocked: the thread ends with this goroutine, and with it what prepareThread did to it.
	runtime.LockOSThread()
	if moved != nil {
		close(moved)
	}
	prepareThread()
	for {
		select {
		case j := <-s.jobs:
			j.err <- start(j.cmd)
		case <-s.quit:
			return
		}
	}
}

func start(cmd *exec.Cmd) error {
	children.Lock()
	defer children.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	children.pids[cmd.Process.Pid] = true
	return nil
}

// Start starts cmd in a session of its own. The caller calls Wait later, once.
func (s *Spawner) Start(cmd *exec.Cmd) error {
	setAttributes(cmd)
	j := job{cmd, make(chan error, 1)}
	select {
	case s.jobs <- j:
		return <-j.err
	case <-s.done:
		return exec.ErrNotFound
	}
}

// Close ends the thread. Every process that it started and that still runs is killed by the kernel.
func (s *Spawner) Close() {
	s.once.Do(func() { close(s.quit) })
	<-s.done
}

// Wait waits for the end of a process that Start started. It calls ended as soon as the process has ended, kills
// what is left of its process group while the pid cannot belong to anybody else yet, and reaps it.
func Wait(cmd *exec.Cmd, ended func()) error {
	pid := cmd.Process.Pid
	var err error
	if waitEnded(pid) {
		ended()
		KillGroup(pid)
	} else {
		err = cmd.Wait()
		ended()
	}
	children.Lock()
	defer children.Unlock()
	if cmd.ProcessState == nil {
		err = cmd.Wait()
	}
	delete(children.pids, pid)
	return err
}

package sim

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// What a disk has acknowledged survives a loss of power; what is in flight is there or not, as a whole.
func TestADiskKeepsWhatItAcknowledgedAndNothingByHalves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, reaches := range []bool{false, true} {
			d := newDisk(func() time.Duration { return time.Millisecond }, func() bool { return reaches })
			s := d.open()
			if err := s.StoreLogs([]*raft.Log{{Index: 1}, {Index: 2}}); err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() { defer close(done); _ = s.StoreLogs([]*raft.Log{{Index: 3}, {Index: 4}}) }()
			synctest.Wait()
			d.cutOff()
			<-done
			want := uint64(2)
			if reaches {
				want = 4
			}
			if last, _ := d.open().LastIndex(); last != want {
				t.Errorf("write in flight arrives: %v: last entry %d, want %d", reaches, last, want)
			}
			if err := s.StoreLog(&raft.Log{Index: 5}); err != nil {
				t.Fatal(err)
			}
			if last, _ := d.open().LastIndex(); last != want {
				t.Errorf("a process without its disk wrote entry %d", last)
			}
		}
	})
}

func TestALazyDiskLosesWhatItDidNotSync(t *testing.T) {
	d := newDisk(func() time.Duration { return 0 }, func() bool { return false })
	d.setLazy()
	s := d.open()
	if err := s.Set([]byte("term"), []byte("1")); err != nil {
		t.Fatal(err)
	}
	d.sync()
	if err := s.Set([]byte("term"), []byte("2")); err != nil {
		t.Fatal(err)
	}
	d.cutOff()
	if v, err := d.open().Get([]byte("term")); err != nil || !slices.Equal(v, []byte("1")) {
		t.Errorf("%q, %v", v, err)
	}
}

func TestAHungDiskWritesWhenItIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(func() time.Duration { return 0 }, func() bool { return false })
		s, release := d.open(), d.hang()
		done := make(chan struct{})
		go func() { defer close(done); _ = s.StoreLog(&raft.Log{Index: 1}) }()
		time.Sleep(time.Hour)
		if last, _ := s.LastIndex(); last != 0 {
			t.Error("a hung disk wrote")
		}
		release()
		<-done
		if last, _ := s.LastIndex(); last != 1 {
			t.Error("the write was lost")
		}
	})
}

func TestADiskThatHangsForTwoReasonsWritesWhenBothAreOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(func() time.Duration { return 0 }, func() bool { return false })
		s, first := d.open(), d.hang()
		done := make(chan struct{})
		go func() { defer close(done); _ = s.StoreLog(&raft.Log{Index: 1}) }()
		synctest.Wait()
		second := d.hang()
		first()
		time.Sleep(time.Hour)
		if last, _ := s.LastIndex(); last != 0 {
			t.Error("a disk wrote that hung for one reason still")
		}
		second()
		<-done
	})
}

package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io"
	"os"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

// The file format of bbolt (go.etcd.io/bbolt/internal/common, version 2), as far as reading needs it. bbolt cannot be
// asked about a damaged file: it walks the pages on goroutines of its own and panics there, where nobody can catch it,
// and it silently goes back to the state before the last commit when the newest meta page is bad.
const (
	pageHead     = 16
	elementSize  = 16
	metaSize     = 64
	metaMagic    = 0xED0CDAED
	metaVersion  = 2
	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	bucketInLeaf = 0x01
	maxDepth     = 64
)

// extent says which entries a log file holds.
type extent struct {
	// First is where the last run without a gap begins, Last where it ends; both 0 for an empty log.
	First, Last uint64
	// Plain counts the entries that are not sealed; Sealed has, for each data key, the last entry that it has sealed.
	Plain  uint64
	Sealed map[uint32]uint64
	// Term and Vote are the last term and vote that were stored.
	Term, Vote uint64
}

// verifier reads a whole log file once and checks every page that is in use: place, layout, order, and the checksum of
// every entry and vote.
type verifier struct {
	file     io.ReaderAt
	size     int64
	pageSize int64
	high     uint64 // pages at or above do not exist
	seen     map[uint64]bool
	extent   extent
}

// verifyFile reads the file at path. A missing file is an empty log.
func verifyFile(path string) (extent, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return extent{}, nil
	}
	if err != nil {
		return extent{}, fault.As(fault.Internal, err, "open raft log", path)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return extent{}, fault.As(fault.Internal, err, "open raft log", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := f.Chmod(0o600); err != nil {
			return extent{}, fault.As(fault.Denied, err, "make raft log private", path)
		}
	}
	if info.Size() == 0 {
		return extent{}, nil // the first boot was cut short before anything was written
	}
	v := &verifier{file: f, size: info.Size(), seen: map[uint64]bool{}, extent: extent{Sealed: map[uint32]uint64{}}}
	if err := v.run(); err != nil {
		if fault.KindOf(err) != fault.Corrupt {
			return extent{}, fault.As(fault.Internal, err, "read raft log", path)
		}
		return extent{}, damaged(path, err)
	}
	return v.extent, nil
}

func corrupt(format string, args ...any) error { return fault.Text(fault.Corrupt, format, args...) }

func (v *verifier) run() error {
	root, err := v.metas()
	if err != nil {
		return err
	}
	return v.tree(root, 0, func(flags uint32, name, value []byte) error {
		if flags&bucketInLeaf == 0 {
			return corrupt("a value outside of every bucket")
		}
		switch string(name) {
		case "logs":
			return v.bucket(value, v.entry)
		case "conf":
			return v.bucket(value, v.vote)
		default:
			return corrupt("an unknown bucket %q", name)
		}
	})
}

// entry checks one entry of the log and its place behind the last one.
func (v *verifier) entry(_ uint32, key, value []byte) error {
	log, err := checkRecord(key, value)
	if err != nil {
		return err
	}
	index := log.Index
	if id, sealed := seal.IsMark(log.Extensions); sealed {
		v.extent.Sealed[id] = index
	} else {
		v.extent.Plain++
	}
	if index != v.extent.Last+1 {
		v.extent.First = index
	}
	v.extent.Last = index
	return nil
}

// vote checks one value of the votes.
func (v *verifier) vote(_ uint32, key, value []byte) error {
	val, err := open(key, value)
	if err != nil || len(val) != 8 {
		return err
	}
	switch {
	case bytes.Equal(key, keyTerm):
		v.extent.Term = binary.BigEndian.Uint64(val)
	case bytes.Equal(key, keyVote):
		v.extent.Vote = binary.BigEndian.Uint64(val)
	}
	return nil
}

// metas checks both meta pages and returns the root of the newer. A commit writes one of them, within one disk sector:
// a bad one is damage, not a commit that was cut short, and the last acknowledged entries may hang on it.
func (v *verifier) metas() (root uint64, err error) {
	head := make([]byte, pageHead+metaSize)
	if err := v.read(head, 0); err != nil {
		return 0, err
	}
	v.pageSize = int64(binary.NativeEndian.Uint32(head[pageHead+8:]))
	if v.pageSize < 512 || v.pageSize > 1<<16 || v.pageSize&(v.pageSize-1) != 0 {
		return 0, corrupt("meta page 0 is damaged: page size %d", v.pageSize)
	}
	var newest uint64
	for i := range uint64(2) {
		if err := v.read(head, int64(i)*v.pageSize); err != nil {
			return 0, err
		}
		meta := head[pageHead:]
		sum := fnv.New64a()
		_, _ = sum.Write(meta[:56])
		switch {
		case binary.NativeEndian.Uint64(head) != i || binary.NativeEndian.Uint16(head[8:]) != flagMeta,
			binary.NativeEndian.Uint32(meta) != metaMagic,
			binary.NativeEndian.Uint64(meta[56:]) != sum.Sum64():
			return 0, corrupt("meta page %d is damaged", i)
		case binary.NativeEndian.Uint32(meta[4:]) != metaVersion:
			return 0, fault.Text(fault.Invalid, "the file has format %d, this program reads %d",
				binary.NativeEndian.Uint32(meta[4:]), metaVersion)
		}
		if tx := binary.NativeEndian.Uint64(meta[48:]); i == 0 || tx > newest {
			newest, root, v.high = tx, binary.NativeEndian.Uint64(meta[16:]), binary.NativeEndian.Uint64(meta[40:])
		}
	}
	return root, nil
}

type visit func(flags uint32, key, value []byte) error

// bucket walks a bucket given by its record: a root page, or, for a small one, the page itself.
func (v *verifier) bucket(record []byte, each visit) error {
	if len(record) < 16 {
		return corrupt("a bucket record of %d bytes", len(record))
	}
	if root := binary.NativeEndian.Uint64(record); root != 0 {
		return v.tree(root, 0, each)
	}
	page := record[16:]
	if len(page) < pageHead || binary.NativeEndian.Uint16(page[8:]) != flagLeaf {
		return corrupt("an inline bucket without a page")
	}
	return leaf(page, each)
}

// tree walks the page and everything below it.
func (v *verifier) tree(id uint64, depth int, each visit) error {
	page, err := v.page(id)
	if err != nil {
		return err
	}
	switch flags := binary.NativeEndian.Uint16(page[8:]); {
	case flags == flagLeaf:
		if err := leaf(page, each); err != nil {
			return fault.New(fault.Corrupt, "", "", "page %d: %w", id, err)
		}
		return nil
	case flags != flagBranch || depth == maxDepth:
		return corrupt("page %d: flags %#x at depth %d", id, flags, depth)
	}
	count := int(binary.NativeEndian.Uint16(page[10:]))
	at := pageHead + elementSize*count
	if count == 0 || at > len(page) {
		return corrupt("page %d: %d children", id, count)
	}
	var last []byte
	for i := range count {
		e := pageHead + elementSize*i
		pos, size := int(binary.NativeEndian.Uint32(page[e:])), int(binary.NativeEndian.Uint32(page[e+4:]))
		if e+pos != at || size > len(page)-at {
			return corrupt("page %d: child %d is out of place", id, i)
		}
		key := page[at : at+size]
		if i > 0 && bytes.Compare(key, last) <= 0 {
			return corrupt("page %d: child %d is out of order", id, i)
		}
		last, at = key, at+size
		if err := v.tree(binary.NativeEndian.Uint64(page[e+8:]), depth+1, each); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks the exact layout that bbolt writes (elements, then keys and values without a gap) and visits each.
func leaf(page []byte, each visit) error {
	count := int(binary.NativeEndian.Uint16(page[10:]))
	at := pageHead + elementSize*count
	if at > len(page) {
		return corrupt("%d elements", count)
	}
	var last []byte
	for i := range count {
		e := pageHead + elementSize*i
		pos, ksize, vsize := int(binary.NativeEndian.Uint32(page[e+4:])), int(binary.NativeEndian.Uint32(page[e+8:])),
			int(binary.NativeEndian.Uint32(page[e+12:]))
		if e+pos != at || ksize > len(page)-at || vsize > len(page)-at-ksize {
			return corrupt("element %d is out of place", i)
		}
		key, value := page[at:at+ksize], page[at+ksize:at+ksize+vsize]
		if i > 0 && bytes.Compare(key, last) <= 0 {
			return corrupt("element %d is out of order", i)
		}
		last, at = key, at+ksize+vsize
		if err := each(binary.NativeEndian.Uint32(page[e:]), key, value); err != nil {
			return err
		}
	}
	return nil
}

// page reads a page with its overflow and checks that it is the one that was asked for, for the first time.
func (v *verifier) page(id uint64) ([]byte, error) {
	if id < 2 || id >= v.high || v.seen[id] {
		return nil, corrupt("page %d is out of range or in use twice", id)
	}
	v.seen[id] = true
	head := make([]byte, pageHead)
	if err := v.read(head, int64(id)*v.pageSize); err != nil {
		return nil, err
	}
	overflow := uint64(binary.NativeEndian.Uint32(head[12:]))
	if got := binary.NativeEndian.Uint64(head); got != id || overflow >= v.high-id {
		return nil, corrupt("in the place of page %d stands page %d with %d more", id, got, overflow)
	}
	for i := range overflow {
		if v.seen[id+1+i] {
			return nil, corrupt("page %d is in use twice", id+1+i)
		}
		v.seen[id+1+i] = true
	}
	page := make([]byte, int64(overflow+1)*v.pageSize)
	return page, v.read(page, int64(id)*v.pageSize)
}

func (v *verifier) read(b []byte, at int64) error {
	if at < 0 || at+int64(len(b)) > v.size {
		return corrupt("the file ends at %d, within a page in use", v.size)
	}
	if _, err := v.file.ReadAt(b, at); err != nil {
		return corrupt("read at %d: %w", at, err) // an I/O error under a file in use is damage too
	}
	return nil
}

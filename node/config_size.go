package node

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes.
type Size int64

var sizeUnits = []struct {
	name  string
	bytes int64
}{
	{"GiB", 1 << 30},
	{"MiB", 1 << 20},
	{"KiB", 1 << 10},
	{"B", 1},
}

// ParseSize reads "32MiB", "1 GiB", "512KiB", "100B" or plain bytes ("1024"). Units are powers of two; their case
// does not matter. MB and its like are refused, because people disagree about what they mean.
func ParseSize(text string) (Size, error) {
	number, unit := strings.TrimSpace(text), int64(1)
	for _, u := range sizeUnits {
		if len(number) > len(u.name) && strings.EqualFold(number[len(number)-len(u.name):], u.name) {
			number, unit = strings.TrimSpace(number[:len(number)-len(u.name)]), u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil {
		return 0, fmt.Errorf(`%q is not a size; write bytes ("1048576") or a unit of KiB, MiB or GiB ("32MiB")`, text)
	}
	if n > uint64(math.MaxInt64/unit) {
		return 0, fmt.Errorf("size %q is beyond any machine", text)
	}
	return Size(n) * Size(unit), nil
}

// String is the shortest exact form that ParseSize reads.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if u.bytes > 1 && s != 0 && int64(s)%u.bytes == 0 {
			return strconv.FormatInt(int64(s)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

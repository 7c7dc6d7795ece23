// Package audit writes down who asked what and what they were answered: one line of JSON for each request and one for each
// answer, before the answer is given.
package audit

import (
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/api"
	"rollcall/node/fault"
)

// Config is what a device needs. Salt, Logger and Registerer are required.
type Config struct {
	// File is the absolute path of the file. It comes from the node's own configuration alone.
	File string
	// Forbidden are directories that the file may not lie in.
	Forbidden []string
	// ClearAccessors leaves accessors readable. They open nothing by themselves, and revoke a token with one call.
	ClearAccessors bool
	// Headers are the request headers that records hold.
	Headers []string
	// Salt is the cluster's; empty until there is one. Any goroutine.
	Salt       func() string
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Device is one audit file. Its methods may be called from any goroutine.
type Device struct {
	cfg Config

	mu sync.Mutex
	// out is the file; a test may put something in its place.
	out io.WriteCloser
	// torn: the file ends in the middle of a line, which the next record must not continue.
	torn    bool
	failing bool

	hashing sync.Mutex
	hasher  *hasher

	records  *prometheus.CounterVec
	failures prometheus.Counter
	took     prometheus.Histogram
}

// Open opens the file and checks that it can be written to. The error says what is wrong with it.
func Open(cfg Config) (*Device, error) {
	d := &Device{cfg: cfg, hasher: newHasher("")}
	d.records = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rollcall_audit_records_total", Help: "Audit records written, by type.",
	}, []string{"type"})
	d.failures = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "rollcall_audit_failures_total", Help: "Audit records that could not be written. Each one is a request that was refused.",
	})
	d.took = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "rollcall_audit_write_seconds", Help: "Time to write one audit record.", Buckets: prometheus.ExponentialBuckets(1e-6, 4, 12),
	})
	for _, c := range []prometheus.Collector{d.records, d.failures, d.took} {
		if err := cfg.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, "register metrics of", "node/audit")
		}
	}
	f, torn, err := openFile(cfg.File, cfg.Forbidden)
	if err != nil {
		return nil, err
	}
	d.out, d.torn = f, torn
	return d, nil
}

// Record writes one entry. It returns once the system has taken the line; the caller gives no answer, and does nothing, when
// it fails. The entry is not changed.
func (d *Device) Record(e *api.AuditEntry) error {
	began := time.Now()
	line, err := d.encode(d.current(), e)
	if err == nil && len(line) > maxLine {
		err = fault.New(fault.TooLarge, "write", "audit record", "it has %d bytes, and at most %d are written", len(line), maxLine)
	}
	if err == nil {
		err = d.write(line)
	}
	if err != nil {
		d.failures.Inc()
		return err
	}
	d.records.WithLabelValues(e.Type).Inc()
	d.took.Observe(time.Since(began).Seconds())
	return nil
}

func (d *Device) write(line []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.out == nil {
		return fault.New(fault.Unavailable, "write", "audit record", "the device is closed")
	}
	if d.torn {
		line = append([]byte{'\n'}, line...)
	}
	n, err := d.out.Write(line)
	if err != nil {
		d.torn = d.torn || n > 0
		if !d.failing {
			d.failing = true
			d.cfg.Logger.Error("an audit record cannot be written: every request is refused until it can", "file", d.cfg.File, "error", err)
		}
		return fault.As(fault.Internal, err, "write", "audit record")
	}
	d.torn = false
	if d.failing {
		d.failing = false
		d.cfg.Logger.Info("audit records are written again", "file", d.cfg.File)
	}
	return nil
}

// current is the hasher of the cluster's salt.
func (d *Device) current() *hasher {
	salt := d.cfg.Salt()
	d.hashing.Lock()
	defer d.hashing.Unlock()
	if d.hasher.salt != salt {
		d.hasher = newHasher(salt)
	}
	return d.hasher
}

// Hash is a text as records show it, for whoever looks for a value in the file.
func (d *Device) Hash(text string) (string, error) {
	h := d.current()
	if h.salt == "" {
		return "", fault.Text(fault.Unavailable, "the cluster has no salt for audit records yet: its leader is about to enter one")
	}
	return h.of(text), nil
}

// Headers are the request headers that records hold, in lower case.
func (d *Device) Headers() []string {
	out := make([]string, len(d.cfg.Headers))
	for i, h := range d.cfg.Headers {
		out[i] = strings.ToLower(h)
	}
	return out
}

// Reopen opens the file anew, after somebody moved the old one away. Where that fails, the old one is written to as before.
func (d *Device) Reopen() error {
	f, torn, err := openFile(d.cfg.File, d.cfg.Forbidden)
	if err != nil {
		return err
	}
	d.mu.Lock()
	old := d.out
	if old == nil { // closed meanwhile
		d.mu.Unlock()
		return f.Close()
	}
	d.out, d.torn = f, torn
	d.mu.Unlock()
	return old.Close()
}

// Close ends the device. What is recorded later is refused.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.out == nil {
		return nil
	}
	err := d.out.Close()
	d.out = nil
	return err
}

// Describe is the device as sys/audit lists it.
func (d *Device) Describe() api.AuditDevice {
	return api.AuditDevice{
		Type: "file", Description: "enabled by this node's configuration", Path: "file/", Local: true, Options: map[string]string{
			"file_path": d.cfg.File, "hmac_accessor": strconv.FormatBool(!d.cfg.ClearAccessors), "log_raw": "false", "mode": "0600",
			"headers": strings.Join(d.Headers(), ","),
		},
	}
}

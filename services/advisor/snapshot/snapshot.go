// Package snapshot is the advisory snapshot: one read-only file with every
// advisory that can match, the catalog of known exploited vulnerabilities,
// EPSS scores and end-of-life data.
//
// The file is mapped, not parsed, at start. All numbers in it are
// little-endian; a string is named by its rank in one sorted table, so that
// comparing two names compares two integers. The versions that the ranges of
// one package name are sorted once, when the file is made: to match a version
// is to find its place among them, after which every range is decided by
// comparing integers. The last 32 bytes are the sha256 of all bytes before.
//
// Offsets are checked on every access: a file whose digest holds but whose
// content is malformed gives wrong or no matches, never a crash.
package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sort"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of Open.
var (
	// ErrForeign is returned for a file that is not a snapshot.
	ErrForeign = errors.New("not an advisory snapshot")
	// ErrFormat is returned for a snapshot of a format this program does not read.
	ErrFormat = errors.New("advisory snapshot of another format version")
	// ErrTruncated is returned for a snapshot that is shorter or longer than it says.
	ErrTruncated = errors.New("advisory snapshot is not complete")
	// ErrCorrupt is returned for a snapshot whose content does not have its digest or its shape.
	ErrCorrupt = errors.New("advisory snapshot is corrupt")
)

const (
	magic         = "TWADVSN\n"
	formatVersion = 1
	headerFixed   = 64
	trailerSize   = sha256.Size
)

// Sections of the file, in their order in the header's table.
const (
	secStringOffsets = iota // u32 each, one more than strings
	secStrings
	secBases      // base ecosystems: name, first index entry, number of entries
	secEcosystems // full ecosystems: name, number of advisories
	secIndex      // see indexSize
	secBounds     // u32 string each
	secCandidates // see candidateSize
	secRanges     // varints
	secVersions   // u32 string each, sorted within a candidate
	secRecords    // varints
	secKEV        // u32 string each, sorted
	secEPSS       // u32 string, u32 score in millionths; sorted
	secProducts   // name, first cycle, number of cycles
	secCycles     // u32 string for each field of Cycle
	sectionCount
)

const (
	headerSize    = headerFixed + sectionCount*16
	baseSize      = 12
	ecosystemSize = 8
	indexSize     = 20 // name, first bound, bounds, first candidate, candidates
	candidateSize = 20 // record offset, release, ranges offset, first version, versions
	epssSize      = 8
	productSize   = 12
	cycleFields   = 8
	cycleSize     = cycleFields * 4
)

// Snapshot is an open snapshot. Its methods may be used by several goroutines
// at once, until Close.
type Snapshot struct {
	data     []byte
	unmap    bool
	sec      [sectionCount][]byte
	digest   string
	sequence int64
	newest   int64
	records  int
	gone     int
}

// Open maps the snapshot at path and verifies its digest. The file must be
// replaced by renaming another over it, never written in place.
// Errors: ErrForeign, ErrFormat, ErrTruncated, ErrCorrupt, and those of the file system.
func Open(path string) (*Snapshot, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("open advisory snapshot: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open advisory snapshot: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open advisory snapshot %s: not a file: %w", path, ErrForeign)
	}
	if info.Size() < headerSize+trailerSize || info.Size() > math.MaxInt32*2 {
		return nil, fmt.Errorf("open advisory snapshot %s: %d bytes: %w", path, info.Size(), foreignOrShort(f))
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map advisory snapshot %s: %w", path, err)
	}
	s, err := read(data, true)
	if err != nil {
		_ = unix.Munmap(data)
		return nil, fmt.Errorf("open advisory snapshot %s: %w", path, err)
	}
	s.unmap = true
	return s, nil
}

func foreignOrShort(f *os.File) error {
	head := make([]byte, len(magic))
	if n, _ := f.ReadAt(head, 0); string(head[:n]) == magic {
		return ErrTruncated
	}
	return ErrForeign
}

// read checks the frame of a snapshot. verify asks for its digests.
func read(data []byte, verify bool) (*Snapshot, error) {
	if len(data) < len(magic) || string(data[:len(magic)]) != magic {
		return nil, ErrForeign
	}
	if len(data) < headerSize+trailerSize {
		return nil, ErrTruncated
	}
	le := binary.LittleEndian
	if v := le.Uint32(data[8:]); v != formatVersion {
		return nil, fmt.Errorf("format %d, this program reads %d: %w", v, formatVersion, ErrFormat)
	}
	if n := le.Uint32(data[12:]); n != sectionCount {
		return nil, fmt.Errorf("%d sections: %w", n, ErrFormat)
	}
	if size := le.Uint64(data[16:]); size != uint64(len(data)) {
		return nil, fmt.Errorf("%d bytes of %d: %w", len(data), size, ErrTruncated)
	}
	s := &Snapshot{
		data:     data,
		sequence: int64(le.Uint64(data[24:])), //nolint:gosec // written as int64
		newest:   int64(le.Uint64(data[32:])), //nolint:gosec // written as int64
		records:  int(le.Uint32(data[40:])),
		gone:     int(le.Uint32(data[44:])),
	}
	body := uint64(len(data) - trailerSize) //nolint:gosec // longer than header and trailer, see above
	for i := range sectionCount {
		off := le.Uint64(data[headerFixed+i*16:])
		n := le.Uint64(data[headerFixed+i*16+8:])
		if off < headerSize || off > body || n > body-off {
			return nil, fmt.Errorf("section %d lies outside the file: %w", i, ErrCorrupt)
		}
		s.sec[i] = data[off : off+n : off+n]
	}
	if len(s.sec[secStringOffsets]) < 4 {
		return nil, fmt.Errorf("no strings: %w", ErrCorrupt)
	}
	if !verify {
		return s, nil
	}
	h := sha256.New()
	_, _ = h.Write(data[:body])
	if !bytes.Equal(h.Sum(nil), data[body:]) {
		return nil, fmt.Errorf("its digest does not hold: %w", ErrCorrupt)
	}
	_, _ = h.Write(data[body:])
	s.digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	return s, nil
}

// Close unmaps the file. Nothing taken from the snapshot before is affected,
// but no method may be called after or during it.
func (s *Snapshot) Close() error {
	if !s.unmap {
		return nil
	}
	s.unmap = false
	data := s.data
	s.data, s.sec = nil, [sectionCount][]byte{}
	if err := unix.Munmap(data); err != nil {
		return fmt.Errorf("unmap advisory snapshot: %w", err)
	}
	return nil
}

// Digest returns the sha256 of the file, as OCI writes it.
func (s *Snapshot) Digest() string { return s.digest }

// Sequence returns the snapshot's place in time: a higher one replaces a lower one.
func (s *Snapshot) Sequence() int64 { return s.sequence }

// Newest returns the newest modification among the advisories: how old the
// knowledge is, whenever the file was made. Zero: unknown.
func (s *Snapshot) Newest() time.Time {
	if s.newest <= 0 {
		return time.Time{}
	}
	return time.Unix(s.newest, 0).UTC()
}

// SameContent says whether two snapshots differ in nothing but their sequence.
func (s *Snapshot) SameContent(other *Snapshot) bool {
	const at, behind = 24, 32 // where the sequence stands
	if len(s.data) != len(other.data) {
		return false
	}
	body := len(s.data) - trailerSize
	return bytes.Equal(s.data[:at], other.data[:at]) && bytes.Equal(s.data[behind:body], other.data[behind:body])
}

// Stamp writes the snapshot to w under another sequence.
func (s *Snapshot) Stamp(w io.Writer, sequence int64) error {
	header := bytes.Clone(s.data[:headerSize])
	binary.LittleEndian.PutUint64(header[24:], uint64(sequence)) //nolint:gosec // read back as int64
	h := sha256.New()
	for _, b := range [][]byte{header, s.data[headerSize : len(s.data)-trailerSize]} {
		_, _ = h.Write(b)
		if _, err := w.Write(b); err != nil {
			return fmt.Errorf("write advisory snapshot: %w", err)
		}
	}
	if _, err := w.Write(h.Sum(nil)); err != nil {
		return fmt.Errorf("write advisory snapshot: %w", err)
	}
	return nil
}

// Products returns the names of all products, sorted.
func (s *Snapshot) Products() []string {
	names := make([]string, len(s.sec[secProducts])/productSize)
	for i := range names {
		names[i] = s.str(s.u32(secProducts, i*3))
	}
	return names
}

// Stats says what a snapshot holds.
type Stats struct {
	Records    int            // advisories that can match
	Withdrawn  int            // advisories that were left out because they are withdrawn
	Ecosystems map[string]int // advisories by ecosystem, with its release
	Packages   int            // distinct names
	KEV        int
	EPSS       int
	Products   int
	Bytes      int64
}

// Stats counts what the snapshot holds.
func (s *Snapshot) Stats() Stats {
	st := Stats{
		Records: s.records, Withdrawn: s.gone, Ecosystems: map[string]int{},
		Packages: len(s.sec[secIndex]) / indexSize, KEV: len(s.sec[secKEV]) / 4, EPSS: len(s.sec[secEPSS]) / epssSize,
		Products: len(s.sec[secProducts]) / productSize, Bytes: int64(len(s.data)),
	}
	for i := range len(s.sec[secEcosystems]) / ecosystemSize {
		st.Ecosystems[s.str(s.u32(secEcosystems, i*2))] = int(s.u32(secEcosystems, i*2+1))
	}
	return st
}

// u32 returns the i-th number of a section, 0 where there is none.
func (s *Snapshot) u32(sec, i int) uint32 {
	b := s.sec[sec]
	if i < 0 || i >= len(b)/4 {
		return 0
	}
	return binary.LittleEndian.Uint32(b[i*4:])
}

// raw returns the bytes of a string; they live as long as the mapping.
func (s *Snapshot) raw(id uint32) []byte {
	if int(id) >= len(s.sec[secStringOffsets])/4-1 {
		return nil
	}
	from, to := s.u32(secStringOffsets, int(id)), s.u32(secStringOffsets, int(id)+1)
	b := s.sec[secStrings]
	if from > to || int(to) > len(b) {
		return nil
	}
	return b[from:to]
}

func (s *Snapshot) str(id uint32) string { return string(s.raw(id)) }

// StringID returns the rank of text in the string table; false: it occurs
// nowhere in the snapshot.
func (s *Snapshot) StringID(text string) (uint32, bool) {
	n := len(s.sec[secStringOffsets])/4 - 1
	i := sort.Search(n, func(i int) bool { return string(s.raw(uint32(i))) >= text }) //nolint:gosec // i < 2^32
	if i == n || string(s.raw(uint32(i))) != text {                                   //nolint:gosec // i < 2^32
		return 0, false
	}
	return uint32(i), true //nolint:gosec // i < 2^32
}

// HasEcosystem says whether any advisory is about the base ecosystem, and
// whether any is about this release of it (or about all releases).
func (s *Snapshot) HasEcosystem(base, release string) (anyRelease, thisRelease bool) {
	if _, _, ok := s.base(base); !ok {
		return false, false
	}
	if release == "" {
		return true, true
	}
	for i := range len(s.sec[secEcosystems]) / ecosystemSize {
		b, r := Split(s.str(s.u32(secEcosystems, i*2)))
		if b == base && (r == "" || r == release) {
			return true, true
		}
	}
	return true, false
}

func (s *Snapshot) base(base string) (first, n int, ok bool) {
	for i := range len(s.sec[secBases]) / baseSize {
		if string(s.raw(s.u32(secBases, i*3))) != base {
			continue
		}
		first, n = int(s.u32(secBases, i*3+1)), int(s.u32(secBases, i*3+2))
		if first+n > len(s.sec[secIndex])/indexSize {
			return 0, 0, false
		}
		return first, n, true
	}
	return 0, 0, false
}

// KEV says whether a CVE is in the catalog of known exploited vulnerabilities.
func (s *Snapshot) KEV(cve string) bool {
	id, ok := s.StringID(cve)
	if !ok {
		return false
	}
	n := len(s.sec[secKEV]) / 4
	i := sort.Search(n, func(i int) bool { return s.u32(secKEV, i) >= id })
	return i < n && s.u32(secKEV, i) == id
}

// EPSS returns the band of a CVE's exploit prediction score; false: no score
// is known, which is not a score of 0. Bands keep a small daily change of the
// score from changing reports.
func (s *Snapshot) EPSS(cve string) (band string, ok bool) {
	id, ok := s.StringID(cve)
	if !ok {
		return "", false
	}
	n := len(s.sec[secEPSS]) / epssSize
	i := sort.Search(n, func(i int) bool { return s.u32(secEPSS, i*2) >= id })
	if i == n || s.u32(secEPSS, i*2) != id {
		return "", false
	}
	return Band(float64(s.u32(secEPSS, i*2+1)) / 1e6), true
}

// Band returns the EPSS band of a score between 0 and 1.
func Band(score float64) string {
	switch {
	case score >= 0.9:
		return ">=0.9"
	case score >= 0.5:
		return ">=0.5"
	case score >= 0.1:
		return ">=0.1"
	case score >= 0.01:
		return ">=0.01"
	default:
		return "<0.01"
	}
}

// Cycle is one release line of a product (endoflife.date, API v0). Dates are
// YYYY-MM-DD; "" is unknown.
type Cycle struct {
	Name          string
	Released      string
	EOL           string // a date, "true" (ended), "false" (not ended) or ""
	Latest        string
	LatestRelease string // date of Latest
	LTS           string // a date, "true", "false" or ""
	Support       string // a date, "true", "false" or ""
	Codename      string
}

// Product returns the release lines of a product by its name at
// endoflife.date, in the order of the data (newest first); nil: not known.
func (s *Snapshot) Product(name string) []Cycle {
	n := len(s.sec[secProducts]) / productSize
	i := sort.Search(n, func(i int) bool { return string(s.raw(s.u32(secProducts, i*3))) >= name })
	if i == n || string(s.raw(s.u32(secProducts, i*3))) != name {
		return nil
	}
	first, count := int(s.u32(secProducts, i*3+1)), int(s.u32(secProducts, i*3+2))
	if first+count > len(s.sec[secCycles])/cycleSize {
		return nil
	}
	cycles := make([]Cycle, count)
	for j := range cycles {
		field := func(f int) string { return s.str(s.u32(secCycles, (first+j)*cycleFields+f)) }
		cycles[j] = Cycle{
			Name: field(0), Released: field(1), EOL: field(2), Latest: field(3),
			LatestRelease: field(4), LTS: field(5), Support: field(6), Codename: field(7),
		}
	}
	return cycles
}

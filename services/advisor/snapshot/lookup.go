package snapshot

import (
	"encoding/binary"
	"slices"
	"sort"
	"time"
)

// Entry is what the snapshot knows about one package name in one base ecosystem.
type Entry struct {
	s                        *Snapshot
	index                    int
	bound, bounds            int
	candidate, candidateSize int
}

// Lookup finds the advisories about a package; base and name as Split and
// NormalName return them. False: no advisory names it.
func (s *Snapshot) Lookup(base, name string) (Entry, bool) {
	first, n, ok := s.base(base)
	if !ok {
		return Entry{}, false
	}
	i := sort.Search(n, func(i int) bool { return string(s.raw(s.u32(secIndex, (first+i)*5))) >= name })
	if i == n || string(s.raw(s.u32(secIndex, (first+i)*5))) != name {
		return Entry{}, false
	}
	return s.entry(first + i), true
}

// Entries returns how many names the snapshot knows; Entry returns one of them.
func (s *Snapshot) Entries() int { return len(s.sec[secIndex]) / indexSize }

func (s *Snapshot) entry(i int) Entry {
	e := Entry{s: s, index: i}
	e.bound, e.bounds = int(s.u32(secIndex, i*5+1)), int(s.u32(secIndex, i*5+2))
	e.candidate, e.candidateSize = int(s.u32(secIndex, i*5+3)), int(s.u32(secIndex, i*5+4))
	if e.bound+e.bounds > len(s.sec[secBounds])/4 {
		e.bounds = 0
	}
	if e.candidate+e.candidateSize > len(s.sec[secCandidates])/candidateSize {
		e.candidateSize = 0
	}
	return e
}

// Each calls visit with every package name of the snapshot until it returns false.
func (s *Snapshot) Each(visit func(base, name string, e Entry) bool) {
	for b := range len(s.sec[secBases]) / baseSize {
		base := s.str(s.u32(secBases, b*3))
		first, n, ok := s.base(base)
		if !ok {
			continue
		}
		for i := first; i < first+n; i++ {
			if !visit(base, s.str(s.u32(secIndex, i*5)), s.entry(i)) {
				return
			}
		}
	}
}

// Index returns the entry's number, below Snapshot.Entries: a key for caches.
func (e Entry) Index() int { return e.index }

// Bounds returns how many distinct versions the ranges of this name mention.
func (e Entry) Bounds() int { return e.bounds }

// Bound returns the i-th of them, in the ecosystem's version order.
func (e Entry) Bound(i int) string { return e.s.str(e.s.u32(secBounds, e.bound+i)) }

// Candidates returns how many advisory entries name this package.
func (e Entry) Candidates() int { return e.candidateSize }

// Candidate returns the i-th of them.
func (e Entry) Candidate(i int) Candidate {
	at := (e.candidate + i) * 5
	return Candidate{
		entry: e, record: e.s.u32(secCandidates, at), release: e.s.u32(secCandidates, at+1), ranges: e.s.u32(secCandidates, at+2),
		version: int(e.s.u32(secCandidates, at+3)), versions: int(e.s.u32(secCandidates, at+4)),
	}
}

// Candidate is one advisory's statement about one package. Nothing of it is
// decoded before it is asked for.
type Candidate struct {
	entry             Entry
	record            uint32
	release           uint32
	ranges            uint32
	version, versions int
}

// Release returns the release of the distribution that the statement is
// about; "" is all of them.
func (c Candidate) Release() string { return c.entry.s.str(c.release) }

// About says whether the statement is about a release, given by its StringID
// (known false: the snapshot has no such string).
func (c Candidate) About(release uint32, known bool) bool {
	return known && c.release == release || len(c.entry.s.raw(c.release)) == 0
}

// RecordKey returns a number that is equal for two candidates of one record.
func (c Candidate) RecordKey() uint32 { return c.record }

// Kinds of range events (OSV schema, "affected[].ranges[].events").
const (
	Introduced   = 0
	Fixed        = 1
	LastAffected = 2
	Limit        = 3
)

// FromStart is the bound of the event `introduced: "0"`: before every version.
const FromStart = -1

// Event is one event of a range; Bound counts in the entry's bounds.
type Event struct {
	Kind  int
	Bound int
}

// Place is where a version stands among an entry's bounds: Lower of them are
// before it, those from Upper on are after it.
type Place struct{ Lower, Upper int }

func (p Place) atOrAfter(bound int) bool { return bound < p.Upper }
func (p Place) after(bound int) bool     { return bound < p.Lower }

// Hit says why a version is affected. Bounds are FromStart where there is none.
type Hit struct {
	Listed     bool // the advisory lists the version itself
	Introduced int  // FromStart: from the first version on
	Until      int  // the event that ends the range, FromStart: none
	UntilKind  int
	Fixed      int // the lowest fixed bound above the version in this statement, FromStart: none
}

// Evaluate decides whether the statement's ranges or list take in a version
// (OSV schema, "Evaluation"). place is where the version stands among the
// entry's bounds, nil where it has no order; version is its StringID.
func (c Candidate) Evaluate(place *Place, version uint32, known bool) (Hit, bool) {
	hit, ok := Hit{Introduced: FromStart, Until: FromStart, Fixed: FromStart}, false
	if place != nil {
		hit, ok = c.inRanges(*place)
	}
	if !ok && known && c.lists(version) {
		hit.Listed, ok = true, true
	}
	return hit, ok
}

func (c Candidate) inRanges(p Place) (Hit, bool) {
	hit, found := Hit{Introduced: FromStart, Until: FromStart, Fixed: FromStart}, false
	r := reader{b: c.entry.s.sec[secRanges], at: int(c.ranges)}
	for range r.count() {
		n := r.count()
		affected, limited, below := false, false, false
		current := Hit{Introduced: FromStart, Until: FromStart}
		ended := false
		for range n {
			e := r.event()
			switch e.Kind {
			case Introduced:
				if e.Bound == FromStart || p.atOrAfter(e.Bound) {
					affected, ended = true, false
					current = Hit{Introduced: e.Bound, Until: FromStart}
				}
			case Fixed:
				if p.atOrAfter(e.Bound) {
					affected = false
				} else if hit.Fixed == FromStart || e.Bound < hit.Fixed {
					hit.Fixed = e.Bound
				}
			case LastAffected:
				if p.after(e.Bound) {
					affected = false
				}
			case Limit:
				limited = true
				below = below || !p.atOrAfter(e.Bound)
			}
			if affected && !ended && (e.Kind == Fixed || e.Kind == LastAffected) {
				current.Until, current.UntilKind, ended = e.Bound, e.Kind, true
			}
		}
		if r.bad {
			return hit, false
		}
		if affected && (!limited || below) && !found {
			found = true
			hit.Introduced, hit.Until, hit.UntilKind = current.Introduced, current.Until, current.UntilKind
		}
	}
	return hit, found
}

func (c Candidate) lists(version uint32) bool {
	s := c.entry.s
	if c.version+c.versions > len(s.sec[secVersions])/4 {
		return false
	}
	i := sort.Search(c.versions, func(i int) bool { return s.u32(secVersions, c.version+i) >= version })
	return i < c.versions && s.u32(secVersions, c.version+i) == version
}

// Ranges decodes all ranges of the statement.
func (c Candidate) Ranges() [][]Event {
	r := reader{b: c.entry.s.sec[secRanges], at: int(c.ranges)}
	var ranges [][]Event
	for range r.count() {
		var events []Event
		for range r.count() {
			events = append(events, r.event())
		}
		if r.bad {
			return nil
		}
		ranges = append(ranges, events)
	}
	return ranges
}

// Versions decodes the list of versions of the statement.
func (c Candidate) Versions() []string {
	s := c.entry.s
	if c.version+c.versions > len(s.sec[secVersions])/4 {
		return nil
	}
	versions := make([]string, c.versions)
	for i := range versions {
		versions[i] = s.str(s.u32(secVersions, c.version+i))
	}
	return versions
}

// Record is what an advisory says, as far as matching and reports need it.
type Record struct {
	ID       string
	Aliases  []string
	Upstream []string // vulnerabilities that a distribution's advisory answers
	Summary  string
	Module   string // "name:stream" of a modular rpm advisory, several separated by spaces
	Modified time.Time
	Severity string  // a contracts severity
	Score    float64 // CVSS base score; 0 with HasScore false: unknown
	HasScore bool
	Vector   string // the CVSS vector that gave Score; "" where the database gave the score alone
	Malware  bool
	// Informational: a distribution's bug fix or enhancement that answers no vulnerability.
	Informational bool
}

const (
	flagMalware = 1 << iota
	flagInformational
	flagScore
)

// Record decodes the advisory of the statement.
func (c Candidate) Record() Record {
	s := c.entry.s
	r := reader{b: s.sec[secRecords], at: int(c.record)}
	flags, severity, score := r.uvarint(), r.uvarint(), r.uvarint()
	rec := Record{
		Malware: flags&flagMalware != 0, Informational: flags&flagInformational != 0, HasScore: flags&flagScore != 0,
		Score: float64(min(score, 100)) / 10, Severity: severityName(severity),
	}
	rec.ID, rec.Summary, rec.Module, rec.Vector = r.str(s), r.str(s), r.str(s), r.str(s)
	if modified := r.signed(); modified > 0 {
		rec.Modified = time.Unix(modified, 0).UTC()
	}
	rec.Aliases = r.strs(s)
	rec.Upstream = r.strs(s)
	return rec
}

// Informational says whether the advisory answers no vulnerability, without decoding the rest.
func (c Candidate) Informational() bool {
	r := reader{b: c.entry.s.sec[secRecords], at: int(c.record)}
	return r.uvarint()&flagInformational != 0
}

func severityName(n uint64) string {
	names := severities()
	if n >= uint64(len(names)) {
		return names[0]
	}
	return names[n]
}

func severityNumber(name string) int { return max(0, slices.Index(severities(), name)) }

func severities() []string { return []string{"unknown", "low", "medium", "high", "critical"} }

// reader reads varints; at the first malformed one it turns bad and returns zeros.
type reader struct {
	b   []byte
	at  int
	bad bool
}

func (r *reader) uvarint() uint64 {
	if r.bad || r.at < 0 || r.at > len(r.b) {
		r.bad = true
		return 0
	}
	v, n := binary.Uvarint(r.b[r.at:])
	if n <= 0 {
		r.bad = true
		return 0
	}
	r.at += n
	return v
}

// count reads a number of things that follow; each takes at least a byte.
func (r *reader) count() int {
	v := r.uvarint()
	if v > uint64(len(r.b)) {
		r.bad = true
		return 0
	}
	return int(v) //nolint:gosec // at most len(r.b)
}

func (r *reader) signed() int64 {
	v := r.uvarint()
	return int64(v>>1) ^ -int64(v&1)
}

func (r *reader) str(s *Snapshot) string {
	v := r.uvarint()
	if v > 1<<32-1 {
		r.bad = true
		return ""
	}
	return s.str(uint32(v))
}

func (r *reader) strs(s *Snapshot) []string {
	var list []string
	for range r.count() {
		text := r.str(s)
		if r.bad {
			return nil
		}
		list = append(list, text)
	}
	return list
}

func (r *reader) event() Event {
	v := r.uvarint()
	return Event{Kind: int(v & 3), Bound: int(v>>2&(1<<31-1)) - 1}
}

package snapshot

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"

	"github.com/google/osv-scalibr/semantic"
)

// Content is what a snapshot is made of.
type Content struct {
	Sequence   int64
	Newest     int64 // Unix seconds
	Withdrawn  int   // advisories left out
	Advisories []Advisory
	KEV        []string
	EPSS       map[string]float64 // score by CVE
	Products   map[string][]Cycle
}

// Advisory is one advisory that can match.
type Advisory struct {
	ID            string
	Aliases       []string
	Upstream      []string
	Summary       string
	Module        string
	Modified      int64 // Unix seconds
	Malware       bool
	Informational bool
	Affected      []Affected
}

// Affected is what an advisory says about one package.
type Affected struct {
	Ecosystem string // with its release
	Name      string
	Severity  string
	Score     float64
	HasScore  bool
	Vector    string
	Ranges    [][]RangeEvent
	Versions  []string
}

// RangeEvent is one event of a range; Version "0" with Introduced is before every version.
type RangeEvent struct {
	Kind    int
	Version string
}

// Encode writes the snapshot's file: the same content gives the same bytes.
// reject is told of every range that was left out and why.
func Encode(w io.Writer, c *Content, reject func(id, reason string)) error {
	e := encoder{content: c, reject: reject, recordAt: map[string]uint32{}}
	slices.SortFunc(c.Advisories, func(a, b Advisory) int { return cmp.Compare(a.ID, b.ID) })
	e.collect()
	e.writeIndex()
	e.writeTables()
	if e.err != nil {
		return fmt.Errorf("encode advisory snapshot: %w", e.err)
	}
	return e.flush(w)
}

// group is everything that is said about one package name.
type group struct {
	base, name string
	candidates []candidate
}

type candidate struct {
	advisory *Advisory
	affected *Affected
	release  string
}

type encoder struct {
	content  *Content
	reject   func(id, reason string)
	groups   []*group
	strings  []string // sorted
	rank     map[string]uint32
	sec      [sectionCount][]byte
	recordAt map[string]uint32 // by the record's bytes
	err      error
}

// collect sorts packages by name and all strings into one table.
func (e *encoder) collect() {
	byName := map[[2]string]*group{}
	seen := map[string]struct{}{"": {}}
	add := func(texts ...string) {
		for _, t := range texts {
			seen[t] = struct{}{}
		}
	}
	for i := range e.content.Advisories {
		a := &e.content.Advisories[i]
		add(a.ID, a.Summary, a.Module)
		add(a.Aliases...)
		add(a.Upstream...)
		for j := range a.Affected {
			f := &a.Affected[j]
			base, release := Split(f.Ecosystem)
			key := [2]string{base, NormalName(base, f.Name)}
			g := byName[key]
			if g == nil {
				g = &group{base: key[0], name: key[1]}
				byName[key] = g
				e.groups = append(e.groups, g)
			}
			g.candidates = append(g.candidates, candidate{a, f, release})
			add(base, key[1], release, f.Ecosystem, f.Vector)
			add(f.Versions...)
			for _, r := range f.Ranges {
				for _, ev := range r {
					add(ev.Version)
				}
			}
		}
	}
	add(e.content.KEV...)
	for cve := range e.content.EPSS {
		add(cve)
	}
	for name, cycles := range e.content.Products {
		add(name)
		for _, c := range cycles {
			add(c.fields()...)
		}
	}
	e.strings = make([]string, 0, len(seen))
	for t := range seen {
		e.strings = append(e.strings, t)
	}
	slices.Sort(e.strings)
	e.rank = make(map[string]uint32, len(e.strings))
	for i, t := range e.strings {
		e.rank[t] = uint32(i)
	}
	slices.SortFunc(e.groups, func(a, b *group) int {
		return cmp.Or(cmp.Compare(a.base, b.base), cmp.Compare(a.name, b.name))
	})
}

func (c Cycle) fields() []string {
	return []string{c.Name, c.Released, c.EOL, c.Latest, c.LatestRelease, c.LTS, c.Support, c.Codename}
}

func (e *encoder) u32(sec int, values ...uint32) {
	for _, v := range values {
		e.sec[sec] = binary.LittleEndian.AppendUint32(e.sec[sec], v)
	}
}

func (e *encoder) size(n int) uint32 {
	if n < 0 || n > math.MaxUint32 {
		e.err = errors.New("more content than the format holds")
		return 0
	}
	return uint32(n)
}

func (e *encoder) writeIndex() {
	ecosystems := map[string]map[string]struct{}{}
	for i, g := range e.groups {
		if i == 0 || e.groups[i-1].base != g.base {
			n := sort.Search(len(e.groups)-i, func(j int) bool { return e.groups[i+j].base != g.base })
			e.u32(secBases, e.rank[g.base], e.size(i), e.size(n))
		}
		bounds, place := e.bounds(g)
		firstBound, firstCandidate := len(e.sec[secBounds])/4, len(e.sec[secCandidates])/candidateSize
		for _, b := range bounds {
			e.u32(secBounds, e.rank[b])
		}
		for _, c := range g.candidates {
			if ecosystems[c.affected.Ecosystem] == nil {
				ecosystems[c.affected.Ecosystem] = map[string]struct{}{}
			}
			ecosystems[c.affected.Ecosystem][c.advisory.ID] = struct{}{}
			e.candidate(c, place)
		}
		e.u32(secIndex, e.rank[g.name], e.size(firstBound), e.size(len(bounds)),
			e.size(firstCandidate), e.size(len(e.sec[secCandidates])/candidateSize-firstCandidate))
	}
	names := make([]string, 0, len(ecosystems))
	for name := range ecosystems {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		e.u32(secEcosystems, e.rank[name], e.size(len(ecosystems[name])))
	}
}

// bounds returns the versions that a name's ranges mention, in version order,
// and the place of each. Those that cannot be read have no place.
func (e *encoder) bounds(g *group) ([]string, map[string]int) {
	type bound struct {
		text   string
		parsed semantic.Version
	}
	var list []bound
	seen := map[string]bool{}
	for _, c := range g.candidates {
		for _, r := range c.affected.Ranges {
			for _, ev := range r {
				if seen[ev.Version] || ev.Kind == Introduced && ev.Version == "0" {
					continue
				}
				seen[ev.Version] = true
				v, err := ParseVersion(g.base, ev.Version)
				switch {
				case errors.Is(err, ErrNoOrder):
					e.reject(c.advisory.ID, err.Error()+": its ranges are left out")
					return nil, map[string]int{}
				case err != nil:
					e.reject(c.advisory.ID, err.Error()+": the range is left out")
				default:
					list = append(list, bound{ev.Version, v})
				}
			}
		}
	}
	slices.SortFunc(list, func(a, b bound) int { return cmp.Compare(a.text, b.text) })
	slices.SortStableFunc(list, func(a, b bound) int {
		order, _ := a.parsed.Compare(b.parsed) // both are of one ecosystem
		return order
	})
	texts, place := make([]string, len(list)), make(map[string]int, len(list))
	for i, b := range list {
		texts[i], place[b.text] = b.text, i
	}
	return texts, place
}

func (e *encoder) candidate(c candidate, place map[string]int) {
	rangesAt := len(e.sec[secRanges])
	var ranges [][]Event
	for _, r := range c.affected.Ranges {
		if events, ok := placed(r, place); ok {
			ranges = append(ranges, events)
		}
	}
	b := binary.AppendUvarint(e.sec[secRanges], uint64(len(ranges)))
	for _, events := range ranges {
		b = binary.AppendUvarint(b, uint64(len(events)))
		for _, ev := range events {
			b = binary.AppendUvarint(b, uint64(ev.Bound+1)<<2|uint64(ev.Kind)) //nolint:gosec // neither is negative
		}
	}
	e.sec[secRanges] = b
	versions := make([]uint32, len(c.affected.Versions))
	for i, v := range c.affected.Versions {
		versions[i] = e.rank[v]
	}
	slices.Sort(versions)
	versions = slices.Compact(versions)
	firstVersion := len(e.sec[secVersions]) / 4
	e.u32(secVersions, versions...)
	e.u32(secCandidates, e.record(c), e.rank[c.release], e.size(rangesAt), e.size(firstVersion), e.size(len(versions)))
}

// placed sorts the events of a range; false where one has no place.
func placed(events []RangeEvent, place map[string]int) ([]Event, bool) {
	list := make([]Event, 0, len(events))
	for _, ev := range events {
		if ev.Kind == Introduced && ev.Version == "0" {
			list = append(list, Event{Kind: Introduced, Bound: FromStart})
			continue
		}
		i, ok := place[ev.Version]
		if !ok {
			return nil, false
		}
		list = append(list, Event{Kind: ev.Kind, Bound: i})
	}
	slices.SortStableFunc(list, func(a, b Event) int { return cmp.Compare(a.Bound, b.Bound) })
	return list, true
}

func (e *encoder) record(c candidate) uint32 {
	a, f := c.advisory, c.affected
	var flags uint64
	if a.Malware {
		flags |= flagMalware
	}
	if a.Informational {
		flags |= flagInformational
	}
	if f.HasScore {
		flags |= flagScore
	}
	b := binary.AppendUvarint(nil, flags)
	b = binary.AppendUvarint(b, uint64(severityNumber(f.Severity)))              //nolint:gosec // not negative
	b = binary.AppendUvarint(b, uint64(math.Round(10*max(0, min(10, f.Score))))) // one decimal, as CVSS has
	b = e.appendStrings(b, a.ID, a.Summary, a.Module, f.Vector)
	b = binary.AppendUvarint(b, uint64(a.Modified)<<1^uint64(a.Modified>>63)) //nolint:gosec // zigzag
	b = e.appendStrings(binary.AppendUvarint(b, uint64(len(a.Aliases))), a.Aliases...)
	b = e.appendStrings(binary.AppendUvarint(b, uint64(len(a.Upstream))), a.Upstream...)
	if at, ok := e.recordAt[string(b)]; ok {
		return at
	}
	at := e.size(len(e.sec[secRecords]))
	e.sec[secRecords] = append(e.sec[secRecords], b...)
	e.recordAt[string(b)] = at
	return at
}

func (e *encoder) appendStrings(b []byte, texts ...string) []byte {
	for _, t := range texts {
		b = binary.AppendUvarint(b, uint64(e.rank[t]))
	}
	return b
}

func (e *encoder) writeTables() {
	kev := slices.Clone(e.content.KEV)
	slices.Sort(kev)
	for _, cve := range slices.Compact(kev) {
		e.u32(secKEV, e.rank[cve])
	}
	for _, cve := range sortedKeys(e.content.EPSS) {
		score := max(0, min(1, e.content.EPSS[cve]))
		e.u32(secEPSS, e.rank[cve], uint32(math.Round(score*1e6)))
	}
	for _, name := range sortedKeys(e.content.Products) {
		cycles := e.content.Products[name]
		e.u32(secProducts, e.rank[name], e.size(len(e.sec[secCycles])/cycleSize), e.size(len(cycles)))
		for _, c := range cycles {
			for _, text := range c.fields() {
				e.u32(secCycles, e.rank[text])
			}
		}
	}
	at := 0
	for _, t := range e.strings {
		e.u32(secStringOffsets, e.size(at))
		e.sec[secStrings] = append(e.sec[secStrings], t...)
		at += len(t)
	}
	e.u32(secStringOffsets, e.size(at))
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (e *encoder) flush(w io.Writer) error {
	le := binary.LittleEndian
	header := make([]byte, headerSize)
	copy(header, magic)
	le.PutUint32(header[8:], formatVersion)
	le.PutUint32(header[12:], sectionCount)
	le.PutUint64(header[24:], uint64(e.content.Sequence)) //nolint:gosec // read back as int64
	le.PutUint64(header[32:], uint64(e.content.Newest))   //nolint:gosec // read back as int64
	le.PutUint32(header[40:], e.size(len(e.content.Advisories)))
	le.PutUint32(header[44:], e.size(e.content.Withdrawn))
	at := headerSize
	for i, b := range e.sec {
		le.PutUint64(header[headerFixed+i*16:], uint64(at))
		le.PutUint64(header[headerFixed+i*16+8:], uint64(len(b)))
		at += len(b)
	}
	le.PutUint64(header[16:], uint64(at+trailerSize))

	h := sha256.New()
	out := bufio.NewWriter(w)
	both := io.MultiWriter(out, h)
	for _, b := range append([][]byte{header}, e.sec[:]...) {
		if _, err := both.Write(b); err != nil {
			return fmt.Errorf("write advisory snapshot: %w", err)
		}
	}
	if _, err := out.Write(h.Sum(nil)); err != nil {
		return fmt.Errorf("write advisory snapshot: %w", err)
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write advisory snapshot: %w", err)
	}
	return nil
}

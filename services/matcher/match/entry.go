package match

import (
	"slices"
	"strings"
	"sync/atomic"

	"github.com/google/osv-scalibr/semantic"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// entryFacts is what is worked out once a snapshot about one package name:
// everything that does not depend on the version that is matched.
type entryFacts struct {
	bounds []atomic.Pointer[semantic.Version] // each parsed when first needed
	advice []*advice                          // by candidate; one record's candidates share theirs
}

// advice is one advisory, ready to become findings.
type advice struct {
	id            string
	modules       string // of a modular advisory, separated by spaces
	informational bool
	parts         []part
}

// part is one vulnerability that an advisory is about.
type part struct {
	group   int // parts of an entry with the same group are one vulnerability
	finding contracts.Finding
}

// facts returns what is known about an entry, worked out at first use.
func (m *Matcher) facts(entry snapshot.Entry) *entryFacts {
	slot := &m.entries[entry.Index()]
	if f := slot.Load(); f != nil {
		return f
	}
	f := &entryFacts{
		bounds: make([]atomic.Pointer[semantic.Version], entry.Bounds()),
		advice: make([]*advice, entry.Candidates()),
	}
	byRecord := map[uint32]*advice{}
	var all []*advice
	for i := range f.advice {
		c := entry.Candidate(i)
		a := byRecord[c.RecordKey()]
		if a == nil {
			a = m.advise(c.Record())
			byRecord[c.RecordKey()] = a
			all = append(all, a)
		}
		f.advice[i] = a
	}
	group(all)
	slot.Store(f) // two goroutines may both come here: work is lost, nothing else
	return f
}

// bound returns the i-th bound of an entry ready for comparison.
func (f *entryFacts) bound(base string, entry snapshot.Entry, i int) (semantic.Version, error) {
	if v := f.bounds[i].Load(); v != nil {
		return *v, nil
	}
	v, err := snapshot.ParseVersion(base, entry.Bound(i))
	if err != nil {
		return nil, err
	}
	f.bounds[i].Store(&v)
	return v, nil
}

// advise turns a record into findings without package, fixed versions and
// reason. A distribution's advisory that answers several vulnerabilities (OSV's
// upstream) gives one for each.
func (m *Matcher) advise(r snapshot.Record) *advice {
	a := &advice{id: r.ID, modules: r.Module, informational: r.Informational}
	if len(r.Upstream) <= 1 {
		names := append(append([]string{r.ID}, r.Aliases...), r.Upstream...)
		a.parts = []part{{finding: m.finding(r, names)}}
		return a
	}
	for _, vulnerability := range r.Upstream {
		a.parts = append(a.parts, part{finding: m.finding(r, []string{vulnerability, r.ID})})
	}
	return a
}

func (m *Matcher) finding(r snapshot.Record, names []string) contracts.Finding {
	slices.SortFunc(names, compareNames)
	names = slices.Compact(names)
	f := contracts.Finding{
		ID: names[0], Aliases: names[1:len(names):len(names)], Summary: r.Summary, Severity: r.Severity, Vector: r.Vector,
		Malware: r.Malware, Status: contracts.StatusAffected,
	}
	if r.HasScore {
		f.Score = &r.Score
	}
	if r.Malware {
		f.Severity = contracts.SeverityCritical
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "CVE-") {
			continue
		}
		f.KEV = f.KEV || m.snap.KEV(name)
		if band, ok := m.snap.EPSS(name); ok && bandRank(band) > bandRank(f.EPSS) {
			f.EPSS = band
		}
	}
	return f
}

// group finds the parts that are one vulnerability: advisories that name each
// other, or the same vulnerability, as an alias. An advisory that answers
// several vulnerabilities joins none of them.
func group(all []*advice) {
	same := snapshot.Aliases{}
	for _, a := range all {
		if len(a.parts) != 1 {
			continue
		}
		f := &a.parts[0].finding
		for _, alias := range f.Aliases {
			same.Join(f.ID, alias)
		}
	}
	numbers := map[string]int{}
	for _, a := range all {
		for i := range a.parts {
			root := same.Find(a.parts[i].finding.ID)
			n, ok := numbers[root]
			if !ok {
				n = len(numbers)
				numbers[root] = n
			}
			a.parts[i].group = n
		}
	}
}

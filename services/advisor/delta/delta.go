// Package delta says whose match results can differ between two advisory
// snapshots.
package delta

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// Compare returns what differs from old to next, as far as a report can depend
// on it: what an advisory says, how the vulnerabilities that it names are
// exploited, whether an ecosystem has advisories at all, and release lines,
// including those that end between the newest advisories of the two snapshots.
// An advisory's modification date alone is no difference.
func Compare(ctx context.Context, old, next *snapshot.Snapshot) (contracts.AdvisoriesDelta, error) {
	d := contracts.AdvisoriesDelta{
		Previous: contracts.SnapshotRef{Digest: old.Digest(), Sequence: old.Sequence()},
		Snapshot: contracts.SnapshotRef{Digest: next.Digest(), Sequence: next.Sequence()},
		Packages: []contracts.DeltaPackage{}, Ecosystems: ecosystems(old, next), Products: products(old, next),
	}
	seed := maphash.MakeSeed()
	before, after := &side{snap: old, seed: seed}, &side{snap: next, seed: seed}
	add := func(base, name string, releases []string) {
		if len(releases) > 0 {
			d.Packages = append(d.Packages, contracts.DeltaPackage{Ecosystem: base, Name: name, Releases: releases})
		}
	}
	var failed error
	next.Each(func(base, name string, e snapshot.Entry) bool {
		if failed = ctx.Err(); failed != nil {
			return false
		}
		now := after.digests(e)
		var was map[string]uint64
		if o, ok := old.Lookup(base, name); ok {
			was = before.digests(o)
		}
		add(base, name, releases(was, now))
		return true
	})
	old.Each(func(base, name string, e snapshot.Entry) bool {
		if failed != nil || ctx.Err() != nil {
			failed = ctx.Err()
			return false
		}
		if _, ok := next.Lookup(base, name); !ok {
			add(base, name, releases(before.digests(e), nil))
		}
		return true
	})
	if failed != nil {
		return d, fmt.Errorf("compare advisory snapshots: %w", failed)
	}
	slices.SortFunc(d.Packages, func(a, b contracts.DeltaPackage) int {
		return cmp.Or(cmp.Compare(a.Ecosystem, b.Ecosystem), cmp.Compare(a.Name, b.Name))
	})
	return d, nil
}

// releases returns the releases whose digests differ; "" stands for all.
func releases(was, now map[string]uint64) []string {
	differ := func(release string) bool {
		a, inA := was[release]
		b, inB := now[release]
		return inA != inB || a != b
	}
	if differ("") {
		return []string{""}
	}
	var list []string
	for release := range now {
		if differ(release) {
			list = append(list, release)
		}
	}
	for release := range was {
		if _, ok := now[release]; !ok {
			list = append(list, release)
		}
	}
	slices.Sort(list)
	return list
}

// side is one of the two snapshots.
type side struct {
	snap *snapshot.Snapshot
	seed maphash.Seed
}

// digests returns a number for each release that the statements about a name
// are about: the same number means the same results. What is about all releases
// is part of each, and of "" alone.
func (s *side) digests(e snapshot.Entry) map[string]uint64 {
	n := e.Candidates()
	records, releaseOf := make([]snapshot.Record, n), make([]string, n)
	sums := map[string]*maphash.Hash{}
	for i := range n {
		c := e.Candidate(i)
		records[i], releaseOf[i] = c.Record(), c.Release()
		if sums[releaseOf[i]] == nil {
			h := new(maphash.Hash)
			h.SetSeed(s.seed)
			sums[releaseOf[i]] = h
		}
	}
	same := groups(records)
	for release, h := range sums {
		labels := map[string]int{}
		for i := range n {
			if releaseOf[i] == "" || releaseOf[i] == release {
				s.statement(h, e, e.Candidate(i), &records[i])
				for _, name := range heads(&records[i]) {
					root := same.Find(name)
					if _, ok := labels[root]; !ok {
						labels[root] = len(labels)
					}
					number(h, labels[root])
				}
			}
		}
	}
	out := make(map[string]uint64, len(sums))
	for release, h := range sums {
		out[release] = h.Sum64()
	}
	return out
}

// statement adds everything that one statement contributes to a report.
func (s *side) statement(h *maphash.Hash, e snapshot.Entry, c snapshot.Candidate, r *snapshot.Record) {
	for _, flag := range []bool{r.HasScore, r.Malware, r.Informational} {
		n := 0
		if flag {
			n = 1
		}
		number(h, n)
	}
	number(h, int(math.Round(r.Score*10)))
	text(h, r.ID, r.Summary, r.Module, r.Severity, r.Vector, c.Release())
	for _, names := range [][]string{{r.ID}, r.Aliases, r.Upstream} {
		number(h, len(names))
		for _, name := range names {
			text(h, name)
			if strings.HasPrefix(name, "CVE-") {
				s.exploitation(h, name)
			}
		}
	}
	ranges := c.Ranges()
	number(h, len(ranges))
	for _, events := range ranges {
		number(h, len(events))
		for _, ev := range events {
			number(h, ev.Kind)
			if ev.Bound == snapshot.FromStart {
				text(h, "\x00")
			} else {
				text(h, e.Bound(ev.Bound))
			}
		}
	}
	versions := c.Versions()
	number(h, len(versions))
	text(h, versions...)
}

func (s *side) exploitation(h *maphash.Hash, cve string) {
	kev := 0
	if s.snap.KEV(cve) {
		kev = 1
	}
	number(h, kev)
	band, _ := s.snap.EPSS(cve)
	text(h, band)
}

func number(h *maphash.Hash, n int) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(n)) //nolint:gosec // only compared
	_, _ = h.Write(b[:])                           // documented never to fail
}

func text(h *maphash.Hash, texts ...string) {
	for _, t := range texts {
		number(h, len(t))
		_, _ = h.WriteString(t) // documented never to fail
	}
}

// heads returns a name of each vulnerability that a record is about.
func heads(r *snapshot.Record) []string {
	if len(r.Upstream) > 1 {
		return r.Upstream
	}
	return []string{r.ID}
}

// groups finds the names of one vulnerability, as matching does: an advisory
// about several joins none of them.
func groups(records []snapshot.Record) snapshot.Aliases {
	u := snapshot.Aliases{}
	for i := range records {
		r := &records[i]
		if len(r.Upstream) > 1 {
			continue
		}
		for _, name := range r.Aliases {
			u.Join(r.ID, name)
		}
		for _, name := range r.Upstream {
			u.Join(r.ID, name)
		}
	}
	return u
}

// ecosystems returns those, with release, that only one of the snapshots has
// advisories about.
func ecosystems(old, next *snapshot.Snapshot) []string {
	covered := func(s *snapshot.Snapshot) map[string]bool {
		m := map[string]bool{}
		for ecosystem := range s.Stats().Ecosystems {
			base, release := snapshot.Split(ecosystem)
			if release != "" {
				base += ":" + release
			}
			m[base] = true
		}
		return m
	}
	was, now := covered(old), covered(next)
	list := []string{}
	for e := range now {
		if !was[e] {
			list = append(list, e)
		}
	}
	for e := range was {
		if !now[e] {
			list = append(list, e)
		}
	}
	slices.Sort(list)
	return list
}

// products returns those whose release lines differ, and those of which a line
// ended between the two days that lag is reckoned from.
func products(old, next *snapshot.Snapshot) []string {
	from, to := old.Newest().Format(time.DateOnly), next.Newest().Format(time.DateOnly)
	from, to = min(from, to), max(from, to)
	names := map[string]bool{}
	for _, s := range []*snapshot.Snapshot{old, next} {
		for _, name := range s.Products() {
			names[name] = true
		}
	}
	maps.DeleteFunc(names, func(name string, _ bool) bool {
		was, now := old.Product(name), next.Product(name)
		ended := slices.ContainsFunc(now, func(c snapshot.Cycle) bool {
			return len(c.EOL) == len(time.DateOnly) && c.EOL > from && c.EOL <= to
		})
		return slices.Equal(was, now) && !ended
	})
	list := slices.AppendSeq([]string{}, maps.Keys(names))
	slices.Sort(list)
	return list
}

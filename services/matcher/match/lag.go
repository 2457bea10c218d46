package match

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// lags says how far an inventory's server software and operating system run
// behind, as far as the snapshot has their release lines.
func (m *Matcher) lags(inv *contracts.Inventory) []contracts.Lag {
	var lags []contracts.Lag
	for i := range inv.Packages {
		p := &inv.Packages[i]
		if !p.Server {
			continue
		}
		if l, ok := m.lag(cmp.Or(p.Product, p.Name), p.Version); ok {
			l.Layer = p.Layer
			lags = append(lags, l)
		}
	}
	if inv.OS != nil && inv.OS.VersionID != "" {
		if l, ok := m.lag(osProduct(inv.OS.ID), inv.OS.VersionID); ok {
			lags = append(lags, l)
		}
	}
	slices.SortStableFunc(lags, func(a, b contracts.Lag) int {
		return cmp.Or(cmp.Compare(a.Product, b.Product), cmp.Compare(a.Version, b.Version))
	})
	return slices.CompactFunc(lags, func(a, b contracts.Lag) bool { return a.Product == b.Product && a.Version == b.Version })
}

// lag compares a version with its product's release lines. Everything is
// reckoned against the newest advisory of the snapshot, never against a clock.
//
// A version is outdated when its own line has a newer one or has ended. One
// that is older than every line we know of has ended if the oldest has.
func (m *Matcher) lag(product, version string) (contracts.Lag, bool) {
	var cycles []snapshot.Cycle
	for _, name := range productNames(product) {
		if cycles = m.snap.Product(name); cycles != nil {
			break
		}
	}
	if len(cycles) == 0 || version == "" {
		return contracts.Lag{}, false
	}
	today := m.snap.Newest().Format(time.DateOnly)
	newest := newestCycle(cycles)
	l := contracts.Lag{Product: product, Version: version, Latest: newest.Latest}
	own, ok := ownCycle(cycles, version)
	if !ok {
		oldest := slices.MinFunc(cycles, func(a, b snapshot.Cycle) int { return compareDotted(a.Name, b.Name) })
		if ended, _ := endOf(oldest, today); ended && compareDotted(version, oldest.Name) < 0 {
			l.EOL, l.Outdated, l.EndOfLife = true, true, "ended"
		} else {
			l.Outdated = behind(version, newest.Latest)
		}
		l.LinesBehind = newerLines(cycles, version)
		return l, true
	}
	l.Cycle, l.LatestInCycle = own.Name, own.Latest
	l.EOL, l.EndOfLife = endOf(own, today)
	l.Outdated = l.EOL || behind(version, own.Latest)
	l.BehindDays = days(own.LatestRelease, newest.LatestRelease)
	l.LinesBehind = newerLines(cycles, own.Name)
	return l, true
}

// newerLines returns how many release lines come after a version or line.
func newerLines(cycles []snapshot.Cycle, than string) *int {
	n := 0
	for _, c := range cycles {
		if name := strings.TrimPrefix(c.Name, "v"); compareDotted(name, strings.TrimPrefix(than, "v")) > 0 && !within(name, than) {
			n++
		}
	}
	return &n
}

// newestCycle returns the line with the highest latest version.
func newestCycle(cycles []snapshot.Cycle) snapshot.Cycle {
	newest := cycles[0]
	for _, c := range cycles[1:] {
		if c.Latest != "" && compareDotted(c.Latest, newest.Latest) > 0 {
			newest = c
		}
	}
	return newest
}

// ownCycle returns the line a version belongs to: the longest name that the
// version begins with, component by component.
func ownCycle(cycles []snapshot.Cycle, version string) (snapshot.Cycle, bool) {
	best, found := snapshot.Cycle{}, false
	for _, c := range cycles {
		name := strings.TrimPrefix(c.Name, "v")
		if within(version, name) && (!found || len(name) > len(best.Name)) {
			best, found = c, true
		}
	}
	return best, found
}

func within(version, line string) bool {
	if !strings.HasPrefix(version, line) {
		return false
	}
	if len(version) == len(line) {
		return true
	}
	next := version[len(line)]
	return next < '0' || next > '9'
}

// endOf says whether a line has ended by a day, and when: a date or "ended".
func endOf(c snapshot.Cycle, today string) (ended bool, date string) {
	switch {
	case c.EOL == "true":
		return true, "ended"
	case len(c.EOL) == len(time.DateOnly):
		return c.EOL <= today, c.EOL
	default:
		return false, ""
	}
}

// behind says whether a version is older than another. A version that says
// less than the other ("12" of "12.5") is not known to be older.
func behind(version, latest string) bool {
	if latest == "" || within(latest, version) {
		return false
	}
	return compareDotted(version, latest) < 0
}

// days returns the days between two dates, at least 0; nil: unknown.
func days(from, to string) *int {
	a, errA := time.Parse(time.DateOnly, from)
	b, errB := time.Parse(time.DateOnly, to)
	if errA != nil || errB != nil {
		return nil
	}
	n := max(0, int(b.Sub(a).Hours()/24))
	return &n
}

// compareDotted orders versions by their components, numbers as numbers.
func compareDotted(a, b string) int {
	split := func(s string) []string {
		return strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(".-+_ ", r) })
	}
	as, bs := split(a), split(b)
	for i := range max(len(as), len(bs)) {
		if i >= len(as) {
			return -1
		}
		if i >= len(bs) {
			return 1
		}
		x, errX := strconv.ParseUint(as[i], 10, 64)
		y, errY := strconv.ParseUint(bs[i], 10, 64)
		order := cmp.Compare(x, y)
		if errX != nil || errY != nil {
			order = cmp.Compare(as[i], bs[i])
		}
		if order != 0 {
			return order
		}
	}
	return 0
}

// productNames returns the names under which endoflife.date may have a product.
func productNames(product string) []string {
	switch product {
	case "couchdb":
		return []string{"apache-couchdb", "couchdb"}
	case "node", "node.js":
		return []string{"nodejs"}
	case "openjdk", "java", "jdk", "jre":
		return []string{"openjdk-builds-from-oracle", "eclipse-temurin", "openjdk"}
	case "apache", "httpd":
		return []string{"apache-http-server", "apache"}
	case "alpine":
		return []string{"alpine-linux", "alpine"}
	case "postgres":
		return []string{"postgresql"}
	default:
		return []string{product}
	}
}

// osProduct returns endoflife.date's name for an ID of os-release.
func osProduct(id string) string {
	switch id {
	case "alpine":
		return "alpine-linux"
	case "rocky":
		return "rocky-linux"
	case "amzn":
		return "amazon-linux"
	case "ol":
		return "oracle-linux"
	case "opensuse-leap":
		return "opensuse"
	default:
		return id
	}
}

// Package scope decides what of a registry a source may speak of, and what of
// that is wanted. Intake, planner and sweeper ask it, so that a push is judged
// alike whoever found it.
package scope

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// ErrOutside is returned for what a source may not speak of.
var ErrOutside = errors.New("source may not speak of this image")

// Scope is the part of a source's configuration that says what it is about.
// Names are those in the registry, after the Rewrite.
type Scope struct {
	// Registry is the host[:port] that the source is bound to.
	Registry string `yaml:"registry"`
	// AnyRegistry: it may speak of every configured registry.
	AnyRegistry bool `yaml:"anyRegistry"`
	// Paths are repositories, or paths above some, that it is bound to; empty: all.
	Paths []string `yaml:"paths"`
	// Repositories and Tags leave out what is not wanted.
	Repositories Filter `yaml:"repositories"`
	Tags         Filter `yaml:"tags"`
	// Platforms are the parts of an index that are scanned,
	// os/architecture[/variant]; empty: as planner is configured.
	Platforms []string `yaml:"platforms"`
}

// Filter selects names by globs: * is any text without a slash, ** any text, ?
// any character but a slash, [a-z0-9] one of a set, [!…] one that is not.
type Filter struct {
	Include []string `yaml:"include"` // empty: all
	Exclude []string `yaml:"exclude"` // of those, but not these
}

// Rewrite turns the repository that a payload names into the one in the
// registry, where a proxy or a path stands between.
type Rewrite struct {
	// StripPrefix is taken away; what does not begin with it is left out.
	StripPrefix string `yaml:"stripPrefix"`
	// AddPrefix is put before what is left.
	AddPrefix string `yaml:"addPrefix"`
}

// Map returns the repository in the registry; ok is false for one that the
// rewrite leaves out.
func (m Rewrite) Map(repository string) (mapped string, ok bool) {
	rest, ok := strings.CutPrefix(repository, m.StripPrefix)
	if !ok {
		return "", false
	}
	mapped = m.AddPrefix + rest
	return mapped, contracts.ValidRepository(mapped)
}

// Validate returns what is wrong with it.
func (m Rewrite) Validate() error {
	var problems []error
	for _, p := range []struct{ name, prefix string }{{"stripPrefix", m.StripPrefix}, {"addPrefix", m.AddPrefix}} {
		if p.prefix != "" && !contracts.ValidRepository(p.prefix+"x") {
			problems = append(problems, fmt.Errorf("rewrite.%s %q is not the begin of a repository, for example \"docker-local/\"", p.name, p.prefix))
		}
	}
	return errors.Join(problems...)
}

// Rules is a Scope at work.
type Rules struct {
	Scope
	repositories, tags filter
}

var platformPattern = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9.]+)?$`)

// ValidPlatform says whether p is os/architecture[/variant].
func ValidPlatform(p string) bool { return platformPattern.MatchString(p) }

// Compile returns the rules of a scope, and as an error everything that is
// wrong with its paths, filters and platforms.
func Compile(s Scope) (*Rules, error) {
	var problems []error
	for _, p := range s.Paths {
		if !contracts.ValidRepository(strings.TrimSuffix(p, "/")) {
			problems = append(problems, fmt.Errorf("path %q is not a repository or the path above some", p))
		}
	}
	for _, p := range s.Platforms {
		if !ValidPlatform(p) {
			problems = append(problems, fmt.Errorf("platform %q is not os/architecture[/variant]", p))
		}
	}
	r := &Rules{Scope: s}
	var err error
	if r.repositories, err = compile(s.Repositories); err != nil {
		problems = append(problems, fmt.Errorf("repositories: %w", err))
	}
	if r.tags, err = compile(s.Tags); err != nil {
		problems = append(problems, fmt.Errorf("tags: %w", err))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	return r, nil
}

// Push decides about a push: the error is ErrOutside for what the source may
// not speak of; left says why the filters leave it out, "" if they do not. tag
// is "" for a push without one, which no filter of tags leaves out: what it is
// called may be told by another.
func (r *Rules) Push(registry, repository, tag string) (left string, err error) {
	if left, err := r.Delete(registry, repository); left != "" || err != nil {
		return left, err
	}
	if tag == "" {
		return "", nil
	}
	if what := r.tags.match(tag); what != "" {
		return "the source's filter leaves out tag " + tag + " (" + what + ")", nil
	}
	return "", nil
}

// Delete decides like Push about a deletion. Which tag was deleted is no matter:
// a tag may have been wanted before.
func (r *Rules) Delete(registry, repository string) (left string, err error) {
	if !r.AnyRegistry && !strings.EqualFold(r.Registry, registry) {
		return "", fmt.Errorf("it is bound to registry %s and names %s: %w", r.Registry, registry, ErrOutside)
	}
	if !r.Covers(repository) {
		return "", fmt.Errorf("it is bound to paths that repository %s is not below: %w", repository, ErrOutside)
	}
	if what := r.repositories.match(repository); what != "" {
		return "the source's filter leaves out repository " + repository + " (" + what + ")", nil
	}
	return "", nil
}

// Covers says whether the repository is one of the paths or below one.
func (r *Rules) Covers(repository string) bool {
	return len(r.Paths) == 0 || slices.ContainsFunc(r.Paths, func(p string) bool {
		p = strings.TrimSuffix(p, "/")
		return repository == p || strings.HasPrefix(repository, p+"/")
	})
}

// Wanted says whether anything of the repository can be wanted, for who lists
// a registry.
func (r *Rules) Wanted(repository string) bool {
	left, err := r.Delete(r.Registry, repository)
	return left == "" && err == nil
}

// filter is a Filter at work.
type filter struct {
	include, exclude []glob
}

type glob struct {
	text    string
	pattern *regexp.Regexp
}

// match returns "" for a name that passes, else the globs that are why not.
func (f filter) match(name string) string {
	matches := func(g glob) bool { return g.pattern.MatchString(name) }
	if len(f.include) > 0 && !slices.ContainsFunc(f.include, matches) {
		var texts []string
		for _, g := range f.include {
			texts = append(texts, g.text)
		}
		return "include: " + strings.Join(texts, ", ")
	}
	if i := slices.IndexFunc(f.exclude, matches); i >= 0 {
		return "exclude: " + f.exclude[i].text
	}
	return ""
}

func compile(f Filter) (out filter, err error) {
	var problems []error
	all := func(texts []string) (globs []glob) {
		for _, text := range texts {
			g, err := parseGlob(text)
			if err != nil {
				problems = append(problems, err)
				continue
			}
			globs = append(globs, g)
		}
		return globs
	}
	out = filter{include: all(f.Include), exclude: all(f.Exclude)}
	return out, errors.Join(problems...)
}

var globToken = regexp.MustCompile(`\*\*|\*|\?|\[!?[A-Za-z0-9._-]+\]|[A-Za-z0-9._/-]+`)

func parseGlob(text string) (glob, error) {
	var b strings.Builder
	end := 0
	for _, at := range globToken.FindAllStringIndex(text, -1) {
		if at[0] != end {
			break
		}
		end = at[1]
		switch token := text[at[0]:at[1]]; {
		case token == "**":
			b.WriteString(".*")
		case token == "*":
			b.WriteString("[^/]*")
		case token == "?":
			b.WriteString("[^/]")
		case token[0] == '[':
			b.WriteString(strings.Replace(token, "[!", "[^/", 1))
		default:
			b.WriteString(regexp.QuoteMeta(token))
		}
	}
	if text == "" || end != len(text) {
		return glob{}, fmt.Errorf("glob %q: want letters, digits, \". _ - /\" and *, **, ?, [a-z]", text)
	}
	pattern, err := regexp.Compile("^(?:" + b.String() + ")$")
	if err != nil {
		return glob{}, fmt.Errorf("glob %q: a set like [a-z] is not right", text)
	}
	return glob{text, pattern}, nil
}

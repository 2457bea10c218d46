package scope

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func rules(t testing.TB, s Scope) *Rules {
	t.Helper()
	if s.Registry == "" && !s.AnyRegistry {
		s.Registry = "r.example"
	}
	r, err := Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestGlobs(t *testing.T) {
	for text, c := range map[string]struct{ yes, no string }{
		"v*":            {"v v1 v1.2-rc", "1v latest"},
		"*":             {"a a.b", "a/b"},
		"team/*":        {"team/a", "team team/a/b teams/a"},
		"team/**":       {"team/a team/a/b", "team other/team/a"},
		"**/app":        {"a/app a/b/app", "app a/apps"},
		"**":            {"a a/b a/b/c", ""},
		"v?":            {"v1", "v v12"},
		"v[0-9]*":       {"v1 v12", "v va"},
		"[!d]*":         {"latest v1", "dev d"},
		"a.b":           {"a.b", "aXb"},
		"release-[abc]": {"release-a", "release-d release-ab"},
		"A_b-1":         {"A_b-1", "a_b-1"},
	} {
		f, err := compile(Filter{Include: []string{text}})
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		for _, name := range strings.Fields(c.yes) {
			if f.match(name) != "" {
				t.Errorf("%s does not match %s", text, name)
			}
		}
		for _, name := range strings.Fields(c.no) {
			if f.match(name) == "" {
				t.Errorf("%s matches %s", text, name)
			}
		}
	}
	for _, bad := range []string{"", "{a,b}", "a b", "v(1)", "[", "a]", "[z-a]", "é", "a\nb", "+"} {
		if _, err := Compile(Scope{Tags: Filter{Exclude: []string{bad}}}); err == nil || !strings.Contains(err.Error(), "tags: glob") {
			t.Errorf("%q: got %v", bad, err)
		}
	}
}

func TestPush(t *testing.T) {
	r := rules(t, Scope{
		Registry: "r.example:5000", Paths: []string{"team/", "one"},
		Repositories: Filter{Exclude: []string{"team/scratch/**"}},
		Tags:         Filter{Include: []string{"v*", "latest"}, Exclude: []string{"*-rc?"}},
	})
	for _, c := range []struct{ registry, repository, tag, left string }{
		{"r.example:5000", "team/app", "v1", ""},
		{"R.Example:5000", "team/app", "latest", ""},
		{"r.example:5000", "one", "v1", ""},
		{"r.example:5000", "team/app", "v1-rc1", "tag v1-rc1 (exclude: *-rc?)"},
		{"r.example:5000", "team/app", "dev", "tag dev (include: v*, latest)"},
		{"r.example:5000", "team/app", "", ""},
		{"r.example:5000", "team/scratch/a", "v1", "repository team/scratch/a (exclude: team/scratch/**)"},
		{"r.example", "team/app", "v1", "outside"},
		{"r.example:5000", "teams/app", "v1", "outside"},
		{"r.example:5000", "other", "v1", "outside"},
	} {
		left, err := r.Push(c.registry, c.repository, c.tag)
		if (c.left == "outside") != errors.Is(err, ErrOutside) || err == nil && (c.left == "") != (left == "") || !strings.Contains(left, strings.TrimPrefix(c.left, "outside")) {
			t.Errorf("%+v: got %q, %v", c, left, err)
		}
	}
}

func TestDelete(t *testing.T) {
	r := rules(t, Scope{Paths: []string{"team"}, Repositories: Filter{Exclude: []string{"team/x"}}, Tags: Filter{Include: []string{"v*"}}})
	if left, err := r.Delete("r.example", "team/a"); left != "" || err != nil {
		t.Errorf("got %q, %v", left, err)
	}
	if left, err := r.Delete("r.example", "team/x"); left == "" || err != nil {
		t.Errorf("got %q, %v", left, err)
	}
	if _, err := r.Delete("r.example", "other"); !errors.Is(err, ErrOutside) {
		t.Errorf("got %v", err)
	}
	if !r.Wanted("team/a") || r.Wanted("team/x") || r.Wanted("other") {
		t.Error("what is wanted is not what may be deleted")
	}
}

func TestRewrite(t *testing.T) {
	for _, c := range []struct {
		m        Rewrite
		in, want string // "" is left out
	}{
		{Rewrite{}, "team/app", "team/app"},
		{Rewrite{StripPrefix: "docker-local/"}, "docker-local/team/app", "team/app"},
		{Rewrite{StripPrefix: "docker-local/"}, "docker-remote/team/app", ""},
		{Rewrite{StripPrefix: "docker-local/"}, "docker-local", ""},
		{Rewrite{AddPrefix: "hub/library/"}, "nginx", "hub/library/nginx"},
		{Rewrite{StripPrefix: "a/", AddPrefix: "b/"}, "a/x", "b/x"},
		{Rewrite{AddPrefix: "b/"}, "", ""},
		{Rewrite{StripPrefix: "a/"}, "a/", ""},
	} {
		if got, ok := c.m.Map(c.in); ok != (c.want != "") || ok && got != c.want {
			t.Errorf("%+v of %q: got %q, %t", c.m, c.in, got, ok)
		}
	}
	for _, bad := range []Rewrite{{StripPrefix: "/a"}, {AddPrefix: "A/"}, {AddPrefix: "a//"}, {StripPrefix: "https://x/"}} {
		if bad.Validate() == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
	if err := (Rewrite{StripPrefix: "a/", AddPrefix: "b/c-"}).Validate(); err != nil {
		t.Error(err)
	}
}

func TestCompileSaysWhatIsWrong(t *testing.T) {
	_, err := Compile(Scope{
		Paths: []string{"/a"}, Platforms: []string{"linux"},
		Repositories: Filter{Include: []string{"{"}}, Tags: Filter{Exclude: []string{"}"}},
	})
	for _, want := range []string{`path "/a"`, `platform "linux"`, "repositories: glob", "tags: glob"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
}

// TestExcludeOnlyTakesAway: whatever is excluded, nothing comes in by it, and
// a bound is never widened by a filter.
func TestExcludeOnlyTakesAway(t *testing.T) {
	name := rapid.StringMatching(`[ab]{1,2}(/[ab]{1,2}){0,2}`)
	globs := rapid.SliceOfN(rapid.StringMatching(`[ab*?]{1,3}(/[ab*]{1,2})?`), 0, 3)
	rapid.Check(t, func(rt *rapid.T) {
		s := Scope{
			Registry: "r.example", Paths: rapid.SliceOfN(name, 0, 2).Draw(rt, "paths"),
			Repositories: Filter{Include: globs.Draw(rt, "include")},
		}
		wide, err := Compile(s)
		if err != nil {
			rt.Fatal(err)
		}
		s.Repositories.Exclude = globs.Draw(rt, "exclude")
		narrow, err := Compile(s)
		if err != nil {
			rt.Fatal(err)
		}
		repository := name.Draw(rt, "repository")
		if narrow.Wanted(repository) && !wide.Wanted(repository) {
			rt.Fatalf("%s comes in by excluding", repository)
		}
		if wide.Wanted(repository) && !wide.Covers(repository) {
			rt.Fatalf("%s is outside the paths and wanted", repository)
		}
	})
}

func FuzzGlob(f *testing.F) {
	for _, seed := range []string{"v*", "team/**", "[a-z]?", "[!a", "(", "\\d"} {
		f.Add(seed, "team/app")
	}
	f.Fuzz(func(t *testing.T, text, name string) {
		g, err := parseGlob(text)
		if err != nil {
			return
		}
		matched := g.pattern.MatchString(name)
		if literal := !strings.ContainsAny(text, "*?["); literal && matched != (text == name) {
			t.Errorf("%q and %q: %t", text, name, matched)
		}
		if text == "**" && contracts.ValidRepository(name) && !matched {
			t.Errorf("** does not match %q", name)
		}
	})
}

package contracts_test

import (
	"errors"
	"strings"
	"testing"
	"testing/quick"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	digestA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	emptyID = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

func TestValid(t *testing.T) {
	for name, c := range map[string]struct {
		valid func(string) bool
		yes   []string
		no    []string
	}{
		"digest": {
			contracts.ValidDigest,
			[]string{digestA, emptyID},
			[]string{"", "sha256:", "sha256:abc", digestA + "a", strings.ToUpper(digestA), "sha512:" + strings.Repeat("a", 128), " " + digestA, digestA + "\n"},
		},
		"repository": {
			contracts.ValidRepository,
			[]string{"a", "library/redis", "team-a/x_y/z.0", "a__b", "a---b", "0", strings.Repeat("a", 255)},
			[]string{"", "/a", "a/", "a//b", "A", "a..b", "a___b", "-a", "a-", "../a", "a b", "a:b", "a@b", strings.Repeat("a", 256), "a\n"},
		},
		"tag": {
			contracts.ValidTag,
			[]string{"1", "latest", "_x", "V1.2-rc_3", strings.Repeat("a", 128)},
			[]string{"", ".a", "-a", "a b", "a/b", "a:b", strings.Repeat("a", 129), "a\n"},
		},
		"registry": {
			contracts.ValidRegistry,
			[]string{"localhost", "docker.io", "r.example:5000", "127.0.0.1:1", "[::1]", "[fe80::1]:443", "a-b.c"},
			[]string{"", "a/b", "https://a", "a:", "a:123456", ":5000", "-a", "a-", "a b", "user@host", "[::1", "a:b", "a\n"},
		},
	} {
		for _, s := range c.yes {
			if !c.valid(s) {
				t.Errorf("%s: %q is refused", name, s)
			}
		}
		for _, s := range c.no {
			if c.valid(s) {
				t.Errorf("%s: %q is accepted", name, s)
			}
		}
	}
}

func TestDigestOf(t *testing.T) {
	if got := contracts.DigestOf(nil); got != emptyID {
		t.Errorf("got %s, want %s", got, emptyID)
	}
	if !contracts.ValidDigest(contracts.DigestOf([]byte("x"))) {
		t.Error("not a valid digest")
	}
}

func TestParseImage(t *testing.T) {
	for text, want := range map[string]contracts.Image{
		"r.example:5000/a/b@" + digestA:  {Registry: "r.example:5000", Repository: "a/b", Digest: digestA},
		"docker.io/library/x@" + emptyID: {Registry: "docker.io", Repository: "library/x", Digest: emptyID},
		"[::1]:5000/a@" + digestA:        {Registry: "[::1]:5000", Repository: "a", Digest: digestA},
	} {
		got, err := contracts.ParseImage(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%q: got %+v (%s), %v", text, got, got, err)
		}
	}
	for _, text := range []string{
		"", "@", "/@", "a@" + digestA, "r/a", "r/a:1", "r/a:1@" + digestA, "r/a@sha256:abc", "r/A@" + digestA,
		"/a@" + digestA, "r/@" + digestA, "r/a@" + digestA + "@" + digestA, "https://r/a@" + digestA,
	} {
		if got, err := contracts.ParseImage(text); !errors.Is(err, contracts.ErrInvalidImage) || got != (contracts.Image{}) {
			t.Errorf("%q: got %+v, %v", text, got, err)
		}
	}
}

func TestImageRepo(t *testing.T) {
	i := contracts.Image{Registry: "r.example:5000", Repository: "a/b", Digest: digestA}
	if i.Repo() != "r.example:5000/a/b" {
		t.Errorf("got %s", i.Repo())
	}
}

// TestIDs: the same parts give the same id, and no other parts do.
func TestIDs(t *testing.T) {
	// Fixed values: another derivation would make a replay double everything.
	if got := contracts.OutputID("planner", "/services/intake", "1", "dev.tidewaiter.image.planned.v1", "r/a@"+digestA); got != "e4f06b86332a1d84f77f1363342df4ab" {
		t.Errorf("got %s", got)
	}
	if got := contracts.JoinID("dev.tidewaiter.image.assembled.v1", "r/a@"+digestA, emptyID); got != "db4aef6397617148593bb0e189b40a57" {
		t.Errorf("got %s", got)
	}
	if contracts.OutputID("a", "bc", "d", "e", "f") == contracts.OutputID("ab", "c", "d", "e", "f") {
		t.Error("parts run into each other")
	}
	if contracts.JoinID("t", "s", digestA) == contracts.JoinID("t", "s", emptyID) {
		t.Error("the content does not count")
	}
	if contracts.JoinID("t", "s", "d") == contracts.OutputID("join", "t", "s", "d", "") {
		t.Error("a join is taken for an output")
	}
	differ := func(a, b [5]string) bool {
		same := contracts.OutputID(a[0], a[1], a[2], a[3], a[4]) == contracts.OutputID(b[0], b[1], b[2], b[3], b[4])
		return same == (a == b)
	}
	if err := quick.Check(differ, nil); err != nil {
		t.Error(err)
	}
}

func TestPlatformString(t *testing.T) {
	for want, p := range map[string]contracts.Platform{
		"linux/amd64":    {OS: "linux", Architecture: "amd64"},
		"linux/arm64/v8": {OS: "linux", Architecture: "arm64", Variant: "v8"},
	} {
		if p.String() != want {
			t.Errorf("got %s, want %s", p, want)
		}
	}
}

func TestSeverityRank(t *testing.T) {
	order := []string{
		contracts.SeverityUnknown, contracts.SeverityLow, contracts.SeverityMedium, contracts.SeverityHigh, contracts.SeverityCritical,
	}
	for i, s := range order {
		if contracts.SeverityRank(s) != i {
			t.Errorf("%s: got %d, want %d", s, contracts.SeverityRank(s), i)
		}
	}
	if contracts.SeverityRank("nonsense") != 0 {
		t.Error("a severity that is none has a rank")
	}
	if n := (contracts.Counts{Critical: 1, High: 2, Medium: 4, Low: 8, Unknown: 16, Fixable: 3, KEV: 1}).Total(); n != 31 {
		t.Errorf("got %d findings, want 31", n)
	}
}

func FuzzParseImage(f *testing.F) {
	for _, s := range []string{"r.example:5000/a/b@" + digestA, "a/b@" + digestA, "@", "[::1]/a@" + digestA, "r/a@sha256:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		image, err := contracts.ParseImage(s)
		if err != nil {
			if !errors.Is(err, contracts.ErrInvalidImage) {
				t.Fatalf("%v is not ErrInvalidImage", err)
			}
			return
		}
		if image.String() != s || image.Validate() != nil {
			t.Fatalf("%q is read as %q", s, image)
		}
	})
}

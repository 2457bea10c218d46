package layer_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	lt "github.com/tidewaiter/tidewaiter/services/analyzer/layertest"
)

const status = `Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc
Version: 2.36-9+deb12u1

Package: removed
Status: deinstall ok config-files
Architecture: amd64
Version: 1.0

Package: libgcc-s1
Status: install ok installed
Architecture: amd64
Source: gcc-12 (12.2.0-14)
Version: 12.2.0-14

`

const apkInstalled = "C:Q1abc=\nP:musl\nV:1.2.4-r1\nA:x86_64\no:musl\n\nP:libcrypto3\nV:3.1.2-r0\nA:x86_64\no:openssl\n\n"

const osRelease = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n"

func analyze(t *testing.T, b []byte, o layer.Options) *contracts.LayerReport {
	t.Helper()
	if o.Digest == "" {
		o.Digest = lt.Digest(b)
	}
	o.TempDir = t.TempDir()
	r, err := layer.Analyze(t.Context(), bytes.NewReader(b), o)
	if err != nil {
		t.Fatalf("Analyze: %v", err)
	}
	left, err := os.ReadDir(o.TempDir)
	if err != nil || len(left) > 0 {
		t.Errorf("left in the temporary folder: %v %v", left, err)
	}
	return r
}

// purls lists package URLs with the files that prove them.
func purls(r *contracts.LayerReport) []string {
	var out []string
	for _, p := range r.Packages {
		out = append(out, p.PURL+" "+strings.Join(p.Paths, ","))
	}
	return out
}

func gaps(r *contracts.LayerReport) []string {
	var out []string
	for _, g := range r.Gaps {
		out = append(out, strings.TrimSpace(g.Path+" "+g.Reason))
	}
	return out
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n got %q\nwant %q", what, got, want)
	}
}

// everything is a layer with something for each extractor.
func everything() []lt.Option {
	logCore := lt.Jar("org.apache.logging.log4j", "log4j-core", "2.14.1", nil)
	fat := lt.Jar("com.example", "shop", "1.0.0", map[string][]byte{
		"BOOT-INF/lib/log4j-core-2.14.1.jar":   logCore,
		"BOOT-INF/lib/spring-core-5.3.17.jar":  lt.Zip(map[string][]byte{"META-INF/MANIFEST.MF": []byte("Manifest-Version: 1.0\r\nImplementation-Title: spring-core\r\nImplementation-Version: 5.3.17\r\n\r\n")}),
		"BOOT-INF/lib/nothing-to-be-known.jar": lt.Zip(map[string][]byte{"a.class": []byte("x")}),
	})
	return []lt.Option{
		lt.Dir("etc"),
		lt.Symlink("etc/os-release", "../usr/lib/os-release"),
		lt.Text("usr/lib/os-release", osRelease),
		lt.Text("var/lib/dpkg/status", status),
		lt.Text("lib/apk/db/installed", apkInstalled),
		lt.Text("usr/lib/python3/dist-packages/Django-2.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: Django\nVersion: 2.2\n\n"),
		lt.Text("usr/lib/python3/dist-packages/zope.interface-5.0.egg-info/PKG-INFO", "Metadata-Version: 1.0\nName: zope.interface\nVersion: 5.0\n\n"),
		lt.Text("app/package.json", `{"name":"shop-ui","version":"3.0.0"}`),
		lt.Text("app/package-lock.json", `{"lockfileVersion":2,"packages":{"node_modules/left-pad":{"version":"1.3.0"}}}`),
		lt.Text("app/node_modules/.package-lock.json", `{"lockfileVersion":2,"packages":{"node_modules/gone":{"version":"1.0.0"}}}`),
		lt.Text("app/node_modules/lodash/package.json", `{"name":"lodash","version":"4.17.4"}`),
		lt.Text("app/node_modules/lodash/test/package.json", `{"name":"fixture","version":"0.0.1"}`),
		lt.Text("app/node_modules/@babel/core/package.json", `{"name":"@babel/core","version":"7.0.0"}`),
		lt.Text("other/package-lock.json", `{"lockfileVersion":2,"packages":{"node_modules/minimist":{"version":"0.0.8"},"node_modules/jest":{"version":"29.0.0","dev":true}}}`),
		lt.File("srv/shop.jar", fat),
		lt.Executable("usr/local/bin/tool", lt.GoBinary("go1.16.3", lt.Module{Path: "example.com/tool", Version: "(devel)"},
			lt.Module{Path: "golang.org/x/text", Version: "v0.3.5"})),
		lt.Executable("opt/redis/redis-server", lt.ELF([]byte("\x007.0.5buildhost-1663759200000000000\x00"))),
		lt.Hardlink("opt/redis/copy", "usr/local/bin/tool"),
		lt.Text("usr/share/doc/redis/README.md", "Redis 2.8.19 and mysql-5.5.9"),
		lt.Executable("usr/bin/redis-cli", lt.ELF([]byte("\x002.8.19buildhost-1663759200000000000\x00"))),
		lt.Whiteout("var/cache/old"),
		lt.Opaque("opt/replaced"),
	}
}

func TestEverythingInOnePass(t *testing.T) {
	for name, l := range map[string]lt.Layer{"gzip": lt.Gzip(everything()...), "zstd": lt.Zstd(everything()...), "plain": lt.Plain(everything()...)} {
		t.Run(name, func(t *testing.T) {
			r := analyze(t, l.Compressed, layer.Options{Digest: l.Digest, Verify: true})
			if r.DiffID != l.DiffID || r.Digest != l.Digest || r.Analyzer != layer.Version {
				t.Errorf("identity: %s %s %s", r.Digest, r.DiffID, r.Analyzer)
			}
			if r.Bytes != int64(len(l.Tar)) || r.Entries != len(everything()) {
				t.Errorf("bytes %d, entries %d", r.Bytes, r.Entries)
			}
			equal(t, "packages", purls(r), []string{
				"pkg:bitnami/redis@7.0.5 opt/redis/redis-server",
				"pkg:golang/golang.org/x/text@0.3.5 opt/redis/copy,usr/local/bin/tool",
				"pkg:golang/stdlib@1.16.3 opt/redis/copy,usr/local/bin/tool",
				"pkg:maven/com.example/shop@1.0.0 srv/shop.jar",
				"pkg:maven/org.apache.logging.log4j/log4j-core@2.14.1 srv/shop.jar!/BOOT-INF/lib/log4j-core-2.14.1.jar",
				"pkg:maven/org.springframework/spring-core@5.3.17 srv/shop.jar!/BOOT-INF/lib/spring-core-5.3.17.jar",
				"pkg:npm/%40babel/core@7.0.0 app/node_modules/@babel/core/package.json",
				"pkg:npm/lodash@4.17.4 app/node_modules/lodash/package.json",
				"pkg:npm/minimist@0.0.8 other/package-lock.json",
				"pkg:npm/shop-ui@3.0.0 app/package.json",
				"pkg:pypi/django@2.2 usr/lib/python3/dist-packages/Django-2.2.dist-info/METADATA",
				"pkg:pypi/zope-interface@5.0 usr/lib/python3/dist-packages/zope.interface-5.0.egg-info/PKG-INFO",
			})
			equal(t, "gaps", gaps(r), nil)
			equal(t, "whiteouts", r.Whiteouts, []string{"var/cache/old"})
			equal(t, "opaque", r.Opaque, []string{"opt/replaced"})
			if want := (contracts.OSRelease{Path: "usr/lib/os-release", ID: "debian", VersionID: "12", Codename: "bookworm", PrettyName: "Debian GNU/Linux 12 (bookworm)"}); r.OSRelease == nil || *r.OSRelease != want {
				t.Errorf("os-release: %+v", r.OSRelease)
			}
			got, err := json.Marshal(r.Databases)
			if err != nil {
				t.Fatal(err)
			}
			want := `[{"kind":"apk","path":"lib/apk/db/installed","packages":[` +
				`{"name":"libcrypto3","version":"3.1.2-r0","source":"openssl","arch":"x86_64"},{"name":"musl","version":"1.2.4-r1","source":"musl","arch":"x86_64"}]},` +
				`{"kind":"dpkg","path":"var/lib/dpkg/status","packages":[` +
				`{"name":"libc6","version":"2.36-9+deb12u1","source":"glibc","arch":"amd64"},{"name":"libgcc-s1","version":"12.2.0-14","source":"gcc-12","sourceVersion":"12.2.0-14","arch":"amd64"}]}]`
			if string(got) != want {
				t.Errorf("databases:\n got %s\nwant %s", got, want)
			}
			for _, p := range []string{"app/node_modules/lodash/package.json", "srv/shop.jar", "usr/local/bin/tool", "opt/redis/copy", "etc/os-release"} {
				if !slices.Contains(r.Replaced, p) {
					t.Errorf("replaced lacks %s", p)
				}
			}
			if slices.Contains(r.Replaced, "usr/share/doc/redis/README.md") {
				t.Error("replaced holds a document")
			}
		})
	}
}

func TestSameLayerSameBytes(t *testing.T) {
	l := lt.Gzip(everything()...)
	first, err := json.Marshal(analyze(t, l.Compressed, layer.Options{}))
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		again, err := json.Marshal(analyze(t, l.Compressed, layer.Options{}))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, again) {
			t.Fatalf("differs:\n%s\n%s", first, again)
		}
	}
	// Spilling to the temporary file changes nothing.
	spilled, err := json.Marshal(analyze(t, l.Compressed, layer.Options{MaxMemory: 1}))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, spilled) {
		t.Errorf("differs when spilled:\n%s\n%s", first, spilled)
	}
}

func TestOwnExecutable(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	r := analyze(t, lt.Gzip(lt.Executable("usr/bin/self", content)).Compressed, layer.Options{MaxMemory: 1 << 20})
	want := "pkg:golang/stdlib@" + strings.TrimPrefix(runtime.Version(), "go")
	i := slices.IndexFunc(r.Packages, func(p contracts.LayerPackage) bool { return strings.HasPrefix(p.PURL, want) })
	if i < 0 {
		t.Errorf("no %s in %q, gaps %q", want, purls(r), gaps(r))
	}
	equal(t, "gaps", gaps(r), nil)
}

func TestLastEntryOfANameCounts(t *testing.T) {
	r := analyze(t, lt.Gzip(
		lt.Text("a/node_modules/x/package.json", `{"name":"x","version":"1.0.0"}`),
		lt.Text("./a//node_modules/x/package.json", `{"name":"x","version":"2.0.0"}`),
		lt.Text("a/node_modules/y/package.json", `{"name":"y","version":"1.0.0"}`),
		lt.Symlink("a/node_modules/y/package.json", "elsewhere"),
	).Compressed, layer.Options{})
	equal(t, "packages", purls(r), []string{"pkg:npm/x@2.0.0 a/node_modules/x/package.json"})
}

func TestDatabases(t *testing.T) {
	r := analyze(t, lt.Gzip(
		lt.Text("var/lib/dpkg/status", ""),
		lt.Text("var/lib/dpkg/status.d/base", "Package: base-files\nVersion: 12.4\nArchitecture: amd64\n\n"),
		lt.Text("var/lib/dpkg/status.d/base.md5sums", "x"),
		lt.Text("var/lib/dpkg/status-old", status),
	).Compressed, layer.Options{})
	if len(r.Databases) != 2 || r.Databases[0].Path != "var/lib/dpkg/status" || r.Databases[0].Packages == nil || len(r.Databases[0].Packages) != 0 {
		t.Fatalf("an empty database is one, too: %+v", r.Databases)
	}
	if d := r.Databases[1]; d.Path != "var/lib/dpkg/status.d/base" || len(d.Packages) != 1 || d.Packages[0].Name != "base-files" {
		t.Errorf("status.d: %+v", d)
	}
}

func TestReaderErrorsAreErrors(t *testing.T) {
	l := lt.Gzip(everything()...)
	broken := errors.New("connection reset")
	for name, r := range map[string]io.Reader{
		"at once":       iotest.ErrReader(broken),
		"in the middle": io.MultiReader(bytes.NewReader(l.Compressed[:len(l.Compressed)/2]), iotest.ErrReader(broken)),
		"at the end":    io.MultiReader(bytes.NewReader(l.Compressed), iotest.ErrReader(broken)),
	} {
		if _, err := layer.Analyze(t.Context(), r, layer.Options{TempDir: t.TempDir()}); !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := layer.Analyze(t.Context(), bytes.NewReader(l.Compressed), layer.Options{Digest: lt.Digest(nil), Verify: true}); !errors.Is(err, layer.ErrDigest) {
		t.Errorf("wrong digest: %v", err)
	}
}

func TestReadsToTheEndWhateverIsInside(t *testing.T) {
	good := lt.Gzip(everything()...).Compressed
	for name, b := range map[string][]byte{
		"garbage":        []byte("neither of them, and long enough to look like it"),
		"corrupt gzip":   append(slices.Clone(good[:len(good)/2]), make([]byte, 1<<20)...),
		"trailing bytes": append(slices.Clone(good), "garbage after the end"...),
		"tar in tar":     lt.GzipBytes([]byte(strings.Repeat("not a tar header", 1000))),
	} {
		r := bytes.NewReader(b)
		rep, err := layer.Analyze(t.Context(), r, layer.Options{TempDir: t.TempDir()})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if r.Len() != 0 {
			t.Errorf("%s: %d bytes were not read", name, r.Len())
		}
		if len(rep.Gaps) == 0 {
			t.Errorf("%s: no gap", name)
		}
	}
}

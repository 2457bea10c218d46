package layer

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"
	"sync"

	"github.com/google/osv-scalibr/binary/proto/config_go_proto"
	"github.com/google/osv-scalibr/extractor"
	"github.com/google/osv-scalibr/extractor/filesystem"
	"github.com/google/osv-scalibr/extractor/filesystem/language/golang/gobinary"
	"github.com/google/osv-scalibr/extractor/filesystem/language/java/archive"
	"github.com/google/osv-scalibr/extractor/filesystem/language/javascript/packagejson"
	"github.com/google/osv-scalibr/extractor/filesystem/language/javascript/packagelockjson"
	"github.com/google/osv-scalibr/extractor/filesystem/language/javascript/pnpmlock"
	"github.com/google/osv-scalibr/extractor/filesystem/language/javascript/yarnlock"
	"github.com/google/osv-scalibr/extractor/filesystem/language/python/wheelegg"
	"github.com/google/osv-scalibr/extractor/filesystem/os/apk"
	"github.com/google/osv-scalibr/extractor/filesystem/os/dpkg"
	"github.com/google/osv-scalibr/extractor/filesystem/os/rpm"
	"github.com/google/osv-scalibr/log"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// kind says which extractor a file is for.
type kind int

const (
	kindNone kind = iota
	kindDpkg
	kindApk
	kindRPM
	kindRelease
	kindPython
	kindPackageJSON
	kindNpmLock
	kindYarnLock
	kindPnpmLock
	kindJava
	kindExecutable
	kindServer // for the classifier only
)

// kindOf decides by the path alone which extractor wants a file. It asks what
// the extractors' own FileRequired would, without their cost per file.
func kindOf(name, base string) kind {
	switch base {
	case "package.json":
		return packageJSONKind(name)
	case "package-lock.json", "npm-shrinkwrap.json":
		return lockKind(name, kindNpmLock)
	case "yarn.lock":
		return lockKind(name, kindYarnLock)
	case "pnpm-lock.yaml":
		return lockKind(name, kindPnpmLock)
	case "METADATA":
		if strings.HasSuffix(name, ".dist-info/METADATA") {
			return kindPython
		}
		return statusD(name)
	case "PKG-INFO":
		if strings.HasSuffix(name, "EGG-INFO/PKG-INFO") || strings.HasSuffix(name, ".egg-info/PKG-INFO") {
			return kindPython
		}
		return statusD(name)
	case "os-release":
		if isRelease(name) {
			return kindRelease
		}
	}
	if d := databaseKind(name); d != "" {
		switch d {
		case "dpkg":
			return kindDpkg
		case "apk":
			return kindApk
		default:
			return kindRPM
		}
	}
	i := strings.LastIndexByte(base, '.')
	if i < 0 {
		return kindNone
	}
	switch strings.ToLower(base[i:]) {
	case ".egg-info", ".egg", ".whl":
		return kindPython
	case ".jar", ".war", ".ear", ".par", ".sar", ".jpi", ".hpi", ".lpkg", ".nar":
		// Not .jmod: the modules of a JDK, which is recognised as a whole.
		return kindJava
	}
	return kindNone
}

// packageJSONKind accepts a package's own file: that of an installed package is
// right below node_modules, not somewhere among its tests and builds.
func packageJSONKind(name string) kind {
	i := strings.LastIndex("/"+name, "/node_modules/")
	if i < 0 {
		return kindPackageJSON
	}
	parts := strings.Split(name[i+len("node_modules/"):], "/")
	if len(parts) == 2 || len(parts) == 3 && strings.HasPrefix(parts[0], "@") {
		return kindPackageJSON
	}
	return kindNone
}

// lockKind accepts a project's own lock file. Those that packages carry along
// say nothing about what is installed, and node_modules/.package-lock.json
// still lists what was deleted.
func lockKind(name string, k kind) kind {
	if strings.Contains("/"+name, "/node_modules/") {
		return kindNone
	}
	return k
}

func statusD(name string) kind {
	if databaseKind(name) == "dpkg" {
		return kindDpkg
	}
	return kindNone
}

// databaseKind recognises the package databases by their path: "dpkg", "apk",
// "rpm" or "".
func databaseKind(name string) string {
	switch name {
	case "var/lib/dpkg/status":
		return "dpkg"
	case "lib/apk/db/installed", "usr/lib/apk/db/installed", "var/lib/apk/db/installed":
		return "apk"
	}
	if entry, ok := strings.CutPrefix(name, "var/lib/dpkg/status.d/"); ok {
		if !strings.HasSuffix(entry, ".md5sums") && !strings.Contains(entry, "/") {
			return "dpkg"
		}
		return ""
	}
	dir, base := path.Split(name)
	switch dir {
	case "var/lib/rpm/", "usr/lib/sysimage/rpm/", "usr/share/rpm/":
		switch base {
		case "Packages", "Packages.db", "rpmdb.sqlite":
			return "rpm"
		}
	}
	return ""
}

func isRelease(name string) bool {
	return name == "etc/os-release" || name == "usr/lib/os-release"
}

// notExecutable are endings of files that are no executables although many
// carry the mode of one.
var notExecutable = map[string]bool{
	".c": true, ".cc": true, ".conf": true, ".css": true, ".csv": true, ".gif": true, ".go": true, ".gz": true,
	".h": true, ".html": true, ".jpg": true, ".js": true, ".json": true, ".lock": true, ".log": true, ".map": true,
	".md": true, ".mjs": true, ".mo": true, ".png": true, ".po": true, ".py": true, ".pyc": true, ".pyi": true,
	".rb": true, ".rst": true, ".sh": true, ".svg": true, ".tar": true, ".toml": true, ".ts": true, ".txt": true,
	".xml": true, ".yaml": true, ".yml": true, ".class": true, ".pl": true, ".pm": true, ".list": true, ".md5sums": true,
}

func ending(base string) string {
	if i := strings.LastIndexByte(base, '.'); i > 0 {
		return base[i:]
	}
	return ""
}

// couldBeExecutable says whether a look at the first bytes is worth it. Shared
// libraries carry no execute bit, but can hold Go code.
func couldBeExecutable(base string, mode int64) bool {
	ext := ending(base)
	if notExecutable[ext] {
		return false
	}
	return mode&0o111 != 0 || ext == "" || ext == ".so" || ext == ".exe" || ext == ".bin" || ext == ".elf" || ext == ".run" || ext == ".dll"
}

// couldHold says whether a lower layer may have something of interest at a path.
func couldHold(name, base string) bool {
	return kindOf(name, base) != kindNone || !notExecutable[ending(base)]
}

// rpmSeconds bounds the reading of an rpm database: corrupt ones can send the
// reader round in circles.
const rpmSeconds = 60

// extractors are the ones of osv-scalibr that are used, made once.
type extractors struct {
	byKind map[kind]filesystem.Extractor
	err    error
}

// newExtractors makes the extractors with the limits of o.
func newExtractors(o Options) (*extractors, error) {
	no := false
	java := &config_go_proto.PluginConfig{PluginSpecific: []*config_go_proto.PluginSpecificConfig{{
		Config: &config_go_proto.PluginSpecificConfig_JavaArchive{JavaArchive: &config_go_proto.JavaArchiveConfig{
			MaxZipDepth: 1, MaxOpenedBytes: max(o.MaxFile, o.MaxNested) + 1, // see analysis.java
			HashJars: &no, // a hash of every jar costs as much again, and only names "unknown:unknown"
		}},
	}}}
	database := &config_go_proto.PluginConfig{PluginSpecific: []*config_go_proto.PluginSpecificConfig{{
		Config: &config_go_proto.PluginSpecificConfig_Rpm{Rpm: &config_go_proto.RpmConfig{TimeoutSeconds: rpmSeconds}},
	}}}
	plain := &config_go_proto.PluginConfig{}
	e := &extractors{byKind: map[kind]filesystem.Extractor{}}
	add := func(k kind, make func(*config_go_proto.PluginConfig) (filesystem.Extractor, error), cfg *config_go_proto.PluginConfig) {
		x, err := make(cfg)
		if err != nil {
			e.err = fmt.Errorf("make extractor: %w", err)
			return
		}
		e.byKind[k] = x
	}
	add(kindDpkg, dpkg.New, plain)
	add(kindApk, apk.New, plain)
	add(kindRPM, rpm.New, database)
	add(kindPython, wheelegg.New, plain)
	add(kindPackageJSON, packagejson.New, plain)
	add(kindNpmLock, packagelockjson.New, plain)
	add(kindYarnLock, yarnlock.New, plain)
	add(kindPnpmLock, pnpmlock.New, plain)
	add(kindJava, archive.New, java)
	add(kindExecutable, gobinary.New, plain)
	return e, e.err
}

// quietExtractors silences osv-scalibr's own log, which is the process's
// standard logger otherwise and would carry text of foreign files.
var quietExtractors = sync.OnceFunc(func() { log.SetLogger(silent{}) })

type silent struct{}

func (silent) Errorf(string, ...any) {}
func (silent) Error(...any)          {}
func (silent) Warnf(string, ...any)  {}
func (silent) Warn(...any)           {}
func (silent) Infof(string, ...any)  {}
func (silent) Info(...any)           {}
func (silent) Debugf(string, ...any) {}
func (silent) Debug(...any)          {}

// extract gives the present file to its extractor and stores the result in f.
// Only errTemp comes back: what is wrong with a file is a gap of that file.
func (a *analysis) extract(name string, f *facts) error {
	switch f.kind {
	case kindServer, kindNone:
		return nil
	case kindRelease:
		content, err := a.body.bytes(maxRelease)
		if err != nil {
			f.gaps = append(f.gaps, contracts.Gap{Path: name, Reason: limit("os-release larger than %d bytes", maxRelease).Error()})
			return nil //nolint:nilerr // recorded
		}
		f.release = parseRelease(name, content)
		return nil
	case kindJava, kindRPM, kindExecutable:
		// These are read where they lie.
	default:
		// These are parsed from memory as a whole.
		if a.body.size > maxText {
			f.gaps = append(f.gaps, contracts.Gap{Path: name, Reason: limit("text file larger than %d bytes", maxText).Error()})
			return nil
		}
	}
	if f.kind == kindJava {
		if !a.looksLikeZip() && !isJar(name) {
			return nil // other things share the rarer endings
		}
		left := a.o.MaxNested
		return a.java(name, a.body, 1, &left, f)
	}
	if f.kind == kindPython && a.looksLikeZip() {
		many, err := tooManyMembers(a.body)
		if err != nil {
			return err
		}
		if many {
			f.gaps = append(f.gaps, contracts.Gap{Path: name, Reason: limit("more than %d members in an archive", maxMembers).Error()})
			return nil
		}
	}
	x := a.extractors.byKind[f.kind]
	input := &filesystem.ScanInput{
		FS:     nothing{},
		Path:   name,
		Info:   info{name: name, size: a.body.size, mode: 0o755},
		Reader: a.body.reader(),
	}
	found, err := guarded(a.ctx, x, input)
	f.packages, f.database = a.convert(f.kind, name, found)
	if err != nil {
		reason := extractReason(err)
		if reason != "" {
			f.gaps = append(f.gaps, contracts.Gap{Path: name, Reason: reason})
		}
	}
	return nil
}

func isJar(name string) bool {
	switch strings.ToLower(path.Ext(name)) {
	case ".jar", ".war", ".ear":
		return true
	}
	return false
}

func (a *analysis) looksLikeZip() bool {
	var head [4]byte
	n, _ := a.body.ReadAt(head[:], 0)
	return n == 4 && string(head[:2]) == "PK"
}

// guarded runs an extractor. A panic in it costs the one file, not the layer.
func guarded(ctx context.Context, x filesystem.Extractor, input *filesystem.ScanInput) (found []*extractor.Package, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	inv, err := x.Extract(ctx, input)
	return inv.Packages, err
}

// tempPath is where the rpm extractor copies a database to: another place each
// time, which must not stand in a report.
var tempPath = regexp.MustCompile(`[^ (]*scalibr-tmp[^ ):]*`)

var errPanic = errors.New("extractor panicked")

// extractReason turns an extractor's error into the reason of a gap; "" means
// that nothing was missed.
func extractReason(err error) string {
	text := tempPath.ReplaceAllString(err.Error(), "file")
	switch {
	case errors.Is(err, errPanic):
		return "corrupt: " + clip(text)
	case errors.Is(err, context.DeadlineExceeded), strings.Contains(text, "deadline exceeded"):
		return "limit: time"
	case errors.Is(err, filesystem.ErrExtractorMemoryLimitExceeded):
		return "limit: memory of an extractor"
	case strings.Contains(text, "Name or Version is empty"): // metadata of a package without a version
		return ""
	}
	return "corrupt: " + clip(text)
}

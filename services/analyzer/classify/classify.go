// Package classify recognises server software that no package manager
// installed, from the name of a file and what stands in it.
//
// A version is only believed where the server itself writes it: executables
// must be ELF or PE files of the server's name, archives the server's own. A
// client library, a script or a document that mentions a version is not a server.
package classify

import (
	"archive/zip"
	"bytes"
	"fmt"
	"io"
	"path"
	"regexp"
	"strings"
)

// Kind says how a file has to be looked at.
type Kind int

const (
	// None: the name says nothing.
	None Kind = iota
	// Binary: an executable, given to a Scanner chunk by chunk.
	Binary
	// Text: a small file, given to FromText as a whole.
	Text
	// Archive: a zip file, given to FromArchive.
	Archive
)

// MaxText bounds the files of kind Text, in bytes: a larger one is something else.
const MaxText = 1 << 20

// maxMember bounds what is read of one member of an archive, in bytes.
const maxMember = 1 << 20

// Server is recognised server software.
type Server struct {
	Name    string // component name in the Bitnami advisories, or as they would call it
	Version string // as those advisories write it
	Product string // endoflife.date's name; "" where it has none
	// Needs names paths (prefixes of paths where they end in "/") of which one
	// must be in the layer too, where the file alone proves nothing.
	Needs []string
}

// PURL returns the server's package URL (purl-spec, type "bitnami").
func (s Server) PURL() string { return "pkg:bitnami/" + s.Name + "@" + s.Version }

// known maps a component to its name on endoflife.date.
var known = map[string]string{
	"mysql":         "mysql",
	"mariadb":       "mariadb",
	"tomcat":        "tomcat",
	"apache":        "apache-http-server",
	"couchdb":       "apache-couchdb",
	"redis":         "redis",
	"valkey":        "valkey",
	"jenkins":       "jenkins",
	"elasticsearch": "elasticsearch",
	"postgresql":    "postgresql",
	"nginx":         "nginx",
	"mongodb":       "mongodb",
	"node":          "nodejs",
}

func server(name, version string) Server {
	return Server{Name: name, Version: version, Product: known[name]}
}

var (
	redisName = regexp.MustCompile(`^redis-server(?:-\d+(?:\.\d+)*)?(?:\.exe)?$`)
	elastic   = regexp.MustCompile(`(?:^|/)lib/elasticsearch-(\d+\.\d+\.\d+)(?:-[A-Za-z0-9]+)?\.jar$`)
	couchApp  = regexp.MustCompile(`(?:^|/)couch-[^/]+/ebin/couch\.app$`)
	jenkins   = regexp.MustCompile(`(?:^|/)jenkins(?:-war)?(?:-\d+(?:\.\d+)*)?\.war$`)
)

// Wants says whether a file of that path (clean, without a leading slash) may
// prove a server, and how it has to be looked at.
func Wants(name string) Kind {
	base := path.Base(name)
	switch base {
	case "mysqld", "mysqld-debug", "mysqld.exe", "mariadbd", "mariadbd.exe",
		"redis-server", "valkey-server", "postgres", "nginx", "httpd", "apache2",
		"mongod", "mongod.exe", "node", "nodejs", "node.exe":
		return Binary
	case "release", "RELEASE-NOTES", "ServerInfo.properties":
		return Text
	case "couch.app":
		if couchApp.MatchString(name) {
			return Text
		}
		return None
	case "catalina.jar":
		return Archive
	}
	switch {
	case strings.HasPrefix(base, "redis-server") && redisName.MatchString(base):
		return Binary
	case strings.HasSuffix(base, ".war") && jenkins.MatchString(name):
		return Archive
	case strings.HasPrefix(base, "elasticsearch-") && elastic.MatchString(name):
		return Archive
	}
	return None
}

// overlap is how much of one chunk a Scanner keeps for the next, so that
// nothing is missed at their border. No proof is longer.
const overlap = 2 << 10

// Scanner looks for the version of a server in an executable that is given to
// it in chunks.
type Scanner struct {
	find  []func([]byte) (Server, bool)
	found []Server // by position in find
	buf   []byte
}

// NewScanner returns a scanner for an executable of that path, or nil if its
// name is no server's.
func NewScanner(name string) *Scanner {
	base := strings.TrimSuffix(path.Base(name), ".exe")
	var find []func([]byte) (Server, bool)
	switch {
	case base == "mysqld", base == "mysqld-debug", base == "mariadbd":
		find = append(find, findMariaDB, findMySQL) // the first one wins: MariaDB calls its server mysqld too
	case strings.HasPrefix(base, "redis-server"):
		find = append(find, findRedis("redis"))
	case base == "valkey-server":
		find = append(find, findRedis("valkey"))
	case base == "postgres":
		find = append(find, findPostgres)
	case base == "nginx":
		find = append(find, findNginx)
	case base == "httpd", base == "apache2":
		find = append(find, findApache)
	case base == "mongod":
		find = append(find, findMongo)
	case base == "node", base == "nodejs":
		find = append(find, findNode)
	default:
		return nil
	}
	return &Scanner{find: find, found: make([]Server, len(find))}
}

// Executable says whether a file that begins with head is an executable that
// could be a server: ELF or PE.
func Executable(head []byte) bool {
	return bytes.HasPrefix(head, []byte("\x7fELF")) || bytes.HasPrefix(head, []byte("MZ"))
}

// Write looks at the next chunk. It never fails.
func (s *Scanner) Write(chunk []byte) (int, error) {
	if s.found[0].Name != "" {
		return len(chunk), nil
	}
	s.buf = append(s.buf, chunk...)
	for i, find := range s.find {
		if s.found[i].Name != "" {
			continue
		}
		if v, ok := find(s.buf); ok {
			s.found[i] = v
		}
	}
	if len(s.buf) > overlap {
		s.buf = append(s.buf[:0], s.buf[len(s.buf)-overlap:]...)
	}
	return len(chunk), nil
}

// Server returns what was found in all chunks so far.
func (s *Scanner) Server() (Server, bool) {
	for _, v := range s.found {
		if v.Name != "" {
			return v, true
		}
	}
	return Server{}, false
}

// around calls look with the surroundings of each occurrence of anchor until
// it is satisfied. Searching a literal is many times faster than a regular
// expression, and executables are large.
func around(b []byte, anchor string, before, after int, look func([]byte) (Server, bool)) (Server, bool) {
	a := []byte(anchor)
	for at := 0; ; {
		i := bytes.Index(b[at:], a)
		if i < 0 {
			return Server{}, false
		}
		i += at
		if v, ok := look(b[max(0, i-before):min(len(b), i+len(a)+after)]); ok {
			return v, true
		}
		at = i + len(a)
	}
}

func matcher(name string, re *regexp.Regexp) func([]byte) (Server, bool) {
	return func(w []byte) (Server, bool) {
		m := re.FindSubmatch(w)
		if m == nil {
			return Server{}, false
		}
		return server(name, string(m[1])), true
	}
}

var (
	mariaVersion = regexp.MustCompile(`(?:^|[\x00-])(\d{1,2}\.\d{1,2}\.\d{1,3})-MariaDB`)
	mysqlNear    = regexp.MustCompile(`\x00([4-9]\.\d{1,2}\.\d{1,3})(?:-[0-9A-Za-z.+~-]{1,40})?\x00`)
	mysqlSource  = regexp.MustCompile(`mysql-(?:community-|commercial-|server-)?(\d{1,2}\.\d{1,2}\.\d{1,3})[^/\x00]{0,40}/sql/mysqld\.cc`)
	redisBuild   = regexp.MustCompile(`\x00(\d{1,2}\.\d{1,2}\.\d{1,3})[A-Za-z][A-Za-z0-9._-]{0,90}-1\d{9,}`)
	redisStarted = regexp.MustCompile(`Server started, Redis version (\d{1,2}\.\d{1,2}\.\d{1,3})\x00`)
	pgVersion    = regexp.MustCompile(`\x00PostgreSQL (\d{1,2}(?:\.\d{1,2}){1,2}|\d{1,2}(?:beta|rc)\d{1,2})(?: \([^)\x00]{1,80}\))?(?: on [a-z0-9_]|\x00)`)
	nginxVersion = regexp.MustCompile(`(?:\x00|nginx version: )nginx/(\d{1,2}\.\d{1,2}\.\d{1,3})`)
	apacheServer = regexp.MustCompile(`\x00Apache/(2\.\d{1,2}\.\d{1,3})[ \x00]`)
	nodeVersion  = regexp.MustCompile(`\x00node\.js/v(\d{1,2}\.\d{1,3}\.\d{1,3})\x00`)
	mongoAfter   = regexp.MustCompile(`^\x00+[0-9a-f]{40}\x00`)
	mongoBefore  = regexp.MustCompile(`(?:^|\x00)[0-9a-f]{40}\x00+$`)
	mongoPlain   = regexp.MustCompile(`(?:mongodb-src-r|db version v)(\d{1,2}\.\d{1,2}\.\d{1,3})`)
)

func findMariaDB(b []byte) (Server, bool) {
	return around(b, "-MariaDB", 24, 0, matcher("mariadb", mariaVersion))
}

func findMySQL(b []byte) (Server, bool) {
	if v, ok := around(b, "/sql/mysqld.cc", 80, 0, matcher("mysql", mysqlSource)); ok {
		return v, true
	}
	return around(b, "Ver %s for %s on %s", 256, 256, matcher("mysql", mysqlNear))
}

// findRedis finds the build id, which is the version followed by host and time
// of the build; older versions also say it when they start.
func findRedis(name string) func([]byte) (Server, bool) {
	return func(b []byte) (Server, bool) {
		if v, ok := around(b, "Server started, Redis version ", 0, 16, matcher(name, redisStarted)); ok {
			return v, true
		}
		return around(b, "-1", 120, 40, matcher(name, redisBuild))
	}
}

func findPostgres(b []byte) (Server, bool) {
	return around(b, "\x00PostgreSQL ", 0, 128, matcher("postgresql", pgVersion))
}

func findNginx(b []byte) (Server, bool) {
	return around(b, "nginx/", 16, 16, matcher("nginx", nginxVersion))
}

func findApache(b []byte) (Server, bool) {
	return around(b, "\x00Apache/", 0, 16, matcher("apache", apacheServer))
}

func findNode(b []byte) (Server, bool) {
	return around(b, "\x00node.js/v", 0, 16, matcher("node", nodeVersion))
}

// findMongo finds the version that stands beside the git revision it was built
// from, both as strings of their own.
func findMongo(b []byte) (Server, bool) {
	for _, anchor := range []string{"mongodb-src-r", "db version v"} {
		if v, ok := around(b, anchor, 0, 16, matcher("mongodb", mongoPlain)); ok {
			return v, true
		}
	}
	for at := 0; ; {
		i := bytes.IndexByte(b[at:], '.')
		if i < 0 {
			return Server{}, false
		}
		i += at
		at = i + 1
		start := i
		for start > 0 && i-start < 2 && isDigit(b[start-1]) {
			start--
		}
		if start == i || start == 0 || b[start-1] != 0 {
			continue
		}
		end, dots := i, 0
		for end < len(b) && end-start < 10 && (isDigit(b[end]) || b[end] == '.') {
			if b[end] == '.' {
				dots++
			}
			end++
		}
		if dots != 2 || end >= len(b) || b[end] != 0 || !isDigit(b[end-1]) {
			continue
		}
		if mongoAfter.Match(b[end:min(len(b), end+64)]) || mongoBefore.Match(b[max(0, start-64):start]) {
			return server("mongodb", string(b[start:end])), true
		}
	}
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

var (
	tomcatNotes  = regexp.MustCompile(`Apache Tomcat Version (\d{1,2}\.\d{1,2}\.\d{1,3})\b`)
	tomcatInfo   = regexp.MustCompile(`(?m)^server\.info\s*=\s*Apache Tomcat/(\d{1,2}\.\d{1,2}\.\d{1,3})\s*$`)
	couchVersion = regexp.MustCompile(`\{\s*vsn\s*,\s*"(\d{1,2}\.\d{1,2}\.\d{1,3})`)
	couchName    = regexp.MustCompile(`\{\s*application\s*,\s*couch\s*,`)
	javaVersion  = regexp.MustCompile(`(?m)^JAVA_VERSION="?([0-9][0-9._]*)"?\s*$`)
	javaVendor   = regexp.MustCompile(`(?m)^IMPLEMENTOR="?([^"\r\n]*)"?\s*$`)
)

// FromText looks at a whole file of kind Text.
func FromText(name string, content []byte) (Server, bool) {
	switch path.Base(name) {
	case "RELEASE-NOTES":
		if m := tomcatNotes.FindSubmatch(content); m != nil {
			s := server("tomcat", string(m[1]))
			dir := path.Dir(name)
			s.Needs = []string{path.Join(dir, "lib/catalina.jar"), path.Join(dir, "bin/catalina.sh"), path.Join(dir, "bin/bootstrap.jar")}
			return s, true
		}
	case "ServerInfo.properties":
		if m := tomcatInfo.FindSubmatch(content); m != nil && strings.HasSuffix(name, "org/apache/catalina/util/ServerInfo.properties") {
			return server("tomcat", string(m[1])), true
		}
	case "couch.app":
		m := couchVersion.FindSubmatch(content)
		if m != nil && couchName.Match(content) {
			return server("couchdb", string(m[1])), true
		}
	case "release":
		m := javaVersion.FindSubmatch(content)
		if m == nil {
			return Server{}, false
		}
		s := Server{Name: "java", Version: bitnamiJava(string(m[1]))}
		if v := javaVendor.FindSubmatch(content); v != nil {
			s.Product = javaProduct(string(v[1]))
		}
		return s, true
	}
	return Server{}, false
}

// javaProduct maps the IMPLEMENTOR of a JDK's release file to endoflife.date's
// name; for other builds there is none.
func javaProduct(vendor string) string {
	switch {
	case strings.HasPrefix(vendor, "Eclipse"):
		return "eclipse-temurin"
	case strings.HasPrefix(vendor, "Oracle"):
		return "openjdk-builds-from-oracle"
	case strings.HasPrefix(vendor, "Amazon"):
		return "amazon-corretto"
	case strings.HasPrefix(vendor, "Azul"):
		return "azul-zulu"
	case strings.HasPrefix(vendor, "Microsoft"):
		return "microsoft-build-of-openjdk"
	case strings.HasPrefix(vendor, "Red Hat"):
		return "red-hat-build-of-openjdk"
	}
	return ""
}

// bitnamiJava writes a JDK's version as the Bitnami advisories do: "1.8.0_292"
// is "8.0.292" there, "17.0.8.1" is "17.0.8-1".
func bitnamiJava(v string) string {
	if rest, ok := strings.CutPrefix(v, "1."); ok {
		major, minor, _ := strings.Cut(rest, ".")
		minor, update, ok := strings.Cut(minor, "_")
		if !ok {
			return major + "." + minor
		}
		return major + "." + minor + "." + update
	}
	parts := strings.SplitN(v, ".", 4)
	if len(parts) == 4 {
		return strings.Join(parts[:3], ".") + "-" + parts[3]
	}
	return v
}

var (
	jenkinsVersion = regexp.MustCompile(`(?m)^Jenkins-Version:\s*(\d+(?:\.\d+){1,3})`)
	elasticVersion = regexp.MustCompile(`(?m)^X-Compile-Elasticsearch-Version:\s*(\d+\.\d+\.\d+)`)
)

// FromArchive looks into an archive of size bytes. An archive that cannot be
// read is an error.
func FromArchive(name string, r io.ReaderAt, size int64) (Server, bool, error) {
	z, err := zip.NewReader(r, size)
	if err != nil {
		return Server{}, false, fmt.Errorf("open archive: %w", err)
	}
	base := path.Base(name)
	switch {
	case base == "catalina.jar":
		content, err := member(z, "org/apache/catalina/util/ServerInfo.properties")
		if err != nil {
			return Server{}, false, err
		}
		if m := tomcatInfo.FindSubmatch(content); m != nil {
			return server("tomcat", string(m[1])), true, nil
		}
	case strings.HasSuffix(base, ".war"):
		content, err := member(z, "META-INF/MANIFEST.MF")
		if err != nil {
			return Server{}, false, err
		}
		if m := jenkinsVersion.FindSubmatch(content); m != nil {
			return server("jenkins", string(m[1])), true, nil
		}
	default:
		fromName := elastic.FindStringSubmatch(name)
		if fromName == nil {
			return Server{}, false, nil
		}
		content, err := member(z, "META-INF/MANIFEST.MF")
		if err != nil {
			return Server{}, false, err
		}
		version := fromName[1]
		if m := elasticVersion.FindSubmatch(content); m != nil {
			version = string(m[1])
		}
		s := server("elasticsearch", version)
		home := path.Dir(path.Dir(name))
		if !strings.HasPrefix(path.Base(home), "elasticsearch") {
			// Java programs carry this jar as a client, too.
			s.Needs = []string{path.Join(home, "bin/elasticsearch"), path.Join(home, "config/elasticsearch.yml"), path.Join(home, "modules") + "/"}
		}
		return s, true, nil
	}
	return Server{}, false, nil
}

// member reads a member of an archive; one that is not there is empty.
func member(z *zip.Reader, name string) ([]byte, error) {
	f, err := z.Open(name)
	if err != nil {
		return nil, nil //nolint:nilerr // not there: nothing is proven, which is no failure
	}
	content, err := io.ReadAll(io.LimitReader(f, maxMember))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return content, nil
}

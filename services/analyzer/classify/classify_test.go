package classify_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/services/analyzer/classify"
	lt "github.com/tidewaiter/tidewaiter/services/analyzer/layertest"
)

// scan gives an executable to a scanner in pieces of n bytes.
func scan(name string, content []byte, n int) string {
	s := classify.NewScanner(name)
	if s == nil {
		return "no scanner"
	}
	for len(content) > 0 {
		piece := content[:min(n, len(content))]
		if _, err := s.Write(piece); err != nil {
			return err.Error()
		}
		content = content[len(piece):]
	}
	v, ok := s.Server()
	if !ok {
		return ""
	}
	return v.PURL() + " " + v.Product
}

// The strings are as they stand in real builds of these versions.
func TestExecutables(t *testing.T) {
	cases := []struct{ name, content, want string }{
		{"opt/redis-server-2.8.19", "\x00Server started, Redis version 2.8.19\x00\x00", "pkg:bitnami/redis@2.8.19 redis"},
		{"usr/local/bin/redis-server", "\x00\x007.0.5buildkitsandbox-1663759200000000000\x00", "pkg:bitnami/redis@7.0.5 redis"},
		{"usr/local/bin/valkey-server", "\x008.0.1builder-1729000000000000000\x00", "pkg:bitnami/valkey@8.0.1 valkey"},
		{"usr/sbin/mysqld", "\x00\x02\x005.5.9\x00x86_64\x00Linux\x00%s  Ver %s for %s on %s (%s)\n\x00", "pkg:bitnami/mysql@5.5.9 mysql"},
		{"usr/sbin/mysqld", "\x00/builddir/mysql-8.0.33/sql/mysqld.cc\x00", "pkg:bitnami/mysql@8.0.33 mysql"},
		{"opt/bin/mysqld", "\x00-log\x0010.2.11-MariaDB\x00Got signal %d from thread %ld\x00", "pkg:bitnami/mariadb@10.2.11 mariadb"},
		{"usr/sbin/mariadbd", "\x00-log\x0011.4.2-MariaDB\x00 5.5.9\x00%s  Ver %s for %s on %s (%s)\n\x00", "pkg:bitnami/mariadb@11.4.2 mariadb"},
		{"usr/lib/postgresql/15/bin/postgres", "\x00PostgreSQL 15.18 (Debian 15.18-0+deb12u1) on x86_64-pc-linux-gnu, compiled by gcc\x00", "pkg:bitnami/postgresql@15.18 postgresql"},
		{"usr/local/bin/node", "[ \x00]\n\n\x00/json\x00node.js/v20.20.2\x00(delegate_) != nullptr\x00", "pkg:bitnami/node@20.20.2 nodejs"},
		{"usr/sbin/nginx", "\x00nginx version: nginx/1.24.0\x00", "pkg:bitnami/nginx@1.24.0 nginx"},
		{"usr/local/apache2/bin/httpd", "\x00Apache/2.4.57 (Unix)\x00", "pkg:bitnami/apache@2.4.57 apache-http-server"},
		{"usr/bin/mongod", "\x004.4.6\x0072e66213c2c3eab37d9358d5e78ad7f5c1d0d0d7\x00", "pkg:bitnami/mongodb@4.4.6 mongodb"},
		{"usr/bin/mongod", "\x0072e66213c2c3eab37d9358d5e78ad7f5c1d0d0d7\x00\x006.0.5\x00", "pkg:bitnami/mongodb@6.0.5 mongodb"},

		// What only mentions a version is no proof.
		{"usr/sbin/mysqld", "\x00client 5.5.9\x00 needs mysql-5.5.9 or later\x00", ""},
		{"usr/lib/postgresql/15/bin/postgres", "before upgrading to PostgreSQL 9.1.\x00Please REINDEX it.\x00", ""},
		{"usr/bin/mongod", "\x001.2.3\x00openssl\x00 3.0.2\x00", ""},
		{"usr/local/bin/node", "runs on node.js/v4.0.0 and newer", ""},
		{"usr/bin/redis-cli", "\x007.0.5buildkitsandbox-1663759200000000000\x00", "no scanner"},
		{"usr/bin/mysql", "\x0010.2.11-MariaDB\x00", "no scanner"},
		{"usr/lib/libmariadb.so.3", "\x0010.2.11-MariaDB\x00", "no scanner"},
	}
	for _, c := range cases {
		content := lt.ELF([]byte(strings.Repeat("\x00text", 1500) + c.content + strings.Repeat("\x00more", 1500)))
		for _, n := range []int{1 << 20, 4096, 1000, 257} {
			if got := scan(c.name, content, n); got != c.want {
				t.Errorf("%s %q in pieces of %d: got %q, want %q", c.name, c.content, n, got, c.want)
			}
		}
	}
}

func TestTexts(t *testing.T) {
	cases := []struct{ name, content, purl, product string }{
		{"opt/java/release", "IMPLEMENTOR=\"Eclipse Adoptium\"\nJAVA_VERSION=\"17.0.8\"\n", "pkg:bitnami/java@17.0.8", "eclipse-temurin"},
		{"opt/java/release", "JAVA_VERSION=\"1.8.0_292\"\nOS_NAME=\"Linux\"\n", "pkg:bitnami/java@8.0.292", ""},
		{"opt/java/release", "IMPLEMENTOR=\"Oracle Corporation\"\r\nJAVA_VERSION=\"17.0.8.1\"\r\n", "pkg:bitnami/java@17.0.8-1", "openjdk-builds-from-oracle"},
		{"etc/release", "VERSION=3\n", "", ""},
		{"opt/couchdb/lib/couch-3.1.1/ebin/couch.app", "{application,couch,\n [{description,\"Apache CouchDB\"},\n  {vsn,\"3.1.1\"},", "pkg:bitnami/couchdb@3.1.1", "apache-couchdb"},
		{"opt/x/lib/couch-3.1.1/ebin/couch.app", "{application,couch_client,[{vsn,\"3.1.1\"}", "", ""},
		{"opt/tomcat/RELEASE-NOTES", "                     Apache Tomcat Version 9.0.50\n", "pkg:bitnami/tomcat@9.0.50", "tomcat"},
		{"opt/x/RELEASE-NOTES", "Works with Tomcat 9.0.50\n", "", ""},
		{"x/org/apache/catalina/util/ServerInfo.properties", "server.info=Apache Tomcat/9.0.50\nserver.number=9.0.50.0\n", "pkg:bitnami/tomcat@9.0.50", "tomcat"},
	}
	for _, c := range cases {
		if c.purl != "" && classify.Wants(c.name) != classify.Text {
			t.Errorf("%s is not wanted", c.name)
		}
		s, ok := classify.FromText(c.name, []byte(c.content))
		if !ok && c.purl == "" {
			continue
		}
		if s.PURL() != c.purl || s.Product != c.product {
			t.Errorf("%s: got %s %q, want %s %q", c.name, s.PURL(), s.Product, c.purl, c.product)
		}
	}
}

func TestArchives(t *testing.T) {
	catalina := lt.Zip(map[string][]byte{"org/apache/catalina/util/ServerInfo.properties": []byte("server.info=Apache Tomcat/9.0.50\n")})
	war := lt.Zip(map[string][]byte{"META-INF/MANIFEST.MF": []byte("Manifest-Version: 1.0\r\nJenkins-Version: 2.319.1\r\n\r\n")})
	other := lt.Zip(map[string][]byte{"META-INF/MANIFEST.MF": []byte("Manifest-Version: 1.0\r\n\r\n")})
	cases := []struct {
		name    string
		content []byte
		purl    string
		needs   bool
	}{
		{"opt/tomcat/lib/catalina.jar", catalina, "pkg:bitnami/tomcat@9.0.50", false},
		{"usr/share/jenkins/jenkins.war", war, "pkg:bitnami/jenkins@2.319.1", false},
		{"opt/jenkins-war-2.319.1.war", war, "pkg:bitnami/jenkins@2.319.1", false},
		{"usr/share/jenkins/jenkins.war", other, "", false},
		{"usr/share/elasticsearch/lib/elasticsearch-7.10.0.jar", other, "pkg:bitnami/elasticsearch@7.10.0", false},
		{"app/lib/elasticsearch-7.10.0.jar", other, "pkg:bitnami/elasticsearch@7.10.0", true},
	}
	for _, c := range cases {
		if classify.Wants(c.name) != classify.Archive {
			t.Errorf("%s is not wanted", c.name)
		}
		s, ok, err := classify.FromArchive(c.name, bytes.NewReader(c.content), int64(len(c.content)))
		if err != nil || ok != (c.purl != "") || ok && s.PURL() != c.purl || (len(s.Needs) > 0) != c.needs {
			t.Errorf("%s: %+v, %v, %v", c.name, s, ok, err)
		}
	}
	for _, name := range []string{"app/app.war", "app/lib/elasticsearch-rest-client-7.10.0.jar", "a/elasticsearch-7.10.0.jar"} {
		if k := classify.Wants(name); k != classify.None {
			t.Errorf("%s is wanted as %v", name, k)
		}
	}
}

func FuzzScanner(f *testing.F) {
	f.Add("mysqld", []byte("\x7fELF\x005.5.9\x00%s  Ver %s for %s on %s (%s)\n\x0010.2.11-MariaDB\x00"), 100)
	f.Add("mongod", []byte("\x004.4.6\x0072e66213c2c3eab37d9358d5e78ad7f5c1d0d0d7\x00"), 7)
	f.Add("redis-server", []byte("\x007.0.5host-1663759200000000000\x00"), 3)
	f.Fuzz(func(t *testing.T, name string, content []byte, n int) {
		if n < 1 {
			n = 1
		}
		if got := scan(name, content, n); strings.ContainsAny(got, "\x00\n") {
			t.Errorf("%q", got)
		}
	})
}

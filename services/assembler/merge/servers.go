package merge

import (
	"path"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// owners names, for each product of server software, the distribution packages
// that install it, as patterns of path.Match. What vendors pack themselves
// under names of their own (mysql-community-server, mongodb-org, jenkins,
// elasticsearch, couchdb) is absent on purpose: no distribution's advisories
// speak for them, the product's own do.
var owners = map[string][]string{
	"apache":     {"apache2", "apache2-bin", "httpd", "httpd-core"},
	"mariadb":    {"mariadb", "mariadb-server", "mariadb-server-*"},
	"mongodb":    {"mongodb", "mongodb-server", "mongodb-server-core"},
	"mysql":      {"mysql", "mysql-server", "mysql-server-[58]*", "mysql-server-core-*", "mysql[58]*-server"},
	"nginx":      {"nginx", "nginx-*"},
	"nodejs":     {"nodejs", "nodejs-current", "nodejs[0-9]*", "node"},
	"openjdk":    {"openjdk*", "java-*-openjdk*"},
	"postgresql": {"postgresql", "postgresql-server", "postgresql-[0-9]*", "postgresql[0-9]*"},
	"redis":      {"redis", "redis-server", "redis[0-9]*"},
	"tomcat":     {"tomcat", "tomcat[0-9]*", "libtomcat[0-9]*"},
	"valkey":     {"valkey", "valkey-server"},
}

// aliases are other names of the same products: endoflife.date's, Bitnami's
// and those of the software itself.
var aliases = map[string]string{
	"apache-http-server": "apache",
	"mariadb-server":     "mariadb", "mongo": "mongodb", "mongod": "mongodb", "mysql-server": "mysql", "mysqld": "mysql",
	"node": "nodejs", "node.js": "nodejs", "java": "openjdk", "jre": "openjdk", "jdk": "openjdk",
	"openjdk-builds-from-oracle": "openjdk", "oracle-jdk": "openjdk", "postgres": "postgresql",
	"apache-tomcat": "tomcat", "redis-server": "redis",
}

// packagedUnder are the directories into which distributions install; software
// below /usr/local, /opt or /srv was put there by hand.
var packagedUnder = []string{"usr/bin/", "usr/sbin/", "usr/lib/", "usr/lib64/", "usr/libexec/", "usr/share/", "usr/pgsql-", "bin/", "sbin/", "lib/", "lib64/"}

// dropOwned leaves out server software that a system package installed: the
// package is what the distribution's advisories and updates speak of. Layer
// reports do not say which package owns a file, so a package of the product's
// name and a path into which distributions install decide. Paths elsewhere
// (a second nginx in /usr/local) stay.
func dropOwned(language, system []contracts.Package) []contracts.Package {
	return slices.DeleteFunc(language, func(p contracts.Package) bool {
		if !p.Server || !owned(p, system) {
			return false
		}
		return !slices.ContainsFunc(p.Paths, func(at string) bool { return !underAny(file(at), packagedUnder) })
	})
}

func owned(server contracts.Package, system []contracts.Package) bool {
	patterns := ownersOf(server.Product)
	if patterns == nil {
		patterns = ownersOf(server.Name)
	}
	return slices.ContainsFunc(system, func(p contracts.Package) bool {
		return slices.ContainsFunc(patterns, func(pattern string) bool {
			ok, err := path.Match(pattern, p.Name)
			return err == nil && ok
		})
	})
}

func ownersOf(product string) []string {
	product = strings.ToLower(product)
	if other, ok := aliases[product]; ok {
		product = other
	}
	return owners[product]
}

func underAny(p string, folders []string) bool {
	return slices.ContainsFunc(folders, func(folder string) bool { return strings.HasPrefix(p, folder) })
}

package sample

import (
	"fmt"
	"slices"
)

// Redis returns a redis-server executable that says its version as the real
// one does when it starts.
func Redis(version string) File {
	return File{
		Path: "usr/local/bin/redis-server", Mode: 0o755,
		Body: ELF(Section{".rodata", []byte("\x00Server started, Redis version " + version + "\x00redis-server\x00")}),
	}
}

// MySQL returns a mysqld executable of the given version.
func MySQL(version string) File {
	return File{
		Path: "usr/local/mysql/bin/mysqld", Mode: 0o755,
		Body: ELF(Section{".rodata", []byte("\x00/build/mysql-" + version + "/sql/mysqld.cc\x00%s  Ver %s for %s on %s (%s)\n\x00" + version + "-log\x00")}),
	}
}

// CouchDB returns the Erlang application that names CouchDB's version.
func CouchDB(version string) File {
	return file("opt/couchdb/lib/couch-"+version+"/ebin/couch.app",
		"{application,couch,[", ` {description,"Apache CouchDB"},`, ` {vsn,"`+version+`"}`, "]}.")
}

// Tomcat returns Tomcat's own library, which names the server's version.
func Tomcat(version string) (File, error) {
	jar, err := Zip([]File{
		file("META-INF/MANIFEST.MF", "Manifest-Version: 1.0", "Implementation-Title: Apache Tomcat", "Implementation-Version: "+version, ""),
		file("org/apache/catalina/util/ServerInfo.properties", "server.info=Apache Tomcat/"+version, "server.number="+version+".0"),
	})
	return File{Path: "usr/local/tomcat/lib/catalina.jar", Body: jar}, err
}

// Jenkins returns Jenkins' war, whose manifest names its version.
func Jenkins(version string) (File, error) {
	war, err := Zip([]File{file("META-INF/MANIFEST.MF", "Manifest-Version: 1.0", "Main-Class: executable.Main", "Jenkins-Version: "+version, "")})
	return File{Path: "usr/share/jenkins/jenkins.war", Body: war}, err
}

// Elasticsearch returns Elasticsearch's own library, whose manifest names its version.
func Elasticsearch(version string) (File, error) {
	jar, err := Zip([]File{file("META-INF/MANIFEST.MF", "Manifest-Version: 1.0", "X-Compile-Elasticsearch-Version: "+version, "")})
	return File{Path: "usr/share/elasticsearch/lib/elasticsearch-" + version + ".jar", Body: jar}, err
}

// Story holds the images of the demo.
type Story struct {
	Vulnerable []Image // two platforms, everything old
	Sharing    []Image // the vulnerable base with one new layer
	Clean      []Image // everything mended
	Unattested []Image // pushed where nobody looks
}

// NewStory builds the demo's images. executable is a Go program, which goes
// into the vulnerable image as it is.
func NewStory(executable []byte) (Story, error) {
	b := builder{}
	base := b.layer("ADD debian-12-minbase.tar / # buildkit", Debian(12)...)
	servers := b.layer("COPY --from=servers / / # buildkit",
		Redis("2.8.19"), MySQL("5.5.9"), CouchDB("3.1.1"), b.file(Tomcat("9.0.50")), b.file(Jenkins("2.319.1")), b.file(Elasticsearch("7.10.0")))
	npm := b.layer("RUN npm ci --omit=dev # buildkit",
		NPM("app", "lodash", "4.17.4"), NPM("app", "minimist", "0.0.8"), NPM("app", "express", "4.21.2"), NPM("app", "left-pad", "1.3.0"))
	python := b.layer("RUN pip install Django==2.2 requests==2.32.4 # buildkit", append(Wheel("Django", "2.2"), Wheel("requests", "2.32.4")...)...)
	jar := b.layer("COPY target/app.jar /app/app.jar # buildkit", File{Path: "app/app.jar", Body: b.application("2.14.1")})
	tools := b.layer("COPY --from=build /out/ /usr/local/bin/ # buildkit",
		File{Path: "usr/local/bin/tidewaiter", Mode: 0o755, Body: executable},
		File{Path: "usr/local/bin/gateway", Mode: 0o755, Body: GoBinary("go1.17.5", "example.com/gateway",
			GoModule{"golang.org/x/text", "v0.3.5"}, GoModule{"golang.org/x/crypto", "v0.0.0-20210220033148-5ea612d1eb83"})})
	remove := b.layer("RUN npm uninstall minimist # buildkit", Whiteout("app/node_modules/minimist"))
	amd64 := []Layer{base, servers, npm, python, jar, tools, remove}
	arm64 := []Layer{base, npm, python, jar, remove}

	extra := b.layer("COPY reports/ /app/reports/ # buildkit", append(Wheel("PyYAML", "5.3"), file("app/reports/index.html", "<h1>reports</h1>"))...)

	cleanBase := b.layer("ADD debian-13-minbase.tar / # buildkit", Debian(13)...)
	cleanApp := b.layer("COPY app/ /app/ # buildkit",
		NPM("app", "lodash", "4.17.21"), NPM("app", "left-pad", "1.3.0"),
		File{Path: "app/app.jar", Body: b.application("2.24.3")})
	stranger := b.layer("COPY stranger/ /app/ # buildkit", NPM("app", "lodash", "4.17.21"), file("app/README", "never scanned"))
	if b.err != nil {
		return Story{}, fmt.Errorf("build sample images: %w", b.err)
	}
	return Story{
		Vulnerable: []Image{{Platform: AMD64, Layers: amd64}, {Platform: ARM64, Layers: arm64}},
		Sharing:    []Image{{Platform: AMD64, Layers: append(slices.Clone(amd64), extra)}},
		Clean:      []Image{{Platform: AMD64, Layers: []Layer{cleanBase, cleanApp}}},
		Unattested: []Image{{Platform: AMD64, Layers: []Layer{cleanBase, stranger}}},
	}, nil
}

// builder keeps the first error, so that content reads as a list.
type builder struct{ err error }

func (b *builder) layer(instruction string, files ...File) Layer {
	if b.err != nil {
		return Layer{}
	}
	l, err := NewLayer(instruction, files...)
	b.err = err
	return l
}

func (b *builder) file(f File, err error) File {
	if b.err == nil {
		b.err = err
	}
	return f
}

// application is a Spring Boot jar: jars inside a jar.
func (b *builder) application(log4j string) []byte {
	core := b.jar("org.apache.logging.log4j", "log4j-core", log4j, nil)
	api := b.jar("org.apache.logging.log4j", "log4j-api", log4j, nil)
	return b.jar("com.example", "app", "1.0.0", map[string][]byte{
		"BOOT-INF/lib/log4j-core-" + log4j + ".jar": core,
		"BOOT-INF/lib/log4j-api-" + log4j + ".jar":  api,
	})
}

func (b *builder) jar(group, artifact, version string, inside map[string][]byte) []byte {
	if b.err != nil {
		return nil
	}
	body, err := Jar(group, artifact, version, inside)
	b.err = err
	return body
}

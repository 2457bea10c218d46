package merge

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// digest returns a digest made of one repeated hexadecimal character.
func digest(c string) string { return "sha256:" + strings.Repeat(c, 64) }

// image returns a plan over layers with the digests 0…, and their reports.
func image(layers ...contracts.LayerReport) (contracts.ImagePlanned, map[string]*contracts.LayerReport) {
	p := contracts.ImagePlanned{
		Image:     contracts.Image{Registry: "r.example", Repository: "a/b", Digest: digest("e")},
		Kind:      contracts.KindImage,
		MediaType: "application/vnd.oci.image.manifest.v1+json",
		Platform:  &contracts.Platform{OS: "linux", Architecture: "amd64"},
	}
	reports := map[string]*contracts.LayerReport{}
	for i, l := range layers {
		l.Analyzer = "1"
		l.Digest = digest(string("0123456789"[i]))
		p.Layers = append(p.Layers, contracts.PlannedLayer{Digest: l.Digest, Instruction: "RUN step " + string("0123456789"[i])})
		reports[l.Digest] = &l
	}
	return p, reports
}

func npm(name, version string, paths ...string) contracts.LayerPackage {
	return contracts.LayerPackage{Type: "npm", Name: name, Version: version, PURL: "pkg:npm/" + name + "@" + version, Ecosystem: "npm", Paths: paths}
}

func dpkg(packages ...contracts.SystemPackage) contracts.PackageDatabase {
	return contracts.PackageDatabase{Kind: "dpkg", Path: "var/lib/dpkg/status", Packages: packages}
}

func deb(name, version string) contracts.SystemPackage {
	return contracts.SystemPackage{Name: name, Version: version, Arch: "amd64"}
}

var bookworm = &contracts.OSRelease{Path: "usr/lib/os-release", ID: "debian", VersionID: "12", Codename: "bookworm"}

// listed returns "purl layer paths" of each package.
func listed(inv *contracts.Inventory) []string {
	var out []string
	for _, p := range inv.Packages {
		out = append(out, p.PURL+" "+string("0123456789"[p.Layer.Index])+" "+strings.Join(p.Paths, ","))
	}
	return out
}

func check(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		g, _ := json.MarshalIndent(got, "", " ")
		w, _ := json.MarshalIndent(want, "", " ")
		t.Errorf("%s:\n got %s\nwant %s", what, g, w)
	}
}

func TestWhatLayersHide(t *testing.T) {
	base := contracts.LayerReport{Packages: []contracts.LayerPackage{
		npm("a", "1.0.0", "app/node_modules/a/package.json"),
		npm("b", "1.0.0", "app/node_modules/b/package.json"),
		npm("c", "1.0.0", "srv/x.jar!/inner/c.jar"),
	}}
	tests := []struct {
		name  string
		upper contracts.LayerReport
		want  []string
	}{
		{"nothing", contracts.LayerReport{}, []string{
			"pkg:npm/a@1.0.0 0 app/node_modules/a/package.json", "pkg:npm/b@1.0.0 0 app/node_modules/b/package.json", "pkg:npm/c@1.0.0 0 srv/x.jar!/inner/c.jar",
		}},
		{"a file is removed", contracts.LayerReport{Whiteouts: []string{"app/node_modules/a/package.json"}}, []string{
			"pkg:npm/b@1.0.0 0 app/node_modules/b/package.json", "pkg:npm/c@1.0.0 0 srv/x.jar!/inner/c.jar",
		}},
		{"a folder is removed", contracts.LayerReport{Whiteouts: []string{"/app/node_modules"}}, []string{"pkg:npm/c@1.0.0 0 srv/x.jar!/inner/c.jar"}},
		{"a neighbour by name is not", contracts.LayerReport{Whiteouts: []string{"app/node_modules/a/package.jso", "sr", "app/node"}}, []string{
			"pkg:npm/a@1.0.0 0 app/node_modules/a/package.json", "pkg:npm/b@1.0.0 0 app/node_modules/b/package.json", "pkg:npm/c@1.0.0 0 srv/x.jar!/inner/c.jar",
		}},
		{"a folder is opaque", contracts.LayerReport{
			Opaque:   []string{"app"},
			Packages: []contracts.LayerPackage{npm("d", "2.0.0", "app/node_modules/d/package.json")},
		}, []string{"pkg:npm/c@1.0.0 0 srv/x.jar!/inner/c.jar", "pkg:npm/d@2.0.0 1 app/node_modules/d/package.json"}},
		{"the root is opaque", contracts.LayerReport{Opaque: []string{"/"}}, nil},
		{"an archive is overwritten", contracts.LayerReport{Replaced: []string{"srv/x.jar"}}, []string{
			"pkg:npm/a@1.0.0 0 app/node_modules/a/package.json", "pkg:npm/b@1.0.0 0 app/node_modules/b/package.json",
		}},
		{"a file stands where a folder was", contracts.LayerReport{Replaced: []string{"app"}}, []string{"pkg:npm/c@1.0.0 0 srv/x.jar!/inner/c.jar"}},
		{"a folder stands where a file was", contracts.LayerReport{Replaced: []string{"srv/x.jar/y/package.json"}}, []string{
			"pkg:npm/a@1.0.0 0 app/node_modules/a/package.json", "pkg:npm/b@1.0.0 0 app/node_modules/b/package.json",
		}},
		{"a whiteout spares its own layer", contracts.LayerReport{
			Whiteouts: []string{"app"},
			Packages:  []contracts.LayerPackage{npm("a", "1.0.0", "app/node_modules/a/package.json")},
		}, []string{"pkg:npm/a@1.0.0 1 app/node_modules/a/package.json", "pkg:npm/c@1.0.0 0 srv/x.jar!/inner/c.jar"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			check(t, "packages", listed(Image(image(base, tt.upper))), tt.want)
		})
	}
}

func TestSamePackageTwiceIsOne(t *testing.T) {
	inv := Image(image(
		contracts.LayerReport{Packages: []contracts.LayerPackage{npm("a", "1.0.0", "x/package-lock.json"), npm("a", "1.0.0", "x/node_modules/a/package.json")}},
		contracts.LayerReport{Packages: []contracts.LayerPackage{npm("a", "1.0.0", "opt/a/package.json")}},
	))
	check(t, "packages", listed(inv), []string{"pkg:npm/a@1.0.0 0 opt/a/package.json,x/node_modules/a/package.json,x/package-lock.json"})
	check(t, "layer", inv.Packages[0].Layer, &contracts.LayerRef{Index: 0, Digest: digest("0"), Instruction: "RUN step 0"})
}

func TestHiddenLockOfDeletedPackages(t *testing.T) {
	const lock = "app/node_modules/.package-lock.json"
	install := contracts.LayerReport{Packages: []contracts.LayerPackage{
		npm("a", "1.0.0", lock, "app/node_modules/a/package.json"), npm("b", "1.0.0", lock), npm("@s/c", "1.0.0", lock),
	}}
	tests := []struct {
		name    string
		deleted []string
		want    []string
	}{
		{"nothing deleted", nil, []string{"pkg:npm/@s/c@1.0.0 0 " + lock, "pkg:npm/a@1.0.0 0 " + lock + ",app/node_modules/a/package.json", "pkg:npm/b@1.0.0 0 " + lock}},
		{"one with files deleted", []string{"app/node_modules/a"}, []string{"pkg:npm/@s/c@1.0.0 0 " + lock, "pkg:npm/b@1.0.0 0 " + lock}},
		{"one without files deleted", []string{"app/node_modules/b", "app/node_modules/@s"}, []string{"pkg:npm/a@1.0.0 0 " + lock + ",app/node_modules/a/package.json"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			check(t, "packages", listed(Image(image(install, contracts.LayerReport{Whiteouts: tt.deleted}))), tt.want)
		})
	}
}

func TestDatabasesReplaceEachOther(t *testing.T) {
	inv := Image(image(
		contracts.LayerReport{OSRelease: bookworm, Databases: []contracts.PackageDatabase{dpkg(deb("bash", "5.2.15-2"), deb("curl", "7.88.1-10"), deb("zlib1g", "1:1.2.13"))}},
		contracts.LayerReport{Databases: []contracts.PackageDatabase{dpkg(deb("bash", "5.2.15-2"), deb("curl", "7.88.1-10+deb12u5"), deb("vim", "9"))}},
		contracts.LayerReport{},
		contracts.LayerReport{Databases: []contracts.PackageDatabase{dpkg(deb("bash", "5.2.15-2"), deb("curl", "7.88.1-10"), deb("zlib1g", "1:1.2.13"))}},
	))
	const db = "var/lib/dpkg/status"
	check(t, "packages", listed(inv), []string{
		"pkg:deb/debian/bash@5.2.15-2?arch=amd64&distro=debian-12 0 " + db,  // in every copy
		"pkg:deb/debian/curl@7.88.1-10?arch=amd64&distro=debian-12 3 " + db, // downgraded to what it was: the last layer did that
		"pkg:deb/debian/zlib1g@1:1.2.13?arch=amd64&distro=debian-12 3 " + db,
	})
	check(t, "ecosystem", inv.Packages[0].Ecosystem, "Debian:12")
	check(t, "os", inv.OS, bookworm)

	gone := Image(image(
		contracts.LayerReport{OSRelease: bookworm, Databases: []contracts.PackageDatabase{dpkg(deb("bash", "5"))}},
		contracts.LayerReport{Whiteouts: []string{"var/lib/dpkg"}},
	))
	check(t, "packages of a deleted database", gone.Packages, []contracts.Package(nil))

	emptied := Image(image(
		contracts.LayerReport{OSRelease: bookworm, Databases: []contracts.PackageDatabase{dpkg(deb("bash", "5"))}},
		contracts.LayerReport{Databases: []contracts.PackageDatabase{dpkg()}},
	))
	check(t, "packages of an emptied database", emptied.Packages, []contracts.Package(nil))
}

func TestEcosystems(t *testing.T) {
	pkg := contracts.SystemPackage{Name: "libstdc++6", Version: "1:12.2.0-14", Arch: "amd64"}
	tests := []struct {
		kind      string
		os        *contracts.OSRelease
		ecosystem string
		purl      string
	}{
		{"dpkg", bookworm, "Debian:12", "pkg:deb/debian/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=debian-12"},
		{"dpkg", &contracts.OSRelease{ID: "debian", VersionID: "12.4"}, "Debian:12", "pkg:deb/debian/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=debian-12.4"},
		{"dpkg", &contracts.OSRelease{ID: "debian", Codename: "trixie"}, "Debian:13", "pkg:deb/debian/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=debian-trixie"},
		{"dpkg", &contracts.OSRelease{ID: "debian", Codename: "sid"}, "", "pkg:deb/debian/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=debian-sid"},
		{"dpkg", &contracts.OSRelease{ID: "ubuntu", VersionID: "22.04"}, "Ubuntu:22.04:LTS", "pkg:deb/ubuntu/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=ubuntu-22.04"},
		{"dpkg", &contracts.OSRelease{ID: "ubuntu", VersionID: "23.10"}, "Ubuntu:23.10", "pkg:deb/ubuntu/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=ubuntu-23.10"},
		{"dpkg", &contracts.OSRelease{ID: "ubuntu", VersionID: "25.04"}, "Ubuntu:25.04", "pkg:deb/ubuntu/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=ubuntu-25.04"},
		{"dpkg", &contracts.OSRelease{ID: "pop", IDLike: "ubuntu debian", VersionID: "22.04", Codename: "jammy"}, "Ubuntu:22.04:LTS", "pkg:deb/pop/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=pop-22.04"},
		{"dpkg", &contracts.OSRelease{ID: "raspbian", IDLike: "debian", VersionID: "12", Codename: "bookworm"}, "Debian:12", "pkg:deb/raspbian/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=raspbian-12"},
		{"dpkg", &contracts.OSRelease{ID: "kali", IDLike: "debian", VersionID: "2024.1", Codename: "kali-rolling"}, "", "pkg:deb/kali/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=kali-2024.1"},
		{"apk", &contracts.OSRelease{ID: "alpine", VersionID: "3.18.4"}, "Alpine:v3.18", "pkg:apk/alpine/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=alpine-3.18.4"},
		{"apk", &contracts.OSRelease{ID: "alpine", VersionID: "3.22_alpha20250108"}, "", "pkg:apk/alpine/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=alpine-3.22_alpha20250108"},
		{"apk", &contracts.OSRelease{ID: "wolfi", VersionID: "20230201"}, "Wolfi", "pkg:apk/wolfi/libstdc%2B%2B6@1:12.2.0-14?arch=amd64&distro=wolfi-20230201"},
		{"rpm", &contracts.OSRelease{ID: "almalinux", VersionID: "9.3"}, "AlmaLinux:9", "pkg:rpm/almalinux/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=almalinux-9.3&epoch=1"},
		{"rpm", &contracts.OSRelease{ID: "rocky", VersionID: "9.3"}, "Rocky Linux:9", "pkg:rpm/rocky/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=rocky-9.3&epoch=1"},
		{"rpm", &contracts.OSRelease{ID: "rhel", VersionID: "9.3"}, "Red Hat:enterprise_linux:9", "pkg:rpm/redhat/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=rhel-9.3&epoch=1"},
		{"rpm", &contracts.OSRelease{ID: "opensuse-leap", VersionID: "15.5"}, "openSUSE:Leap 15.5", "pkg:rpm/opensuse/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=opensuse-leap-15.5&epoch=1"},
		{"rpm", &contracts.OSRelease{ID: "sles", VersionID: "15.5"}, "SUSE:Linux Enterprise Server 15 SP5", "pkg:rpm/sles/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=sles-15.5&epoch=1"},
		{"rpm", &contracts.OSRelease{ID: "fedora", VersionID: "40"}, "", "pkg:rpm/fedora/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=fedora-40&epoch=1"},
		{"dpkg", nil, "", "pkg:deb/libstdc%2B%2B6@1:12.2.0-14?arch=amd64"},
	}
	for _, tt := range tests {
		inv := Image(image(contracts.LayerReport{OSRelease: tt.os, Databases: []contracts.PackageDatabase{{Kind: tt.kind, Path: "db", Packages: []contracts.SystemPackage{pkg}}}}))
		if len(inv.Packages) != 1 || inv.Packages[0].Ecosystem != tt.ecosystem || inv.Packages[0].PURL != tt.purl {
			t.Errorf("%s %+v: got %+v, want %s %s", tt.kind, tt.os, inv.Packages, tt.ecosystem, tt.purl)
		}
		if (tt.ecosystem == "") != (len(inv.Gaps) == 1) {
			t.Errorf("%s %+v: gaps %+v", tt.kind, tt.os, inv.Gaps)
		}
	}
	inv := Image(image(contracts.LayerReport{Databases: []contracts.PackageDatabase{dpkg(pkg)}}))
	check(t, "gaps without os-release", inv.Gaps, []contracts.Gap{{Path: "var/lib/dpkg/status", Reason: "no os-release: packages of dpkg cannot be matched"}})
}

func TestOSReleaseOfUpperLayers(t *testing.T) {
	etc := &contracts.OSRelease{Path: "etc/os-release", ID: "debian", VersionID: "11"}
	check(t, "upper wins", Image(image(contracts.LayerReport{OSRelease: etc}, contracts.LayerReport{OSRelease: bookworm})).OS, bookworm)
	check(t, "deleted", Image(image(contracts.LayerReport{OSRelease: etc}, contracts.LayerReport{OSRelease: bookworm}, contracts.LayerReport{Whiteouts: []string{"usr/lib/os-release"}})).OS, etc)
	check(t, "overwritten by what cannot be read", Image(image(contracts.LayerReport{OSRelease: etc}, contracts.LayerReport{Replaced: []string{"etc/os-release"}})).OS, (*contracts.OSRelease)(nil))
}

func TestServersOfPackageManagers(t *testing.T) {
	nginx := contracts.LayerPackage{Type: "bitnami", Name: "nginx", Version: "1.22.1", PURL: "pkg:bitnami/nginx@1.22.1", Ecosystem: "Bitnami", Server: true, Product: "nginx", Paths: []string{"usr/sbin/nginx"}}
	local := nginx
	local.Paths = []string{"usr/local/nginx/sbin/nginx"}
	mysqld := contracts.LayerPackage{Type: "bitnami", Name: "mysql", Version: "8.0.30", PURL: "pkg:bitnami/mysql@8.0.30", Ecosystem: "Bitnami", Server: true, Product: "mysql", Paths: []string{"usr/sbin/mysqld"}}
	tests := []struct {
		name   string
		server contracts.LayerPackage
		dpkg   contracts.SystemPackage
		want   int
	}{
		{"owned", nginx, deb("nginx", "1.22.1-9"), 1},
		{"owned by a flavour", nginx, deb("nginx-light", "1.22.1-9"), 1},
		{"beside the package manager", local, deb("nginx", "1.22.1-9"), 2},
		{"nothing of that name", nginx, deb("bash", "5"), 2},
		{"only the client is packaged", mysqld, deb("mysql-client", "8.0.30"), 2},
		{"packed by the vendor", mysqld, deb("mysql-community-server", "8.0.30"), 2},
		{"packed by the distribution", mysqld, deb("mysql-server-8.0", "8.0.30"), 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inv := Image(image(contracts.LayerReport{OSRelease: bookworm, Databases: []contracts.PackageDatabase{dpkg(tt.dpkg)}, Packages: []contracts.LayerPackage{tt.server}}))
			if len(inv.Packages) != tt.want {
				t.Errorf("got %v, want %d packages", listed(inv), tt.want)
			}
		})
	}
}

func TestGaps(t *testing.T) {
	plan, reports := image(
		contracts.LayerReport{DiffID: digest("a"), Gaps: []contracts.Gap{{Path: "x.zip", Reason: "limit: nesting"}}},
		contracts.LayerReport{}, contracts.LayerReport{}, contracts.LayerReport{DiffID: digest("d")},
	)
	plan.Layers[0].DiffID = digest("b")
	plan.Layers[1].Missing = "foreign layer"
	delete(reports, plan.Layers[2].Digest)
	inv := Image(plan, reports)
	check(t, "gaps", inv.Gaps, []contracts.Gap{
		{Layer: digest("0"), Reason: "diffid-mismatch: the config promises " + digest("b") + ", the layer holds " + digest("a")},
		{Layer: digest("0"), Path: "x.zip", Reason: "limit: nesting"},
		{Layer: digest("1"), Reason: "layer not analysed: foreign layer"},
		{Layer: digest("2"), Reason: "layer not analysed: no report"},
	})
	check(t, "diff id of the report", inv.Layers[3].DiffID, digest("d"))
	check(t, "report untouched", reports[digest("0")].Gaps[0].Layer, "")
}

func TestIndex(t *testing.T) {
	plan := contracts.ImagePlanned{
		Image: contracts.Image{Digest: digest("f")}, Kind: contracts.KindIndex, MediaType: "application/vnd.oci.image.index.v1+json",
		Parts: []contracts.PlannedPart{
			{Digest: digest("1"), Platform: &contracts.Platform{OS: "linux", Architecture: "arm64"}},
			{Digest: digest("2"), Platform: &contracts.Platform{OS: "linux", Architecture: "amd64"}},
			{Digest: digest("3"), Skipped: "attestation"},
			{Digest: digest("4"), Platform: &contracts.Platform{OS: "windows", Architecture: "amd64"}, Skipped: "platform not selected", Gap: true},
			{Digest: digest("5"), Platform: &contracts.Platform{OS: "linux", Architecture: "s390x"}},
		},
	}
	arm := contracts.InventoryPart{Digest: digest("1"), Platform: plan.Parts[0].Platform, Inventory: digest("a"), Packages: 3}
	amd := contracts.InventoryPart{Digest: digest("2"), Platform: plan.Parts[1].Platform, Inventory: digest("b"), Packages: 4}
	inv := Index(plan, []contracts.InventoryPart{arm, amd}, []contracts.Gap{{Layer: digest("5"), Path: "linux/s390x", Reason: "part failed: not found"}})
	check(t, "index", inv, &contracts.Inventory{
		Digest: digest("f"), Kind: contracts.KindIndex, MediaType: plan.MediaType, Parts: []contracts.InventoryPart{amd, arm},
		Gaps: []contracts.Gap{
			{Layer: digest("4"), Path: "windows/amd64", Reason: "part not scanned: platform not selected"},
			{Layer: digest("5"), Path: "linux/s390x", Reason: "part failed: not found"},
		},
	})
}

func TestCompareVersions(t *testing.T) {
	got := []string{"dev", "10", "2", "1"}
	slices.SortFunc(got, CompareVersions)
	check(t, "order", got, []string{"1", "2", "10", "dev"})
}

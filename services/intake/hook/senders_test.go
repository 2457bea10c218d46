package hook_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// call is one call of a sender, written by us.
type call struct {
	kind   string
	header http.Header
	body   string
	req    hook.Request // PathMapping, RepositoryKey, Registry
	want   []want
}

func header(pairs ...string) http.Header {
	h := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		h.Set(pairs[i], pairs[i+1])
	}
	return h
}

func form(payload string) string { return url.Values{"payload": {payload}}.Encode() }

var formHeader = []string{"Content-Type", "application/x-www-form-urlencoded; charset=utf-8"}

func decode(t testing.TB, c call) []hook.Event {
	t.Helper()
	req := c.req
	req.Header, req.Body = c.header, []byte(c.body)
	events, err := hook.Decode(c.kind, req)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// harbor returns a call in Harbor's Default format.
func harbor(typ, resource string) string {
	return `{"type":"` + typ + `","occur_at":1700000000,"operator":"ann","event_data":{"resources":[` + resource + `],
		"repository":{"name":"api","namespace":"shop","repo_full_name":"shop/api","repo_type":"private"}}}`
}

func harborResource(tag, joint string) string {
	return `{"digest":"` + digestA + `","tag":"` + tag + `","resource_url":"harbor.shop.example:8443/shop/api` + joint + tag + `"}`
}

// hub returns a call of Docker Hub.
func hub(pushData, repository string) string {
	return `{"callback_url":"https://hub.invalid/callback","push_data":{` + pushData + `},"repository":{` + repository + `}}`
}

// gitHub returns a call about a container.
func gitHub(action, version, more string) string {
	return `{"action":"` + action + `","package":{"name":"Api","namespace":"Shop","ecosystem":"CONTAINER","package_type":"CONTAINER",
		"package_version":{"version":"` + version + `","body":{"any":"thing"},"updated_at":"2026-03-04T05:06:07Z"` + more + `}},"sender":{"login":"ann"}}`
}

// gitHubImage returns the container metadata of a version.
func gitHubImage(tag, tagDigest, mediaType, config string, layers ...string) string {
	var out []string
	for _, l := range layers {
		out = append(out, `{"media_type":"`+l+`"}`)
	}
	return `,"container_metadata":{"tag":{"name":"` + tag + `","digest":"` + tagDigest + `"},"manifest":{"digest":"` + digestA +
		`","media_type":"` + mediaType + `","config":{"media_type":"` + config + `"},"layers":[` + strings.Join(out, ",") + `]}}`
}

func gitea(action, typ, version string) string {
	return `{"action":"` + action + `","package":{"owner":{"login":"Shop"},"type":"` + typ + `","name":"Web/Api","version":"` + version + `",
		"html_url":"https://git.shop.example:3000/Shop/-/packages/container/web/1","created_at":"2026-03-04T05:06:07Z"},"sender":{"login":"ann"}}`
}

func acr(action, target string) string {
	return `{"id":"a1","timestamp":"2026-03-04T05:06:07.123Z","action":"` + action + `","target":{` + target + `},"request":{"host":"shop.azurecr.io"}}`
}

// grid returns an event of Event Grid in its own schema.
func grid(typ, data string) string {
	return `{"id":"g1","topic":"/x","subject":"y","eventType":"` + typ + `","eventTime":"2026-03-04T05:06:07Z","data":` + data + `,"dataVersion":"1.0"}`
}

func artifactory(domain, event, data string) string {
	return `{"domain":"` + domain + `","event_type":"` + event + `","data":{"repo_key":"docker-local",` + data +
		`},"jpd_origin":"https://shop.jfrog.example:8443/artifactory","source":"jfrog/ann"}`
}

func nexus(action, what, name, version string) string {
	return `{"timestamp":"2026-03-04T05:06:07.008+0100","initiator":"ann/10.0.0.1","repositoryName":"docker-hosted","action":"` + action + `",
		"` + what + `":{"format":"docker","name":"` + name + `","version":"` + version + `"}}`
}

func cloudsmith(event, format, version, tags string) string {
	return `{"data":{"format":"` + format + `","namespace":"shop","repository":"main","name":"api","version":"` + version + `",
		"checksum_sha256":"` + strings.TrimPrefix(digestB, "sha256:") + `","tags":{"version":[` + tags + `]},"uploader":"ann"},
		"meta":{"event_id":"` + event + `","event_at":"2026-03-04T05:06:07.5+00:00","trigger_id":"t1"}}`
}

const (
	harborHost = "harbor.shop.example:8443"
	imageAt    = `"mediaType":"` + ociManifest + `","digest":"` + digestA + `","repository":"shop/api"`
	helmConfig = "application/vnd.cncf.helm.config.v1+json"
)

// calls are what senders may be expected to send, beyond what was recorded.
func calls() map[string]call {
	hexA := strings.TrimPrefix(digestA, "sha256:")
	return map[string]call{
		// Harbor
		"harbor: tag": {
			kind: "harbor", body: harbor("PUSH_ARTIFACT", harborResource("1.0", ":")),
			want: []want{{"push", harborHost, "shop/api", "1.0", digestA, false, false}},
		},
		"harbor: no tag, the digest in its place": {
			kind: "harbor", body: harbor("PUSH_ARTIFACT", harborResource(digestA, "@")),
			want: []want{{"push", harborHost, "shop/api", "", digestA, false, false}},
		},
		"harbor: no tag, joined as a tag": {
			kind: "harbor", body: harbor("PUSH_ARTIFACT", harborResource(digestA, ":")),
			want: []want{{"push", harborHost, "shop/api", "", digestA, false, false}},
		},
		"harbor: several resources": {
			kind: "harbor", body: harbor("PUSH_ARTIFACT", harborResource("1", ":")+","+harborResource("2", ":")),
			want: []want{{"push", harborHost, "shop/api", "1", digestA, false, false}, {"push", harborHost, "shop/api", "2", digestA, false, false}},
		},
		"harbor: signature": {
			kind: "harbor", body: harbor("PUSH_ARTIFACT", harborResource(sigTag+".sig", ":")),
			want: []want{{"ignore", harborHost, "shop/api", sigTag + ".sig", digestA, true, false}},
		},
		"harbor: a push over the quota": {
			kind: "harbor", body: harbor("QUOTA_EXCEED", harborResource("1.0", ":")),
			want: []want{{"ignore", harborHost, "shop/api", "1.0", digestA, false, false}},
		},
		"harbor: quota of the other format": {
			kind: "harbor", header: header("Content-Type", "application/cloudevents+json"),
			body: `{"specversion":"1.0","id":"i","type":"harbor.quota.exceeded","data":{"resources":[` + harborResource("1", ":") + `],"repository":{"repo_full_name":"shop/api"}}}`,
			want: []want{{"ignore", harborHost, "shop/api", "1", digestA, false, false}},
		},
		"harbor: retention": {
			kind: "harbor", body: `{"type":"TAG_RETENTION","occur_at":1,"event_data":{"retention":{}}}`,
			want: []want{{"ignore", "", "", "", "", false, false}},
		},
		"harbor: delete without a date": {
			kind: "harbor", body: harbor("DELETE_ARTIFACT", harborResource("1.0", ":")),
			want: []want{{"delete", harborHost, "shop/api", "1.0", digestA, false, false}},
		},
		"harbor: name and namespace alone": {
			kind: "harbor",
			body: `{"type":"deleteImage","event_data":{"resources":[{"tag":"1","resource_url":"h.example/a/b:1"}],"repository":{"name":"b","namespace":"a"}}}`,
			want: []want{{"delete", "h.example", "a/b", "1", "", false, false}},
		},
		"harbor: chart museum": {
			kind: "harbor", body: harbor("UPLOAD_CHART", `{"tag":"1.0","resource_url":"h.example/chartrepo/shop/charts/api-1.0.tgz"}`),
			want: []want{{"ignore", "h.example", "shop/api", "1.0", "", true, false}},
		},
		"harbor: a push of nothing": {
			kind: "harbor", body: harbor("PUSH_ARTIFACT", ""),
			want: []want{{"push", "", "shop/api", "", "", false, false}},
		},

		// Docker Hub
		"dockerhub: a time with a fraction": {
			kind: "dockerhub", body: hub(`"pushed_at":1.7e9,"pusher":"ann","tag":"1"`, `"repo_name":"shop/api"`),
			want: []want{{"push", "docker.io", "shop/api", "1", "", false, false}},
		},
		"dockerhub: no repo_name": {
			kind: "dockerhub", body: hub(`"tag":"1"`, `"name":"api","namespace":"shop"`),
			want: []want{{"push", "docker.io", "shop/api", "1", "", false, false}},
		},
		"dockerhub: neither name": {
			kind: "dockerhub", body: hub(`"tag":"1"`, ``),
			want: []want{{"push", "docker.io", "", "1", "", false, false}},
		},
		"dockerhub: config of an image": {
			kind: "dockerhub", body: hub(`"tag":"1","media_type":"application/vnd.oci.image.config.v1+json"`, `"repo_name":"shop/api"`),
			want: []want{{"push", "docker.io", "shop/api", "1", "", false, false}},
		},
		"dockerhub: an index": {
			kind: "dockerhub", body: hub(`"tag":"1","media_type":"`+ociIndex+`"`, `"repo_name":"shop/api"`),
			want: []want{{"push", "docker.io", "shop/api", "1", "", false, false}},
		},
		"dockerhub: a chart": {
			kind: "dockerhub", body: hub(`"tag":"1","media_type":"`+helmConfig+`"`, `"repo_name":"shop/api"`),
			want: []want{{"ignore", "docker.io", "shop/api", "1", "", true, false}},
		},
		"dockerhub: WASM": {
			kind: "dockerhub", body: hub(`"tag":"1","media_type":"application/vnd.wasm.config.v0+json"`, `"repo_name":"shop/api"`),
			want: []want{{"ignore", "docker.io", "shop/api", "1", "", true, false}},
		},

		// GitHub Packages
		"ghcr: package_url that ends with a colon": {
			kind: "ghcr",
			body: gitHub("published", digestA, `,"package_url":"ghcr.io/Shop/Api:"`+gitHubImage("", "", ociManifest, "application/vnd.oci.image.config.v1+json")),
			want: []want{{"push", "ghcr.io", "shop/api", "", digestA, false, false}},
		},
		"ghcr: package_url with a tag and an encoded slash": {
			kind: "ghcr",
			body: gitHub("published", digestA, `,"package_url":"ghcr.io/shop/web%2Fapi:1.0"`+gitHubImage("1.0", digestA, ociIndex, "")),
			want: []want{{"push", "ghcr.io", "shop/web/api", "1.0", digestA, false, false}},
		},
		"ghcr: enterprise server": {
			kind: "ghcr",
			body: gitHub("published", digestA, `,"package_url":"containers.ghe.shop.example:8443/shop/api:1"`+gitHubImage("1", digestA, ociIndex, "")),
			want: []want{{"push", "containers.ghe.shop.example:8443", "shop/api", "1", digestA, false, false}},
		},
		"ghcr: no package_url": {
			kind: "ghcr", body: gitHub("published", digestA, gitHubImage("1", digestA, ociIndex, "")),
			want: []want{{"push", "ghcr.io", "shop/api", "1", digestA, false, false}},
		},
		"ghcr: a tag of another version": {
			kind: "ghcr", body: gitHub("updated", digestA, gitHubImage("latest", digestB, ociIndex, "")),
			want: []want{{"push", "ghcr.io", "shop/api", "", digestA, false, false}},
		},
		"ghcr: the digest stands with the manifest alone": {
			kind: "ghcr", body: gitHub("published", "57", gitHubImage("1", "", ociIndex, "")),
			want: []want{{"push", "ghcr.io", "shop/api", "1", digestA, false, false}},
		},
		"ghcr: chart": {
			kind: "ghcr",
			body: gitHub("published", digestA, gitHubImage("1", digestA, ociManifest, helmConfig, "application/vnd.cncf.helm.chart.content.v1.tar+gzip")),
			want: []want{{"ignore", "ghcr.io", "shop/api", "1", digestA, true, false}},
		},
		"ghcr: signature by its layers": {
			kind: "ghcr",
			body: gitHub("published", digestA, gitHubImage("x", digestA, ociManifest, "application/vnd.oci.image.config.v1+json", "application/vnd.dev.cosign.simplesigning.v1+json")),
			want: []want{{"ignore", "ghcr.io", "shop/api", "x", digestA, true, false}},
		},
		"ghcr: odd config but an image layer": {
			kind: "ghcr",
			body: gitHub("published", digestA, gitHubImage("x", digestA, ociManifest, "application/vnd.example", "application/vnd.oci.image.layer.v1.tar+gzip")),
			want: []want{{"push", "ghcr.io", "shop/api", "x", digestA, false, false}},
		},
		"ghcr: deleted": {
			kind: "ghcr", body: gitHub("deleted", digestA, gitHubImage("1", digestA, ociIndex, "")),
			want: []want{{"delete", "ghcr.io", "shop/api", "1", digestA, false, false}},
		},
		"ghcr: the other event": {
			kind: "ghcr", header: header("X-GitHub-Event", "registry_package"),
			body: strings.Replace(gitHub("published", digestA, gitHubImage("1", digestA, ociIndex, "")), `"package":`, `"registry_package":`, 1),
			want: []want{{"push", "ghcr.io", "shop/api", "1", digestA, false, false}},
		},
		"ghcr: a form": {
			kind: "ghcr", header: header(append(formHeader, "X-GitHub-Event", "package")...),
			body: form(gitHub("published", digestA, gitHubImage("1+2", "", ociIndex, ""))),
			want: []want{{"push", "ghcr.io", "shop/api", "", digestA, false, false}},
		}, // "+" is in no tag
		"ghcr: the old registry": {
			kind: "ghcr",
			body: `{"action":"published","registry_package":{"name":"api","package_type":"docker","package_version":{"version":"1.0","manifest":"{}"}},"repository":{"full_name":"Shop/Web"}}`,
			want: []want{{"push", "docker.pkg.github.com", "shop/web/api", "1.0", contracts.DigestOf([]byte("{}")), false, false}},
		},
		"ghcr: npm, whose version looks different": {
			kind: "ghcr",
			body: `{"action":"published","package":{"name":"a","ecosystem":"npm","package_type":"npm","package_version":{"version":7}}}`,
			want: []want{{"ignore", "", "", "", "", false, false}},
		},
		"ghcr: another event": {
			kind: "ghcr", header: header("X-GitHub-Event", "push"), body: `{"ref":"refs/heads/main"}`,
			want: []want{{"ignore", "", "", "", "", false, false}},
		},

		// Gitea, Forgejo
		"gitea: tag": {
			kind: "gitea", header: header("X-Gitea-Event", "package", "X-GitHub-Event", "package"), body: gitea("created", "container", "1.0"),
			want: []want{{"push", "git.shop.example:3000", "shop/web/api", "1.0", "", false, false}},
		},
		"gitea: digest": {
			kind: "gitea", body: gitea("created", "container", digestA),
			want: []want{{"push", "git.shop.example:3000", "shop/web/api", "", digestA, false, false}},
		},
		"gitea: deleted": {
			kind: "gitea", header: header("X-Forgejo-Event", "package"), body: gitea("deleted", "container", "1.0"),
			want: []want{{"delete", "git.shop.example:3000", "shop/web/api", "1.0", "", false, false}},
		},
		"gitea: a form": {
			kind: "gitea", header: header(formHeader...), body: form(gitea("created", "container", "1.0")),
			want: []want{{"push", "git.shop.example:3000", "shop/web/api", "1.0", "", false, false}},
		},
		"gitea: signature": {
			kind: "gitea", body: gitea("created", "container", sigTag+".sig"),
			want: []want{{"ignore", "git.shop.example:3000", "shop/web/api", sigTag + ".sig", "", true, false}},
		},
		"gitea: a package that is no container": {
			kind: "gitea", body: gitea("created", "maven", "1.0"),
			want: []want{{"ignore", "git.shop.example:3000", "", "", "", false, false}},
		},
		"gitea: the test button": {
			kind: "gitea", header: header("X-Gitea-Event", "push", "X-GitHub-Event", "push"), body: `{"ref":"refs/heads/main"}`,
			want: []want{{"ignore", "", "", "", "", false, false}},
		},

		// Quay
		"quay: two tags": {
			kind: "quay", body: `{"repository":"shop/api","docker_url":"https://quay.shop.example/shop/api","updated_tags":["1","2"]}`,
			want: []want{{"push", "quay.shop.example", "shop/api", "1", "", false, false}, {"push", "quay.shop.example", "shop/api", "2", "", false, false}},
		},
		"quay: tags as an old version has them": {
			kind: "quay", body: `{"repository":"shop/api","docker_url":"quay.io/shop/api","updated_tags":{"2":"id","1":"id"}}`,
			want: []want{{"push", "quay.io", "shop/api", "1", "", false, false}, {"push", "quay.io", "shop/api", "2", "", false, false}},
		},
		"quay: a build": {
			kind: "quay", body: `{"repository":"shop/api","docker_url":"quay.io/shop/api","docker_tags":["1"],"build_id":"x"}`,
			want: []want{{"ignore", "quay.io", "shop/api", "", "", false, false}},
		},
		"quay: a signature among the tags": {
			kind: "quay", body: `{"repository":"shop/api","docker_url":"quay.io/shop/api","updated_tags":["` + sigTag + `.att","1"]}`,
			want: []want{{"ignore", "quay.io", "shop/api", sigTag + ".att", "", true, false}, {"push", "quay.io", "shop/api", "1", "", false, false}},
		},

		// ACR
		"acr: empty tag": {
			kind: "acr", body: acr("push", imageAt+`,"tag":""`),
			want: []want{{"push", "shop.azurecr.io", "shop/api", "", digestA, false, false}},
		},
		"acr: quarantine": {
			kind: "acr", body: acr("quarantine", imageAt+`,"tag":"1"`),
			want: []want{{"push", "shop.azurecr.io", "shop/api", "1", digestA, false, false}},
		},
		"acr: another media type": {
			kind: "acr", body: acr("push", `"mediaType":"application/vnd.oci.artifact.manifest.v1+json","repository":"shop/api","tag":"1"`),
			want: []want{{"ignore", "shop.azurecr.io", "shop/api", "1", "", true, false}},
		},
		"acr: old chart": {
			kind: "acr", body: acr("chart_push", `"repository":"repo","tag":"api-1.0.tgz","digest":"sha256:xx"`),
			want: []want{{"ignore", "shop.azurecr.io", "repo", "api-1.0.tgz", "", true, false}},
		},
		"acr: old chart deleted": {
			kind: "acr", body: acr("chart_delete", `"repository":"repo","tag":"api-1.0.tgz"`),
			want: []want{{"ignore", "shop.azurecr.io", "repo", "api-1.0.tgz", "", false, false}},
		},
		"acr: repository deleted": {
			kind: "acr", body: acr("delete", `"repository":"shop/api"`),
			want: []want{{"delete", "shop.azurecr.io", "shop/api", "", "", false, false}},
		},

		// Event Grid
		"eventgrid: a batch of both schemas, one unreadable, one foreign": {
			kind: "azure-eventgrid",
			body: `[` + grid("Microsoft.ContainerRegistry.ImagePushed", acr("push", imageAt+`,"tag":"1"`)) + `,
				{"specversion":"1.0","id":"c","type":"Microsoft.ContainerRegistry.ImageDeleted","time":"2026-03-04T05:06:07Z","data":` + acr("delete", imageAt) + `},
				7,` + grid("Microsoft.Storage.BlobCreated", `{"api":"PutBlob"}`) + `,` + grid("Microsoft.ContainerRegistry.ImagePushed", `"x"`) + `]`,
			want: []want{
				{"push", "shop.azurecr.io", "shop/api", "1", digestA, false, false},
				{"delete", "shop.azurecr.io", "shop/api", "", digestA, false, false},
				{"ignore", "", "", "", "", false, true},
				{"ignore", "", "", "", "", false, false},
				{"ignore", "", "", "", "", false, true},
			},
		},
		"eventgrid: a single event": {
			kind: "azure-eventgrid", body: " " + grid("Microsoft.ContainerRegistry.ChartPushed", acr("chart_push", `"repository":"repo","tag":"a-1.tgz"`)),
			want: []want{{"ignore", "shop.azurecr.io", "repo", "a-1.tgz", "", true, false}},
		},
		"eventgrid: the type counts, not the data's action": {
			kind: "azure-eventgrid",
			body: `[` + grid("Microsoft.ContainerRegistry.ImageDeleted", acr("push", imageAt)) + `]`,
			want: []want{{"delete", "shop.azurecr.io", "shop/api", "", digestA, false, false}},
		},
		"eventgrid: no events": {kind: "azure-eventgrid", body: `[]`, want: []want{}},

		// Artifactory
		"artifactory: repository path": {
			kind: "artifactory",
			body: artifactory("docker", "pushed", `"path":"web/api/1.0/manifest.json","name":"manifest.json","sha256":"`+hexA+`","image_name":"api","tag":"1.0"`),
			want: []want{{"push", "shop.jfrog.example:8443", "docker-local/web/api", "1.0", digestA, false, false}},
		},
		"artifactory: subdomain": {
			kind: "artifactory", req: hook.Request{PathMapping: hook.MappingSubdomain},
			body: artifactory("docker", "pushed", `"path":"web/api/1.0/list.manifest.json","name":"list.manifest.json","sha256":"`+hexA+`","image_name":"web/api","tag":"1.0"`),
			want: []want{{"push", "docker-local.shop.jfrog.example:8443", "web/api", "1.0", digestA, false, false}},
		},
		"artifactory: a bound subdomain": {
			kind: "artifactory", req: hook.Request{PathMapping: hook.MappingSubdomain, Registry: "docker.shop.example", RepositoryKey: "docker-local"},
			body: artifactory("docker", "deleted", `"path":"api/1.0/manifest.json","name":"manifest.json","sha256":"","image_name":"api","tag":"1.0"`),
			want: []want{{"delete", "docker.shop.example", "api", "1.0", "", false, false}},
		},
		"artifactory: another repository than the bound one": {
			kind: "artifactory", req: hook.Request{PathMapping: hook.MappingPort, Registry: "docker.shop.example:9001", RepositoryKey: "docker-prod"},
			body: artifactory("docker", "pushed", `"path":"api/1.0/manifest.json","name":"manifest.json","sha256":"`+hexA+`","image_name":"api","tag":"1.0"`),
			want: []want{{"ignore", "docker.shop.example:9001", "api", "", "", false, false}},
		},
		"artifactory: by digest": {
			kind: "artifactory",
			body: artifactory("docker", "pushed", `"path":"api/`+digestA+`/manifest.json","name":"manifest.json","sha256":"`+hexA+`","image_name":"api","tag":"`+digestA+`"`),
			want: []want{{"push", "shop.jfrog.example:8443", "docker-local/api", "", digestA, false, false}},
		},
		"artifactory: a file that is no manifest": {
			kind: "artifactory",
			body: artifactory("docker", "promoted", `"path":"api/1.0/other.json","name":"other.json","sha256":"`+hexA+`","image_name":"api","tag":"1.0"`),
			want: []want{{"push", "shop.jfrog.example:8443", "docker-local/api", "1.0", "", false, false}},
		},
		"artifactory: another domain": {
			kind: "artifactory", body: artifactory("artifact", "deployed", `"path":"api/1.0/sha256__ab","name":"sha256__ab"`),
			want: []want{{"ignore", "shop.jfrog.example:8443", "docker-local/api", "", "", false, false}},
		},
		"artifactory: another event": {
			kind: "artifactory", body: artifactory("docker", "tagged", `"path":"api/1.0/manifest.json","name":"manifest.json","image_name":"api","tag":"1.0"`),
			want: []want{{"ignore", "shop.jfrog.example:8443", "docker-local/api", "1.0", "", false, false}},
		},

		// Nexus
		"nexus: component": {
			kind: "nexus", req: hook.Request{Registry: "nexus.shop.example:5000"}, body: nexus("UPDATED", "component", "shop/api", "1.0"),
			want: []want{{"push", "nexus.shop.example:5000", "shop/api", "1.0", "", false, false}},
		},
		"nexus: by path": {
			kind: "nexus", req: hook.Request{Registry: "nexus.shop.example", PathMapping: hook.MappingPath}, body: nexus("CREATED", "component", "api", "1.0"),
			want: []want{{"push", "nexus.shop.example", "docker-hosted/api", "1.0", "", false, false}},
		},
		"nexus: another repository": {
			kind: "nexus", req: hook.Request{Registry: "nexus.shop.example:5000", RepositoryKey: "docker-prod"}, body: nexus("CREATED", "component", "api", "1.0"),
			want: []want{{"ignore", "nexus.shop.example:5000", "api", "", "", false, false}},
		},
		"nexus: component by digest": {
			kind: "nexus", body: nexus("CREATED", "component", "api", digestA),
			want: []want{{"push", "", "api", "", digestA, false, false}},
		},
		"nexus: manifest asset by digest": {
			kind: "nexus", body: nexus("CREATED", "asset", "v2/shop/api/manifests/"+digestA, ""),
			want: []want{{"push", "", "shop/api", "", digestA, false, false}},
		},
		"nexus: manifest asset by tag, of an image called manifests": {
			kind: "nexus", body: nexus("DELETED", "asset", "/v2/shop/manifests/manifests/1.0", ""),
			want: []want{{"delete", "", "shop/manifests", "1.0", "", false, false}},
		},
		"nexus: blob asset": {
			kind: "nexus", body: nexus("CREATED", "asset", "v2/-/blobs/"+digestA, ""),
			want: []want{{"ignore", "", "", "", "", false, false}},
		},
		"nexus: asset that is no path of the API": {
			kind: "nexus", body: nexus("CREATED", "asset", "v2/manifests/1", ""),
			want: []want{{"ignore", "", "", "", "", false, false}},
		},
		"nexus: purged": {
			kind: "nexus", body: nexus("PURGED", "component", "api", "1.0"),
			want: []want{{"delete", "", "api", "1.0", "", false, false}},
		},
		"nexus: another event": {
			kind: "nexus", body: `{"nodeId":"x","action":"CREATED","repository":{"format":"docker","name":"docker-hosted"}}`,
			want: []want{{"ignore", "", "", "", "", false, false}},
		},

		// Cloudsmith
		"cloudsmith: tags": {
			kind: "cloudsmith", body: cloudsmith("package.synced", "docker", hexA, `"1","latest"`),
			want: []want{{"push", "docker.cloudsmith.io", "shop/main/api", "1", digestA, false, false}, {"push", "docker.cloudsmith.io", "shop/main/api", "latest", digestA, false, false}},
		},
		"cloudsmith: no tags, a version that is no digest": {
			kind: "cloudsmith", body: cloudsmith("package.synced", "docker", "1.0", ``),
			want: []want{{"push", "docker.cloudsmith.io", "shop/main/api", "", digestB, false, false}},
		},
		"cloudsmith: tags moved": {
			kind: "cloudsmith", body: cloudsmith("package.tags_updated", "docker", hexA, `"1"`),
			want: []want{{"push", "docker.cloudsmith.io", "shop/main/api", "1", digestA, false, false}},
		},
		"cloudsmith: deleted": {
			kind: "cloudsmith", body: cloudsmith("package.deleted", "docker", hexA, `"1"`),
			want: []want{{"delete", "docker.cloudsmith.io", "shop/main/api", "1", digestA, false, false}},
		},
		"cloudsmith: not there yet": {
			kind: "cloudsmith", body: cloudsmith("package.created", "docker", hexA, `"1"`),
			want: []want{{"ignore", "docker.cloudsmith.io", "shop/main/api", "", digestA, false, false}},
		},
		"cloudsmith: another format": {
			kind: "cloudsmith", body: cloudsmith("package.synced", "helm", hexA, `"1"`),
			want: []want{{"ignore", "", "", "", "", false, false}},
		},
		"cloudsmith: an array with one that is unreadable": {
			kind: "cloudsmith", body: `[` + cloudsmith("package.synced", "docker", hexA, ``) + `,[],{}]`,
			want: []want{{"push", "docker.cloudsmith.io", "shop/main/api", "", digestA, false, false}, {"ignore", "", "", "", "", false, true}, {"ignore", "", "", "", "", false, true}},
		},
		"cloudsmith: a form, JSON within JSON": {
			kind: "cloudsmith", header: header(formHeader...),
			body: form(quoted(cloudsmith("package.synced", "docker", hexA, ``))),
			want: []want{{"push", "docker.cloudsmith.io", "shop/main/api", "", digestA, false, false}},
		},
		"cloudsmith: a form, JSON": {
			kind: "cloudsmith", header: header(formHeader...), body: form(cloudsmith("package.synced", "docker", hexA, ``)),
			want: []want{{"push", "docker.cloudsmith.io", "shop/main/api", "", digestA, false, false}},
		},
	}
}

func quoted(s string) string {
	b, _ := json.Marshal(s) // of a text never fails
	return string(b)
}

func TestSenders(t *testing.T) {
	for name, c := range calls() {
		t.Run(name, func(t *testing.T) {
			events := decode(t, c)
			shown := make([]want, 0, len(events))
			for _, e := range events {
				shown = append(shown, got(e))
				if e.Reason == "" || e.DeliveryID == "" {
					t.Errorf("reason %q or delivery id %q is empty", e.Reason, e.DeliveryID)
				}
			}
			if !slices.Equal(shown, c.want) {
				t.Errorf("got %+v, want %+v", shown, c.want)
			}
			if text := fmt.Sprint(events); strings.Contains(text, "hub.invalid") {
				t.Error("a URL of the payload is kept")
			}
		})
	}
}

// TestSaid: actor, time, media type and delivery id are taken over, and an
// event that is sent again keeps its id.
func TestSaid(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	hexA := strings.TrimPrefix(digestA, "sha256:")
	for name, c := range map[string]struct {
		call
		id, actor, mediaType string
		at                   time.Time
	}{
		"harbor": {call{kind: "harbor", body: harbor("PUSH_ARTIFACT", harborResource("1", ":"))}, "", "ann", "", time.Unix(1_700_000_000, 0)},
		"harbor, cloudevents": {call{kind: "harbor", body: `{"specversion":"1.0","id":"h1","type":"harbor.artifact.pushed","time":"2026-03-04T05:06:07Z",
			"operator":"ann","data":{"resources":[` + harborResource("1", ":") + `]}}`}, "h1", "ann", "", at},
		"dockerhub": {
			call{kind: "dockerhub", body: hub(`"pushed_at":1700000000.5,"pusher":"ann","tag":"1","media_type":"`+ociIndex+`"`, `"repo_name":"a/b"`)},
			"", "ann", ociIndex, time.Unix(1_700_000_000, 5e8),
		},
		"ghcr": {
			call{kind: "ghcr", header: header("X-GitHub-Delivery", "d1"), body: gitHub("published", digestA, gitHubImage("1", digestA, ociIndex, ""))},
			"d1", "ann", ociIndex, at,
		},
		"gitea":   {call{kind: "gitea", header: header("X-Gitea-Delivery", "d1"), body: gitea("created", "container", "1")}, "d1", "ann", "", at},
		"forgejo": {call{kind: "gitea", header: header("X-Forgejo-Delivery", "d2"), body: gitea("created", "container", "1")}, "d2", "ann", "", at},
		"gitea says of no deletion when it was": {
			call{kind: "gitea", header: header("X-Gitea-Delivery", "d1"), body: gitea("deleted", "container", "1")},
			"d1", "ann", "",
			time.Time{},
		},
		"acr":         {call{kind: "acr", body: acr("push", imageAt)}, "a1", "", ociManifest, at.Add(123 * time.Millisecond)},
		"eventgrid":   {call{kind: "azure-eventgrid", body: `[` + grid("Microsoft.ContainerRegistry.ImagePushed", acr("push", imageAt)) + `]`}, "g1", "", ociManifest, at},
		"artifactory": {call{kind: "artifactory", body: artifactory("docker", "pushed", `"tag":"1","image_name":"a"`)}, "", "jfrog/ann", "", time.Time{}},
		"nexus": {
			call{kind: "nexus", header: header("X-Nexus-Webhook-Delivery", "n1"), body: nexus("CREATED", "component", "a", "1")},
			"n1", "ann", "", at.Add(8*time.Millisecond - time.Hour),
		},
		"cloudsmith": {call{kind: "cloudsmith", body: cloudsmith("package.synced", "docker", hexA, `"1"`)}, "t1", "ann", "", at.Add(500 * time.Millisecond)},
		"year 10000": {call{kind: "dockerhub", body: hub(`"pushed_at":253402300800,"tag":"1"`, `"repo_name":"a/b"`)}, "", "", "", time.Time{}},
	} {
		t.Run(name, func(t *testing.T) {
			e, again := decode(t, c.call)[0], decode(t, c.call)[0]
			if c.id != "" && e.DeliveryID != c.id || c.id == "" && len(e.DeliveryID) != 64 || e.DeliveryID != again.DeliveryID {
				t.Errorf("delivery id %q and %q, want %q", e.DeliveryID, again.DeliveryID, c.id)
			}
			if e.Actor != c.actor || e.MediaType != c.mediaType || !e.Time.Equal(c.at) {
				t.Errorf("actor %q, media type %q, time %s; want %q, %q, %s", e.Actor, e.MediaType, e.Time, c.actor, c.mediaType, c.at)
			}
			if unnamed := c.id == "" && c.at.IsZero(); e.Unnamed != unnamed {
				t.Errorf("unnamed %v, want %v", e.Unnamed, unnamed)
			}
		})
	}
}

// TestDockerHubTellsPlatformsAlike: calls that differ in nothing but what surrounds the push have one id.
func TestDockerHubTellsPlatformsAlike(t *testing.T) {
	one := decode(t, call{kind: "dockerhub", body: hub(`"pushed_at":1700000000,"tag":"1"`, `"repo_name":"a/b","star_count":1`)})[0]
	two := decode(t, call{kind: "dockerhub", body: hub(`"pushed_at":1700000000,"tag":"1","images":[]`, `"repo_name":"a/b","star_count":2`)})[0]
	later := decode(t, call{kind: "dockerhub", body: hub(`"pushed_at":1700000001,"tag":"1"`, `"repo_name":"a/b","star_count":1`)})[0]
	if one.DeliveryID != two.DeliveryID || one.DeliveryID == later.DeliveryID {
		t.Errorf("ids %q, %q and %q", one.DeliveryID, two.DeliveryID, later.DeliveryID)
	}
}

func TestHandshakes(t *testing.T) {
	validation := func(data string) string {
		return `[` + grid("Microsoft.EventGrid.SubscriptionValidationEvent", data) + `]`
	}
	for name, c := range map[string]struct {
		call
		ok   bool
		body string
	}{
		"sns subscription":               {call{kind: "ecr", header: header("X-Amz-Sns-Message-Type", "SubscriptionConfirmation"), body: `{}`}, true, ""},
		"sns end":                        {call{kind: "ecr", header: header("X-Amz-Sns-Message-Type", "UnsubscribeConfirmation"), body: `{}`}, true, ""},
		"sns notification":               {call{kind: "ecr", header: header("X-Amz-Sns-Message-Type", "Notification"), body: `{}`}, false, ""},
		"github ping":                    {call{kind: "ghcr", header: header("X-GitHub-Event", "ping"), body: `{"zen":"x"}`}, true, ""},
		"github package":                 {call{kind: "ghcr", header: header("X-GitHub-Event", "package"), body: `{"zen":"x"}`}, false, ""},
		"acr ping":                       {call{kind: "acr", body: `{"action":"ping"}`}, true, ""},
		"acr push":                       {call{kind: "acr", body: acr("push", imageAt)}, false, ""},
		"acr nonsense":                   {call{kind: "acr", body: `x`}, false, ""},
		"cloudsmith ping":                {call{kind: "cloudsmith", body: `{"data":{},"meta":{"event_id":"ping"}}`}, true, ""},
		"cloudsmith ping in a form":      {call{kind: "cloudsmith", header: header(formHeader...), body: form(quoted(`{"meta":{"event_id":"ping"}}`))}, true, ""},
		"cloudsmith push":                {call{kind: "cloudsmith", body: cloudsmith("package.synced", "docker", "", "")}, false, ""},
		"event grid validation":          {call{kind: "azure-eventgrid", body: validation(`{"validationCode":"c-1","validationUrl":"https://x.invalid"}`)}, true, `{"validationResponse":"c-1"}`},
		"event grid code with a quote":   {call{kind: "azure-eventgrid", body: validation(`{"validationCode":"\"}<x>"}`)}, true, "{\"validationResponse\":\"\\\"}\\u003cx\\u003e\"}"},
		"event grid without a code":      {call{kind: "azure-eventgrid", body: validation(`{}`)}, false, ""},
		"event grid with a long code":    {call{kind: "azure-eventgrid", body: validation(`{"validationCode":"` + strings.Repeat("x", 257) + `"}`)}, false, ""},
		"event grid, a batch":            {call{kind: "azure-eventgrid", body: `[{},` + validation(`{"validationCode":"c"}`)[1:]}, false, ""},
		"event grid, named in the data":  {call{kind: "azure-eventgrid", body: `[` + grid("x", `{"validationCode":"c","a":"Microsoft.EventGrid.SubscriptionValidationEvent"}`) + `]`}, false, ""},
		"distribution has none":          {call{kind: "distribution", body: `{"action":"ping"}`}, false, ""},
		"cloudevents answer no body":     {call{kind: "cloudevents", body: validation(`{"validationCode":"c"}`)}, false, ""},
		"event grid, not JSON behind it": {call{kind: "azure-eventgrid", body: "Microsoft.EventGrid.SubscriptionValidationEvent"}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			kind, ok := hook.Find(c.kind)
			if !ok {
				t.Fatal("no such kind")
			}
			answer, ok := kind.Handshake(hook.Request{Header: c.header, Body: []byte(c.call.body)})
			if (answer.Left != "") != strings.HasPrefix(name, "sns subscription") {
				t.Errorf("left %q", answer.Left)
			}
			if ok != c.ok || ok && answer.Status != http.StatusOK || string(answer.Body) != c.body {
				t.Errorf("got %v, %d %s; want %v, 200 %s", ok, answer.Status, answer.Body, c.ok, c.body)
			}
			if len(answer.Body) > 0 && answer.Header.Get("Content-Type") != "application/json" {
				t.Errorf("content type %q", answer.Header.Get("Content-Type"))
			}
		})
	}
}

// TestSigned: Gitea signs the JSON within a form, all others the body.
func TestSigned(t *testing.T) {
	body := form(`{"a":1}`)
	for _, k := range hook.Kinds() {
		want := body
		if k.Name == "gitea" {
			want = `{"a":1}`
		}
		if got := k.Signed(hook.Request{Header: header(formHeader...), Body: []byte(body)}); string(got) != want {
			t.Errorf("%s: signs %s, want %s", k.Name, got, want)
		}
		if got := k.Signed(hook.Request{Body: []byte(body)}); string(got) != body {
			t.Errorf("%s, no form: signs %s, want %s", k.Name, got, body)
		}
	}
}

func TestSendersUnreadable(t *testing.T) {
	many := strings.Repeat(`"1",`, hook.MaxEvents) + `"1"`
	for name, c := range map[string]call{
		"harbor, no type":               {kind: "harbor", body: `{}`},
		"harbor, time that is a text":   {kind: "harbor", body: `{"type":"PUSH_ARTIFACT","occur_at":"hunter2"}`},
		"harbor, too many":              {kind: "harbor", body: harbor("PUSH_ARTIFACT", strings.Repeat("{},", hook.MaxEvents)+"{}")},
		"dockerhub, no push":            {kind: "dockerhub", body: `{"repository":{"repo_name":"a/b"}}`},
		"ghcr, no package":              {kind: "ghcr", body: `{"action":"published"}`},
		"ghcr, version that is a text":  {kind: "ghcr", body: `{"package":{"ecosystem":"docker","package_version":"hunter2"}}`},
		"ghcr, form without payload":    {kind: "ghcr", header: header(formHeader...), body: `a=hunter2`},
		"ghcr, form that is none":       {kind: "ghcr", header: header(formHeader...), body: `payload=%zz`},
		"gitea, no package":             {kind: "gitea", body: `{"action":"created"}`},
		"quay, a template":              {kind: "quay", body: `{"text":"hunter2"}`},
		"quay, tags that are none":      {kind: "quay", body: `{"repository":"a/b","updated_tags":{"hunter2":12345}}`},
		"quay, too many":                {kind: "quay", body: `{"repository":"a/b","updated_tags":[` + many + `]}`},
		"acr, no action":                {kind: "acr", body: `{"target":{"repository":"hunter2"}}`},
		"event grid, a text":            {kind: "azure-eventgrid", body: `"hunter2"`},
		"event grid, too many":          {kind: "azure-eventgrid", body: `[` + many + `]`},
		"artifactory, no domain":        {kind: "artifactory", body: `{"event_type":"pushed"}`},
		"artifactory, tag of no text":   {kind: "artifactory", body: `{"domain":"docker","event_type":"pushed","data":{"tag":12345}}`},
		"nexus, nothing":                {kind: "nexus", body: `{}`},
		"cloudsmith, a text":            {kind: "cloudsmith", body: `"hunter2"`},
		"cloudsmith, too many":          {kind: "cloudsmith", body: cloudsmith("package.synced", "docker", "", many)},
		"cloudsmith, form of JSON text": {kind: "cloudsmith", header: header(formHeader...), body: form(quoted("hunter2"))},
	} {
		t.Run(name, func(t *testing.T) {
			events, err := hook.Decode(c.kind, hook.Request{Header: c.header, Body: []byte(c.body)})
			if err == nil || events != nil {
				t.Fatalf("got %v, %v, want an error", events, err)
			}
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "12345") {
				t.Errorf("%v quotes the body", err)
			}
		})
	}
}

// TestErrorsHoldNoValue puts a value of another type in the place of each text
// of what senders send: whatever is wrong then, the value is not told.
func TestErrorsHoldNoValue(t *testing.T) {
	texts := regexp.MustCompile(`:\s*"[^"]*"`)
	refused := 0
	for name, c := range calls() {
		if strings.Contains(c.header.Get("Content-Type"), "form") {
			continue
		}
		for _, at := range texts.FindAllStringIndex(c.body, -1) {
			for _, other := range []string{`4242424242`, `["hunter2"]`, `{"hunter2":"hunter2"}`} {
				body := c.body[:at[0]] + ":" + other + c.body[at[1]:]
				events, err := hook.Decode(c.kind, hook.Request{Header: c.header, Body: []byte(body)})
				said := ""
				if err != nil {
					said = err.Error()
				}
				for _, e := range events {
					said += e.Bad
				}
				if said != "" {
					refused++
				}
				if strings.Contains(said, "hunter2") || strings.Contains(said, "4242") {
					t.Errorf("%s: %q tells the value", name, said)
				}
			}
		}
	}
	if refused < 500 {
		t.Errorf("only %d bodies were refused", refused)
	}
}

// addSeeds gives the fuzzer what the kind sends, whole and cut off.
func addSeeds(f *testing.F, kind string) {
	all := calls()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		c := all[name]
		if c.kind != kind {
			continue
		}
		contentType, event := c.header.Get("Content-Type"), c.header.Get("X-GitHub-Event")
		f.Add(contentType, event, c.req.PathMapping, []byte(c.body))
		f.Add(contentType, event, "", []byte(c.body[:len(c.body)/2]))
	}
	for _, field := range []string{"timestamp", "updated_at", "created_at", "event_at", "eventTime", "time"} { // of one kind or another
		for _, at := range unwritable {
			f.Add("application/json", "package", "", []byte(`{"`+field+`":"`+at+`"}`))
		}
	}
	f.Add("application/json", "ping", "", []byte(`{"action":"ping","meta":{"event_id":"ping"}}`))
	f.Add("", "", "", []byte(base64.StdEncoding.EncodeToString([]byte{0, 255})))
}

// fuzzSender: whatever comes, the decoder and the handshake neither panic nor
// say what cannot be, and a bound source speaks of its own registry alone.
func fuzzSender(f *testing.F, kind string) {
	addSeeds(f, kind)
	k, ok := hook.Find(kind)
	if !ok {
		f.Fatal("no such kind")
	}
	f.Fuzz(func(t *testing.T, contentType, event, mapping string, body []byte) {
		req := hook.Request{
			Header: header("Content-Type", contentType, "X-GitHub-Event", event, "X-Gitea-Event", event),
			Body:   body, PathMapping: mapping,
		}
		checkDecoded(t, kind, req)
		k.Signed(req)
		if answer, ok := k.Handshake(req); ok && (answer.Status != http.StatusOK || len(answer.Body) > 4096) {
			t.Fatalf("answer %+v", answer)
		}
		req.Registry = "bound.example:5000"
		events, err := hook.Decode(kind, req)
		if err != nil {
			return
		}
		for _, e := range events {
			if e.Registry != req.Registry {
				t.Fatalf("registry %q", e.Registry)
			}
		}
	})
}

func FuzzHarbor(f *testing.F)      { fuzzSender(f, "harbor") }
func FuzzDockerHub(f *testing.F)   { fuzzSender(f, "dockerhub") }
func FuzzGHCR(f *testing.F)        { fuzzSender(f, "ghcr") }
func FuzzGitea(f *testing.F)       { fuzzSender(f, "gitea") }
func FuzzQuay(f *testing.F)        { fuzzSender(f, "quay") }
func FuzzACR(f *testing.F)         { fuzzSender(f, "acr") }
func FuzzEventGrid(f *testing.F)   { fuzzSender(f, "azure-eventgrid") }
func FuzzArtifactory(f *testing.F) { fuzzSender(f, "artifactory") }
func FuzzNexus(f *testing.F)       { fuzzSender(f, "nexus") }
func FuzzCloudsmith(f *testing.F)  { fuzzSender(f, "cloudsmith") }

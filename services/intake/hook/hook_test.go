package hook_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

const (
	digestA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	digestB = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	sigTag  = "sha256-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
)

// want is what a test says of an event; Hint and Bad only whether they are set.
type want struct {
	action, registry, repository, tag, digest string
	hint, bad                                 bool
}

func got(e hook.Event) want {
	return want{string(e.Action), e.Registry, e.Repository, e.Tag, e.Digest, e.Hint != "", e.Bad != ""}
}

func TestDistribution(t *testing.T) {
	target := func(s string) string {
		return `{"events":[{"id":"e1","timestamp":"2026-01-02T03:04:05.5+01:00","action":"push","target":` + s +
			`,"request":{"host":"reg.example.com:5000"},"actor":{"name":"ci","user":"secret-token"}}]}`
	}
	for name, c := range map[string]struct {
		body string
		want want
	}{
		"manifest with tag": {
			target(`{"mediaType":"` + ociManifest + `","digest":"` + digestA + `","repository":"a/b","tag":"1.0"}`),
			want{"push", "reg.example.com:5000", "a/b", "1.0", digestA, false, false},
		},
		"index": {
			target(`{"mediaType":"` + ociIndex + `","digest":"` + digestA + `","repository":"a/b","references":[{"mediaType":"` + ociManifest + `"}]}`),
			want{"push", "reg.example.com:5000", "a/b", "", digestA, false, false},
		},
		"blob": {
			target(`{"mediaType":"application/octet-stream","digest":"` + digestA + `","repository":"a/b","url":"http://x/v2/a/b/blobs/` + digestA + `"}`),
			want{"ignore", "reg.example.com:5000", "a/b", "", digestA, false, false},
		},
		"blob of an old version, without url": {
			target(`{"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","digest":"` + digestA + `","repository":"a/b"}`),
			want{"ignore", "reg.example.com:5000", "a/b", "", digestA, false, false},
		},
		"blob with a digest that is cut short": {
			target(`{"mediaType":"application/octet-stream","digest":"sha256:abc","repository":"a/b"}`),
			want{"ignore", "reg.example.com:5000", "a/b", "", "sha256:abc", false, false},
		},
		"signature tag": {
			target(`{"mediaType":"` + ociManifest + `","digest":"` + digestA + `","repository":"a/b","tag":"` + sigTag + `.sig"}`),
			want{"ignore", "reg.example.com:5000", "a/b", sigTag + ".sig", digestA, true, false},
		},
		"referrers fallback tag": {
			target(`{"mediaType":"` + ociIndex + `","digest":"` + digestA + `","repository":"a/b","tag":"` + sigTag + `"}`),
			want{"ignore", "reg.example.com:5000", "a/b", sigTag, digestA, true, false},
		},
		"chart by its references": {
			target(`{"mediaType":"` + ociManifest + `","digest":"` + digestA + `","repository":"a/b","tag":"1","references":[
				{"mediaType":"application/vnd.cncf.helm.config.v1+json"},{"mediaType":"application/vnd.cncf.helm.chart.content.v1.tar+gzip"}]}`),
			want{"ignore", "reg.example.com:5000", "a/b", "1", digestA, true, false},
		},
		"odd config but an image layer": {
			target(`{"mediaType":"` + ociManifest + `","digest":"` + digestA + `","repository":"a/b","tag":"1","references":[
				{"mediaType":"application/vnd.example.config"},{"mediaType":"application/vnd.oci.image.layer.v1.tar+zstd"}]}`),
			want{"push", "reg.example.com:5000", "a/b", "1", digestA, false, false},
		},
		"image without layers": {
			target(`{"mediaType":"` + ociManifest + `","digest":"` + digestA + `","repository":"a/b","tag":"1","references":[
				{"mediaType":"application/vnd.oci.image.config.v1+json"}]}`),
			want{"push", "reg.example.com:5000", "a/b", "1", digestA, false, false},
		},
		"unknown manifest": {
			target(`{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","digest":"` + digestA + `","repository":"a/b","url":"http://x/v2/a/b/manifests/` + digestA + `"}`),
			want{"ignore", "reg.example.com:5000", "a/b", "", digestA, true, false},
		},
		"digest that is none": {
			target(`{"mediaType":"` + ociManifest + `","digest":"sha256:abc","repository":"a/b","tag":"1"}`),
			want{"push", "reg.example.com:5000", "a/b", "1", "", false, false},
		},
		"repository and tag that are none": {
			target(`{"mediaType":"` + ociManifest + `","digest":"` + digestA + `","repository":"../A","tag":"a b"}`),
			want{"push", "reg.example.com:5000", "", "", digestA, false, false},
		},
		"tag of the wrong type": {
			target(`{"mediaType":"` + ociManifest + `","repository":"a/b","tag":7}`),
			want{"ignore", "", "", "", "", false, true},
		},
		"no action": {
			`{"events":[{"target":{"repository":"a/b"}}]}`,
			want{"ignore", "", "a/b", "", "", false, true},
		},
		"digest of another algorithm deleted, which is not the whole repository": {
			`{"events":[{"action":"delete","target":{"repository":"a/b","digest":"sha512:` + strings.Repeat("a", 128) + `"}}]}`,
			want{"delete", "", "a/b", "", "", false, true},
		},
		"tag that is none deleted": {
			`{"events":[{"action":"delete","target":{"repository":"a/b","tag":"a b"}}]}`,
			want{"delete", "", "a/b", "", "", false, true},
		},
		"repository deleted": {
			`{"events":[{"action":"delete","target":{"repository":"a/b"},"request":{"host":"r.example"}}]}`,
			want{"delete", "r.example", "a/b", "", "", false, false},
		},
		"renamed": {
			`{"events":[{"action":"rename","target":{"repository":"a/b","rename":{"from":"a/b","to":"a/c"}}}]}`,
			want{"ignore", "", "a/b", "", "", false, false},
		},
		"host that is none": {
			`{"events":[{"action":"delete","target":{"repository":"a/b"},"request":{"host":"evil host/../"}}]}`,
			want{"delete", "", "a/b", "", "", false, false},
		},
	} {
		t.Run(name, func(t *testing.T) {
			events, err := hook.Decode("distribution", hook.Request{Body: []byte(c.body)})
			if err != nil {
				t.Fatal(err)
			}
			if len(events) != 1 || got(events[0]) != c.want {
				t.Errorf("got %+v, want %+v", events, c.want)
			}
			if events[0].Reason == "" || events[0].DeliveryID == "" {
				t.Errorf("reason %q or delivery id %q is empty", events[0].Reason, events[0].DeliveryID)
			}
			if text := fmt.Sprint(events); strings.Contains(text, "secret-token") {
				t.Errorf("%s holds the actor's token", text)
			}
		})
	}
}

func TestDistributionKeepsWhatIsSaid(t *testing.T) {
	events, err := hook.Decode("gitlab", hook.Request{Registry: "bound.example:443", Body: []byte(`{"events":[
		{"id":"one","timestamp":"2026-01-02T03:04:05.5+01:00","action":"push","target":{"mediaType":"` + ociManifest + `","repository":"a","tag":"t"},
		 "request":{"host":"other.example"},"actor":{"name":"ci\u0000-robot"}},
		"no object",
		{"action":"pull","target":{"repository":"a"}}]}`)})
	if err != nil {
		t.Fatal(err)
	}
	if len(events) != 3 {
		t.Fatalf("got %d events, want 3", len(events))
	}
	first := events[0]
	if first.Registry != "bound.example:443" {
		t.Errorf("registry %q: the source's own host goes first", first.Registry)
	}
	if first.Actor != "ci-robot" || first.MediaType != ociManifest || first.DeliveryID != "one" {
		t.Errorf("got %+v", first)
	}
	if want := time.Date(2026, 1, 2, 2, 4, 5, 5e8, time.UTC); !first.Time.Equal(want) {
		t.Errorf("time %s, want %s", first.Time, want)
	}
	if events[1].Bad == "" {
		t.Error("a text among the events is not bad")
	}
	if len(events[2].DeliveryID) != 64 {
		t.Errorf("delivery id %q is not a hash", events[2].DeliveryID)
	}
}

func TestCloudEvents(t *testing.T) {
	structured := func(typ, subject, data string) string {
		return `{"specversion":"1.0","id":"i","source":"/s","type":"` + typ + `","subject":"` + subject + `","data":` + data + `}`
	}
	for name, c := range map[string]struct {
		body string
		want want
	}{
		"usual names": {
			structured("com.example.container.push", "", `{"registry":"r.example","repository":"a/b","tag":"1","digest":"`+digestA+`"}`),
			want{"push", "r.example", "a/b", "1", digestA, false, false},
		},
		"names with other separators": {
			structured("org.example.image.published", "", `{"registry_url":"https://r.example:8443/x","repository-name":"a/b","Image_Tag":"1","imageDigest":"`+digestA+`"}`),
			want{"push", "r.example:8443", "a/b", "1", digestA, false, false},
		},
		"nested target": {
			structured("Microsoft.ContainerRegistry.ImagePushed", "other:v9", `{"target":{"repository":"a/b","tag":"1","digest":"`+digestA+`","mediaType":"`+ociManifest+`"},"request":{"host":"r.example"}}`),
			want{"push", "r.example", "a/b", "1", digestA, false, false},
		},
		"subject only": {
			structured("x.image.pushed", "a/b:1.2", `null`),
			want{"push", "", "a/b", "1.2", "", false, false},
		},
		"subject with registry and digest": {
			structured("x.image.pushed", "r.example:5000/a/b@"+digestA, `{}`),
			want{"push", "r.example:5000", "a/b", "", digestA, false, false},
		},
		"subject of another repository is not mixed in": {
			structured("x.image.pushed", "c/d:9", `{"repository":"a/b","digest":"`+digestA+`"}`),
			want{"push", "", "a/b", "", digestA, false, false},
		},
		"full reference in data": {
			structured("x.image.pushed", "", `{"image":"r.example/a/b:1@`+digestA+`"}`),
			want{"push", "r.example", "a/b", "1", digestA, false, false},
		},
		"reference and a tag that do not agree": {
			structured("x.image.pushed", "", `{"image":"r.example/a/b:2@`+digestB+`","repository":"a/b","tag":"1"}`),
			want{"push", "r.example", "a/b", "1", "", false, false},
		},
		"repository that repeats the registry": {
			structured("x.image.pushed", "", `{"registry":"r.example","repository":"r.example/a/b","tag":"1"}`),
			want{"push", "r.example", "a/b", "1", "", false, false},
		},
		"delete": {
			structured("x.image.deleted", "a/b:1", `{}`),
			want{"delete", "", "a/b", "1", "", false, false},
		},
		"pull":         {structured("harbor.artifact.pulled", "a/b:1", `{}`), want{"ignore", "", "a/b", "1", "", false, false}},
		"scan":         {structured("harbor.scan.completed", "a/b:1", `{}`), want{"ignore", "", "a/b", "1", "", false, false}},
		"blob":         {structured("x.blob.pushed", "a/b:1", `{}`), want{"ignore", "", "a/b", "1", "", false, false}},
		"chart":        {structured("x.ChartPushed", "a/b:1", `{}`), want{"ignore", "", "a/b", "1", "", true, false}},
		"nothing said": {structured("x.something", "a/b:1", `{}`), want{"ignore", "", "a/b", "1", "", false, false}},
		"a host name that is a verb": {
			structured("com.test.image.pushed", "a/b:1", `{}`),
			want{"push", "", "a/b", "1", "", false, false},
		},
		"a version behind the verb": {
			structured("dev.example.artifact.published.0.1.1", "a/b:1", `{}`),
			want{"push", "", "a/b", "1", "", false, false},
		},
		"repository created": {
			structured("x.repository.created", "", `{"name":"a/b","repository":"a/b"}`),
			want{"ignore", "", "a/b", "", "", false, false},
		},
		"push whose image is named in a way of its own": {
			structured("x.image.pushed", "", `{"thing":{"path":"a/b","version":"1"}}`),
			want{"push", "", "", "", "", false, false},
		},
		"push without a tag and a digest": {
			structured("x.artifact.published", "", `{"repository":"a/b"}`),
			want{"push", "", "a/b", "", "", false, false},
		},
		"delete whose image is named in a way of its own": {
			structured("x.image.deleted", "", `{"thing":"a/b"}`),
			want{"delete", "", "", "", "", false, false},
		},
		"project created":   {structured("x.project.created", "", `{"name":"a"}`), want{"ignore", "", "", "", "", false, false}},
		"namespace deleted": {structured("x.namespace.deleted", "", `{"name":"a"}`), want{"ignore", "", "", "", "", false, false}},
		"repository that begins with the host": {
			structured("x.image.pushed", "", `{"repository":"ghcr.io/acme/app","tag":"1"}`),
			want{"push", "ghcr.io", "acme/app", "1", "", false, false},
		},
		"repository that begins with host and port": {
			structured("x.image.pushed", "acme/app:1", `{"repository":"reg:5000/acme/app"}`),
			want{"push", "reg:5000", "acme/app", "1", "", false, false},
		},
		"signature tag": {
			structured("x.image.pushed", "a/b:"+sigTag+".att", `{}`),
			want{"ignore", "", "a/b", sigTag + ".att", "", true, false},
		},
		"media type of something else": {
			structured("x.image.pushed", "a/b:1", `{"mediaType":"application/vnd.example"}`),
			want{"ignore", "", "a/b", "1", "", true, false},
		},
	} {
		t.Run(name, func(t *testing.T) {
			header := http.Header{"Content-Type": {"application/cloudevents+json; charset=utf-8"}}
			events, err := hook.Decode("cloudevents", hook.Request{Header: header, Body: []byte(c.body)})
			if err != nil {
				t.Fatal(err)
			}
			if len(events) != 1 || got(events[0]) != c.want {
				t.Errorf("got %+v, want %+v", events, c.want)
			}
		})
	}
}

// TestCloudEventsModes sends one event in every mode and expects the same of each.
func TestCloudEventsModes(t *testing.T) {
	data := `{"registry":"r.example","repository":"a/b","tag":"1","digest":"` + digestA + `"}`
	attributes := `"specversion":"1.0","id":"id 1","source":"/s","type":"x.image.pushed","time":"2026-01-02T03:04:05Z"`
	structured := `{` + attributes + `,"data":` + data + `}`
	binary := http.Header{
		"Content-Type": {"application/json"}, "Ce-Specversion": {"1.0"}, "Ce-Id": {"id%201"}, "Ce-Source": {"/s"},
		"Ce-Type": {"x.image.pushed"}, "Ce-Time": {"2026-01-02T03:04:05Z"},
	}
	for name, req := range map[string]hook.Request{
		"structured":                    {Header: http.Header{"Content-Type": {"application/cloudevents+json"}}, Body: []byte(structured)},
		"structured as plain JSON":      {Header: http.Header{"Content-Type": {"application/json"}}, Body: []byte(structured)},
		"structured without media type": {Header: http.Header{}, Body: []byte(structured)},
		"base64": {Header: http.Header{}, Body: []byte(`{` + attributes + `,"data_base64":"` +
			base64.StdEncoding.EncodeToString([]byte(data)) + `"}`)},
		"batch":               {Header: http.Header{"Content-Type": {"application/cloudevents-batch+json"}}, Body: []byte(`[` + structured + `]`)},
		"batch as plain JSON": {Header: http.Header{"Content-Type": {"application/json"}}, Body: []byte(` [` + structured + `]`)},
		"binary":              {Header: binary, Body: []byte(data)},
	} {
		t.Run(name, func(t *testing.T) {
			events, err := hook.Decode("cloudevents", req)
			if err != nil {
				t.Fatal(err)
			}
			if want := (want{"push", "r.example", "a/b", "1", digestA, false, false}); len(events) != 1 || got(events[0]) != want {
				t.Fatalf("got %+v, want %+v", events, want)
			}
			if e := events[0]; e.DeliveryID != "/s id 1" || !e.Time.Equal(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)) {
				t.Errorf("delivery id %q, time %s", e.DeliveryID, e.Time)
			}
		})
	}
}

// TestCloudEventsIdentity: an id is unique within its source alone.
func TestCloudEventsIdentity(t *testing.T) {
	ids := map[string]string{}
	long := strings.Repeat("x", 200)
	for _, c := range [][2]string{{"/a", "1"}, {"/b", "1"}, {"/a", "2"}, {"/" + long, "1"}, {"/" + long, "2"}, {"", "1"}} {
		data := `{"repository":"a/b","tag":"1"}`
		structured := fmt.Sprintf(`{"specversion":"1.0","id":%q,"source":%q,"type":"x.image.pushed","time":"2026-01-02T03:04:05Z","data":%s}`, c[1], c[0], data)
		binary := http.Header{
			"Ce-Specversion": {"1.0"}, "Ce-Id": {c[1]}, "Ce-Source": {c[0]}, "Ce-Type": {"x.image.pushed"}, "Ce-Time": {"2026-01-02T03:04:05Z"},
		}
		for _, req := range []hook.Request{
			{Header: http.Header{}, Body: []byte(structured)},
			{Header: binary, Body: []byte(data)},
		} {
			events, err := hook.Decode("cloudevents", req)
			if err != nil || len(events) != 1 {
				t.Fatal(events, err)
			}
			id, named := events[0].DeliveryID, strings.Join(c[:], " ")
			if other, ok := ids[id]; ok && other != named {
				t.Errorf("%s and %s are both %q", other, named, id)
			}
			ids[id] = named
		}
	}
	if len(ids) != 6 {
		t.Errorf("%d ids of 6 events, each sent in two modes: %q", len(ids), ids)
	}
}

// TestCloudEventsBound: of a source that is bound to a registry without a dot in
// its name, the repository may begin with it all the same.
func TestCloudEventsBound(t *testing.T) {
	events, err := hook.Decode("cloudevents", hook.Request{Registry: "registry", Header: http.Header{}, Body: []byte(
		`{"specversion":"1.0","id":"1","source":"/s","type":"x.image.pushed","data":{"repository":"registry/acme/app","tag":"1"}}`)})
	if err != nil || len(events) != 1 || events[0].Registry != "registry" || events[0].Repository != "acme/app" {
		t.Errorf("got %+v, %v", events, err)
	}
}

// unwritable are times that there are, but not in JSON: in UTC their years have
// a digit too many, or a sign.
var unwritable = []string{"9999-12-31T23:59:59-01:00", "0000-01-01T00:00:00+01:00"}

// TestTimesWithoutJSON: a time that cannot be written is not said.
func TestTimesWithoutJSON(t *testing.T) {
	calls := []call{
		{kind: "alibaba-acr", body: `{"push_data":{"tag":"1","pushed_at":"0000-01-01 00:00:00"},"repository":{"repo_full_name":"a/b"}}`},
	}
	for _, at := range unwritable {
		short := strings.ReplaceAll(at[:len(at)-3]+at[len(at)-2:], "Z", "")
		calls = append(calls,
			call{kind: "distribution", body: `{"events":[{"id":"1","timestamp":"` + at + `","action":"push","target":{"repository":"a/b","tag":"1"}}]}`},
			call{kind: "cloudevents", body: `{"specversion":"1.0","type":"x.image.pushed","subject":"a/b:1","time":"` + at + `"}`},
			call{kind: "ibm-icr", body: `{"action":"container-registry.image.push","outcome":"success","eventTime":"` + short + `","target":{"name":"icr.io/a/b:1"}}`},
			call{kind: "nexus", body: `{"timestamp":"` + short[:19] + ".000" + short[19:] + `","repositoryName":"r","action":"CREATED","component":{"format":"docker","name":"a/b","version":"1"}}`},
		)
	}
	for _, c := range calls {
		events, err := hook.Decode(c.kind, hook.Request{Header: http.Header{}, Body: []byte(c.body)})
		if err != nil || len(events) != 1 {
			t.Fatalf("%s: %v, %v", c.body, events, err)
		}
		if e := events[0]; e.Action != hook.Push || !e.Time.IsZero() {
			t.Errorf("%s: %s at %s", c.body, e.Action, e.Time)
		}
	}
}

// TestForeignRegistry: what a vendor names surely is not renamed to the registry
// that a source is bound to; whoever filters can see that it is another.
func TestForeignRegistry(t *testing.T) {
	ecr := `{"id":"1","detail-type":"ECR Image Action","source":"aws.ecr","account":"210987654321","region":"eu-central-1",
		"detail":{"result":"SUCCESS","action-type":"PUSH","repository-name":"a","image-tag":"1"}}`
	gar := `{"action":"INSERT","tag":"europe-west1-docker.pkg.dev/p/r/app:1"}`
	const ecrHost, garHost = "210987654321.dkr.ecr.eu-central-1.amazonaws.com", "europe-west1-docker.pkg.dev"
	for _, c := range []struct{ kind, body, bound, want string }{
		{"gar", gar, garHost, garHost},
		{"gar", gar, "us-docker.pkg.dev", garHost},
		{"gar", gar, "eu.gcr.io", garHost},
		{"gar", gar, "gcr.io", garHost},
		{"gar", gar, "proxy.example", "proxy.example"},
		{"gar", `{"action":"INSERT","tag":"app:1"}`, garHost, garHost},
		{"ecr", ecr, ecrHost, ecrHost},
		{"ecr", ecr, "210987654321.dkr.ecr.us-east-1.amazonaws.com", ecrHost},
		{"ecr", ecr, "111111111111.dkr.ecr.eu-central-1.amazonaws.com", ecrHost},
		{"ecr", ecr, "210987654321.dkr-ecr.eu-central-1.on.aws", "210987654321.dkr-ecr.eu-central-1.on.aws"},
		{"ecr", ecr, "210987654321.dkr.ecr-fips.eu-central-1.amazonaws.com", "210987654321.dkr.ecr-fips.eu-central-1.amazonaws.com"},
		{"ecr", ecr, "proxy.example:5000", "proxy.example:5000"},
		{"distribution", `{"events":[{"action":"delete","target":{"repository":"a"},"request":{"host":"` + garHost + `"}}]}`, "gcr.io", "gcr.io"},
	} {
		events, err := hook.Decode(c.kind, hook.Request{Registry: c.bound, Header: http.Header{}, Body: []byte(c.body)})
		if err != nil || len(events) != 1 {
			t.Fatalf("%+v: %v, %v", c, events, err)
		}
		if events[0].Registry != c.want {
			t.Errorf("%s bound to %s: got %s, want %s", c.kind, c.bound, events[0].Registry, c.want)
		}
	}
}

// TestBlank: the token that GitLab puts into its events is in nothing that is kept.
func TestBlank(t *testing.T) {
	for _, name := range []string{"gitlab", "distribution"} {
		kind, _ := hook.Find(name)
		for body, want := range map[string]string{
			`{"actor":{"name":"ci","user":"eyJ.token.x"}}`:              `{"actor":{"name":"ci","user":""}}`,
			`{"actor":{"user" : "eyJ.to\"ken","name":"ci"},"x":"user"}`: `{"actor":{"user" : "","name":"ci"},"x":"user"}`,
			`[{"user":"eyJ.token"},{"user":"eyJ.token"}]`:               `[{"user":""},{"user":""}]`,
			`{"user_type":"build","useragent":"x"}`:                     `{"user_type":"build","useragent":"x"}`,
			`{"actor":{"name":"ci","user":"eyJ.token cut off he`:        `{"actor":{"name":"ci","user":""`,
			`{"actor":{"name":"ci","user":"eyJ.token cut off here\`:     `{"actor":{"name":"ci","user":""\`,
		} {
			if got := string(kind.Blank([]byte(body))); got != want {
				t.Errorf("%s: got %s, want %s", name, got, want)
			}
		}
	}
	kind, _ := hook.Find("harbor")
	if got := string(kind.Blank([]byte(`{"user":"x"}`))); got != `{"user":"x"}` {
		t.Errorf("harbor: got %s", got)
	}
}

func TestUnreadable(t *testing.T) {
	many := `{"events":[` + strings.Repeat("{},", hook.MaxEvents) + `{}]}`
	for name, c := range map[string]struct {
		kind, body string
		want       error
	}{
		"empty":                 {"distribution", "", hook.ErrUnreadable},
		"no JSON":               {"distribution", "hello", hook.ErrUnreadable},
		"no events":             {"distribution", `{"a":1}`, hook.ErrUnreadable},
		"two values":            {"distribution", `{"events":[]} {}`, hook.ErrUnreadable},
		"too many events":       {"distribution", many, hook.ErrUnreadable},
		"too many in a batch":   {"cloudevents", `[` + strings.Repeat("{},", hook.MaxEvents) + `{}]`, hook.ErrUnreadable},
		"cloudevents, no JSON":  {"cloudevents", "hello", hook.ErrUnreadable},
		"cloudevents, no type":  {"cloudevents", `{"specversion":"1.0","id":"1"}`, hook.ErrUnreadable},
		"cloudevents 0.1":       {"cloudevents", `{"cloudEventsVersion":"0.1","type":"x"}`, hook.ErrUnreadable},
		"data that is a number": {"cloudevents", `{"specversion":"1.0","type":"x.pushed","data":7}`, hook.ErrUnreadable},
		"kind that is none":     {"carrier-pigeon", `{}`, hook.ErrUnknownKind},
	} {
		t.Run(name, func(t *testing.T) {
			events, err := hook.Decode(c.kind, hook.Request{Header: http.Header{}, Body: []byte(c.body)})
			if !errors.Is(err, c.want) || events != nil {
				t.Errorf("got %v, %v, want %v", events, err, c.want)
			}
		})
	}
	if events, err := hook.Decode("distribution", hook.Request{Body: []byte(`{"events":[]}`)}); err != nil || len(events) != 0 {
		t.Errorf("an empty envelope gives %v, %v, want nothing", events, err)
	}
}

func TestErrorsDoNotQuoteTheBody(t *testing.T) {
	for _, body := range []string{`{"events":[{"id":12345678}]}`, `{"events":"hunter2"}`, `hunter2`, `{"events":[{"hunter2`} {
		events, err := hook.Decode("distribution", hook.Request{Body: []byte(body)})
		text := fmt.Sprint(err)
		for _, e := range events {
			text += e.Bad + e.Reason
		}
		if strings.Contains(text, "hunter2") || strings.Contains(text, "12345678") {
			t.Errorf("%s quotes the body", text)
		}
	}
}

func TestPublishable(t *testing.T) {
	whole := hook.Event{Action: hook.Push, Registry: "r", Repository: "a", Tag: "1"}
	for name, c := range map[string]struct {
		change  func(*hook.Event)
		ok      bool
		missing bool
	}{
		"push":                           {func(*hook.Event) {}, true, false},
		"push by digest":                 {func(e *hook.Event) { e.Tag, e.Digest = "", digestA }, true, false},
		"push of nothing":                {func(e *hook.Event) { e.Tag = "" }, false, true},
		"no registry":                    {func(e *hook.Event) { e.Registry = "" }, false, true},
		"no repository":                  {func(e *hook.Event) { e.Repository = "" }, false, true},
		"delete of a repository":         {func(e *hook.Event) { e.Action, e.Tag = hook.Delete, "" }, true, false},
		"ignored":                        {func(e *hook.Event) { e.Action = hook.Ignore }, false, false},
		"ignored push with hint":         {func(e *hook.Event) { e.Action, e.Hint = hook.Ignore, "x" }, true, false},
		"hint without tag and digest":    {func(e *hook.Event) { e.Action, e.Hint, e.Tag = hook.Ignore, "x", "" }, false, true},
		"bad":                            {func(e *hook.Event) { e.Bad = "x" }, false, false},
		"ignored, and nothing else said": {func(e *hook.Event) { *e = hook.Event{Action: hook.Ignore} }, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			e := whole
			c.change(&e)
			ok, missing := e.Publishable()
			if ok != c.ok || (missing != "") != c.missing {
				t.Errorf("got %v, %q, want %v, missing %v", ok, missing, c.ok, c.missing)
			}
		})
	}
}

func TestParseReference(t *testing.T) {
	for text, want := range map[string]hook.Reference{
		"a:1":                                 {Repository: "a", Tag: "1"},
		"a/b@" + digestA:                      {Repository: "a/b", Digest: digestA},
		"localhost/a:1":                       {Registry: "localhost", Repository: "a", Tag: "1"},
		"r.example:5000/a/b:1@" + digestA:     {Registry: "r.example:5000", Repository: "a/b", Tag: "1", Digest: digestA},
		"https://registry.example/a/b:latest": {Registry: "registry.example", Repository: "a/b", Tag: "latest"},
		"[::1]:5000/a:1":                      {Registry: "[::1]:5000", Repository: "a", Tag: "1"},
	} {
		got, err := hook.ParseReference(text)
		if err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "a", "r.example:5000/a", "A:1", "a:1:2", "a@sha256:1", "a:", "@" + digestA, "r.example/:1", "a b:1", "https://x y/a:1"} {
		if got, err := hook.ParseReference(text); !errors.Is(err, hook.ErrReference) {
			t.Errorf("%q: got %+v, %v, want an error", text, got, err)
		}
	}
}

// TestReferenceRoundTrip: what Subject writes, ParseReference reads.
func TestReferenceRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := hook.Event{
			Registry:   rapid.StringMatching(`[a-z]{1,8}\.[a-z]{2,3}(:[1-9][0-9]{0,3})?`).Draw(t, "registry"),
			Repository: rapid.StringMatching(`[a-z0-9]{1,8}([._/-][a-z0-9]{1,8}){0,3}`).Draw(t, "repository"),
			Tag:        rapid.StringMatching(`([A-Za-z0-9_][A-Za-z0-9._-]{0,20})?`).Draw(t, "tag"),
		}
		if e.Tag == "" {
			e.Digest = digestA
		}
		got, err := hook.ParseReference(e.Subject())
		if want := (hook.Reference{Registry: e.Registry, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest}); err != nil || got != want {
			t.Fatalf("%s: got %+v, %v", e.Subject(), got, err)
		}
	})
}

func TestPreflight(t *testing.T) {
	kind, ok := hook.Find("cloudevents")
	if !ok {
		t.Fatal("no kind cloudevents")
	}
	h := http.Header{}
	h.Set("WebHook-Request-Origin", "events.example")
	h.Set("WebHook-Request-Rate", "120")
	h.Set("WebHook-Request-Callback", "https://callback.invalid/")
	answer, ok := kind.Preflight(http.MethodOptions, h)
	if !ok || answer.Status != http.StatusOK || answer.Header.Get("WebHook-Allowed-Origin") != "events.example" ||
		answer.Header.Get("WebHook-Allowed-Rate") != "120" {
		t.Errorf("got %+v, %v", answer, ok)
	}
	if _, ok := kind.Preflight(http.MethodPost, h); ok {
		t.Error("a POST is taken for a handshake")
	}
	if _, ok := kind.Preflight(http.MethodOptions, http.Header{}); ok {
		t.Error("OPTIONS without an origin is taken for a handshake")
	}
	distribution, _ := hook.Find("distribution")
	if _, ok := distribution.Preflight(http.MethodOptions, h); ok {
		t.Error("a Distribution registry has no handshake")
	}
}

func TestContract(t *testing.T) {
	b, err := json.Marshal(hook.Event{Action: hook.Push, Repository: "a", Digest: digestA, Reason: "why"}.Contract())
	if err != nil {
		t.Fatal(err)
	}
	want := `{"action":"push","registry":null,"repository":"a","tag":null,"digest":"` + digestA + `","reason":"why"}`
	if string(b) != want {
		t.Errorf("got %s, want %s", b, want)
	}
}

// checkDecoded fails if what a decoder made of foreign bytes cannot be right.
func checkDecoded(t *testing.T, kind string, req hook.Request) {
	t.Helper()
	events, err := hook.Decode(kind, req)
	if err != nil {
		if !errors.Is(err, hook.ErrUnreadable) {
			t.Fatalf("error %v is not ErrUnreadable", err)
		}
		return
	}
	for _, e := range events {
		switch {
		case e.Action != hook.Push && e.Action != hook.Delete && e.Action != hook.Ignore:
			t.Fatalf("action %q", e.Action)
		case e.Reason == "":
			t.Fatalf("no reason: %+v", e)
		case e.DeliveryID == "" || len(e.DeliveryID) > 128:
			t.Fatalf("delivery id %q", e.DeliveryID)
		case e.Registry != "" && !contracts.ValidRegistry(e.Registry),
			e.Repository != "" && !contracts.ValidRepository(e.Repository),
			e.Tag != "" && !contracts.ValidTag(e.Tag),
			e.Digest != "" && !contracts.ValidDigest(e.Digest) && (e.Action != hook.Ignore || e.Hint != ""):
			t.Fatalf("what is not valid should be left out: %+v", e)
		case len(e.Actor) > 256 || len(e.MediaType) > 255:
			t.Fatalf("unbounded: %+v", e)
		}
		if _, err := json.Marshal(e.Contract()); err != nil {
			t.Fatal(err)
		}
		if _, err := json.Marshal(e.Time); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzDistribution(f *testing.F) {
	f.Add([]byte(`{"events":[{"id":"e1","action":"push","target":{"mediaType":"` + ociManifest + `","digest":"` + digestA +
		`","repository":"a/b","tag":"1.0","references":[{"mediaType":"x"}]},"request":{"host":"r.example:5000"},"actor":{"name":"ci"}}]}`))
	f.Add([]byte(`{"events":[{"action":"delete","target":{"repository":"a/b","tag":"t"}},{"action":"rename"},7]}`))
	f.Add([]byte(`{"events":null}`))
	for _, at := range unwritable {
		f.Add([]byte(`{"events":[{"id":"1","timestamp":"` + at + `","action":"push","target":{"repository":"a/b","tag":"1"}}]}`))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		checkDecoded(t, "distribution", hook.Request{Header: http.Header{}, Body: body})
	})
}

func FuzzCloudEvents(f *testing.F) {
	f.Add("application/cloudevents+json", "", "", []byte(`{"specversion":"1.0","id":"1","type":"x.image.pushed","subject":"a/b:1","data":{"registry":"https://r.example/"}}`))
	f.Add("application/cloudevents-batch+json", "", "", []byte(`[{"specversion":"1.0","type":"x.image.deleted","data_base64":"e30="},{}]`))
	f.Add("application/json", "1.0", "harbor.artifact.pushed", []byte(`{"repository":"a/b","tag":"sha256:1","image":"r.example/a/b:2"}`))
	f.Add("text/plain", "", "", []byte("\xff\xfe"))
	f.Add("", "", "", []byte(`{"specversion":"1.0","id":"1","source":"/s","type":"x.image.pushed","time":"`+unwritable[0]+`","data":{"repository":"r.example/a/b","tag":"1"}}`))
	f.Fuzz(func(t *testing.T, contentType, version, typ string, body []byte) {
		h := http.Header{"Content-Type": {contentType}}
		if version != "" {
			h.Set("Ce-Specversion", version)
			h.Set("Ce-Type", typ)
		}
		checkDecoded(t, "cloudevents", hook.Request{Header: h, Body: body})
	})
}

func FuzzParseReference(f *testing.F) {
	for _, s := range []string{"a:1", "r.example:5000/a/b:1@" + digestA, "https://r/a:1", "@", "a//b:1", "[::1]/a:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := hook.ParseReference(s)
		if err != nil {
			return
		}
		if !contracts.ValidRepository(ref.Repository) || (ref.Tag == "" && ref.Digest == "") {
			t.Fatalf("%q: %+v", s, ref)
		}
	})
}

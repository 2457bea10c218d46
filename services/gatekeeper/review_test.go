package gatekeeper

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

const podSpecJSON = `{
	"initContainers": [{"name": "setup", "image": "r.example/setup"}],
	"containers": [{"name": "app", "image": "r.example/app"}, {"name": "side", "image": "r.example/setup"}],
	"ephemeralContainers": [{"name": "debug", "image": "r.example/debug"}],
	"volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "models", "image": {"reference": "r.example/models"}}, {"name": "later", "image": {}}]
}`

var podSpecImages = []named{
	{"r.example/setup", []string{"init container setup", "container side"}},
	{"r.example/app", []string{"container app"}},
	{"r.example/debug", []string{"ephemeral container debug"}},
	{"r.example/models", []string{"image volume models"}},
}

func equalImages(a, b []named) bool {
	return slices.EqualFunc(a, b, func(a, b named) bool { return a.reference == b.reference && slices.Equal(a.places, b.places) })
}

func requestFor(group, kind, operation, object, old string) *request {
	r := &request{UID: "1", Operation: operation, Object: json.RawMessage(object), OldObject: json.RawMessage(old)}
	r.Kind.Group, r.Kind.Kind = group, kind
	return r
}

func TestImagesOfEveryKind(t *testing.T) {
	template := `{"metadata": {"name": "x"}, "spec": {"template": {"spec": ` + podSpecJSON + `}}}`
	for _, test := range []struct{ group, kind, object string }{
		{"", "Pod", `{"metadata": {"name": "x"}, "spec": ` + podSpecJSON + `}`},
		{"", "PodTemplate", `{"metadata": {"name": "x"}, "template": {"spec": ` + podSpecJSON + `}}`},
		{"", "ReplicationController", template},
		{"apps", "Deployment", template},
		{"apps", "StatefulSet", template},
		{"apps", "DaemonSet", template},
		{"apps", "ReplicaSet", template},
		{"batch", "Job", template},
		{"batch", "CronJob", `{"metadata": {"name": "x"}, "spec": {"jobTemplate": {"spec": {"template": {"spec": ` + podSpecJSON + `}}}}}`},
	} {
		images, name, err := asked(requestFor(test.group, test.kind, "CREATE", test.object, ""))
		if err != nil || name != "x" || !equalImages(images, podSpecImages) {
			t.Errorf("%s: %+v, %q, %v", test.kind, images, name, err)
		}
	}
	for _, none := range []*request{
		requestFor("", "Pod", "DELETE", "", `{"spec": `+podSpecJSON+`}`),
		requestFor("", "Service", "CREATE", `{"spec": {}}`, ""),
		requestFor("example.com", "Deployment", "CREATE", template, ""),
		requestFor("autoscaling", "Scale", "UPDATE", `{"spec": {"replicas": 3}}`, `{}`),
	} {
		if images, _, err := asked(none); err != nil || len(images) != 0 {
			t.Errorf("%s %s: %+v, %v", none.Operation, none.Kind.Kind, images, err)
		}
	}
}

// An update brings what the object did not name before, wherever it names it.
func TestImagesOfUpdate(t *testing.T) {
	old := `{"spec": {"containers": [{"name": "a", "image": "r/a"}, {"name": "b", "image": "r/b"}]}}`
	now := `{"spec": {"containers": [{"name": "a", "image": "r/b"}, {"name": "b", "image": "r/b"}], "ephemeralContainers": [{"name": "c", "image": "r/c"}]}}`
	images, _, err := asked(requestFor("", "Pod", "UPDATE", now, old))
	if want := []named{{"r/c", []string{"ephemeral container c"}}}; err != nil || !equalImages(images, want) {
		t.Errorf("%+v, %v", images, err)
	}
	for name, r := range map[string]*request{
		"no old object":  requestFor("", "Pod", "UPDATE", now, ""),
		"null":           requestFor("", "Pod", "UPDATE", now, "null"),
		"null object":    requestFor("", "Pod", "CREATE", "null", ""),
		"another shape":  requestFor("", "Pod", "CREATE", `{"spec": {"containers": 5}}`, ""),
		"not an object":  requestFor("", "Pod", "CREATE", `[]`, ""),
		"no new object":  requestFor("", "Pod", "UPDATE", "", old),
		"a broken image": requestFor("", "Pod", "CREATE", `{"spec": {"volumes": [{"image": 3}]}}`, ""),
	} {
		if _, _, err := asked(r); !errors.Is(err, errReview) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestGeneratedName(t *testing.T) {
	_, name, err := asked(requestFor("", "Pod", "CREATE", `{"metadata": {"generateName": "cart-"}, "spec": {}}`, ""))
	if err != nil || name != "cart-*" {
		t.Errorf("%q, %v", name, err)
	}
}

func TestReferences(t *testing.T) {
	digest := "sha256:" + strings.Repeat("ab", 32)
	for text, want := range map[string]registry.Ref{
		"nginx":                             {Registry: "docker.io", Repository: "library/nginx", Tag: "latest"},
		"nginx:1.27":                        {Registry: "docker.io", Repository: "library/nginx", Tag: "1.27"},
		"grafana/tempo":                     {Registry: "docker.io", Repository: "grafana/tempo", Tag: "latest"},
		"docker.io/nginx@" + digest:         {Registry: "docker.io", Repository: "library/nginx", Digest: digest},
		"index.docker.io/a/b":               {Registry: "docker.io", Repository: "a/b", Tag: "latest"},
		"localhost/app":                     {Registry: "localhost", Repository: "app", Tag: "latest"},
		"localhost:5000/app:v1":             {Registry: "localhost:5000", Repository: "app", Tag: "v1"},
		"[::1]:5000/app":                    {Registry: "[::1]:5000", Repository: "app", Tag: "latest"},
		"r.example/a/b/c:v1@" + digest:      {Registry: "r.example", Repository: "a/b/c", Tag: "v1", Digest: digest},
		"Upper/app":                         {Registry: "Upper", Repository: "app", Tag: "latest"},
		"registry.example:5000/a@" + digest: {Registry: "registry.example:5000", Repository: "a", Digest: digest},
	} {
		if got, err := parseReference(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", " ", "nginx ", "r.example/App", "r.example/a:", "r.example/a:b:c", "r.example/a@", "r.example/a@sha512:" + strings.Repeat("a", 128),
		"r.example/a@sha256:abc", "r.example/a@" + digest + "@" + digest, "https://r.example/a", "r.example/../a", "r.example//a", "r.example/a\n",
		"user:pass@r.example/a", "r.example:99999999/a", strings.Repeat("a/", 600) + "a",
	} {
		if got, err := parseReference(text); !errors.Is(err, ErrReference) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

// What is built from valid parts is read as these parts.
func TestReferencesRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		want := registry.Ref{
			Registry:   rapid.StringMatching(`[a-z0-9]{1,8}\.[a-z]{2,5}(:[0-9]{1,4})?`).Draw(rt, "registry"),
			Repository: rapid.StringMatching(`[a-z0-9]{1,6}(/[a-z0-9]{1,6}([._-][a-z0-9]{1,4})?){1,3}`).Draw(rt, "repository"),
		}
		text := want.Registry + "/" + want.Repository
		if rapid.Bool().Draw(rt, "tagged") {
			want.Tag = rapid.StringMatching(`[A-Za-z0-9_][A-Za-z0-9._-]{0,20}`).Draw(rt, "tag")
			text += ":" + want.Tag
		}
		if want.Tag == "" || rapid.Bool().Draw(rt, "digested") {
			want.Digest = contracts.DigestOf([]byte(text))
			text += "@" + want.Digest
		}
		if got, err := parseReference(text); err != nil || got != want {
			rt.Fatalf("%s: %+v, %v", text, got, err)
		}
	})
}

func FuzzReference(f *testing.F) {
	for _, seed := range []string{"nginx", "r.example:5000/a/b:v1", "a@sha256:" + strings.Repeat("0", 64), "[::1]/a", "A/b", "@", ":", "/"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ref, err := parseReference(text)
		if err != nil {
			if !errors.Is(err, ErrReference) {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		if !contracts.ValidRegistry(ref.Registry) || !contracts.ValidRepository(ref.Repository) || ref.Tag == "" && ref.Digest == "" {
			t.Fatalf("%q: %+v", text, ref)
		}
		// Read again in its full form, it is the same.
		full := ref.Registry + "/" + ref.Repository
		if ref.Tag != "" {
			full += ":" + ref.Tag
		}
		if ref.Digest != "" {
			full += "@" + ref.Digest
		}
		if again, err := parseReference(full); isHost(ref.Registry) && (err != nil || again != ref) {
			t.Fatalf("%q: %+v, then %+v, %v", text, ref, again, err)
		}
	})
}

func FuzzReview(f *testing.F) {
	for _, object := range []string{`{"spec":` + podSpecJSON + `}`, `{"spec":{"template":{"spec":` + podSpecJSON + `}}}`, `null`, `{}`} {
		for _, kind := range []string{"Pod", "CronJob", "Scale"} {
			f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","operation":"UPDATE","kind":{"kind":"` +
				kind + `"},"object":` + object + `,"oldObject":{}}}`))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := readReview(body)
		if err == nil {
			_, _, err = asked(r)
		}
		if err != nil && !errors.Is(err, errReview) {
			t.Fatal(err)
		}
	})
}

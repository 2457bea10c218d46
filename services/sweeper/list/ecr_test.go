package list

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecr"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

func ecrAt(t *testing.T, url string, within ...string) *ecrLister {
	t.Helper()
	l, err := New(Options{
		API: ECR, Registry: "123456789012.dkr.ecr.eu-west-1.amazonaws.com", URL: url, Region: "eu-west-1", Within: within,
		Username: "AKIATEST", Secret: func() (string, error) { return "s3cret", nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	e, ok := l.(*ecrLister)
	if !ok {
		t.Fatalf("%T", l)
	}
	return e
}

// The pages of ECR's API (JSON 1.1, "DescribeRepositories" and "DescribeImages").
func TestECRListsEverything(t *testing.T) {
	want := holding([]string{"team/app", "team/tool", "other/app"}, 250)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			RegistryID     string `json:"registryId"`
			RepositoryName string `json:"repositoryName"`
			NextToken      string `json:"nextToken"`
			MaxResults     int    `json:"maxResults"`
			Filter         struct {
				TagStatus string `json:"tagStatus"`
			} `json:"filter"`
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.RegistryID != "123456789012" ||
			!strings.Contains(r.Header.Get("Authorization"), "Credential=AKIATEST/") {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		answer := object{}
		switch _, action, _ := strings.Cut(r.Header.Get("X-Amz-Target"), "."); {
		case action == "DescribeRepositories":
			page, next := tokenedPage(in.NextToken, in.MaxResults, want.repositories())
			var out []object
			for _, name := range page {
				out = append(out, object{"repositoryName": name})
			}
			answer["repositories"], answer["nextToken"] = out, next
		case action == "DescribeImages" && in.Filter.TagStatus == "TAGGED":
			page, next := tokenedPage(in.NextToken, in.MaxResults, want.tags(in.RepositoryName))
			var out []object
			for _, tag := range page {
				out = append(out, object{"imageDigest": want[in.RepositoryName][tag], "imageTags": []string{tag}})
			}
			answer["imageDetails"], answer["nextToken"] = out, next
		}
		if answer["nextToken"] == "" {
			delete(answer, "nextToken")
		}
		_ = json.NewEncoder(w).Encode(answer)
	}))
	t.Cleanup(s.Close)
	l := ecrAt(t, s.URL)
	l.page = 100
	got, _, err := everything(t.Context(), l)
	if err != nil || !maps.EqualFunc(got, want, func(a, b map[string]string) bool { return maps.Equal(a, b) }) {
		t.Errorf("%v, %v", got.repositories(), err)
	}
	got, _, err = everything(t.Context(), ecrAt(t, s.URL, "team/"))
	if err != nil || !slices.Equal(got.repositories(), []string{"team/app", "team/tool"}) {
		t.Errorf("within team/: %v, %v", got.repositories(), err)
	}
}

func TestECRErrors(t *testing.T) {
	for _, tc := range []struct {
		code   string
		status int
		want   error
	}{
		{"ThrottlingException", 400, registry.ErrThrottled},
		{"AccessDeniedException", 400, registry.ErrUnauthorized},
		{"UnrecognizedClientException", 400, registry.ErrRefused},
		{"ExpiredTokenException", 400, registry.ErrUnauthorized},
		{"InvalidSignatureException", 403, registry.ErrUnauthorized},
		{"RepositoryNotFoundException", 400, registry.ErrNotFound},
		{"ServerException", 500, registry.ErrUnavailable},
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.Header().Set("Retry-After", "12")
			w.WriteHeader(tc.status)
			fmt.Fprintf(w, `{"__type":"%s","message":"arn:aws:iam::123456789012:user/jo s3cret"}`, tc.code)
		}))
		l := ecrAt(t, s.URL)
		_, _, err := l.Repositories(t.Context(), "")
		_, _, err2 := l.Tags(t.Context(), Repository{Name: "app"}, "")
		s.Close()
		for _, err := range []error{err, err2} {
			var e *registry.Error
			if !errors.Is(err, tc.want) || !errors.As(err, &e) || e.After != 12*time.Second || strings.Contains(err.Error(), "arn:") {
				t.Errorf("%s: %v, want %v", tc.code, err, tc.want)
			}
		}
	}
	if _, _, err := ecrAt(t, "http://127.0.0.1:1").Repositories(t.Context(), ""); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("nobody answers: %v", err)
	}
}

// moto starts moto's server, or skips the test.
func moto(t *testing.T) string {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "python3", "-c", "import moto.server").CombinedOutput(); err != nil {
		t.Skipf("moto's server is not installed (pip install 'moto[server]'): %v %s", err, out)
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(address)
	server := exec.CommandContext(t.Context(), "python3", "-m", "moto.server", "-H", "127.0.0.1", "-p", port)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	for {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			_ = conn.Close()
			return "http://" + address
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("moto does not listen: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// The same against moto, which implements ECR's API by itself.
func TestECRAgainstMoto(t *testing.T) {
	l := ecrAt(t, moto(t))
	want := content{"team/app": {}, "team/empty": {}}
	for name := range want {
		if _, err := l.api.CreateRepository(t.Context(), &ecr.CreateRepositoryInput{RepositoryName: aws.String(name)}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%064d","size":2},"layers":[]}`, i)
		out, err := l.api.PutImage(t.Context(), &ecr.PutImageInput{
			RepositoryName: aws.String("team/app"), ImageManifest: aws.String(manifest), ImageTag: aws.String(fmt.Sprintf("v%d", i)),
		})
		if err != nil {
			t.Fatal(err)
		}
		want["team/app"][fmt.Sprintf("v%d", i)] = aws.ToString(out.Image.ImageId.ImageDigest)
	}
	got, _, err := everything(t.Context(), l)
	if err != nil || !maps.EqualFunc(got, want, func(a, b map[string]string) bool { return maps.Equal(a, b) }) {
		t.Errorf("%v, %v\nwant %v", got, err, want)
	}
	if _, _, err := l.Tags(t.Context(), Repository{Name: "team/gone"}, ""); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("a repository that is not there: %v", err)
	}
}

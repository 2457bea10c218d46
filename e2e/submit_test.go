package e2e

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// TestSubmittedImageIsSignedAnew: an image that has a verdict gets a new
// statement when somebody submits it, or asks for the whole fleet; nothing is
// analysed again, and what did not change stays as it was signed.
func TestSubmittedImageIsSignedAnew(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	p := s.push("team/shop", "1.0", story(t).Vulnerable...)
	s.attested(p)
	s.quiet()
	analyses := len(s.log.analyses(t))
	token := map[string]string{"Authorization": "Bearer " + s.Token}

	renewed := func(what string, before map[string][]string) {
		t.Helper()
		s.log.wait(t, func(*events) string {
			for image, old := range before {
				now := s.referrers(image)
				kept := slices.DeleteFunc(slices.Clone(now), func(r string) bool { return !slices.Contains(old, r) })
				if len(now) != len(old) || len(kept) != len(old)-1 {
					return what + ": " + image + " carries " + strings.Join(now, ", ") + ", before " + strings.Join(old, ", ")
				}
			}
			return ""
		})
		for image := range before {
			if v, err := s.verify(image); err != nil || !v.Verified || len(v.Statements) != 2 {
				t.Errorf("%s: verify %s: %+v, %v", what, image, v, err)
			}
		}
	}
	standing := func() map[string][]string {
		all := map[string][]string{}
		for _, image := range images(p) {
			all[image] = s.referrers(image)
		}
		return all
	}

	before := standing()
	status, body := s.call(http.MethodPost, s.Intake+"/v1/submit", token, []byte(`{"ref":"`+p.Ref.Registry+`/team/shop:1.0"}`))
	var push intake.Submitted
	if err := json.Unmarshal(body, &push); status != http.StatusAccepted || err != nil {
		t.Fatalf("submit: %d %s, %v", status, body, err)
	}
	var now catalog.Outcome
	s.log.wait(t, func(*events) string {
		now = catalog.Outcome{}
		s.catalog("/v1/outcome?push="+url.QueryEscape(push.ID)+"&subject="+url.QueryEscape(push.Subject), &now)
		if !now.Ended {
			return "the submitted push has not ended: " + now.State
		}
		return ""
	})
	if now.Image == nil || now.Image.Image != p.String() || now.State != catalog.StateAttested {
		t.Errorf("the push ended as %+v", now)
	}
	renewed("submit", before)
	s.quiet()

	before = standing()
	status, body = s.call(http.MethodPost, s.Catalog+"/v1/rematch", token, []byte(`{"all":true}`))
	if status != http.StatusAccepted {
		t.Fatalf("rematch: %d %s", status, body)
	}
	renewed("rematch", before)
	s.quiet()
	if n := len(s.log.analyses(t)); n != analyses {
		t.Errorf("%d layers analysed, %d before", n, analyses)
	}
	if n := len(s.log.named(contracts.ImageFailedV1)); n != 0 {
		t.Errorf("%d images failed", n)
	}
}

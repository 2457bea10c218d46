package stub_test

import (
	"errors"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/services/ticketer/stub"
	"github.com/tidewaiter/tidewaiter/services/ticketer/tracker"
)

func TestStub(t *testing.T) {
	var told []string
	s := stub.New("demo-token", func(what string, ticket stub.Ticket) { told = append(told, what+" "+ticket.Title) })
	server := httptest.NewServer(s)
	defer server.Close()
	token := "demo-token"
	c, err := tracker.NewGitHub(tracker.Options{URL: server.URL, Secret: func() (string, error) { return token, nil }, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	ctx, begin := t.Context(), time.Now().Add(-time.Second)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	made, err := c.Create(ctx, "team/app", tracker.Draft{Title: "one", Body: "with a marker", Labels: []string{"x"}})
	must(err)
	must(c.Comment(ctx, "team/app", made.ID, "news"))
	yes, no, title := true, false, "two"
	must(c.Edit(ctx, "team/app", made.ID, tracker.Change{Open: &no}))
	must(c.Edit(ctx, "team/app", made.ID, tracker.Change{Open: &yes, Title: &title}))
	must(c.Edit(ctx, "team/app", made.ID, tracker.Change{Title: &title}))
	got, err := c.Get(ctx, "team/app", made.ID)
	must(err)
	if !got.Open || got.Title != "two" || got.Body != "with a marker" || !slices.Equal(got.Labels, []string{"x"}) || !strings.Contains(got.URL, "stub.invalid") {
		t.Errorf("got %+v", got)
	}
	found, err := c.Find(ctx, "team/app", "a marker", begin)
	must(err)
	others, err := c.Find(ctx, "team/other", "a marker", begin)
	must(err)
	commented, err := c.Commented(ctx, "team/app", made.ID, "news", begin)
	must(err)
	if len(found) != 1 || len(others) != 0 || !commented {
		t.Errorf("found %v, %v, %v", found, others, commented)
	}
	if want := []string{"opened one", "commented one", "closed one", "reopened two", "changed two"}; !slices.Equal(told, want) {
		t.Errorf("told %q", told)
	}
	if all := s.Tickets(); len(all) != 1 || all[0].Project != "team/app" || !slices.Equal(all[0].Comments, []string{"news"}) {
		t.Errorf("got %+v", all)
	}
	if _, err := c.Get(ctx, "team/app", "9"); !errors.Is(err, tracker.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	token = "wrong"
	if _, err := c.Get(ctx, "team/app", made.ID); !errors.Is(err, tracker.ErrDenied) {
		t.Errorf("got %v", err)
	}
}

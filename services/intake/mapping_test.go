package intake

import (
	"net/http"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

func mappedSource() Source {
	return Source{
		Kind: generic, Registry: "r.example:5000", Auth: Auth{None: true},
		Mapping: &hook.Mapping{Action: "body.what", Repository: "body.repo", Tag: "body.tag", ID: "body.id"},
	}
}

func TestMappedSource(t *testing.T) {
	s, m := start(t, mappedSource())
	for _, c := range []struct {
		body, reason string
	}{
		{`{"what":"pushed","repo":"a/b","tag":"1","id":"one"}`, reasonStored},
		{`{"what":"pushed","repo":"a/b","tag":"1","id":"one"}`, reasonDuplicate},
		{`{"what":"deleted","repo":"a/b","tag":"1","id":"two"}`, reasonStored},
		{`{"what":"commented","id":"three"}`, reasonIgnored},
		{`{"what":"pushed","repo":["a"],"tag":"1","id":"four"}`, reasonIncomplete},
		{`what`, reasonUnreadable},
	} {
		var reason string
		s.record = func(d delivery) { reason = d.reason }
		if w := call(s, http.MethodPost, "/hooks/s", nil, []byte(c.body)); w.Code != http.StatusAccepted || reason != c.reason {
			t.Errorf("%s: got %d, %s, want 202, %s", c.body, w.Code, reason, c.reason)
		}
	}
	pushes := m.pushes(t)
	if len(pushes) != 1 || pushes[0].Registry != "r.example:5000" || pushes[0].Repository != "a/b" || pushes[0].Tag != "1" || pushes[0].DeliveryID != "one" {
		t.Errorf("pushes: %+v", pushes)
	}
	if deletes := m.deletes(t); len(deletes) != 1 {
		t.Errorf("deletes: %+v", deletes)
	}
	if len(m.letters) != 2 || !strings.Contains(m.letters[0].reason, "mapping.repository") {
		t.Errorf("letters: %+v", m.letters)
	}
}

// TestMappingIsChecked: a mistake in a mapping is told with its source and its
// expression, without starting anything.
func TestMappingIsChecked(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Source)
		want   string
	}{
		"none":              {func(s *Source) { s.Mapping = nil }, "mapping is missing"},
		"of another kind":   {func(s *Source) { s.Kind = "zot" }, "mapping is for kind generic"},
		"with a bad syntax": {func(s *Source) { s.Mapping.Tag = "body." }, "mapping.tag"},
	} {
		t.Run(name, func(t *testing.T) {
			src := mappedSource()
			c.change(&src)
			err := Sources{"ci": src}.Validate()
			if err == nil || !strings.Contains(err.Error(), `source "ci": `) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

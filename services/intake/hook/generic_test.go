package hook_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// nested is the mapping of a sender that lists its events and hides an image's
// name in one text.
var nested = hook.Mapping{
	Events:     `body.payload.items`,
	Action:     `event.kind == "artifact" ? event.verb : "ignore"`,
	Registry:   `headers["x-instance"]`,
	Repository: `event.image.split(":")[0]`,
	Tag:        `event.image.split(":")[1]`,
	Digest:     `event.?sha.optMap(s, "sha256:" + s).orValue("")`,
	ID:         `event.seq`,
	Time:       `event.at`,
}

func mapper(t testing.TB, m hook.Mapping) *hook.Mapper {
	t.Helper()
	compiled, err := m.Compile()
	if err != nil {
		t.Fatal(err)
	}
	return compiled
}

func TestGeneric(t *testing.T) {
	hex := strings.TrimPrefix(digestA, "sha256:")
	body := `{"payload":{"items":[
		{"kind":"artifact","verb":"created","image":"team/app:1","sha":"` + hex + `","seq":41,"at":1767323045.5},
		{"kind":"artifact","verb":"removed","image":"team/app:2","seq":42,"at":"2026-01-02T03:04:05Z"},
		{"kind":"comment","verb":"created","image":"team/app:3"},
		{"kind":"artifact","verb":"exploded","image":"team/app:4"},
		{"kind":"artifact","verb":"created","image":"team/app"},
		{"kind":"artifact","verb":"created","image":"team/app:` + sigTag + `.sig"},
		{"kind":"artifact","verb":"created","image":{"name":"hunter2"}},
		{"kind":"artifact"}
	]}}`
	events, err := hook.Decode("generic", hook.Request{
		Header: http.Header{"X-Instance": {"https://r.example:5000/x"}}, Body: []byte(body), Mapper: mapper(t, nested),
	})
	if err != nil {
		t.Fatal(err)
	}
	const host = "r.example:5000"
	for i, w := range []want{
		{"push", host, "team/app", "1", digestA, false, false},
		{"delete", host, "team/app", "2", "", false, false},
		{"ignore", host, "team/app", "3", "", false, false},
		{"ignore", host, "team/app", "4", "", false, false},
		{"push", host, "team/app", "", "", false, false}, // no tag is not said
		{"ignore", host, "team/app", sigTag + ".sig", "", true, false},
		{"ignore", "", "", "", "", false, true},
		{"ignore", "", "", "", "", false, true}, // without a verb
	} {
		if i >= len(events) || got(events[i]) != w {
			t.Fatalf("event %d: got %+v, want %+v", i, events, w)
		}
	}
	if e := events[0]; e.DeliveryID != "41" || !e.Time.Equal(time.UnixMilli(1767323045500)) {
		t.Errorf("id %q, time %s", e.DeliveryID, e.Time)
	}
	if e := events[1]; !e.Time.Equal(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)) {
		t.Errorf("time %s", e.Time)
	}
	if bad := events[6].Bad; !strings.Contains(bad, "mapping.repository") || strings.Contains(bad, "hunter2") {
		t.Errorf("bad: %q, want the expression and nothing of the body", bad)
	}
	if events[2].DeliveryID == events[3].DeliveryID {
		t.Error("events without an id are not told apart")
	}
}

func TestGenericBodies(t *testing.T) {
	flat := hook.Mapping{Action: `"push"`, Repository: `body.repo`, Tag: `body.tag`}
	for name, c := range map[string]struct {
		mapping     hook.Mapping
		contentType string
		body        string
		want        []want
		fails       string
	}{
		"one event":        {flat, "application/json", `{"repo":"a/b","tag":"1"}`, []want{{"push", "", "a/b", "1", "", false, false}}, ""},
		"a form":           {flat, "application/x-www-form-urlencoded", `repo=a%2Fb&tag=1`, []want{{"push", "", "a/b", "1", "", false, false}}, ""},
		"a number as tag":  {flat, "application/json", `{"repo":"a/b","tag":1.1}`, []want{{"ignore", "", "", "", "", false, true}}, ""},
		"not JSON":         {flat, "application/json", `hunter2`, nil, "not JSON"},
		"no list":          {nested, "application/json", `{"payload":{"items":"hunter2"}}`, nil, "mapping.events"},
		"list of nothing":  {nested, "application/json", `{"payload":{}}`, []want{}, ""},
		"too many events":  {nested, "application/json", `{"payload":{"items":[` + strings.Repeat("1,", hook.MaxEvents) + `1]}}`, nil, "more than"},
		"body that is one": {hook.Mapping{Events: "body", Action: `"delete"`, Repository: "event.r", Digest: "event.d"}, "application/json", `[{"r":"a","d":"` + digestB + `"}]`, []want{{"delete", "", "a", "", digestB, false, false}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			events, err := hook.Decode("generic", hook.Request{
				Header: http.Header{"Content-Type": {c.contentType}}, Body: []byte(c.body), Mapper: mapper(t, c.mapping),
			})
			if c.fails != "" {
				if !errors.Is(err, hook.ErrUnreadable) || !strings.Contains(err.Error(), c.fails) || strings.Contains(err.Error(), "hunter2") {
					t.Fatalf("got %v, %v, want an error with %q", events, err, c.fails)
				}
				return
			}
			if err != nil || len(events) != len(c.want) {
				t.Fatalf("got %+v, %v, want %+v", events, err, c.want)
			}
			for i, e := range events {
				if got(e) != c.want[i] {
					t.Errorf("got %+v, want %+v", got(e), c.want[i])
				}
			}
		})
	}
}

func TestGenericHidesCredentials(t *testing.T) {
	m := mapper(t, hook.Mapping{Action: `"push"`, Repository: `headers["authorization"]`, Tag: `headers["x-tag"]`})
	events, err := hook.Decode("generic", hook.Request{
		Header: http.Header{"Authorization": {"hunter2"}, "X-Tag": {"1"}}, Body: []byte(`{}`), Mapper: m,
	})
	if err != nil || len(events) != 1 || events[0].Repository != "" || events[0].Tag != "1" {
		t.Errorf("got %+v, %v", events, err)
	}
}

// TestGenericCost: an expression that costs too much ends, for its event and
// for the whole body.
func TestGenericCost(t *testing.T) {
	numbers := "[" + strings.Repeat("1,", 2000) + "1]"
	costly := hook.Mapping{Action: `"push"`, Repository: `"a"`, Tag: `body.n.exists(x, body.n.exists(y, y > x)) ? "1" : "2"`}
	events, err := hook.Decode("generic", hook.Request{Body: []byte(`{"n":` + numbers + `}`), Mapper: mapper(t, costly)})
	if err != nil || len(events) != 1 || !strings.Contains(events[0].Bad, "mapping.tag: it costs more than") {
		t.Errorf("got %+v, %v", events, err)
	}
	costly.Events = "body.e"
	costly.Tag = `body.n.exists(x, x == 2) ? "1" : "2"`
	events, err = hook.Decode("generic", hook.Request{
		Body: []byte(`{"n":` + numbers + `,"e":[` + strings.Repeat("1,", 999) + `1]}`), Mapper: mapper(t, costly),
	})
	if err != nil || len(events) != 1000 || events[0].Bad != "" || !strings.Contains(events[999].Bad, "for this body") {
		t.Fatalf("%d events, %v; the last: %+v", len(events), err, events[len(events)-1])
	}
}

func TestMappingMistakes(t *testing.T) {
	good := hook.Mapping{Action: `"push"`, Repository: `body.r`, Tag: `body.t`}
	for name, c := range map[string]struct {
		change func(*hook.Mapping)
		want   string
	}{
		"no action":           {func(m *hook.Mapping) { m.Action = "" }, "mapping.action"},
		"no repository":       {func(m *hook.Mapping) { m.Repository = "" }, "mapping.repository"},
		"no tag nor digest":   {func(m *hook.Mapping) { m.Tag = "" }, "mapping.tag and mapping.digest"},
		"syntax":              {func(m *hook.Mapping) { m.Tag = "body.t +" }, "mapping.tag"},
		"unknown variable":    {func(m *hook.Mapping) { m.Digest = "payload.d" }, "mapping.digest"},
		"unknown function":    {func(m *hook.Mapping) { m.Time = "now()" }, "mapping.time"},
		"not a text":          {func(m *hook.Mapping) { m.Registry = "1 + 1" }, "mapping.registry: it gives int"},
		"not a list":          {func(m *hook.Mapping) { m.Events = `"x"` }, "mapping.events: it gives string"},
		"longer than allowed": {func(m *hook.Mapping) { m.ID = `"` + strings.Repeat("x", 5000) + `"` }, "mapping.id"},
		"nested too deep":     {func(m *hook.Mapping) { m.ID = strings.Repeat("(", 40) + `"x"` + strings.Repeat(")", 40) }, "mapping.id"},
	} {
		t.Run(name, func(t *testing.T) {
			m := good
			c.change(&m)
			if _, err := m.Compile(); !errors.Is(err, hook.ErrMapping) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	if _, err := good.Compile(); err != nil {
		t.Error(err)
	}
	_, err := hook.Mapping{Action: "x", Repository: "y", Tag: "z"}.Compile()
	for _, name := range []string{"mapping.action", "mapping.repository", "mapping.tag"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v does not name %s", err, name)
		}
	}
}

func FuzzGeneric(f *testing.F) {
	m := mapper(f, nested)
	f.Add("application/json", []byte(`{"payload":{"items":[{"kind":"artifact","verb":"created","image":"a/b:1","sha":"x","seq":1,"at":1e300}]}}`))
	f.Add("application/x-www-form-urlencoded", []byte(`payload=1`))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		checkDecoded(t, "generic", hook.Request{Header: http.Header{"Content-Type": {contentType}}, Body: body, Mapper: m})
	})
}

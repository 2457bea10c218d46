package contracts_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// kind is an event or a document.
type kind struct {
	name  string
	new   func() any
	event bool
}

func kinds() []kind {
	var out []kind
	for _, k := range contracts.Events() {
		out = append(out, kind{k.Name, k.New, true})
	}
	for _, d := range contracts.Documents() {
		out = append(out, kind{d.Name, d.New, false})
	}
	return out
}

// envelope is a CloudEvent in structured mode, with the extensions we set.
type envelope struct {
	SpecVersion     string          `json:"specversion"`
	ID              string          `json:"id"`
	Source          string          `json:"source"`
	Type            string          `json:"type"`
	Subject         string          `json:"subject"`
	Time            time.Time       `json:"time"`
	DataContentType string          `json:"datacontenttype"`
	Lane            string          `json:"lane"`
	Traceparent     string          `json:"traceparent"`
	PartitionKey    string          `json:"partitionkey"`
	DataRef         string          `json:"dataref"`
	Data            json.RawMessage `json:"data"`
}

func strict(t *testing.T, b []byte, into any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		t.Fatalf("decode into %T: %v", into, err)
	}
}

// payload returns an example's data: of an event, what its envelope holds.
func payload(t *testing.T, k kind) []byte {
	t.Helper()
	b, err := contracts.Example(k.name)
	if err != nil {
		t.Fatal(err)
	}
	if !k.event {
		return b
	}
	var e envelope
	strict(t, b, &e)
	return e.Data
}

func compile(t *testing.T, name string) *jsonschema.Schema {
	t.Helper()
	b, err := contracts.Schema(name)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	url := contracts.SchemaBase + name + contracts.SchemaSuffix
	if err := c.AddResource(url, doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile(url)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func validate(t *testing.T, s *jsonschema.Schema, b []byte) error {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return s.Validate(doc)
}

// TestFilesAndTypes: every kind has its two files, and there is no other file.
func TestFilesAndTypes(t *testing.T) {
	var schemas, examples []string
	for _, k := range kinds() {
		schemas = append(schemas, k.name+contracts.SchemaSuffix)
		examples = append(examples, k.name+".json")
	}
	for dir, want := range map[string][]string{"schemas": schemas, "examples": examples} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range entries {
			got = append(got, e.Name())
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s holds %q, want %q", dir, got, want)
		}
	}
}

func TestExamplesFollowTheirSchemas(t *testing.T) {
	for _, k := range kinds() {
		t.Run(k.name, func(t *testing.T) {
			if err := validate(t, compile(t, k.name), payload(t, k)); err != nil {
				t.Errorf("%#v", err)
			}
		})
	}
}

// TestSchemasRefuse: a schema that takes anything proves nothing.
func TestSchemasRefuse(t *testing.T) {
	for _, k := range kinds() {
		t.Run(k.name, func(t *testing.T) {
			s := compile(t, k.name)
			var whole map[string]any
			if err := json.Unmarshal(payload(t, k), &whole); err != nil {
				t.Fatal(err)
			}
			for _, f := range fields(reflect.TypeOf(k.new()).Elem()) {
				broken := map[string]any{}
				for key, v := range whole {
					broken[key] = v
				}
				if !f.optional {
					delete(broken, f.name)
					if validate(t, s, encode(t, broken)) == nil {
						t.Errorf("%s may be missing", f.name)
					}
				}
				if f.typ.Kind() == reflect.Interface {
					continue
				}
				broken[f.name] = []any{map[string]any{"no": "such"}, 7}
				if validate(t, s, encode(t, broken)) == nil {
					t.Errorf("%s may be anything", f.name)
				}
			}
			whole["somethingNew"] = 1
			if err := validate(t, s, encode(t, whole)); err != nil {
				t.Errorf("a field of a later version is refused: %v", err)
			}
		})
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestExamplesRoundTrip: nothing of an example is lost or changed in Go.
func TestExamplesRoundTrip(t *testing.T) {
	for _, k := range kinds() {
		t.Run(k.name, func(t *testing.T) {
			in := payload(t, k)
			v := k.new()
			strict(t, in, v)
			var before, after any
			if err := json.Unmarshal(in, &before); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(encode(t, v), &after); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(before, after) {
				t.Errorf("got  %s\nwant %s", encode(t, after), encode(t, before))
			}
		})
	}
}

func TestEventExamples(t *testing.T) {
	traceparent := regexp.MustCompile(`^00-[0-9a-f]{32}-[0-9a-f]{16}-01$`)
	for _, k := range contracts.Events() {
		t.Run(k.Name, func(t *testing.T) {
			b, err := contracts.Example(k.Name)
			if err != nil {
				t.Fatal(err)
			}
			var e envelope
			strict(t, b, &e)
			switch {
			case e.SpecVersion != "1.0", e.Type != k.Type(), e.Type != contracts.TypePrefix+k.Name, e.DataContentType != "application/json":
				t.Errorf("got %+v", e)
			case !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(e.ID), !strings.HasPrefix(e.Source, "/services/"), e.Subject == "", e.Time.IsZero():
				t.Errorf("got %+v", e)
			case e.Lane != contracts.LaneFresh && e.Lane != contracts.LaneBulk, !traceparent.MatchString(e.Traceparent):
				t.Errorf("got %+v", e)
			case len(b) > contracts.MaxEventBytes:
				t.Errorf("%d bytes", len(b))
			}
			if strings.HasPrefix(k.Name, "finding.") && k.Topic != contracts.FindingTopic || !strings.HasPrefix(k.Name, "finding.") && k.Topic != k.Name {
				t.Errorf("topic %q", k.Topic)
			}
		})
	}
}

// field is one field of a Go type as JSON shows it.
type field struct {
	name     string
	typ      reflect.Type
	optional bool
	null     bool
}

func fields(t reflect.Type) []field {
	var out []field
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		optional := options == "omitempty" || options == "omitzero"
		typ, pointer := f.Type, f.Type.Kind() == reflect.Pointer
		if pointer {
			typ = typ.Elem()
		}
		out = append(out, field{name, typ, optional, pointer && !optional})
	}
	return out
}

// schema is as much of a JSON Schema as the Go types can be compared with.
type schema struct {
	ID                   string            `json:"$id"`
	Schema               string            `json:"$schema"`
	Ref                  string            `json:"$ref"`
	Description          string            `json:"description"`
	Type                 any               `json:"type"`
	Format               string            `json:"format"`
	Properties           map[string]schema `json:"properties"`
	Required             []string          `json:"required"`
	Items                *schema           `json:"items"`
	AnyOf                []schema          `json:"anyOf"`
	AdditionalProperties json.RawMessage   `json:"additionalProperties"`
	Defs                 map[string]schema `json:"$defs"`
}

// TestSchemasMatchTypes compares every field of every type with the schemas,
// without the generator's help.
func TestSchemasMatchTypes(t *testing.T) {
	for _, k := range kinds() {
		t.Run(k.name, func(t *testing.T) {
			b, err := contracts.Schema(k.name)
			if err != nil {
				t.Fatal(err)
			}
			var root schema
			if err := json.Unmarshal(b, &root); err != nil {
				t.Fatal(err)
			}
			if root.ID != contracts.SchemaBase+k.name+".schema.json" || root.Schema != "https://json-schema.org/draft/2020-12/schema" {
				t.Errorf("$id %q, $schema %q", root.ID, root.Schema)
			}
			compareObject(t, k.name, reflect.TypeOf(k.new()).Elem(), root, root.Defs, map[reflect.Type]bool{})
		})
	}
}

func compareObject(t *testing.T, where string, typ reflect.Type, s schema, defs map[string]schema, done map[reflect.Type]bool) {
	t.Helper()
	if done[typ] {
		return
	}
	done[typ] = true
	var names, required []string
	for _, f := range fields(typ) {
		names = append(names, f.name)
		if !f.optional {
			required = append(required, f.name)
		}
		p, ok := s.Properties[f.name]
		if !ok {
			t.Errorf("%s.%s is not in the schema", where, f.name)
			continue
		}
		if p.Description == "" {
			t.Errorf("%s.%s has no description", where, f.name)
		}
		compareValue(t, where+"."+f.name, f.typ, f.null, p, defs, done)
	}
	if len(names) != len(s.Properties) {
		t.Errorf("%s: the schema has %d properties, the type %d fields", where, len(s.Properties), len(names))
	}
	slices.Sort(required)
	got := slices.Sorted(slices.Values(s.Required))
	if !slices.Equal(got, required) {
		t.Errorf("%s: required are %q, want %q", where, got, required)
	}
	if string(s.AdditionalProperties) != "true" || s.Description == "" {
		t.Errorf("%s: additionalProperties %s, description %q", where, s.AdditionalProperties, s.Description)
	}
}

func compareValue(t *testing.T, where string, typ reflect.Type, null bool, s schema, defs map[string]schema, done map[reflect.Type]bool) {
	t.Helper()
	if null && len(s.AnyOf) == 2 {
		if s.AnyOf[1].Type != "null" {
			t.Errorf("%s: null is not the second choice", where)
		}
		s, null = s.AnyOf[0], false
	}
	want := map[reflect.Kind]string{
		reflect.String: "string", reflect.Bool: "boolean", reflect.Int: "integer", reflect.Int64: "integer",
		reflect.Float64: "number", reflect.Slice: "array", reflect.Map: "object",
	}[typ.Kind()]
	switch {
	case typ == reflect.TypeFor[time.Time]():
		want = "string"
		if s.Format != "date-time" {
			t.Errorf("%s: format %q", where, s.Format)
		}
	case typ.Kind() == reflect.Interface:
		if s.Type != nil {
			t.Errorf("%s: type %v of anything", where, s.Type)
		}
		return
	case typ.Kind() == reflect.Struct:
		def, ok := defs[strings.TrimPrefix(s.Ref, "#/$defs/")]
		if !ok {
			t.Errorf("%s: %q is not defined", where, s.Ref)
			return
		}
		compareObject(t, where, typ, def, defs, done)
		return
	case typ.Kind() == reflect.Slice:
		compareValue(t, where+"[]", typ.Elem(), false, *s.Items, defs, done)
	}
	wantType := any(want)
	if null {
		wantType = []any{want, "null"}
	}
	if !reflect.DeepEqual(s.Type, wantType) {
		t.Errorf("%s: type %v, want %v", where, s.Type, wantType)
	}
}

// TestExamplesShowEveryField: an example that leaves a field out explains
// nothing about it. Fields of the other kind of image may be missing.
func TestExamplesShowEveryField(t *testing.T) {
	may := map[string]bool{
		"image.planned.v1.platform": true, "image.planned.v1.layers": true, // of an image; the example is an index
		"inventory.parts": true, "report.parts": true, // of an index; the examples are images
		"image.pushed.v1.hint": true, "image.deleted.v1.digest": true, "image.failed.v1.digest": true,
	}
	for _, k := range kinds() {
		var got map[string]any
		if err := json.Unmarshal(payload(t, k), &got); err != nil {
			t.Fatal(err)
		}
		for _, f := range fields(reflect.TypeOf(k.new()).Elem()) {
			if _, ok := got[f.name]; !ok && !may[k.name+"."+f.name] {
				t.Errorf("the example of %s does not show %s", k.name, f.name)
			}
		}
	}
}

// TestStandardLibraryOnly: any consumer may import this package.
func TestStandardLibraryOnly(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, out)
	}
	if got := strings.Fields(string(out)); !slices.Equal(got, []string{"github.com/tidewaiter/tidewaiter/contracts"}) {
		t.Errorf("it links %q", got)
	}
}

func TestUnknownNames(t *testing.T) {
	for _, name := range []string{"", "no.such", "../doc"} {
		if _, err := contracts.Schema(name); err == nil {
			t.Errorf("there is a schema of %q", name)
		}
		if _, err := contracts.Example(name); err == nil {
			t.Errorf("there is an example of %q", name)
		}
	}
}

// TestReadmeNamesEveryKind keeps the list in README.md whole.
func TestReadmeNamesEveryKind(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kinds() {
		if !strings.Contains(string(b), "`"+k.name+"`") {
			t.Errorf("README.md does not name %s", k.name)
		}
	}
}

// TestDecisions: each decision is short, numbered and named.
func TestDecisions(t *testing.T) {
	names, err := filepath.Glob("decisions/*.md")
	if err != nil || len(names) < 4 {
		t.Fatalf("%d decisions, %v", len(names), err)
	}
	for _, name := range names {
		if !regexp.MustCompile(`^\d{4}-[a-z0-9-]+\.md$`).MatchString(filepath.Base(name)) {
			t.Errorf("%s is not named NNNN-what.md", name)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(b, []byte("# ")) {
			t.Errorf("%s has no heading", name)
		}
	}
}

func ExampleParseImage() {
	image, err := contracts.ParseImage("registry.example.com:5000/shop/cart@sha256:" + strings.Repeat("0a", 32))
	fmt.Println(image.Registry, image.Repo(), err)
	// Output: registry.example.com:5000 registry.example.com:5000/shop/cart <nil>
}

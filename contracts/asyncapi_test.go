package contracts_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// asyncAPI returns asyncapi.yaml as JSON has it.
func asyncAPI(t *testing.T) map[string]any {
	t.Helper()
	content, err := os.ReadFile("asyncapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	converted, err := yaml.YAMLToJSON(content)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(converted))
	if err != nil {
		t.Fatal(err)
	}
	return doc.(map[string]any)
}

// at returns what a JSON pointer leads to, nil for nothing.
func at(doc any, pointer string) any {
	for step := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
		m, ok := doc.(map[string]any)
		if !ok {
			return nil
		}
		doc = m[strings.NewReplacer("~1", "/", "~0", "~").Replace(step)]
	}
	return doc
}

// messageOf is what asyncapi.yaml must say of an event, for whoever adds one.
const messageOf = `
add to asyncapi.yaml, below components.messages:
    %[1]s:
      name: dev.tidewaiter.%[1]s
      title: %[1]s
      summary: '<what it says, as in README.md>.'
      description: 'Subject: <what it is about>.'
      contentType: application/cloudevents+json
      traits: [{$ref: '#/components/messageTraits/kafka'}]
      bindings:
        kafka:
          key: {type: string, description: '<key, as in README.md>'}
          bindingVersion: 0.5.0
      payload:
        schemaFormat: application/schema+json;version=draft-2020-12
        schema:
          allOf:
            - $ref: '#/components/schemas/cloudevent'
            - properties:
                type: {const: dev.tidewaiter.%[1]s}
                data: {$ref: schemas/%[1]s.schema.json}
      x-example: examples/%[1]s.json
      x-producers: [<service>]
      x-consumers: [<service>]`

const channelOf = `
add to asyncapi.yaml, below channels:
  %[2]s:
    address: '{prefix}%[2]s'
    parameters: {prefix: {$ref: '#/components/parameters/prefix'}}
    messages:
      %[1]s: {$ref: '#/components/messages/%[1]s'}
and below operations:
  send.%[1]s%[3]s:
    action: send
    channel: {$ref: '#/channels/%[2]s'}
    messages: [{$ref: '#/channels/%[2]s/messages/%[1]s'}]`

// keys returns the key of each event as README.md has it.
func keys(t *testing.T) map[string]string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z.]+\\.v[0-9]+)` \\|.*\\| ([^|]+) \\|$").FindAllStringSubmatch(string(readme), -1) {
		out[row[1]] = strings.ReplaceAll(row[2], "`", "")
	}
	return out
}

// TestAsyncAPIHoldsEveryEvent: each event has its message, its channels and its
// operations in asyncapi.yaml, and nothing else is there.
func TestAsyncAPIHoldsEveryEvent(t *testing.T) {
	doc := asyncAPI(t)
	if doc["asyncapi"] != "3.0.0" {
		t.Errorf("asyncapi is %v", doc["asyncapi"])
	}
	readme := keys(t)
	messages := []string{"dead-letter", "retry"}
	channels := []string{"dead-letters", "retry"}
	var operations []string
	for _, k := range contracts.Events() {
		messages = append(messages, k.Name)
		m, ok := at(doc, "/components/messages/"+k.Name).(map[string]any)
		if !ok {
			t.Errorf("%s has no message%s", k.Name, fmt.Sprintf(messageOf, k.Name))
			continue
		}
		checkMessage(t, k, m, readme[k.Name])
		suffixes := []string{""}
		if k.Bulk {
			suffixes = append(suffixes, contracts.BulkSuffix)
		}
		for _, suffix := range suffixes {
			topic := k.Topic + suffix
			channels, operations = append(channels, topic), append(operations, "send."+k.Name+suffix)
			missing := fmt.Sprintf(channelOf, k.Name, topic, suffix)
			if got := at(doc, "/channels/"+topic+"/address"); got != "{prefix}"+topic {
				t.Errorf("%s: channel %s has the address %v%s", k.Name, topic, got, missing)
			}
			if got := at(doc, "/channels/"+topic+"/messages/"+k.Name+"/$ref"); got != "#/components/messages/"+k.Name {
				t.Errorf("%s: channel %s carries %v%s", k.Name, topic, got, missing)
			}
			operation := "/operations/send." + k.Name + suffix
			list, _ := at(doc, operation+"/messages").([]any)
			if at(doc, operation+"/action") != "send" || at(doc, operation+"/channel/$ref") != "#/channels/"+topic ||
				len(list) != 1 || at(list[0], "/$ref") != "#/channels/"+topic+"/messages/"+k.Name {
				t.Errorf("%s: operation %s is %v%s", k.Name, operation, at(doc, operation), missing)
			}
		}
	}
	for where, want := range map[string][]string{"/components/messages": messages, "/channels": channels, "/operations": operations} {
		slices.Sort(want)
		want = slices.Compact(want)
		for name := range at(doc, where).(map[string]any) {
			if !slices.Contains(want, name) {
				t.Errorf("%s/%s belongs to no event of contracts.Events(); remove it", where, name)
			}
		}
	}
	for _, k := range contracts.Events() {
		carried, _ := at(doc, "/channels/"+k.Topic+"/messages").(map[string]any)
		for name := range carried {
			if !slices.ContainsFunc(contracts.Events(), func(o contracts.EventKind) bool { return o.Name == name && o.Topic == k.Topic }) {
				t.Errorf("channel %s carries %s, which does not travel there; remove it", k.Topic, name)
			}
		}
	}
}

func checkMessage(t *testing.T, k contracts.EventKind, m map[string]any, key string) {
	t.Helper()
	for pointer, want := range map[string]string{
		"/name":                           k.Type(),
		"/title":                          k.Name,
		"/contentType":                    "application/cloudevents+json",
		"/bindings/kafka/key/type":        "string",
		"/bindings/kafka/key/description": key,
		"/x-example":                      "examples/" + k.Name + ".json",
		"/payload/schemaFormat":           "application/schema+json;version=draft-2020-12",
	} {
		if got := at(m, pointer); got != want {
			t.Errorf("message %s: %s is %q, want %q%s", k.Name, pointer, got, want, fmt.Sprintf(messageOf, k.Name))
		}
	}
	for _, pointer := range []string{"/summary", "/description"} {
		if s, _ := at(m, pointer).(string); s == "" || strings.Contains(s, "<") {
			t.Errorf("message %s: %s is %q", k.Name, pointer, s)
		}
	}
	if producers, _ := m["x-producers"].([]any); len(producers) == 0 {
		t.Errorf("message %s: nobody produces it", k.Name)
	}
}

// TestAsyncAPIRefs: every reference in asyncapi.yaml leads somewhere.
func TestAsyncAPIRefs(t *testing.T) {
	doc := asyncAPI(t)
	refs := 0
	var walk func(where string, v any)
	walk = func(where string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for name, child := range v {
				walk(where+"/"+name, child)
			}
			ref, ok := v["$ref"].(string)
			if !ok {
				return
			}
			refs++
			if pointer, ok := strings.CutPrefix(ref, "#"); ok {
				if at(doc, pointer) == nil {
					t.Errorf("%s: %s leads nowhere", where, ref)
				}
			} else if _, err := os.Stat(filepath.FromSlash(ref)); err != nil {
				t.Errorf("%s: %s leads nowhere: %v", where, ref, err)
			}
		case []any:
			for i, child := range v {
				walk(fmt.Sprintf("%s/%d", where, i), child)
			}
		}
	}
	walk("", doc)
	if refs < 5*len(contracts.Events()) {
		t.Errorf("only %d references", refs)
	}
}

// TestAsyncAPIPayloads: the golden examples are what asyncapi.yaml says of
// them, and events of another type are not.
func TestAsyncAPIPayloads(t *testing.T) {
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	for _, k := range kinds() {
		b, err := contracts.Schema(k.name)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.AddResource(contracts.SchemaBase+k.name+contracts.SchemaSuffix, doc); err != nil {
			t.Fatal(err)
		}
	}
	// Its references to schemas/… lead to the schemas from here.
	url := strings.TrimSuffix(contracts.SchemaBase, "schemas/") + "asyncapi.json"
	if err := c.AddResource(url, asyncAPI(t)); err != nil {
		t.Fatal(err)
	}
	for i, k := range contracts.Events() {
		s, err := c.Compile(url + "#/components/messages/" + k.Name + "/payload/schema")
		if err != nil {
			t.Errorf("%s: %v", k.Name, err)
			continue
		}
		for j, other := range contracts.Events() {
			b, err := contracts.Example(other.Name)
			if err != nil {
				t.Fatal(err)
			}
			if err := validate(t, s, b); (err == nil) != (i == j) {
				t.Errorf("%s with the example of %s: %v", k.Name, other.Name, err)
			}
		}
		b, err := contracts.Example(k.Name)
		if err != nil {
			t.Fatal(err)
		}
		for _, attribute := range []string{"id", "source", "subject", "time", "data"} {
			var ev map[string]json.RawMessage
			if err := json.Unmarshal(b, &ev); err != nil {
				t.Fatal(err)
			}
			delete(ev, attribute)
			if validate(t, s, encode(t, ev)) == nil {
				t.Errorf("%s without %s is taken", k.Name, attribute)
			}
		}
	}
}

// Package additive compares a JSON Schema with its released form: whoever reads
// or writes by the old one must be able to go on.
package additive

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// Compare returns what in the schema now is more than an addition to the
// released one, each as a sentence that begins with the place; none: all is well.
// Allowed are new optional properties and new words (descriptions, titles);
// everything else that says what is valid must be as it was. Errors: one of
// them is no schema.
func Compare(released, now []byte) ([]string, error) {
	var c comparison
	for _, in := range []struct {
		content []byte
		into    *map[string]any
	}{{released, &c.old}, {now, &c.new}} {
		if err := json.Unmarshal(in.content, in.into); err != nil {
			return nil, fmt.Errorf("read schema: %w", err)
		}
	}
	c.seen = map[[2]string]bool{}
	c.schema("", c.old, c.new)
	slices.Sort(c.problems)
	return c.problems, nil
}

type comparison struct {
	old, new map[string]any // the documents, in which references are looked up
	seen     map[[2]string]bool
	problems []string
}

func (c *comparison) say(where, format string, args ...any) {
	if where == "" {
		where = "/"
	}
	c.problems = append(c.problems, where+": "+fmt.Sprintf(format, args...))
}

// words are the keywords that say nothing about what is valid. References are
// followed instead, and definitions only matter where something refers to them.
var words = []string{"description", "title", "$comment", "examples", "default", "deprecated", "$ref", "$defs", "properties", "required", "items", "anyOf", "additionalProperties"}

func (c *comparison) schema(where string, old, now map[string]any) {
	oldRef, _ := old["$ref"].(string)
	newRef, _ := now["$ref"].(string)
	if oldRef != "" || newRef != "" {
		pair := [2]string{oldRef, newRef}
		if oldRef != "" && newRef != "" && c.seen[pair] {
			return
		}
		c.seen[pair] = true
	}
	old, now = resolve(c.old, old), resolve(c.new, now)
	keywords := map[string]bool{}
	for k := range old {
		keywords[k] = true
	}
	for k := range now {
		keywords[k] = true
	}
	for _, k := range slices.Sorted(maps.Keys(keywords)) {
		if !slices.Contains(words, k) && !reflect.DeepEqual(normal(k, old[k]), normal(k, now[k])) {
			c.say(where, "%s was %s and is %s", k, show(old[k]), show(now[k]))
		}
	}
	c.properties(where, old, now)
	c.child(where+"/items", old["items"], now["items"])
	c.child(where+"/additionalProperties", old["additionalProperties"], now["additionalProperties"])
	oldAny, _ := old["anyOf"].([]any)
	newAny, _ := now["anyOf"].([]any)
	if len(oldAny) != len(newAny) {
		c.say(where, "anyOf had %d choices and has %d", len(oldAny), len(newAny))
		return
	}
	for i := range oldAny {
		c.child(fmt.Sprintf("%s/anyOf/%d", where, i), oldAny[i], newAny[i])
	}
}

func (c *comparison) properties(where string, old, now map[string]any) {
	before, _ := old["properties"].(map[string]any)
	after, _ := now["properties"].(map[string]any)
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if after[name] == nil {
			c.say(where, "property %q was removed", name)
			continue
		}
		c.child(where+"/"+name, before[name], after[name])
	}
	was, is := list(old["required"]), list(now["required"])
	for _, name := range is {
		if !slices.Contains(was, name) {
			c.say(where, "property %q is required now; new ones must be optional", name)
		}
	}
	for _, name := range was {
		if !slices.Contains(is, name) {
			c.say(where, "property %q is no longer required; readers count on it", name)
		}
	}
}

// child compares what may be a schema, a boolean or absent.
func (c *comparison) child(where string, old, now any) {
	a, okA := old.(map[string]any)
	b, okB := now.(map[string]any)
	if okA && okB {
		c.schema(where, a, b)
		return
	}
	if !reflect.DeepEqual(old, now) {
		c.say(where, "was %s and is %s", show(old), show(now))
	}
}

// resolve follows a reference within its document; only those to $defs exist.
func resolve(doc, s map[string]any) map[string]any {
	for range 10 {
		ref, ok := s["$ref"].(string)
		if !ok {
			return s
		}
		defs, _ := doc["$defs"].(map[string]any)
		target, ok := defs[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
		if !ok {
			return map[string]any{"$unresolved": ref}
		}
		s = target
	}
	return s
}

// normal makes lists whose order says nothing comparable.
func normal(keyword string, v any) any {
	l, ok := v.([]any)
	if !ok || keyword != "enum" && keyword != "type" {
		return v
	}
	texts := make([]string, 0, len(l))
	for _, e := range l {
		texts = append(texts, show(e))
	}
	slices.Sort(texts)
	return texts
}

func list(v any) []string {
	var out []string
	l, _ := v.([]any)
	for _, e := range l {
		out = append(out, fmt.Sprint(e))
	}
	return out
}

func show(v any) string {
	if v == nil {
		return "absent"
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	if len(b) > 200 {
		return string(b[:200]) + "…"
	}
	return string(b)
}

package additive

import (
	"slices"
	"strings"
	"testing"
)

const released = `{"$id": "x", "type": "object", "required": ["a", "b"], "additionalProperties": true,
	"properties": {
		"a": {"type": "string", "enum": ["x", "y"], "description": "an a"},
		"b": {"$ref": "#/$defs/B"},
		"n": {"anyOf": [{"$ref": "#/$defs/B"}, {"type": "null"}]},
		"m": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}},
	"$defs": {"B": {"type": "array", "items": {"type": ["string", "null"], "pattern": "^a"}}}}`

func TestCompare(t *testing.T) {
	for name, c := range map[string]struct{ old, new, want string }{
		"a new optional property": {`"m": {`, `"new": {"type": "string"}, "m": {`, ""},
		"other words":             {`an a`, `an A, really`, ""},
		"another order":           {`["x", "y"]`, `["y", "x"]`, ""},
		"types in another order":  {`["string", "null"]`, `["null", "string"]`, ""},
		"a definition renamed":    {`B"`, `C"`, ""},
		"a property removed":      {`"n": {"anyOf": [{"$ref": "#/$defs/B"}, {"type": "null"}]},`, ``, `/: property "n" was removed`},
		"required":                {`["a", "b"]`, `["a", "b", "n"]`, `/: property "n" is required now; new ones must be optional`},
		"no longer required":      {`["a", "b"]`, `["a"]`, `/: property "b" is no longer required; readers count on it`},
		"an enum narrowed":        {`["x", "y"]`, `["x"]`, `/a: enum was ["x","y"] and is ["x"]`},
		"an enum widened":         {`["x", "y"]`, `["x", "y", "z"]`, `/a: enum was ["x","y"] and is ["x","y","z"]`},
		"another type":            {`"type": "string", "enum"`, `"type": "integer", "enum"`, `/a: type was "string" and is "integer"`},
		"another pattern":         {`"^a"`, `"^b"`, `/b/items: pattern was "^a" and is "^b"`},
		"a pattern more":          {`"type": "string", "enum"`, `"type": "string", "pattern": "x", "enum"`, `/a: pattern was absent and is "x"`},
		"null no longer":          {`, {"type": "null"}`, ``, `/n: anyOf had 2 choices and has 1`},
		"a map's values":          {`"minimum": 0`, `"minimum": 1`, `/m/additionalProperties: minimum was 0 and is 1`},
		"closed":                  {`"additionalProperties": true`, `"additionalProperties": false`, `/additionalProperties: was true and is false`},
		"a keyword nobody knows":  {`"type": "object", "required"`, `"type": "object", "not": {}, "required"`, `/: not was absent and is {}`},
		"another id":              {`"$id": "x"`, `"$id": "y"`, `/: $id was "x" and is "y"`},
	} {
		if !strings.Contains(released, c.old) {
			t.Fatalf("%s: nothing to replace", name)
		}
		got, err := Compare([]byte(released), []byte(strings.ReplaceAll(released, c.old, c.new)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if c.want == "" && len(got) > 0 || c.want != "" && !slices.Equal(got, []string{c.want}) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
	if _, err := Compare([]byte(released), []byte("[")); err == nil {
		t.Error("garbage is taken")
	}
}

// A schema that refers to itself ends.
func TestRecursion(t *testing.T) {
	const tree = `{"$ref": "#/$defs/T", "$defs": {"T": {"type": "object", "properties": {"next": {"$ref": "#/$defs/T"}, "v": {"type": "string"}}}}}`
	got, err := Compare([]byte(tree), []byte(strings.ReplaceAll(tree, `"string"`, `"number"`)))
	if err != nil || !slices.Equal(got, []string{`/v: type was "string" and is "number"`}) {
		t.Errorf("got %q, %v", got, err)
	}
}

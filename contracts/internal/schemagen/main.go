// Command schemagen writes contracts/schemas from the Go types in contracts:
// structure by reflection, descriptions from the types' and fields' comments,
// patterns and closed sets of values from the tables in rules.go. A test fails
// when the files are not what it would write. Run: go generate ./contracts
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func main() {
	if err := run("."); err != nil {
		fmt.Fprintln(os.Stderr, "schemagen:", err)
		os.Exit(1)
	}
}

// run writes the schemas of the package in dir and removes those of types that
// are gone.
func run(dir string) error {
	files, err := generate(dir)
	if err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(dir, "schemas", "*"))
	if err != nil {
		return fmt.Errorf("list schemas: %w", err)
	}
	for _, name := range old {
		if _, ok := files[filepath.Base(name)]; ok {
			continue
		}
		if err := os.Remove(name); err != nil {
			return fmt.Errorf("remove the schema of nothing: %w", err)
		}
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, "schemas", name), content, 0o600); err != nil {
			return fmt.Errorf("write schema: %w", err)
		}
	}
	return nil
}

// generate returns the schemas by file name. dir holds the Go source of contracts.
func generate(dir string) (map[string][]byte, error) {
	docs, err := comments(dir)
	if err != nil {
		return nil, err
	}
	kinds := map[string]any{}
	for _, k := range contracts.Events() {
		kinds[k.Name] = k.New()
	}
	for _, d := range contracts.Documents() {
		kinds[d.Name] = d.New()
	}
	out := map[string][]byte{}
	var problems []error
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		g := generator{docs: docs, defs: map[string]any{}}
		content, err := g.file(name, reflect.TypeOf(kinds[name]).Elem())
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", name, err))
			continue
		}
		out[name+contracts.SchemaSuffix] = content
	}
	return out, errors.Join(problems...)
}

// comments returns the comments in the source by "Type" and "Type.Field".
func comments(dir string) (map[string]string, error) {
	sources, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, fmt.Errorf("list source: %w", err)
	}
	out := map[string]string{}
	for _, name := range sources {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			return nil, fmt.Errorf("parse source: %w", err)
		}
		for _, d := range file.Decls {
			decl, ok := d.(*ast.GenDecl)
			if !ok || decl.Tok != token.TYPE {
				continue
			}
			for _, s := range decl.Specs {
				spec := s.(*ast.TypeSpec)
				structure, ok := spec.Type.(*ast.StructType)
				if !ok {
					continue
				}
				doc := spec.Doc
				if doc == nil {
					doc = decl.Doc
				}
				out[spec.Name.Name] = flow(doc)
				for _, f := range structure.Fields.List {
					text := flow(f.Doc)
					if text == "" {
						text = flow(f.Comment)
					}
					for _, n := range f.Names {
						out[spec.Name.Name+"."+n.Name] = text
					}
				}
			}
		}
	}
	return out, nil
}

// flow returns a comment as one line.
func flow(c *ast.CommentGroup) string { return strings.Join(strings.Fields(c.Text()), " ") }

// object is a JSON object whose members keep the order in which they are set.
type object struct {
	keys   []string
	values map[string]any
}

func (o *object) set(key string, value any) *object {
	if o.values == nil {
		o.values = map[string]any{}
	}
	if _, ok := o.values[key]; !ok {
		o.keys = append(o.keys, key)
	}
	o.values[key] = value
	return o
}

// MarshalJSON writes the members in order.
func (o *object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, k := range o.keys {
		if i > 0 {
			b.WriteByte(',')
		}
		for j, v := range []any{k, o.values[k]} {
			var one bytes.Buffer
			e := json.NewEncoder(&one)
			e.SetEscapeHTML(false)
			if err := e.Encode(v); err != nil {
				return nil, fmt.Errorf("encode %s: %w", k, err)
			}
			if j == 1 {
				b.WriteByte(':')
			}
			b.Write(bytes.TrimSpace(one.Bytes()))
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// generator makes one file.
type generator struct {
	docs map[string]string
	defs map[string]any // by Go type
}

func (g *generator) file(name string, t reflect.Type) ([]byte, error) {
	root := new(object).
		set("$schema", "https://json-schema.org/draft/2020-12/schema").
		set("$id", contracts.SchemaBase+name+contracts.SchemaSuffix).
		set("title", name)
	body, err := g.structure(t)
	if err != nil {
		return nil, err
	}
	for _, k := range body.keys {
		root.set(k, body.values[k])
	}
	if len(g.defs) > 0 {
		defs := new(object)
		for _, k := range slices.Sorted(maps.Keys(g.defs)) {
			defs.set(k, g.defs[k])
		}
		root.set("$defs", defs)
	}
	compact, err := root.MarshalJSON()
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, compact, "", "  "); err != nil {
		return nil, fmt.Errorf("indent: %w", err)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

func (g *generator) structure(t reflect.Type) (*object, error) {
	doc := g.docs[t.Name()]
	if doc == "" {
		return nil, fmt.Errorf("type %s has no comment", t.Name())
	}
	properties, required := new(object), []string{}
	var problems []error
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || name == "-" {
			return nil, fmt.Errorf("%s.%s has no JSON name", t.Name(), f.Name)
		}
		optional := strings.Contains(options, "omitempty") || strings.Contains(options, "omitzero")
		p, err := g.property(t.Name(), f, name, optional)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		properties.set(name, p)
		if !optional {
			required = append(required, name)
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	return new(object).
		set("description", doc).
		set("type", "object").
		set("properties", properties).
		set("required", required).
		set("additionalProperties", true), nil
}

// property describes one field: its type, its rules, its comment.
func (g *generator) property(owner string, f reflect.StructField, name string, optional bool) (*object, error) {
	t, null := f.Type, false
	if t.Kind() == reflect.Pointer {
		t, null = t.Elem(), !optional
	}
	p, err := g.value(t)
	if err != nil {
		return nil, fmt.Errorf("%s.%s: %w", owner, f.Name, err)
	}
	rules := ruleOf(owner, f.Name, name, f.Type)
	for _, key := range slices.Sorted(maps.Keys(rules)) {
		p.set(key, rules[key])
	}
	if null {
		if typ, ok := p.values["type"]; ok {
			p.set("type", []any{typ, "null"})
		} else {
			p = new(object).set("anyOf", []any{p, new(object).set("type", "null")})
		}
	}
	doc := g.docs[owner+"."+f.Name]
	if doc == "" {
		doc = descriptions[owner+"."+name]
	}
	if doc == "" {
		doc = descriptions[name]
	}
	if doc == "" {
		doc = g.docs[structureIn(t)] // the field is what its type says
	}
	if doc == "" {
		return nil, fmt.Errorf("%s.%s has no comment and no entry in descriptions", owner, f.Name)
	}
	return p.set("description", doc), nil
}

// structureIn returns the name of the type of a field or of its elements.
func structureIn(t reflect.Type) string {
	if t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return ""
	}
	return t.Name()
}

func (g *generator) value(t reflect.Type) (*object, error) {
	if t == reflect.TypeFor[time.Time]() {
		return new(object).set("type", "string").set("format", "date-time"), nil
	}
	switch t.Kind() {
	case reflect.String:
		return new(object).set("type", "string"), nil
	case reflect.Bool:
		return new(object).set("type", "boolean"), nil
	case reflect.Int, reflect.Int64:
		return new(object).set("type", "integer"), nil
	case reflect.Float64:
		return new(object).set("type", "number"), nil
	case reflect.Interface:
		return new(object), nil
	case reflect.Slice:
		items, err := g.value(t.Elem())
		if err != nil {
			return nil, err
		}
		return new(object).set("type", "array").set("items", items), nil
	case reflect.Map:
		values, err := g.value(t.Elem())
		if err != nil {
			return nil, err
		}
		return new(object).set("type", "object").set("additionalProperties", values), nil
	case reflect.Struct:
		if _, ok := g.defs[t.Name()]; !ok {
			g.defs[t.Name()] = nil // a type may hold itself
			def, err := g.structure(t)
			if err != nil {
				return nil, err
			}
			g.defs[t.Name()] = def
		}
		return new(object).set("$ref", "#/$defs/"+t.Name()), nil
	default:
		return nil, fmt.Errorf("%s has no JSON Schema", t)
	}
}

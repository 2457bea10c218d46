package run

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// maxAliases bounds how deep aliases may stand in each other.
const maxAliases = 20

// document is a parsed file: what stands where.
type document struct {
	file    string
	anchors map[string]ast.Node
	places
}

// places is what was decoded so far. Services of one process read their
// sections of one file at the same time.
type places struct {
	mu    sync.Mutex
	lines map[string]int    // by path
	texts map[string]string // of what is a text, by path
}

// mark notes where a path stands.
func (p *places) mark(path string, line int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines[path] = line
}

// markNew is mark for a path that has no line yet: that of its key goes before
// that of its value.
func (p *places) markNew(path string, line int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, known := p.lines[path]; !known {
		p.lines[path] = line
	}
}

// at returns the line of a path that was decoded.
func (p *places) at(path string) (line int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	line, ok = p.lines[path]
	return line, ok
}

// note keeps what a path says.
func (p *places) note(path, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.texts[path] = text
}

// says says whether a path holds that text.
func (p *places) says(path, text string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	own, ok := p.texts[path]
	return ok && own == text
}

func newDocument(file string, body ast.Node) *document {
	d := &document{file: file, anchors: map[string]ast.Node{}, places: places{lines: map[string]int{}, texts: map[string]string{}}}
	if body != nil {
		ast.Walk(anchors(d.anchors), body)
	}
	return d
}

// anchors collects what is named for later use (&name).
type anchors map[string]ast.Node

// Visit implements ast.Visitor.
func (a anchors) Visit(n ast.Node) ast.Visitor {
	if anchor, ok := n.(*ast.AnchorNode); ok {
		a[anchor.Name.GetToken().Value] = anchor.Value
	}
	return a
}

// problem returns a mistake at a path.
func (d *document) problem(path, problem, cure string) Problem {
	return Problem{File: d.file, Line: d.line(path), Path: path, Problem: redact(problem), Cure: redact(cure), Severity: contracts.ConfigError}
}

// line returns where a path stands, or what is nearest above it; 0: nowhere.
func (d *document) line(path string) int {
	for path != "" {
		if line, ok := d.at(path); ok {
			return line
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
	return 0
}

// decoding is one walk over a part of a document.
type decoding struct {
	*document
	problems []Problem
	depth    int // of aliases
}

func (d *decoding) wrong(path string, line int, problem, cure string) {
	d.problems = append(d.problems, Problem{
		File: d.file, Line: line, Path: path, Problem: redact(problem), Cure: redact(cure), Severity: contracts.ConfigError,
	})
}

// decode reads a node into v, as much of it as can be read, and notes every
// mistake. Values are never repeated: one of them may be a secret.
func (d *decoding) decode(node ast.Node, v reflect.Value, path string) {
	node, ok := d.resolve(node, path)
	if !ok {
		return
	}
	d.markNew(path, lineOf(node))
	if node.Type() == ast.NullType {
		return
	}
	switch {
	case v.Kind() == reflect.Pointer:
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		d.decode(node, v.Elem(), path)
	case v.Kind() == reflect.Interface:
		v.Set(reflect.ValueOf(d.plain(node, path)))
	case isLeaf(v):
		d.leaf(node, v, path)
	case v.Kind() == reflect.Struct:
		d.structure(node, v, path)
	case v.Kind() == reflect.Map:
		entries, ok := d.entries(node, path, "a mapping (key: value)")
		if !ok {
			return
		}
		out := reflect.MakeMap(v.Type())
		for _, e := range entries {
			elem := reflect.New(v.Type().Elem()).Elem()
			d.decode(e.value, elem, e.path)
			out.SetMapIndex(reflect.ValueOf(e.key).Convert(v.Type().Key()), elem)
		}
		v.Set(out)
	case v.Kind() == reflect.Slice:
		sequence, ok := node.(*ast.SequenceNode)
		if !ok {
			d.wrong(path, lineOf(node), "a list is expected, this is "+kindOf(node), "write one entry a line, each after \"- \", or [a, b]")
			return
		}
		out := reflect.MakeSlice(v.Type(), len(sequence.Values), len(sequence.Values))
		for i, n := range sequence.Values {
			d.decode(n, out.Index(i), fmt.Sprintf("%s[%d]", path, i))
		}
		v.Set(out)
	default:
		d.wrong(path, lineOf(node), "this cannot be set in a file", "leave it out")
	}
}

// structure reads a mapping into a struct.
func (d *decoding) structure(node ast.Node, v reflect.Value, path string) {
	entries, ok := d.entries(node, path, "a mapping (key: value)")
	if !ok {
		return
	}
	fields := map[string]reflect.Value{}
	collect(v, fields)
	for _, e := range entries {
		field, ok := fields[e.key]
		if !ok {
			known := slices.Sorted(maps.Keys(fields))
			cure := "known here are " + strings.Join(known, ", ")
			if likely := nearest(e.key, known); likely != "" {
				cure = fmt.Sprintf("did you mean %q?", likely)
			}
			d.wrong(e.path, e.line, "there is no such key", cure)
			continue
		}
		d.decode(e.value, field, e.path)
	}
}

// collect gathers the fields of a struct by key, with those of inlined structs.
func collect(v reflect.Value, into map[string]reflect.Value) {
	for i := range v.NumField() {
		key, inline := yamlKey(v.Type().Field(i))
		switch {
		case inline:
			collect(v.Field(i), into)
		case key != "":
			into[key] = v.Field(i)
		}
	}
}

// entry is one line of a mapping.
type entry struct {
	key, path string
	line      int
	value     ast.Node
	merged    bool // from another mapping: it may be replaced
}

// entries returns what a mapping holds, each key once.
func (d *decoding) entries(node ast.Node, path, want string) ([]entry, bool) {
	var values []*ast.MappingValueNode
	switch n := node.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	default:
		d.wrong(path, lineOf(node), want+" is expected, this is "+kindOf(node), "write its keys below it, indented")
		return nil, false
	}
	var out []entry
	at := map[string]int{}
	for _, e := range values {
		line := e.Key.GetToken().Position.Line
		if _, merge := e.Key.(*ast.MergeKeyNode); merge {
			base, ok := d.resolve(e.Value, path)
			if !ok {
				continue
			}
			merged, _ := d.entries(base, path, "a mapping to merge")
			for _, m := range merged {
				if _, own := at[m.key]; !own {
					m.merged = true
					at[m.key] = len(out)
					out = append(out, m)
				}
			}
			continue
		}
		key := keyOf(e.Key)
		one := entry{key: key, path: join(path, key), line: line, value: e.Value}
		if i, twice := at[key]; twice {
			if !out[i].merged {
				d.wrong(one.path, line, fmt.Sprintf("the key is there twice, first in line %d", out[i].line), "keep one of them")
			}
			out[i] = one
			continue
		}
		at[key] = len(out)
		out = append(out, one)
	}
	for _, e := range out {
		d.mark(e.path, e.line)
	}
	return out, true
}

// resolve follows aliases and takes tags and anchors off.
func (d *decoding) resolve(node ast.Node, path string) (ast.Node, bool) {
	for range maxAliases {
		switch n := node.(type) {
		case *ast.AnchorNode:
			node = n.Value
		case *ast.TagNode:
			node = n.Value
		case *ast.AliasNode:
			name := n.Value.GetToken().Value
			target, ok := d.anchors[name]
			if !ok {
				d.wrong(path, lineOf(n), fmt.Sprintf("*%s names nothing", name), fmt.Sprintf("write &%s where its value is, above", name))
				return nil, false
			}
			node = target
		case nil:
			return &ast.NullNode{}, false
		default:
			return node, true
		}
	}
	d.wrong(path, 0, "aliases stand too deep in each other", "write the value out")
	return nil, false
}

// leaf reads a single value.
func (d *decoding) leaf(node ast.Node, v reflect.Value, path string) {
	if text, ok := node.(ast.ScalarNode); ok && v.Kind() == reflect.String {
		d.note(path, fmt.Sprint(text.GetValue()))
	}
	if v.Kind() == reflect.String && v.Type().PkgPath() == "" {
		// A library that reads [host:9092] as a mapping must not make a text of it.
		if _, scalar := node.(ast.ScalarNode); !scalar && node.Type() != ast.LiteralType {
			cure := "put it in quotes"
			if node.Type() == ast.SequenceType {
				cure = "write one value, without \"- \" or [ ]"
			}
			d.wrong(path, lineOf(node), "a text is expected, this is "+kindOf(node), cure)
			return
		}
	}
	value := reflect.New(v.Type())
	if err := yaml.NodeToValue(node, value.Interface(), yaml.Strict()); err != nil {
		d.wrong(path, lineOf(node), wantOf(v)+" is expected, this is "+kindOf(node), "write "+exampleOf(v))
		return
	}
	v.Set(value.Elem())
}

// plain returns a node as maps, lists and single values.
func (d *decoding) plain(node ast.Node, path string) any {
	node, ok := d.resolve(node, path)
	if !ok || d.depth > 10*maxAliases {
		return nil
	}
	d.depth++
	defer func() { d.depth-- }()
	switch n := node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		out := map[string]any{}
		entries, _ := d.entries(n, path, "a mapping")
		for _, e := range entries {
			out[e.key] = d.plain(e.value, e.path)
		}
		return out
	case *ast.SequenceNode:
		out := make([]any, len(n.Values))
		for i, one := range n.Values {
			at := fmt.Sprintf("%s[%d]", path, i)
			d.mark(at, lineOf(one))
			out[i] = d.plain(one, at)
		}
		return out
	}
	var v any
	if err := yaml.NodeToValue(node, &v); err != nil {
		d.wrong(path, lineOf(node), "this is no value", "put it in quotes")
	}
	return v
}

// isLeaf says whether a value is read as a whole: what is single, and what
// knows how to read itself.
func isLeaf(v reflect.Value) bool {
	switch v.Addr().Interface().(type) {
	case yaml.BytesUnmarshaler, yaml.InterfaceUnmarshaler, yaml.NodeUnmarshaler, interface{ UnmarshalText([]byte) error }:
		return true
	}
	switch v.Kind() {
	case reflect.Struct, reflect.Map, reflect.Slice, reflect.Pointer, reflect.Interface, reflect.Func, reflect.Chan:
		return false
	}
	return true
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// keyOf returns a key as it is meant, without quotes.
func keyOf(key ast.MapKeyNode) string {
	if text, ok := key.(*ast.StringNode); ok {
		return text.Value
	}
	return key.String()
}

// lineOf returns where a node begins.
func lineOf(node ast.Node) int {
	switch n := node.(type) {
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return n.Values[0].Key.GetToken().Position.Line
		}
	case *ast.MappingValueNode:
		return n.Key.GetToken().Position.Line
	case *ast.SequenceNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return lineOf(n.Values[0])
		}
	}
	if t := node.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 0
}

func kindOf(node ast.Node) string {
	switch node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "true or false"
	case *ast.NullNode:
		return "nothing"
	}
	return "a text"
}

func wantOf(v reflect.Value) string {
	switch {
	case v.Type() == durationType:
		return "a duration"
	case v.Kind() == reflect.Bool:
		return "true or false"
	case v.CanUint():
		return "a whole number of at least 0"
	case v.CanInt():
		return "a whole number"
	case v.CanFloat():
		return "a number"
	case v.Kind() == reflect.String:
		return "a text"
	}
	return "another value"
}

func exampleOf(v reflect.Value) string {
	switch {
	case v.Type() == durationType:
		return "a number with its unit: 90s, 15m, 24h"
	case v.Kind() == reflect.Bool:
		return "true or false"
	case v.CanInt(), v.CanUint():
		return "digits only"
	case v.CanFloat():
		return "digits, perhaps with a point"
	}
	return "it in quotes"
}

package run

import (
	"fmt"
	"reflect"
	"regexp"
	"strings"
)

// Messages of Validate begin with what they are about: a key, a path of keys
// ("auth.bearer.tokenFile"), an entry of a list ("rules[2]") or a name in quotes
// (source "main"); after ": " may follow the same of what is below it. That is
// how a message finds its line.

var (
	aboutPath  = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]*(?:\[[0-9]+\])?(?:\.[A-Za-z][A-Za-z0-9]*(?:\[[0-9]+\])?)*`)
	aboutNamed = regexp.MustCompile(`^(?:([a-z]+) )?"([^"]*)"`)
)

// locate returns the path that a message about a section speaks of.
func (d *document) locate(section string, t reflect.Type, message string) string {
	at := place{d: d, path: section, t: t}
	for message != "" {
		rest, ok := at.follow(section, message)
		if !ok {
			break
		}
		message = strings.TrimLeft(rest, " :,")
	}
	return at.path
}

// place is a path and the type of what stands there.
type place struct {
	d    *document
	path string
	t    reflect.Type
}

// follow goes down as the beginning of a message says, and returns the rest.
func (p *place) follow(section, message string) (rest string, ok bool) {
	if m := aboutNamed.FindStringSubmatch(message); m != nil && p.named(m[1], m[2]) {
		return message[len(m[0]):], true
	}
	words := aboutPath.FindString(message)
	if words == "" {
		return message, false
	}
	rest = message[len(words):]
	if words == section {
		return rest, strings.HasPrefix(rest, ":")
	}
	words = strings.TrimPrefix(words, section+".")
	moved := false
	for step := range strings.SplitSeq(words, ".") {
		if !p.step(step) {
			break
		}
		moved = true
	}
	return rest, moved
}

// step goes to a key, and to an entry of the list that is there.
func (p *place) step(step string) bool {
	key, index, _ := strings.Cut(step, "[")
	field, ok := fieldType(p.t, key)
	if !ok {
		return false
	}
	p.path, p.t = join(p.path, key), field
	if index != "" && p.t.Kind() == reflect.Slice {
		p.path += "[" + index
		p.t = p.t.Elem()
	}
	return true
}

// named goes to what has a name: an entry of a map, an entry of a list by the
// text it is or by its name, in place or below the key that noun is the name of.
func (p *place) named(noun, name string) bool {
	if noun == "" && p.is(p.path, name) {
		return true // it is there already
	}
	t := deref(p.t)
	switch t.Kind() {
	case reflect.Map:
		if _, ok := p.d.at(join(p.path, name)); ok {
			p.path, p.t = join(p.path, name), t.Elem()
			return true
		}
	case reflect.Slice:
		return p.entry(p.path, t, name)
	case reflect.Struct:
		for _, key := range []string{noun, noun + "s"} {
			field, ok := fieldType(t, key)
			if ok && noun != "" && field.Kind() == reflect.Slice && p.entry(join(p.path, key), field, name) {
				return true
			}
		}
	}
	return false
}

func (p *place) entry(list string, t reflect.Type, name string) bool {
	for i := 0; ; i++ {
		at := fmt.Sprintf("%s[%d]", list, i)
		if _, ok := p.d.at(at); !ok {
			return false
		}
		if p.is(at, name) {
			p.path, p.t = at, t.Elem()
			return true
		}
	}
}

// is says whether an entry of a list is a text, or has that name.
func (p *place) is(entry, name string) bool {
	if !strings.HasSuffix(entry, "]") {
		return false
	}
	for _, key := range []string{"", ".name", ".host", ".id"} {
		if p.d.says(entry+key, name) {
			return true
		}
	}
	return false
}

func deref(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t
}

// fieldType returns the type of what a key of a struct holds.
func fieldType(t reflect.Type, key string) (reflect.Type, bool) {
	t = deref(t)
	if t.Kind() != reflect.Struct {
		return nil, false
	}
	for i := range t.NumField() {
		name, inline := yamlKey(t.Field(i))
		if inline {
			if found, ok := fieldType(t.Field(i).Type, key); ok {
				return found, true
			}
			continue
		}
		if name != "" && name == key {
			return deref(t.Field(i).Type), true
		}
	}
	return nil, false
}

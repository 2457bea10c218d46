package run

import (
	"errors"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// environmentPrefix begins the variables that go before the file.
const environmentPrefix = "TIDEWAITER_"

var durationType = reflect.TypeFor[time.Duration]()

// environment lays what the environment says over the file.
func (c *Config) environment() []Problem {
	var problems []Problem
	for section, into := range c.commonSections() {
		if section == "registries" {
			continue // a list has no names
		}
		_, own := c.override(environmentPrefix+strings.ToUpper(section), reflect.ValueOf(into).Elem())
		problems = append(problems, own...)
	}
	return problems
}

// override sets the fields of a struct for which there is a variable: prefix,
// "_" and the field's key, with "_" before what are capitals in it. It says
// whether there was one.
func (c *Config) override(prefix string, v reflect.Value) (found bool, problems []Problem) {
	for i := range v.NumField() {
		key, inline := yamlKey(v.Type().Field(i))
		field := v.Field(i)
		name := prefix + "_" + variable(key)
		var set bool
		var own []Problem
		switch {
		case inline:
			set, own = c.override(prefix, field)
		case key == "":
			continue
		case field.Kind() == reflect.Struct:
			set, own = c.override(name, field)
		case field.Kind() == reflect.Pointer && field.Type().Elem().Kind() == reflect.Struct:
			copied := reflect.New(field.Type().Elem())
			if !field.IsNil() {
				copied.Elem().Set(field.Elem())
			}
			if set, own = c.override(name, copied.Elem()); set {
				field.Set(copied)
			}
		default:
			set, own = c.setFrom(name, field)
		}
		found = found || set
		problems = append(problems, own...)
	}
	return found, problems
}

// setFrom sets one field from one variable. Values are never repeated.
func (c *Config) setFrom(name string, field reflect.Value) (bool, []Problem) {
	text, ok := c.lookupEnv(name)
	if !ok {
		return false, nil
	}
	if err := parseInto(text, field); err != nil {
		return false, []Problem{{
			Problem: "environment variable " + name + ": " + wantOf(field) + " is expected",
			Cure:    "write " + exampleOf(field), Severity: contracts.ConfigError,
		}}
	}
	return true, nil
}

func parseInto(text string, field reflect.Value) (err error) {
	switch {
	case field.Type() == durationType:
		var d time.Duration
		d, err = time.ParseDuration(text)
		field.SetInt(int64(d))
	case field.Kind() == reflect.String:
		field.SetString(text)
	case field.CanInt():
		var n int64
		n, err = strconv.ParseInt(text, 10, 64)
		field.SetInt(n)
	case field.Kind() == reflect.Bool:
		var b bool
		b, err = strconv.ParseBool(text)
		field.SetBool(b)
	case field.Type() == reflect.TypeFor[[]string]():
		field.Set(reflect.ValueOf(strings.Split(text, ",")))
	default:
		return errors.New("only the file can say this")
	}
	return err
}

// yamlKey returns a field's key in the file, "" where it has none, and whether
// its own fields stand in its place.
func yamlKey(f reflect.StructField) (key string, inline bool) {
	tag, ok := f.Tag.Lookup("yaml")
	name, options, _ := strings.Cut(tag, ",")
	switch {
	case !f.IsExported() && !f.Anonymous, name == "-":
		return "", false
	case strings.Contains(options, "inline"):
		return "", true
	case !ok || name == "":
		return strings.ToLower(f.Name), false
	}
	return name, false
}

// variable turns a key into the form of an environment variable: caFile, CA_FILE.
func variable(key string) string {
	var b strings.Builder
	for _, r := range key {
		if unicode.IsUpper(r) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToUpper(r))
	}
	return b.String()
}

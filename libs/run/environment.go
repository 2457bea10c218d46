package run

import (
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// environmentPrefix begins the variables that go before the file.
const environmentPrefix = "TIDEWAITER_"

var durationType = reflect.TypeFor[time.Duration]()

// environment lays what the environment says over the file.
func (c *Config) environment() error {
	var problems []error
	for section, into := range map[string]any{
		"log": &c.Log, "http": &c.HTTP, "kafka": &c.Kafka, "redis": &c.Redis, "database": &c.Database,
	} {
		_, err := c.override(environmentPrefix+strings.ToUpper(section), reflect.ValueOf(into).Elem())
		problems = append(problems, err)
	}
	return errors.Join(problems...)
}

// override sets the fields of a struct for which there is a variable: prefix,
// "_" and the field's key, with "_" before what are capitals in it. It says
// whether there was one.
func (c *Config) override(prefix string, v reflect.Value) (bool, error) {
	var problems []error
	found := false
	for i := range v.NumField() {
		key, inline := yamlKey(v.Type().Field(i))
		field := v.Field(i)
		name := prefix + "_" + variable(key)
		var set bool
		var err error
		switch {
		case inline:
			set, err = c.override(prefix, field)
		case key == "":
			continue
		case field.Kind() == reflect.Struct:
			set, err = c.override(name, field)
		case field.Kind() == reflect.Pointer && field.Type().Elem().Kind() == reflect.Struct:
			own := reflect.New(field.Type().Elem())
			if !field.IsNil() {
				own.Elem().Set(field.Elem())
			}
			if set, err = c.override(name, own.Elem()); set {
				field.Set(own)
			}
		default:
			set, err = c.setFrom(name, field)
		}
		found = found || set
		problems = append(problems, err)
	}
	return found, errors.Join(problems...)
}

// setFrom sets one field from one variable.
func (c *Config) setFrom(name string, field reflect.Value) (bool, error) {
	text, ok := c.lookupEnv(name)
	if !ok {
		return false, nil
	}
	var err error
	switch {
	case field.Type() == durationType:
		var d time.Duration
		if d, err = time.ParseDuration(text); err == nil {
			field.SetInt(int64(d))
		} else {
			err = errors.New("is no duration such as 90s or 10m")
		}
	case field.Kind() == reflect.String:
		field.SetString(text)
	case field.CanInt():
		var n int64
		if n, err = strconv.ParseInt(text, 10, 64); err == nil {
			field.SetInt(n)
		} else {
			err = errors.New("is no whole number")
		}
	case field.Kind() == reflect.Bool:
		var b bool
		if b, err = strconv.ParseBool(text); err == nil {
			field.SetBool(b)
		} else {
			err = errors.New("is neither true nor false")
		}
	case field.Type() == reflect.TypeFor[[]string]():
		field.Set(reflect.ValueOf(strings.Split(text, ",")))
	default:
		err = errors.New("cannot be set by a variable, write it in the file")
	}
	if err != nil {
		return false, fmt.Errorf("environment variable %s %w: %w", name, err, ErrConfig)
	}
	return true, nil
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

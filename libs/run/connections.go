package run

import (
	"crypto/tls"
	"fmt"
	"reflect"
	"strings"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Each service has credentials of its own, and all share one file: in the
// sections kafka, redis, database and registries, "{service}" stands for the
// service's name, "{SERVICE}" for it in capitals.

// For returns a copy of a section's value as the named service sees it.
func For[T any](section T, service string) T {
	names := strings.NewReplacer("{service}", service, "{SERVICE}", strings.ToUpper(service))
	return filled(reflect.ValueOf(section), names).Interface().(T)
}

// filled returns a copy of v with the names filled in in all of its texts.
func filled(v reflect.Value, names *strings.Replacer) reflect.Value {
	out := reflect.New(v.Type()).Elem()
	out.Set(v)
	switch v.Kind() {
	case reflect.String:
		out.SetString(names.Replace(v.String()))
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				out.Field(i).Set(filled(v.Field(i), names))
			}
		}
	case reflect.Slice:
		if v.IsNil() {
			break
		}
		out.Set(reflect.MakeSlice(v.Type(), v.Len(), v.Len()))
		for i := range v.Len() {
			out.Index(i).Set(filled(v.Index(i), names))
		}
	case reflect.Pointer:
		// Only what comes from the file is looked into; a *tls.Config does not.
		if !v.IsNil() && ours(v.Type().Elem()) {
			out.Set(reflect.New(v.Type().Elem()))
			out.Elem().Set(filled(v.Elem(), names))
		}
	}
	return out
}

func ours(t reflect.Type) bool {
	return t == reflect.TypeFor[credential.TLS]() || t == reflect.TypeFor[redis.Sentinel]()
}

// secret returns how a secret is read at every connection, nil where none is named.
func (c *Config) secret(what, file, env string) (func() (string, error), error) {
	if file == "" && env == "" {
		return nil, nil //nolint:nilnil // no secret is named
	}
	s := credential.Secret{File: file, Env: env}
	if _, err := s.Read(c.lookupEnv); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", what, err, ErrConfig)
	}
	return s.Source(c.lookupEnv), nil
}

// sourceOf returns how certificates are read at every connection.
func sourceOf(what string, files credential.TLS) (func() (*tls.Config, error), error) {
	source := files.Source()
	if _, err := source(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", what, err, ErrConfig)
	}
	return source, nil
}

// BusConfig returns how the named service reaches Kafka.
func (c *Config) BusConfig(service string) (bus.Config, error) {
	k := For(c.Kafka, service)
	if len(k.Brokers) == 0 {
		return bus.Config{}, fmt.Errorf("kafka.brokers is empty, set it or TIDEWAITER_KAFKA_BROKERS: %w", ErrConfig)
	}
	password, err := c.secret("kafka.passwordFile", k.PasswordFile, k.PasswordEnv)
	if err != nil {
		return bus.Config{}, err
	}
	if k.TLSFiles != nil {
		if k.TLSSource, err = sourceOf("kafka.tls", *k.TLSFiles); err != nil {
			return bus.Config{}, err
		}
	}
	k.PasswordSource = password
	return k.Config, nil
}

// redisConfig returns how the named service reaches Redis.
func (c *Config) redisConfig(service string) (redis.Config, error) {
	r := For(c.Redis, service)
	if !c.hasRedis(service) {
		return redis.Config{}, fmt.Errorf("redis.url is empty, set it or TIDEWAITER_REDIS_URL (or sentinel or cluster): %w", ErrConfig)
	}
	var err error
	if r.PasswordSource, err = c.secret("redis.passwordFile", r.PasswordFile, r.PasswordEnv); err != nil {
		return redis.Config{}, err
	}
	if s := r.Sentinel; s != nil {
		if s.Password, err = (credential.Secret{File: s.PasswordFile, Env: s.PasswordEnv}).Read(c.lookupEnv); err != nil {
			return redis.Config{}, fmt.Errorf("redis.sentinel.passwordFile: %w: %w", err, ErrConfig)
		}
	}
	if r.TLSFiles != nil {
		if r.TLSSource, err = sourceOf("redis.tls", *r.TLSFiles); err != nil {
			return redis.Config{}, err
		}
	}
	return r.Config, nil
}

// hasRedis says whether a Redis is named.
func (c *Config) hasRedis(service string) bool {
	r := For(c.Redis, service)
	return r.URL != "" || r.Sentinel != nil || len(r.Cluster) > 0
}

// storeConfig returns how the named service reaches its database.
func (c *Config) storeConfig(service string) (store.Config, error) {
	d := For(c.Database, service)
	out := store.Config{URL: d.URL}
	var err error
	if d.URLEnv != "" {
		if out.URL, err = (credential.Secret{Env: d.URLEnv}).Read(c.lookupEnv); err != nil {
			return store.Config{}, fmt.Errorf("database.urlEnv: %w: %w", err, ErrConfig)
		}
	}
	if out.URL == "" {
		return store.Config{}, fmt.Errorf("database.url is empty, set it or TIDEWAITER_DATABASE_URL: %w", ErrConfig)
	}
	if out.PasswordSource, err = c.secret("database.passwordFile", d.PasswordFile, d.PasswordEnv); err != nil {
		return store.Config{}, err
	}
	if d.TLSFiles != nil {
		if out.TLSSource, err = sourceOf("database.tls", *d.TLSFiles); err != nil {
			return store.Config{}, err
		}
	}
	if err := out.CheckURL(); err != nil {
		return store.Config{}, fmt.Errorf("database.%w: %w", err, ErrConfig)
	}
	return out, nil
}

// Hosts returns the registries as the named service sees them.
func (c *Config) Hosts(service string) []registry.Host { return For(c.Registries, service) }

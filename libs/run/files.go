package run

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// expiresSoon is how long before its end a certificate is spoken of.
const expiresSoon = 14 * 24 * time.Hour

// Keys of settings that name files: what ends with "File" or "Files" does.
var (
	secretFiles      = []string{"passwordfile", "tokenfile", "secretfile", "valuefile", "keyfile"} // these, or what ends so
	certificateFiles = []string{"caFile", "clientCAFile", "certFile"}
)

// files checks what a section's settings name: files must be there, be readable
// and hold what they are for, secrets only for their owner; environment
// variables must be set. services are those whose names stand for "{service}".
func (c *Config) files(v reflect.Value, path string, services []string) []Problem {
	f := files{c: c, services: services, seen: map[string]bool{}}
	f.walk(v, path)
	return f.problems
}

type files struct {
	c        *Config
	services []string
	seen     map[string]bool // path and problem
	problems []Problem
}

func (f *files) say(path, severity, problem, cure string) {
	if f.seen[path+problem] {
		return // the same for another service
	}
	f.seen[path+problem] = true
	p := f.c.doc.problem(path, problem, cure)
	p.Severity = severity
	f.problems = append(f.problems, p)
}

func (f *files) walk(v reflect.Value, path string) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() && v.Type().Elem().PkgPath() != "crypto/tls" {
			f.walk(v.Elem(), path)
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			f.walk(v.MapIndex(key), join(path, fmt.Sprint(key)))
		}
	case reflect.Slice:
		for i := range v.Len() {
			f.walk(v.Index(i), fmt.Sprintf("%s[%d]", path, i))
		}
	case reflect.Struct:
		f.settings(v, path)
	}
}

// settings looks at the fields of one struct.
func (f *files) settings(v reflect.Value, path string) {
	texts := map[string]string{}
	for i := range v.NumField() {
		key, inline := yamlKey(v.Type().Field(i))
		field := v.Field(i)
		switch {
		case inline:
			f.walk(field, path)
		case key == "":
		case field.Kind() == reflect.String:
			texts[key] = field.String()
		case strings.HasSuffix(key, "Files"):
			for j, name := range field.Interface().([]string) {
				f.file(key, fmt.Sprintf("%s[%d]", join(path, key), j), name)
			}
		default:
			f.walk(field, join(path, key))
		}
	}
	for key, value := range texts {
		at := join(path, key)
		switch {
		case value == "":
		case strings.HasSuffix(key, "File"):
			other := strings.TrimSuffix(key, "File") + "Env"
			if texts[other] != "" {
				f.say(at, contracts.ConfigError, "the same is named by "+key+" and by "+other, "keep one of them")
			}
			for _, name := range f.names(value) {
				f.file(key, at, name)
			}
		case strings.HasSuffix(key, "Env"):
			for _, name := range f.names(value) {
				if set, ok := f.c.lookupEnv(name); !ok || set == "" {
					f.say(at, contracts.ConfigError, "environment variable "+name+" is not set", "set it where the services start")
				}
			}
		}
	}
	f.pair(texts, path)
}

// names fills in the services' names.
func (f *files) names(value string) []string {
	if !strings.Contains(strings.ToLower(value), "{service}") {
		return []string{value}
	}
	var out []string
	for _, s := range f.services {
		out = append(out, For(value, s))
	}
	return out
}

// file looks at one file.
func (f *files) file(key, path, name string) {
	secret := slices.ContainsFunc(secretFiles, func(s string) bool { return strings.HasSuffix(strings.ToLower(key), s) })
	info, err := os.Stat(name)
	if err == nil && info.IsDir() {
		err = errors.New("it is a folder")
	}
	var content []byte
	if err == nil {
		content, err = os.ReadFile(name) //nolint:gosec // a file that the configuration names
	}
	var at *fs.PathError
	if errors.As(err, &at) {
		err = at.Err
	}
	switch {
	case err != nil:
		f.say(path, contracts.ConfigError, fmt.Sprintf("%s cannot be read: %v", name, err), "put it there, readable for the user that services run as")
		return
	case len(strings.TrimSpace(string(content))) == 0:
		f.say(path, contracts.ConfigError, name+" is empty", "put into it what "+key+" needs")
		return
	case secret && info.Mode().Perm()&0o007 != 0:
		f.say(path, contracts.ConfigWarning, fmt.Sprintf("%s holds a secret and is open to everybody (mode %04o)", name, info.Mode().Perm()), "chmod 600 "+name)
	}
	if slices.Contains(certificateFiles, key) {
		f.certificates(path, name, content)
	}
}

// certificates looks at a PEM file of certificates.
func (f *files) certificates(path, name string, content []byte) {
	found := 0
	for block, rest := pem.Decode(content); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			f.say(path, contracts.ConfigError, fmt.Sprintf("certificate %d of %s cannot be read: %v", found+1, name, err), "replace the file")
			return
		}
		found++
		who := fmt.Sprintf("certificate %q of %s ", cert.Subject.CommonName, name)
		switch now := time.Now(); {
		case now.After(cert.NotAfter):
			f.say(path, contracts.ConfigWarning, who+"has expired on "+cert.NotAfter.Format(time.DateOnly), "replace it; services read it again by themselves")
		case now.Add(expiresSoon).After(cert.NotAfter):
			f.say(path, contracts.ConfigWarning, who+"expires on "+cert.NotAfter.Format(time.DateOnly), "replace it soon; services read it again by themselves")
		case now.Before(cert.NotBefore):
			f.say(path, contracts.ConfigWarning, who+"is not valid before "+cert.NotBefore.Format(time.DateTime), "mind the clock of this machine")
		}
	}
	if found == 0 {
		f.say(path, contracts.ConfigError, name+" holds no certificate in PEM form", "convert it: it must have lines -----BEGIN CERTIFICATE-----")
	}
}

// pair looks at a certificate and its key.
func (f *files) pair(texts map[string]string, path string) {
	cert, ok := texts["certFile"]
	key := texts["keyFile"]
	if !ok || cert == "" && key == "" {
		return // a keyFile alone is a key of another kind
	}
	if cert == "" || key == "" {
		f.say(path, contracts.ConfigError, "certFile and keyFile go together, one is missing", "name both or neither")
		return
	}
	keys := f.names(key)
	for i, name := range f.names(cert) {
		_, errCert := os.Stat(name)
		_, errKey := os.Stat(keys[min(i, len(keys)-1)])
		if errCert != nil || errKey != nil {
			continue // said already
		}
		if _, err := tls.LoadX509KeyPair(name, keys[min(i, len(keys)-1)]); err != nil {
			f.say(join(path, "keyFile"), contracts.ConfigError, fmt.Sprintf("the key does not go with %s: %v", name, err), "name the private key of this certificate, PEM, without a password")
		}
	}
}

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// dockerHub is where names without a registry are looked for, as container
// tools do; its API has another name.
const (
	dockerHub    = "docker.io"
	dockerHubAPI = "registry-1.docker.io"
)

// parseRef reads [registry/]repository[:tag][@digest] as container tools do.
func parseRef(s string) (registry.Ref, error) {
	name, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest && !contracts.ValidDigest(digest) {
		return registry.Ref{}, usage(fmt.Errorf("%q: %q is not a digest (sha256:<64 hex>)", s, digest))
	}
	host, rest, ok := strings.Cut(name, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		host, rest = dockerHub, name
	}
	repository, tag := rest, ""
	if i := strings.LastIndex(rest, ":"); i > strings.LastIndex(rest, "/") {
		repository, tag = rest[:i], rest[i+1:]
	}
	if host == dockerHub && !strings.Contains(repository, "/") {
		repository = "library/" + repository
	}
	if tag == "" && !hasDigest {
		tag = "latest"
	}
	ref := registry.Ref{Registry: host, Repository: repository, Tag: tag, Digest: digest}
	if !contracts.ValidRegistry(host) || !contracts.ValidRepository(repository) || tag != "" && !contracts.ValidTag(tag) {
		return registry.Ref{}, usage(fmt.Errorf("%q is not an image name (registry/repository:tag or registry/repository@sha256:…)", s))
	}
	return ref, nil
}

// registryFlags say how a registry that the user names is reached, where the
// configuration does not say it.
type registryFlags struct {
	Data        string `help:"Data directory of a running 'tidewaiter up', whose registry's password is used." type:"path" default:"./tidewaiter-data" env:"TIDEWAITER_DATA" placeholder:"DIR"`
	PlainHTTP   bool   `help:"Use HTTP without TLS (loopback addresses always may)." name:"plain-http"`
	Username    string `help:"User name at the registry."`
	PasswordEnv string `help:"Environment variable that holds the password." placeholder:"NAME"`
	CAFile      string `help:"PEM file of the certificate authority of the registry." type:"path" placeholder:"FILE"`
}

// client returns a client for the registries of names; those the configuration
// does not know are used as the flags say: the user's own command line is
// permission to connect.
func (f registryFlags) client(s *streams, refs ...registry.Ref) (*registry.Client, error) {
	cfg, err := run.Load(s.config, os.LookupEnv)
	if err != nil {
		return nil, err
	}
	hosts := cfg.Hosts(cliName)
	for _, ref := range refs {
		if slices.ContainsFunc(hosts, func(h registry.Host) bool { return h.Name == ref.Registry }) {
			continue
		}
		hosts = append(hosts, f.host(ref.Registry))
	}
	c, err := registry.New(hosts, s.log)
	if err != nil {
		return nil, usage(err)
	}
	return c, nil
}

func (f registryFlags) host(name string) registry.Host {
	if a, err := allinone.ReadAddresses(f.Data); err == nil && a.Registry.Host == name && f.Username == "" {
		return a.RegistryHost()
	}
	h := registry.Host{
		Name: name, PlainHTTP: f.PlainHTTP || loopback(name) && f.CAFile == "", AllowPrivate: loopback(name),
		Username: f.Username, PasswordEnv: f.PasswordEnv, CAFile: f.CAFile,
	}
	if name == dockerHub {
		h.Address = dockerHubAPI
	}
	return h
}

func loopback(name string) bool {
	host, _, err := net.SplitHostPort(name)
	if err != nil {
		host = name
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// registryError gives trouble with a registry its exit code.
func registryError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, registry.ErrNotFound), errors.Is(err, registry.ErrUnauthorized), errors.Is(err, registry.ErrNotConfigured):
		return usage(err)
	}
	return unavailable(err)
}

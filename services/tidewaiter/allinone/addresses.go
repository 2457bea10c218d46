package allinone

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// ErrNotRunning is returned where no all-in-one runs on a directory.
var ErrNotRunning = errors.New("nothing is running on this directory")

// Addresses say how a running all-in-one is reached. They are kept beside its
// data, readable by its user only, so that other commands find it.
type Addresses struct {
	PID       int      `json:"pid"`
	Intake    string   `json:"intake"`            // URL
	Catalog   string   `json:"catalog"`           // URL
	Sweeper   string   `json:"sweeper,omitempty"` // URL; empty: it does not run
	Monitor   string   `json:"monitor"`           // URL of /readyz and /metrics
	Token     string   `json:"token"`             // bearer token of intake's and catalog's API
	Kafka     Kafka    `json:"kafka"`
	Registry  Registry `json:"registry"`
	PublicKey string   `json:"publicKey"` // PEM
}

// Kafka is how the embedded Kafka is reached.
type Kafka struct {
	Broker   string `json:"broker"`
	Username string `json:"username"`
	Password string `json:"password"`
}

// Registry is how the embedded registry is reached.
type Registry struct {
	Host     string `json:"host"`
	Username string `json:"username"`
	Password string `json:"password"`
}

// BusConfig returns the configuration of a client of the embedded Kafka.
func (a Addresses) BusConfig() bus.Config {
	return bus.Config{Brokers: []string{a.Kafka.Broker}, Username: a.Kafka.Username, Password: a.Kafka.Password}
}

// RegistryHost returns the configuration of a client of the embedded registry.
func (a Addresses) RegistryHost() registry.Host {
	return registry.Host{Name: a.Registry.Host, PlainHTTP: true, Username: a.Registry.Username, Password: a.Registry.Password}
}

// Reachable returns the URL at which a service that listens on an address,
// host:port, is reached from this machine; "" for what is no address.
func Reachable(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, port)
}

const addressesFile = "addresses.json"

func (a Addresses) write(dir string) error {
	b, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return fmt.Errorf("encode addresses: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, addressesFile), b, 0o600); err != nil {
		return fmt.Errorf("write addresses: %w", err)
	}
	return nil
}

// ReadAddresses returns how the all-in-one that keeps its data in dir is
// reached, or ErrNotRunning.
func ReadAddresses(dir string) (Addresses, error) {
	b, err := os.ReadFile(filepath.Join(dir, addressesFile)) //nolint:gosec // the user's own directory
	if errors.Is(err, fs.ErrNotExist) {
		return Addresses{}, fmt.Errorf("%s: %w (start one: tidewaiter up --data %s)", dir, ErrNotRunning, dir)
	}
	if err != nil {
		return Addresses{}, fmt.Errorf("read addresses: %w", err)
	}
	var a Addresses
	if err := json.Unmarshal(b, &a); err != nil {
		return Addresses{}, fmt.Errorf("read addresses in %s: %w", dir, err)
	}
	return a, nil
}

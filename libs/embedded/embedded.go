// Package embedded runs Kafka (kfake), Redis (miniredis), a registry (olareg)
// and a database (SQLite) inside this process, each reached over its real
// protocol on a loopback port with a password, and kept in a directory.
package embedded

import (
	"context"
	"log/slog"
)

// Options say what to start.
type Options struct {
	Dir string // where everything is kept; created when absent
	// HookURL receives push notifications of the registry, with HookAuth as its
	// Authorization header. May be set later with SetHook.
	HookURL, HookAuth             string
	RegistryAddress, KafkaAddress string // host:port; default a free loopback port (kept in Dir for the next start)
	Partitions                    int
}

// Servers are the running servers.
type Servers struct {
	KafkaAddress                 string
	KafkaUsername, KafkaPassword string // SCRAM-SHA-512; empty: none
	RedisURL                     string // without password
	RedisPassword                string
	RegistryAddress              string
	RegistryUsername             string
	RegistryPassword             string
	DatabaseURL                  string
}

// Start starts all of them; they stop when ctx ends, and Wait returns then.
func Start(ctx context.Context, o Options, log *slog.Logger) (*Servers, error) { return nil, nil }

// SetHook sets where the registry sends push notifications.
func (s *Servers) SetHook(url, authorization string) {}

// FlushRedis forgets all of Redis (for fault tests and the demo).
func (s *Servers) FlushRedis() {}

// Wait returns when all have stopped and synced.
func (s *Servers) Wait() error { return nil }

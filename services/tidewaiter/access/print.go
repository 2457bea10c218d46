package access

import (
	"fmt"
	"slices"
	"strings"

	c "github.com/tidewaiter/tidewaiter/contracts"
)

// Names say what things are called on the servers.
type Names struct {
	Prefix string // kafka.prefix: before every topic and group
	Keys   string // redis.prefix: before every key
	User   string // of Kafka and Redis, with "{service}"; default: tidewaiter-{service}
	Role   string // of PostgreSQL, with "{service}"; default: tidewaiter_{service}
}

func (n Names) user(service string) string { return filled(n.User, "tidewaiter-{service}", service) }

func (n Names) role(service string) string { return filled(n.Role, "tidewaiter_{service}", service) }

func filled(template, fallback, service string) string {
	if template == "" {
		template = fallback
	}
	return strings.ReplaceAll(template, "{service}", service)
}

// Kinds of what Kafka protects.
const (
	Topic = "topic"
	Group = "group"
)

// Grant is one permission in Kafka. Read and Write imply Describe.
type Grant struct {
	Kind, Name string
	Operations []string // Read, Write
}

// Topics returns the topics that a service reads, writes, or keeps its retries
// and dead letters in; each with what it may do there.
func (s Service) Topics(prefix string) []Grant {
	kinds := map[string]c.EventKind{}
	for _, k := range c.Events() {
		kinds[k.Name] = k
	}
	operations := map[string][]string{}
	allow := func(topic, operation string) {
		if topic = prefix + topic; !slices.Contains(operations[topic], operation) {
			operations[topic] = append(operations[topic], operation)
		}
	}
	lanes := func(event, operation string) {
		k := kinds[event]
		allow(k.Topic, operation)
		if k.Bulk {
			allow(k.Topic+c.BulkSuffix, operation)
		}
	}
	for _, e := range slices.Concat(s.Reads, s.Tails) {
		lanes(e, "Read")
	}
	for _, e := range s.Reads {
		allow(kinds[e].Topic+"."+s.Name+".retry", "Read")
		allow(kinds[e].Topic+"."+s.Name+".retry", "Write")
		allow(kinds[e].Topic+"."+s.Name+".dlq", "Write")
	}
	for _, e := range s.DeadLetters {
		allow(kinds[e].Topic+"."+s.Name+".dlq", "Write")
	}
	for _, e := range s.Writes {
		lanes(e, "Write")
	}
	var out []Grant
	for topic, allowed := range operations {
		slices.Sort(allowed)
		out = append(out, Grant{Topic, topic, allowed})
	}
	slices.SortFunc(out, func(a, b Grant) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Kafka returns what a service may do in Kafka: its topics and, where it reads
// any, its group.
func (s Service) Kafka(prefix string) []Grant {
	out := s.Topics(prefix)
	if len(s.Reads) > 0 {
		out = append(out, Grant{Group, prefix + s.Name, []string{"Read"}})
	}
	return out
}

// Kafka returns a shell script that makes topics and ACLs with the tools that
// come with Kafka. Users are made by hand: the script holds no password.
func Kafka(services []Service, n Names, partitions, replication int) string {
	var b strings.Builder
	b.WriteString(`#!/bin/sh
# Topics and permissions of Tidewaiter's services in Kafka. It may be run again.
#   BOOTSTRAP=host:port COMMAND_CONFIG=admin.properties sh kafka.sh
# First make each user, for example:
#   kafka-configs.sh --bootstrap-server $BOOTSTRAP --command-config $COMMAND_CONFIG --alter \
#     --entity-type users --entity-name USER --add-config 'SCRAM-SHA-512=[password=…]'
set -eu
topic() { kafka-topics.sh --bootstrap-server "$BOOTSTRAP" --command-config "$COMMAND_CONFIG" --create --if-not-exists --topic "$@"; }
allow() { kafka-acls.sh --bootstrap-server "$BOOTSTRAP" --command-config "$COMMAND_CONFIG" --add "$@"; }
`)
	made := map[string]bool{}
	for _, s := range services {
		for _, g := range s.Topics(n.Prefix) {
			if made[g.Name] {
				continue
			}
			made[g.Name] = true
			settings := fmt.Sprintf("--partitions %d", partitions)
			if strings.HasSuffix(g.Name, ".dlq") {
				settings = fmt.Sprintf("--partitions 1 --config retention.ms=%d --config max.message.bytes=%d", int64(90*24*3600*1000), 4<<20+128<<10)
			}
			fmt.Fprintf(&b, "topic %s --replication-factor %d %s\n", g.Name, replication, settings)
		}
	}
	for _, s := range services {
		fmt.Fprintf(&b, "\n# %s\n", s.Name)
		for _, g := range s.Kafka(n.Prefix) {
			fmt.Fprintf(&b, "allow --allow-principal User:%s --%s %s", n.user(s.Name), g.Kind, g.Name)
			for _, o := range g.Operations {
				b.WriteString(" --operation " + o)
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// Postgres returns SQL that makes a role for each service: it owns the tables
// that it creates, and shares the outbox, where it sees its own rows alone, and
// the blobs, which it may read and add to. The common tables must be there, and
// whoever runs it owns them and has CREATEROLE. It may be run again; passwords
// are set by hand.
func Postgres(services []Service, n Names) string {
	var b strings.Builder
	b.WriteString(`-- Roles of Tidewaiter's services. Run it in their database, as a role with CREATEROLE that owns the database and the common
-- tables (outbox, blobs, store_versions), which the first service, or tidewaiter privileges postgres --apply-with-env, makes.
-- Then give each role a password: \password ROLE
BEGIN;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
ALTER TABLE outbox ENABLE ROW LEVEL SECURITY;
`)
	for _, s := range services {
		if !s.Database && s.Blobs == NoBlobs {
			continue
		}
		role := n.role(s.Name)
		fmt.Fprintf(&b, "\n-- %s\n", s.Name)
		fmt.Fprintf(&b, "DO $$ BEGIN CREATE ROLE %q LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT; EXCEPTION WHEN duplicate_object THEN NULL; END $$;\n", role)
		fmt.Fprintf(&b, "REVOKE ALL ON outbox, blobs, store_versions FROM %q;\n", role)
		fmt.Fprintf(&b, "REVOKE CREATE ON SCHEMA public FROM %q;\nGRANT USAGE ON SCHEMA public TO %[1]q;\nGRANT SELECT ON store_versions TO %[1]q;\n", role)
		if s.Database && !s.NoTables {
			fmt.Fprintf(&b, "GRANT CREATE ON SCHEMA public TO %q;\n", role)
		}
		switch s.Blobs {
		case ReadBlobs:
			fmt.Fprintf(&b, "GRANT SELECT ON blobs TO %q;\n", role)
		case AppendBlobs:
			fmt.Fprintf(&b, "GRANT SELECT, INSERT, UPDATE ON blobs TO %q;\n", role)
		case ExpireBlobs:
			fmt.Fprintf(&b, "GRANT SELECT, UPDATE (touched_at), DELETE ON blobs TO %q;\n", role)
		}
		operations, rows := "SELECT, INSERT", fmt.Sprintf("service = '%s'", s.Name)
		switch {
		case s.Prune:
			operations, rows = "SELECT, DELETE", "true"
		case !s.Outbox:
			continue
		}
		fmt.Fprintf(&b, "GRANT %s ON outbox TO %q;\n", operations, role)
		fmt.Fprintf(&b, "DROP POLICY IF EXISTS %q ON outbox;\nCREATE POLICY %[1]q ON outbox TO %[1]q USING (%s);\n", role, rows)
	}
	b.WriteString("COMMIT;\n")
	return b.String()
}

// Redis returns lines for redis-cli. Users are made without a password, with
// which nobody can log in; it is added by hand, and stays when they are run again.
func Redis(services []Service, n Names) string {
	var b strings.Builder
	for _, s := range services {
		if len(s.Redis) == 0 {
			continue
		}
		fmt.Fprintf(&b, "ACL SETUSER %s on resetkeys resetchannels -@all", n.user(s.Name))
		var commands []string
		for _, k := range s.Redis {
			b.WriteString(" ~" + n.Keys + k.Pattern)
			commands = append(commands, k.Commands...)
		}
		// ping is the health check, select chooses another database than 0; a cluster's client asks for its slots.
		commands = append(commands, "ping", "select", "cluster|slots", "cluster|shards", "command")
		slices.Sort(commands)
		for _, command := range slices.Compact(commands) {
			b.WriteString(" +" + command)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// Registries prints what each service may do in registries: in words, and in
// the scopes of a token server. own is advisor's repository.
func Registries(services []Service, own string) string {
	var b strings.Builder
	for _, s := range services {
		if s.Registry != NoRegistry {
			fmt.Fprintf(&b, "%-10s  %-47s  %s\n", s.Name, s.Registry, strings.Join(s.Registry.Scopes(own), " "))
		}
	}
	return b.String()
}

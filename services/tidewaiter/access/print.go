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

// Grant is one permission. In Kafka Read and Write imply Describe.
type Grant struct {
	Kind, Name string   // Kind is of Kafka: Topic or Group
	Operations []string // of Kafka Read and Write
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
		grants := s.postgres()
		if len(grants) == 0 {
			continue
		}
		role := n.role(s.Name)
		fmt.Fprintf(&b, "\n-- %s\n", s.Name)
		fmt.Fprintf(&b, "DO $$ BEGIN CREATE ROLE %q LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT; EXCEPTION WHEN duplicate_object THEN NULL; END $$;\n", role)
		fmt.Fprintf(&b, "REVOKE ALL ON outbox, blobs, store_versions FROM %q;\nREVOKE CREATE ON SCHEMA public FROM %[1]q;\n", role)
		for _, g := range grants {
			fmt.Fprintf(&b, "GRANT %s ON %s TO %q;\n", strings.Join(g.Operations, ", "), g.Name, role)
		}
		if rows := s.outboxRows(); rows != "" {
			fmt.Fprintf(&b, "DROP POLICY IF EXISTS %q ON outbox;\nCREATE POLICY %[1]q ON outbox TO %[1]q USING (%s);\n", role, rows)
		}
	}
	b.WriteString("COMMIT;\n")
	return b.String()
}

// postgres returns what a service may do to what it shares with others there.
func (s Service) postgres() []Grant {
	if !s.Database && s.Blobs == NoBlobs {
		return nil
	}
	schema := []string{"USAGE"}
	if s.Database && !s.NoTables {
		schema = append(schema, "CREATE")
	}
	out := []Grant{{Name: "SCHEMA public", Operations: schema}, {Name: "store_versions", Operations: []string{"SELECT"}}}
	switch s.Blobs {
	case ReadBlobs:
		out = append(out, Grant{Name: "blobs", Operations: []string{"SELECT"}})
	case AppendBlobs:
		out = append(out, Grant{Name: "blobs", Operations: []string{"SELECT", "INSERT", "UPDATE"}})
	case ExpireBlobs:
		out = append(out, Grant{Name: "blobs", Operations: []string{"SELECT", "UPDATE (touched_at)", "DELETE"}})
	}
	switch {
	case s.Prune:
		out = append(out, Grant{Name: "outbox", Operations: []string{"SELECT", "DELETE"}})
	case s.Outbox:
		out = append(out, Grant{Name: "outbox", Operations: []string{"SELECT", "INSERT"}})
	}
	return out
}

// outboxRows returns which rows of the outbox a service sees, as SQL; "": none.
func (s Service) outboxRows() string {
	switch {
	case s.Prune:
		return "true"
	case s.Outbox:
		return "service = '" + s.Name + "'"
	}
	return ""
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
		for _, g := range s.redis(n.Keys) {
			b.WriteString(" ~" + g.Name)
		}
		for _, command := range s.redisCommands() {
			b.WriteString(" +" + command)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// redis returns on which keys a user may do all that it may. (An ACL allows
// commands for all keys of a user alike.)
func (s Service) redis(prefix string) []Grant {
	var out []Grant
	for _, k := range s.Redis {
		out = append(out, Grant{Name: prefix + k.Pattern, Operations: s.redisCommands()})
	}
	return out
}

func (s Service) redisCommands() []string {
	// ping is the health check, select chooses another database than 0; a cluster's client asks for its slots.
	commands := []string{"ping", "select", "cluster|slots", "cluster|shards", "command"}
	for _, k := range s.Redis {
		commands = append(commands, k.Commands...)
	}
	slices.Sort(commands)
	return slices.Compact(commands)
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

// Permissions returns for machines what is allowed in kafka, postgres, redis or
// registry; own is advisor's repository.
func Permissions(server string, services []Service, n Names, own string) []c.Privilege {
	out := []c.Privilege{}
	for _, s := range services {
		var grants []Grant
		user := n.user(s.Name)
		switch server {
		case "kafka":
			grants = s.Kafka(n.Prefix)
		case "postgres":
			grants, user = s.postgres(), n.role(s.Name)
		case "redis":
			grants = s.redis(n.Keys)
		case "registry":
			user = "" // it is free there
			for _, scope := range s.Registry.Scopes(own) {
				at := strings.LastIndex(scope, ":")
				grants = append(grants, Grant{Name: scope[:at], Operations: strings.Split(scope[at+1:], ",")})
			}
		}
		for _, g := range grants {
			out = append(out, c.Privilege{Service: s.Name, User: user, Kind: g.Kind, On: g.Name, Allowed: g.Operations})
		}
	}
	return out
}

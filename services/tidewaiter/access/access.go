// Package access is the one table of what each service reads and writes:
// topics, groups, tables, keys, registries. Whoever sets up servers gets from it
// the least that each service must be allowed (see Kafka, Postgres, Redis,
// Registry), and a configuration is checked against it.
package access

import (
	"slices"

	c "github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
)

// Blobs says what a service may do to the common, content-addressed blobs.
type Blobs string

// What a service may do to blobs.
const (
	NoBlobs     Blobs = ""
	ReadBlobs   Blobs = "read"
	AppendBlobs Blobs = "append" // and read, and renew the age of what is there
	ExpireBlobs Blobs = "expire" // and read, renew and delete
)

// Registry says what a service may do in registries.
type Registry string

// What a service may do in registries.
const (
	NoRegistry Registry = ""
	Pull       Registry = "pull"
	PullOwn    Registry = "pull from advisor's repository only"
	List       Registry = "pull, list repositories"
	Push       Registry = "pull, push, delete" // in every repository whose images are attested
	PushOwn    Registry = "pull, push, delete in advisor's repository only"
)

// Scopes returns what a service may do in a registry as its token server grants
// it (CNCF distribution, docs/content/spec/auth/scope.md); own is advisor's repository.
func (r Registry) Scopes(own string) []string {
	const all = "repository:*:"
	switch r {
	case Pull:
		return []string{all + "pull"}
	case PullOwn:
		return []string{"repository:" + own + ":pull"}
	case List:
		return []string{all + "pull", "registry:catalog:*"}
	case Push:
		return []string{all + "pull,push,delete"}
	case PushOwn:
		return []string{"repository:" + own + ":pull,push,delete"}
	}
	return nil
}

// Keys are what a service may do to one kind of key in Redis.
type Keys struct {
	Pattern  string // after the prefix; "*" stands for anything
	Commands []string
}

// Service is a row of the table. Events have the names of contracts.
type Service struct {
	Name   string
	Reads  []string // as a group of its name
	Writes []string
	Tails  []string // read without a group
	// DeadLetters are events to whose dead letters it writes without reading the event's topic.
	DeadLetters []string

	Database bool // it does not work without
	NoTables bool // makes none of its own, named <service>_…, there
	Blobs    Blobs
	Outbox   bool // adds rows of its own to the outbox that services share
	Prune    bool // deletes old rows of all there

	Redis      []Keys
	NeedsRedis bool // it does not work without
	Registry   Registry
}

// What scripts and caches in Redis do.
var (
	leases  = []string{"eval", "evalsha", "hget", "hset", "get", "set", "del", "pexpire", "pttl", "time"}
	caches  = []string{"eval", "evalsha", "get", "set", "pexpire"}
	budgets = Keys{"budget:{*", []string{
		"eval", "evalsha", "get", "set", "decr", "pexpire", "pttl", "time", "zadd", "zcard", "zremrangebyscore",
	}}
	finding = []string{c.FindingOpenedV1, c.FindingChangedV1, c.FindingClosedV1}
)

// Services returns the table.
func Services() []Service {
	return []Service{
		{
			Name: "intake", Writes: []string{c.ImagePushedV1, c.ImageDeletedV1}, DeadLetters: []string{c.ImagePushedV1},
			Database: true,
		},
		{
			Name: "planner", Reads: []string{c.ImagePushedV1, c.ImageDeletedV1},
			Writes: []string{
				c.TagObservedV1, c.ImagePlannedV1, c.ImageUnsupportedV1, c.ImageGoneV1, c.ImageFailedV1, c.LayerRequestedV1,
			},
			Redis: []Keys{budgets}, Registry: Pull,
		},
		{
			Name: "analyzer", Reads: []string{c.LayerRequestedV1}, Writes: []string{c.LayerAnalyzedV1, c.LayerFailedV1},
			Database: true, Blobs: AppendBlobs, Outbox: true,
			Redis: []Keys{{"{layer/*", leases}, budgets}, Registry: Pull, NeedsRedis: true,
		},
		{
			Name:   "assembler",
			Reads:  []string{c.ImagePlannedV1, c.ImageUnsupportedV1, c.ImageGoneV1, c.ImageFailedV1, c.LayerAnalyzedV1, c.LayerFailedV1},
			Writes: []string{c.ImageAssembledV1, c.LayerRequestedV1, c.ImageFailedV1}, Database: true, Blobs: AppendBlobs, Outbox: true,
		},
		{
			Name: "matcher", Reads: []string{c.ImageAssembledV1, c.ImageRematchV1}, Writes: []string{c.ImageMatchedV1, c.ImageFailedV1},
			Database: true, NoTables: true, Blobs: AppendBlobs, Redis: []Keys{budgets}, Registry: PullOwn,
		},
		{
			Name: "attestor", Reads: []string{c.ImageMatchedV1}, Writes: []string{c.ImageAttestedV1, c.ImageFailedV1},
			Database: true, Blobs: AppendBlobs, Outbox: true,
			Redis: []Keys{{"{referrers:*", leases}, budgets}, Registry: Push, NeedsRedis: true,
		},
		{
			Name: "catalog",
			Reads: []string{
				c.ImagePushedV1, c.ImageDeletedV1, c.TagObservedV1, c.ImagePlannedV1, c.ImageUnsupportedV1, c.ImageGoneV1, c.ImageFailedV1,
				c.LayerAnalyzedV1, c.LayerFailedV1, c.ImageAssembledV1, c.ImageMatchedV1, c.ImageAttestedV1, c.AdvisoriesChangedV1,
			},
			Writes:   slices.Concat(finding, []string{c.ImageRematchV1, c.ImagePushedV1, c.ImageFailedV1}),
			Database: true, Blobs: ExpireBlobs, Prune: true,
		},
		{
			Name: "advisor", Writes: []string{c.AdvisoriesChangedV1},
			Database: true, Blobs: AppendBlobs, Redis: []Keys{budgets}, Registry: PushOwn,
		},
		{Name: "ticketer", Reads: finding, Database: true},
		{
			Name: "gatekeeper", Reads: []string{c.ImageAttestedV1}, Tails: []string{c.ImageAttestedV1},
			Writes: []string{c.AdmissionDecidedV1, c.ImagePushedV1}, Blobs: ReadBlobs,
			Redis: []Keys{{"gatekeeper:*", caches}, budgets}, Registry: Pull, NeedsRedis: true,
		},
		{
			Name: "sweeper", Writes: []string{c.ImagePushedV1, c.ImageDeletedV1}, Database: true,
			Redis: []Keys{{"{sweep:*", leases}, budgets}, Registry: List, NeedsRedis: true,
		},
	}
}

// Find returns the row of a service.
func Find(name string) (Service, bool) {
	for _, s := range Services() {
		if s.Name == name {
			return s, true
		}
	}
	return Service{}, false
}

// Needs returns what a service connects to. What it connects to only if it is
// configured so is not needed: matcher's registry, gatekeeper's database.
func (s Service) Needs() run.Needs {
	return run.Needs{
		Service: s.Name, Kafka: true, Redis: s.NeedsRedis, Database: s.Database,
		Registry: s.Registry != NoRegistry && s.Name != "matcher",
	}
}

package bus

import (
	"errors"
	"slices"
	"sync"

	"github.com/segmentio/kafka-go"
)

// errUnknownTopics is why a consumer is not ready while its group shares out nothing.
var errUnknownTopics = errors.New("the group's coordinator does not know all of its topics yet")

// balancer shares partitions out as ranges, and remembers what it could not
// share. A broker of a cluster learns of a new topic a moment after its creation
// was acknowledged; if it coordinates the group, the group gets nothing, and
// kafka-go, which compares the topic with what the broker says a moment later,
// sees no change that would make it share again.
type balancer struct {
	kafka.RangeGroupBalancer

	mu      sync.Mutex
	missing []string
}

// AssignGroups is called where this member leads the group.
func (b *balancer) AssignGroups(members []kafka.GroupMember, partitions []kafka.Partition) kafka.GroupMemberAssignments {
	known := map[string]bool{}
	for _, p := range partitions {
		known[p.Topic] = true
	}
	var missing []string
	for _, m := range members {
		for _, topic := range m.Topics {
			if !known[topic] {
				missing = append(missing, topic)
			}
		}
	}
	slices.Sort(missing)
	b.mu.Lock()
	b.missing = slices.Compact(missing)
	b.mu.Unlock()
	return b.RangeGroupBalancer.AssignGroups(members, partitions)
}

// unshared returns the topics that could not be shared since it was last asked.
func (b *balancer) unshared() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	missing := b.missing
	b.missing = nil
	return missing
}

package match

import (
	"hash/maphash"
	"sync"
)

const (
	cacheShards  = 64
	shardEntries = 8192 // bounds the cache to about half a million package versions
)

// cache keeps what is known about package versions as long as their snapshot
// is in use. A full shard is emptied: everything in it can be found again.
type cache struct {
	seed   maphash.Seed
	shards [cacheShards]shard
}

type shard struct {
	mu      sync.RWMutex
	results map[key]*Result
}

func newCache() *cache {
	c := &cache{seed: maphash.MakeSeed()}
	for i := range c.shards {
		c.shards[i].results = map[key]*Result{}
	}
	return c
}

func (c *cache) shard(k key) *shard {
	h := maphash.String(c.seed, k.name) ^ uint64(len(k.version))*0x9e3779b97f4a7c15
	return &c.shards[h%cacheShards]
}

func (c *cache) get(k key) (*Result, bool) {
	s := c.shard(k)
	s.mu.RLock()
	r, ok := s.results[k]
	s.mu.RUnlock()
	return r, ok
}

func (c *cache) put(k key, r *Result) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.results) >= shardEntries {
		s.results = map[key]*Result{}
	}
	s.results[k] = r
}

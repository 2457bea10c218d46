package gatekeeper

import (
	"container/list"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// itemOverhead is about what an item needs beside its bundle, in bytes.
const itemOverhead = 512

// item is what is remembered of one image: the bundle that decided (as it was
// signed, never what it said) and how new the newest statement was.
type item struct {
	bundle  *statement.Bundle // nil: only seen is known
	fetched time.Time         // when the bundle was read from the registry, or announced
	seen    statement.Seen
}

func (i item) bytes() int64 {
	if i.bundle == nil {
		return itemOverhead
	}
	return itemOverhead + int64(len(i.bundle.Content))
}

// memory holds the items that were used last.
type memory struct {
	maxEntries int
	maxBytes   int64

	mu    sync.Mutex
	items map[string]*list.Element // by image
	order *list.List               // of slot, the one used last in front
	bytes int64
}

type slot struct {
	image string
	item  item
}

func newMemory(maxEntries int, maxBytes int64) *memory {
	return &memory{maxEntries: maxEntries, maxBytes: maxBytes, items: map[string]*list.Element{}, order: list.New()}
}

func (m *memory) get(image string) (item, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.items[image]
	if !ok {
		return item{}, false
	}
	m.order.MoveToFront(e)
	return e.Value.(*slot).item, true
}

// put remembers i, and of two marks the newer one. A bundle is not replaced by
// none, nor by one that was fetched before it.
func (m *memory) put(image string, i item) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.items[image]
	if !ok {
		e = m.order.PushFront(&slot{image: image})
		m.items[image] = e
	} else {
		m.order.MoveToFront(e)
		old := e.Value.(*slot).item
		m.bytes -= old.bytes()
		if i.seen.Before(old.seen) {
			i.seen = old.seen
		}
		if i.bundle == nil || i.fetched.Before(old.fetched) {
			i.bundle, i.fetched = old.bundle, old.fetched
		}
	}
	e.Value.(*slot).item = i
	m.bytes += i.bytes()
	for m.order.Len() > 1 && (m.order.Len() > m.maxEntries || m.bytes > m.maxBytes) {
		last := m.order.Back()
		s := m.order.Remove(last).(*slot)
		delete(m.items, s.image)
		m.bytes -= s.item.bytes()
	}
}

// due has a remembered bundle looked for again if a newer statement than any
// seen was announced.
func (m *memory) due(image string, announced statement.Seen) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.items[image]; ok {
		if s := e.Value.(*slot); s.item.seen.Before(announced) {
			s.item.fetched = time.Time{}
		}
	}
}

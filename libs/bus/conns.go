package bus

import (
	"context"
	"net"
	"sync"
)

// connections dials and remembers what is open, so that Close ends requests
// that nobody waits for any more: a fetch that was given up stays in the hands
// of the transport until the broker answers.
type connections struct {
	dialer net.Dialer
	mu     sync.Mutex
	open   map[*connection]struct{}
	closed bool
}

// connection is one of them.
type connection struct {
	net.Conn
	all *connections
}

// dial opens a connection; after close it fails.
func (c *connections) dial(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := c.dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	conn := &connection{Conn: nc, all: c}
	c.mu.Lock()
	closed := c.closed
	if !closed {
		c.open[conn] = struct{}{}
	}
	c.mu.Unlock()
	if closed {
		_ = nc.Close()
		return nil, net.ErrClosed
	}
	return conn, nil
}

// Close closes the connection and forgets it.
func (c *connection) Close() error {
	c.all.mu.Lock()
	delete(c.all.open, c)
	c.all.mu.Unlock()
	return c.Conn.Close()
}

// close closes all connections.
func (c *connections) close() {
	c.mu.Lock()
	c.closed = true
	open := c.open
	c.open = make(map[*connection]struct{})
	c.mu.Unlock()
	for conn := range open {
		_ = conn.Conn.Close()
	}
}

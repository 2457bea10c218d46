//go:build real

package redis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// startServer starts redis-server (Debian: redis-server) on loopback with these
// settings, and ends it with the test.
func startServer(t *testing.T, port int, settings ...string) *exec.Cmd {
	t.Helper()
	dir := t.TempDir()
	conf := fmt.Sprintf("bind 127.0.0.1\nport %d\ndir %s\nsave \"\"\nappendonly no\n", port, dir)
	args := []string{filepath.Join(dir, "redis.conf")}
	for _, s := range settings {
		if s == "--sentinel" {
			args = append(args, s)
			conf = fmt.Sprintf("bind 127.0.0.1\nport %d\ndir %s\n", port, dir)
			continue
		}
		conf += s + "\n"
	}
	if err := os.WriteFile(args[0], []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	command := exec.Command("redis-server", args...)
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	command.Stdout, command.Stderr = log, log
	if err := command.Start(); err != nil {
		t.Fatalf("start redis-server (Debian package redis-server): %v", err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill() // it may be gone
		_ = command.Wait()
		_ = log.Close()
	})
	until(t, fmt.Sprintf("something listens on %d", port), func() error {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", at(port))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	return command
}

func at(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// ports returns free ports whose cluster ports (10000 above) are free too. Both
// are below the range from which the kernel takes ports of connections.
func ports(t *testing.T, n int) []int {
	t.Helper()
	var out []int
	for port := 11000 + os.Getpid()%5000; len(out) < n; port++ {
		if free(port) && free(port+10000) {
			out = append(out, port)
		}
	}
	return out
}

func free(port int) bool {
	l, err := net.Listen("tcp", at(port))
	if err != nil {
		return false
	}
	return l.Close() == nil
}

// until waits until try works.
func until(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// The master is killed while a lease is held: sentinels make the replica the
// master, the client finds it, and the work is taken over with a higher token.
func TestSentinelFailover(t *testing.T) {
	p := ports(t, 3)
	master := startServer(t, p[0], "repl-diskless-sync-delay 0")
	startServer(t, p[1], fmt.Sprintf("replicaof 127.0.0.1 %d", p[0]))
	startServer(t, p[2], "--sentinel", fmt.Sprintf("sentinel monitor main 127.0.0.1 %d 1", p[0]),
		"sentinel down-after-milliseconds main 1000", "sentinel failover-timeout main 5000")
	replica := open(t, Config{URL: "redis://" + at(p[1])})
	c := open(t, Config{Sentinel: &Sentinel{Master: "main", Addresses: []string{at(p[2])}}})
	until(t, "the master is found", func() error { return c.Ping(t.Context()) })

	until(t, "the replica follows", func() error {
		if err := c.Put(t.Context(), "marker", []byte("x"), time.Minute); err != nil {
			return err
		}
		_, err := replica.Get(t.Context(), "marker")
		return err
	})

	const ttl = 5 * time.Second
	first := acquire(t, c, "event-1", ttl)
	until(t, "the replica has the lease", func() error {
		n, err := replica.rdb.Exists(t.Context(), c.keys(layer)[0]).Result()
		if err == nil && n == 0 {
			err = errors.New("not yet")
		}
		return err
	})
	if err := master.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var taken *Lease
	outages := 0
	until(t, "the lease is taken over", func() error {
		l, err := c.Acquire(t.Context(), layer, "event-2", time.Minute)
		switch {
		case err == nil:
			taken = l
		case IsUnavailable(err):
			outages++
		case !errors.Is(err, ErrTaken):
			t.Fatalf("neither taken nor an outage: %v", err)
		}
		return err
	})
	if taken.Token <= first.Token {
		t.Errorf("token %d after %d", taken.Token, first.Token)
	}
	if outages == 0 {
		t.Error("the master was not missed")
	}
}

// In a cluster nothing crosses slots: leases, locks, marks, caches and budgets
// work for keys in all of them.
func TestCluster(t *testing.T) {
	p := ports(t, 3)
	args := []string{"--cluster-yes", "--cluster", "create"}
	var nodes []string
	for _, port := range p {
		startServer(t, port, "cluster-enabled yes", "cluster-config-file nodes.conf", "cluster-node-timeout 2000")
		nodes = append(nodes, at(port))
	}
	args = append(args, nodes...)
	if out, err := exec.CommandContext(t.Context(), "redis-cli", append(args, "--cluster-replicas", "0")...).CombinedOutput(); err != nil {
		t.Fatalf("make the cluster: %v: %s", err, out)
	}
	c := open(t, Config{Cluster: nodes[:1], Prefix: "tw:"})
	until(t, "the cluster serves", func() error { return c.Put(t.Context(), "x", []byte("y"), time.Minute) })
	for i := range 60 {
		key := fmt.Sprintf("layer/1/sha256:%04d", i)
		l, err := c.Acquire(t.Context(), key, "event", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Acquire(t.Context(), key, "another", time.Minute); !errors.Is(err, ErrTaken) {
			t.Errorf("%s is held: %v", key, err)
		}
		if err := errors.Join(c.Renew(t.Context(), l, time.Minute), c.Release(t.Context(), l)); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		if err := c.WithLock(t.Context(), "referrers:"+key, "holder", time.Minute, func(context.Context) error { return nil }); err != nil {
			t.Errorf("lock of %s: %v", key, err)
		}
		if held, err := c.Raise(t.Context(), "seen:"+key, "7", time.Minute); held != "7" || err != nil {
			t.Errorf("mark of %s: %q, %v", key, held, err)
		}
		if err := c.Put(t.Context(), "bundle:"+key, []byte(key), time.Minute); err != nil {
			t.Errorf("cache of %s: %v", key, err)
		}
		if got, err := c.Get(t.Context(), "bundle:"+key); err != nil || string(got) != key {
			t.Errorf("cache of %s: %q, %v", key, got, err)
		}
		if _, taken, _, err := c.Take(t.Context(), "registry-"+key, time.Second, 2, 0); err != nil || !taken {
			t.Errorf("budget of %s: %t, %v", key, taken, err)
		}
	}
}

// Package embedded runs Kafka (kfake), Redis (miniredis), a registry (olareg)
// and a database (SQLite) inside this process, each reached over its real
// protocol on a loopback port with a password, and kept in a directory.
//
// What is kept: Kafka's log and committed offsets, the registry's content and
// the push notifications that are not delivered yet, the database, the ports
// and passwords. Redis is not kept: losing it costs work, never truth.
package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/alicebob/miniredis/v2"
	"github.com/twmb/franz-go/pkg/kfake"
	"golang.org/x/sys/unix"
)

// ErrInUse is returned by Start when another process, or another Servers of
// this one, runs on the same directory.
var ErrInUse = errors.New("directory is in use by a running tidewaiter")

// Username is the name of the only user of all embedded servers but Redis,
// whose user is the default one.
const Username = "tidewaiter"

// DefaultPartitions is the number of partitions of a topic that is created
// without saying how many.
const DefaultPartitions = 4

// Options say what to start.
type Options struct {
	Dir string // where everything is kept; created when absent
	// HookURL receives push notifications of the registry, with HookAuth as its
	// Authorization header. May be set later with SetHook.
	HookURL, HookAuth             string
	RegistryAddress, KafkaAddress string // host:port of loopback; default a free loopback port (kept in Dir for the next start)
	// AnonymousPull lets whoever reaches the registry read from it; changes
	// always need the password.
	AnonymousPull bool
	Partitions    int // of topics that are created without saying how many; default DefaultPartitions
	// Sync writes what Kafka and the database acknowledge through to the disk, so
	// that it survives a power cut. Without it everything survives the death of
	// the process, as with a real Kafka; a power cut may cost the last seconds.
	// It costs 0.5 to 3 instead of 0.05 ms for each write to Kafka, one at a time.
	Sync bool
}

// Servers are the running servers.
type Servers struct {
	KafkaAddress                 string
	KafkaUsername, KafkaPassword string // SCRAM-SHA-512
	RedisURL                     string // without password
	RedisPassword                string
	RegistryAddress              string
	RegistryUsername             string // basic authentication
	RegistryPassword             string
	DatabaseURL                  string

	redis *miniredis.Miniredis
	hook  *hook
	done  chan struct{}
	err   error // set before done is closed
}

// Start starts all of them; they stop when ctx ends, and Wait returns then.
// Clients should be closed before. It returns ErrInUse, wrapped, for a
// directory that is in use.
func Start(ctx context.Context, o Options, log *slog.Logger) (*Servers, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("embedded servers: %w", err)
	}
	s, stop, err := start(ctx, dir, o, log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("embedded servers in %s: %w", dir, err), stop.run())
	}
	go func() {
		<-ctx.Done()
		s.err = stop.run()
		close(s.done)
	}()
	return s, nil
}

func start(ctx context.Context, dir string, o Options, log *slog.Logger) (*Servers, stack, error) {
	var stop stack
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, stop, err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, stop, err
	}
	stop.push(unlock)
	st, err := loadState(dir)
	if err != nil {
		return nil, stop, err
	}

	kafka, stopKafka, err := startKafka(dir, o, st, log)
	if err != nil {
		return nil, stop, err
	}
	stop.push(stopKafka)

	redis, err := startRedis(st)
	if err != nil {
		return nil, stop, err
	}
	stop.push(func() error { redis.Close(); return nil })

	listener, err := listenRegistry(o.RegistryAddress, st)
	if err != nil {
		return nil, stop, err
	}
	stop.push(func() error { return ignoreClosed(listener.Close()) })
	if err := st.save(dir); err != nil { // before anybody is told an address or password
		return nil, stop, err
	}

	hook, stopHook, err := startHook(ctx, filepath.Join(dir, "notifications"), log.With(slog.String("server", "registry")))
	if err != nil {
		return nil, stop, err
	}
	stop.push(stopHook)
	hook.set(o.HookURL, o.HookAuth)
	stop.push(startRegistry(listener, filepath.Join(dir, "registry"), st.RegistryPassword, o.AnonymousPull, hook, log.With(slog.String("server", "registry"))))

	database := "sqlite://" + filepath.Join(dir, "tidewaiter.db")
	if o.Sync {
		database += "?sync=full"
	}
	return &Servers{
		KafkaAddress: kafka, KafkaUsername: Username, KafkaPassword: st.KafkaPassword,
		RedisURL: "redis://" + redis.Addr() + "/0", RedisPassword: st.RedisPassword,
		RegistryAddress: listener.Addr().String(), RegistryUsername: Username, RegistryPassword: st.RegistryPassword,
		DatabaseURL: database,
		redis:       redis, hook: hook, done: make(chan struct{}),
	}, stop, nil
}

// SetHook sets where the registry sends push notifications, and the value of
// the Authorization header. An empty url keeps notifications until there is one.
func (s *Servers) SetHook(url, authorization string) { s.hook.set(url, authorization) }

// FlushRedis forgets all of Redis (for fault tests and the demo).
func (s *Servers) FlushRedis() { s.redis.FlushAll() }

// Wait returns when all have stopped and synced.
func (s *Servers) Wait() error {
	<-s.done
	return s.err
}

// stack holds what has to be stopped, the last started first.
type stack []func() error

func (s *stack) push(stop func() error) { *s = append(*s, stop) }

func (s *stack) run() error {
	var errs []error
	for i := len(*s) - 1; i >= 0; i-- {
		errs = append(errs, (*s)[i]())
	}
	return errors.Join(errs...)
}

// lock takes the directory's lock file. It is freed by the kernel however the
// process ends, and children do not inherit it.
func lock(path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) // #nosec G304 -- the operator names the directory
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) // #nosec G115 -- a file descriptor is an int
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrInUse
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

func startRedis(st *state) (*miniredis.Miniredis, error) {
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true) // without it leases would never expire
	m.RequireAuth(st.RedisPassword)
	address, err := st.tryPorts(&st.RedisPort, m.StartAddr)
	if err != nil {
		return nil, fmt.Errorf("start redis on %s: %w", address, err)
	}
	return m, nil
}

func startKafka(dir string, o Options, st *state, log *slog.Logger) (address string, stop func() error, err error) {
	partitions := o.Partitions
	if partitions <= 0 {
		partitions = DefaultPartitions
	}
	var listener net.Listener
	listen := func(address string) (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	}
	if o.KafkaAddress != "" {
		address, err = o.KafkaAddress, errors.Join(checkLoopback(o.KafkaAddress), listen(o.KafkaAddress))
	} else {
		address, err = st.tryPorts(&st.KafkaPort, listen)
	}
	if err != nil {
		return "", nil, fmt.Errorf("start kafka on %s: %w", address, err)
	}
	// kfake only listens on a port of 127.0.0.1; it is handed the listener that is open already.
	options := []kfake.Opt{
		kfake.NumBrokers(1),
		kfake.ListenFn(func(string, string) (net.Listener, error) { return listener, nil }),
		kfake.ClusterID("tidewaiter-embedded"),
		kfake.DataDir(filepath.Join(dir, "kafka")),
		kfake.DefaultNumPartitions(partitions),
		kfake.EnableSASL(),
		kfake.Superuser("SCRAM-SHA-512", Username, st.KafkaPassword),
		kfake.WithLogger(kafkaLog{log.With(slog.String("server", "kafka"))}),
	}
	if o.Sync {
		options = append(options, kfake.SyncWrites())
	}
	cluster, err := kfake.NewCluster(options...)
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("start kafka: %w", err), ignoreClosed(listener.Close()))
	}
	var once sync.Once
	return listener.Addr().String(), func() error { once.Do(cluster.Close); return nil }, nil
}

// kafkaLog passes on what an operator should see of kfake's log.
type kafkaLog struct{ log *slog.Logger }

// Logf implements kfake.Logger.
func (l kafkaLog) Logf(level kfake.LogLevel, format string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case kfake.LogLevelError:
		to = slog.LevelError
	case kfake.LogLevelWarn:
		to = slog.LevelWarn
	}
	if !l.log.Enabled(context.Background(), to) {
		return
	}
	l.log.LogAttrs(context.Background(), to, "embedded kafka", slog.String("detail", fmt.Sprintf(format, args...)))
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

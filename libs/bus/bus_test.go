package bus_test

import (
	"net"
	"strconv"
	"testing"

	"github.com/twmb/franz-go/pkg/kfake"
	"go.uber.org/goleak"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/bus/bustest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a kfake that can be stopped and started with its data.
type fake struct {
	dir     string
	port    int
	cluster *kfake.Cluster
}

func (f *fake) start(t *testing.T) {
	t.Helper()
	opts := []kfake.Opt{kfake.NumBrokers(1), kfake.DataDir(f.dir), kfake.SyncWrites()}
	if f.port != 0 {
		opts = append(opts, kfake.Ports(f.port))
	}
	c, err := kfake.NewCluster(opts...)
	if err != nil {
		t.Fatal(err)
	}
	f.cluster = c
	_, port, err := net.SplitHostPort(c.ListenAddrs()[0])
	if err != nil {
		t.Fatal(err)
	}
	if f.port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
}

func (f *fake) stop(*testing.T) { f.cluster.Close() }

func TestBusOnFake(t *testing.T) {
	bustest.Run(t, func(t *testing.T) bustest.Broker {
		f := &fake{dir: t.TempDir()}
		f.start(t)
		t.Cleanup(func() { f.cluster.Close() })
		return bustest.Broker{Config: bus.Config{Brokers: f.cluster.ListenAddrs()}, Stop: f.stop, Start: f.start}
	})
}

//go:build real

package bus_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/bus/bustest"
)

// TestBusOnKafka runs the suite on the broker at TIDEWAITER_KAFKA (host:port, or several with commas).
// SERVERS_CTL (e2e/servers/servers.sh, which sets both) lets it stop and start it.
func TestBusOnKafka(t *testing.T) {
	addr := os.Getenv("TIDEWAITER_KAFKA")
	if addr == "" {
		t.Fatal("TIDEWAITER_KAFKA (host:port) is not set")
	}
	broker := bustest.Broker{Config: bus.Config{Brokers: strings.Split(addr, ",")}}
	if ctl := os.Getenv("SERVERS_CTL"); ctl != "" {
		control := func(verb string) func(t *testing.T) {
			return func(t *testing.T) {
				t.Helper()
				out, err := exec.CommandContext(t.Context(), ctl, verb, "kafka").CombinedOutput()
				if err != nil {
					t.Fatalf("%s %s kafka: %v\n%s", ctl, verb, err, out)
				}
			}
		}
		broker.Stop, broker.Start = control("stop"), control("start")
	}
	bustest.Run(t, func(*testing.T) bustest.Broker { return broker })
}

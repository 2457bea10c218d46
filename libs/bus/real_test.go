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

// TestBusOnKafka runs the suite on the broker at TIDEWAITER_KAFKA (host:port).
// TIDEWAITER_KAFKA_CTL ("path/to/kafka.sh data-directory") lets it stop and start it.
func TestBusOnKafka(t *testing.T) {
	addr := os.Getenv("TIDEWAITER_KAFKA")
	if addr == "" {
		t.Fatal("TIDEWAITER_KAFKA (host:port) is not set")
	}
	broker := bustest.Broker{Config: bus.Config{Brokers: []string{addr}}}
	if ctl := strings.Fields(os.Getenv("TIDEWAITER_KAFKA_CTL")); len(ctl) == 2 {
		control := func(verb string) func(t *testing.T) {
			return func(t *testing.T) {
				t.Helper()
				out, err := exec.CommandContext(t.Context(), ctl[0], verb, ctl[1]).CombinedOutput()
				if err != nil {
					t.Fatalf("%s %s: %v\n%s", ctl[0], verb, err, out)
				}
			}
		}
		broker.Stop, broker.Start = control("stop"), control("start")
	}
	bustest.Run(t, func(*testing.T) bustest.Broker { return broker })
}

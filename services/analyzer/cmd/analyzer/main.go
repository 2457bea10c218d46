// Command analyzer runs the analyzer.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/analyzer"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
)

func main() {
	worker.Main()
	run.Main(analyzer.Name, analyzer.Run)
}

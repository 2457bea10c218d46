// Command catalog runs the service that remembers everything.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/catalog"
)

func main() { run.Main(catalog.Name, catalog.Run) }

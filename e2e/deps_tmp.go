package e2e
import (
 _ "github.com/tidewaiter/tidewaiter/contracts"
 _ "github.com/tidewaiter/tidewaiter/libs"
 _ "github.com/tidewaiter/tidewaiter/services"
)

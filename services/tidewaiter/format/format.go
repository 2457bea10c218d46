// Package format writes the results of scans in the forms that people and
// other tools read, and reads software bills of materials of other tools.
package format

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Names of the forms that Write writes.
const (
	Table     = "table"
	JSON      = "json"
	SARIF     = "sarif"
	CycloneDX = "cyclonedx"
	SPDX      = "spdx"
)

// Inventories fetches an inventory by its digest.
type Inventories func(ctx context.Context, digest string) (*contracts.Inventory, error)

// Write writes a scan in the form named kind. CycloneDX is written from the
// scanned inventories, which get fetches.
func Write(w io.Writer, kind string, scan *contracts.Scan, get Inventories) error {
	switch kind {
	case Table:
		return writeTable(w, scan, Options{})
	case JSON:
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(scan)
	case SARIF:
		return writeSARIF(w, scan)
	case CycloneDX:
		return writeCycloneDX(context.Background(), w, scan, get)
	case SPDX:
		return writeSPDX(w, scan, time.Now())
	default:
		return fmt.Errorf("unknown output %q: want table, json, sarif, cyclonedx or spdx", kind)
	}
}

// about names what was scanned.
func about(scan *contracts.Scan) string {
	if scan.Image == nil {
		return "inventory " + scan.Inventory
	}
	if scan.Image.Ref != "" {
		return scan.Image.Ref
	}
	return scan.Image.Digest
}

// counts says whether a finding affects what was scanned, as far as known.
func counts(f *contracts.Finding) bool {
	return f.Status == contracts.StatusAffected || f.Status == contracts.StatusUnderInvestigation
}

package catalog

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/matcher/match"
)

// chunk bounds the values in one condition.
const chunk = 500

// indexed is what of an inventory the reverse index keeps.
type indexed struct {
	number   int64
	size     int64
	analyzer string
	uses     []int64
	parts    []int64 // numbers of the inventories of an index's parts
	releases map[[2]string]bool
}

// number names a text by 63 bits of its hash.
func number(parts ...string) int64 {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return int64(binary.BigEndian.Uint64(sum[:8]) >> 1)
}

// Kinds of uses, so that a product never shares a number with a package.
func useKey(u match.Use) int64 {
	switch {
	case u.Product != "":
		return number("product", u.Product)
	case u.Name != "":
		return number("package", u.Ecosystem, u.Release, u.Name)
	default:
		return number("ecosystem", u.Ecosystem, u.Release)
	}
}

func indexOf(content []byte) (indexed, error) {
	var inv contracts.Inventory
	if err := json.Unmarshal(content, &inv); err != nil {
		return indexed{}, fmt.Errorf("decode inventory: %w", err)
	}
	x := indexed{size: int64(len(content)), analyzer: inv.Analyzer, releases: map[[2]string]bool{}}
	for _, u := range match.Uses(&inv) {
		x.uses = append(x.uses, useKey(u))
		if u.Product == "" && u.Name == "" {
			x.releases[[2]string{u.Ecosystem, u.Release}] = true
		}
	}
	for _, p := range inv.Parts {
		x.parts = append(x.parts, number(p.Inventory))
	}
	return x, nil
}

// readInventories reads the inventories that facts name and that are not
// indexed yet. One that is not stored is left out.
func (s *Service) readInventories(ctx context.Context, facts []fact) (map[string]indexed, error) {
	found := map[string]indexed{}
	seen := map[string]bool{"": true}
	for _, f := range facts {
		if seen[f.inventory] {
			continue
		}
		seen[f.inventory] = true
		var n int
		err := s.db.QueryRowContext(ctx, `SELECT COUNT(*) FROM catalog_inventories WHERE inventory = $1`, f.inventory).Scan(&n)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			continue
		}
		x, ok, err := s.readInventory(ctx, f.inventory)
		if err != nil {
			return nil, err
		}
		if ok {
			found[f.inventory] = x
		}
	}
	return found, nil
}

func (s *Service) readInventory(ctx context.Context, digest string) (indexed, bool, error) {
	content, err := s.db.Blob(ctx, digest)
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrCorrupt) {
		return indexed{}, false, nil
	}
	if err != nil {
		return indexed{}, false, err
	}
	x, err := indexOf(content)
	if err != nil {
		return indexed{}, false, bus.Permanent(fmt.Errorf("inventory %s: %w", digest, err))
	}
	x.number = number(digest)
	return x, true, nil
}

// index writes an inventory that was read for this batch into the reverse index.
func (b *batch) index(ctx context.Context, digest string) error {
	x, ok := b.indexes[digest]
	if !ok {
		return nil
	}
	return writeIndex(ctx, b.exec, digest, x)
}

func writeIndex(ctx context.Context, exec execute, digest string, x indexed) error {
	_, err := exec(ctx, `INSERT INTO catalog_inventories (inventory, number, size, analyzer) VALUES ($1, $2, $3, $4)
		ON CONFLICT DO NOTHING`, digest, x.number, x.size, x.analyzer)
	if err != nil {
		return fmt.Errorf("index inventory: %w", err)
	}
	for _, use := range x.uses {
		if _, err := exec(ctx, `INSERT INTO catalog_uses (use_key, number) VALUES ($1, $2) ON CONFLICT DO NOTHING`, use, x.number); err != nil {
			return fmt.Errorf("index inventory: %w", err)
		}
	}
	for _, part := range x.parts {
		_, err := exec(ctx, `INSERT INTO catalog_inventory_parts (part, number) VALUES ($1, $2) ON CONFLICT DO NOTHING`, part, x.number)
		if err != nil {
			return fmt.Errorf("index parts: %w", err)
		}
	}
	for r := range x.releases {
		_, err := exec(ctx, `INSERT INTO catalog_releases (ecosystem, release) VALUES ($1, $2) ON CONFLICT DO NOTHING`, r[0], r[1])
		if err != nil {
			return fmt.Errorf("index releases: %w", err)
		}
	}
	return nil
}

// indexMissing indexes the inventories of images that an older program recorded.
func (s *Service) indexMissing(ctx context.Context) error {
	for {
		missing, err := s.strings(ctx, `SELECT DISTINCT inventory FROM catalog_images i WHERE inventory <> '' AND state <> 'gone'
			AND NOT EXISTS (SELECT 1 FROM catalog_inventories v WHERE v.inventory = i.inventory) LIMIT $1`, batchSize)
		if err != nil {
			return fmt.Errorf("find inventories to index: %w", err)
		}
		if len(missing) == 0 {
			return nil
		}
		read := map[string]indexed{}
		for _, digest := range missing {
			x, ok, err := s.readInventory(ctx, digest)
			if err != nil {
				return fmt.Errorf("index inventory: %w", err)
			}
			if !ok {
				x.number = number(digest) // it cannot be matched either; it is not looked for again
			}
			read[digest] = x
		}
		err = s.db.Tx(ctx, func(tx *sql.Tx) error {
			b := &batch{s: s, tx: tx, stmts: map[string]*sql.Stmt{}}
			for digest, x := range read {
				if err := writeIndex(ctx, b.exec, digest, x); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// forgetInventories drops from the index what no image has any more.
func forgetInventories(ctx context.Context, tx *sql.Tx) error {
	for _, query := range []string{
		`DELETE FROM catalog_inventories WHERE NOT EXISTS (SELECT 1 FROM catalog_images i
			WHERE i.inventory = catalog_inventories.inventory AND i.state <> 'gone')`,
		`DELETE FROM catalog_uses WHERE NOT EXISTS (SELECT 1 FROM catalog_inventories v WHERE v.number = catalog_uses.number)`,
		`DELETE FROM catalog_inventory_parts WHERE NOT EXISTS (SELECT 1 FROM catalog_inventories v WHERE v.number = catalog_inventory_parts.number)`,
	} {
		if _, err := tx.ExecContext(ctx, query); err != nil {
			return fmt.Errorf("forget inventories: %w", err)
		}
	}
	return nil
}

// keys returns the numbers of everything that a delta is about.
func (s *Service) keys(ctx context.Context, d *contracts.AdvisoriesDelta) ([]int64, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT ecosystem, release FROM catalog_releases`)
	if err != nil {
		return nil, fmt.Errorf("read releases: %w", err)
	}
	defer rows.Close()
	releases := map[string][]string{}
	for rows.Next() {
		var ecosystem, release string
		if err := rows.Scan(&ecosystem, &release); err != nil {
			return nil, fmt.Errorf("read releases: %w", err)
		}
		releases[ecosystem] = append(releases[ecosystem], release)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read releases: %w", err)
	}
	var keys []int64
	add := func(ecosystem, name string, of []string) {
		for _, release := range of {
			if release != "" {
				keys = append(keys, useKey(match.Use{Ecosystem: ecosystem, Release: release, Name: name}))
				continue
			}
			for _, each := range releases[ecosystem] {
				keys = append(keys, useKey(match.Use{Ecosystem: ecosystem, Release: each, Name: name}))
			}
		}
	}
	for _, p := range d.Packages {
		add(p.Ecosystem, p.Name, p.Releases)
	}
	for _, e := range d.Ecosystems {
		base, release, _ := strings.Cut(e, ":")
		add(base, "", []string{release})
	}
	for _, p := range d.Products {
		keys = append(keys, useKey(match.Use{Product: p}))
	}
	return keys, nil
}

// touched returns the numbers of the inventories, and of the indexes that they
// are part of, that a delta is about.
func (s *Service) touched(ctx context.Context, d *contracts.AdvisoriesDelta) (map[int64]bool, error) {
	keys, err := s.keys(ctx, d)
	if err != nil {
		return nil, err
	}
	found := map[int64]bool{}
	if err := s.numbers(ctx, `SELECT DISTINCT number FROM catalog_uses WHERE use_key IN (%s)`, keys, found); err != nil {
		return nil, fmt.Errorf("look up inventories: %w", err)
	}
	parts := make([]int64, 0, len(found))
	for n := range found {
		parts = append(parts, n)
	}
	if err := s.numbers(ctx, `SELECT number FROM catalog_inventory_parts WHERE part IN (%s)`, parts, found); err != nil {
		return nil, fmt.Errorf("look up indexes: %w", err)
	}
	return found, nil
}

// numbers adds to found what query selects for the values, a chunk at a time.
func (s *Service) numbers(ctx context.Context, query string, values []int64, found map[int64]bool) error {
	for len(values) > 0 {
		n := min(chunk, len(values))
		marks, args := placeholders(values[:n], 1)
		values = values[n:]
		rows, err := s.db.QueryContext(ctx, fmt.Sprintf(query, marks), args...)
		if err != nil {
			return err
		}
		for rows.Next() {
			var number int64
			if err := rows.Scan(&number); err != nil {
				return errors.Join(err, rows.Close())
			}
			found[number] = true
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			return err
		}
	}
	return nil
}

// placeholders returns "$from, $from+1, …" and the values as arguments.
func placeholders(values []int64, from int) (string, []any) {
	var b strings.Builder
	args := make([]any, len(values))
	for i, v := range values {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "$%d", from+i)
		args[i] = v
	}
	return b.String(), args
}

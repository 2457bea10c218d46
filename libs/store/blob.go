package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// maxBlob bounds a blob's unpacked size in bytes, against a damaged row that
// would unpack to more than there is memory.
const maxBlob = 1 << 30

// ErrTooBig is returned by PutBlob for content over 1 GiB.
var ErrTooBig = errors.New("content is too big to be stored")

// PutBlob stores content (zstd) and returns its digest. Storing again renews
// its age, and repairs what was stored damaged.
func (db *DB) PutBlob(ctx context.Context, content []byte) (digest string, err error) {
	if len(content) > maxBlob {
		return "", fmt.Errorf("store blob of %d bytes: %w", len(content), ErrTooBig)
	}
	digest = contracts.DigestOf(content)
	if _, err := db.Blob(ctx, digest); err == nil {
		n, err := db.touch(ctx, digest)
		if err != nil {
			return "", err
		}
		if n > 0 {
			return digest, nil
		}
		// It expired in between.
	} else if !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrCorrupt) {
		return "", err
	}
	packed := db.encoder.EncodeAll(content, nil)
	_, err = db.ExecContext(ctx, `INSERT INTO blobs (digest, size, touched_at, content) VALUES ($1, $2, $3, $4)
		ON CONFLICT (digest) DO UPDATE SET size = excluded.size, touched_at = excluded.touched_at, content = excluded.content`,
		digest, len(content), time.Now().UnixMilli(), packed)
	if err != nil {
		return "", fmt.Errorf("store blob %s: %w", digest, err)
	}
	return digest, nil
}

// Blob returns stored content, verified: ErrNotFound, ErrCorrupt.
func (db *DB) Blob(ctx context.Context, digest string) ([]byte, error) {
	var packed []byte
	err := db.reader(ctx).QueryRowContext(ctx, "SELECT content FROM blobs WHERE digest = $1", digest).Scan(&packed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("blob %s: %w", digest, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read blob %s: %w", digest, err)
	}
	content, err := db.decoder.DecodeAll(packed, nil)
	if err != nil {
		return nil, fmt.Errorf("unpack blob %s: %w: %w", digest, ErrCorrupt, err)
	}
	if contracts.DigestOf(content) != digest {
		return nil, fmt.Errorf("blob %s: %w", digest, ErrCorrupt)
	}
	return content, nil
}

// HasBlob says whether content is stored. It does not read the content.
func (db *DB) HasBlob(ctx context.Context, digest string) (bool, error) {
	var n int
	err := db.reader(ctx).QueryRowContext(ctx, "SELECT count(*) FROM blobs WHERE digest = $1", digest).Scan(&n)
	if err != nil {
		return false, fmt.Errorf("look for blob %s: %w", digest, err)
	}
	return n > 0, nil
}

// TouchBlobs renews the age of blobs that are still referred to; those that
// are not stored are passed over.
func (db *DB) TouchBlobs(ctx context.Context, digests ...string) error {
	for _, digest := range digests {
		if _, err := db.touch(ctx, digest); err != nil {
			return err
		}
	}
	return nil
}

func (db *DB) touch(ctx context.Context, digest string) (int64, error) {
	result, err := db.ExecContext(ctx, "UPDATE blobs SET touched_at = $1 WHERE digest = $2", time.Now().UnixMilli(), digest)
	if err != nil {
		return 0, fmt.Errorf("touch blob %s: %w", digest, err)
	}
	n, err := result.RowsAffected()
	if err != nil {
		return 0, fmt.Errorf("touch blob %s: %w", digest, err)
	}
	return n, nil
}

// ExpireBlobs deletes blobs that were neither stored nor touched for age, and
// returns how many.
func (db *DB) ExpireBlobs(ctx context.Context, age time.Duration) (int64, error) {
	n, err := db.deleteInBatches(ctx,
		// The age is asked for twice: a blob whose age is renewed in between is waited
		// for, and its row looked at again.
		"DELETE FROM blobs WHERE touched_at < $1 AND digest IN (SELECT digest FROM blobs WHERE touched_at < $1 LIMIT $2)",
		time.Now().Add(-age).UnixMilli())
	if err != nil {
		return n, fmt.Errorf("expire blobs: %w", err)
	}
	return n, nil
}

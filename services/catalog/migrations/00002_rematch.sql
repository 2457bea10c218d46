-- +goose Up

-- What inventories look up in advisory snapshots. A use is named by 63 bits of
-- the hash of what is looked up, an inventory by 63 bits of its digest: two that
-- share a number only cost a match that was not needed.
CREATE TABLE catalog_inventories (
    inventory TEXT   NOT NULL PRIMARY KEY, -- digest
    number    BIGINT NOT NULL,
    size      BIGINT NOT NULL, -- bytes
    analyzer  TEXT   NOT NULL
);
CREATE INDEX catalog_inventories_number ON catalog_inventories (number);
CREATE TABLE catalog_uses (
    use_key BIGINT NOT NULL,
    number  BIGINT NOT NULL, -- of the inventory
    PRIMARY KEY (use_key, number)
);
CREATE TABLE catalog_inventory_parts (
    part   BIGINT NOT NULL, -- number of a part's inventory
    number BIGINT NOT NULL, -- of the index's inventory
    PRIMARY KEY (part, number)
);
-- The releases of each ecosystem that inventories have packages of.
CREATE TABLE catalog_releases (
    ecosystem TEXT NOT NULL,
    release   TEXT NOT NULL,
    PRIMARY KEY (ecosystem, release)
);

-- Published snapshots, and how far their consequences were drawn.
CREATE TABLE catalog_snapshots (
    sequence BIGINT NOT NULL PRIMARY KEY,
    digest   TEXT   NOT NULL,
    location TEXT   NOT NULL,
    previous BIGINT NOT NULL, -- sequence that the delta is against; -1: everything is new
    delta    TEXT   NOT NULL, -- digest of the blob; empty: everything is new
    traceparent TEXT NOT NULL,
    done     BIGINT NOT NULL  -- 1: all that it touches was asked for
);

-- What is known to run, by who says so.
CREATE TABLE catalog_deployed (
    origin     TEXT   NOT NULL, -- for example a cluster, or "import"
    registry   TEXT   NOT NULL,
    repository TEXT   NOT NULL,
    digest     TEXT   NOT NULL,
    seen_at    BIGINT NOT NULL,
    PRIMARY KEY (origin, registry, repository, digest)
);
CREATE INDEX catalog_deployed_image ON catalog_deployed (digest);

ALTER TABLE catalog_images ADD COLUMN snapshot TEXT NOT NULL DEFAULT '';     -- digest, of the verdict
ALTER TABLE catalog_images ADD COLUMN asked BIGINT NOT NULL DEFAULT -1;      -- highest sequence that a verdict was asked for
ALTER TABLE catalog_images ADD COLUMN refresh_at BIGINT NOT NULL DEFAULT 0;  -- when the verdict is to be signed anew; 0: never
ALTER TABLE catalog_images ADD COLUMN late BIGINT NOT NULL DEFAULT 0;        -- 1: its verdict came after a newer snapshot
CREATE INDEX catalog_images_late ON catalog_images (late) WHERE late = 1;
CREATE INDEX catalog_images_refresh ON catalog_images (refresh_at);
CREATE INDEX catalog_images_inventory ON catalog_images (inventory);
UPDATE catalog_images SET refresh_at = attested_at + (valid_until - attested_at) / 4 * 3 WHERE attested_at > 0;

-- +goose Down
DROP INDEX catalog_images_inventory;
DROP INDEX catalog_images_refresh;
DROP INDEX catalog_images_late;
ALTER TABLE catalog_images DROP COLUMN late;
ALTER TABLE catalog_images DROP COLUMN refresh_at;
ALTER TABLE catalog_images DROP COLUMN asked;
ALTER TABLE catalog_images DROP COLUMN snapshot;
DROP TABLE catalog_deployed;
DROP TABLE catalog_snapshots;
DROP TABLE catalog_releases;
DROP TABLE catalog_inventory_parts;
DROP TABLE catalog_uses;
DROP TABLE catalog_inventories;

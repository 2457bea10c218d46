-- +goose Up

-- Whether a verdict was asked for by hand: 1 in the fresh lane, 2 in the lane of
-- what runs or does not, -1 it was sent and no verdict has come since; 0: no.
ALTER TABLE catalog_images ADD COLUMN requested BIGINT NOT NULL DEFAULT 0;
ALTER TABLE catalog_images ADD COLUMN retries BIGINT NOT NULL DEFAULT 0; -- failures since the verdict
CREATE INDEX catalog_images_requested ON catalog_images (requested) WHERE requested > 0;

-- What could not be looked at when the problem was last found: JSON list, or
-- empty where that was not kept.
ALTER TABLE catalog_problems ADD COLUMN gaps TEXT NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE catalog_problems DROP COLUMN gaps;
DROP INDEX catalog_images_requested;
ALTER TABLE catalog_images DROP COLUMN retries;
ALTER TABLE catalog_images DROP COLUMN requested;

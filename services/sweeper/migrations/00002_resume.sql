-- +goose Up

-- next_at is when the next sweep is due; one that pauses goes on at resume_at.
-- requested holds each kind at most once, in the order in which they were asked for.
ALTER TABLE sweeper_sources ADD COLUMN resume_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE sweeper_sources ADD COLUMN listing   TEXT   NOT NULL DEFAULT ''; -- digest of the settings that say what is listed

ALTER TABLE sweeper_tags ADD COLUMN seen    BIGINT NOT NULL DEFAULT 0;  -- the last sweep, no dry run, that read where it points
ALTER TABLE sweeper_tags ADD COLUMN since   BIGINT NOT NULL DEFAULT 0;  -- while it is due: webhooks before this are about an earlier push
ALTER TABLE sweeper_tags ADD COLUMN failure TEXT   NOT NULL DEFAULT ''; -- why the last look could not read where it points
UPDATE sweeper_tags SET seen = looked WHERE digest <> '';

-- +goose Down
ALTER TABLE sweeper_tags DROP COLUMN failure;
ALTER TABLE sweeper_tags DROP COLUMN since;
ALTER TABLE sweeper_tags DROP COLUMN seen;
ALTER TABLE sweeper_sources DROP COLUMN listing;
ALTER TABLE sweeper_sources DROP COLUMN resume_at;
